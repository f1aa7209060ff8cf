r"""Nearest upsampling by 2 and a 3x3 convolution, computed on the small map.

    y = conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)

Of four neighbouring outputs each sees the same pixels of x under several taps. Along one axis, with
taps k0 k1 k2 and x = 0 outside:

    y[2i] = k0 x[i-1] + (k1 + k2) x[i]        y[2i+1] = (k0 + k1) x[i] + k2 x[i+1]

so y is four convolutions with 2x2 *phase weights*, sums of taps: 16 products of C x O matrices for
four outputs where the definition has 36. And with s = k0 + k1 + k2 and d[i] = x[i] - x[i-1]

    y[2i] = s x[i] - k0 d[i]                  y[2i+1] = s x[i] + k2 d[i+1]

three products along an axis instead of four: nine for four outputs (minimal filtering, as Winograd
1980). Both are equal to the definition up to rounding. Nine need differences of x, which a
low-precision product would round, so they are for float32 arithmetic; four phases round their
weights once. Which is used where: `csrc/cpu/upsamples.cpp` and `kernels/upsamples.py`.

x [N, C, H, W], weight [O, C, 3, 3], y [N, O, 2H, 2W]. Accumulated in float32 (float64 for float64).
Saved for backward: x and weight. Gradients are those of the phases: dy's four phases are the
channels of one map on the small grid, and the phase weights' gradient goes back to the taps by the
adjoint of their sums. Bytes at least: x, weight and y once.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dfm_fast import _checks
from dfm_fast._library import define, differentiable, operator
from dfm_fast.ops._layouts import dense, empty_in, lay_out, memory_format
from dfm_fast.ops._rows import product_over_rows, rows_of
from dfm_fast.ops.group_norms import wide_dtype
from dfm_fast.ops.pyramids import nbytes

_ops = torch.ops.dfm_fast

# --- Reference ------------------------------------------------------------------------------------


def upsample_conv2d_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Defines `upsample_conv2d`."""
    wide = wide_dtype(x)
    up = F.interpolate(x.to(wide), scale_factor=2.0, mode="nearest")
    y = F.conv2d(up, weight.to(wide), None if bias is None else bias.to(wide), padding=1)
    return lay_out(y.to(x.dtype), memory_format(x))


# --- Phases ---------------------------------------------------------------------------------------

# _TAPS[a][p][k]: output 2i + a sees pixel i + a - 1 + p under tap k.
_TAPS = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))


def _taps(x: Tensor) -> Tensor:
    return _taps_on(x.device, wide_dtype(x))


@functools.cache
def _taps_on(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Kept: a copy from the host would wait for a GPU, and no CUDA graph takes it."""
    with torch.inference_mode(False):
        return torch.tensor(_TAPS, dtype=dtype, device=device)


def phase_weights(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] -> [4, O, C, 2, 2]: phase 2a + b makes outputs (2i + a, 2j + b). Summed in wide
    precision and rounded once."""
    taps = _taps(weight)
    sums = torch.einsum("apk,bql,ockl->abocpq", taps, taps, weight.to(taps.dtype))
    return sums.flatten(0, 1).to(weight.dtype)


def tap_gradients(dphases: Tensor) -> Tensor:
    """Adjoint of `phase_weights`, in wide precision."""
    taps = _taps(dphases)
    dphases = dphases.to(taps.dtype).unflatten(0, (2, 2))
    return torch.einsum("apk,bql,abocpq->ockl", taps, taps, dphases)


def split_phases(dy: Tensor) -> Tensor:
    """[N, O, 2H, 2W] -> [N, 4 O, H + 1, W + 1]: what a 2x2 convolution with padding 1 by the phase
    weights gives at those places; 0 where no output comes from."""
    n, o, h, w = dy.shape[0], dy.shape[1], dy.shape[2] // 2, dy.shape[3] // 2
    phases = empty_in(memory_format(dy), dy, (n, 4 * o, h + 1, w + 1)).zero_()
    for a in range(2):
        for b in range(2):
            at = (2 * a + b) * o
            phases[:, at : at + o, a : a + h, b : b + w] = dy[:, :, a::2, b::2]
    return phases


def gradients_of_phases(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) by torch's convolution of the phases in `dtype`."""
    found = _fake_backward(dy, x, weight, need_dx=need_dx, need_dweight=need_dweight)
    torch.sum(dy, (0, 2, 3), dtype=wide_dtype(x), out=found[2])
    if not x.numel():
        return found[0], found[1].zero_(), found[2]
    phases, kernels = split_phases(dy.to(dtype)), phase_weights(weight.to(dtype)).flatten(0, 1)
    dx, dphases, _ = torch.ops.aten.convolution_backward(
        phases, x.to(dtype), kernels, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
        (need_dx, need_dweight, False),
    )  # fmt: skip
    if need_dx:
        found[0].copy_(dx)
    if need_dweight:
        found[1].copy_(tap_gradients(dphases.unflatten(0, (4, -1))))
    return found


def gradients_of_rows(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `gradients_of_phases`, by products of pixels' rows."""
    found = _fake_backward(dy, x, weight, need_dx=need_dx, need_dweight=need_dweight)
    torch.sum(dy, (0, 2, 3), dtype=wide_dtype(x), out=found[2])
    if not x.numel():
        return found[0], found[1].zero_(), found[2]
    (n, c, h, w), o = x.shape, weight.shape[0]
    taps, places = ((0, 0), (0, 1), (1, 0), (1, 1)), (n, h + 1, w + 1)
    with torch.autocast(x.device.type, enabled=False):
        rows = rows_of(split_phases(dy))
        if need_dx:
            kernels = phase_weights(weight).permute(0, 1, 3, 4, 2).reshape(4, o, 4 * c)
            phases = zip(rows.split(o, 1), kernels, strict=True)  # each a chain of sums of its own
            seen = sum(a @ b for a, b in phases).view(*places, 4, c)
            parts = (seen[:, 1 - p : 1 - p + h, 1 - q : 1 - q + w, 2 * p + q] for p, q in taps)
            found[0].copy_(sum(parts).permute(0, 3, 1, 2))
        if need_dweight:
            around = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
            seen = torch.stack([around[:, p : p + h + 1, q : q + w + 1] for p, q in taps], 3)
            dphases = product_over_rows(rows, seen.view(-1, 4 * c)).view(4, o, 2, 2, c)
            found[1].copy_(tap_gradients(dphases.permute(0, 1, 4, 2, 3)))
    return found


# --- Raw operators, in torch ----------------------------------------------------------------------


def upsample_conv2d_backward_ref(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As the definition: what is upsampled is convolved, and its gradient summed again."""
    found = _fake_backward(dy, x, weight, need_dx=need_dx, need_dweight=need_dweight)
    torch.sum(dy, (0, 2, 3), dtype=wide_dtype(x), out=found[2])
    if not x.numel():
        return found[0], found[1].zero_(), found[2]
    # Contiguous, as the rounding error of torch's convolutions on a CPU depends on the layout.
    dy, x, weight = (v.to(wide_dtype(x)).contiguous() for v in (dy, x, weight))
    up = F.interpolate(x, scale_factor=2.0, mode="nearest")
    dup, dweight, _ = torch.ops.aten.convolution_backward(
        dy, up, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
        (need_dx, need_dweight, False),
    )  # fmt: skip
    if need_dx:
        found[0].copy_(dup.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).sum((3, 5)))
    if need_dweight:
        found[1].copy_(dweight)
    return found


# --- Registration ---------------------------------------------------------------------------------


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, _, h, w = x.shape
    return empty_in(memory_format(x), x, (n, weight.shape[0], 2 * h, 2 * w))


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, *, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of parameters are in wide precision: they are sums over the batch."""
    dx = empty_in(memory_format(x), x, x.shape) if need_dx else x.new_empty(0)
    dweight = x.new_empty(weight.shape if need_dweight else (0,), dtype=wide_dtype(x))
    return dx, dweight, x.new_empty(weight.shape[0], dtype=wide_dtype(x))


def _flops(x: Any, weight: Any) -> int:
    """Of the four phases: 4 / 9 of the definition's."""
    return 2 * 16 * x[0] * x[2] * x[3] * weight[0] * weight[1]


define(
    "upsample_conv2d(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=upsample_conv2d_ref,
    fake=_fake,
    kernel="upsamples:upsample_conv2d",
    flops=lambda x, weight, bias: _flops(x, weight),
)
define(
    "upsample_conv2d_backward(Tensor dy, Tensor x, Tensor weight, *, bool need_dx, "
    "bool need_dweight) -> (Tensor, Tensor, Tensor)",
    reference=upsample_conv2d_backward_ref,
    fake=_fake_backward,
    kernel="upsamples:upsample_conv2d_backward",
    flops=lambda dy, x, weight, *, need_dx, need_dweight: (
        (need_dx + need_dweight) * _flops(x, weight) + math.prod(dy)
    ),
)

# --- Gradients ------------------------------------------------------------------------------------


class _UpsampleConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias = None if bias is None else bias.dtype
        return _ops.upsample_conv2d(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad
        dx, dweight, dbias = _ops.upsample_conv2d_backward(
            dense(dy, memory_format(x)), x, weight, need_dx=need_dx, need_dweight=need_dweight
        )
        return (
            dx if need_dx else None,
            lay_out(dweight.to(weight.dtype), memory_format(weight)) if need_dweight else None,
            dbias.to(ctx.bias) if need_dbias else None,
        )


# --- Public function ------------------------------------------------------------------------------


def _check(op: str, x: Any, weight: Any, bias: Any) -> None:
    _checks.tensor(op, "x", x, (4,))
    if not math.prod(x.shape[1:]):
        _checks.fail(op, "x", "at least one channel and pixel", list(x.shape))
    _checks.tensor(op, "weight", weight, (4,))
    _checks.like(op, "weight", weight, "x", x)
    if weight.shape[1:] != (x.shape[1], 3, 3) or not weight.shape[0]:
        _checks.fail(op, "weight", f"shape [O, {x.shape[1]}, 3, 3]", list(weight.shape))
    if bias is not None:
        _checks.tensor(op, "bias", bias, (1,))
        _checks.like(op, "bias", bias, "x", x)
        if bias.shape != weight.shape[:1]:
            _checks.fail(op, "bias", f"shape {[weight.shape[0]]}", list(bias.shape))


def _cost(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    y = 4 * x[:, :1].numel() * weight.shape[0] * x.element_size()
    return y + nbytes(x, weight, *(() if bias is None else (bias,)))


@operator(
    reference=upsample_conv2d_ref,
    raw=("upsample_conv2d", "upsample_conv2d_backward"),
    cost=_cost,
)
def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Nearest upsampling by 2 and a 3x3 convolution with padding 1, on the small map:
    `F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)`.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64; contiguous or channels_last (kept;
            any other layout is copied to contiguous first).
        weight: [O, C, 3, 3], like x.
        bias: [O], like x, or None.

    Returns:
        [N, O, 2H, 2W] in x's memory format. Sums of taps, and of differences of x, take the place
        of products: equal up to rounding, with 4/9 of the products or fewer.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, no channel or pixel.
    """
    _check("upsample_conv2d", x, weight, bias)
    given = dense(x), dense(weight), None if bias is None else bias.contiguous()
    if differentiable(*(v for v in given if v is not None)):
        return _UpsampleConv2d.apply(*given)
    return _ops.upsample_conv2d(*given)
