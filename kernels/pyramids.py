"""Laplacian and Haar pyramids in Triton: one launch for two halvings at any size.

A lane owns a patch of the finest level (see `patches`; `walks` where halos are wide) and computes
every coarser value it needs itself, so that x is read once from memory, every level is written once
and no lane waits for another. Launches of two halvings chain exactly, as a coarse level is rounded
before anything is predicted from it. What is not "nearest" or "bilinear" halving height and width
goes to `resample` (or, for "binomial" in CUDA builds, to csrc/cuda).

What decided it: instructions per element of the finest level, from the sm_90 code of
`dfm-fast check` (bfloat16, two halvings, contiguous; registers in brackets; never any shared memory
or spill; 16-byte loads and stores of the finest level):

    build     patches 8 x 8, weights 1/4 and 3/4                       25.0  (180)
              and bfloat16 widened in pairs, weights 1 and 3           21.4  (150)
              patches 8 x 16: fewer halos, too many registers          16.0  (244)
              walking down 8 columns                                   13.7  (96)
              and every other strip upwards                            13.9  (119)
    collapse  patches 8 x 8                                            11.9  (106)
    backward  of build: patches 8 x 8                                  12.2  (106)
              of collapse: patches 8 x 8, then walking                 16.1  (106), 10.1  (60)

Where that stands: 132 SMs issue about 30e12 instructions of a lane a second, and at 4.3e12 bytes a
second build and collapse of three levels (37/16 elements moved, 2 bytes each) come to 32 an
element: the walk leaves issue slots half empty, and float32 has twice the room. Walks of 64 rows
read an eighth of x twice. From memory that is at most 95 % of copy (measured: 82), so neighbours
walk towards each other and share those rows in L2. These are counts, not timings.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_fast.kernels import resample, walks
from dfm_fast.kernels._aot import Specialisation
from dfm_fast.kernels.patches import (
    combine,
    crop,
    haar,
    haar_inverse,
    lanes,
    load,
    mirror,
    pool,
    repeat,
    rounded,
    scaled,
    store,
    up,
    up_adjoint,
)
from dfm_fast.kernels.tiles import described, is_last, launch

# --- Kernels. Levels are [P, H, W, C]. STEPS halvings; factor 4 has two and no middle level ---


@triton.jit
def _laplacian_build_fwd_kernel(
    x_ptr, coarse_ptr, middle_ptr, fine_ptr, P, H, WP, CG, FILTER: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
    LAST: tl.constexpr, TC: tl.constexpr, TW: tl.constexpr, TH: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    EDGE: tl.constexpr = 1 if FILTER == "bilinear" else 0  # halo that `up` takes and leaves
    UP: tl.constexpr = 0.0625 if FILTER == "bilinear" else 1.0  # what makes it a mean
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    at = lanes(P, H, WP, CG, ROWS, TC, TW, TH, BLOCK, LAST, WIDE)
    size = (H, WP, CG * VEC if LAST else 1)
    x = load(x_ptr, at, size, 0, ROWS, COLS, EDGE << STEPS, VEC, LAST)
    coarse = pool(x, 0.25)
    if STEPS == 1:
        coarse = rounded(coarse, DTYPE)
        store(coarse_ptr, coarse, at, size, 1, EDGE, VEC, LAST)
        predicted, scale = up(coarse, FILTER), UP
    elif middle_ptr is not None:
        middle = rounded(coarse, DTYPE)
        coarse = rounded(pool(middle, 0.25), DTYPE)
        store(coarse_ptr, coarse, at, size, 2, EDGE, VEC, LAST)
        detail = combine(middle, up(coarse, FILTER), -UP, 2 * EDGE, EDGE)
        store(middle_ptr, detail, at, size, 1, 0, VEC, LAST)
        middle = crop(mirror(middle, at[2], WP, 2 * EDGE), EDGE)
        predicted, scale = up(middle, FILTER), UP
    else:
        coarse = rounded(pool(coarse, 0.25), DTYPE)
        store(coarse_ptr, coarse, at, size, 2, EDGE, VEC, LAST)
        predicted, scale = up(up(coarse, FILTER), FILTER), UP * UP
    detail = combine(x, predicted, -scale, EDGE << STEPS, EDGE)
    store(fine_ptr, detail, at, size, 0, 0, VEC, LAST)


@triton.jit
def _laplacian_collapse_fwd_kernel(
    coarse_ptr, middle_ptr, fine_ptr, out_ptr, P, H, WP, CG, FILTER: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
    LAST: tl.constexpr, TC: tl.constexpr, TW: tl.constexpr, TH: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    EDGE: tl.constexpr = 1 if FILTER == "bilinear" else 0
    UP: tl.constexpr = 0.0625 if FILTER == "bilinear" else 1.0
    at = lanes(P, H, WP, CG, ROWS, TC, TW, TH, BLOCK, LAST, WIDE)
    size = (H, WP, CG * VEC if LAST else 1)
    x = load(coarse_ptr, at, size, STEPS, ROWS >> STEPS, COLS >> STEPS, EDGE, VEC, LAST)
    x = up(x, FILTER)
    if STEPS == 2 and middle_ptr is not None:
        middle = load(middle_ptr, at, size, 1, ROWS // 2, COLS // 2, EDGE, VEC, LAST)
        x = up(rounded(combine(middle, x, UP, 0, 0), middle_ptr.dtype.element_ty), FILTER)
    fine = load(fine_ptr, at, size, 0, ROWS, COLS, 0, VEC, LAST)
    if STEPS == 2 and middle_ptr is None:
        out = combine(fine, up(x, FILTER), UP * UP, 0, EDGE)
    else:
        out = combine(fine, x, UP, 0, EDGE)
    store(out_ptr, out, at, size, 0, 0, VEC, LAST)


@triton.jit
def _laplacian_build_bwd_kernel(
    dfine_ptr, dmiddle_ptr, dcoarse_ptr, dx_ptr, P, H, WP, CG, FILTER: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
    LAST: tl.constexpr, TC: tl.constexpr, TW: tl.constexpr, TH: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    # No halo of a gradient is needed beyond its own level: down^T is repeat / 4.
    EDGE: tl.constexpr = 1 if FILTER == "bilinear" else 0
    UP: tl.constexpr = 0.0625 if FILTER == "bilinear" else 1.0
    FACTOR4: tl.constexpr = STEPS == 2 and dmiddle_ptr is None
    FAR: tl.constexpr = 4 * EDGE if FACTOR4 else EDGE
    at = lanes(P, H, WP, CG, ROWS, TC, TW, TH, BLOCK, LAST, WIDE)
    size = (H, WP, CG * VEC if LAST else 1)
    grad = load(dcoarse_ptr, at, size, STEPS, ROWS >> STEPS, COLS >> STEPS, 0, VEC, LAST)
    dfine = load(dfine_ptr, at, size, 0, ROWS, COLS, FAR, VEC, LAST)
    if dmiddle_ptr is not None:
        dmiddle = load(dmiddle_ptr, at, size, 1, ROWS // 2, COLS // 2, EDGE, VEC, LAST)
        grad = combine(grad, up_adjoint(dmiddle, FILTER), -UP, 0, 0)
        grad = combine(crop(dmiddle, EDGE), repeat(grad), 0.25, 0, 0)
    if FACTOR4:
        inner = crop(mirror(dfine, at[2], WP, FAR), EDGE)
        inner = up_adjoint(up_adjoint(inner, FILTER), FILTER)
        grad = repeat(combine(grad, inner, -UP * UP, 0, 0))
        dx = combine(dfine, repeat(grad), 0.0625, FAR, 0)
    else:
        grad = combine(grad, up_adjoint(dfine, FILTER), -UP, 0, 0)
        dx = combine(dfine, repeat(grad), 0.25, FAR, 0)
    store(dx_ptr, dx, at, size, 0, 0, VEC, LAST)


@triton.jit
def _laplacian_collapse_bwd_kernel(
    dy_ptr, dcoarse_ptr, dmiddle_ptr, P, H, WP, CG, FILTER: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
    LAST: tl.constexpr, TC: tl.constexpr, TW: tl.constexpr, TH: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    # Two bilinear halvings need three pixels around: `walks` has them.
    EDGE: tl.constexpr = 1 if FILTER == "bilinear" else 0
    UP: tl.constexpr = 0.0625 if FILTER == "bilinear" else 1.0
    at = lanes(P, H, WP, CG, ROWS, TC, TW, TH, BLOCK, LAST, WIDE)
    size = (H, WP, CG * VEC if LAST else 1)
    grad = load(dy_ptr, at, size, 0, ROWS, COLS, EDGE, VEC, LAST)
    grad = scaled(up_adjoint(grad, FILTER), UP)
    if STEPS == 2:
        if dmiddle_ptr is not None:
            store(dmiddle_ptr, grad, at, size, 1, 0, VEC, LAST)
        grad = up_adjoint(grad, FILTER)
    store(dcoarse_ptr, grad, at, size, STEPS, 0, VEC, LAST)


@triton.jit
def _band(at, size, channels, BAND: tl.constexpr, LAST: tl.constexpr):
    """Where sub-band LH, HL or HH of a plane lies in a detail level [N, 3C, H, W]."""
    if LAST:
        to, size = at, (size[0], size[1], 3 * channels)
    else:
        to, size = (at[0] + (at[0] // channels * 2 + BAND) * channels, at[1], at[2], at[3]), size
    return to, size


@triton.jit
def _haar_build_kernel(
    x_ptr, coarse_ptr, detail1_ptr, detail2_ptr, detail3_ptr, P, H, WP, CG, channels,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
    LAST: tl.constexpr, TC: tl.constexpr, TW: tl.constexpr, TH: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    at = lanes(P, H, WP, CG, ROWS, TC, TW, TH, BLOCK, LAST, WIDE)
    size = (H, WP, CG * VEC if LAST else 1)
    details = (detail1_ptr, detail2_ptr, detail3_ptr)
    x = load(x_ptr, at, size, 0, ROWS, COLS, 0, VEC, LAST)
    for s in tl.static_range(1, STEPS + 1):
        bands = haar(x)
        for b in tl.static_range(3):
            to, wide = _band(at, size, channels, b, LAST)
            ptr = details[s - 1] + (b * channels if LAST else 0)
            store(ptr, bands[b + 1], to, wide, s, 0, VEC, LAST)
        x = rounded(bands[0], x_ptr.dtype.element_ty)
    store(coarse_ptr, x, at, size, STEPS, 0, VEC, LAST)


@triton.jit
def _haar_collapse_kernel(
    coarse_ptr, detail1_ptr, detail2_ptr, detail3_ptr, out_ptr, P, H, WP, CG, channels,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
    LAST: tl.constexpr, TC: tl.constexpr, TW: tl.constexpr, TH: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    at = lanes(P, H, WP, CG, ROWS, TC, TW, TH, BLOCK, LAST, WIDE)
    size = (H, WP, CG * VEC if LAST else 1)
    details = (detail1_ptr, detail2_ptr, detail3_ptr)
    x = load(coarse_ptr, at, size, STEPS, ROWS >> STEPS, COLS >> STEPS, 0, VEC, LAST)
    for s in tl.static_range(STEPS, 0, -1):
        bands = (x,)
        for b in tl.static_range(3):
            to, wide = _band(at, size, channels, b, LAST)
            ptr = details[s - 1] + (b * channels if LAST else 0)
            band = load(ptr, to, wide, s, ROWS >> s, COLS >> s, 0, VEC, LAST)
            bands = bands + (band,)  # noqa: RUF005
        x = rounded(haar_inverse(bands), out_ptr.dtype.element_ty)
    store(out_ptr, x, at, size, 0, 0, VEC, LAST)


# --- Launching -----------------------------------------------------------------------------------


def _launches(
    inputs: Sequence[Tensor], num_levels: int, filter: str, factor: Sequence[int]
) -> list[tuple[int, int]] | None:
    """(halvings, levels) of each launch, finest first; None where the fused kernels do not apply.

    Factor 2 takes up to two levels a launch; factor 4 is two halvings and one level.
    """
    *frames, f, g = factor
    if filter not in ("nearest", "bilinear") or f != g or f == 1 or max(frames, default=1) > 1:
        return None
    if any(v.data_ptr() % 4 for v in inputs):  # bfloat16 is read in pairs
        return None
    levels = num_levels - 1
    if f == 4:
        return [(2, 1)] * levels
    return [(2, 2)] * (levels // 2) + [(1, 1)] * (levels % 2)


def _coarser(x: Tensor, steps: int) -> Tensor:
    """A new level `steps` halvings coarser than x."""
    *frames, height, width = x.shape[2:]
    return resample.empty(x, x.shape[1], (*frames, height >> steps, width >> steps))


@functools.cache
def _binomial() -> ModuleType | None:
    """The CUDA C++ kernels, which only CUDA builds have."""
    try:
        return importlib.import_module("dfm_fast._C_cuda")
    except ImportError:
        return None


def _takes_binomial(x: Tensor, num_levels: int, filter: str, factor: Sequence[int]) -> bool:
    if filter != "binomial" or not x.is_cuda or is_last(x) or num_levels > 16:
        return False
    fits = max(x.shape[-2:]) < 2**27
    return fits and tuple(factor) in ((2, 2), (1, 2, 2)) and _binomial() is not None


def _images(x: Tensor) -> Tensor:
    """A contiguous video as images: frames join the channels."""
    return x if x.ndim == 4 else x.flatten(1, 2)


def laplacian_build(
    x: Tensor,  # [N, C, (T,) H, W]
    num_levels: int,
    filter: str,
    factor: Sequence[int],
) -> list[Tensor]:
    if _takes_binomial(x, num_levels, filter, factor):
        levels = _binomial().binomial_build(_images(x), num_levels)
        return [v.view(*x.shape[:-2], *v.shape[-2:]) for v in levels]
    launches = _launches([x], num_levels, filter, factor)
    if launches is None:
        return resample.build(x, num_levels, filter, factor)
    kernel, name, options = _laplacian_build_fwd_kernel, "build", (filter,)
    if filter == "bilinear" and factor[-1] == 2:
        kernel, name, options = walks.build_kernel, "build_walk", ()
    details = []
    for steps, count in launches:
        levels = [_coarser(x, s) for s in range(count)]
        coarse, middle = _coarser(x, steps), levels[1] if count == 2 else None
        tensors = (x, coarse, middle, levels[0])
        launch(kernel, name, x.shape, is_last(x), tensors, *options, steps)
        details += levels
        x = coarse
    return [x, *reversed(details)]


def laplacian_collapse(levels: Sequence[Tensor], filter: str, factor: Sequence[int]) -> Tensor:
    finest = levels[-1]
    if _takes_binomial(finest, len(levels), filter, factor):
        return _binomial().binomial_collapse([_images(v) for v in levels]).view(finest.shape)
    launches = _launches(levels, len(levels), filter, factor)
    if launches is None:
        return resample.collapse(levels, filter, factor)
    x, s, last = levels[0], 1, is_last(finest)
    for steps, count in reversed(launches):
        fine, middle = levels[s + count - 1], levels[s] if count == 2 else None
        tensors = (x, middle, fine, resample.empty_like(fine))
        shape = fine.shape
        launch(_laplacian_collapse_fwd_kernel, "collapse", shape, last, tensors, filter, steps)
        x, s = tensors[-1], s + count
    return x


def laplacian_build_backward(grads: Sequence[Tensor], filter: str, factor: Sequence[int]) -> Tensor:
    """What one launch hands to the next stays in fp32, as in the reference."""
    finest = grads[-1]
    if _takes_binomial(finest, len(grads), filter, factor):
        return _binomial().binomial_build_backward([_images(g) for g in grads]).view(finest.shape)
    launches = _launches(grads, len(grads), filter, factor)
    if launches is None:
        return resample.build_backward(grads, filter, factor)
    grad, s, last = grads[0], 1, is_last(finest)
    wide = torch.promote_types(finest.dtype, torch.float32)
    for steps, count in reversed(launches):
        fine, middle = grads[s + count - 1], grads[s] if count == 2 else None
        dtype = finest.dtype if fine is finest else wide
        tensors = (fine, middle, grad, resample.empty_like(fine, dtype))
        shape = fine.shape
        launch(_laplacian_build_bwd_kernel, "build_backward", shape, last, tensors, filter, steps)
        grad, s = tensors[-1], s + count
    return grad


def laplacian_collapse_backward(
    grad: Tensor, num_levels: int, filter: str, factor: Sequence[int]
) -> list[Tensor]:
    """What one launch hands to the next is rounded."""
    if _takes_binomial(grad, num_levels, filter, factor):
        grads = _binomial().binomial_collapse_backward(_images(grad), num_levels)
        return [g.view(*grad.shape[:-2], *g.shape[-2:]) for g in grads]
    launches = _launches([grad], num_levels, filter, factor)
    if launches is None:
        return resample.collapse_backward(grad, num_levels, filter, factor)
    grads, last = [], is_last(grad)
    for steps, count in launches:
        coarse, middle = _coarser(grad, steps), _coarser(grad, 1) if count == 2 else None
        tensors = (grad, coarse, middle)
        kernel, name, options = _laplacian_collapse_bwd_kernel, "collapse_backward", (filter,)
        if filter == "bilinear" and steps == 2:
            kernel, name, options = walks.collapse_bwd_kernel, "collapse_backward_walk", ()
        launch(kernel, name, grad.shape, last, tensors, *options, steps)
        grads += [middle, coarse] if count == 2 else [coarse]
        grad = coarse
    return grads[::-1]


HAAR_STEPS = 3  # levels a launch


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy where a pair of bfloat16 would straddle words: views with an odd offset."""
    return x.clone() if x.data_ptr() % 4 else x


def haar_build(x: Tensor, num_levels: int) -> list[Tensor]:
    x, channels = _aligned(x), x.shape[1]
    details, last = [], is_last(x)
    for start in range(0, num_levels - 1, HAAR_STEPS):
        steps = min(HAAR_STEPS, num_levels - 1 - start)
        sizes = [(x.shape[2] >> s, x.shape[3] >> s) for s in range(1, steps + 1)]
        levels = [resample.empty(x, 3 * channels, size) for size in sizes]
        coarse, none = resample.empty(x, channels, sizes[-1]), [None] * (HAAR_STEPS - steps)
        tensors = (x, coarse, *levels, *none)
        launch(_haar_build_kernel, "haar", x.shape, last, tensors, channels, steps)
        details += levels
        x = coarse
    return [x, *reversed(details)]


def haar_collapse(levels: Sequence[Tensor]) -> Tensor:
    x, *details = map(_aligned, levels)
    channels, last = x.shape[1], is_last(levels[-1])
    while details:
        # The finest launch takes HAAR_STEPS levels, so that the odd ones out are small.
        steps = (len(details) - 1) % HAAR_STEPS + 1
        taken, details = details[:steps], details[steps:]
        height, width = taken[-1].shape[2:]
        out = resample.empty(levels[-1], channels, (2 * height, 2 * width))
        tensors = (x, *taken[::-1], *[None] * (HAAR_STEPS - steps), out)
        launch(_haar_collapse_kernel, "haar", out.shape, last, tensors, channels, steps)
        x = out
    return x


# --- For `dfm-fast check` -------------------------------------------------------------------------


def specialisations() -> Iterator[Specialisation]:
    """What large levels launch in every dtype and layout, mostly of two halvings."""
    walk, build = (walks.build_kernel, "build_walk"), (_laplacian_build_fwd_kernel, "build")
    collapse = (_laplacian_collapse_fwd_kernel, "collapse")
    build_backward = (_laplacian_build_bwd_kernel, "build_backward")
    collapse_backward = (walks.collapse_bwd_kernel, "collapse_backward_walk")
    two, one, both = {"STEPS": 2}, {"STEPS": 1}, {"STEPS": 2, "FILTER": "bilinear"}
    nearest = {"STEPS": 2, "FILTER": "nearest"}
    kinds = [  # (name, (kernel, tiles), constants, tensors left out)
        ("laplacian_build bilinear", walk, two, ()),
        ("laplacian_build bilinear 1", walk, one, ("middle_ptr",)),
        ("laplacian_build bilinear x4", build, both, ("middle_ptr",)),
        ("laplacian_build nearest", build, nearest, ()),
        ("laplacian_collapse bilinear", collapse, both, ()),
        ("laplacian_collapse nearest", collapse, nearest, ()),
        ("laplacian_build_backward bilinear", build_backward, both, ()),
        ("laplacian_collapse_backward bilinear", collapse_backward, two, ()),
        ("haar_build", (_haar_build_kernel, "haar"), two, ("detail3_ptr",)),
        ("haar_collapse", (_haar_collapse_kernel, "haar"), two, ("detail3_ptr",)),
    ]
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for dtype, last, kind in itertools.product(dtypes, (False, True), kinds):
        name, (kernel, tiles), constants, absent = kind
        fields = described(kernel, tiles, dtype, last, constants, absent=absent)
        yield Specialisation(f"{name} {'NHWC' if last else 'NCHW'}", **fields)
