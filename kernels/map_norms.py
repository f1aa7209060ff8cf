"""Device code of `dfm_fast.kernels.group_norms`: tiles of maps, moments, gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from dfm_fast.kernels.functions import sigmoid, silu

# --- Parts ----------------------------------------------------------------------------------------


@triton.jit
def _tile(
    pid, C, RT, CV,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """(offsets, mask, channels among [N, C], their mask, where [N, blocks, C] has the block's, its
    channels, C, pixels)."""
    CT = CV * VEC  # columns: says that rows and masks are whole vectors, so that loads are as wide
    col_blocks, row_blocks = tl.cdiv(CT, COLS), tl.cdiv(RT, ROWS)
    cb = pid % col_blocks
    rb = pid // col_blocks % row_blocks
    n = pid // (col_blocks * row_blocks)
    if WIDE:
        n = n.to(tl.int64)
    row = rb * ROWS + tl.arange(0, ROWS)[:, None]
    # Two axes: of three Triton may give neighbouring threads one along which lines are far apart.
    col = cb * COLS + tl.arange(0, COLS)[None, :]
    mask = (row < RT) & (col < CT)
    offs = (n * RT + row) * CT + col
    if LAST:
        C = CT
        pixels = tl.minimum(RT - rb * ROWS, ROWS)
        c, kept, block = col, col < CT, n * row_blocks + rb
    else:
        pixels = tl.minimum(CT - cb * COLS, COLS)
        c, kept, block = row, row < RT, n * col_blocks + cb
    return offs, mask, n * C + c, kept, block * C, c, C, pixels


@triton.jit
def _over_pixels(x, LAST: tl.constexpr):
    return tl.sum(x, 0 if LAST else 1, keep_dims=True)


@triton.jit
def _inverse(n):
    """1 / n of an integer, in float64. A division has a branch and is 0.3 us of waiting."""
    n = tl.zeros([], tl.float64) + n
    r = (1.0 / n.to(tl.float32)).to(tl.float64)
    r *= 2.0 - n * r
    return r * (2.0 - n * r)


@triton.jit
def _group_moments(mean, m2, shift, valid, count, size, EPS: tl.constexpr):
    """One group's channels, all float64 -> (mean, rstd) of the group."""
    moved = tl.where(valid, mean + shift, 0.0)
    channels = _inverse(size)
    m = tl.sum(moved, 0) * channels
    d = tl.where(valid, moved - m, 0.0)
    squares = tl.sum(tl.where(valid, m2 * _inverse(count) + d * d, 0.0), 0)
    return m, tl.rsqrt(squares * channels + EPS)


@triton.jit
def _affine(mean, rstd, weight, bias, shift, kind: tl.constexpr):
    """(scale, offset, centre) of channels: z = (x - centre) scale + offset. In the offset is what
    rounding the centre loses."""
    scale, centre = rstd * weight, mean - shift
    rounded = centre.to(kind)
    lost = centre - rounded.to(tl.float64)
    return scale.to(kind), (bias - scale * lost).to(kind), rounded


@triton.jit
def _optional(ptr, offs, mask, default: tl.constexpr):
    """In float64; `default` where no tensor is given."""
    if ptr is None:
        return tl.full(offs.shape, default, tl.float64)
    else:
        return tl.load(ptr + offs, mask, 0).to(tl.float64)


@triton.jit
def _store_norm(ptrs, y, mask, SILU: tl.constexpr):
    if SILU:
        y = silu(y, ptrs.dtype.element_ty.primitive_bitwidth == 16)
    tl.store(ptrs, y.to(ptrs.dtype.element_ty), mask)


# --- Forward --------------------------------------------------------------------------------------


@triton.jit
def _moments_kernel(
    x_ptr,  # N matrices
    mean_ptr,  # [N, blocks, 2, C]: rounded, and what that lost
    m2_ptr,  # [N, blocks, C]
    C, RT, CV, ACC: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs, mask, _, kept, block, c, C, pixels = _tile(pid, C, RT, CV, LAST, ROWS, COLS, VEC, WIDE)
    x = tl.load(x_ptr + offs, mask, 0).to(ACC)
    pixels = pixels.to(ACC)
    centre = _over_pixels(x, LAST) / pixels
    d = tl.where(mask, x - centre, 0.0)
    rest, squares = _over_pixels(d, LAST), _over_pixels(d * d, LAST)
    lost = rest * (1.0 / pixels)
    m2 = tl.maximum(squares - rest * lost, 0.0, propagate_nan=tl.PropagateNan.ALL)
    # Beside a large mean its rounding shows in what is left; beside a small one that is noise.
    lost = tl.where(centre * centre * pixels > squares, lost, 0.0)
    tl.store(mean_ptr + 2 * block + c, centre, kept)
    tl.store(mean_ptr + 2 * block + C + c, lost, kept)
    tl.store(m2_ptr + block + c, m2, kept)


@triton.jit
def _merged(
    mean_ptr,  # [N, blocks, 2, C]: rounded, and what that lost
    m2_ptr,  # [N, blocks, C]
    n, c, valid, C, blocks, count, block_pixels, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Moments of channels c, in float64, from those of their blocks, in order."""
    # About the first block's mean: one that is far from all the others costs a digit of sixteen.
    pivot = tl.load(mean_ptr + 2 * n * blocks * C + c, valid, 0).to(tl.float64)
    rest, squares = tl.zeros([BLOCK_C], tl.float64), tl.zeros([BLOCK_C], tl.float64)
    for first in range(0, blocks, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)[:, None]
        pixels = tl.minimum(count - b * block_pixels, block_pixels).to(tl.float64)
        mask = (b < blocks) & valid[None, :]
        block = (n * blocks + b) * C
        mean = tl.load(mean_ptr + 2 * block + c[None, :], mask, 0).to(tl.float64)
        lost = tl.load(mean_ptr + 2 * block + C + c[None, :], mask, 0).to(tl.float64)
        m2 = tl.load(m2_ptr + block + c[None, :], mask, 0).to(tl.float64)
        d = tl.where(mask, mean - pivot[None, :] + lost, 0.0)
        rest += tl.sum(pixels * d, 0)
        squares += tl.sum(m2 + pixels * d * d, 0)
    mean = rest * _inverse(count)
    m2 = tl.maximum(squares - rest * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return pivot + mean, m2


@triton.jit
def _merge_kernel(
    part_mean_ptr, part_m2_ptr,  # of blocks, or None: mean and m2 are given
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
        mean, m2 = _merged(
            part_mean_ptr, part_m2_ptr, n, c, valid, C, blocks, count, block_pixels,
            BLOCK_C, BLOCK_B,
        )  # fmt: skip
        # As they are handed on: given statistics make the same norm.
        mean, m2 = mean.to(mean_ptr.dtype.element_ty), m2.to(m2_ptr.dtype.element_ty)
        tl.store(mean_ptr + at, mean, valid)
        tl.store(m2_ptr + at, m2, valid)
    else:
        mean, m2 = tl.load(mean_ptr + at, valid, 0), tl.load(m2_ptr + at, valid, 0)
    if scale_ptr is not None:
        shift = _optional(shift_ptr, at, valid, 0.0)
        weight, bias = _optional(weight_ptr, c, valid, 1.0), _optional(bias_ptr, c, valid, 0.0)
        m, rstd = _group_moments(
            mean.to(tl.float64), m2.to(tl.float64), shift, valid, count, size, EPS
        )
        kind = scale_ptr.dtype.element_ty
        scale, offset, centre = _affine(m, rstd, weight, bias, shift, kind)
        tl.store(scale_ptr + at, scale, valid)
        tl.store(offset_ptr + at, offset, valid)
        tl.store(centre_ptr + at, centre, valid)
        tl.store(rstd_ptr + at, tl.zeros_like(centre) + rstd.to(kind), valid)


@triton.jit
def _apply_kernel(
    x_ptr, y_ptr,  # N matrices
    scale_ptr, offset_ptr, centre_ptr,  # [N, C]
    C, RT, CV, SILU: tl.constexpr, ACC: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # the last that were read are in the cache
    offs, mask, c, kept, _, _, _, _ = _tile(pid, C, RT, CV, LAST, ROWS, COLS, VEC, WIDE)
    scale, offset = tl.load(scale_ptr + c, kept, 0), tl.load(offset_ptr + c, kept, 0)
    d = tl.load(x_ptr + offs, mask, 0).to(ACC) - tl.load(centre_ptr + c, kept, 0)
    _store_norm(y_ptr + offs, d * scale + offset, mask, SILU)


@triton.jit
def _merge_apply_kernel(
    x_ptr, y_ptr,  # N matrices [C, P]
    part_mean_ptr, part_m2_ptr,  # of blocks
    mean_ptr, m2_ptr,  # [N, C]
    weight_ptr, bias_ptr,  # [C] or None
    shift_ptr,  # [N, C] or None
    C, RT, CV, size, blocks, count, block_pixels,
    EPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr, SILU: tl.constexpr,
    ACC: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Both in one: every program merges the moments of the group that its channels are in."""
    pid = tl.program_id(0)
    offs, mask, at, kept, _, own, _, _ = _tile(pid, C, RT, CV, LAST, ROWS, COLS, VEC, WIDE)
    x = tl.load(x_ptr + offs, mask, 0).to(ACC)
    tile = pid // blocks
    n, first = (tile // (C // ROWS)).to(tl.int64), tile % (C // ROWS) * ROWS
    k = tl.arange(0, BLOCK_C)
    c, valid = first // size * size + k, k < size
    mean, m2 = _merged(
        part_mean_ptr, part_m2_ptr, n, c, valid, C, blocks, count, block_pixels, BLOCK_C, BLOCK_B
    )
    kind: tl.constexpr = mean_ptr.dtype.element_ty
    mean, m2 = mean.to(kind), m2.to(kind)
    if (first % size == 0) & (pid % blocks == 0):
        tl.store(mean_ptr + n * C + c, mean, valid)
        tl.store(m2_ptr + n * C + c, m2, valid)
    shift = _optional(shift_ptr, n * C + c, valid, 0.0)
    m, rstd = _group_moments(mean.to(tl.float64), m2.to(tl.float64), shift, valid, count, size, EPS)
    weight, bias = _optional(weight_ptr, own, kept, 1.0), _optional(bias_ptr, own, kept, 0.0)
    shift = _optional(shift_ptr, at, kept, 0.0)
    scale, offset, centre = _affine(m, rstd, weight, bias, shift, kind)
    _store_norm(y_ptr + offs, (x - centre) * scale + offset, mask, SILU)


# --- Backward -------------------------------------------------------------------------------------


@triton.jit
def _dz(dy, z, SILU: tl.constexpr, NARROW: tl.constexpr):
    if SILU:
        s = sigmoid(z, NARROW)
        return dy * s * (1.0 + z * (1.0 - s))
    else:
        return dy


@triton.jit
def _sums_kernel(
    dy_ptr, x_ptr,  # N matrices
    scale_ptr, offset_ptr, centre_ptr,  # [N, C]
    s_ptr, q_ptr,  # [N, blocks, C]: sums of dz and dz (x - centre)
    C, RT, CV, SILU: tl.constexpr, ACC: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs, mask, c, kept, block, own, _, _ = _tile(pid, C, RT, CV, LAST, ROWS, COLS, VEC, WIDE)
    scale, offset = tl.load(scale_ptr + c, kept, 0), tl.load(offset_ptr + c, kept, 0)
    centre = tl.load(centre_ptr + c, kept, 0)
    d = tl.load(x_ptr + offs, mask, 0).to(ACC) - centre
    NARROW: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    dz = _dz(tl.load(dy_ptr + offs, mask, 0).to(ACC), d * scale + offset, SILU, NARROW)
    tl.store(s_ptr + block + own, _over_pixels(dz, LAST), kept)
    tl.store(q_ptr + block + own, _over_pixels(dz * d, LAST), kept)


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
    elements = _inverse(count) * _inverse(size)
    a = rstd * (tl.sum(weight * s, 0) * elements)
    b = rstd * (tl.sum(weight * q, 0) * elements)
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
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # as in `_apply_kernel`
    offs, mask, c, kept, _, _, _, _ = _tile(pid, C, RT, CV, LAST, ROWS, COLS, VEC, WIDE)
    scale = tl.load(scale_ptr + c, kept, 0)
    d = tl.load(x_ptr + offs, mask, 0).to(ACC) - tl.load(centre_ptr + c, kept, 0)
    dy = tl.load(dy_ptr + offs, mask, 0).to(ACC)
    NARROW: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    dz = _dz(dy, d * scale + tl.load(offset_ptr + c, kept, 0), SILU, NARROW)
    linear = tl.load(linear_ptr + c, kept, 0) * d
    dx = scale * dz + (tl.load(constant_ptr + c, kept, 0) + linear)
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask)


@triton.jit
def _statistics_backward_kernel(
    x_ptr, dx_ptr,  # N matrices
    dmean_ptr, dm2_ptr, mean_ptr,  # [N, C]
    C, RT, CV, count, ACC: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs, mask, c, kept, _, _, _, _ = _tile(pid, C, RT, CV, LAST, ROWS, COLS, VEC, WIDE)
    d = tl.load(x_ptr + offs, mask, 0).to(ACC) - tl.load(mean_ptr + c, kept, 0)
    constant = tl.load(dmean_ptr + c, kept, 0) / count
    dx = constant + 2.0 * tl.load(dm2_ptr + c, kept, 0) * d
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask)
