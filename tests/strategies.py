"""Random calls of every operator, for Hypothesis: `cases(name)` draws a `Case` whose tensors each
have a layout of their own.

Sizes are small and lie on both sides of what kernels treat apart: vectors, tiles, blocks. A family
is written by its operators' arguments alone; caps are those of `cases/<family>.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases.noises import CAP
from helpers import Case, Shape
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from dfm_fast.ops._scales import level_shapes

Draw = Callable[[st.SearchStrategy[Any]], Any]
DRAWN: dict[str, Callable[[Draw], Case]] = {}
LAYOUTS = ("contiguous", "channels_last", "permuted", "strided", "cropped", "unaligned")
EDGES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 127, 128, 129)
BOOLS = st.booleans()


def profile(examples: int) -> settings:
    """The same examples every time; as many times more, and new ones, where `make fuzz` asks."""
    times = int(os.environ.get("DFM_FAST_FUZZ", "0"))
    return settings(
        max_examples=examples * max(1, times), derandomize=not times, database=None,
        deadline=None, print_blob=bool(times), suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def cases(name: str) -> st.SearchStrategy[Case]:
    """Calls of one operator."""
    return st.composite(DRAWN[name])()


def drawn(*names: str) -> Callable[[Callable[[Draw, str], Case]], Callable[[Draw, str], Case]]:
    """Register what draws calls of these operators."""

    def register(make: Callable[[Draw, str], Case]) -> Callable[[Draw, str], Case]:
        for name in names:
            DRAWN[name] = lambda draw, name=name: make(draw, name)
        return make

    return register


# --- Parts of a call ------------------------------------------------------------------------------


def size(most: int, least: int = 1) -> st.SearchStrategy[int]:
    """Any size, and more often one beside a multiple of a vector."""
    edges = [n for n in EDGES if least <= n <= most]
    return st.integers(least, most) | st.sampled_from(edges)


def batch(draw: Draw) -> int:
    return draw(st.sampled_from((1, 2, 3, 0)))


def tensor(draw: Draw, *sizes: int, equal: Sequence[int] = (), **options: Any) -> Shape:
    """A tensor in a layout of its own. Along one of the axes `equal` it may be expanded: not along
    those that are normalised, as equal values have no deviation to divide by."""
    axes = (draw(st.sampled_from(equal)),) if equal and draw(st.integers(0, 5)) == 0 else ()
    layout = draw(st.sampled_from(LAYOUTS))
    return Shape(tuple(sizes), layout=layout, equal=axes, **options)


def parameter(draw: Draw, *sizes: int, wide: bool = False) -> Shape:
    return tensor(draw, *sizes, equal=range(len(sizes)), batched=False, wide=wide)


def weight(draw: Draw, *sizes: int) -> Shape:
    """A parameter, which may be float32 beside half precision."""
    return parameter(draw, *sizes, wide=draw(BOOLS))


def maybe(draw: Draw, make: Callable[..., Shape], *args: Any, **options: Any) -> Shape | None:
    return make(draw, *args, **options) if draw(BOOLS) else None


def case(draw: Draw, name: str, inputs: Sequence[Any], cap: float, **kwargs: Any) -> Case:
    """`id` is the seed of the values."""
    return Case(name, f"{name}-{draw(st.integers(0, 99)):02d}", tuple(inputs), kwargs, cap)


# --- Tokens ---------------------------------------------------------------------------------------


def rows(draw: Draw, last: int) -> tuple[int, ...]:
    """[B, ..., last], of two to four dimensions."""
    inner = draw(st.lists(st.sampled_from((1, 2, 3, 5, 9, 0)), max_size=2))
    return (batch(draw), *inner, last)


@drawn("geglu", "swiglu", "gelu_tanh")
def activations(draw: Draw, name: str) -> Case:
    width = draw(size(600))
    if name == "gelu_tanh":
        shape = rows(draw, width)
        x = tensor(draw, *shape, equal=range(len(shape)))
        bias = maybe(draw, tensor, width, batched=False)
        return case(draw, name, (x, bias), 4.0)
    shape = rows(draw, 2 * width)
    kwargs = {"approximate": draw(st.sampled_from(("none", "tanh")))} if name == "geglu" else {}
    return case(draw, name, (tensor(draw, *shape, equal=range(len(shape))),), 4.0, **kwargs)


@drawn("rms_norm", "ada_layer_norm", "gated_residual", "gated_residual_ada_layer_norm")
def norms(draw: Draw, name: str) -> Case:
    # Of two values or three the normalised ones may have no deviation left: least is 4.
    shape = rows(draw, draw(size(700, least=4)))
    others = range(len(shape) - 1)
    x = tensor(draw, *shape, equal=others)
    eps = draw(st.sampled_from((1e-6, 1e-3, 0.5)))
    if name == "rms_norm":
        return case(draw, name, (x, maybe(draw, weight, shape[-1])), 8.0, eps=eps)
    wide = draw(BOOLS)
    small = shape if draw(BOOLS) else (shape[0], shape[-1])
    count = {"ada_layer_norm": 2, "gated_residual": 1}.get(name, 3)
    modulation = [tensor(draw, *small, equal=range(len(small)), wide=wide) for _ in range(count)]
    branch = [] if name == "ada_layer_norm" else [tensor(draw, *shape, equal=others)]
    options = {} if name == "gated_residual" else {"eps": eps}
    return case(draw, name, (x, *branch, *modulation), 8.0, **options)


@drawn("qk_norm_rope")
def rotaries(draw: Draw, name: str) -> Case:
    n, tokens, d = batch(draw), draw(size(17)), 2 * draw(size(65, least=2))
    heads, kv_heads = draw(size(9)), draw(size(5))
    with_tables = draw(BOOLS)
    weights = [maybe(draw, weight, d) for _ in range(2)]
    if not with_tables and weights == [None, None]:
        weights[draw(st.integers(0, 1))] = weight(draw, d)
    table = (n, tokens, d // 2) if draw(BOOLS) else (tokens, d // 2)
    options = {"batched": len(table) == 3, "wide": draw(BOOLS)}
    tables = [tensor(draw, *table, **options) if with_tables else None for _ in range(2)]
    k_tokens = tokens if with_tables else draw(size(17))
    # Expanded along heads, which are read in place.
    q = tensor(draw, n, tokens, heads, d, equal=range(3))
    k = tensor(draw, n, k_tokens, kv_heads, d, equal=range(3))
    options = {"interleaved": draw(BOOLS), "eps": draw(st.sampled_from((1e-6, 1e-2)))}
    return case(draw, name, (q, k, *weights, *tables), 16.0, **options)


@drawn("multi_query_attention")
def attentions(draw: Draw, name: str) -> Case:
    n, kv_heads, d = batch(draw), draw(size(3)), draw(size(130))
    heads = kv_heads * draw(size(5))
    tokens, keys = draw(size(65)), draw(size(129, least=0))
    q = tensor(draw, n, tokens, heads, d, equal=range(4))
    k, v = (tensor(draw, n, keys, kv_heads, d, equal=range(4)) for _ in range(2))
    mask = maybe(draw, tensor, n, keys, mask=True, equal=range(2))
    scale = draw(st.sampled_from((None, 0.7, 0.0)))
    return case(draw, name, (q, k, v, mask), 16.0, scale=scale)


# --- Maps -----------------------------------------------------------------------------------------


def sides(draw: Draw, most: int = 40) -> tuple[int, int]:
    """Height and width, of which one is short."""
    pair = draw(size(most)), draw(size(12))
    return pair if draw(BOOLS) else pair[::-1]


def groups(draw: Draw, channels: int, pixels: int) -> int:
    """Of four values or more where there are so many: fewer may have no deviation left."""
    divisors = [g for g in range(1, channels + 1) if channels % g == 0]
    return draw(st.sampled_from([g for g in divisors if channels // g * pixels >= 4] or [1]))


@drawn("depthwise_conv2d", "norm_silu_depthwise_conv2d")
def convolutions(draw: Draw, name: str) -> Case:
    least = 4 if name.startswith("norm") else 1  # values in a group
    n, channels, kernel = batch(draw), draw(size(65, least)), draw(st.sampled_from((3, 5, 7)))
    height, width = sides(draw)
    least = [max(0, -(-(kernel - side) // 2)) for side in (height, width)]
    padding = tuple(draw(st.integers(p, kernel - 1)) for p in least)
    options = {"stride": draw(st.sampled_from((1, 2))), "padding": padding}
    w = weight(draw, channels, 1, kernel, kernel)
    if name == "depthwise_conv2d":
        x = tensor(draw, n, channels, height, width, equal=range(4))
        return case(draw, name, (x, w, maybe(draw, weight, channels)), 64.0, **options)
    x = tensor(draw, n, channels, height, width, equal=(0,))
    small = [maybe(draw, weight, channels) for _ in range(2)]
    shift = maybe(draw, tensor, n, channels, wide=draw(BOOLS), equal=(0,))
    options |= {
        "num_groups": groups(draw, channels, height * width),
        "eps": draw(st.sampled_from((1e-5, 1e-2))),
    }
    return case(draw, name, (x, None, *small, w, shift), 64.0, **options)


@drawn("separable_conv2d")
def separables(draw: Draw, name: str) -> Case:
    """All of one dtype: maps between the convolutions are rounded to that of x (see the operator's
    docstring), and a float32 parameter's gradient through them is no more exact than that."""
    n, channels, outputs = batch(draw), draw(size(65)), draw(size(65))
    kernel = draw(st.sampled_from((3, 5, 7)))
    height, width = sides(draw)
    normed = draw(BOOLS) and channels * height * width >= 4
    x = tensor(draw, n, channels, height, width, equal=(0,) if normed else range(4))
    weights = (
        parameter(draw, channels, 1, kernel, kernel),
        tensor(draw, outputs, channels, 1, 1, equal=range(4), batched=False),
    )
    epilogue = [
        maybe(draw, parameter, outputs),
        maybe(draw, tensor, n, outputs, equal=range(2)),
        maybe(draw, tensor, n, outputs, height, width, equal=range(4)),
    ]
    norm = [maybe(draw, parameter, channels) if normed else None for _ in range(2)]
    options = {"num_groups": groups(draw, channels, height * width) if normed else None}
    return case(draw, name, (x, *weights, *epilogue, *norm), 64.0, **options)


@drawn("upsample_conv2d")
def upsamples(draw: Draw, name: str) -> Case:
    n, channels, outputs = batch(draw), draw(size(40)), draw(size(40))
    x = tensor(draw, n, channels, *sides(draw), equal=range(4))
    w = parameter(draw, outputs, channels, 3, 3)
    bias = maybe(draw, parameter, outputs)
    return case(draw, name, (x, w, bias), 64.0)


@drawn("group_norm_silu", "channel_statistics")
def group_norms(draw: Draw, name: str) -> Case:
    n, channels = batch(draw), draw(size(72, least=4))  # four values in a group
    some = (), (draw(size(130)),), sides(draw), (draw(size(4)), *sides(draw, 12))
    pixels = draw(st.sampled_from(some))
    x = tensor(draw, n, channels, *pixels, equal=(0,))
    if name == "channel_statistics":
        return case(draw, name, (x,), 16.0)
    small = [maybe(draw, weight, channels) for _ in range(2)]
    shift = maybe(draw, tensor, n, channels, wide=draw(BOOLS), equal=(0,))
    options = {
        "eps": draw(st.sampled_from((1e-5, 1e-2))),
        "activation": draw(st.sampled_from(("silu", "none"))),
    }
    return case(
        draw, name, (x, groups(draw, channels, math.prod(pixels)), *small, shift), 64.0, **options
    )


# --- Levels ---------------------------------------------------------------------------------------

FILTERS = ("nearest", "bilinear", "binomial", "dct")


def pyramid(draw: Draw, *filters: str) -> tuple[tuple[int, ...], int, str, tuple[int, ...]]:
    """(shape of x, number of levels, filter, factor), of sides that the filter can take."""
    filter, levels = draw(st.sampled_from(filters)), draw(st.integers(1, 4))
    images = filter == "haar" or draw(BOOLS)
    factors = ((2, 2), (4, 4), (1, 2), (4, 2)) if images else ((1, 2, 2), (2, 2, 2), (1, 2, 4))
    factor = (2, 2) if filter == "haar" else draw(st.sampled_from(factors))
    levels = min(levels, 2) if 4 in factor else levels
    sides = [side(draw, filter, f, levels, 24 if images else 9) for f in factor]
    return (batch(draw), draw(size(4)), *sides), levels, filter, factor


def side(draw: Draw, filter: str, factor: int, levels: int, most: int) -> int:
    """One of the finest level. "dct" halves blocks of 8; "binomial" takes odd sides as well."""
    shrink = factor ** (levels - 1)
    coarse = draw(size(max(2, most // shrink)))
    if filter == "dct" and shrink > 1:
        coarse = 4 * -(-coarse // 4)
    short = shrink - 1 if coarse > 1 else shrink // 2 - 1
    odd = draw(st.integers(0, max(0, short))) if filter == "binomial" else 0
    return coarse * shrink - odd


def levels_like(draw: Draw, shapes: Sequence[Sequence[int]], **options: Any) -> list[Shape]:
    return [tensor(draw, *s, equal=range(len(s)), **options) for s in shapes]


@drawn("laplacian_build", "laplacian_collapse", "haar_build", "haar_collapse")
def pyramids(draw: Draw, name: str) -> Case:
    shape, levels, filter, factor = pyramid(draw, *("haar",) if "haar" in name else FILTERS)
    options = {} if filter == "haar" else {"filter": filter, "factor": factor}
    cap = 2.0 + max(2, levels) + 12.0 * (filter == "dct")
    if name.endswith("build"):
        x = tensor(draw, *shape, equal=range(len(shape)))
        return case(draw, name, (x, levels), cap, **options)
    parts = levels_like(draw, level_shapes(shape, levels, filter, factor))
    return case(draw, name, (parts,), cap, **options)


# --- Noise ----------------------------------------------------------------------------------------


def stream(draw: Draw) -> dict[str, Any]:
    """A seed, as a number or as a tensor with an offset, and an offset."""
    seed = draw(st.integers(-(1 << 63), (1 << 64) - 1))
    offset = draw(st.integers(0, 9) | st.integers(0, (1 << 62)))
    if draw(BOOLS):
        return {"seed": seed, "offset": offset}
    state = torch.tensor([draw(st.integers(-(1 << 63), (1 << 63) - 1)), draw(st.integers(0, 9))])
    return {"seed": state, "offset": offset}


@drawn("philox_normal", "add_noise")
def noises(draw: Draw, name: str) -> Case:
    inner = draw(st.lists(size(17), max_size=3))
    shape = (batch(draw), *inner)
    if name == "philox_normal":
        return case(draw, name, (shape,), CAP, **stream(draw))
    x = tensor(draw, *shape, equal=range(len(shape)))
    t = tensor(draw, shape[0], uniform=True, equal=(0,), wide=draw(BOOLS))
    return case(draw, name, (x, t), CAP, **stream(draw))


@drawn("pyramid_add_noise", "velocity_loss")
def pyramid_noises(draw: Draw, name: str) -> Case:
    shape, levels, filter, factor = pyramid(draw, *FILTERS, "haar")
    x = tensor(draw, *shape, equal=range(len(shape)))
    on = draw(st.lists(BOOLS, min_size=levels, max_size=levels))
    on[draw(st.integers(0, levels - 1))] = True  # one at least
    mask = torch.tensor([on] * shape[0], dtype=torch.bool).view(shape[0], levels)
    active = draw(st.sampled_from((None, on, mask)))
    std = draw(st.none() | st.just([0.5, 2.0, 0.125, 1.0][:levels]))
    options = {"filter": filter, "factor": factor, "active": active, "std": std, **stream(draw)}
    cap = CAP * 8
    if name == "velocity_loss":
        given = levels_like(draw, level_shapes(shape, levels, filter, factor), wide=draw(BOOLS))
        if active is on:  # a prediction that does not count has no gradient to compare
            given = [g if a else None for g, a in zip(given, on, strict=True)]
        return case(draw, name, (given, x), cap, **options)
    t = tensor(draw, shape[0], levels, uniform=True, equal=range(2), wide=draw(BOOLS))
    return case(draw, name, (x, t), cap, num_levels=levels, targets=draw(BOOLS), **options)


@drawn("cfg_euler_step", "heun_step")
def steps(draw: Draw, name: str) -> Case:
    count, n, inner = draw(size(4)), batch(draw), draw(st.lists(size(17), max_size=3))
    shapes = [(n, *inner[:-1], draw(size(33))) if inner else (n,) for _ in range(count)]
    x, wide, guided = levels_like(draw, shapes), draw(BOOLS), draw(BOOLS)
    velocities = [levels_like(draw, shapes, wide=wide) for _ in range(1 + guided)]
    predicted = [levels_like(draw, shapes)] if name == "heun_step" else []
    rows = draw(st.sampled_from((0, 1, 3)))
    dt = tensor(draw, *(rows, count) if rows else (count,), batched=False, wide=draw(BOOLS))
    scale = draw(st.sampled_from((0.0, 1.5, -0.5))) if guided else 1.0
    options: dict[str, Any] = {"cfg_scale": scale}
    if rows:
        options["step"] = torch.tensor(draw(st.integers(0, rows - 1)))
    if guided and draw(BOOLS):
        options["cfg_scale"] = torch.linspace(-1, 4, max(1, rows) * count)
        if rows:
            options["cfg_scale"] = options["cfg_scale"].view(rows, count)
    if draw(BOOLS):
        options["active"] = torch.tensor(draw(st.lists(BOOLS, min_size=count, max_size=count)))
    inputs = (x, *predicted, velocities[0], velocities[1] if guided else None, dt)
    return case(draw, name, inputs, 16.0, **options)
