r"""Layers of a decoder without norms, where no gradient is wanted: separable convolutions in a
residual block, and into four times the pixels. Not public: layers call these in channels_last.

    h = conv1(x)            [N, H, ...]      conv: depthwise 3x3, pointwise, bias (`separables`)
    y = x + conv2(silu(h))  [N, C, ...]                                           separable_residual

    y[2i + a, 2j + b] = part 2a + b of the channels of conv(x)[i, j]              separable_upsample

In SnapGen's tiny decoder (arXiv 2412.09619) maps are large and have few channels, so that writing
and reading h, of twice the channels, is half of the time. On a CPU a part of h lives in the caches
and no longer, and parts are stored as pixels: one pass over memory. On a GPU these are launches of
`separable_conv2d`. With gradients h is kept, and layers call that operator twice.

The second is a sub-pixel convolution (Shi et al., arXiv 1609.05158) with the parts side by side: in
channels_last whole rows of channels move, where `pixel_shuffle`'s order would move single numbers.

Sums in float32 (float64 for float64), y is rounded once, from maps between that are rounded to the
dtype of x at most. Bytes at least: x, the weights and y once.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dfm_fast._library import define
from dfm_fast.ops.group_norms import wide_dtype
from dfm_fast.ops.separables import separable_conv2d_ref

_ops = torch.ops.dfm_fast
_LAST = torch.channels_last

# --- Reference ------------------------------------------------------------------------------------


def separable_residual_ref(
    x: Tensor,
    depthwise1: Tensor,
    pointwise1: Tensor,
    bias1: Tensor | None,
    depthwise2: Tensor,
    pointwise2: Tensor,
    bias2: Tensor | None,
) -> Tensor:
    """Defines `separable_residual`."""
    wide = x.to(wide_dtype(x)).contiguous()
    h = F.silu(_separable(wide, depthwise1, pointwise1, bias1))
    y = _separable(h, depthwise2, pointwise2, bias2, None, wide)
    return y.to(x.dtype).contiguous(memory_format=_LAST)


def separable_upsample_ref(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, bias: Tensor | None
) -> Tensor:
    """Defines `separable_upsample`."""
    return pixels_of(_separable(x, depthwise, pointwise, bias))


def _separable(*args: Any) -> Tensor:
    """Without statistics it is one tensor."""
    return cast(Tensor, separable_conv2d_ref(*args))


def pixels_of(parts: Tensor) -> Tensor:
    """[N, 4 O, H, W] -> [N, O, 2 H, 2 W], channels_last: part 2a + b of the channels is the pixels
    (2i + a, 2j + b)."""
    pixels = parts.unflatten(1, (2, 2, -1)).permute(0, 4, 1, 5, 2, 3)  # [N, H, a, W, b, O]
    return pixels.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2).contiguous(memory_format=_LAST)


# --- Registration ---------------------------------------------------------------------------------


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=_LAST)


def _fake_upsample(x: Tensor, depthwise: Tensor, pointwise: Tensor, *_: Any) -> Tensor:
    size = x.shape[0], pointwise.shape[0] // 4, 2 * x.shape[2], 2 * x.shape[3]
    return x.new_empty(size).contiguous(memory_format=_LAST)


def _flops(x: Any, depthwise: Any, pointwise: Any, *_: Any) -> int:
    return 2 * math.prod(x) * (pointwise[0] + depthwise[-1] ** 2)


def _flops_of_both(x: Any, depthwise1: Any, pointwise1: Any, *_: Any) -> int:
    hidden = x[0], pointwise1[0], *x[2:]
    return _flops(x, depthwise1, pointwise1) + _flops(hidden, depthwise1, x[1:])


define(
    "separable_residual(Tensor x, Tensor depthwise1, Tensor pointwise1, Tensor? bias1, "
    "Tensor depthwise2, Tensor pointwise2, Tensor? bias2) -> Tensor",
    reference=separable_residual_ref,
    fake=_fake,
    kernel="residuals:separable_residual",
    flops=_flops_of_both,
)
define(
    "separable_upsample(Tensor x, Tensor depthwise, Tensor pointwise, Tensor? bias) -> Tensor",
    reference=separable_upsample_ref,
    fake=_fake_upsample,
    kernel="residuals:separable_upsample",
    flops=_flops,
)

# --- Functions of layers --------------------------------------------------------------------------


def separable_residual(
    x: Tensor,
    depthwise1: Tensor,
    pointwise1: Tensor,
    bias1: Tensor | None,
    depthwise2: Tensor,
    pointwise2: Tensor,
    bias2: Tensor | None,
) -> Tensor:
    """x + conv2(silu(conv1(x))): x [N, C, H, W], channels_last; depthwise weights [C, 1, 3, 3] and
    [H, 1, 3, 3], pointwise [H, C, 1, 1] and [C, H, 1, 1], biases [H] and [C] or None, all like
    x -> the same."""
    return _ops.separable_residual(x, depthwise1, pointwise1, bias1, depthwise2, pointwise2, bias2)


def separable_upsample(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, bias: Tensor | None
) -> Tensor:
    """x [N, C, H, W], channels_last; weights [C, 1, 3, 3] and [4 O, C, 1, 1], bias [4 O] or None,
    all like x -> [N, O, 2 H, 2 W], channels_last: part 2a + b of the convolution's channels is the
    pixels (2i + a, 2j + b)."""
    return _ops.separable_upsample(x, depthwise, pointwise, bias)
