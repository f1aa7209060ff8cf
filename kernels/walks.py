"""Bilinear kernels that walk: a lane owns a strip of columns and goes down it step by step.

A step is 2^STEPS rows. What lies between two rows of a level is known once the lower one is, one
row late; the lane keeps those few rows in registers, so that no row is computed twice, where a
patch recomputes its halo above and below. A lane re-reads one step before its rows and one after.
In `build_kernel` every other strip is walked upwards, which is the same arithmetic: neighbours then
read what they share at the same time, at the start of both or at the end, and once from memory.
"""

# ruff: noqa: RUF005 (Triton's tuples do not unpack)

import triton
import triton.language as tl

from dfm_fast.kernels.patches import (
    lanes,
    load_row,
    mirror,
    mirrored,
    pool,
    residual,
    rounded,
    store_row,
    top_of,
    up_row,
)


@triton.jit
def _start(
    ptr, at, H, WP, C, upwards, COLS: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """(pointers to the first row of each lane's columns, what leads to the next), as walked."""
    first = tl.where(upwards, H - 1, at[1] * 0)  # as wide as a row's number
    stride = WP * COLS * C
    ptr = top_of(ptr, at, H, WP, C, COLS, VEC, LAST) + first * stride
    return ptr, tl.where(upwards, -stride, stride)


@triton.jit
def _bands(x_at, at, size, i, STEPS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
           LAST: tl.constexpr):  # fmt: skip
    """Rows i 2^STEPS on of x with their halo, and what they come to: middle rows, coarse row."""
    H, WP, C = size[0], size[1], size[2]
    ptr, down = x_at
    x = ()
    for k in tl.static_range(1 << STEPS):
        line = ptr + mirrored((i << STEPS) + k, H) * down
        row = load_row(line, at[2], WP, C, COLS, 1 << STEPS, VEC, LAST)
        x = x + (row,)
    middle = rounded(pool(x, 0.25), ptr.dtype.element_ty)
    coarse = middle
    if STEPS == 2:
        coarse = rounded(pool(middle, 0.25), ptr.dtype.element_ty)
        middle = mirror(middle, at[2], WP, 2)
    return x, middle, coarse[0]


@triton.jit
def build_kernel(
    x_ptr, coarse_ptr, middle_ptr, fine_ptr, P, H, WP, CG, STEPS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr,
    TC: tl.constexpr, TW: tl.constexpr, TH: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    # A lane walks down its columns, 2^STEPS rows at a time, and keeps the last row of each level:
    # what lies between two rows can be predicted once the lower is known, one row late.
    at = lanes(P, H, WP, CG, ROWS, TC, TW, TH, BLOCK, LAST, WIDE)
    size = (H, WP, CG * VEC if LAST else 1)
    HALO: tl.constexpr = 1 << STEPS
    EXTRA: tl.constexpr = STEPS - 1  # columns of a middle row's halo that only the coarse row needs
    C = size[2]
    upwards = at[1] // ROWS % 2 == 1
    x_at = _start(x_ptr, at, H, WP, C, upwards, COLS, VEC, LAST)
    coarse_at = _start(coarse_ptr, at, H >> STEPS, WP, C, upwards, COLS >> STEPS, VEC, LAST)
    fine_at = _start(fine_ptr, at, H, WP, C, upwards, COLS, VEC, LAST)
    if STEPS == 2:
        middle_at = _start(middle_ptr, at, H // 2, WP, C, upwards, COLS // 2, VEC, LAST)
    top = tl.where(upwards, H - ROWS - at[1], at[1])
    first, end = top >> STEPS, (top + ROWS) >> STEPS
    x, middle, coarse = _bands(x_at, at, size, first - 1, STEPS, COLS, VEC, LAST)
    last_x, last_m, last_c = x[HALO - 1], middle[EXTRA], coarse
    for step in range((ROWS >> STEPS) + 1):
        i = first + step
        x, middle, coarse = _bands(x_at, at, size, i, STEPS, COLS, VEC, LAST)
        before, inside = i > first, i < end
        store_row(coarse_at[0] + i * coarse_at[1], coarse, inside, C, 1, VEC, LAST)
        if STEPS == 2:
            above, near = up_row(last_c, 0), up_row(coarse, 0)
            line = middle_at[0] + 2 * i * middle_at[1]
            detail = residual(last_m, near, above, 0.0625, 2)
            store_row(line - middle_at[1], detail, before, C, 0, VEC, LAST)
            detail = residual(middle[0], above, near, 0.0625, 2)
            store_row(line, detail, inside, C, 0, VEC, LAST)
        wide = up_row(last_m, EXTRA)
        row = fine_at[0] + (i << STEPS) * fine_at[1]
        for k in tl.static_range(STEPS):
            near = up_row(middle[k], EXTRA)
            upper = last_x if k == 0 else x[2 * k - 1]
            detail = residual(upper, near, wide, 0.0625, HALO)
            line = row + (2 * k - 1) * fine_at[1]
            store_row(line, detail, before if k == 0 else inside, C, 0, VEC, LAST)
            detail = residual(x[2 * k], wide, near, 0.0625, HALO)
            store_row(line + fine_at[1], detail, inside, C, 0, VEC, LAST)
            wide = near
        last_x, last_m, last_c = x[HALO - 1], middle[EXTRA], coarse


@triton.jit
def _weigh(a, b, c, d, SCALE: tl.constexpr):
    """SCALE (a + 3 b + 3 c + d) of four rows."""
    out = ()
    for k in tl.static_range(len(a)):
        out = out + (((a[k] + d[k]) + 3.0 * (b[k] + c[k])) * SCALE,)
    return out


@triton.jit
def _narrow(row):
    """`up_adjoint` along one row: 2 m + 2 -> m, 4 times too large."""
    out = ()
    for k in tl.static_range(0, len(row) - 2, 2):
        out = out + ((row[k] + row[k + 3]) + 3.0 * (row[k + 1] + row[k + 2]),)
    return out


@triton.jit
def _narrowed(dy_ptr, at, size, i, COLS: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr):
    """Rows 4 i to 4 i + 3 of dy, narrowed to middle columns with a halo of 1."""
    H, WP, C = size[0], size[1], size[2]
    ptr = top_of(dy_ptr, at, H, WP, C, COLS, VEC, LAST)
    out = ()
    for k in tl.static_range(4):
        line = ptr + mirrored(4 * i + k, H) * (WP * COLS * C)
        row = mirror((load_row(line, at[2], WP, C, COLS, 4, VEC, LAST),), at[2], WP, 4)[0]
        inner = ()
        for j in tl.static_range(1, len(row) - 1):
            inner = inner + (row[j],)
        out = out + (_narrow(inner),)
    return out


@triton.jit
def collapse_bwd_kernel(
    dy_ptr, dcoarse_ptr, dmiddle_ptr, P, H, WP, CG, STEPS: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr, TC: tl.constexpr,
    TW: tl.constexpr, TH: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    at = lanes(P, H, WP, CG, ROWS, TC, TW, TH, BLOCK, LAST, WIDE)
    size = (H, WP, CG * VEC if LAST else 1)
    C = size[2]
    coarse_at = top_of(dcoarse_ptr, at, H // 4, WP, C, COLS // 4, VEC, LAST)
    if dmiddle_ptr is not None:
        middle_at = top_of(dmiddle_ptr, at, H // 2, WP, C, COLS // 2, VEC, LAST)
    first, end = at[1] // 4, (at[1] + ROWS) // 4
    above = _narrowed(dy_ptr, at, size, first - 1, COLS, VEC, LAST)
    a, b, c = above[1], above[2], above[3]
    # Of the last step: what its two middle rows come to. Unused in the first.
    e, f = _narrow(a), _narrow(a)
    for step in range(ROWS // 4 + 1):
        i = first + step
        rows = _narrowed(dy_ptr, at, size, i, COLS, VEC, LAST)
        upper = _weigh(a, b, c, rows[0], 0.0625)  # middle row 2 i - 1
        lower = _weigh(c, rows[0], rows[1], rows[2], 0.0625)  # middle row 2 i
        before, inside = i > first, i < end
        if dmiddle_ptr is not None:
            row = i * (COLS * WP * C)
            width = COLS // 2 * WP * C
            store_row(middle_at + row - width, upper, before, C, 1, VEC, LAST)
            store_row(middle_at + row, lower, inside, C, 1, VEC, LAST)
        g, h = _narrow(upper), _narrow(lower)
        grad = _weigh(e, f, g, h, 0.0625)
        row = (i - 1) * (COLS // 4 * WP * C)
        store_row(coarse_at + row, grad, before, C, 0, VEC, LAST)
        a, b, c, e, f = rows[1], rows[2], rows[3], g, h
