"""Nearest upsampling and a 3x3 convolution: see `dfm_fast.ops.upsamples` for what is computed.

Four 2x2 phases, as one implicit product: a program has a tile of pixels of x of one phase and walks
through its four taps and all channels; it writes its outputs where they belong, so that no map of
phases is written. Tensor cores round what they multiply, so the nine products of differences are
not for them; phase weights are summed in float32 and rounded once.

Pixels are rows of channels: planes are transposed before and after, which moves x and y once more,
and is a fraction of what gathering a tile from planes costs (2.8 times the whole, on an H200).

The gradients are torch's (cuDNN's) convolution of dy's phases; of exact float32 products of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_fast._library import INTERPRET
from dfm_fast.kernels import tuning
from dfm_fast.kernels._aot import Specialisation
from dfm_fast.kernels.launching import cdiv, on_device
from dfm_fast.kernels.products import (
    SIZES,
    TILES,
    Tile,
    accumulator,
    is_last,
    multiply_step,
    precision,
    row_of,
    tiles_of,
    to_check,
)
from dfm_fast.ops._layouts import empty_in, lay_out, memory_format
from dfm_fast.ops._rows import exact_on_gpu
from dfm_fast.ops.upsamples import (
    gradients_of_phases,
    gradients_of_rows,
    upsample_conv2d_backward_ref,
)

PAIRS = 1 << 14 if INTERPRET else 256  # of channels, of a program that sums taps
SIDE = 256 if INTERPRET else 64  # of a tile that is transposed


@triton.jit
def _phases_kernel(
    weight_ptr,  # [O, C, 3, 3], strided
    out_ptr,  # [phases 2a + b, taps 2p + q, O, C]
    n, C, stride_o, stride_c, stride_h, stride_w, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of taps as `phase_weights` makes them, each rounded once; n = O C."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    first = weight_ptr + at // C * stride_o + at % C * stride_c
    columns = ()  # of column j, sums of rows: 4 j + 2a + p
    for j in tl.static_range(3):
        k0 = tl.load(first + j * stride_w, mask, 0).to(ACC)
        k1 = tl.load(first + (stride_h + j * stride_w), mask, 0).to(ACC)
        k2 = tl.load(first + (2 * stride_h + j * stride_w), mask, 0).to(ACC)
        columns = columns + (k0, k1 + k2, k0 + k1, k2)  # noqa: RUF005 (tuples do not unpack)
    for place in tl.static_range(4):  # 2a + p
        left, middle, right = columns[place], columns[4 + place], columns[8 + place]
        sums = (left, middle + right, left + middle, right)  # 2b + q
        for k in tl.static_range(4):
            phase, tap = place // 2 * 2 + k // 2, place % 2 * 2 + k % 2
            to = out_ptr + (phase * 4 + tap) * n + at
            tl.store(to, sums[k].to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _transpose_kernel(
    x_ptr,  # [N, R, C]
    out_ptr,  # [N, C, R]
    R, C, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.cdiv(R, BLOCK), tl.cdiv(C, BLOCK)
    pid = tl.program_id(0)
    n = (pid // (rows * columns)).to(tl.int64)
    r = pid // columns % rows * BLOCK + tl.arange(0, BLOCK)
    c = pid % columns * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (n * R + r)[:, None] * C + c[None, :], (r < R)[:, None] & (c < C)[None, :])
    at = (n * C + c)[:, None] * R + r[None, :]
    tl.store(out_ptr + at, tl.trans(x), (c < C)[:, None] & (r < R)[None, :])


@triton.jit
def _upsample_kernel(
    x_ptr,  # [N, H, W, C]
    weight_ptr,  # [phases 2a + b, taps 2p + q, O, C]
    bias_ptr,  # [O] or None
    y_ptr,  # [N, 2H, 2W, O]
    H, W, C: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    columns, blocks = tl.cdiv(OUT, BN), tl.cdiv(H * W, BM)
    pid = tl.program_id(0)
    block = pid // columns % blocks
    phase = pid // (columns * blocks) % 4
    n = pid // (columns * blocks * 4)
    if WIDE:
        n = n.to(tl.int64)
    pixel = block * BM + tl.arange(0, BM)
    i, j = pixel // W, pixel % W
    o = pid % columns * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], ACC)
    steps = tl.cdiv(C, BK)
    for step in range(0, 4 * steps):
        tap, c = step // steps, step % steps * BK + tl.arange(0, BK)
        row, col = i + phase // 2 - 1 + tap // 2, j + phase % 2 - 1 + tap % 2
        inside = (row >= 0) & (row < H) & (col >= 0) & (col < W)
        mask = inside[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + ((n * H + row) * W + col)[:, None] * C + c[None, :], mask, 0)
        kept = (c < C)[:, None] & (o < OUT)[None, :]
        matrix = (phase * 4 + tap) * OUT
        w = tl.load(weight_ptr + (matrix + o)[None, :] * C + c[:, None], kept, 0)
        acc = multiply_step(x, w, acc, PRECISION)
    if bias_ptr is not None:
        acc += row_of(bias_ptr, o, o < OUT, ACC)
    row, col = 2 * i + phase // 2, 2 * j + phase % 2
    mask = (pixel < H * W)[:, None] & (o < OUT)[None, :]
    at = ((n * 2 * H + row) * 2 * W + col)[:, None] * OUT + o[None, :]
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask)


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, channels, height, width = x.shape
    outputs = weight.shape[0]
    y = empty_in(torch.channels_last, x, (n, outputs, 2 * height, 2 * width))
    if not y.numel():
        return lay_out(y, memory_format(x))
    phases, pairs = x.new_empty((4, 4, outputs, channels)), outputs * channels
    last, kind, rows = is_last(x), precision(x), n * height * width
    exact = x.dtype, "NHWC", kind, channels, outputs
    with on_device(x):
        pixels = x if last else _transposed(x, torch.channels_last)
        run = functools.partial(_product, pixels, phases, bias, y, kind)
        _phases_kernel[(cdiv(pairs, PAIRS),)](
            weight, phases, pairs, channels, *weight.stride(), ACC=accumulator(x), BLOCK=PAIRS
        )
        run(tuning.choose("upsample_conv2d", x.device, rows, exact, tiles_of(x.dtype, True), run))
        return y if last else _transposed(y, torch.contiguous_format)


def _transposed(x: Tensor, to: torch.memory_format) -> Tensor:
    """x [N, C, H, W] in the other layout."""
    out, (n, channels, height, width) = empty_in(to, x, x.shape), x.shape
    sizes = channels, height * width
    rows, columns = sizes if to == torch.channels_last else sizes[::-1]
    _transpose_kernel[(n * cdiv(rows, SIDE) * cdiv(columns, SIDE),)](
        x, out, rows, columns, BLOCK=SIDE
    )
    return out


def _product(
    x: Tensor, phases: Tensor, bias: Tensor | None, y: Tensor, kind: str, tile: Tile
) -> Any:
    (n, channels, height, width), outputs = x.shape, y.shape[1]
    programs = n * 4 * cdiv(height * width, tile.BM) * cdiv(outputs, tile.BN)
    return _upsample_kernel[(programs,)](
        x, phases, bias, y, height, width, channels, outputs,
        ACC=accumulator(x), PRECISION=kind,
        BM=tile.BM, BN=tile.BN, BK=tile.BK, WIDE=max(x.numel(), y.numel()) >= 2**31,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def upsample_conv2d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, *, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if INTERPRET:  # cuDNN's part, on a CPU
        return upsample_conv2d_backward_ref(dy, x, weight, need_dx, need_dweight)
    if exact_on_gpu(x):
        return gradients_of_rows(dy, x, weight, need_dx, need_dweight)
    return gradients_of_phases(dy, x, weight, need_dx, need_dweight, x.dtype)


# --- Ahead of time --------------------------------------------------------------------------------


def specialisations() -> Iterator[Specialisation]:
    for dtype in SIZES:
        acc = tl.float64 if dtype == "fp64" else tl.float32
        integers = ("n", "C", "stride_o", "stride_c", "stride_h", "stride_w")
        arguments = {"weight_ptr": "*", "out_ptr": "*", **dict.fromkeys(integers, "i32")}
        yield Specialisation(
            "upsample_conv2d phases", _phases_kernel, dtype, arguments, {"ACC": acc, "BLOCK": PAIRS}
        )
        arguments = {"x_ptr": "*", "out_ptr": "*"}
        constants = {"R": 512, "C": 1024, "BLOCK": SIDE}
        yield Specialisation(
            "upsample_conv2d transpose",
            _transpose_kernel,
            dtype,
            arguments,
            constants,
            load_bits=64,
        )
        for rest, tile, targets in to_check(TILES[SIZES[dtype], True], dtype):
            yield _specialisation(f"upsample_conv2d NHWC{rest}", dtype, tile, targets)


def _specialisation(name: str, dtype: str, tile: Tile, targets: tuple[str, ...]) -> Specialisation:
    acc = tl.float64 if dtype == "fp64" else tl.float32
    blocks = {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK}
    constants: dict[str, Any] = {"C": 512, "OUT": 512, **blocks, "ACC": acc}
    pointers = [name for name in _upsample_kernel.arg_names if name.endswith("_ptr")]
    return Specialisation(
        name,
        _upsample_kernel,
        dtype,
        {**dict.fromkeys(pointers, "*"), "H": "i32", "W": "i32"},
        {**constants, "PRECISION": "ieee", "WIDE": False},
        warps=tile.warps,
        targets=targets,
        load_bits=128,
        options={"num_stages": tile.stages},
        matrix=SIZES[dtype] == 2,
    )
