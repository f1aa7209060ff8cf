"""Depthwise convolutions: see `dfm_fast.ops.convolutions` for what is computed.

A lane owns COLS columns of the output and, in channels_last, VEC channels of them; it walks down
ROWS rows with the K rows of input that a row of output sees in registers, and all K K weights. So
an input is loaded by COLS - 1 + K lanes at most, of which all but one find it in the first-level
cache, and norm and SiLU are applied (COLS - 1 + K) / COLS times.

It is bound by instructions: 9 of an element's are sums. So where the kernel is 3 wide, the size is
kept and lanes own 16 bytes of columns that end with the row (EVEN), only the first and the last
column are looked at for the edge; planes are loaded and stored in vectors of columns; in
channels_last the number of channels is a constant, and a column of a row no address of its own.
The same kernel makes the gradient of the input, with the weights turned around; of stride 2 it sees
dy spread out, with zeros between.

The gradient of the weights goes through the pixels of the input once, which are then normalised
once, with the K K pixels of dy that each one met. Every program leaves partial sums; a second
kernel adds them in order, in float64.
"""

# ruff: noqa: RUF005 (Triton's tuples do not unpack)

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_fast._library import INTERPRET
from dfm_fast.kernels._aot import TARGETS, Specialisation
from dfm_fast.kernels.functions import silu
from dfm_fast.kernels.group_norms import applied_norm
from dfm_fast.kernels.launching import cdiv, next_power_of_2, on_device, planned, registers
from dfm_fast.kernels.patches import join, split
from dfm_fast.kernels.products import ARCHITECTURES, architecture
from dfm_fast.ops._layouts import empty_in, memory_format
from dfm_fast.ops.convolutions import out_sizes

BLOCK = 1024 if INTERPRET else 128  # lanes; the interpreter's time is per operation
ROWS = 8  # that a lane walks down, or twice or half as many
AT_ONCE = (1024, 512)  # programs that an H200 has at work, by whether in channels_last: registers
COLS = 4  # of a lane where the kernel is 3 wide
VECTORS = {3: 8, 5: 8, 7: 4}  # bytes of channels of a lane: K K weights of each are in registers
# Of the gradient of the weights: lanes, channels of them at most (by whether in channels_last), and
# pixels that a lane sums one after the other. The interpreter's time is per operation, but it adds
# up pixels side by side one by one, too, and more of them would lose more than the budget.
LANES, SIDE, STEPS = (1024, (64, 64), 32) if INTERPRET else (128, (1, 16), 32)
ACROSS = 16 if INTERPRET else LANES  # pixels side by side, at most
SIDE_BY_SIDE = 64 if INTERPRET else 32  # vectors of channels of a program, in channels_last
MERGED = 256  # sums of a program of the second kernel

# --- Parts ----------------------------------------------------------------------------------------


@triton.jit
def norm_of(
    scale_ptr, offset_ptr, centre_ptr, plane, kept, NARROW: tl.constexpr
):  # fmt: skip
    """(scale, offset, centre) of channels, `plane` among [N, C]. NARROW: of maps of 16 bits, whose
    own rounding is far above that of a centre taken into the offset."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + plane, kept, 0)
        offset = tl.load(offset_ptr + plane, kept, 0)
        centre = tl.load(centre_ptr + plane, kept, 0)
        if NARROW:
            return (scale, offset - centre * scale)
        else:
            return (scale, offset, centre)
    else:
        return ()


@triton.jit
def _activate(x, inside, norm, NARROW: tl.constexpr, SURE: tl.constexpr):
    """u: 0 outside. SURE: inside, or `norm` makes it so."""
    if len(norm) == 0:
        return x
    else:
        if NARROW:
            z = x * norm[0] + norm[1]
        else:
            z = (x - norm[2]) * norm[0] + norm[1]
        u = silu(z, NARROW)
        return u if SURE else tl.where(inside, u, 0.0)


@triton.jit
def _inside(kept, h, w, H, W, j: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr):
    """Whether column w + j of N is of the map. EVEN: all but the first and the last column are."""
    inside = kept & (h >= 0) & (h < H)
    if not EVEN or j == 0:
        inside = inside & (w + j >= 0)
    if not EVEN or j == N - 1:
        inside = inside & (w + j < W)
    return inside


@triton.jit
def load_row(
    x_ptr, base, step, kept, h, w, H, W, N: tl.constexpr, SPREAD: tl.constexpr,
    EVEN: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Row h of the input, columns w to w + N - 1, as a tuple; 0 outside. VECTOR: all between the
    first and the last as one vector, w + 1 among a multiple of its length."""
    row = ()
    width = (W + 1) // 2 if SPREAD else W
    line = x_ptr + (base + (h * width + w) * step)
    for j in tl.static_range(N):
        inside = _inside(kept, h, w, H, W, j, N, EVEN)
        ptr = line + j * step
        if SPREAD:
            inside = inside & (h % 2 == 0) & ((w + j) % 2 == 0)
            ptr = x_ptr + (base + (h // 2 * width + (w + j) // 2) * step)
        if not VECTOR or j == 0 or j == N - 1:
            row = row + (tl.load(ptr, inside, 0),)
        elif j == 1:
            offs = tl.multiple_of(base + (h * width + w + 1), N - 2)[:, None]
            offs = offs + tl.arange(0, N - 2)[None, :]
            row = row + (tl.load(x_ptr + offs, inside[:, None], 0),)
    return row


@triton.jit
def activated(
    row, norm, kept, h, w, H, W, N: tl.constexpr, ACC: tl.constexpr, NARROW: tl.constexpr,
    EVEN: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """What `load_row` gave, normed where there is a norm."""
    if VECTOR:
        columns = (row[0].to(ACC),) + split(row[1].to(ACC), N - 2) + (row[2].to(ACC),)
    else:
        columns = ()
        for j in tl.static_range(N):
            columns = columns + (row[j].to(ACC),)
    found = ()
    if EVEN and NARROW and len(norm) > 0:  # of a row outside, x and offset are 0, and so is u
        norm = (norm[0], tl.where((h >= 0) & (h < H), norm[1], 0.0))
    for j in tl.static_range(N):
        inside = _inside(kept, h, w, H, W, j, N, EVEN)
        sure = EVEN and NARROW and j > 0 and j < N - 1
        found = found + (_activate(columns[j], inside, norm, NARROW, sure),)
    return found


@triton.jit
def taps(weights, rows, at: tl.constexpr, K: tl.constexpr, NC: tl.constexpr):
    """The K x K products and their sum, of rows of NC columns from element `at` on."""
    if K == 3:
        y = weights[0] * rows[at]
        for t in tl.static_range(1, K * K):
            y += weights[t] * rows[at + t // K * NC + t % K]
    else:  # sums of rows first: a chain of so many loses digits
        for a in tl.static_range(K):
            some = weights[a * K] * rows[at + a * NC]
            for b in tl.static_range(1, K):
                some += weights[a * K + b] * rows[at + a * NC + b]
            if a == 0:
                y = some
            else:
                y += some
    return y


# --- Forward, and the gradient of the input -------------------------------------------------------


@triton.jit
def _depthwise_kernel(
    x_ptr, y_ptr,  # [N, C, H, W] or [N, H, W, C]
    weight_ptr,  # [C, K, K]
    bias_ptr,  # [C] or None
    scale_ptr, offset_ptr, centre_ptr,  # [N, C] or None
    planes, CV, H, W, OH, OW, PH, PW,
    K: tl.constexpr, S: tl.constexpr, TURNED: tl.constexpr, SPREAD: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
    TC: tl.constexpr, TW: tl.constexpr, EVEN: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    NC: tl.constexpr = (COLS - 1) * S + K
    NARROW: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    VECTOR: tl.constexpr = EVEN and not LAST
    lane = tl.arange(0, TC * TW)
    pid = tl.program_id(0)
    channel_blocks = tl.cdiv(CV, TC) if LAST else tl.cdiv(planes, TC)
    col_blocks, bands = tl.cdiv(tl.cdiv(OW, COLS), TW), tl.cdiv(OH, ROWS)
    if LAST:
        lane = lane[:, None]
        group = pid % channel_blocks * TC + lane % TC
        col = (pid // channel_blocks % col_blocks * TW + lane // TC) * COLS
        first = pid // (channel_blocks * col_blocks) % bands * ROWS
        n = pid // (channel_blocks * col_blocks * bands)
        c = group * VEC + tl.arange(0, VEC)[None, :]
        step = STEP if EVEN else CV * VEC
        kept, plane = group < CV, n * step + c
        if WIDE:
            n = n.to(tl.int64)
        rows_in = (H + 1) // 2 * ((W + 1) // 2) if SPREAD else H * W
        base, out = n * rows_in * step + c, n * (OH * OW) * step + c
    else:
        col = (pid % col_blocks * TW + lane % TW) * COLS
        first = pid // col_blocks % bands * ROWS
        plane = pid // (col_blocks * bands) * TC + lane // TW
        kept, c, step = plane < planes, plane % CV, 1
        rows_in = (H + 1) // 2 * ((W + 1) // 2) if SPREAD else H * W
        place = plane.to(tl.int64) if WIDE else plane
        base, out = place * rows_in, place * (OH * OW)
    kept = kept & (col < OW)
    norm = norm_of(scale_ptr, offset_ptr, centre_ptr, plane, kept, NARROW)
    weights = ()
    for t in tl.static_range(K * K):
        tap = K * K - 1 - t if TURNED else t
        weights = weights + (tl.load(weight_ptr + c * (K * K) + tap, kept, 0).to(ACC),)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, kept, 0).to(ACC)
    h, w = first * S - PH, col * S - PW
    window = ()
    for i in tl.static_range(K - S):
        row = load_row(x_ptr, base, step, kept, h + i, w, H, W, NC, SPREAD, EVEN, VECTOR)
        window = window + activated(row, norm, kept, h + i, w, H, W, NC, ACC, NARROW, EVEN, VECTOR)
    h += K - S
    # Rows are asked for one round ahead of their use, where there are registers for that.
    AHEAD: tl.constexpr = tl.float32 == ACC
    PARTS: tl.constexpr = 3 if VECTOR else NC
    given = ()
    if AHEAD:
        for i in tl.static_range(S):
            given = given + load_row(
                x_ptr, base, step, kept, h + i, w, H, W, NC, SPREAD, EVEN, VECTOR
            )
    # Rows move up in the window by names, and by registers once in a while.
    UNROLLED: tl.constexpr = 4 if EVEN and ROWS >= 4 else 1
    for block in range(ROWS // UNROLLED):
        for k in tl.static_range(UNROLLED):
            r = block * UNROLLED + k
            asked, more = (), h + (S if AHEAD else 0)
            wanted = kept & (r < ROWS - AHEAD)
            for i in tl.static_range(S):
                asked = asked + load_row(
                    x_ptr, base, step, wanted, more + i, w, H, W, NC, SPREAD, EVEN, VECTOR
                )
            if AHEAD:
                now, given = given, asked
            else:
                now = asked
            rows = window
            for i in tl.static_range(S):
                one = ()
                for j in tl.static_range(PARTS):
                    one = one + (now[i * PARTS + j],)
                rows = rows + activated(
                    one, norm, kept, h + i, w, H, W, NC, ACC, NARROW, EVEN, VECTOR
                )
            found = ()
            for p in tl.static_range(COLS):
                y = taps(weights, rows, p * S, K, NC)
                if bias_ptr is not None:
                    y += bias
                found = found + (y.to(y_ptr.dtype.element_ty),)
            mask = kept & (first + r < OH)
            offs = out + ((first + r) * OW + col) * step
            if VECTOR:
                offs = tl.multiple_of(offs, COLS)[:, None] + tl.arange(0, COLS)[None, :]
                tl.store(y_ptr + offs, join(found, 0, 1, COLS), mask[:, None])
            else:
                line = y_ptr + offs
                for p in tl.static_range(COLS):
                    inside = mask if EVEN else mask & (col + p < OW)
                    tl.store(line + p * step, found[p], inside)
            window = ()
            for j in tl.static_range(S * NC, K * NC):
                window = window + (rows[j],)
            h += S


# --- Gradients of weight and bias -----------------------------------------------------------------


@triton.jit
def _products_kernel(
    dy_ptr, x_ptr,
    scale_ptr, offset_ptr, centre_ptr,  # [N, C] or None
    part_ptr,  # [N, parts, K K + 1, C]: sums of dy u of every tap, and of dy
    CV, H, W, OH, OW, PH, PW, DW, pixels, parts,
    K: tl.constexpr, S: tl.constexpr, LAST: tl.constexpr, STEPS: tl.constexpr,
    VEC: tl.constexpr, TC: tl.constexpr, TP: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Pixels are those of a map that holds both x and dy, DW wide."""
    NARROW: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    pid = tl.program_id(0)
    lane = tl.arange(0, TP)[:, None]
    part = pid // tl.cdiv(CV, TC) % parts
    n = pid // (tl.cdiv(CV, TC) * parts)
    C = CV * VEC
    c = pid % tl.cdiv(CV, TC) * (TC * VEC) + tl.arange(0, TC * VEC)[None, :]
    kept = c < C
    place = n.to(tl.int64) if WIDE else n
    if LAST:
        base, dbase, step = place * (H * W) * C + c, place * (OH * OW) * C + c, C
    else:
        base, dbase, step = (place * C + c) * (H * W), (place * C + c) * (OH * OW), 1
    norm = norm_of(scale_ptr, offset_ptr, centre_ptr, n * C + c, kept, NARROW)
    sums = ()
    for _ in tl.static_range(K * K + 1):
        sums = sums + (tl.zeros([TP, TC * VEC], ACC),)
    for k in range(STEPS):
        pixel = (part * STEPS + k) * TP + lane
        i, j = pixel // DW, pixel % DW
        valid = kept & (pixel < pixels)
        inside = valid & (i < H) & (j < W)
        d = tl.load(dy_ptr + dbase + (i * OW + j) * step, valid & (i < OH) & (j < OW), 0).to(ACC)
        own = sums[K * K] + d  # before the taps: after them ptxas spills
        u = tl.load(x_ptr + base + (i * W + j) * step, inside, 0).to(ACC)
        u = _activate(u, inside, norm, NARROW, False)
        new = ()
        for t in tl.static_range(K * K):
            a, b = i + PH - t // K, j + PW - t % K
            met = inside & (a >= 0) & (b >= 0) & (a < S * OH) & (b < S * OW)
            if S == 2:
                met = met & ((a | b) % 2 == 0)
            offs = dbase + (a // S * OW + b // S) * step
            new = new + (sums[t] + u * tl.load(dy_ptr + offs, met, 0).to(ACC),)
        sums = new + (own,)
    for t in tl.static_range(K * K + 1):
        offs = ((place * parts + part) * (K * K + 1) + t) * C + c
        tl.store(part_ptr + offs, tl.sum(sums[t], 0, keep_dims=True), kept)


@triton.jit
def _merge_products_kernel(
    part_ptr,  # [parts, K K + 1, C]
    dweight_ptr, dbias_ptr,  # [C, K K], [C]
    parts, C, KK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < (KK + 1) * C
    total = tl.zeros([BLOCK], tl.float64)
    for part in range(parts):
        offs = tl.cast(part, tl.int64) * ((KK + 1) * C) + i
        total += tl.load(part_ptr + offs, valid, 0).to(tl.float64)
    t, c = i // C, i % C
    kind = dweight_ptr.dtype.element_ty
    tl.store(dweight_ptr + c * KK + t, total.to(kind), valid & (t < KK))
    tl.store(dbias_ptr + c, total.to(kind), valid & (t == KK))


# --- Launching ------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """How lanes cover a map."""

    programs: int
    groups: int  # of VEC channels; all C where it is contiguous
    constants: dict[str, Any]


def _is_last(x: Tensor) -> bool:
    return memory_format(x) != torch.contiguous_format


def _vector(channels: int, last: bool, size: int, itemsize: int) -> int:
    return math.gcd(max(1, size // itemsize), channels) if last else 1


def _power(n: int, most: int) -> int:
    return min(next_power_of_2(max(n, 1)), most)


@planned
def plan(
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    last: bool,
    kernel: int,
    stride: int,
    itemsize: int,
) -> Tiles:
    """Of `_depthwise_kernel`: from `shape` to [N, C, *sizes]."""
    n, channels = shape[:2]
    size = VECTORS[kernel] // (stride if kernel > 3 else 1)
    cols, whole = COLS if kernel == 3 and stride == 1 else 1, 16 // itemsize
    even = kernel == 3 and stride == 1 and tuple(shape[2:]) == sizes and itemsize < 8
    even = even and sizes[1] % whole == 0
    if even:
        cols, size = whole, 2 * itemsize
    vec = _vector(channels, last, size, itemsize)
    groups, strips = channels // vec, cdiv(sizes[1], cols)
    if last:
        tc = _power(groups, SIDE_BY_SIDE)
        tw = _power(strips, BLOCK // tc)
        programs = n * cdiv(groups, tc) * cdiv(strips, tw)
    else:
        tw = _power(strips, BLOCK)
        tc = _power(n * channels, BLOCK // tw)
        programs = cdiv(n * channels, tc) * cdiv(strips, tw)
    rows = _power(sizes[0], _rows(programs * cdiv(sizes[0], ROWS), last, even))
    wide = max(math.prod(shape), n * channels * math.prod(sizes)) >= 2**31 - 2**16
    constants = {"LAST": last, "ROWS": rows, "COLS": cols, "VEC": vec, "TC": tc, "TW": tw}
    constants |= {"EVEN": even, "STEP": channels if last and even else 1, "WIDE": wide}
    return Tiles(programs * cdiv(sizes[0], rows), groups, constants)


def _rows(programs: int, last: bool, even: bool) -> int:
    """Of a walk, from the number of programs that walks of ROWS make: long ones, of which less is
    read and normed twice, where they fill a GPU as often as not, short ones where these do not."""
    at_once = AT_ONCE[last]
    if not even or at_once // 2 <= programs < 2 * at_once:
        return ROWS
    return 2 * ROWS if programs >= 2 * at_once else ROWS // 2


class Parts(NamedTuple):
    """How `_products_kernel` cuts up a map."""

    programs: int
    parts: int  # of a sample
    sizes: tuple[int, ...]  # CV, H, W, OH, OW
    domain: tuple[int, ...]  # its width, pixels, parts
    constants: dict[str, Any]


@planned
def plan_products(
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    last: bool,
    kernel: int,
    stride: int,
    itemsize: int,
) -> Parts:
    n, channels, height, width = shape
    vec = _vector(channels, last, VECTORS[kernel] // stride, itemsize)  # registers, again
    groups = channels // vec
    tc = _power(groups, SIDE[last])
    across, down = max(width, sizes[1]), max(height, sizes[0])
    tp = _power(across * down, min(LANES // tc, ACROSS))
    steps = _power(cdiv(across * down, tp), STEPS)
    parts = cdiv(across * down, tp * steps)
    wide = n * channels * across * down >= 2**31 - 2**16
    constants = {"LAST": last, "STEPS": steps, "VEC": vec, "TC": tc, "TP": tp, "WIDE": wide}
    programs = n * parts * cdiv(groups, tc)
    domain = across, across * down, parts
    return Parts(programs, parts, (groups, height, width, *sizes), domain, constants)


def _acc(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    stride: int,
    padding: tuple[int, int],
) -> Tensor:
    kernel = weight.shape[-1]
    sizes = out_sizes(x, kernel, stride, padding)
    y = empty_in(memory_format(x), x, (*x.shape[:2], *sizes))
    if not x.numel():
        return y
    tiles = plan(tuple(x.shape), sizes, _is_last(x), kernel, stride, x.element_size())
    with on_device(x):
        norm = applied_norm(x, mean, m2, norm_weight, norm_bias, shift, num_groups, eps)
        _depthwise_kernel[(tiles.programs,)](
            x, y, weight, bias, *norm,
            x.shape[0] * x.shape[1], tiles.groups, *x.shape[2:], *sizes, *padding,
            K=kernel, S=stride, TURNED=False, SPREAD=False, ACC=_acc(x), **tiles.constants,
            **_registers(architecture(x.device), tiles.constants),
        )  # fmt: skip
    return y


def _registers(arch: int, constants: dict[str, Any]) -> dict[str, int]:
    """Of `_depthwise_kernel`, which spills on Blackwell unless told what is enough."""
    return registers(128) if arch == 10 and constants.get("EVEN") and constants["LAST"] else {}


def _input_gradient(
    dy: Tensor, du: Tensor, weight: Tensor, stride: int, padding: tuple[int, int]
) -> None:
    kernel, sizes = weight.shape[-1], tuple(du.shape[2:])
    tiles = plan(tuple(dy.shape), sizes, _is_last(du), kernel, 1, dy.element_size())
    seen = (stride * (n - 1) + 1 for n in dy.shape[2:])  # spread out
    _depthwise_kernel[(tiles.programs,)](
        dy, du, weight, None, None, None, None,
        dy.shape[0] * dy.shape[1], tiles.groups, *seen, *sizes, *(kernel - 1 - p for p in padding),
        K=kernel, S=1, TURNED=True, SPREAD=stride == 2, ACC=_acc(dy), **tiles.constants,
        **_registers(architecture(dy.device), tiles.constants),
    )  # fmt: skip


def depthwise_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    m2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    stride: int,
    padding: tuple[int, int],
    *,
    need_du: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    kind = {"dtype": x.dtype if mean is None else wide, "device": x.device}
    layout = {"memory_format": memory_format(x)}
    du = torch.empty(x.shape, **kind, **layout) if need_du else torch.empty(0, **kind)
    shapes = (weight.shape, weight.shape[:1]) if need_dweight else (0, 0)
    dweight, dbias = (torch.zeros(s, dtype=wide, device=x.device) for s in shapes)
    if not x.numel():
        return du, dweight, dbias
    kernel, channels = weight.shape[-1], x.shape[1]
    with on_device(x):
        if need_du:
            _input_gradient(dy, du, weight, stride, padding)
        if need_dweight:
            norm = applied_norm(x, mean, m2, norm_weight, norm_bias, shift, num_groups, eps)
            sizes, itemsize = tuple(dy.shape[2:]), x.element_size()
            cut = plan_products(tuple(x.shape), sizes, _is_last(x), kernel, stride, itemsize)
            count, taps = x.shape[0] * cut.parts, kernel**2 + 1
            partials = dweight.new_empty((count, taps, channels))
            _products_kernel[(cut.programs,)](
                dy, x, *norm, partials, *cut.sizes, *padding, *cut.domain,
                K=kernel, S=stride, ACC=_acc(x), **cut.constants,
            )  # fmt: skip
            _merge_products_kernel[(cdiv(taps * channels, MERGED),)](
                partials, dweight, dbias, count, channels, KK=kernel**2, BLOCK=MERGED
            )
    return du, dweight, dbias


# --- Ahead of time --------------------------------------------------------------------------------


def specialisations() -> Iterator[Specialisation]:
    for dtype, last, norm in itertools.product(ITEMSIZES, (True, False), (False, True)):
        yield from _compiled(dtype, last, 3, 1, norm)
    # The same code but for its sizes.
    for kernel, stride in ((3, 2), (5, 1), (5, 2), (7, 1), (7, 2)):
        yield from _compiled("bf16", True, kernel, stride, kernel < 7)
        yield from _compiled("fp32", kernel > 3, kernel, stride, False)


ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def _compiled(
    dtype: str, last: bool, kernel: int, stride: int, norm: bool
) -> Iterator[Specialisation]:
    """Forward and gradients. The gradient of the input is forward's code where the stride is 1."""
    shape, sizes, itemsize = (2, 256, 64, 64), (64 // stride, 64 // stride), ITEMSIZES[dtype]
    name = f"{kernel}x{kernel}/{stride} {'NHWC' if last else 'NCHW'}{' norm' * norm}"
    given = last, kernel
    tiles = plan(shape, sizes, *given, stride, itemsize).constants
    cut = plan_products(shape, sizes, *given, stride, itemsize).constants
    same = {"S": stride, "TURNED": False, "SPREAD": False}
    ways = {"depthwise": (_depthwise_kernel, {**same, **tiles})}
    ways["depthwise weight gradient"] = _products_kernel, {"S": stride, **cut}
    if stride == 2:
        back = plan((*shape[:2], *sizes), shape[2:], *given, 1, itemsize).constants
        spread = {"S": 1, "TURNED": True, "SPREAD": True, **back}
        ways["depthwise input gradient"] = _depthwise_kernel, spread
    for what, (function, options) in ways.items():
        affine = norm and options.get("TURNED") is not True
        acc = tl.float64 if dtype == "fp64" else tl.float32
        constants = {"K": kernel, "ACC": acc, **options}
        arguments = _arguments(function, dtype, affine, constants)
        for target in TARGETS:
            limits = _registers(ARCHITECTURES[target], options)
            yield Specialisation(
                f"{what} {name}", function, dtype, arguments, constants, targets=(target,),
                load_bits=8 * itemsize * _width(options), options=limits,
            )  # fmt: skip


def _width(options: dict[str, Any]) -> int:
    return options["COLS"] if options.get("EVEN") and not options["LAST"] else options["VEC"]


def _arguments(
    function: triton.JITFunction, dtype: str, norm: bool, constants: dict[str, Any]
) -> dict[str, str | None]:
    small = "*fp64" if dtype == "fp64" else "*fp32"
    pointers = dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr", "weight_ptr"), "*")
    pointers |= {"bias_ptr": None, "part_ptr": small}
    pointers |= dict.fromkeys(("scale_ptr", "offset_ptr", "centre_ptr"), small if norm else None)
    return {
        a: pointers[a] if a.endswith("_ptr") else "i32"
        for a in function.arg_names
        if a not in constants
    }
