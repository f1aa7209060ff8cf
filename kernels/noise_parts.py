"""Device code of `dfm_fast.kernels.noises`: one part of a level.

A lane draws four neighbouring normals of the logical, row-major order at once: in contiguous levels
16 bytes along a sample, in channels_last four pixels of 16 bytes of channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dfm_fast.kernels.patches import join
from dfm_fast.kernels.philox import PLAIN, four

NOISE, LOSS = tl.constexpr(0), tl.constexpr(1)  # what is done with normals


@triton.jit
def _element(
    x_ptr, g_ptr, out_ptr, v_ptr, offs, mask, eps, t, gain, keep, acc, DO: tl.constexpr
):  # fmt: skip
    """What is done with normals: returns acc, to which LOSS adds squares of what it puts in v."""
    if x_ptr is None:
        tl.store(out_ptr + offs, eps.to(out_ptr.dtype.element_ty), mask)
    else:
        x = tl.load(x_ptr + offs, mask, 0).to(eps.dtype)
        if gain is not None:
            x = x * gain
        if DO == LOSS:
            v = tl.load(g_ptr + offs, mask, 0).to(eps.dtype) - (eps - x)
            v = tl.where(mask, v, 0)
            acc = tl.fma(v, v, acc)
        else:
            x_t, v = tl.fma(t, eps, (1 - t) * x), eps - x
            if keep is not None:
                x_t = tl.where(keep, x_t, 0)
            tl.store(out_ptr + offs, x_t.to(out_ptr.dtype.element_ty), mask)
        if v_ptr is not None:
            if keep is not None:
                v = tl.where(keep, v, 0)
            tl.store(v_ptr + offs, v.to(v_ptr.dtype.element_ty), mask)
    return acc


@triton.jit
def _part(
    x_ptr, g_ptr, out_ptr, v_ptr, at, t, gain, keep, n, block, SIZE, CG, ALIGNED: tl.constexpr,
    DO: tl.constexpr, HOW: tl.constexpr, ACC: tl.constexpr, EACH: tl.constexpr, VEC: tl.constexpr,
    LAST: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Part `block` of sample n. [BLOCK, VEC] sums of squares for LOSS."""
    acc = tl.zeros([BLOCK, VEC], ACC)
    lane = tl.arange(0, BLOCK)
    across = tl.arange(0, VEC)[None, :]
    if LAST:  # SIZE pixels of CG VEC channels; a lane has EACH = 4 pixels of VEC channels
        start = n.to(tl.int64) * SIZE * (CG * VEC)
        lane += block * BLOCK
        if WIDE:
            lane = lane.to(tl.int64)
        pixel, channel = lane // CG * EACH, lane % CG * VEC
        z = ()
        for c in tl.static_range(VEC):
            first = (channel + c) * SIZE + pixel
            z = z + four(at, start, first, ALIGNED, ACC, HOW)
        for k in tl.static_range(EACH):
            offs = ((pixel + k) * (CG * VEC) + channel)[:, None] + across
            acc = _element(
                _at(x_ptr, start), _at(g_ptr, start), _at(out_ptr, start), _at(v_ptr, start),
                offs, (pixel + k < SIZE)[:, None], join(z, k, EACH, VEC), t, gain, keep, acc, DO,
            )  # fmt: skip
    else:  # SIZE vectors of VEC; a lane has EACH elements
        start = block.to(tl.int64) * (BLOCK * EACH)
        size = tl.cast(SIZE, tl.int64) * VEC  # a SIZE of 1 is a constant, without `to`
        left = tl.minimum(size - start, BLOCK * EACH).to(tl.int32)
        start += n.to(tl.int64) * SIZE * VEC
        GROUP: tl.constexpr = VEC if VEC > 4 else 4
        if ALIGNED and HOW != PLAIN:
            for j in tl.static_range(EACH // GROUP):
                acc = _vectors(
                    _at(x_ptr, start), _at(g_ptr, start), _at(out_ptr, start), _at(v_ptr, start),
                    at, t, gain, keep, start, left, (j * BLOCK + lane) * GROUP, acc, ALIGNED, DO,
                    HOW, ACC, GROUP, VEC,
                )  # fmt: skip
        else:  # unrolled it would take many registers, from the fast way too
            for j in range(EACH // GROUP):
                acc = _vectors(
                    _at(x_ptr, start), _at(g_ptr, start), _at(out_ptr, start), _at(v_ptr, start),
                    at, t, gain, keep, start, left, (j * BLOCK + lane) * GROUP, acc, ALIGNED, DO,
                    HOW, ACC, GROUP, VEC,
                )  # fmt: skip
    return acc


@triton.jit
def _vectors(
    x_ptr, g_ptr, out_ptr, v_ptr, at, t, gain, keep, start, left, first, acc,
    ALIGNED: tl.constexpr, DO: tl.constexpr, HOW: tl.constexpr, ACC: tl.constexpr,
    GROUP: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """GROUP elements from `first` on, a multiple of 4 or 8, of each lane."""
    z = four(at, start, first, ALIGNED, ACC, HOW)
    if GROUP == 8:
        z = z + four(at, start, first + 4, ALIGNED, ACC, HOW)
    for k in tl.static_range(0, GROUP, VEC):
        offs, mask = (first + k)[:, None] + tl.arange(0, VEC)[None, :], (first + k < left)[:, None]
        eps = join(z, k, 1, VEC)
        acc = _element(x_ptr, g_ptr, out_ptr, v_ptr, offs, mask, eps, t, gain, keep, acc, DO)
    return acc


@triton.jit
def _at(ptr, offset):
    at = None  # Triton 3.6 takes no None from `... if ... else ...`
    if ptr is not None:
        at = ptr + offset
    return at


@triton.jit
def aligned_part(
    x_ptr, g_ptr, out_ptr, v_ptr, at, t, gain, keep, n, block, SIZE, CG, ALIGNED: tl.constexpr,
    DO: tl.constexpr, HOW: tl.constexpr, ACC: tl.constexpr, EACH: tl.constexpr, VEC: tl.constexpr,
    LAST: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`_part` the fast way where that is right; ALIGNED None: as the offset on the device says."""
    if ALIGNED is not None:
        acc = _part(
            x_ptr, g_ptr, out_ptr, v_ptr, at, t, gain, keep, n, block, SIZE, CG, ALIGNED,
            DO, HOW, ACC, EACH, VEC, LAST, BLOCK, WIDE,
        )  # fmt: skip
    elif at[2] == 0:
        acc = _part(
            x_ptr, g_ptr, out_ptr, v_ptr, at, t, gain, keep, n, block, SIZE, CG, True,
            DO, HOW, ACC, EACH, VEC, LAST, BLOCK, WIDE,
        )  # fmt: skip
    else:
        acc = _part(
            x_ptr, g_ptr, out_ptr, v_ptr, at, t, gain, keep, n, block, SIZE, CG, False,
            DO, HOW, ACC, EACH, VEC, LAST, BLOCK, WIDE,
        )  # fmt: skip
    return acc
