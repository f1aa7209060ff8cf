"""A gated linear layer in one kernel: see `linear_glu` in `dfm_fast.ops.activations`.

    y = (x Wa' + ba) g(x Wb' + bb)      weight [2D, K] = [Wa; Wb], bias [2D] = [ba | bb]

A program has a tile of y and two accumulators: columns n and D + n of the product, from one tile of
x. So the product, twice as wide as y, is never in memory. What that is worth: cuBLAS and `geglu`
move 6 M D elements that this kernel does not (the product written and read, y written by both),
against 4 M K D operations, so that with P operations and W bytes a second of two bytes an element

    time of geglu / time of the product = 1.5 P / (W K)

and this kernel wins from 1 / (1 + that) of cuBLAS's speed on. At SnapGen's 896 -> 2 x 2688 that is
72 % on an H100 (P 650e12, W 2.85e12) for M past its L2 cache, which starts at about 8192 rows; at
2048 rows, where geglu reads from the cache at about twice W and a launch counts, 82 %.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_fast.kernels import tuning
from dfm_fast.kernels._aot import Specialisation
from dfm_fast.kernels.activations import ACTIVATIONS, _slope
from dfm_fast.kernels.launching import cdiv, on_device, planned
from dfm_fast.kernels.products import (
    ARCHITECTURES,
    SIZES,
    Tile,
    architecture,
    grouped_tile,
    multiply_step,
    row_of,
    suffix,
)

# --- Kernel ---------------------------------------------------------------------------------------


@triton.jit
def _linear_glu_kernel(
    x_ptr,  # [M, K], rows strided
    weight_ptr,  # [2D, K]
    bias_ptr,  # [2D] or None
    out_ptr,  # [M, D]
    M, DV, KV, x_stride,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    VEC: tl.constexpr, OUT_VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """K = KV VEC, a stride of x is x_stride VEC, D = DV OUT_VEC. EVEN: BK divides K."""
    D, K = DV * OUT_VEC, KV * VEC
    tile_m, tile_n = grouped_tile(tl.cdiv(M, BM), tl.cdiv(D, BN), GROUP)
    row, column = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Rows and columns past the end are other ones once more: they are not stored.
    x_row, w_row = row % M, column % D
    if WIDE:
        row, x_row, w_row = row.to(tl.int64), x_row.to(tl.int64), w_row.to(tl.int64)
    x_ptrs = x_ptr + x_row[:, None] * x_stride * VEC + k[None, :]
    a_ptrs = weight_ptr + w_row[None, :] * KV * VEC + k[:, None]
    b_ptrs = a_ptrs + K * D
    if WIDE:
        b_ptrs = a_ptrs + tl.cast(K, tl.int64) * D
    a = tl.zeros((BM, BN), tl.float32)
    b = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        if EVEN:
            x, wa, wb = tl.load(x_ptrs), tl.load(a_ptrs), tl.load(b_ptrs)
        else:
            inside = k < K - start
            x = tl.load(x_ptrs, inside[None, :], other=0.0)
            wa = tl.load(a_ptrs, inside[:, None], other=0.0)
            wb = tl.load(b_ptrs, inside[:, None], other=0.0)
        a = multiply_step(x, wa, a, PRECISION)
        b = multiply_step(x, wb, b, PRECISION)
        x_ptrs += BK
        a_ptrs += BK
        b_ptrs += BK
    if bias_ptr is not None:
        a += row_of(bias_ptr, column, column < D, tl.float32)
        b += row_of(bias_ptr + D, column, column < D, tl.float32)
    value, _ = _slope(b, ACTIVATION, out_ptr.dtype.element_ty.primitive_bitwidth == 16)
    mask = (row < M)[:, None] & (column < D)[None, :]
    to = out_ptr + row[:, None] * DV * OUT_VEC + column[None, :]
    tl.store(to, (a * value).to(out_ptr.dtype.element_ty), mask)


# --- Launcher -------------------------------------------------------------------------------------


# Defaults, by architecture and whether there are tiles for every multiprocessor. BN is of y: the
# product has twice as many. Two accumulators of 128 x 128 are 128 registers of 256 threads, as
# large a tile as cuBLAS takes; 48 KiB of operands a stage. From shapes and limits, not measured.
TILES = {
    (8, True): Tile(128, 64, 64, 8, 3),
    (9, True): Tile(128, 128, 64, 8, 4),
    (10, True): Tile(128, 128, 64, 8, 4),
    (12, True): Tile(128, 64, 64, 8, 2),
    (0, True): Tile(128, 64, 32, 8, 2),
    (8, False): Tile(64, 64, 64, 4, 3),
    (9, False): Tile(64, 64, 64, 4, 4),
    (10, False): Tile(64, 64, 64, 4, 4),
    (12, False): Tile(64, 32, 64, 4, 3),
    (0, False): Tile(64, 32, 64, 4, 2),
}
# Candidates of 2 bytes an element beside the two of an architecture.
MORE = (Tile(128, 64, 64, 8, 3),)
MANY = 132  # tiles: a program for each of an H100's multiprocessors
GROUP = 8


@planned
def candidates(arch: int, M: int, D: int, itemsize: int) -> tuple[Tile, ...]:
    """The default first. BN and BK are of 2 bytes an element: so many bytes of any."""
    large, small = TILES[arch, True], TILES[arch, False]
    many = cdiv(M, large.BM) * cdiv(D, large.BN) >= MANY
    tiles = (large, small) if many else (small, large)
    tiles = dict.fromkeys(tiles + MORE if itemsize == 2 else tiles)
    return tuple(t._replace(BN=t.BN * 2 // itemsize, BK=t.BK * 2 // itemsize) for t in tiles)


def _wide(*elements: int) -> bool:
    """Whether an offset may pass 2^31."""
    return max(elements) >= 2**31 - 2**20


def linear_glu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    (M, K), D, size = x.shape, len(weight) // 2, x.element_size()
    if x.is_cuda and (size == 8 or (size == 4 and not torch.backends.cuda.matmul.allow_tf32)):
        allowed = "bfloat16, float16, or float32 where torch.backends.cuda.matmul.allow_tf32 is set"
        raise TypeError(f"linear_glu: x: expected {allowed}, got {x.dtype}")
    out = x.new_empty(M, D)
    if not out.numel():
        return out
    run = functools.partial(_launch, x, weight, bias, out, activation)
    tiles = candidates(architecture(x.device), M, D, size)
    with on_device(x):
        run(tuning.choose("linear_glu", x.device, M, (x.dtype, K, D), tiles, run))
    return out


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, activation: str, tile: Tile
) -> Any:
    (M, K), D, size = x.shape, out.shape[1], x.element_size()
    stride = x.stride(0) if M > 1 else K
    vec, out_vec = math.gcd(16 // size, K, stride), math.gcd(16 // size, D)
    wide = _wide(M * stride, 2 * D * K, M * D)
    return _linear_glu_kernel[(cdiv(M, tile.BM) * cdiv(D, tile.BN),)](
        *(x, weight, bias, out, M, D // out_vec, K // vec, stride // vec),
        **_constants(tile, activation, size, K % tile.BK == 0, vec, out_vec, wide),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _constants(
    tiles: Tile, activation: str, size: int, even: bool, vec: int, out_vec: int, wide: bool
) -> dict[str, Any]:
    constants = {
        "ACTIVATION": ACTIVATIONS[activation],
        "PRECISION": "tf32" if size == 4 else "ieee",
    }
    constants |= {"EVEN": even, "BM": tiles.BM, "BN": tiles.BN, "BK": tiles.BK, "GROUP": GROUP}
    return constants | {"VEC": vec, "OUT_VEC": out_vec, "WIDE": wide}


# --- Ahead of time --------------------------------------------------------------------------------


def specialisations() -> Iterator[Specialisation]:
    shapes = {"": (65536, True), " few rows": (256, True), " any K": (65536, False)}
    for dtype, (target, arch) in itertools.product(("bf16", "fp16", "fp32"), ARCHITECTURES.items()):
        for name, (M, even) in shapes.items():
            tile = candidates(arch, M, 2688, SIZES[dtype])[0]
            yield _specialisation(f"linear_glu{name}", dtype, target, tile, even)
    for tile in MORE:
        yield _specialisation(f"linear_glu{suffix(tile)}", "bf16", "sm_90", tile, True)


def _specialisation(name: str, dtype: str, target: str, tile: Tile, even: bool) -> Specialisation:
    arguments = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*")
    arguments |= dict.fromkeys(("M", "DV", "KV", "x_stride"), "i32")
    size = SIZES[dtype]
    return Specialisation(
        name, _linear_glu_kernel, dtype, arguments,
        _constants(tile, "gelu", size, even, 16 // size, 16 // size, False), tile.warps,
        (target,), 128, {"num_stages": tile.stages}, matrix=True,
    )  # fmt: skip
