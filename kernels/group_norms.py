"""Group norms and channel statistics: see `dfm_fast.ops.group_norms` for what is computed.

Memory is N matrices: [C, P] (contiguous) or [P, C] (channels_last). A program has a tile of one of
them, ROWS x VECS vectors of VEC elements, whatever the batch, so that one sample fills a chip too.
Three launches: moments of every tile's channels; one small kernel that merges them in order and
turns the statistics of a group into scale and offset of its channels; the pass that applies them.
Backward likewise. Merging is in float64, so that a large mean costs no digits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from dfm_fast.kernels._aot import Specialisation
from dfm_fast.kernels.resample import on_device
from torch import Tensor

from dfm_fast._library import INTERPRET
from dfm_fast.ops._layouts import empty_in, memory_format

TILE = 16384 if INTERPRET else 4096  # elements; the interpreter's time is per operation
LINE = 128  # bytes of channels side by side, in channels_last
MOST_ROWS = 16 if INTERPRET else TILE  # numpy adds rows one after the other, and loses digits
CHANNELS = 64  # merged by a program where there are no groups
PARTIALS = 1024  # channels x blocks that are merged at once

# --- Parts ----------------------------------------------------------------------------------------


@triton.jit
def _tile(
    C, RT, CV,
    LAST: tl.constexpr, ROWS: tl.constexpr, VECS: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """(offsets, mask, channels among [N, C], their mask, where their partials go, pixels)."""
    pid = tl.program_id(0)
    col_blocks, row_blocks = tl.cdiv(CV, VECS), tl.cdiv(RT, ROWS)
    cb = pid % col_blocks
    rb = pid // col_blocks % row_blocks
    n = pid // (col_blocks * row_blocks)
    if WIDE:
        n = n.to(tl.int64)
    row = rb * ROWS + tl.arange(0, ROWS)[:, None, None]
    col = cb * VECS + tl.arange(0, VECS)[None, :, None]
    lane = tl.arange(0, VEC)[None, None, :]
    mask = (row < RT) & (col < CV)  # known to be alike within a vector: so loads are as wide
    offs = ((n * RT + row) * CV + col) * VEC + lane
    if LAST:
        c, kept = col * VEC + lane, col < CV
        pixels = tl.minimum(RT - rb * ROWS, ROWS)
        partial = (n * row_blocks + rb) * C + c
    else:
        c, kept = row, row < RT
        pixels = tl.minimum(CV - cb * VECS, VECS) * VEC
        partial = (n * col_blocks + cb) * C + c
    return offs, mask, n * C + c, kept, partial, pixels


@triton.jit
def _over_pixels(x, LAST: tl.constexpr):
    if LAST:
        return tl.sum(x, 0, keep_dims=True)
    else:
        return tl.sum(tl.sum(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def _group_affine(mean, m2, weight, shift, valid, count, size, EPS: tl.constexpr):
    """One group's channels, all float64 -> (scale, centre, rstd): h = (x - centre) rstd."""
    moved = tl.where(valid, mean + shift, 0.0)
    m = tl.sum(moved, 0) / size
    d = tl.where(valid, moved - m, 0.0)
    squares = tl.sum(tl.where(valid, m2, 0.0) + count * d * d, 0)
    rstd = 1.0 / tl.sqrt(squares / (count * size) + EPS)
    return rstd * weight, m - shift, rstd


@triton.jit
def _optional(ptr, offs, mask, default: tl.constexpr):
    """In float64; `default` where no tensor is given."""
    if ptr is None:
        return tl.full(offs.shape, default, tl.float64)
    else:
        return tl.load(ptr + offs, mask, 0).to(tl.float64)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


# --- Forward --------------------------------------------------------------------------------------


@triton.jit
def _moments_kernel(
    x_ptr,  # N matrices
    mean_ptr, m2_ptr,  # [N, blocks, C]
    C, RT, CV, ACC: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, VECS: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    offs, mask, _, kept, partial, pixels = _tile(C, RT, CV, LAST, ROWS, VECS, VEC, WIDE)
    x = tl.load(x_ptr + offs, mask, 0).to(ACC)
    pixels = pixels.to(ACC)
    centre = _over_pixels(x, LAST) / pixels
    d = tl.where(mask, x - centre, 0.0)
    rest, squares = _over_pixels(d, LAST), _over_pixels(d * d, LAST)
    m2 = tl.maximum(squares - rest * (rest / pixels), 0.0, propagate_nan=tl.PropagateNan.ALL)
    # Beside a large mean its rounding shows in what is left; beside a small one that is noise.
    mean = tl.where(centre * centre * pixels > squares, centre + rest / pixels, centre)
    tl.store(mean_ptr + partial, mean, kept)
    tl.store(m2_ptr + partial, m2, kept)


@triton.jit
def _merge_kernel(
    part_mean_ptr, part_m2_ptr,  # [N, blocks, C], or None: mean and m2 are given
    mean_ptr, m2_ptr,  # [N, C]
    weight_ptr, bias_ptr,  # [C] or None
    shift_ptr,  # [N, C] or None
    scale_ptr, offset_ptr, centre_ptr, rstd_ptr,  # [N, C], or None: only statistics
    C, size, blocks, count, block_pixels,
    EPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One group of `size` channels of a sample."""
    groups = tl.cdiv(C, size)
    n = (tl.program_id(0) // groups).to(tl.int64)
    k = tl.arange(0, BLOCK_C)
    c = tl.program_id(0) % groups * size + k
    valid = (k < size) & (c < C)
    at = n * C + c
    if part_mean_ptr is not None:
        total = tl.zeros([BLOCK_C], tl.float64)
        for first in range(0, blocks, BLOCK_B):
            b = first + tl.arange(0, BLOCK_B)[:, None]
            pixels = tl.minimum(count - b * block_pixels, block_pixels).to(tl.float64)
            mask = (b < blocks) & valid[None, :]
            part = tl.load(part_mean_ptr + (n * blocks + b) * C + c[None, :], mask, 0)
            total += tl.sum(tl.where(mask, pixels * part.to(tl.float64), 0.0), 0)
        mean = total / count
        m2 = tl.zeros([BLOCK_C], tl.float64)
        for first in range(0, blocks, BLOCK_B):
            b = first + tl.arange(0, BLOCK_B)[:, None]
            pixels = tl.minimum(count - b * block_pixels, block_pixels).to(tl.float64)
            mask = (b < blocks) & valid[None, :]
            offs = (n * blocks + b) * C + c[None, :]
            d = tl.load(part_mean_ptr + offs, mask, 0).to(tl.float64) - mean[None, :]
            part = tl.load(part_m2_ptr + offs, mask, 0).to(tl.float64)
            m2 += tl.sum(tl.where(mask, part + pixels * d * d, 0.0), 0)
        # As they are handed on: given statistics make the same norm.
        mean, m2 = mean.to(mean_ptr.dtype.element_ty), m2.to(m2_ptr.dtype.element_ty)
        tl.store(mean_ptr + at, mean, valid)
        tl.store(m2_ptr + at, m2, valid)
    else:
        mean, m2 = tl.load(mean_ptr + at, valid, 0), tl.load(m2_ptr + at, valid, 0)
    if scale_ptr is not None:
        shift = _optional(shift_ptr, at, valid, 0.0)
        weight, bias = _optional(weight_ptr, c, valid, 1.0), _optional(bias_ptr, c, valid, 0.0)
        scale, centre, rstd = _group_affine(
            mean.to(tl.float64), m2.to(tl.float64), weight, shift, valid, count, size, EPS
        )
        kind = scale_ptr.dtype.element_ty
        rounded = centre.to(kind)
        lost = centre - rounded.to(tl.float64)
        tl.store(scale_ptr + at, scale.to(kind), valid)
        tl.store(offset_ptr + at, (bias - scale * lost).to(kind), valid)
        tl.store(centre_ptr + at, rounded, valid)
        tl.store(rstd_ptr + at, tl.zeros_like(rounded) + rstd.to(kind), valid)


@triton.jit
def _apply_kernel(
    x_ptr, y_ptr,  # N matrices
    scale_ptr, offset_ptr, centre_ptr,  # [N, C]
    C, RT, CV, SILU: tl.constexpr, ACC: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, VECS: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    offs, mask, c, kept, _, _ = _tile(C, RT, CV, LAST, ROWS, VECS, VEC, WIDE)
    scale, offset = tl.load(scale_ptr + c, kept, 0), tl.load(offset_ptr + c, kept, 0)
    d = tl.load(x_ptr + offs, mask, 0).to(ACC) - tl.load(centre_ptr + c, kept, 0)
    y = d * scale + offset
    if SILU:
        y = y * _sigmoid(y)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask)


# --- Backward -------------------------------------------------------------------------------------


@triton.jit
def _dz(dy, z, SILU: tl.constexpr):
    if SILU:
        s = _sigmoid(z)
        return dy * s * (1.0 + z * (1.0 - s))
    else:
        return dy


@triton.jit
def _sums_kernel(
    dy_ptr, x_ptr,  # N matrices
    scale_ptr, offset_ptr, centre_ptr,  # [N, C]
    s_ptr, q_ptr,  # [N, blocks, C]: sums of dz and dz (x - centre)
    C, RT, CV, SILU: tl.constexpr, ACC: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, VECS: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    offs, mask, c, kept, partial, _ = _tile(C, RT, CV, LAST, ROWS, VECS, VEC, WIDE)
    scale, offset = tl.load(scale_ptr + c, kept, 0), tl.load(offset_ptr + c, kept, 0)
    centre = tl.load(centre_ptr + c, kept, 0)
    d = tl.load(x_ptr + offs, mask, 0).to(ACC) - centre
    dz = _dz(tl.load(dy_ptr + offs, mask, 0).to(ACC), d * scale + offset, SILU)
    tl.store(s_ptr + partial, _over_pixels(dz, LAST), kept)
    tl.store(q_ptr + partial, _over_pixels(dz * d, LAST), kept)


@triton.jit
def _merge_sums_kernel(
    part_s_ptr, part_q_ptr,  # [N, blocks, C]
    mean_ptr, centre_ptr, rstd_ptr,  # [N, C]
    weight_ptr,  # [C] or None
    s_ptr, q_ptr,  # [N, C]: sums of dz and dz h
    constant_ptr, linear_ptr, dshift_ptr,  # [N, C]
    C, size, blocks, count,
    BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One group of a sample: dx = scale dz + constant + linear (x - centre)."""
    groups = tl.cdiv(C, size)
    n = (tl.program_id(0) // groups).to(tl.int64)
    k = tl.arange(0, BLOCK_C)
    c = tl.program_id(0) % groups * size + k
    valid = k < size
    at = n * C + c
    s, q = tl.zeros([BLOCK_C], tl.float64), tl.zeros([BLOCK_C], tl.float64)
    for first in range(0, blocks, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)[:, None]
        mask = (b < blocks) & valid[None, :]
        offs = (n * blocks + b) * C + c[None, :]
        s += tl.sum(tl.load(part_s_ptr + offs, mask, 0).to(tl.float64), 0)
        q += tl.sum(tl.load(part_q_ptr + offs, mask, 0).to(tl.float64), 0)
    rstd = tl.load(rstd_ptr + at, valid, 0).to(tl.float64)
    q *= rstd
    weight = _optional(weight_ptr, c, valid, 1.0)
    a = rstd * (tl.sum(weight * s, 0) / (count * size))
    b = rstd * (tl.sum(weight * q, 0) / (count * size))
    mean = tl.load(mean_ptr + at, valid, 0).to(tl.float64)
    h = (mean - tl.load(centre_ptr + at, valid, 0).to(tl.float64)) * rstd
    kind = s_ptr.dtype.element_ty
    tl.store(s_ptr + at, s.to(kind), valid)
    tl.store(q_ptr + at, q.to(kind), valid)
    tl.store(constant_ptr + at, (-a).to(kind), valid)
    tl.store(linear_ptr + at, (-b * rstd).to(kind), valid)
    tl.store(dshift_ptr + at, (rstd * weight * s - count * (a + b * h)).to(kind), valid)


@triton.jit
def _over_samples_kernel(
    s_ptr, q_ptr,  # [N, C]
    dweight_ptr, dbias_ptr,  # [C]
    N, C, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    bias, weight = tl.zeros([BLOCK_C], tl.float64), tl.zeros([BLOCK_C], tl.float64)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)[:, None]
        mask = (n < N) & (c < C)[None, :]
        offs = n.to(tl.int64) * C + c[None, :]
        bias += tl.sum(tl.load(s_ptr + offs, mask, 0).to(tl.float64), 0)
        weight += tl.sum(tl.load(q_ptr + offs, mask, 0).to(tl.float64), 0)
    tl.store(dbias_ptr + c, bias.to(dbias_ptr.dtype.element_ty), c < C)
    tl.store(dweight_ptr + c, weight.to(dweight_ptr.dtype.element_ty), c < C)


@triton.jit
def _dx_kernel(
    dy_ptr, x_ptr, dx_ptr,  # N matrices
    scale_ptr, offset_ptr, centre_ptr, constant_ptr, linear_ptr,  # [N, C]
    C, RT, CV, SILU: tl.constexpr, ACC: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, VECS: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    offs, mask, c, kept, _, _ = _tile(C, RT, CV, LAST, ROWS, VECS, VEC, WIDE)
    scale = tl.load(scale_ptr + c, kept, 0)
    d = tl.load(x_ptr + offs, mask, 0).to(ACC) - tl.load(centre_ptr + c, kept, 0)
    dy = tl.load(dy_ptr + offs, mask, 0).to(ACC)
    dz = _dz(dy, d * scale + tl.load(offset_ptr + c, kept, 0), SILU)
    linear = tl.load(linear_ptr + c, kept, 0) * d
    dx = scale * dz + (tl.load(constant_ptr + c, kept, 0) + linear)
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask)


@triton.jit
def _statistics_backward_kernel(
    x_ptr, dx_ptr,  # N matrices
    dmean_ptr, dm2_ptr, mean_ptr,  # [N, C]
    C, RT, CV, count, ACC: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, VECS: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    offs, mask, c, kept, _, _ = _tile(C, RT, CV, LAST, ROWS, VECS, VEC, WIDE)
    d = tl.load(x_ptr + offs, mask, 0).to(ACC) - tl.load(mean_ptr + c, kept, 0)
    constant = tl.load(dmean_ptr + c, kept, 0) / count
    dx = constant + 2.0 * tl.load(dm2_ptr + c, kept, 0) * d
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask)


# --- Launching ------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a map is cut into tiles."""

    programs: int
    pixels: int
    blocks: int  # along the pixels of a sample
    block_pixels: int
    sizes: tuple[int, int, int]  # C, rows of a matrix, vectors of a row
    constants: dict[str, Any]


def plan(shape: tuple[int, ...], last: bool, itemsize: int) -> Plan:
    n, channels, pixels = shape[0], shape[1], math.prod(shape[2:])
    rows, cols = (pixels, channels) if last else (channels, pixels)
    vec = math.gcd(16 // itemsize, cols)
    tile = TILE // 2 if itemsize == 8 else TILE  # registers
    row = LINE // itemsize if last else tile
    vecs = min(triton.next_power_of_2(max(cols // vec, 1)), row // vec)
    height = min(triton.next_power_of_2(max(rows, 1)), tile // (vecs * vec))
    height = min(height, MOST_ROWS) if last else height
    row_blocks, col_blocks = triton.cdiv(rows, height), triton.cdiv(cols // vec, vecs)
    blocks, block_pixels = (row_blocks, height) if last else (col_blocks, vecs * vec)
    wide = math.prod(shape) >= 2**31 - TILE
    constants = {"LAST": last, "ROWS": height, "VECS": vecs, "VEC": vec, "WIDE": wide}
    sizes = (channels, rows, cols // vec)
    return Plan(n * row_blocks * col_blocks, pixels, blocks, block_pixels, sizes, constants)


def _plan(x: Tensor) -> Plan:
    last = memory_format(x) != torch.contiguous_format
    return plan(tuple(x.shape), last, x.element_size())


def _acc(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    double = x.dtype == torch.float64
    return (torch.float64, tl.float64) if double else (torch.float32, tl.float32)


def _per_channel(x: Tensor, count: int, blocks: int = 0) -> tuple[Tensor, ...]:
    """`count` tensors [N, C], or [N, blocks, C], in the arithmetic's dtype."""
    size = (x.shape[0], blocks, x.shape[1]) if blocks else (x.shape[0], x.shape[1])
    return x.new_empty((count, *size), dtype=_acc(x)[0]).unbind()


def _merge_blocks(size: int) -> dict[str, int]:
    block = triton.next_power_of_2(size)
    return {"BLOCK_C": block, "BLOCK_B": max(1, PARTIALS // block)}


def _partials(x: Tensor, tiles: Plan) -> tuple[Tensor, ...]:
    found = _per_channel(x, 2, tiles.blocks)
    _moments_kernel[(tiles.programs,)](x, *found, *tiles.sizes, ACC=_acc(x)[1], **tiles.constants)
    return found


def _merge(
    x: Tensor,
    tiles: Plan,
    partials: tuple[Tensor | None, ...],
    statistics: tuple[Tensor, ...],
    size: int,
    given: tuple[Tensor | None, ...] = (None, None, None),
    affine: tuple[Tensor | None, ...] = (None, None, None, None),
    eps: float = 0.0,
) -> None:
    channels = x.shape[1]
    _merge_kernel[(x.shape[0] * triton.cdiv(channels, size),)](
        *partials, *statistics, *given, *affine,
        channels, size, tiles.blocks, tiles.pixels, tiles.block_pixels,
        EPS=eps, **_merge_blocks(size),
    )  # fmt: skip


def merge_moments(
    x: Tensor, tiles: Plan, partials: tuple[Tensor, ...], statistics: tuple[Tensor, ...]
) -> None:
    """Those of blocks of pixels [N, blocks, C] into those of x's channels [N, C]."""
    _merge(x, tiles, partials, statistics, min(x.shape[1], CHANNELS))


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, m2 = (torch.empty_like(v) for v in _per_channel(x, 2))
    if x.numel():
        tiles = _plan(x)
        with on_device(x):
            merge_moments(x, tiles, _partials(x, tiles), (mean, m2))
    return mean, m2


def channel_statistics_backward(dmean: Tensor, dm2: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    dx = empty_in(memory_format(x), x, x.shape)
    if x.numel():
        tiles = _plan(x)
        with on_device(x):
            _statistics_backward_kernel[(tiles.programs,)](
                x, dx, dmean, dm2, mean, *tiles.sizes, tiles.pixels,
                ACC=_acc(x)[1], **tiles.constants,
            )  # fmt: skip
    return dx


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = empty_in(memory_format(x), x, x.shape)
    found = x.new_empty(0, dtype=_acc(x)[0]), x.new_empty(0, dtype=_acc(x)[0])
    if mean is None or m2 is None:
        mean, m2 = found = tuple(torch.empty_like(v) for v in _per_channel(x, 2))
    if x.numel():
        tiles, affine, size = _plan(x), _per_channel(x, 4), x.shape[1] // num_groups
        with on_device(x):
            partials = _partials(x, tiles) if mean is found[0] else (None, None)
            _merge(x, tiles, partials, (mean, m2), size, (weight, bias, shift), affine, eps)
            _apply_kernel[(tiles.programs,)](
                x, y, *affine[:3], *tiles.sizes, SILU=silu, ACC=_acc(x)[1], **tiles.constants
            )
    return y, *found


def group_norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    m2: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    *,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, channels = x.shape[0], x.shape[1]
    dx = empty_in(memory_format(x), x, x.shape) if need_dx else x.new_empty(0)
    dweight, dbias = (x.new_zeros(channels, dtype=mean.dtype) for _ in range(2))
    dshift = torch.empty_like(mean)
    if not x.numel():
        return dx, dweight, dbias, dshift
    tiles, size = _plan(x), channels // num_groups
    constants = {"SILU": silu, "ACC": _acc(x)[1], **tiles.constants}
    with on_device(x):
        affine = scale, offset, centre, rstd = _per_channel(x, 4)
        _merge(x, tiles, (None, None), (mean, m2), size, (weight, bias, shift), affine, eps)
        partials = _per_channel(x, 2, tiles.blocks)
        maps = scale, offset, centre
        _sums_kernel[(tiles.programs,)](dy, x, *maps, *partials, *tiles.sizes, **constants)
        s, q, constant, linear = _per_channel(x, 4)
        _merge_sums_kernel[(n * num_groups,)](
            *partials, mean, centre, rstd, weight, s, q, constant, linear, dshift,
            channels, size, tiles.blocks, tiles.pixels, **_merge_blocks(size),
        )  # fmt: skip
        _over_samples_kernel[(triton.cdiv(channels, CHANNELS),)](
            s, q, dweight, dbias, n, channels, BLOCK_C=CHANNELS, BLOCK_N=16
        )
        if need_dx:
            rest = *maps, constant, linear, *tiles.sizes
            _dx_kernel[(tiles.programs,)](dy, x, dx, *rest, **constants)
    return dx, dweight, dbias, dshift


def applied_norm(
    x: Tensor,
    mean: Tensor | None,
    m2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """(scale, offset, centre) [N, C] for kernels that apply the norm of given statistics to what
    they read; None where there are none."""
    if mean is None or m2 is None:
        return None, None, None
    affine, size = _per_channel(x, 4), x.shape[1] // num_groups
    _merge(x, _plan(x), (None, None), (mean, m2), size, (weight, bias, shift), affine, eps)
    return affine[:3]


# --- Ahead of time --------------------------------------------------------------------------------


def specialisations() -> Iterator[Specialisation]:
    shape = (2, 256, 64, 64)
    for dtype, last in itertools.product(("bf16", "fp16", "fp32", "fp64"), (False, True)):
        itemsize = {"fp64": 8, "fp32": 4}.get(dtype, 2)
        acc = tl.float64 if dtype == "fp64" else tl.float32
        small = "*fp64" if dtype == "fp64" else "*fp32"
        tiles = plan(shape, last, itemsize)
        layout = "NHWC" if last else "NCHW"
        kernels = {
            "moments": (_moments_kernel, ("x_ptr",), {}),
            "apply": (_apply_kernel, ("x_ptr", "y_ptr"), {"SILU": True}),
            "backward sums": (_sums_kernel, ("x_ptr", "dy_ptr"), {"SILU": True}),
            "backward dx": (_dx_kernel, ("x_ptr", "dy_ptr", "dx_ptr"), {"SILU": True}),
            "statistics backward": (_statistics_backward_kernel, ("x_ptr", "dx_ptr"), {}),
        }
        for name, (kernel, maps, options) in kernels.items():
            constants = {**options, "ACC": acc, **tiles.constants}
            yield Specialisation(
                f"group_norm {name} {layout}",
                kernel,
                dtype,
                _arguments(kernel, dict.fromkeys(maps, "*"), small, constants),
                constants,
                load_bits=128,
            )
        if last:
            continue
        merges = {
            "merge": (_merge_kernel, {"EPS": 1e-5, **_merge_blocks(8)}),
            "merge sums": (_merge_sums_kernel, _merge_blocks(8)),
            "over samples": (_over_samples_kernel, {"BLOCK_C": CHANNELS, "BLOCK_N": 16}),
        }
        for name, (kernel, constants) in merges.items():
            given = dict.fromkeys(("weight_ptr", "bias_ptr", "shift_ptr"), "*")
            arguments = _arguments(kernel, given, small, constants)
            yield Specialisation(f"group_norm {name}", kernel, dtype, arguments, constants)


def _arguments(
    kernel: triton.JITFunction, maps: dict[str, str], small: str, constants: dict[str, Any]
) -> dict[str, str | None]:
    pointers = {a: maps.get(a, small) for a in kernel.arg_names if a.endswith("_ptr")}
    return pointers | {
        a: "i32" for a in kernel.arg_names if a not in pointers and a not in constants
    }
