"""Device code of `dfm_fast.kernels.norms` for rows that no program's registers hold.

A program goes over its rows in chunks of CHUNK elements, twice: for their moments, then for what is
made with them. The second time finds in the cache what the first has brought there, as long as the
rows of all programs at work fit. Arguments are those of the kernels for whole rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dfm_fast.kernels.row_norms import _place, _rsqrt, _tile


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
def _long_forward_kernel(
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
    ROWS: tl.constexpr, CHUNK: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    _, b, first = _place(tiles, ROWS, WIDE)
    D = DV * VEC
    t = first + tl.arange(0, ROWS)[:, None]
    mask_t = t < T
    m_t = t if EACH else tl.zeros([1, 1], tl.int32)
    row = b * T + t
    # Moments of the chunks are merged (Chan, Golub & LeVeque 1979), means counted from that of the
    # first: beside it a large mean costs no digits.
    origin = tl.zeros([ROWS, 1], ACC)
    mean, m2 = origin, origin
    squares = tl.zeros([ROWS, CHUNK], ACC)
    if out_ptr is not None:
        for start in range(0, D, CHUNK):
            offs_d = start + tl.arange(0, CHUNK)[None, :]
            mask_d = offs_d < D
            mask = mask_d & mask_t
            x = _tile(x_ptr, b, t, x_b, x_t, offs_d, mask, VEC, ACC)
            if y_ptr is not None:
                x = _residual(
                    x, y_ptr, gate_ptr, b, t, m_t, offs_d, mask, mask if EACH else mask_d,
                    y_b, y_t, gate_b, gate_t, residual_ptr.dtype.element_ty, VEC, ACC,
                )  # fmt: skip
            if RMS:
                squares += x * x
            else:
                n = tl.minimum(D - start, CHUNK).to(ACC)
                if start == 0:
                    origin = tl.sum(x, 1, keep_dims=True) / n
                x = tl.where(mask, x - origin, 0.0)
                centre = tl.sum(x, 1, keep_dims=True) / n
                x = tl.where(mask, x - centre, 0.0)
                share = n / (start + n)
                step = centre - mean
                mean += step * share
                m2 += tl.sum(x * x, 1, keep_dims=True) + step * step * (start * share)
        if RMS:
            m2 = tl.sum(squares, 1, keep_dims=True)
        rstd = _rsqrt(m2 / D + EPS)
        rounded = origin + mean
        lost = (origin - rounded) + mean
        tl.store(rstd_ptr + row, rstd, mask_t)
        if not RMS:
            tl.store(mean_ptr + row, rounded, mask_t)
    for start in range(0, D, CHUNK):
        offs_d = start + tl.arange(0, CHUNK)[None, :]
        mask_d = offs_d < D
        mask = mask_d & mask_t
        m_mask = mask if EACH else mask_d
        to = row * DV * VEC + offs_d
        x = _tile(x_ptr, b, t, x_b, x_t, offs_d, mask, VEC, ACC)
        # Once more: what other threads have stored needs more than a barrier on some GPUs.
        x = _store_residual(
            x, y_ptr, gate_ptr, residual_ptr, to, b, t, m_t, offs_d, mask, m_mask,
            y_b, y_t, gate_b, gate_t, VEC, ACC,
        )  # fmt: skip
        if out_ptr is not None:
            if not RMS:
                x = x - rounded - lost
            _store_modulated(
                x * rstd, out_ptr, to, scale_ptr, shift_ptr, b, m_t, offs_d, mask, m_mask,
                scale_b, scale_t, shift_b, shift_t, RMS, VEC, ACC,
            )  # fmt: skip


@triton.jit
def _sum_of(ptr, value, to, mask, mask_d, at, EACH: tl.constexpr):
    """A gradient of the modulation, of a chunk of this program's rows, stored."""
    total = _put(ptr, value, 0.0, to, mask, EACH)
    if not EACH:
        tl.store(ptr + at, total, mask_d)


@triton.jit
def _long_backward_kernel(
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
    CHUNK: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Block of ROWS rows of one sample."""
    pid, b, first = _place(blocks, ROWS, WIDE)
    D = DV * VEC
    t = first + tl.arange(0, ROWS)[:, None]
    mask_t = t < T
    m_t = t if EACH else tl.zeros([1, 1], tl.int32)
    if dn_ptr is not None:
        rstd = tl.load(rstd_ptr + b * T + t, mask_t, other=0.0)
        mean = tl.zeros([ROWS, 1], ACC)
        if not RMS:
            mean = tl.load(mean_ptr + b * T + t, mask_t, other=0.0)
        sum_x = tl.zeros([ROWS, CHUNK], ACC)
        sum_g, sum_gx = sum_x, sum_x
        for start in range(0, D, CHUNK):
            offs_d = start + tl.arange(0, CHUNK)[None, :]
            mask_d = offs_d < D
            mask = mask_d & mask_t
            g = _tile(dn_ptr, b, t, dn_b, dn_t, offs_d, mask, VEC, ACC)
            m_mask = mask if EACH else mask_d
            g = _scaled(g, scale_ptr, b, m_t, offs_d, m_mask, scale_b, scale_t, RMS, VEC, ACC)
            x = _tile(x_ptr, b, t, x_b, x_t, offs_d, mask, VEC, ACC)
            if not RMS:
                x = tl.where(mask, x - mean, 0.0)
                sum_x += x
                sum_g += g
            sum_gx += g * x
        lost = tl.sum(sum_x, 1, keep_dims=True) / D  # what rounding took from the mean
        level = tl.sum(sum_g, 1, keep_dims=True) / D
        slope = (tl.sum(sum_gx, 1, keep_dims=True) / D - lost * level) * rstd
    for start in range(0, D, CHUNK):
        offs_d = start + tl.arange(0, CHUNK)[None, :]
        mask_d = offs_d < D
        mask = mask_d & mask_t
        m_mask = mask if EACH else mask_d
        to, at = (b * T + t) * DV * VEC + offs_d, pid * DV * VEC + offs_d
        if dn_ptr is not None:
            g = _tile(dn_ptr, b, t, dn_b, dn_t, offs_d, mask, VEC, ACC)
            x = _tile(x_ptr, b, t, x_b, x_t, offs_d, mask, VEC, ACC)
            xhat = (x if RMS else x - mean - lost) * rstd
            if dshift_ptr is not None:
                _sum_of(dshift_ptr, g, to, mask, mask_d, at, EACH)
            if scale_ptr is not None:
                _sum_of(dscale_ptr, g * xhat, to, mask, mask_d, at, EACH)
            g = _scaled(g, scale_ptr, b, m_t, offs_d, m_mask, scale_b, scale_t, RMS, VEC, ACC)
            dr = _store_dx(
                rstd * (g - level - xhat * slope), dr_ptr, dx_ptr, to,
                b, t, dr_b, dr_t, offs_d, mask, VEC, ACC,
            )  # fmt: skip
        else:
            dr = _tile(dr_ptr, b, t, dr_b, dr_t, offs_d, mask, VEC, ACC)
        if y_ptr is not None:
            dgate = _store_dy(
                dr, y_ptr, gate_ptr, dy_ptr, to, b, t, m_t, offs_d, mask, m_mask,
                y_b, y_t, gate_b, gate_t, VEC, ACC,
            )  # fmt: skip
            _sum_of(dgate_ptr, dgate, to, mask, mask_d, at, EACH)
