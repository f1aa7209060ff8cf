"""Separable convolutions: see `dfm_fast.ops.separables` for what is computed.

Two launches: norm, SiLU and depthwise convolution in one pass (`convolutions`), then a product of
pixels and the pointwise weight that ends in the sums with bias, shift and residual and in the
moments of its tile's channels, which one small kernel merges in order. A single launch would hold
the depthwise map in shared memory, but has to make it again for every tile of output channels, and
none holds all of them.

The gradients of the pointwise convolution are torch's (cuDNN's, cuBLAS's) products.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_fast._library import INTERPRET
from dfm_fast.kernels._aot import Specialisation
from dfm_fast.kernels.convolutions import depthwise_conv2d
from dfm_fast.kernels.group_norms import Plan, merge_moments
from dfm_fast.kernels.resample import on_device
from dfm_fast.ops._layouts import empty_in, memory_format
from dfm_fast.ops.group_norms import wide_dtype
from dfm_fast.ops.separables import pointwise_backward


class Tile(NamedTuple):
    """What a program computes, and how: outputs BM x BN, BK channels at a time."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


# By bytes an element, and whether in channels_last: planes take more registers, as their tiles are
# not loaded in vectors where the number of pixels is any. Those of 2 bytes are products of tensor
# cores (wgmma on sm_90); float32 in TF32 too where torch's convolutions are allowed to.
TILES = {
    (2, True): Tile(128, 128, 64, 8, 3),
    (2, False): Tile(128, 64, 32, 8, 3),
    (4, True): Tile(64, 64, 32, 4, 2),
    (4, False): Tile(64, 64, 32, 4, 2),
    (8, True): Tile(16, 16, 16, 4, 1),
    (8, False): Tile(16, 16, 16, 4, 1),
}


def tile_of(x: Tensor) -> Tile:
    """The interpreter's time is per operation: there large ones."""
    last = memory_format(x) != torch.contiguous_format
    return Tile(256, 256, 256, 4, 1) if INTERPRET else TILES[x.element_size(), last]


def precision(x: Tensor) -> str:
    return "tf32" if x.is_cuda and torch.backends.cudnn.allow_tf32 else "ieee"


@triton.jit
def multiply_step(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, products of float64 without tensor cores."""
    if acc.dtype == tl.float64:
        return acc + tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _pointwise_kernel(
    a_ptr,  # [N, P, C], or [N, C, P]
    weight_ptr,  # [O, C]
    bias_ptr, shift_ptr,  # [O], [N, O] or None
    residual_ptr, y_ptr,  # [N, P, O], or [N, O, P]; residual or None
    mean_ptr, m2_ptr,  # [N, blocks, O] or None
    P, C: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    LAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    columns, blocks = tl.cdiv(OUT, BN), tl.cdiv(P, BM)
    pid = tl.program_id(0)
    block = pid // columns % blocks
    n = pid // (columns * blocks)
    if WIDE:
        n = n.to(tl.int64)
    p = block * BM + tl.arange(0, BM)
    o = pid % columns * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], ACC)
    for first in range(0, C, BK):
        c = first + tl.arange(0, BK)
        inside = (p < P)[:, None] & (c < C)[None, :]
        if LAST:
            a = tl.load(a_ptr + (n * P + p[:, None]) * C + c[None, :], inside, 0)
        else:
            a = tl.load(a_ptr + (n * C + c[None, :]) * P + p[:, None], inside, 0)
        kept = (c < C)[:, None] & (o < OUT)[None, :]
        w = tl.load(weight_ptr + o[None, :] * C + c[:, None], kept, 0)
        acc = multiply_step(a, w, acc, PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, o < OUT, 0).to(ACC)[None, :]
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + n * OUT + o, o < OUT, 0).to(ACC)[None, :]
    mask = (p < P)[:, None] & (o < OUT)[None, :]
    if LAST:
        at = (n * P + p[:, None]) * OUT + o[None, :]
    else:
        at = (n * OUT + o[None, :]) * P + p[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask, 0).to(ACC)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask)
    if mean_ptr is not None:
        v = tl.where(mask, y.to(ACC), 0.0)
        pixels = tl.minimum(P - block * BM, BM).to(ACC)
        centre = tl.sum(v, 0) / pixels
        d = tl.where(mask, v - centre[None, :], 0.0)
        rest = tl.sum(d, 0)
        m2 = tl.maximum(tl.sum(d * d, 0) - rest * (rest / pixels), 0.0)
        partial = (n * blocks + block) * OUT + o
        tl.store(mean_ptr + partial, centre + rest / pixels, o < OUT)
        tl.store(m2_ptr + partial, m2, o < OUT)


def _acc(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    num_groups: int,
    eps: float,
    *,
    with_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, channels, height, width = x.shape
    outputs, pixels = pointwise_weight.shape[0], height * width
    y = empty_in(memory_format(x), x, (n, outputs, height, width))
    wide, size = wide_dtype(x), y.shape[:2] if with_statistics else (0,)
    found = x.new_empty(size, dtype=wide), x.new_empty(size, dtype=wide)
    if not y.numel():
        return y, *found
    norm = mean, m2, norm_weight, norm_bias, None, num_groups, eps
    padding = [depthwise_weight.shape[-1] // 2] * 2
    a = depthwise_conv2d(x, depthwise_weight, None, *norm, 1, padding)
    tile = tile_of(x)
    blocks = triton.cdiv(pixels, tile.BM)
    partials: tuple[Tensor | None, ...] = (None, None)
    if with_statistics:
        partials = tuple(x.new_empty((n, blocks, outputs), dtype=wide) for _ in range(2))
    with on_device(x):
        _pointwise_kernel[(n * blocks * triton.cdiv(outputs, tile.BN),)](
            a, pointwise_weight, bias, shift, residual, y, *partials, pixels, channels, outputs,
            ACC=_acc(x), PRECISION=precision(x), LAST=memory_format(x) != torch.contiguous_format,
            BM=tile.BM, BN=tile.BN, BK=tile.BK, WIDE=max(a.numel(), y.numel()) >= 2**31,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if with_statistics:
            merge_moments(y, Plan(0, pixels, blocks, tile.BM, (0, 0, 0), {}), partials, found)
    return y, *found


def pointwise_conv2d_backward(
    dy: Tensor, a: Tensor, weight: Tensor, *, need_da: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    dtype = wide_dtype(a) if INTERPRET else a.dtype
    return pointwise_backward(dy, a, weight, need_da, need_dweight, dtype)


# --- Ahead of time --------------------------------------------------------------------------------

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def specialisations() -> Iterator[Specialisation]:
    shape = {"C": 512, "OUT": 1024}
    for dtype, last in itertools.product(SIZES, (True, False)):
        tile, wide = TILES[SIZES[dtype], last], "*fp64" if dtype == "fp64" else "*fp32"
        acc = tl.float64 if dtype == "fp64" else tl.float32
        blocks = {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK}
        constants: dict[str, Any] = {**shape, **blocks, "ACC": acc, "LAST": last, "WIDE": False}
        names = [name for name in _pointwise_kernel.arg_names if name.endswith("_ptr")]
        pointers = {name: wide if name in ("mean_ptr", "m2_ptr") else "*" for name in names}
        yield Specialisation(
            f"pointwise {'NHWC' if last else 'NCHW'}",
            _pointwise_kernel,
            dtype,
            {**pointers, "P": "i32"},
            {**constants, "PRECISION": "ieee"},
            warps=tile.warps,
            load_bits=128,
            options={"num_stages": tile.stages},
        )
