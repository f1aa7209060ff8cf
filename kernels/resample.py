"""The general resampling kernel: any filter, axis, size and layout, forward or adjoint.

    out = sign * M src        or        out = base + sign * M src,      M = M_t x M_h x M_w

Each M is a sparse matrix of one axis, given as a table of K columns and weights per row, so that
one kernel serves every step of every pyramid in two launches a level. What it costs: prod(K) loads
per output through L1, and the tables. The fused kernels in `pyramids.py` take the common cases.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_fast._library import INTERPRET
from dfm_fast.kernels._aot import Specialisation
from dfm_fast.kernels.launching import cdiv, on_device
from dfm_fast.ops._filters import axis_taps, half, halve, halvings
from dfm_fast.ops.pyramids import memory_format

# Outputs per program: 128 programs already for a 32 x 32 x 32 latent. The interpreter's time is per
# operation, whatever the block.
BLOCK = 8192 if INTERPRET else 256


@triton.jit
def _resample_kernel(
    out_ptr,  # [P, T, H, W, C] in memory order: C is 1 in contiguous tensors
    base_ptr,  # like out, or None
    src_ptr,  # [P, T_in, H_in, W_in, C]
    t_ptr,  # int32 [KT, T]
    wt_ptr,  # fp32 or fp64 [KT, T]
    h_ptr,
    wh_ptr,
    w_ptr,
    ww_ptr,
    total,
    T,
    H,
    W,
    C,
    T_in,
    H_in,
    W_in,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SIGN: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < total
    c = offs % C
    i = offs // C
    w = i % W
    i = i // W
    h = i % H
    i = i // H
    t = i % T
    plane = i // T * T_in
    zero = tl.zeros([BLOCK], wt_ptr.dtype.element_ty)
    acc = zero
    for kt in range(KT):
        frame = (plane + tl.load(t_ptr + kt * T + t, mask, 0)) * H_in
        sum_h = zero
        for kh in range(KH):
            row = (frame + tl.load(h_ptr + kh * H + h, mask, 0)) * W_in
            sum_w = zero
            for kw in range(KW):
                pixel = row + tl.load(w_ptr + kw * W + w, mask, 0)
                value = tl.load(src_ptr + pixel * C + c, mask, 0).to(zero.dtype)
                sum_w += tl.load(ww_ptr + kw * W + w, mask, 0) * value
            sum_h += tl.load(wh_ptr + kh * H + h, mask, 0) * sum_w
        acc += tl.load(wt_ptr + kt * T + t, mask, 0) * sum_h
    acc = acc * SIGN
    if base_ptr is not None:
        acc += tl.load(base_ptr + offs, mask, 0).to(acc.dtype)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask)


# --- Tables --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def _tables(
    filter: str, kind: str, n: int, factor: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """(columns int32 [K, n_out], weights [K, n_out], K) of one axis whose fine side is n.

    Factor 4 is the product of two steps. Rows are padded with weight 0 at their own first column,
    so that padding never brings in a NaN from elsewhere.
    """
    if factor == 1:
        column, weight = torch.arange(n)[:, None], torch.ones(n, 1, dtype=torch.float64)
    else:
        first = axis_taps(filter, kind, n)
        column, weight = first.index, first.weight
        if factor == 4:
            second = axis_taps(filter, kind, half(n))
            shrinks = kind in ("down", "up_adjoint")
            outer, inner = (second, first) if shrinks else (first, second)
            column = inner.index[outer.index].flatten(1)
            weight = (outer.weight[:, :, None] * inner.weight[outer.index]).flatten(1)
        column, weight = _compact(column, weight)
    column = column.T.contiguous().to(device, torch.int32)
    return column, weight.T.contiguous().to(device, dtype), len(column)


def _compact(column: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Add up equal columns of a row, drop zeros, pad to the longest row."""
    rows = torch.arange(len(column))[:, None].expand_as(column)
    entries = torch.stack((rows, column)).flatten(1), weight.flatten()
    matrix = torch.sparse_coo_tensor(*entries, check_invariants=False).coalesce()
    keep = matrix.values() != 0
    (rows, columns), values = matrix.indices()[:, keep], matrix.values()[keep]
    count = torch.bincount(rows, minlength=len(column))
    start = count.cumsum(0) - count
    slot = torch.arange(len(rows)) - start[rows]
    column = columns[start][:, None].repeat(1, int(count.max()))
    weight = torch.zeros(column.shape, dtype=torch.float64)
    column[rows, slot], weight[rows, slot] = columns, values
    return column, weight


# --- Launching -----------------------------------------------------------------------------------


def empty(
    x: Tensor, channels: int, sizes: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """A new [N, channels, *sizes] in x's layout."""
    shape, dtype = (x.shape[0], channels, *sizes), dtype or x.dtype
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format(x))


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return empty(x, x.shape[1], x.shape[2:], dtype)


def resample(
    out: Tensor,
    src: Tensor,
    filter: str,
    kind: str,
    factor: Sequence[int],
    *,
    base: Tensor | None = None,
    sign: int = 1,
) -> Tensor:
    """out = sign M src (+ base); kind is down, up, down_adjoint or up_adjoint. Returns out."""
    if not out.numel():
        return out
    shrinks = kind in ("down", "up_adjoint")
    fine = (src if shrinks else out).shape[2:]
    dtype = torch.float64 if src.dtype == torch.float64 else torch.float32
    per_axis = zip(fine, factor, strict=True)
    axes = [_tables(filter, kind, n, f, dtype, src.device) for n, f in per_axis]
    pad = [1] * (3 - len(axes))
    axes = [_tables(filter, kind, 1, 1, dtype, src.device)] * len(pad) + axes
    channels = out.shape[1] if memory_format(out) != torch.contiguous_format else 1
    with on_device(out):
        _resample_kernel[(cdiv(out.numel(), BLOCK),)](
            out,
            base,
            src,
            *(table for axis in axes for table in axis[:2]),
            out.numel(),
            *pad,
            *out.shape[2:],
            channels,
            *pad,
            *src.shape[2:],
            *(axis[2] for axis in axes),
            sign,
            max(out.numel(), src.numel()) + BLOCK >= 2**31,
            BLOCK,
        )
    return out


def build(x: Tensor, num_levels: int, filter: str, factor: Sequence[int]) -> list[Tensor]:
    details = []
    for _ in range(num_levels - 1):
        coarse = empty(x, x.shape[1], coarser(x.shape[2:], factor))
        resample(coarse, x, filter, "down", factor)
        detail = empty_like(x)
        details.append(resample(detail, coarse, filter, "up", factor, base=x, sign=-1))
        x = coarse
    return [x, *reversed(details)]


def collapse(levels: Sequence[Tensor], filter: str, factor: Sequence[int]) -> Tensor:
    x = levels[0]
    for detail in levels[1:]:
        x = resample(empty_like(detail), x, filter, "up", factor, base=detail)
    return x


def build_backward(grads: Sequence[Tensor], filter: str, factor: Sequence[int]) -> Tensor:
    """What lies between levels stays in fp32, as in the reference."""
    grad, dtype = grads[0], torch.promote_types(grads[0].dtype, torch.float32)
    for level in grads[1:]:
        coarse = empty(level, level.shape[1], grad.shape[2:], dtype)
        resample(coarse, level, filter, "up_adjoint", factor, base=grad, sign=-1)
        last = level is grads[-1]
        out = empty_like(level, level.dtype if last else dtype)
        grad = resample(out, coarse, filter, "down_adjoint", factor, base=level)
    return grad


def collapse_backward(
    grad: Tensor, num_levels: int, filter: str, factor: Sequence[int]
) -> list[Tensor]:
    """Each level's gradient is rounded, then carried on."""
    grads = [grad]
    for _ in range(num_levels - 1):
        coarse = empty(grad, grad.shape[1], coarser(grads[-1].shape[2:], factor))
        grads.append(resample(coarse, grads[-1], filter, "up_adjoint", factor))
    return grads[:0:-1]


def coarser(sizes: Sequence[int], factor: Sequence[int]) -> tuple[int, ...]:
    """Sides of the next coarser level."""
    return functools.reduce(halve, halvings(factor), tuple(sizes))


def specialisations() -> Iterator[Specialisation]:
    tables = dict.fromkeys(("t_ptr", "h_ptr", "w_ptr"), "*i32")
    integers = ("total", "T", "H", "W", "C", "T_in", "H_in", "W_in")
    for dtype, wide in itertools.product(("bf16", "fp16", "fp32", "fp64"), (False, True)):
        weights = "*fp64" if dtype == "fp64" else "*fp32"
        arguments = tables | dict.fromkeys(("wt_ptr", "wh_ptr", "ww_ptr"), weights)
        arguments |= dict.fromkeys(("out_ptr", "base_ptr", "src_ptr"), "*")
        arguments |= dict.fromkeys(integers, "i32")
        constants = {"KT": 1, "KH": 5, "KW": 5, "SIGN": 1, "INT64": wide, "BLOCK": BLOCK}
        if wide:
            arguments["total"] = "i64"
        name = f"resample {64 if wide else 32}-bit"
        yield Specialisation(name, _resample_kernel, dtype, arguments, constants)
