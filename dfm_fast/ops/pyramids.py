r"""Laplacian and Haar pyramids.

One level of a Laplacian pyramid, on an image or video x [N, C, (T,) H, W]:

    coarse = down(x)            detail = x - up(coarse)            x = detail + up(coarse)

An L-level pyramid is the two-level one applied to its own coarse level again and again: levels come
out coarse to fine, (coarse, detail_2, ..., detail_L). Every coarse level is rounded to the tensor's
dtype *before* the next finer one is predicted from it, so collapse(build(x)) differs from x by at
most one rounding per level, in every dtype (Burt & Adelson 1983; DFM, arXiv 2506.19839, eq. 3).

`down` and `up` are separable, one sparse matrix per axis (n to n/2 and back):

    nearest    down: mean of 2               up: repeat
    bilinear   down: mean of 2               up: [1/4, 3/4] and [3/4, 1/4], edge clamped
    binomial   down: [1 4 6 4 1]/16          up: (1 6 1)/8 and (4 4)/8: OpenCV's pyrDown and pyrUp
    dct        down: low half of an 8-point DCT, inverted at 4 points      up: zero-padded back to 8

Factor 4 is two such steps, the middle one neither rounded nor emitted. Nothing is saved for
backward: the operators are linear, and the adjoints are gathers over the transposed matrices:

    build:     g_1 = dL_1;  per level  c = g - up^T(dL);  g = dL + down^T(c);  dx = g
    collapse:  dL_L = dy;   dL_{s-1} = up^T(dL_s)

Sums are in float32 (float64 for float64). Bytes moved at least, N elements of x, b bytes each, at
factor 2 in 2-D: build, its backward and collapse N b (1 + 1 + 1/4 + ... + 1/4^(L-1)); collapse's
backward N b less, as the finest level's gradient is that of x.

`haar_build` is the orthonormal Haar wavelet transform, critically sampled, with sub-bands LH (low
along W, high along H), HL, HH as 3C channels; each is its own inverse's adjoint.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfm_fast import _checks
from dfm_fast._library import define, differentiable, operator
from dfm_fast.ops._filters import FILTERS, Taps, axis_taps, halve, halvings
from dfm_fast.ops._layouts import dense, empty_in, lay_out, memory_format

_ops = torch.ops.dfm_fast

# --- References ----------------------------------------------------------------------------------


def _resample(x: Tensor, axis: int, taps: Taps) -> Tensor:
    """Apply a matrix along one spatial axis. x [N, C, ...]."""
    shape = [1] * x.ndim
    shape[axis + 2] = -1
    index, weight = taps.index.to(x.device), taps.weight.to(x.device, x.dtype)
    terms = (
        x.index_select(axis + 2, index[:, k]) * weight[:, k].view(shape)
        for k in range(index.shape[1])
    )
    return sum(terms, start=next(terms))


def _down(x: Tensor, filter: str, factor: Sequence[int]) -> Tensor:
    for axes in halvings(factor):
        for axis in axes:
            x = _resample(x, axis, axis_taps(filter, "down", x.shape[axis + 2]))
    return x


def _sizes(
    sizes: Sequence[int], factor: Sequence[int]
) -> Iterator[tuple[Sequence[int], tuple[int, ...]]]:
    """(fine sizes, axes) of the 2x steps within one level, finest first."""
    for axes in halvings(factor):
        yield sizes, axes
        sizes = halve(sizes, axes)


def _up(x: Tensor, sizes: Sequence[int], filter: str, factor: Sequence[int]) -> Tensor:
    for fine, axes in reversed(list(_sizes(sizes, factor))):
        for axis in axes:
            x = _resample(x, axis, axis_taps(filter, "up", fine[axis]))
    return x


def _up_adjoint(x: Tensor, filter: str, factor: Sequence[int]) -> Tensor:
    for axes in halvings(factor):
        for axis in axes:
            x = _resample(x, axis, axis_taps(filter, "up_adjoint", x.shape[axis + 2]))
    return x


def _down_adjoint(x: Tensor, sizes: Sequence[int], filter: str, factor: Sequence[int]) -> Tensor:
    for fine, axes in reversed(list(_sizes(sizes, factor))):
        for axis in axes:
            x = _resample(x, axis, axis_taps(filter, "down_adjoint", fine[axis]))
    return x


def _accumulate(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def laplacian_build_ref(
    x: Tensor, num_levels: int, filter: str, factor: Sequence[int]
) -> list[Tensor]:
    """x [N, C, (T,) H, W] -> levels, coarse to fine; defines `laplacian_build`."""
    details, layout = [], memory_format(x)
    for _ in range(num_levels - 1):
        fine = _accumulate(x)
        coarse = _down(fine, filter, factor).to(x.dtype)
        details.append(fine - _up(_accumulate(coarse), x.shape[2:], filter, factor))
        details[-1] = lay_out(details[-1].to(x.dtype), layout)
        x = coarse
    return [lay_out(x, layout), *reversed(details)]


def laplacian_collapse_ref(levels: Sequence[Tensor], filter: str, factor: Sequence[int]) -> Tensor:
    """levels, coarse to fine -> x [N, C, (T,) H, W]; defines `laplacian_collapse`."""
    x, layout = levels[0], memory_format(levels[-1])
    for detail in levels[1:]:
        up = _up(_accumulate(x), detail.shape[2:], filter, factor)
        x = (_accumulate(detail) + up).to(detail.dtype)
    return lay_out(x, layout)


def laplacian_build_backward_ref(
    grads: Sequence[Tensor], filter: str, factor: Sequence[int]
) -> Tensor:
    """Gradients of the levels, coarse to fine -> gradient of x; in fp32, rounded once."""
    grad = _accumulate(grads[0])
    for level in map(_accumulate, grads[1:]):
        coarse = grad - _up_adjoint(level, filter, factor)
        grad = level + _down_adjoint(coarse, level.shape[2:], filter, factor)
    return lay_out(grad.to(grads[-1].dtype), memory_format(grads[-1]))


def laplacian_collapse_backward_ref(
    grad: Tensor, num_levels: int, filter: str, factor: Sequence[int]
) -> list[Tensor]:
    """Gradient of x -> gradients of all levels but the finest (its gradient is `grad`)."""
    level, grads, layout = _accumulate(grad), [], memory_format(grad)
    for _ in range(num_levels - 1):
        level = _up_adjoint(level, filter, factor)
        grads.append(lay_out(level.to(grad.dtype), layout))
    return grads[::-1]


def haar_build_ref(x: Tensor, num_levels: int) -> list[Tensor]:
    """x [N, C, H, W] -> [N, C, h, w], then [N, 3C, h, w] per level, coarse to fine."""
    details, layout = [], memory_format(x)
    for _ in range(num_levels - 1):
        fine = _accumulate(x)
        top, bottom = fine[:, :, 0::2], fine[:, :, 1::2]
        a, b, c, d = top[..., 0::2], top[..., 1::2], bottom[..., 0::2], bottom[..., 1::2]
        bands = (a + b) - (c + d), (a - b) + (c - d), (a - b) - (c - d)
        details.append(lay_out((torch.cat(bands, 1) / 2).to(x.dtype), layout))
        x = (((a + b) + (c + d)) / 2).to(x.dtype)
    return [lay_out(x, layout), *reversed(details)]


def haar_collapse_ref(levels: Sequence[Tensor]) -> Tensor:
    """Inverse of `haar_build_ref`."""
    x, layout = levels[0], memory_format(levels[-1])
    for detail in levels[1:]:
        ll, (lh, hl, hh) = _accumulate(x), _accumulate(detail).chunk(3, 1)
        top = torch.stack(((ll + lh) + (hl + hh), (ll + lh) - (hl + hh)), -1)
        bottom = torch.stack(((ll - lh) + (hl - hh), (ll - lh) - (hl - hh)), -1)
        x = torch.stack((top.flatten(-2), bottom.flatten(-2)), -2).flatten(-3, -2)
        x = (x / 2).to(detail.dtype)
    return lay_out(x, layout)


# --- Shapes, layouts, registration ----------------------------------------------------------------


def level_sizes(
    sizes: Sequence[int], num_levels: int, factor: Sequence[int]
) -> list[tuple[int, ...]]:
    """Spatial sizes of the levels, coarse to fine, for a finest level of `sizes`."""
    levels = [tuple(sizes)]
    for _ in range(num_levels - 1):
        sizes = functools.reduce(halve, halvings(factor), sizes)
        levels.append(tuple(sizes))
    return levels[::-1]


def _empty(x: Tensor, channels: int, sizes: Sequence[int]) -> Tensor:
    """An output for x: its batch, dtype, device and layout."""
    return empty_in(memory_format(x), x, (x.shape[0], channels, *sizes))


def _empty_like(x: Tensor) -> Tensor:
    return _empty(x, x.shape[1], x.shape[2:])


def _build_fake(x: Tensor, num_levels: int, filter: str, factor: Sequence[int]) -> list[Tensor]:
    return [_empty(x, x.shape[1], s) for s in level_sizes(x.shape[2:], num_levels, factor)]


def _collapse_backward_fake(
    grad: Tensor, num_levels: int, filter: str, factor: Sequence[int]
) -> list[Tensor]:
    return _build_fake(grad, num_levels, filter, factor)[:-1]


def _haar_build_fake(x: Tensor, num_levels: int) -> list[Tensor]:
    c = x.shape[1]
    coarse, *_ = sizes = level_sizes(x.shape[2:], num_levels, (2, 2))[:-1]
    return [_empty(x, c, coarse), *(_empty(x, 3 * c, s) for s in sizes)]


def _haar_collapse_fake(levels: Sequence[Tensor]) -> Tensor:
    h, w = levels[-1].shape[2:]
    return _empty(levels[-1], levels[0].shape[1], (2 * h, 2 * w))


# Multiply-adds per fine element, down and up, of one axis (counted as 2 FLOPs each).
_TAPS = {"nearest": (2, 1), "bilinear": (2, 2), "binomial": (5, 3), "dct": (8, 4)}


def _laplacian_flops(elements: int, num_levels: int, filter: str, factor: Sequence[int]) -> int:
    """Separable filtering, every axis in turn, of all levels but the coarsest."""
    down, up = _TAPS[filter]
    total, axes, size = 0.0, sum(f > 1 for f in factor), float(elements)
    for _ in range(num_levels - 1):
        total += size * (2 * axes * (down / 2 + up) + 1)
        size /= math.prod(factor)
    return round(total)


def build_flops(x: Sequence[int], num_levels: int, filter: str, factor: Sequence[int]) -> int:
    """Of `laplacian_build`, or of `haar_build` for filter "haar", on sizes x [N, C, ...]."""
    elements = math.prod(x)
    if filter == "haar":  # three additions and one halving per output
        return sum(4 * elements // 4**s for s in range(num_levels - 1))
    return _laplacian_flops(elements, num_levels, filter, factor)


define(
    "laplacian_build(Tensor x, int num_levels, str filter, int[] factor) -> Tensor[]",
    reference=laplacian_build_ref,
    fake=_build_fake,
    kernel="pyramids:laplacian_build",
    flops=build_flops,
)
define(
    "laplacian_build_backward(Tensor[] grads, str filter, int[] factor) -> Tensor",
    reference=laplacian_build_backward_ref,
    fake=lambda grads, filter, factor: _empty_like(grads[-1]),
    kernel="pyramids:laplacian_build_backward",
    flops=lambda g, filter, factor: _laplacian_flops(math.prod(g[-1]), len(g), filter, factor),
)
define(
    "laplacian_collapse(Tensor[] levels, str filter, int[] factor) -> Tensor",
    reference=laplacian_collapse_ref,
    fake=lambda levels, filter, factor: _empty_like(levels[-1]),
    kernel="pyramids:laplacian_collapse",
    flops=lambda v, filter, factor: _laplacian_flops(math.prod(v[-1]), len(v), filter, factor),
)
define(
    "laplacian_collapse_backward(Tensor grad, int num_levels, str filter, int[] factor)"
    " -> Tensor[]",
    reference=laplacian_collapse_backward_ref,
    fake=_collapse_backward_fake,
    kernel="pyramids:laplacian_collapse_backward",
    flops=lambda g, n, filter, factor: _laplacian_flops(math.prod(g), n, filter, factor),
)
define(
    "haar_build(Tensor x, int num_levels) -> Tensor[]",
    reference=haar_build_ref,
    fake=_haar_build_fake,
    kernel="pyramids:haar_build",
    flops=lambda x, n: build_flops(x, n, "haar", (2, 2)),
)
define(
    "haar_collapse(Tensor[] levels) -> Tensor",
    reference=haar_collapse_ref,
    fake=_haar_collapse_fake,
    kernel="pyramids:haar_collapse",
    flops=lambda levels: sum(4 * 4 * math.prod(s) // 3 for s in levels[1:]),
)

# --- Gradients ------------------------------------------------------------------------------------


class _LaplacianBuild(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, num_levels, filter, factor):
        ctx.filter, ctx.factor, ctx.layout = filter, factor, memory_format(x)
        return tuple(_ops.laplacian_build(x, num_levels, filter, factor))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        levels = [g.contiguous(memory_format=ctx.layout) for g in grads]
        dx = _ops.laplacian_build_backward(levels, ctx.filter, ctx.factor)
        return dx, None, None, None


class _LaplacianCollapse(torch.autograd.Function):
    # One variadic parameter, and always more than two arguments: Dynamo takes a call with as many
    # arguments as forward has parameters (ctx included) for one that already brings ctx.
    @staticmethod
    def forward(ctx, *args):
        filter, factor, *levels = args
        ctx.filter, ctx.factor, ctx.layout = filter, factor, memory_format(levels[-1])
        return _ops.laplacian_collapse(levels, filter, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs = ctx.needs_input_grad[2:]
        coarse = [None] * (len(needs) - 1)
        if any(needs[:-1]):
            dy_ = dy.contiguous(memory_format=ctx.layout)
            coarse = _ops.laplacian_collapse_backward(dy_, len(needs), ctx.filter, ctx.factor)
        return None, None, *coarse, dy if needs[-1] else None


class _HaarBuild(torch.autograd.Function):
    """Orthonormal: the adjoint is the inverse."""

    @staticmethod
    def forward(ctx, x, num_levels):
        ctx.layout = memory_format(x)
        return tuple(_ops.haar_build(x, num_levels))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        levels = [g.contiguous(memory_format=ctx.layout) for g in grads]
        return _ops.haar_collapse(levels), None


class _HaarCollapse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):  # as _LaplacianCollapse
        ctx.num_levels, *levels = args
        ctx.layout = memory_format(levels[-1])
        return _ops.haar_collapse(levels)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dy = dy.contiguous(memory_format=ctx.layout)
        return None, *_ops.haar_build(dy, ctx.num_levels)


# --- Public functions -----------------------------------------------------------------------------


def check_factor(op: str, factor: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    per_axis = (factor,) * ndim if isinstance(factor, int) else factor
    if not isinstance(per_axis, Sequence) or not all(isinstance(f, int) for f in per_axis):
        _checks.fail(op, "factor", "an int or a sequence of ints", repr(factor), TypeError)
    if len(per_axis) != ndim:
        _checks.fail(op, "factor", f"one number, or one per spatial axis ({ndim})", factor)
    if any(f not in (1, 2, 4) for f in per_axis) or max(per_axis) == 1:
        _checks.fail(op, "factor", "1, 2 or 4 per axis, not all 1", factor)
    return tuple(per_axis)


Sizes = Sequence[int]


def _plan(
    op: str, argument: str, sizes: Sizes, levels: int, filter: str, factor: int | Sizes
) -> tuple[tuple[int, ...], list[Sizes]]:
    """(factor per axis, sizes of the levels, coarse to fine), all checked: every side that a level
    halves must suit the filter."""
    if filter != "haar":
        _checks.choice(op, "filter", filter, FILTERS)
    factor = check_factor(op, factor, len(sizes))
    multiple = {"binomial": 1, "dct": 8}.get(filter, 2)
    fine = tuple(sizes)
    for level in range(levels - 1):
        for axes in halvings(factor):
            if any(fine[a] < 2 or fine[a] % multiple for a in axes):
                need = f"multiples of {multiple}" if multiple > 1 else "sides of at least 2"
                _checks.fail(
                    op,
                    argument,
                    f"{need} at each of {levels - 1} halvings by {factor} for filter {filter!r}",
                    f"{tuple(sizes)}, which comes to {fine} after {level}",
                )
            fine = halve(fine, axes)
    return factor, [*level_sizes(sizes, levels, factor)]


_remembered_plan = functools.lru_cache(maxsize=1024, typed=True)(_plan)


def plan(*args: Any) -> tuple[tuple[int, ...], list[Sizes]]:
    """`_plan`, remembered (it costs 10 us). Dynamo must trace it; a list, or a symbolic size, does
    not hash."""
    if not torch.compiler.is_compiling():
        try:
            return _remembered_plan(*args)
        except TypeError:
            pass
    return _plan(*args)


def _check_levels(op: str, levels: Sequence[Tensor], ndim: tuple[int, ...]) -> list[Tensor]:
    if not isinstance(levels, list | tuple):
        _checks.fail(op, "levels", "a list or tuple of tensors", type(levels).__name__, TypeError)
    if not levels:
        _checks.fail(op, "levels", "at least one tensor", 0)
    for s, level in enumerate(levels):
        _checks.tensor(op, f"levels[{s}]", level, ndim)
        _checks.like(op, f"levels[{s}]", level, "levels[0]", levels[0])
    return list(levels)


def _check_shapes(op: str, levels: Sequence[Tensor], expected: Sequence[Sequence[int]]) -> None:
    for s, (level, shape) in enumerate(zip(levels, expected, strict=True)):
        if level.shape != shape:
            _checks.fail(op, f"levels[{s}]", f"shape {shape}", tuple(level.shape))


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _pyramid_cost(
    x: Tensor, num_levels: int = 2, *, factor: int | Sequence[int] = 2, **_: Any
) -> int:
    """Least bytes of a build: x read once, every level written once."""
    factor = check_factor("laplacian_build", factor, x.ndim - 2)
    sizes = level_sizes(x.shape[2:], num_levels, factor)
    levels = sum(math.prod(s) for s in sizes) * x.shape[0] * x.shape[1]
    return (x.numel() + levels) * x.element_size()


@operator(
    reference=laplacian_build_ref,
    raw=("laplacian_build", "laplacian_build_backward"),
    cost=_pyramid_cost,
)
def laplacian_build(
    x: Tensor,
    num_levels: int = 2,
    *,
    filter: str = "bilinear",
    factor: int | Sequence[int] = 2,
) -> tuple[Tensor, ...]:
    """Laplacian pyramid of images [N, C, H, W] or videos [N, C, T, H, W], coarse to fine.

    Args:
        x: float32, bfloat16, float16 or float64; contiguous or channels_last (kept; any other
            layout is copied to contiguous first).
        num_levels: at least 1. Each level but the coarsest halves the sides once (factor 2).
        filter: "nearest", "bilinear" (DFM's), "binomial" (equal to OpenCV's pyrDown and pyrUp) or
            "dct". Box filters need even sides, "dct" multiples of 8, "binomial" any.
        factor: 1, 2 or 4 for all axes or one per axis, such as (1, 2, 2) for a video whose frames
            are kept. Factor 4 is two steps of 2, the middle level not emitted.

    Returns:
        `num_levels` tensors like x, coarse to fine; the last has x's shape. `laplacian_collapse`
        of them differs from x by at most one rounding per level.

    Raises:
        TypeError: not a floating-point tensor. ValueError: shape, level count, filter or factor.

    Burt & Adelson, The Laplacian Pyramid as a Compact Image Code, 1983; DFM (arXiv 2506.19839) §3.
    """
    op = "laplacian_build"
    _checks.tensor(op, "x", x, (4, 5))
    num_levels = _checks.integer(op, "num_levels", num_levels, 1)
    factor, _ = plan(op, "x", x.shape[2:], num_levels, filter, factor)
    if num_levels == 1:
        return (x.clone(),)
    x = dense(x)
    if not differentiable(x):
        return tuple(_ops.laplacian_build(x, num_levels, filter, factor))
    return _LaplacianBuild.apply(x, num_levels, filter, factor)


@operator(
    reference=laplacian_collapse_ref,
    raw=("laplacian_collapse", "laplacian_collapse_backward"),
    cost=lambda levels, **_: nbytes(*levels, levels[-1]),
)
def laplacian_collapse(
    levels: Sequence[Tensor], *, filter: str = "bilinear", factor: int | Sequence[int] = 2
) -> Tensor:
    """Inverse of `laplacian_build`: levels, coarse to fine -> x, shaped like the last level.

    Args:
        levels: what `laplacian_build` returns, or the first k of it for a coarser picture.
        filter, factor: as given to `laplacian_build`.

    Returns:
        A tensor of the finest level's shape, dtype and layout.

    Raises:
        TypeError: not floating-point tensors of one dtype. ValueError: count, shapes or devices.
    """
    op = "laplacian_collapse"
    levels = _check_levels(op, levels, (4, 5))
    finest = levels[-1]
    name = f"levels[{len(levels) - 1}]"
    factor, sizes = plan(op, name, finest.shape[2:], len(levels), filter, factor)
    _check_shapes(op, levels, [(*finest.shape[:2], *s) for s in sizes])
    if len(levels) == 1:
        return finest.clone()
    layout = memory_format(finest)
    levels = [dense(v, layout) for v in levels]
    if not differentiable(*levels):
        return _ops.laplacian_collapse(levels, filter, factor)
    return _LaplacianCollapse.apply(filter, factor, *levels)


@operator(
    reference=haar_build_ref,
    raw=("haar_build", "haar_collapse"),
    cost=lambda x, num_levels=2: 2 * nbytes(x),
)
def haar_build(x: Tensor, num_levels: int = 2) -> tuple[Tensor, ...]:
    """Orthonormal Haar wavelet pyramid of images [N, C, H, W], critically sampled.

    Args:
        x: float32, bfloat16, float16 or float64; sides multiples of 2^(num_levels - 1).
        num_levels: at least 1.

    Returns:
        The low-pass band [N, C, h, w], then per level, coarse to fine, the details [N, 3C, h, w]:
        C channels each of LH (low along W, high along H), HL, HH: PyWavelets' cH, cV, cD.

    Raises:
        TypeError: not a floating-point tensor. ValueError: shape or level count.
    """
    op = "haar_build"
    _checks.tensor(op, "x", x, (4,))
    num_levels = _checks.integer(op, "num_levels", num_levels, 1)
    plan(op, "x", x.shape[2:], num_levels, "haar", 2)
    if num_levels == 1:
        return (x.clone(),)
    x = dense(x)
    if not differentiable(x):
        return tuple(_ops.haar_build(x, num_levels))
    return _HaarBuild.apply(x, num_levels)


@operator(
    reference=haar_collapse_ref,
    raw=("haar_collapse", "haar_build"),
    cost=lambda levels: 2 * nbytes(*levels),
)
def haar_collapse(levels: Sequence[Tensor]) -> Tensor:
    """Inverse of `haar_build`: [N, C, h, w] and details [N, 3C, ...], coarse to fine -> x.

    Raises:
        TypeError: not floating-point tensors of one dtype. ValueError: count, shapes or devices.
    """
    op = "haar_collapse"
    levels = _check_levels(op, levels, (4,))
    if len(levels) == 1:
        return levels[0].clone()
    n, c, h, w = levels[0].shape
    details = [(n, 3 * c, h << s, w << s) for s in range(len(levels) - 1)]
    _check_shapes(op, levels, [(n, c, h, w), *details])
    layout = memory_format(levels[-1])
    levels = [dense(v, layout) for v in levels]
    if not differentiable(*levels):
        return _ops.haar_collapse(levels)
    return _HaarCollapse.apply(len(levels), *levels)
