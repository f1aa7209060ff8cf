"""Layers of a decoder without norms: see `dfm_fast.ops.residuals` for what is computed.

Launches of `separables`; parts become pixels by a copy. Of large maps of few channels, in 2 bytes
an element, the two launches of a residual block read and write 6 C an element more than one pass
would; a kernel that keeps the hidden map on the chip would compute a border of it twice, 1.27 of
the work for tiles of 16 x 16 pixels: **not tried yet**.
"""

from __future__ import annotations

from torch import Tensor

from dfm_fast.kernels.separables import separable_conv2d
from dfm_fast.ops.group_norms import wide_dtype
from dfm_fast.ops.residuals import pixels_of


def separable_residual(
    x: Tensor,
    depthwise1: Tensor,
    pointwise1: Tensor,
    bias1: Tensor | None,
    depthwise2: Tensor,
    pointwise2: Tensor,
    bias2: Tensor | None,
) -> Tensor:
    h = _separable(x, depthwise1, pointwise1, bias1)
    # SiLU is that of a norm, the identity by statistics of mean 0 and variance 1.
    (n, hidden, height, width), wide = h.shape, wide_dtype(h)
    mean = h.new_zeros((n, hidden), dtype=wide)
    m2 = h.new_full((n, hidden), height * width, dtype=wide)
    norm = mean, m2, None, None, hidden, 0.0
    y, *_ = separable_conv2d(
        h, depthwise2, pointwise2, bias2, None, x, *norm, with_statistics=False
    )
    return y


def separable_upsample(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, bias: Tensor | None
) -> Tensor:
    return pixels_of(_separable(x, depthwise, pointwise, bias))


def _separable(x: Tensor, depthwise: Tensor, pointwise: Tensor, bias: Tensor | None) -> Tensor:
    no_norm = None, None, None, None, 1, 0.0
    y, *_ = separable_conv2d(
        x, depthwise, pointwise, bias, None, None, *no_norm, with_statistics=False
    )
    return y
