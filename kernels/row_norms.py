"""Device code of `dfm_fast.kernels.norms`: rows of norms and residuals, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from dfm_fast._library import INTERPRET

TOGETHER = tl.constexpr(not INTERPRET)


@triton.jit
def _tile(ptr, b, t, stride_b, stride_t, offs_d, mask, VEC: tl.constexpr, ACC: tl.constexpr):
    """Rows t [R, 1] of sample b, all of their elements [1, D]. Strides count vectors."""
    return tl.load(ptr + (b * stride_b + t * stride_t) * VEC + offs_d, mask, other=0.0).to(ACC)


@triton.jit
def _centre(x, mean, mask, D):
    """x - mean, without the mean that rounding `mean` left in it; 0 outside the mask."""
    centred = tl.where(mask, x - mean, 0.0)
    rest = tl.sum(centred, 1, keep_dims=True) / D
    return tl.where(mask, centred - rest, 0.0)


@triton.jit
def _place(blocks, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """(program, sample, first row) of a program for a block of ROWS rows of one sample."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    return pid, pid // blocks, pid % blocks * ROWS


@triton.jit
def _residual(
    x, y_ptr, gate_ptr, b, t, m_t, offs_d, mask, m_mask, y_b, y_t, gate_b, gate_t,
    dtype: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x + gate y rounded to `dtype`, as the norm is of what is stored."""
    y = _tile(y_ptr, b, t, y_b, y_t, offs_d, mask, VEC, ACC)
    gate = _tile(gate_ptr, b, m_t, gate_b, gate_t, offs_d, m_mask, VEC, ACC)
    return (x + gate * y).to(dtype).to(ACC)


@triton.jit
def _store_residual(
    x, y_ptr, gate_ptr, residual_ptr, to, b, t, m_t, offs_d, mask, m_mask, y_b, y_t, gate_b, gate_t,
    VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x, or where there is y the residual, which is stored."""
    if y_ptr is not None:
        dtype: tl.constexpr = residual_ptr.dtype.element_ty
        x = _residual(
            x, y_ptr, gate_ptr, b, t, m_t, offs_d, mask, m_mask, y_b, y_t, gate_b, gate_t,
            dtype, VEC, ACC,
        )  # fmt: skip
        tl.store(residual_ptr + to, x.to(dtype), mask)
    return x


@triton.jit
def _scaled(
    g, scale_ptr, b, m_t, offs_d, m_mask, scale_b, scale_t,
    RMS: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    if scale_ptr is not None:
        scale = _tile(scale_ptr, b, m_t, scale_b, scale_t, offs_d, m_mask, VEC, ACC)
        g *= scale if RMS else 1 + scale
    return g


@triton.jit
def _store_modulated(
    xhat, out_ptr, to, scale_ptr, shift_ptr, b, m_t, offs_d, mask, m_mask,
    scale_b, scale_t, shift_b, shift_t, RMS: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    out = _scaled(xhat, scale_ptr, b, m_t, offs_d, m_mask, scale_b, scale_t, RMS, VEC, ACC)
    if shift_ptr is not None:
        out += _tile(shift_ptr, b, m_t, shift_b, shift_t, offs_d, m_mask, VEC, ACC)
    tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _rsqrt(x):
    """Correctly rounded steps: there is one a row."""
    if x.dtype == tl.float64:
        return 1 / tl.sqrt(x)
    else:
        return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def _forward_kernel(
    x_ptr,  # [B, T, D], rows strided
    y_ptr,  # like x, or None: no residual
    gate_ptr,  # [B, D] or [B, T, D], rows strided
    shift_ptr,
    scale_ptr,  # rms_norm: weight [D], or None
    residual_ptr,  # [B, T, D]
    out_ptr,  # [B, T, D], or None: no norm
    mean_ptr,  # [B, T], or None: rms_norm
    rstd_ptr,  # [B, T]
    T, DV, tiles,
    x_b, x_t, y_b, y_t, gate_b, gate_t, shift_b, shift_t, scale_b, scale_t,
    EPS: tl.constexpr, RMS: tl.constexpr, EACH: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """EACH: every token has its own modulation. D = DV VEC."""
    _, b, first = _place(tiles, ROWS, WIDE)
    D = DV * VEC
    t, offs_d = first + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask_d, mask_t = offs_d < D, t < T
    mask = mask_d & mask_t
    # One row for all tokens is loaded once, and broadcast.
    m_t, m_mask = (t, mask) if EACH else (tl.zeros([1, 1], tl.int32), mask_d)
    row = b * T + t
    to = row * DV * VEC + offs_d
    x = _tile(x_ptr, b, t, x_b, x_t, offs_d, mask, VEC, ACC)
    x = _store_residual(
        x, y_ptr, gate_ptr, residual_ptr, to, b, t, m_t, offs_d, mask, m_mask,
        y_b, y_t, gate_b, gate_t, VEC, ACC,
    )  # fmt: skip
    if out_ptr is not None:
        if not RMS:
            mean = tl.sum(x, 1, keep_dims=True) / D
            tl.store(mean_ptr + row, mean, mask_t)
            x = _centre(x, mean, mask, D)
        rstd = _rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + EPS)
        tl.store(rstd_ptr + row, rstd, mask_t)
        _store_modulated(
            x * rstd, out_ptr, to, scale_ptr, shift_ptr, b, m_t, offs_d, mask, m_mask,
            scale_b, scale_t, shift_b, shift_t, RMS, VEC, ACC,
        )  # fmt: skip


@triton.jit
def _store_dx(
    dx, dr_ptr, dx_ptr, to, b, t, dr_b, dr_t, offs_d, mask, VEC: tl.constexpr, ACC: tl.constexpr
):
    """The norm's gradient and, where it has its own, the residual's."""
    if dr_ptr is not None:
        dx += _tile(dr_ptr, b, t, dr_b, dr_t, offs_d, mask, VEC, ACC)
    tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask)
    return dx


@triton.jit
def _store_dy(
    dr, y_ptr, gate_ptr, dy_ptr, to, b, t, m_t, offs_d, mask, m_mask, y_b, y_t, gate_b, gate_t,
    VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dr y: what the gate's gradient is the sum of."""
    gate = _tile(gate_ptr, b, m_t, gate_b, gate_t, offs_d, m_mask, VEC, ACC)
    tl.store(dy_ptr + to, (gate * dr).to(dy_ptr.dtype.element_ty), mask)
    return dr * _tile(y_ptr, b, t, y_b, y_t, offs_d, mask, VEC, ACC)


@triton.jit
def _put(ptr, value, sums, to, mask, EACH: tl.constexpr):
    """A gradient of the modulation: stored where every token has its own, else added up."""
    if EACH:
        tl.store(ptr + to, value.to(ptr.dtype.element_ty), mask)
        return sums
    else:
        return sums + tl.sum(value, 0, keep_dims=True)


@triton.jit
def _add_three(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def _three_sums(a, b, c):
    """Of every row. In one exchange between warps; the interpreter would take hours for that."""
    if TOGETHER:
        return tl.reduce((a, b, c), 1, _add_three, keep_dims=True)
    else:
        return (
            tl.sum(a, 1, keep_dims=True),
            tl.sum(b, 1, keep_dims=True),
            tl.sum(c, 1, keep_dims=True),
        )


@triton.jit
def _backward_kernel(
    dr_ptr,  # [B, T, D], rows strided, or None: the residual has no gradient of its own
    dn_ptr,  # likewise; None: no norm
    x_ptr,
    y_ptr,  # None: no residual
    gate_ptr,  # [B, D] or [B, T, D], rows strided
    scale_ptr,
    mean_ptr,  # [B, T]
    rstd_ptr,
    dx_ptr,  # [B, T, D]; with no norm it is dr
    dy_ptr,
    dgate_ptr,  # EACH: [B, T, D]; else sums of blocks of rows [B, blocks, D]; None: not asked for
    dshift_ptr,
    dscale_ptr,
    T, DV, blocks,
    dr_b, dr_t, dn_b, dn_t, x_b, x_t, y_b, y_t, gate_b, gate_t, scale_b, scale_t,
    RMS: tl.constexpr, EACH: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Block of TILES tiles of ROWS rows of one sample."""
    pid, b, first = _place(blocks, ROWS * TILES, WIDE)
    D = DV * VEC
    offs_d = tl.arange(0, BLOCK)[None, :]
    mask_d = offs_d < D
    dgate = tl.zeros([1, BLOCK], ACC)
    dshift, dscale = dgate, dgate
    # The next rows are read while these are worked on.
    for i in tl.range(TILES, num_stages=STAGES):
        t = first + i * ROWS + tl.arange(0, ROWS)[:, None]
        mask_t = t < T
        mask = mask_d & mask_t
        m_t, m_mask = (t, mask) if EACH else (tl.zeros([1, 1], tl.int32), mask_d)
        to = (b * T + t) * DV * VEC + offs_d
        if dn_ptr is not None:
            dn = _tile(dn_ptr, b, t, dn_b, dn_t, offs_d, mask, VEC, ACC)
            x = _tile(x_ptr, b, t, x_b, x_t, offs_d, mask, VEC, ACC)
            rstd = tl.load(rstd_ptr + b * T + t, mask_t, other=0.0)
            g = _scaled(dn, scale_ptr, b, m_t, offs_d, m_mask, scale_b, scale_t, RMS, VEC, ACC)
            if RMS:
                xhat = x * rstd
                level, slope = 0.0, tl.sum(g * xhat, 1, keep_dims=True) / D
            else:
                x -= tl.load(mean_ptr + b * T + t, mask_t, other=0.0)
                x = tl.where(mask, x, 0.0)
                rest, level, slope = _three_sums(x, g, g * x)
                rest, level = rest / D, level / D
                xhat = (x - rest) * rstd
                slope = (slope / D - rest * level) * rstd
            if dshift_ptr is not None:
                dshift = _put(dshift_ptr, dn, dshift, to, mask, EACH)
            if scale_ptr is not None:
                dscale = _put(dscale_ptr, dn * xhat, dscale, to, mask, EACH)
            dr = _store_dx(
                rstd * (g - level - xhat * slope), dr_ptr, dx_ptr, to,
                b, t, dr_b, dr_t, offs_d, mask, VEC, ACC,
            )  # fmt: skip
        else:
            dr = _tile(dr_ptr, b, t, dr_b, dr_t, offs_d, mask, VEC, ACC)
        if y_ptr is not None:
            dgate_part = _store_dy(
                dr, y_ptr, gate_ptr, dy_ptr, to, b, t, m_t, offs_d, mask, m_mask,
                y_b, y_t, gate_b, gate_t, VEC, ACC,
            )  # fmt: skip
            dgate = _put(dgate_ptr, dgate_part, dgate, to, mask, EACH)
    if not EACH:
        at = pid * DV * VEC + offs_d
        if dgate_ptr is not None:
            tl.store(dgate_ptr + at, dgate, mask_d)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + at, dshift, mask_d)
        if dscale_ptr is not None:
            tl.store(dscale_ptr + at, dscale, mask_d)


@triton.jit
def _add_blocks_kernel(
    sums_ptr,  # [K, B, blocks, D]
    first_ptr,  # [B, D] each; None after the K-th
    second_ptr,
    third_ptr,
    blocks, D, B,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    b, k = tl.program_id(1), tl.program_id(2)
    offs_d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = offs_d < D
    row = (k * B + b).to(tl.int64) * blocks
    total = tl.zeros([COLUMNS], ACC)
    for i in range(0, blocks, ROWS):
        block = i + tl.arange(0, ROWS)[:, None]
        offs = (row + block) * D + offs_d[None, :]
        total += tl.sum(tl.load(sums_ptr + offs, (block < blocks) & mask[None, :], other=0.0), 0)
    offs = b.to(tl.int64) * D + offs_d
    if k == 0:
        tl.store(first_ptr + offs, total.to(first_ptr.dtype.element_ty), mask)
    elif k == 1:
        if second_ptr is not None:
            tl.store(second_ptr + offs, total.to(second_ptr.dtype.element_ty), mask)
    else:
        if third_ptr is not None:
            tl.store(third_ptr + offs, total.to(third_ptr.dtype.element_ty), mask)
