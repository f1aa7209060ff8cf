"""QK-RMSNorm and rotary embedding: see `dfm_fast.ops.rotaries` for what is computed.

A program has a block of tokens with all their heads, of q and of k, so that angles are read once.
Rows are handled as two halves, the first and the second elements of their pairs: interleaved pairs
are split in registers after one wide load. Strides come in vectors of VEC elements, by which the
compiler knows how wide it may load.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_fast._library import INTERPRET
from dfm_fast.kernels._aot import Specialisation
from dfm_fast.kernels.launching import (
    Layout,
    cdiv,
    layout,
    next_power_of_2,
    on_device,
    planned,
    registers,
)

HEADS = 16  # of a tile, at most
TILE = 4096  # elements of a tile; half as many in backward, and of float64
# At least, where there are tokens enough: two for each of 132 processors. The interpreter's time is
# per program.
PROGRAMS = 1 if INTERPRET else 264
SUMS = 396  # programs of a backward that sums dw, at most: as many as are at work at once
ROWS, COLUMNS = 256, 16  # of partial sums that a program adds at a time

# --- Rows -----------------------------------------------------------------------------------------


@triton.jit
def _load_pairs(
    ptr, offs, mask, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Rows at offs [M, N] -> first and second of their pairs, [M, N, HALF]."""
    if INTERLEAVED:
        i = tl.arange(0, 2 * HALF)[None, None, :]
        x = tl.load(ptr + offs[:, :, None] + i, mask[:, :, None] & (i < D), other=0.0).to(ACC)
        x = tl.reshape(x, (offs.shape[0], offs.shape[1], HALF, 2))
        a, b = tl.split(x)
    else:
        i = tl.arange(0, HALF)[None, None, :]
        mask = mask[:, :, None] & (i < D // 2)
        a = tl.load(ptr + offs[:, :, None] + i, mask, other=0.0).to(ACC)
        b = tl.load(ptr + offs[:, :, None] + (i + D // 2), mask, other=0.0).to(ACC)
    return a, b


@triton.jit
def _store_pairs(
    ptr, offs, mask, a, b, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    dtype = ptr.dtype.element_ty
    if INTERLEAVED:
        i = tl.arange(0, 2 * HALF)[None, None, :]
        y = tl.reshape(tl.join(a, b), (offs.shape[0], offs.shape[1], 2 * HALF)).to(dtype)
        tl.store(ptr + offs[:, :, None] + i, y, mask[:, :, None] & (i < D))
    else:
        i = tl.arange(0, HALF)[None, None, :]
        mask = mask[:, :, None] & (i < D // 2)
        tl.store(ptr + offs[:, :, None] + i, a.to(dtype), mask)
        tl.store(ptr + offs[:, :, None] + (i + D // 2), b.to(dtype), mask)


@triton.jit
def _load_weight(
    ptr, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ACC: tl.constexpr
):
    """First and second of its pairs, [1, 1, HALF]; 0 where there is none."""
    if ptr is None:
        zero = tl.zeros((1, 1, HALF), ACC)
        return zero, zero
    else:
        one = tl.zeros((1, 1), tl.int32)
        return _load_pairs(ptr, one, one == 0, D, HALF, INTERLEAVED, ACC)


@triton.jit
def _rstd(a, b, mask, D: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr):
    # Rows that are not there must not become infinite where eps is 0: dw is summed over all.
    square = tl.where(mask, tl.sum(a * a + b * b, axis=2) / D + EPS, 1.0)
    if square.dtype == tl.float64:
        rstd = 1.0 / tl.sqrt(square)
    else:
        rstd = tl.div_rn(tl.full(square.shape, 1.0, ACC), tl.sqrt_rn(square))
    return rstd[:, :, None]


@triton.jit
def _tokens(block, B, T, TOKENS: tl.constexpr, WIDE: tl.constexpr):
    """(sample, token, whether there is one) of a block."""
    n = block * TOKENS + tl.arange(0, TOKENS)
    mask = n < B * T
    if WIDE:
        n = n.to(tl.int64)
    return n // T, n % T, mask


@triton.jit
def _angles(
    cos_ptr, sin_ptr, sample, t, mask, table_stride, D: tl.constexpr, HALF: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """cos and sin [M, 1, HALF] of the tokens, 0 where there are no tables."""
    i = tl.arange(0, HALF)
    cos = tl.zeros((t.shape[0], HALF), ACC)
    sin = cos
    if cos_ptr is not None:
        offs = (sample * table_stride + t * (D // 2))[:, None] + i[None, :]
        mask = mask[:, None] & (i < D // 2)[None, :]
        cos = tl.load(cos_ptr + offs, mask, other=0.0).to(ACC)
        sin = tl.load(sin_ptr + offs, mask, other=0.0).to(ACC)
    return cos[:, None, :], sin[:, None, :]


# --- Forward --------------------------------------------------------------------------------------


@triton.jit
def _forward_part(
    x_ptr, y_ptr, weight_ptr, cos, sin, sample, t, mask, T, stride_b, stride_t, stride_h,
    H: tl.constexpr, ROTATED: tl.constexpr, EPS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    TILE_H: tl.constexpr, VEC: tl.constexpr, INTERLEAVED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """q or k: x [B, T, H, D] by strides in vectors, y contiguous."""
    mask = mask & (t < T)
    for first in range(0, H, TILE_H):
        h = first + tl.arange(0, TILE_H)
        rows = mask[:, None] & (h < H)[None, :]
        offs = ((sample * stride_b + t * stride_t)[:, None] + (h * stride_h)[None, :]) * VEC
        a, b = _load_pairs(x_ptr, offs, rows, D, HALF, INTERLEAVED, ACC)
        if weight_ptr is not None:
            rstd = _rstd(a, b, rows, D, EPS, ACC)
            w_a, w_b = _load_weight(weight_ptr, D, HALF, INTERLEAVED, ACC)
            a = a * rstd * w_a
            b = b * rstd * w_b
        if ROTATED:
            turned = a * cos - b * sin
            b = a * sin + b * cos
            a = turned
        out = ((sample * T + t) * H)[:, None] + h[None, :]
        _store_pairs(y_ptr, out * D, rows, a, b, D, HALF, INTERLEAVED)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    B, T, T_q, T_k, table_stride, q_b, q_t, q_h, k_b, k_t, k_h,
    H_q: tl.constexpr, H_k: tl.constexpr, EPS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    TOKENS: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, VEC: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    sample, t, mask = _tokens(tl.program_id(0), B, T, TOKENS, WIDE)
    cos, sin = _angles(cos_ptr, sin_ptr, sample, t, mask, table_stride, D, HALF, ACC)
    _forward_part(q_ptr, q_out_ptr, q_weight_ptr, cos, sin, sample, t, mask, T_q, q_b, q_t, q_h,
                  H_q, cos_ptr is not None, EPS, D, HALF, TILE_Q, VEC, INTERLEAVED,
                  ACC)  # fmt: skip
    _forward_part(k_ptr, k_out_ptr, k_weight_ptr, cos, sin, sample, t, mask, T_k, k_b, k_t, k_h,
                  H_k, cos_ptr is not None, EPS, D, HALF, TILE_K, VEC, INTERLEAVED,
                  ACC)  # fmt: skip


# --- Backward -------------------------------------------------------------------------------------


@triton.jit
def _backward_part(
    dy_ptr, x_ptr, dx_ptr, weight_ptr, w_a, w_b, cos, sin, sample, t, mask, T, dy_b, dy_t, dy_h,
    x_b, x_t, x_h, dw_a, dw_b, H: tl.constexpr, ROTATED: tl.constexpr, EPS: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, TILE_H: tl.constexpr, VEC: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """q or k; returns dw_a and dw_b [M, TILE_H, HALF] with the rows of these tokens added, each
    where it is: summed once a program, since that is an exchange between warps."""
    mask = mask & (t < T)
    for first in tl.range(0, H, TILE_H, num_stages=2):
        h = first + tl.arange(0, TILE_H)
        rows = mask[:, None] & (h < H)[None, :]
        offs = ((sample * dy_b + t * dy_t)[:, None] + (h * dy_h)[None, :]) * VEC
        a, b = _load_pairs(dy_ptr, offs, rows, D, HALF, INTERLEAVED, ACC)
        if ROTATED:
            turned = a * cos + b * sin
            b = b * cos - a * sin
            a = turned
        if weight_ptr is not None:
            offs = ((sample * x_b + t * x_t)[:, None] + (h * x_h)[None, :]) * VEC
            n_a, n_b = _load_pairs(x_ptr, offs, rows, D, HALF, INTERLEAVED, ACC)
            rstd = _rstd(n_a, n_b, rows, D, EPS, ACC)
            n_a = n_a * rstd
            n_b = n_b * rstd
            dw_a += a * n_a
            dw_b += b * n_b
            a = a * w_a
            b = b * w_b
            slope = (tl.sum(a * n_a + b * n_b, axis=2) / D)[:, :, None]
            a = (a - n_a * slope) * rstd
            b = (b - n_b * slope) * rstd
        out = ((sample * T + t) * H)[:, None] + h[None, :]
        _store_pairs(dx_ptr, out * D, rows, a, b, D, HALF, INTERLEAVED)
    return dw_a, dw_b


@triton.jit
def _store_sums(ptr, dw_a, dw_b, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """dw of this program, to row program_id of ptr [programs, D]."""
    if ptr is not None:
        row = tl.zeros((1, 1), tl.int32) + tl.program_id(0)
        a = tl.sum(tl.sum(dw_a, axis=1), axis=0)[None, None, :]
        b = tl.sum(tl.sum(dw_b, axis=1), axis=0)[None, None, :]
        _store_pairs(ptr, row * D, row >= 0, a, b, D, HALF, INTERLEAVED)


@triton.jit
def _backward_kernel(
    dq_ptr, dk_ptr, q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_weight_ptr, k_weight_ptr, q_sums_ptr,
    k_sums_ptr, cos_ptr, sin_ptr, B, T, T_q, T_k, blocks, table_stride, dq_b, dq_t, dq_h, dk_b,
    dk_t, dk_h, q_b, q_t, q_h, k_b, k_t, k_h,
    H_q: tl.constexpr, H_k: tl.constexpr, EPS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    TOKENS: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, VEC: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    q_first = tl.zeros((TOKENS, TILE_Q, HALF), ACC)
    k_first = tl.zeros((TOKENS, TILE_K, HALF), ACC)
    q_second, k_second = q_first, k_first
    q_weight = _load_weight(q_weight_ptr, D, HALF, INTERLEAVED, ACC)
    k_weight = _load_weight(k_weight_ptr, D, HALF, INTERLEAVED, ACC)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        sample, t, mask = _tokens(block, B, T, TOKENS, WIDE)
        cos, sin = _angles(cos_ptr, sin_ptr, sample, t, mask, table_stride, D, HALF, ACC)
        q_first, q_second = _backward_part(
            dq_ptr, q_ptr, q_out_ptr, q_weight_ptr, q_weight[0], q_weight[1], cos, sin, sample, t,
            mask, T_q, dq_b, dq_t, dq_h, q_b, q_t, q_h, q_first, q_second, H_q,
            cos_ptr is not None, EPS, D, HALF, TILE_Q, VEC, INTERLEAVED, ACC,
        )  # fmt: skip
        k_first, k_second = _backward_part(
            dk_ptr, k_ptr, k_out_ptr, k_weight_ptr, k_weight[0], k_weight[1], cos, sin, sample, t,
            mask, T_k, dk_b, dk_t, dk_h, k_b, k_t, k_h, k_first, k_second, H_k,
            cos_ptr is not None, EPS, D, HALF, TILE_K, VEC, INTERLEAVED, ACC,
        )  # fmt: skip
    _store_sums(q_sums_ptr, q_first, q_second, D, HALF, INTERLEAVED)
    _store_sums(k_sums_ptr, k_first, k_second, D, HALF, INTERLEAVED)


@triton.jit
def _add_rows(ptr, out_ptr, n, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """out [D] = sum of ptr [n, D], always in the same order."""
    if ptr is not None:
        i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        total = tl.zeros((ROWS, COLUMNS), ptr.dtype.element_ty)
        for first in range(0, n, ROWS):
            row = first + tl.arange(0, ROWS)[:, None]
            total += tl.load(ptr + row * D + i, (row < n) & (i < D), other=0.0)
        out = tl.sum(total, axis=0, keep_dims=True)
        tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), i < D)


@triton.jit
def _sum_kernel(
    q_sums_ptr, k_sums_ptr, q_out_ptr, k_out_ptr, n, D: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _add_rows(q_sums_ptr, q_out_ptr, n, D, COLUMNS, ROWS)
    else:
        _add_rows(k_sums_ptr, k_out_ptr, n, D, COLUMNS, ROWS)


# --- Launching ------------------------------------------------------------------------------------


@planned
def _tiles(
    tokens: int, heads: tuple[int, int], d: int, dtype: torch.dtype, tile: int, backward: bool
) -> dict[str, Any]:
    """Constants of a launch: how many tokens and heads a program has at a time. Backward, half as
    many heads where more would be of lanes that have none: 24 are three times 8, not twice 16."""
    half = next_power_of_2(d // 2)
    tile //= 2 if dtype == torch.float64 else 1
    most = min(HEADS, max(1, tile // (2 * half)))
    sizes = (most, max(1, most // 2)) if backward else (most,)
    tile_q, tile_k = (
        min((min(s, next_power_of_2(h)) for s in sizes), key=lambda s, h=h: cdiv(h, s) * s)
        for h in heads
    )
    n = max(1, tile // (2 * half * max(tile_q, tile_k)))
    while n > 1 and cdiv(tokens, n) < PROGRAMS:
        n //= 2
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    names = ("D", "HALF", "TOKENS", "TILE_Q", "TILE_K", "ACC")
    return dict(zip(names, (d, half, n, tile_q, tile_k, acc), strict=True))


@planned
def _walk(itemsize: int, *layouts: Layout) -> tuple[int, list[int], bool]:
    """(VEC, all strides but the last in vectors of VEC elements, whether offsets need 64 bits)."""
    strides = [s for x in layouts for s in x.strides[:3]]
    vec = math.gcd(16 // itemsize, *strides)
    # By the furthest element: a view may span more than it has.
    reach = (sum(n * s for n, s in zip(x.shape, x.strides, strict=True)) for x in layouts)
    wide = max(*reach, *(math.prod(x.shape) for x in layouts)) >= 2**31 - 2**16
    return vec, [s // vec for s in strides], wide


def _options(backward: bool, constants: dict[str, Any]) -> dict[str, int]:
    if not backward:
        return registers(128)
    # Three programs on a multiprocessor, for which the rarer ways have too much to keep.
    few = constants["INTERLEAVED"] and constants["ACC"] != tl.float64
    return registers(168 if few else 255)


def _launch(
    kernel: Any,
    programs: int | None,
    pointers: tuple[Tensor | None, ...],
    strided: tuple[Tensor, ...],
    cos: Tensor | None,
    sin: Tensor | None,
    constants: dict[str, Any],
) -> None:
    """`strided`, whose last two are q and k, are read by their strides. `programs` is how many go
    through the blocks of tokens; None: one for each."""
    q, k = strided[-2:]
    B, T = q.shape[0], max(q.shape[1], k.shape[1])
    blocks = cdiv(B * T, constants["TOKENS"])
    vec, strides, wide = _walk(q.element_size(), *map(layout, strided))
    table_stride = q.shape[1] * (q.shape[3] // 2) if cos is not None and cos.ndim == 3 else 0
    loop = () if programs is None else (blocks,)
    with on_device(q):
        kernel[(programs or blocks,)](
            *strided, *pointers, cos, sin, B, T, q.shape[1], k.shape[1], *loop, table_stride,
            *strides, q.shape[2], k.shape[2], VEC=vec, WIDE=wide, **constants,
            **_options(programs is not None, constants),
        )  # fmt: skip


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    out = _empty(q), _empty(k)
    tokens = q.shape[0] * max(q.shape[1], k.shape[1])
    if tokens:
        constants = _tiles(tokens, (q.shape[2], k.shape[2]), q.shape[3], q.dtype, TILE, False)
        constants = constants | {"EPS": eps, "INTERLEAVED": interleaved}
        pointers = (*out, q_weight, k_weight)
        _launch(_forward_kernel, None, pointers, (q, k), cos, sin, constants)
    return out


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, d = (_empty(q), _empty(k)), q.shape[3]
    wanted = [w is not None and weights for w in (q_weight, k_weight)]
    tokens = q.shape[0] * max(q.shape[1], k.shape[1])
    new = q.new_empty if tokens else q.new_zeros
    grads = [
        new(d if want else 0, dtype=torch.float32 if w is None else w.dtype)
        for w, want in zip((q_weight, k_weight), wanted, strict=True)
    ]
    if not tokens:
        return *out, *grads
    constants = _tiles(tokens, (q.shape[2], k.shape[2]), d, q.dtype, TILE // 2, True)
    blocks = cdiv(tokens, constants["TOKENS"])
    programs = cdiv(blocks, cdiv(blocks, SUMS))  # as many blocks for each
    acc = torch.promote_types(q.dtype, torch.float32)
    sums = [q.new_empty((programs, d), dtype=acc) if want else None for want in wanted]
    constants = constants | {"EPS": eps, "INTERLEAVED": interleaved}
    pointers = (*out, q_weight, k_weight, *sums)
    _launch(_backward_kernel, programs, pointers, (dq, dk, q, k), cos, sin, constants)
    if any(wanted):
        with on_device(q):
            rows = min(ROWS, next_power_of_2(programs))
            _sum_kernel[(cdiv(d, COLUMNS), 2)](*sums, *grads, programs, d, COLUMNS, rows)
    return *out, *grads


def specialisations() -> Iterator[Specialisation]:
    """SnapGen, DiT-XL and FLUX: (d, H, Hkv), interleaved."""
    cases = ((64, 14, 1), True), ((72, 16, 16), True), ((72, 16, 16), False), ((128, 24, 24), True)
    dtypes = ("bf16", "fp16", "fp32", "fp64")
    real = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for ((d, *heads), interleaved), dtype in itertools.product(cases, dtypes):
        table = "*fp64" if dtype == "fp64" else "*fp32"
        size = {"fp32": 4, "fp64": 8}.get(dtype, 2)
        names = ("q", "k", "q_out", "k_out", "q_weight", "k_weight")
        arguments = {f"{name}_ptr": "*" for name in names}
        arguments |= {"cos_ptr": table, "sin_ptr": table}
        strides = [f"{x}_{axis}" for x in ("q", "k", "dq", "dk") for axis in "bth"]
        arguments |= dict.fromkeys(("B", "T", "T_q", "T_k", "table_stride", *strides), "i32")
        constants = {"H_q": heads[0], "H_k": heads[1], "EPS": 1e-6, "VEC": 16 // size}
        constants |= {"INTERLEAVED": interleaved, "WIDE": False}
        for kernel, tile in (_forward_kernel, TILE), (_backward_kernel, TILE // 2):
            backward = kernel is _backward_kernel
            shape = _tiles(2**20, tuple(heads), d, real.get(dtype, torch.float64), tile, backward)
            more = {"dq_ptr": "*", "dk_ptr": "*", "q_sums_ptr": table, "k_sums_ptr": table}
            given = arguments | (more | {"blocks": "i32"} if backward else {})
            given = {name: kind for name, kind in given.items() if name in kernel.arg_names}
            name = f"qk_norm_rope{'_backward' if backward else ''} {d}"
            name += "" if interleaved else " halves"
            bits = 128 if interleaved or d != 72 else 64
            shape = shape | constants
            more = {"load_bits": bits, "options": _options(backward, shape)}
            yield Specialisation(name, kernel, dtype, given, shape, **more)
    for dtype in dtypes:
        table = "*fp64" if dtype == "fp64" else "*fp32"
        arguments = {"q_sums_ptr": table, "k_sums_ptr": table, "n": "i32"}
        arguments |= {"q_out_ptr": "*", "k_out_ptr": "*"}
        constants = {"D": 128, "COLUMNS": COLUMNS, "ROWS": ROWS}
        yield Specialisation("qk_norm_rope sums", _sum_kernel, dtype, arguments, constants)
