"""Noise per element and per scale in Triton: see `dfm_fast.ops.noises` for what is computed.

Philox and Box-Muller are all that costs anything (`philox`); `noise_parts` says how lanes draw.

Whether normals start at a multiple of 4 is known on the host, or, where the offset lies in a
tensor, asked on the device: a program then takes one of two ways, and nothing is synchronised.

Instructions per normal in the sm_90 code of `dfm-fast check`, all of the kernel counted, contiguous
(`tl.randn4x` alone has 176; 700e9 normals a second need 47 or fewer on 132 SMs):

                               bfloat16    float32
    philox_normal                  23.8       30.7
    add_noise                      29.7       35.0
    pyramid_add_noise              31.0       36.3     beside the launch that makes the levels
    velocity_loss                  40.5       38.9     its sums are float32's

These are counts, not timings.
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
from torch import Tensor

from dfm_fast._library import INTERPRET
from dfm_fast.kernels import pyramids
from dfm_fast.kernels._aot import TARGETS, Specialisation
from dfm_fast.kernels.launching import cdiv, on_device
from dfm_fast.kernels.noise_parts import LOSS, NOISE, aligned_part
from dfm_fast.kernels.philox import stream
from dfm_fast.kernels.tiles import WARP, is_last
from dfm_fast.ops._layouts import empty_in, memory_format
from dfm_fast.ops._scales import accumulation

BLOCK = 1024 if INTERPRET else 128  # the interpreter's time is per operation
EACH = 16, 32  # elements a lane, of small levels and of large ones: keys are made once a lane
LEVELS = 4  # a launch
SCALED = 4  # vectors of a lane, where nothing is drawn

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
    aligned_part(
        x_ptr, None, out_ptr, v_ptr, at, t, None, None, n, block, SIZE, CG, ALIGNED, NOISE, HOW,
        ACC, EACH, VEC, LAST, BLOCK, WIDE,
    )  # fmt: skip


@triton.jit
def _pick(s, a, b, c, d):
    return tl.where(s == 0, a, tl.where(s == 1, b, tl.where(s == 2, c, d)))


@triton.jit
def _whose(end0, end1, end2, end3):
    """(sample, level, block of it) of this program: level s of a sample has programs from
    end(s - 1) on."""
    n, block = tl.program_id(0) // end3, tl.program_id(0) % end3
    s = (block >= end0).to(tl.int32) + (block >= end1).to(tl.int32) + (block >= end2).to(tl.int32)
    return n, s, block - _pick(s, 0, end0, end1, end2)


@triton.jit(do_not_specialize=("seed", "offset0", "offset1", "offset2", "offset3"))
def _levels_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, g0_ptr, g1_ptr, g2_ptr, g3_ptr,
    out0_ptr, out1_ptr, out2_ptr, out3_ptr, v0_ptr, v1_ptr, v2_ptr, v3_ptr, t_ptr, mask_ptr,
    state_ptr, seed: tl.int64, offset0: tl.int64, offset1: tl.int64, offset2: tl.int64,
    offset3: tl.int64, gain0: tl.float64, gain1: tl.float64, gain2: tl.float64, gain3: tl.float64,
    end0, end1, end2, end3, SIZE0, SIZE1, SIZE2, SIZE3, CG0, CG1, CG2, CG3, COLUMN, COLUMNS,
    GAINED: tl.constexpr, ALIGNED: tl.constexpr, DO: tl.constexpr, HOW: tl.constexpr,
    EACH: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Up to four levels x, as `_add_noise_kernel`.

    NOISE: x_t to out and v to v. LOSS: a sum of squares of g - v per program to out0, and these
    differences to v, if it is there. t and mask are [N, COLUMNS], from COLUMN.
    """
    ACC: tl.constexpr = tl.float64 if x0_ptr.dtype.element_ty == tl.float64 else tl.float32
    n, s, block = _whose(end0, end1, end2, end3)
    size, groups = _pick(s, SIZE0, SIZE1, SIZE2, SIZE3), _pick(s, CG0, CG1, CG2, CG3)
    x_ptr = _pick(s, x0_ptr, x1_ptr, x2_ptr, x3_ptr)
    g_ptr, out_ptr, v_ptr, t, gain, keep = None, None, None, None, None, None
    if g0_ptr is not None:
        g_ptr = _pick(s, g0_ptr, g1_ptr, g2_ptr, g3_ptr)
    if DO != LOSS:
        out_ptr = _pick(s, out0_ptr, out1_ptr, out2_ptr, out3_ptr)
        t = tl.load(t_ptr + n.to(tl.int64) * COLUMNS + COLUMN + s)
    if mask_ptr is not None:
        keep = tl.load(mask_ptr + n.to(tl.int64) * COLUMNS + COLUMN + s)
    if v0_ptr is not None:
        v_ptr = _pick(s, v0_ptr, v1_ptr, v2_ptr, v3_ptr)
    if GAINED:
        gain = _pick(s, gain0, gain1, gain2, gain3).to(ACC)
    at = stream(state_ptr, seed, _pick(s, offset0, offset1, offset2, offset3))
    acc = aligned_part(
        x_ptr, g_ptr, out_ptr, v_ptr, at, t, gain, keep, n, block, size, groups, ALIGNED, DO, HOW,
        ACC, EACH, VEC, LAST, BLOCK, WIDE,
    )  # fmt: skip
    if DO == LOSS:
        tl.store(out0_ptr + tl.program_id(0), tl.sum(acc))


@triton.jit
def _loss_kernel(
    sums_ptr, mask_ptr, loss_ptr, end0, end1, end2, end3, SIZE0, SIZE1, SIZE2, SIZE3, CG0, CG1,
    CG2, CG3, COLUMN, COLUMNS, levels, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of the programs of `_levels_kernel`, in a fixed order -> means [N, COLUMNS]; 0 where a
    level has none or is masked."""
    n, s = tl.program_id(0) // levels, tl.program_id(0) % levels
    size, groups = _pick(s, SIZE0, SIZE1, SIZE2, SIZE3), _pick(s, CG0, CG1, CG2, CG3)
    first, end = _pick(s, 0, end0, end1, end2), _pick(s, end0, end1, end2, end3)
    acc = tl.zeros([BLOCK], sums_ptr.dtype.element_ty)
    for start in range(first, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        acc += tl.load(sums_ptr + n.to(tl.int64) * end3 + offs, offs < end, 0)
    loss = tl.sum(acc) / tl.maximum(size.to(acc.dtype) * groups * VEC, 1)
    at = n.to(tl.int64) * COLUMNS + COLUMN + s
    if mask_ptr is not None:
        loss = tl.where(tl.load(mask_ptr + at), loss, 0)
    tl.store(loss_ptr + at, loss)


@triton.jit
def _loss_backward_kernel(
    r0_ptr, r1_ptr, r2_ptr, r3_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr, grad_ptr, mask_ptr,
    end0, end1, end2, end3, SIZE0, SIZE1, SIZE2, SIZE3, COLUMN, COLUMNS, EACH: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Differences r of up to four levels, [N, SIZE] in vectors, in programs as those of
    `_levels_kernel` -> 2 r grad[n, s] / (elements of a sample)."""
    n, s, block = _whose(end0, end1, end2, end3)
    size = _pick(s, SIZE0, SIZE1, SIZE2, SIZE3)
    r_ptr = _pick(s, r0_ptr, r1_ptr, r2_ptr, r3_ptr)
    out_ptr = _pick(s, out0_ptr, out1_ptr, out2_ptr, out3_ptr)
    at = n.to(tl.int64) * COLUMNS + COLUMN + s
    grad = tl.load(grad_ptr + at)
    grad = grad * (2.0 / (size.to(grad.dtype) * VEC))
    across, first = tl.arange(0, VEC)[None, :], block.to(tl.int64) * (BLOCK * EACH)
    left = tl.minimum(size - first, BLOCK * EACH).to(tl.int32)
    first = (n.to(tl.int64) * size + first) * VEC
    r_ptr += first
    out_ptr += first
    for k in tl.static_range(EACH):
        lane = k * BLOCK + tl.arange(0, BLOCK)
        offs, mask = lane[:, None] * VEC + across, (lane < left)[:, None]
        r = tl.load(r_ptr + offs, mask, 0).to(grad.dtype) * grad
        if mask_ptr is not None:
            r = tl.where(tl.load(mask_ptr + at), r, 0)
        tl.store(out_ptr + offs, r.to(out_ptr.dtype.element_ty), mask)


# --- Launching ------------------------------------------------------------------------------------


def _options(last: bool, nvidia: bool = not torch.version.hip) -> dict[str, int]:
    """ptxas spills for occupancy unless told what is enough. Of contraction: see `philox`."""
    if INTERPRET:
        return {}
    return {"enable_fp_fusion": False, **({"maxnreg": 128} if nvidia and not last else {})}


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
    each = EACH[sum(map(math.prod, shapes)) >= 1 << 22]
    each = 4 if last or itemsize == 8 else each  # float64's constants fill the scalar registers
    sizes = []
    for shape in shapes:
        size, groups = math.prod(shape[1:]) // vec, 1
        blocks = cdiv(size * vec, BLOCK * each)
        if last:
            size, groups = math.prod(shape[2:]), shape[1] // vec
            blocks = cdiv(cdiv(size, each) * groups, BLOCK)
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
            **_options(last),
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


Levels = Sequence[Tensor | None]  # None where a level is not wanted


def _chunks(tensors: Levels, count: int) -> Iterator[slice]:
    """Levels of one launch each: at most LEVELS, and of one dtype, as one way is compiled."""
    dtypes = {v.dtype for v in tensors if v is not None}
    step = LEVELS if len(dtypes) <= 1 else 1
    for start in range(0, count, step):
        if any(v is not None for v in tensors[start : start + step]):
            yield slice(start, start + step)


def _four(values: Sequence[Any]) -> list[Any]:
    """Filled up with the first that is there: what is not launched is not read either."""
    spare = next((v for v in values if v is not None), None)
    values = [spare if v is None else v for v in values]
    return values + [spare] * (LEVELS - len(values))


def _launch_levels(
    do: tl.constexpr,
    x: Levels,
    g: Levels,
    out: Levels,
    v: Levels,
    t: Tensor | None,
    mask: Tensor | None,
    state: Tensor | None,
    seed: int,
    offsets: Sequence[int],
    gains: Sequence[float],
    levels: slice,
    last: bool,
    loss: Tensor | None = None,
) -> None:
    part = [tuple(values[levels]) for values in (x, g, out, v)]
    some = next(v for v in part[0] if v is not None)
    acc, columns = accumulation(some), len(x)
    shapes = tuple((some.shape[0], 0, 0, 0) if v is None else v.shape for v in part[0])
    itemsize = max(v.element_size() for values in part[:3] for v in values if v is not None)
    ((*sizes,), constants) = _plan(shapes, last, itemsize)
    sizes += [(0, 0, 0)] * (LEVELS - len(sizes))
    ends = list(itertools.accumulate(s[0] for s in sizes))
    sizes = [*ends, *(s[1] for s in sizes), *(s[2] for s in sizes)]
    offsets = [*offsets[levels], *[0] * LEVELS][:LEVELS]
    aligned = _aligned(state, offsets, [s for s in shapes if math.prod(s)], last)
    gained = any(gain != 1 for gain in gains[levels])
    how = _how(acc if loss is not None else next(v for v in part[2] if v is not None).dtype, acc)
    programs = some.shape[0] * ends[-1]
    part = list(itertools.chain.from_iterable(map(_four, part)))
    if loss is not None:
        part[8] = sums = torch.empty(programs, dtype=acc, device=some.device)
    with on_device(some):
        _levels_kernel[(programs,)](
            *part, t, mask, state, seed, *offsets, *_four(gains[levels]), *sizes, levels.start,
            columns, gained, aligned, do.value, how, *constants, num_warps=BLOCK // WARP,
            **_options(last),
        )  # fmt: skip
        if loss is not None:
            count = len(shapes)
            _loss_kernel[(some.shape[0] * count,)](
                sums, mask, loss, *sizes, levels.start, columns, count, constants[1], BLOCK,
                num_warps=BLOCK // WARP,
            )  # fmt: skip


def _build(
    x: Tensor, wanted: Sequence[bool], filter: str, factor: Sequence[int]
) -> list[Tensor | None]:
    """The wanted levels of x, in its dtype."""
    if len(wanted) == 1:
        levels = [x]
    elif filter == "haar":
        levels = pyramids.haar_build(x, len(wanted))
    else:
        levels = pyramids.laplacian_build(x, len(wanted), filter, factor)
    return [v if w else None for v, w in zip(levels, wanted, strict=True)]


def _spread(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    given = iter(tensors)
    return [next(given) if w else None for w in wanted]


def pyramid_add_noise(
    x: Tensor,
    t: Tensor,
    mask: Tensor | None,
    wanted: Sequence[bool],
    state: Tensor | None,
    seed: int,
    offsets: Sequence[int],
    filter: str,
    factor: Sequence[int],
    gains: Sequence[float],
    targets: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Two launches: the pyramid, then the noise of all levels."""
    levels, count = _build(x, wanted, filter, factor), len(wanted)
    like, layout = x.new_empty(0, dtype=dtype), memory_format(x)
    shapes = [v.shape for v in levels if v is not None]
    outs = [empty_in(layout, like, s) for s in shapes * (1 + targets)]
    x_t = _spread(outs[: len(shapes)], wanted)
    v = _spread(outs[len(shapes) :], wanted) if targets else [None] * count
    t, mask = t.contiguous(), None if mask is None else mask.contiguous()
    for part in _chunks(levels, count) if x.numel() else ():
        stream = state, seed, offsets, gains
        _launch_levels(NOISE, levels, [None] * count, x_t, v, t, mask, *stream, part, is_last(x))
    return outs


def velocity_loss(
    predictions: Sequence[Tensor],
    x: Tensor,
    mask: Tensor | None,
    wanted: Sequence[bool],
    state: Tensor | None,
    seed: int,
    offsets: Sequence[int],
    filter: str,
    factor: Sequence[int],
    gains: Sequence[float],
    *,
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Three launches: the pyramid, sums of squares of each program, and their sums."""
    levels, count = _build(x, wanted, filter, factor), len(wanted)
    none, acc = [None] * count, accumulation(x)
    like = x.new_empty(0, dtype=acc)
    saved = [empty_in(memory_format(x), like, g.shape) for g in predictions] if save else []
    r = _spread(saved, wanted) if save else none
    mask = None if mask is None else mask.contiguous()
    g = _spread(predictions, wanted)
    chunks = list(_chunks(g, count)) if x.numel() else []
    # What is launched writes a column for each of its levels, wanted or not.
    all_written = sum(len(g[part]) for part in chunks) == count
    loss = (x.new_empty if all_written else x.new_zeros)((x.shape[0], count), dtype=acc)
    for part in chunks:
        stream = state, seed, offsets, gains
        _launch_levels(LOSS, levels, g, none, r, None, mask, *stream, part, is_last(x), loss)
    return loss, saved


def velocity_loss_backward(
    grad: Tensor,
    residuals: Sequence[Tensor],
    mask: Tensor | None,
    wanted: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """One launch for all levels."""
    like = grad.new_empty(0, dtype=dtype)
    grads = [empty_in(memory_format(r), like, r.shape) for r in residuals]
    count, n = len(wanted), len(grad)
    r, dg = _spread(residuals, wanted), _spread(grads, wanted)
    grad, mask = grad.contiguous(), None if mask is None else mask.contiguous()
    for part in _chunks(r, count) if any(g.numel() for g in grads) else ():
        elements = [0 if v is None else v[:1].numel() for v in r[part]]
        some = next(v for v in r[part] if v is not None)
        vec = math.gcd(16 // dtype.itemsize, *elements)
        sizes = [*(size // vec for size in elements), *[0] * LEVELS][:LEVELS]
        ends = list(itertools.accumulate(cdiv(size, BLOCK * SCALED) for size in sizes))
        with on_device(some):
            _loss_backward_kernel[(n * ends[-1],)](
                *_four(r[part]), *_four(dg[part]), grad, mask, *ends, *sizes, part.start, count,
                SCALED, vec, BLOCK, num_warps=BLOCK // WARP,
            )  # fmt: skip
    return grads


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
        yield from _of_levels(full, last, constants)
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


def _per_level(name: str, kind: str) -> dict[str, str]:
    return {name.replace("0", str(s)): kind for s in range(LEVELS)}


def _of_levels(full: torch.dtype, last: bool, common: dict[str, Any]) -> Iterator[Specialisation]:
    """The three operators on levels, seed on the host."""
    dtype, layout = next(k for k, v in _DTYPES.items() if v == full), "NHWC" if last else "NCHW"
    acc = torch.promote_types(full, torch.float32)
    wide = f"*fp{8 * acc.itemsize}"
    constants = {k: v for k, v in common.items() if k != "CG"}
    constants |= {"ALIGNED": True, "GAINED": False}
    integers = _per_level("end0", "i32") | _per_level("SIZE0", "i32") | _per_level("CG0", "i32")
    integers |= {"COLUMN": "i32", "COLUMNS": "i32"}
    given = integers | _per_level("offset0", "i64") | {"seed": "i64"}
    given |= _per_level("gain0", "fp64") | _per_level("x0_ptr", "*")
    g, out, v = (_per_level(name, "*") for name in ("g0_ptr", "out0_ptr", "v0_ptr"))
    for name, do, more in (
        ("pyramid_add_noise", NOISE, out | v | {"t_ptr": wide}),
        ("velocity_loss", LOSS, g | {"out0_ptr": wide}),
        ("velocity_loss training", LOSS, g | _per_level("v0_ptr", wide) | {"out0_ptr": wide}),
    ):
        how = _how(acc if do == LOSS else full, acc)
        fields = _levels_kernel, dtype, given | more, constants | {"DO": do.value}
        yield from _per_target(f"{name} {layout}", how, fields, load_bits=128)
    if not last:
        given = integers | {"sums_ptr": wide, "loss_ptr": wide, "mask_ptr": "*i1", "levels": "i32"}
        fields = {"VEC": constants["VEC"], "BLOCK": BLOCK}
        yield Specialisation("velocity_loss sums", _loss_kernel, dtype, given, fields)
        given = {k: v for k, v in integers.items() if not k.startswith("CG")}
        given |= _per_level("r0_ptr", wide) | out | {"grad_ptr": wide, "mask_ptr": "*i1"}
        fields = fields | {"EACH": SCALED}
        name = "velocity_loss_backward"
        yield Specialisation(name, _loss_backward_kernel, dtype, given, fields, load_bits=128)


def _per_target(name: str, how: int, fields: Any, **rest: Any) -> Iterator[Specialisation]:
    nvidia = tuple(t for t in TARGETS if t.startswith("sm_"))
    others = tuple(t for t in TARGETS if t not in nvidia)
    *fields, constants = fields
    normals = constants["EACH"] * (constants["VEC"] if constants["LAST"] else 1)
    for way, targets in ((how, nvidia), (0, others)):
        # Not PLAIN, and aligned: then all is unrolled.
        rest["normals"] = normals if way and constants["ALIGNED"] else 0
        rest["options"] = _options(constants["LAST"], targets == nvidia)
        yield Specialisation(name, *fields, constants | {"HOW": way}, targets=targets, **rest)
