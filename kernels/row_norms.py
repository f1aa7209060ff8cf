"""Device code of `dfm_fast.kernels.norms`: rows of norms and residuals, forward and backward.

A row is a tuple of chunks of CHUNK elements, as its length is no power of two: few lanes have
nothing to do. All of what a row is made from is loaded before anything is stored, since no load
may pass a store.
"""

# ruff: noqa: RUF005 (Triton's tuples do not unpack)

from __future__ import annotations

import triton
import triton.language as tl

from dfm_fast._library import INTERPRET

TOGETHER = tl.constexpr(not INTERPRET)


@triton.jit
def _tile(ptr, b, t, stride_b, stride_t, offs_d, mask, VEC: tl.constexpr, ACC: tl.constexpr):
    """Rows t [R, 1] of sample b, elements offs_d [1, N]. Strides count vectors."""
    return tl.load(ptr + (b * stride_b + t * stride_t) * VEC + offs_d, mask, other=0.0).to(ACC)


@triton.jit
def _chunk(i: tl.constexpr, CHUNK: tl.constexpr):
    return i * CHUNK + tl.arange(0, CHUNK)[None, :]


@triton.jit
def _row(
    ptr, b, t, mask_t, stride_b, stride_t, D: tl.constexpr, CHUNK: tl.constexpr, VEC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Rows t whole, in chunks; none where there is no tensor."""
    out = ()
    if ptr is not None:
        for i in tl.static_range((D + CHUNK - 1) // CHUNK):
            offs_d = _chunk(i, CHUNK)
            mask = (offs_d < D) & mask_t
            out = out + (_tile(ptr, b, t, stride_b, stride_t, offs_d, mask, VEC, ACC),)
    return out


@triton.jit
def _store_row(ptr, at, x, mask_t, D: tl.constexpr, CHUNK: tl.constexpr):
    """Rows that start at `at` [R, 1]."""
    for i in tl.static_range(len(x)):
        offs_d = _chunk(i, CHUNK)
        tl.store(ptr + at + offs_d, x[i].to(ptr.dtype.element_ty), (offs_d < D) & mask_t)


@triton.jit
def _minus(x, level, D: tl.constexpr, CHUNK: tl.constexpr):
    """x - level, 0 past the end."""
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (tl.where(_chunk(i, CHUNK) < D, x[i] - level, 0.0),)
    return out


@triton.jit
def _times(x, y):
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (x[i] * y[i],)
    return out


@triton.jit
def _sum(x):
    """Of every row [R, 1]."""
    total = x[0]
    for i in tl.static_range(1, len(x)):
        total += x[i]
    return tl.sum(total, 1, keep_dims=True)


@triton.jit
def _squares(x):
    total = x[0] * x[0]
    for i in tl.static_range(1, len(x)):
        total += x[i] * x[i]
    return tl.sum(total, 1, keep_dims=True)


@triton.jit
def _place(blocks, rows, WIDE: tl.constexpr):
    """(program, sample, first row) of a program for a block of rows of one sample."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    return pid, pid // blocks, pid % blocks * rows


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
    T, DV: tl.constexpr, tiles,
    x_b, x_t, y_b, y_t, gate_b, gate_t, shift_b, shift_t, scale_b, scale_t,
    EPS: tl.constexpr, RMS: tl.constexpr, EACH: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """EACH: every token has its own modulation. D = DV VEC."""
    _, b, first = _place(tiles, ROWS, WIDE)
    D: tl.constexpr = DV * VEC
    t = first + tl.arange(0, ROWS)[:, None]
    mask_t = t < T
    row = b * T + t
    at = row * D
    x = _row(x_ptr, b, t, mask_t, x_b, x_t, D, CHUNK, VEC, ACC)
    y = _row(y_ptr, b, t, mask_t, y_b, y_t, D, CHUNK, VEC, ACC)
    gate = _row(gate_ptr, b, t, mask_t, gate_b, gate_t, D, CHUNK, VEC, ACC)
    scale = _row(scale_ptr, b, t, mask_t, scale_b, scale_t, D, CHUNK, VEC, ACC)
    shift = _row(shift_ptr, b, t, mask_t, shift_b, shift_t, D, CHUNK, VEC, ACC)
    if y_ptr is not None:
        # Rounded, as the norm is of what is stored.
        residual = ()
        for i in tl.static_range(len(x)):
            r = (x[i] + gate[i] * y[i]).to(residual_ptr.dtype.element_ty)
            residual = residual + (r.to(ACC),)
        x = residual
        _store_row(residual_ptr, at, x, mask_t, D, CHUNK)
    if out_ptr is not None:
        if not RMS:
            mean = _sum(x) / D
            x = _minus(x, mean, D, CHUNK)
            # What rounding the mean left in it.
            x = _minus(x, _sum(x) / D, D, CHUNK)
            tl.store(mean_ptr + row, mean, mask_t)
        rstd = _rsqrt(_squares(x) / D + EPS)
        tl.store(rstd_ptr + row, rstd, mask_t)
        out = ()
        for i in tl.static_range(len(x)):
            part = x[i] * rstd
            if scale_ptr is not None:
                part *= scale[i] if RMS else 1 + scale[i]
            if shift_ptr is not None:
                part += shift[i]
            out = out + (part,)
        _store_row(out_ptr, at, out, mask_t, D, CHUNK)


@triton.jit
def _add_three(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def _three_sums(a, b, c):
    """Of every row. In one exchange between warps; the interpreter would take hours for that."""
    x, y, z = a[0], b[0], c[0]
    for i in tl.static_range(1, len(a)):
        x, y, z = x + a[i], y + b[i], z + c[i]
    if TOGETHER:
        return tl.reduce((x, y, z), 1, _add_three, keep_dims=True)
    else:
        return (
            tl.sum(x, 1, keep_dims=True),
            tl.sum(y, 1, keep_dims=True),
            tl.sum(z, 1, keep_dims=True),
        )


@triton.jit
def _zeros(
    wanted: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    out = ()
    if wanted:
        for _ in tl.static_range((D + CHUNK - 1) // CHUNK):
            out = out + (tl.zeros([ROWS, CHUNK], ACC),)
    return out


@triton.jit
def _add(sums, x):
    out = ()
    for i in tl.static_range(len(sums)):
        out = out + (sums[i] + x[i],)
    return out


@triton.jit
def _over_rows(a, b, c):
    """Their sums [1, CHUNK] over all rows, in one exchange between warps for each chunk."""
    x, y, z = (), (), ()
    for i in tl.static_range(len(a)):
        if TOGETHER:
            p, q, r = tl.reduce((a[i], b[i], c[i]), 0, _add_three, keep_dims=True)
            x, y, z = x + (p,), y + (q,), z + (r,)
        else:
            x, y, z = x + (a[i],), y + (b[i],), z + (c[i],)
    return x, y, z


@triton.jit
def _store_sums(ptr, at, sums, D: tl.constexpr, CHUNK: tl.constexpr):
    for i in tl.static_range(len(sums)):
        offs_d = _chunk(i, CHUNK)
        tl.store(ptr + at + offs_d, tl.sum(sums[i], 0, keep_dims=True), offs_d < D)


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
    T, DV: tl.constexpr, blocks,
    dr_b, dr_t, dn_b, dn_t, x_b, x_t, y_b, y_t, gate_b, gate_t, scale_b, scale_t,
    RMS: tl.constexpr, EACH: tl.constexpr, tiles, ACC: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Block of `tiles` tiles of ROWS rows of one sample."""
    pid, b, first = _place(blocks, ROWS * tiles, WIDE)
    D: tl.constexpr = DV * VEC
    dgate = _zeros(dgate_ptr is not None and not EACH, D, ROWS, CHUNK, ACC)
    dshift = _zeros(dshift_ptr is not None and not EACH, D, ROWS, CHUNK, ACC)
    dscale = _zeros(dscale_ptr is not None and not EACH, D, ROWS, CHUNK, ACC)
    t = first + tl.arange(0, ROWS)[:, None]
    gate = _row(gate_ptr, b, t, t < T, gate_b, gate_t, D, CHUNK, VEC, ACC)
    scale = _row(scale_ptr, b, t, t < T, scale_b, scale_t, D, CHUNK, VEC, ACC)
    # The next rows are read while these are worked on.
    for i in tl.range(0, tiles, num_stages=2):
        t = first + i * ROWS + tl.arange(0, ROWS)[:, None]
        mask_t = t < T
        at = (b * T + t) * D
        dn = _row(dn_ptr, b, t, mask_t, dn_b, dn_t, D, CHUNK, VEC, ACC)
        x = _row(x_ptr, b, t, mask_t, x_b, x_t, D, CHUNK, VEC, ACC)
        dr = _row(dr_ptr, b, t, mask_t, dr_b, dr_t, D, CHUNK, VEC, ACC)
        y = _row(y_ptr, b, t, mask_t, y_b, y_t, D, CHUNK, VEC, ACC)
        if EACH:
            gate = _row(gate_ptr, b, t, mask_t, gate_b, gate_t, D, CHUNK, VEC, ACC)
            scale = _row(scale_ptr, b, t, mask_t, scale_b, scale_t, D, CHUNK, VEC, ACC)
        if dn_ptr is not None:
            rstd = tl.load(rstd_ptr + b * T + t, mask_t, other=0.0)
            g = dn
            if scale_ptr is not None:
                g = ()
                for j in tl.static_range(len(dn)):
                    g = g + (dn[j] * (scale[j] if RMS else 1 + scale[j]),)
            if RMS:
                rest, level = 0.0, 0.0
                slope = _sum(_times(g, x)) / D * rstd
            else:
                mean = tl.load(mean_ptr + b * T + t, mask_t, other=0.0)
                x = _minus(x, mean, D, CHUNK)
                rest, level, slope = _three_sums(x, g, _times(g, x))
                rest, level = rest / D, level / D
                slope = (slope / D - rest * level) * rstd
            xhat, dx = (), ()
            for j in tl.static_range(len(dn)):
                xhat = xhat + ((x[j] if RMS else x[j] - rest) * rstd,)
                part = rstd * ((g[j] if RMS else g[j] - level) - xhat[j] * slope)
                if dr_ptr is not None:
                    part += dr[j]
                dx = dx + (part,)
            _store_row(dx_ptr, at, dx, mask_t, D, CHUNK)
            dr = dx
            if EACH:
                _store_row(dshift_ptr, at, dn, mask_t, D, CHUNK)
                _store_row(dscale_ptr, at, _times(dn, xhat), mask_t, D, CHUNK)
            else:
                dshift = _add(dshift, dn)
                if scale_ptr is not None:
                    dscale = _add(dscale, _times(dn, xhat))
        if y_ptr is not None:
            _store_row(dy_ptr, at, _times(gate, dr), mask_t, D, CHUNK)
            part = _times(dr, y)
            if EACH:
                _store_row(dgate_ptr, at, part, mask_t, D, CHUNK)
            else:
                dgate = _add(dgate, part)
    if not EACH:
        if dn_ptr is not None and not RMS and y_ptr is not None:
            dgate, dshift, dscale = _over_rows(dgate, dshift, dscale)
        _store_sums(dgate_ptr, pid * D, dgate, D, CHUNK)
        _store_sums(dshift_ptr, pid * D, dshift, D, CHUNK)
        _store_sums(dscale_ptr, pid * D, dscale, D, CHUNK)


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
    total = tl.zeros([ROWS, COLUMNS], ACC)
    for i in range(0, blocks, ROWS):
        block = i + tl.arange(0, ROWS)[:, None]
        offs = (row + block) * D + offs_d[None, :]
        total += tl.load(sums_ptr + offs, (block < blocks) & mask[None, :], other=0.0)
    total = tl.sum(total, 0)
    offs = b.to(tl.int64) * D + offs_d
    if k == 0:
        tl.store(first_ptr + offs, total.to(first_ptr.dtype.element_ty), mask)
    elif k == 1:
        if second_ptr is not None:
            tl.store(second_ptr + offs, total.to(second_ptr.dtype.element_ty), mask)
    else:
        if third_ptr is not None:
            tl.store(third_ptr + offs, total.to(third_ptr.dtype.element_ty), mask)
