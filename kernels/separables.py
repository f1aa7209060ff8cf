"""Separable convolutions: see `dfm_fast.ops.separables` for what is computed.

Versions, of C channels, O outputs and P pixels in 2 bytes an element. Times are predictions for
an H200 (4.8 TB/s, products at 0.7 of 990 TFLOP/s, taps and SiLU at 34 TFLOP/s), in ps per element
of a map: **not measured yet**.

    1. eager: norm, SiLU, depthwise, product, shift, residual, statistics, each reading and writing.
    2. norm, SiLU and depthwise in one pass (`convolutions`), bound by memory: 0.8 an element of x;
       cuBLAS: 0.7 an element of y at C = 256, 1.5 at 512, 2.6 at 896, 5.2 at 1792; then shift,
       residual and statistics: 1.2 an element of y.
    3. the same pass, then a product that ends in these sums and in the moments of its tile's
       channels, which one small kernel merges in order: what `_pointwise_kernel` does. Saves 1.2 an
       element of y; so it wins over 2 where its product reaches 0.4 (C = 256), 0.55 (512), 0.7
       (896), 0.75 (1024, 1408), 0.8 (1792) of cuBLAS's speed.
    4. one kernel (`_separable_kernel`): the depthwise tile is the product's left operand and never
       leaves the chip. Saves the map between, 0.8 an element of x where it is not in the L2, and
       computes it again for every BN = 256 outputs, 0.8 an element and time: expected to win for
       O = 256 (the second convolution of blocks of 256), to draw at 512, to lose beyond.

3 serves with its default tile; `tuning` may choose another of its tiles, or 4.

The gradients of the pointwise convolution are torch's products: cuBLAS's of pixels' rows in 2 bytes
an element in channels_last, and in exact float32, else cuDNN's.
"""

# ruff: noqa: RUF005 (Triton's tuples do not unpack)

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_fast._library import INTERPRET
from dfm_fast.kernels import tuning
from dfm_fast.kernels._aot import Specialisation
from dfm_fast.kernels.convolutions import activated, depthwise_conv2d, load_row, norm_of, taps
from dfm_fast.kernels.group_norms import Plan, applied_norm, merge_moments
from dfm_fast.kernels.launching import cdiv, on_device, planned, registers
from dfm_fast.kernels.products import (
    ARCHITECTURES,
    SIZES,
    TILES,
    Tile,
    accumulator,
    architecture,
    is_last,
    multiply_step,
    precision,
    row_of,
    tiles_of,
    to_check,
)
from dfm_fast.ops._layouts import empty_in, lay_out, memory_format
from dfm_fast.ops._rows import exact_on_gpu
from dfm_fast.ops.group_norms import wide_dtype
from dfm_fast.ops.separables import pointwise_backward, pointwise_backward_of_rows


@triton.jit
def _finish(
    acc, bias_ptr, shift_ptr, residual_ptr, y_ptr, mean_ptr, m2_ptr,
    n, o, at, mask, pixels, part, OUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The epilogue: sums, y, and the moments of its channels in this tile of `pixels` pixels."""
    kept = o < OUT
    if bias_ptr is not None:
        acc += row_of(bias_ptr, o, kept, ACC)
    if shift_ptr is not None:
        acc += row_of(shift_ptr, n * OUT + o, kept, ACC)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask, 0).to(ACC)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask)
    if mean_ptr is not None:
        pixels = pixels.to(ACC)
        v = tl.where(mask, y.to(ACC), 0.0)
        centre = tl.sum(v, 0) / pixels
        d = tl.where(mask, v - centre[None, :], 0.0)
        rest = tl.sum(d, 0)
        m2 = tl.maximum(tl.sum(d * d, 0) - rest * (rest / pixels), 0.0)
        tl.store(mean_ptr + 2 * part * OUT + o, centre, kept)
        tl.store(mean_ptr + (2 * part + 1) * OUT + o, rest / pixels, kept)
        tl.store(m2_ptr + part * OUT + o, m2, kept)


@triton.jit
def _pointwise_kernel(
    a_ptr,  # [N, P, C], or [N, C, P]
    weight_ptr,  # [O, C]
    bias_ptr, shift_ptr,  # [O], [N, O] or None
    residual_ptr, y_ptr,  # [N, P, O], or [N, O, P]; residual or None
    mean_ptr, m2_ptr,  # [N, blocks, 2, O] and [N, blocks, O], or None
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
    mask = (p < P)[:, None] & (o < OUT)[None, :]
    if LAST:
        at = (n * P + p[:, None]) * OUT + o[None, :]
    else:
        at = (n * OUT + o[None, :]) * P + p[:, None]
    _finish(
        acc, bias_ptr, shift_ptr, residual_ptr, y_ptr, mean_ptr, m2_ptr,
        n, o, at, mask, tl.minimum(P - block * BM, BM), n * blocks + block, OUT, ACC,
    )  # fmt: skip


@triton.jit
def _stacked(tiles, N: tl.constexpr):
    """[N M, K] of N tiles [M, K]: row m N + i is row m of tile i. N is a power of two."""
    for level in tl.static_range(6):
        if N >> (level + 1) > 0:
            pairs = ()
            for i in tl.static_range(N >> (level + 1)):
                pair = tl.join(tiles[i], tiles[i + (N >> (level + 1))])
                pair = tl.permute(pair, (0, 2, 1))
                pairs = pairs + (tl.reshape(pair, (2 * pair.shape[0], pair.shape[2])),)
            tiles = pairs
    return tiles[0]


@triton.jit
def _separable_kernel(
    x_ptr,  # [N, H, W, C]
    depthwise_ptr,  # [C, 3, 3]
    scale_ptr, offset_ptr, centre_ptr,  # [N, C] or None
    weight_ptr,  # [O, C]
    bias_ptr, shift_ptr,  # [O], [N, O] or None
    residual_ptr, y_ptr,  # [N, H, W, O]; residual or None
    mean_ptr, m2_ptr,  # [N, blocks, 2, O] and [N, blocks, O], or None
    H, W, C: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS x (LANES COLS) pixels, whole: they divide H and W. A lane has COLS columns."""
    NC: tl.constexpr = COLS + 2
    PART: tl.constexpr = ROWS * COLS  # pixels of a lane
    NARROW: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    columns, across = tl.cdiv(OUT, BN), W // (LANES * COLS)
    blocks = H // ROWS * across
    pid = tl.program_id(0)
    block = pid // columns % blocks
    n = pid // (columns * blocks)
    if WIDE:
        n = n.to(tl.int64)
    h, left = block // across * ROWS, block % across * (LANES * COLS)
    w = left + tl.arange(0, LANES)[:, None] * COLS - 1
    o = pid % columns * BN + tl.arange(0, BN)
    acc = tl.zeros([PART * LANES, BN], ACC)
    for first in range(0, C, BK):
        c = first + tl.arange(0, BK)[None, :]
        kept, base = c < C, n * (H * W) * C + c
        norm = norm_of(scale_ptr, offset_ptr, centre_ptr, n * C + c, kept, NARROW)
        weights = ()
        for t in tl.static_range(9):
            weights = weights + (tl.load(depthwise_ptr + c * 9 + t, kept, 0).to(ACC),)
        rows = ()
        for i in tl.static_range(2):
            row = load_row(x_ptr, base, C, kept, h + i - 1, w, H, W, NC, False, False, False)
            rows = rows + activated(
                row, norm, kept, h + i - 1, w, H, W, NC, ACC, NARROW, False, False
            )
        tiles = ()
        for r in tl.static_range(ROWS):
            row = load_row(x_ptr, base, C, kept, h + r + 1, w, H, W, NC, False, False, False)
            rows = rows + activated(
                row, norm, kept, h + r + 1, w, H, W, NC, ACC, NARROW, False, False
            )
            for p in tl.static_range(COLS):
                a = taps(weights, rows, r * NC + p, 3, NC)
                tiles = tiles + (a.to(x_ptr.dtype.element_ty),)
        k = first + tl.arange(0, BK)[:, None]
        b = tl.load(weight_ptr + o[None, :] * C + k, (k < C) & (o < OUT)[None, :], 0)
        acc = multiply_step(_stacked(tiles, PART), b, acc, PRECISION)
    m = tl.arange(0, PART * LANES)
    p = (h + m % PART // COLS) * W + left + m // PART * COLS + m % COLS
    at, pixels = (n * (H * W) + p[:, None]) * OUT + o[None, :], tl.full([], PART * LANES, tl.int32)
    mask = (o < OUT)[None, :] & (p >= 0)[:, None]
    _finish(
        acc, bias_ptr, shift_ptr, residual_ptr, y_ptr, mean_ptr, m2_ptr,
        n, o, at, mask, pixels, n * blocks + block, OUT, ACC,
    )  # fmt: skip


# --- Launching ------------------------------------------------------------------------------------


class Whole(NamedTuple):
    """What a program of the one kernel computes, and how: ROWS x (LANES COLS) pixels, BN outputs,
    BK channels at a time."""

    ROWS: int
    COLS: int
    LANES: int
    BN: int
    BK: int
    warps: int
    stages: int

    @property
    def pixels(self) -> int:
        return self.ROWS * self.COLS * self.LANES


# NVIDIA's, AMD's. From registers and limits, not from measurements: of 64 pixels and 256 outputs a
# thread has 64 sums; as many outputs again would leave too few registers for the taps.
WHOLE = Whole(4, 4, 4, 256, 64, 8, 2), Whole(4, 2, 8, 128, 32, 8, 1)

# "1": one kernel wherever it can, "0": nowhere, else as `tuning` chooses.
ONE_KERNEL = os.environ.get("DFM_FAST_SEPARABLE", "")


@planned
def _candidates(
    device: torch.device,
    dtype: torch.dtype,
    last: bool,
    side: int,  # of the depthwise kernel
    height: int,
    width: int,
    asked: str,  # ONE_KERNEL
) -> tuple[str, tuple[Tile | Whole, ...]]:
    """Their name, and tiles of two kernels (of the second), the default first, and one kernel."""
    two, whole = tiles_of(dtype, last), WHOLE[architecture(device) == 0]
    can = (
        asked != "0"
        and (INTERPRET or dtype.itemsize == 2)
        and last
        and side == 3
        and height % whole.ROWS == 0
        and width % (whole.COLS * whole.LANES) == 0
    )
    if not can:
        return "two", two
    return ("one", (whole,)) if asked == "1" else ("any", (*two, whole))


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
    (n, channels, height, width), outputs = x.shape, pointwise_weight.shape[0]
    y = empty_in(memory_format(x), x, (n, outputs, height, width))
    wide, size = wide_dtype(x), y.shape[:2] if with_statistics else (0,)
    found = x.new_empty(size, dtype=wide), x.new_empty(size, dtype=wide)
    if not y.numel():
        return y, *found
    side, last, rows = depthwise_weight.shape[-1], is_last(x), n * height * width
    ways, candidates = _candidates(x.device, x.dtype, last, side, height, width, ONE_KERNEL)
    layout = "NHWC" if last else "NCHW"
    exact = x.dtype, layout, precision(x), side, channels, outputs, ways
    norm = mean, m2, norm_weight, norm_bias, None, num_groups, eps
    epilogue = pointwise_weight, bias, shift, residual, y
    run = functools.partial(_launch, x, depthwise_weight, norm, epilogue, found)
    with on_device(x):
        run(tuning.choose("separable_conv2d", x.device, rows, exact, candidates, run))
    return y, *found


def _launch(
    x: Tensor,
    depthwise_weight: Tensor,
    norm: tuple[Any, ...],
    epilogue: tuple[Any, ...],
    found: tuple[Tensor, Tensor],
    how: Tile | Whole,
) -> Any:
    """Fill the output, the last of `epilogue`, and its statistics `found` where they have room."""
    (n, _, height, width), y = x.shape, epilogue[-1]
    pixels, one = height * width, isinstance(how, Whole)
    block_pixels = how.pixels if one else how.BM
    blocks = cdiv(pixels, block_pixels)
    partials: tuple[Tensor | None, ...] = (None, None)
    if found[0].numel():
        sizes = (n, blocks, 2, y.shape[1]), (n, blocks, y.shape[1])
        partials = tuple(x.new_empty(size, dtype=found[0].dtype) for size in sizes)
    launch = _one_kernel if one else _two_kernels
    compiled = launch(x, depthwise_weight, norm, how, n * blocks, *epilogue, *partials)
    if found[0].numel():
        merge_moments(y, Plan(0, pixels, blocks, block_pixels, (0, 0, 0), {}), partials, found)
    return compiled


def _two_kernels(
    x: Tensor,
    depthwise_weight: Tensor,
    norm: tuple[Any, ...],
    tile: Tile,
    tiles: int,
    *rest: Tensor | None,
) -> Any:
    """`rest`: the pointwise weight, what the epilogue reads, and what it writes."""
    padding = [depthwise_weight.shape[-1] // 2] * 2
    a = depthwise_conv2d(x, depthwise_weight, None, *norm, 1, padding)
    outputs, y = len(rest[0]), rest[4]
    return _pointwise_kernel[(tiles * cdiv(outputs, tile.BN),)](
        a, *rest, x.shape[2] * x.shape[3], x.shape[1], outputs,
        ACC=accumulator(x), PRECISION=precision(x), LAST=is_last(x),
        BM=tile.BM, BN=tile.BN, BK=tile.BK, WIDE=max(a.numel(), y.numel()) >= 2**31,
        num_warps=tile.warps, num_stages=tile.stages, **_registers(x, tile),
    )  # fmt: skip


def _registers(x: Tensor, tile: Tile) -> dict[str, int]:
    return TWO_AT_A_TIME if architecture(x.device) == 9 and tile == TILES[2, True][0] else {}


# Programs on a Hopper: one loads and multiplies while another adds what is added and takes moments,
# which is half of the work of few channels. Elsewhere it spills.
TWO_AT_A_TIME = registers(128)


def _one_kernel(
    x: Tensor,
    depthwise_weight: Tensor,
    norm: tuple[Any, ...],
    whole: Whole,
    tiles: int,
    *rest: Tensor | None,
) -> Any:
    outputs, y = len(rest[0]), rest[4]
    return _separable_kernel[(tiles * cdiv(outputs, whole.BN),)](
        x, depthwise_weight, *applied_norm(x, *norm), *rest, *x.shape[2:], x.shape[1], outputs,
        ACC=accumulator(x), PRECISION=precision(x), WIDE=max(x.numel(), y.numel()) >= 2**31,
        **_blocks(whole), num_warps=whole.warps, num_stages=whole.stages,
    )  # fmt: skip


def _blocks(tile: Tile | Whole) -> dict[str, int]:
    return {name: v for name, v in tile._asdict().items() if name not in ("warps", "stages")}


def pointwise_conv2d_backward(
    dy: Tensor, a: Tensor, weight: Tensor, *, need_da: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    needs = need_da, need_dweight
    if INTERPRET or not a.numel():
        return pointwise_backward(dy, a, weight, *needs, wide_dtype(a) if INTERPRET else a.dtype)
    narrow = a.dtype.itemsize == 2 and is_last(a)
    if not narrow and not exact_on_gpu(a):
        return pointwise_backward(dy, a, weight, *needs, a.dtype)
    da, dweight = pointwise_backward_of_rows(dy, a, weight, *needs)
    none = a.new_empty(0)
    da = lay_out(da, memory_format(a)) if need_da else none
    return da, dweight.to(wide_dtype(a)) if need_dweight else none.to(wide_dtype(a))


# --- Ahead of time --------------------------------------------------------------------------------


def specialisations() -> Iterator[Specialisation]:
    shape = {"C": 512, "OUT": 1024}
    for dtype, last in itertools.product(SIZES, (True, False)):
        acc = tl.float64 if dtype == "fp64" else tl.float32
        constants = {**shape, "ACC": acc, "PRECISION": "ieee", "LAST": last, "WIDE": False}
        for rest, tile, targets in to_check(TILES[SIZES[dtype], last], dtype):
            name = f"pointwise {'NHWC' if last else 'NCHW'}{rest}"
            given = name, _pointwise_kernel, dtype, tile, constants
            two = {"sm_90"} & set(targets) if tile == TILES[2, True][0] else set()
            yield _specialisation(*given, targets=tuple(t for t in targets if t not in two))
            if two:
                yield _specialisation(*given, targets=tuple(two), options=TWO_AT_A_TIME)
    shape = {"C": 512, "OUT": 256}
    for dtype, norm in itertools.product(("bf16", "fp16"), (True, False)):
        constants = {**shape, "ACC": tl.float32, "PRECISION": "ieee", "WIDE": False}
        absent = () if norm else ("scale_ptr", "offset_ptr", "centre_ptr")
        name = f"separable_conv2d{' norm' * norm}"
        given = name, _separable_kernel, dtype
        yield _specialisation(*given, WHOLE[0], constants, absent, NVIDIA)
        yield _specialisation(*given, WHOLE[1], constants, absent, AMD)


NVIDIA = tuple(target for target, arch in ARCHITECTURES.items() if arch)
AMD = tuple(target for target, arch in ARCHITECTURES.items() if not arch)
WIDE = ("mean_ptr", "m2_ptr", "scale_ptr", "offset_ptr", "centre_ptr")


def _specialisation(
    name: str,
    kernel: triton.JITFunction,
    dtype: str,
    tile: Any,
    constants: dict[str, Any],
    absent: tuple[str, ...] = (),
    targets: tuple[str, ...] = tuple(ARCHITECTURES),
    options: dict[str, int] | None = None,
) -> Specialisation:
    constants = {**constants, **_blocks(tile)}
    wide = "*fp64" if dtype == "fp64" else "*fp32"
    arguments: dict[str, str | None] = {
        a: (wide if a in WIDE else "*") if a.endswith("_ptr") else "i32"
        for a in kernel.arg_names
        if a not in constants
    }
    return Specialisation(
        name, kernel, dtype, arguments | dict.fromkeys(absent), constants, tile.warps, targets,
        128, {"num_stages": tile.stages, **(options or {})}, matrix=SIZES[dtype] == 2,
    )  # fmt: skip
