"""Noise per element and per scale in Triton: see `dfm_fast.ops.noises` for what is computed.

Philox and Box-Muller are all that costs anything (`philox`), so a lane draws four neighbouring
normals of the logical, row-major order at once: in contiguous levels 16 bytes along a sample, in
channels_last four pixels of 16 bytes of channels.

Whether normals start at a multiple of 4 is known on the host, or, where the offset lies in a
tensor, asked on the device: a program then takes one of two ways, and nothing is synchronised.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from dfm_fast.kernels._aot import TARGETS, Specialisation
from dfm_fast.kernels.patches import join
from dfm_fast.kernels.philox import PLAIN, four, stream
from dfm_fast.kernels.resample import on_device
from dfm_fast.kernels.tiles import WARP, is_last
from torch import Tensor

from dfm_fast._library import INTERPRET
from dfm_fast.ops._layouts import empty_in, memory_format
from dfm_fast.ops._scales import accumulation

BLOCK = 1024 if INTERPRET else 128  # the interpreter's time is per operation
EACH = 16, 32  # elements a lane, of small levels and of large ones: keys are made once a lane
LEVELS = 4  # a launch
NOISE, LOSS, LOSS_BACKWARD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# --- One part of a level --------------------------------------------------------------------------


@triton.jit
def _element(
    x_ptr, g_ptr, out_ptr, v_ptr, offs, mask, eps, t, gain, keep, acc, DO: tl.constexpr
):  # fmt: skip
    """What is done with normals: returns acc, to which LOSS adds squares."""
    if x_ptr is None:
        tl.store(out_ptr + offs, eps.to(out_ptr.dtype.element_ty), mask)
    else:
        x = tl.load(x_ptr + offs, mask, 0).to(eps.dtype)
        if gain is not None:
            x = x * gain
        if DO == NOISE:
            x_t, v = (1 - t) * x + t * eps, eps - x
        else:
            x_t = tl.load(g_ptr + offs, mask, 0).to(eps.dtype) - (eps - x)  # the residual
        if DO == LOSS:
            acc += tl.where(mask, x_t * x_t, 0)
        else:
            if DO == LOSS_BACKWARD:
                x_t = x_t * t
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
        left = tl.minimum(SIZE.to(tl.int64) * VEC - start, BLOCK * EACH).to(tl.int32)
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
    return None if ptr is None else ptr + offset


@triton.jit
def _aligned_part(
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


# --- Kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("seed", "offset"))
def _add_noise_kernel(
    x_ptr, t_ptr, out_ptr, v_ptr, state_ptr, seed: tl.int64, offset: tl.int64, blocks, SIZE, CG,
    ALIGNED: tl.constexpr, HOW: tl.constexpr, EACH: tl.constexpr, VEC: tl.constexpr,
    LAST: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x [N, SIZE] in vectors (or [N, SIZE, CG] of pixels), t [N] -> x_t, v; without x the normals
    themselves."""
    ACC: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    at = stream(state_ptr, seed, offset)
    n, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    t = None
    if t_ptr is not None:
        t = tl.load(t_ptr + n)
    _aligned_part(
        x_ptr, None, out_ptr, v_ptr, at, t, None, None, n, block, SIZE, CG, ALIGNED, NOISE, HOW,
        ACC, EACH, VEC, LAST, BLOCK, WIDE,
    )  # fmt: skip


# --- Launching ------------------------------------------------------------------------------------


def _how(dtype: torch.dtype, acc: torch.dtype) -> int:
    """PLAIN, EXACT or FAST, for results of a dtype."""
    if INTERPRET or torch.version.hip or acc == torch.float64:
        return 0
    return 2 if dtype.itemsize == 2 else 1


def _aligned(
    state: Tensor | None, offsets: Sequence[int], shapes: Sequence[Sequence[int]], last: bool
) -> bool | None:
    """Whether all lanes draw whole counters; None where the device must say."""
    runs = [math.prod(s[2:]) if last else math.prod(s[1:]) for s in shapes]
    if any(r % 4 and (last or s[0] > 1) for r, s in zip(runs, shapes, strict=True)):
        return False
    if any(offset % 4 for offset in offsets):
        return False
    return True if state is None else None


@functools.lru_cache(maxsize=1024)
def _plan(
    shapes: tuple[torch.Size, ...], last: bool, itemsize: int
) -> tuple[tuple[tuple[int, int, int], ...], tuple[Any, ...]]:
    """((blocks a sample, SIZE, CG) of each level, (EACH, VEC, LAST, BLOCK, WIDE))."""
    runs = [s[1] if last else math.prod(s[1:]) for s in shapes if math.prod(s)]
    vec = math.gcd(16 // itemsize, *runs)
    each = 4 if last else EACH[sum(map(math.prod, shapes)) >= 1 << 22]
    sizes = []
    for shape in shapes:
        size, groups = math.prod(shape[1:]) // vec, 1
        blocks = triton.cdiv(size * vec, BLOCK * each)
        if last:
            size, groups = math.prod(shape[2:]), shape[1] // vec
            blocks = triton.cdiv(triton.cdiv(size, each) * groups, BLOCK)
        sizes.append((blocks, size, groups))
    wide = any(math.prod(s[1:]) + 4 * BLOCK * vec >= 2**31 for s in shapes)
    return tuple(sizes), (each, vec, last, BLOCK, wide)


def _add_noise(
    x: Tensor | None,
    t: Tensor | None,
    outs: Sequence[Tensor | None],
    state: Tensor | None,
    seed: int,
    offset: int,
) -> None:
    out = outs[0]
    if not out.numel():
        return
    last, acc = is_last(out), accumulation(out)
    ((blocks, size, groups),), constants = _plan((out.shape,), last, out.element_size())
    aligned = _aligned(state, (offset,), (out.shape,), last)
    with on_device(out):
        _add_noise_kernel[(out.shape[0] * blocks,)](
            x, t, *outs, state, seed, offset, blocks, size, groups, aligned,
            _how(out.dtype, acc), *constants, num_warps=BLOCK // WARP,
        )  # fmt: skip


def philox_normal(like: Tensor, state: Tensor | None, seed: int, offset: int) -> Tensor:
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    _add_noise(None, None, (out.view(1, -1), None), state, seed, offset)
    return out


def add_noise(
    x: Tensor, t: Tensor, state: Tensor | None, seed: int, offset: int
) -> tuple[Tensor, Tensor]:
    outs = tuple(empty_in(memory_format(x), x, x.shape) for _ in range(2))
    _add_noise(x, t, outs, state, seed, offset)
    return outs


# --- For `dfm-fast check` -------------------------------------------------------------------------

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DTYPES |= {"fp64": torch.float64}


def specialisations() -> Iterator[Specialisation]:
    """What large tensors launch, with the seed known on the host and on the device."""
    names = ("EACH", "VEC", "LAST", "BLOCK", "WIDE")
    for (dtype, full), last in itertools.product(_DTYPES.items(), (False, True)):
        _, values = _plan((torch.Size((8, 16, 1024, 1024)),), last, full.itemsize)
        constants = {**dict(zip(names, values, strict=True)), **({} if last else {"CG": 1})}
        integers = dict.fromkeys(("blocks", "SIZE", *(["CG"] if last else [])), "i32")
        stream = {"seed": "i64", "offset": "i64"}
        acc = torch.promote_types(full, torch.float32)
        tensors = {"out_ptr": "*"}, {"x_ptr": "*", "t_ptr": f"*fp{8 * acc.itemsize}", "v_ptr": "*"}
        layout, how = "NHWC" if last else "NCHW", _how(full, acc)
        for aligned in (True, None)[: 1 if last or full is torch.float64 else 2]:
            ask = "" if aligned else " device seed"
            state = {} if aligned else {"state_ptr": "*i64"}
            given = tensors[0] | state | stream | integers
            if not last:
                fields = _add_noise_kernel, dtype, given, constants | {"ALIGNED": aligned}
                yield from _per_target(f"philox_normal{ask}", how, fields)
            given, name = given | tensors[1], f"add_noise {layout}{ask}"
            fields = _add_noise_kernel, dtype, given, constants | {"ALIGNED": aligned}
            yield from _per_target(name, how, fields, load_bits=128)


def _per_target(name: str, how: int, fields: Any, **rest: Any) -> Iterator[Specialisation]:
    nvidia = tuple(t for t in TARGETS if t.startswith("sm_"))
    *fields, constants = fields
    others = tuple(t for t in TARGETS if t not in nvidia)
    for way, targets in ((how, nvidia), (0, others)):
        yield Specialisation(name, *fields, constants | {"HOW": way}, targets=targets, **rest)
