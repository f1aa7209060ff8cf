"""Patches: the pixels one GPU thread owns, as a tuple of rows of registers.

Every lane of a program owns one ROWS x COLS patch of a plane, with a halo. A patch is a tuple of
rows, a row a tuple of columns, a column a tensor with one value a lane ([BLOCK]; in channels_last
[BLOCK, VEC] neighbouring channels). Stencils then are plain arithmetic among registers: no shared
memory, no barrier, no shuffle; what a neighbour also needs is read again through L1.

Loads and stores are VEC wide along W (contiguous) or along C (channels_last). Nothing is masked:
lanes past the end repeat the last patch, and write the same values.
"""

# ruff: noqa: RUF005 (Triton's tuples do not unpack)

import triton
import triton.language as tl


@triton.jit
def lanes(
    P, H, WP, CG, ROWS: tl.constexpr, TC: tl.constexpr, TW: tl.constexpr, TH: tl.constexpr,
    BLOCK: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(plane, first row, patch column, channel group) of every lane: tiles of TH x TW patches.

    WIDE: a plane has 2^31 elements or more, and offsets within it 64 bits.
    """
    TP: tl.constexpr = BLOCK // (TC * TW * TH)
    lane = tl.arange(0, BLOCK)
    if LAST:
        lane = lane[:, None]
    tile = tl.program_id(0)
    group = tl.minimum(tile % tl.cdiv(CG, TC) * TC + lane % TC, CG - 1)
    tile = tile // tl.cdiv(CG, TC)
    column = tl.minimum(tile % tl.cdiv(WP, TW) * TW + lane // TC % TW, WP - 1)
    tile = tile // tl.cdiv(WP, TW)
    tiles_h = tl.cdiv(tl.cdiv(H, ROWS), TH)
    row = tl.minimum((tile % tiles_h * TH + lane // (TC * TW) % TH) * ROWS, H - ROWS)
    if WIDE:
        row = row.to(tl.int64)
    plane = tl.minimum(tile // tiles_h * TP + lane // (TC * TW * TH), P - 1)
    return plane.to(tl.int64), row, column, group


@triton.jit
def split(x, N: tl.constexpr):
    """[BLOCK, N] -> N tensors [BLOCK]; registers only, as one thread holds all N."""
    out = ()
    if N == 1:
        out = (tl.reshape(x, [x.shape[0]]),)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], N // 2, 2]))
        even, odd = split(even, N // 2), split(odd, N // 2)
        for k in tl.static_range(N // 2):
            out = out + (even[k], odd[k])
    return out


@triton.jit
def join(x, START: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr):
    """Tensors START, START + STEP, ... [BLOCK] -> [BLOCK, N]."""
    if N == 1:
        out = x[START][:, None]
    else:
        even = join(x, START, 2 * STEP, N // 2)
        odd = join(x, START + STEP, 2 * STEP, N // 2)
        out = tl.reshape(tl.join(even, odd), [x[0].shape[0], N])
    return out


@triton.jit
def load_columns(ptr, C, N: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr):
    """N neighbouring columns from ptr on, in fp32 (fp64 of fp64)."""
    ACC: tl.constexpr = tl.float64 if ptr.dtype.element_ty == tl.float64 else tl.float32
    out = ()
    if LAST:
        for k in tl.static_range(N):
            out = out + (tl.load(ptr + k * C).to(ACC),)
    else:
        WIDE: tl.constexpr = N if N < VEC else VEC
        for k in tl.static_range(N // WIDE):
            if ptr.dtype.element_ty == tl.bfloat16 and WIDE > 1:
                out = out + load_pairs(ptr + k * WIDE, WIDE // 2)
            else:
                offs = k * WIDE + tl.arange(0, WIDE)[None, :]
                out = out + split(tl.load(ptr[:, None] + offs).to(ACC), WIDE)
    return out


@triton.jit
def load_pairs(ptr, N: tl.constexpr):
    """2 N bfloat16 as N words: a shift and a mask widen a pair, where `to` takes three steps."""
    words = ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    words = split(tl.load(words[:, None] + tl.arange(0, N)[None, :]), N)
    out = ()
    for k in tl.static_range(N):
        low = (words[k] << 16).to(tl.float32, bitcast=True)
        high = (words[k] & 0xFFFF0000).to(tl.float32, bitcast=True)
        out = out + (low, high)
    return out


@triton.jit
def top_of(
    ptr, at, H, WP, C, COLS: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """Pointers to row 0 of each lane's columns: [BLOCK], or [BLOCK, VEC] channels."""
    ptr = ptr + at[0] * H * (WP * COLS * C) + at[2] * (COLS * C)
    if LAST:
        ptr = ptr + at[3] * VEC + tl.arange(0, VEC)[None, :]
    return ptr


@triton.jit
def load(
    ptr, at, size, LEVEL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    HALO: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The patch with its halo, from a level [P, H, W, C] that is LEVEL times halved.

    `at` comes from `lanes`; size is (H, W // COLS, C) of the finest level; ROWS and COLS are those
    of this level. Outside the picture the rows continue as its mirror image (edge repeated), which
    is what both filters mean by their edges; the columns do after `mirror`.
    """
    H, WP, C = size[0] >> LEVEL, size[1], size[2]
    ptr = top_of(ptr, at, H, WP, C, COLS, VEC, LAST)
    patch = ()
    for i in tl.static_range(-HALO, ROWS + HALO):
        row = (at[1] >> LEVEL) + i
        if i < 0 or i >= ROWS:
            row = mirrored(row, H)
        line = ptr + row * (WP * COLS * C)
        patch = patch + (load_row(line, at[2], WP, C, COLS, HALO, VEC, LAST),)
    return patch


@triton.jit
def mirrored(row, H):
    row = tl.where(row < 0, -1 - row, row)
    return tl.where(row < H, row, 2 * H - 1 - row)


@triton.jit
def load_row(
    line, column, WP, C, COLS: tl.constexpr, HALO: tl.constexpr, VEC: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    columns = load_columns(line, C, COLS, VEC, LAST)
    if HALO > 0:
        left = tl.maximum(-column, -1)
        right = tl.minimum(WP - column, 2) + (COLS // HALO - 2)
        before = load_columns(line + left * (HALO * C), C, HALO, VEC, LAST)
        after = load_columns(line + right * (HALO * C), C, HALO, VEC, LAST)
        columns = before + columns + after
    return columns


@triton.jit
def store(
    ptr, patch, at, size, LEVEL: tl.constexpr, HALO: tl.constexpr, VEC: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Write the inside of a patch, rounded; arguments as `load`."""
    COLS: tl.constexpr = len(patch[0]) - 2 * HALO
    H, WP, C = size[0] >> LEVEL, size[1], size[2]
    ptr = top_of(ptr, at, H, WP, C, COLS, VEC, LAST)
    for i in tl.static_range(len(patch) - 2 * HALO):
        line = ptr + ((at[1] >> LEVEL) + i) * (WP * COLS * C)
        store_row(line, patch[HALO + i], None, C, HALO, VEC, LAST)


@triton.jit
def store_row(line, row, mask, C, HALO: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr):
    COLS: tl.constexpr = len(row) - 2 * HALO
    WIDE: tl.constexpr = COLS if COLS < VEC else VEC
    dtype = line.dtype.element_ty
    if LAST:
        for k in tl.static_range(COLS):
            tl.store(line + k * C, row[HALO + k].to(dtype), mask)
    else:
        for k in tl.static_range(COLS // WIDE):
            value = join(row, HALO + k * WIDE, 1, WIDE).to(dtype)
            offs = k * WIDE + tl.arange(0, WIDE)[None, :]
            if mask is None:
                tl.store(line[:, None] + offs, value)
            else:
                tl.store(line[:, None] + offs, value, mask[:, None])


# --- Arithmetic ----------------------------------------------------------------------------------


@triton.jit
def combine(a, b, SIGN: tl.constexpr, HALO_A: tl.constexpr, HALO_B: tl.constexpr):
    """a + SIGN b, elementwise, of their insides."""
    out = ()
    for i in tl.static_range(len(a) - 2 * HALO_A):
        row = ()
        for k in tl.static_range(len(a[0]) - 2 * HALO_A):
            row = row + (a[HALO_A + i][HALO_A + k] + SIGN * b[HALO_B + i][HALO_B + k],)
        out = out + (row,)
    return out


@triton.jit
def crop(patch, N: tl.constexpr):
    """Without the N outermost rows and columns."""
    out = ()
    for i in tl.static_range(N, len(patch) - N):
        row = ()
        for k in tl.static_range(N, len(patch[0]) - N):
            row = row + (patch[i][k],)
        out = out + (row,)
    return out


@triton.jit
def scaled(patch, SCALE: tl.constexpr):
    out = ()
    for i in tl.static_range(len(patch)):
        row = ()
        for k in tl.static_range(len(patch[0])):
            row = row + (patch[i][k] * SCALE,)
        out = out + (row,)
    return out


@triton.jit
def rounded(patch, DTYPE: tl.constexpr):
    """Every value as if stored in DTYPE and read again."""
    out = ()
    for i in tl.static_range(len(patch)):
        row = ()
        for k in tl.static_range(len(patch[0])):
            row = row + (patch[i][k].to(DTYPE).to(patch[i][k].dtype),)
        out = out + (row,)
    return out


@triton.jit
def mirror(patch, column, WP, HALO: tl.constexpr):
    """Halo columns outside the picture, turned round: `load` gives the first (or last) HALO."""
    N: tl.constexpr = len(patch[0])
    out = ()
    for i in tl.static_range(len(patch)):
        row = ()
        for k in tl.static_range(N):
            if k < HALO:
                value = tl.where(column == 0, patch[i][HALO - 1 - k], patch[i][k])
            elif k >= N - HALO:
                value = tl.where(column == WP - 1, patch[i][2 * N - HALO - 1 - k], patch[i][k])
            else:
                value = patch[i][k]
            row = row + (value,)
        out = out + (row,)
    return out


@triton.jit
def pool(patch, SCALE: tl.constexpr):
    """SCALE times the sum of every 2 x 2."""
    out = ()
    for i in tl.static_range(len(patch) // 2):
        row = ()
        for k in tl.static_range(len(patch[0]) // 2):
            top = patch[2 * i][2 * k] + patch[2 * i][2 * k + 1]
            bottom = patch[2 * i + 1][2 * k] + patch[2 * i + 1][2 * k + 1]
            row = row + ((top + bottom) * SCALE,)
        out = out + (row,)
    return out


@triton.jit
def repeat(patch):
    out = ()
    for i in tl.static_range(2 * len(patch)):
        row = ()
        for k in tl.static_range(2 * len(patch[0])):
            row = row + (patch[i // 2][k // 2],)
        out = out + (row,)
    return out


@triton.jit
def up(patch, FILTER: tl.constexpr):
    """nearest: m -> 2m. bilinear: m + 2 (a halo of 1) -> 2m + 2 (a halo of 1), 16 times too large:
    with weights 3 and 1 every tap is one fused multiply-add, and who uses it scales anyway."""
    if FILTER == "nearest":
        out = repeat(patch)
    else:
        wide = ()
        for i in tl.static_range(len(patch)):
            row = ()
            for k in tl.static_range(len(patch[0]) - 1):
                a, b = patch[i][k], patch[i][k + 1]
                row = row + (3.0 * a + b, a + 3.0 * b)
            wide = wide + (row,)
        out = ()
        for i in tl.static_range(len(patch) - 1):
            above = ()
            below = ()
            for k in tl.static_range(len(wide[0])):
                a, b = wide[i][k], wide[i + 1][k]
                above = above + (3.0 * a + b,)
                below = below + (a + 3.0 * b,)
            out = out + (above, below)
    return out


@triton.jit
def up_row(row, HALO: tl.constexpr):
    """`up` along one row: m + 2 -> 2 m, 4 times too large; HALO more columns are left out."""
    out = ()
    for k in tl.static_range(HALO, len(row) - 1 - HALO):
        a, b = row[k], row[k + 1]
        out = out + (3.0 * a + b, a + 3.0 * b)
    inner = ()
    for k in tl.static_range(1, len(out) - 1):
        inner = inner + (out[k],)
    return inner


@triton.jit
def residual(row, far, near, SCALE: tl.constexpr, HALO: tl.constexpr):
    """row - SCALE (far + 3 near): the coarse rows around it, widened by `up_row`."""
    out = ()
    for k in tl.static_range(len(near)):
        out = out + (row[HALO + k] - SCALE * (far[k] + 3.0 * near[k]),)
    return out


@triton.jit
def up_adjoint(patch, FILTER: tl.constexpr):
    """nearest: 2m -> m. bilinear: 2m + 2 (a halo of 1) -> m, 16 times too large."""
    if FILTER == "nearest":
        out = pool(patch, 1.0)
    else:
        tall = ()
        for i in tl.static_range(len(patch) // 2 - 1):
            row = ()
            for k in tl.static_range(len(patch[0])):
                far = patch[2 * i][k] + patch[2 * i + 3][k]
                near = patch[2 * i + 1][k] + patch[2 * i + 2][k]
                row = row + (far + 3.0 * near,)
            tall = tall + (row,)
        out = ()
        for i in tl.static_range(len(tall)):
            row = ()
            for k in tl.static_range(len(patch[0]) // 2 - 1):
                far = tall[i][2 * k] + tall[i][2 * k + 3]
                near = tall[i][2 * k + 1] + tall[i][2 * k + 2]
                row = row + (far + 3.0 * near,)
            out = out + (row,)
    return out


@triton.jit
def haar(patch):
    """Patches LL, LH, HL, HH of half the size."""
    ll, lh, hl, hh = (), (), (), ()
    for i in tl.static_range(len(patch) // 2):
        rows = ((), (), (), ())
        for k in tl.static_range(len(patch[0]) // 2):
            a, b = patch[2 * i][2 * k], patch[2 * i][2 * k + 1]
            c, d = patch[2 * i + 1][2 * k], patch[2 * i + 1][2 * k + 1]
            rows = (
                rows[0] + (((a + b) + (c + d)) * 0.5,),
                rows[1] + (((a + b) - (c + d)) * 0.5,),
                rows[2] + (((a - b) + (c - d)) * 0.5,),
                rows[3] + (((a - b) - (c - d)) * 0.5,),
            )
        ll, lh, hl, hh = ll + (rows[0],), lh + (rows[1],), hl + (rows[2],), hh + (rows[3],)
    return ll, lh, hl, hh


@triton.jit
def haar_inverse(bands):
    """The patch of twice the size."""
    out = ()
    for i in tl.static_range(len(bands[0])):
        top = ()
        bottom = ()
        for k in tl.static_range(len(bands[0][0])):
            ll, lh, hl, hh = bands[0][i][k], bands[1][i][k], bands[2][i][k], bands[3][i][k]
            top = top + (((ll + lh) + (hl + hh)) * 0.5, ((ll + lh) - (hl + hh)) * 0.5)
            bottom = bottom + (((ll - lh) + (hl - hh)) * 0.5, ((ll - lh) - (hl - hh)) * 0.5)
        out = out + (top, bottom)
    return out
