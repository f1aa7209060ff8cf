"""Noise per element and per scale, and its loss: rows only; the measuring is in harness.py.

The others draw their own random numbers, torch's: they are timed, and not compared. The rivals of
the loss are handed the targets, which ours makes again from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import dfm_fast
from benchmarks import rivals_pyramids
from benchmarks.harness import Row
from benchmarks.shapes import CASES, Case
from dfm_fast.ops import _velocity, noises
from dfm_fast.ops._scales import level_shapes

F32, BF16 = torch.float32, torch.bfloat16
SEED, NO_RIVAL = 1, "no library offers it"


def column(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))


def inject(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What a user writes."""
    eps = torch.randn_like(x)
    return torch.lerp(x, eps, column(t, x)), eps - x


def pyramid_inject(form: rivals_pyramids.Form, levels: int) -> Callable[..., Any]:
    build = rivals_pyramids.build(form, levels)

    def run(x: Tensor, t: Tensor) -> list[Tensor]:
        pairs = [inject(level, t[:, s]) for s, level in enumerate(build(x))]
        return [x_t for x_t, _ in pairs] + [v for _, v in pairs]

    return run


def squares(levels: int) -> Callable[..., Tensor]:
    """From stored targets: inputs are predictions, x, targets."""

    def run(*inputs: Tensor) -> Tensor:
        pairs = zip(inputs[:levels], inputs[levels + 1 :], strict=True)
        return torch.stack([(g - v).square().flatten(1).mean(1) for g, v in pairs], 1)

    return run


def uniform_last(inputs: list[Tensor]) -> list[Tensor]:
    """x, and noise levels in (0, 1)."""
    return [*inputs[:-1], inputs[-1].sigmoid()]


def with_targets(inputs: list[Tensor], levels: int) -> list[Tensor]:
    """Predictions, x, and the targets of x in place of random ones."""
    x = inputs[levels]
    _, v = dfm_fast.pyramid_add_noise(x, torch.zeros(len(x), levels), SEED, num_levels=levels)
    return [*inputs[: levels + 1], *v]


def normal_row(name: str, dtype: torch.dtype = F32, **options: Any) -> Row:
    def ours(x: Tensor) -> Tensor:
        return dfm_fast.philox_normal(x.shape, SEED, dtype=x.dtype, device=x.device)

    def reference(x: Tensor) -> Tensor:
        return noises.philox_normal_ref(x.shape, SEED, dtype=x.dtype, device=x.device)

    shape = CASES[name].shape
    return Row(
        op="philox_normal",
        variant="normal",
        case=name,
        shapes=(shape,),
        ours=ours,
        reference=reference,
        least_bytes=math.prod(shape) * dtype.itemsize,
        eager=torch.randn_like,
        compiled={"randn_like": torch.randn_like},
        dtype=dtype,
        own_noise=True,
        **options,
    )


def noise_row(name: str, dtype: torch.dtype = F32, layout: str = "contiguous", **options) -> Row:
    shape = CASES[name].shape
    return Row(
        op="add_noise",
        variant="element",
        case=name,
        shapes=(shape, shape[:1]),
        ours=lambda x, t: dfm_fast.add_noise(x, t, SEED),
        reference=lambda x, t: noises.add_noise_ref(x, t, SEED),
        least_bytes=3 * math.prod(shape) * dtype.itemsize,
        eager=inject,
        compiled={"randn_like + lerp": inject},
        dtype=dtype,
        layout=layout,
        adapt=uniform_last,
        own_noise=True,
        **options,
    )


def _shapes(case: Case, filter: str) -> list[tuple[int, ...]]:
    return level_shapes(case.shape, case.num_levels, filter, (2, 2))


def front_end_row(name: str, dtype: torch.dtype = F32, **options: Any) -> Row:
    case = CASES[name]
    forms = rivals_pyramids.forms("bilinear", (2, 2))
    functions = {n: pyramid_inject(form, case.num_levels) for n, form in forms.items()}
    levels = sum(map(math.prod, _shapes(case, "bilinear")))
    kwargs = {"num_levels": case.num_levels}
    return Row(
        op="pyramid_add_noise",
        variant="bilinear",
        case=name,
        shapes=(case.shape, (case.shape[0], case.num_levels)),
        ours=lambda x, t: dfm_fast.pyramid_add_noise(x, t, SEED, **kwargs),
        reference=lambda x, t: noises.pyramid_add_noise_ref(x, t, SEED, **kwargs),
        least_bytes=(math.prod(case.shape) + 2 * levels) * dtype.itemsize,
        eager=next(iter(functions.values())),
        compiled=functions,
        dtype=dtype,
        adapt=uniform_last,
        own_noise=True,
        **options,
    )


def loss_row(name: str, dtype: torch.dtype = F32, **options: Any) -> Row:
    case = CASES[name]
    count, shapes = case.num_levels, _shapes(case, "bilinear")
    levels = sum(map(math.prod, shapes))

    def split(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: function(inputs[:count], inputs[count], SEED)

    return Row(
        op="velocity_loss",
        variant="bilinear",
        case=name,
        shapes=(*shapes, case.shape, *shapes),
        ours=split(dfm_fast.velocity_loss),
        reference=split(_velocity.velocity_loss_ref),
        # Forward: predictions and x; backward: both again, and the gradients.
        least_bytes=(2 * math.prod(case.shape) + 3 * levels) * dtype.itemsize,
        eager=squares(count),
        compiled={"stored targets": squares(count)},
        dtype=dtype,
        direction="training",
        frozen=tuple(range(count, 2 * count + 1)),
        adapt=partial(with_targets, levels=count),
        **options,
    )


def rows() -> Iterator[Row]:
    for dtype in (F32, BF16):
        yield noise_row("dfm_latents", dtype, quick=True)
        yield front_end_row("front_end", dtype, quick=dtype == F32)
        yield normal_row("dfm_latents", dtype, quick=dtype == F32)
        yield noise_row("large_latents", dtype, device="cuda", quick=True)
        yield normal_row("large_latents", dtype, device="cuda", quick=True)
    yield loss_row("front_end", quick=True)
    yield noise_row("dfm_latents", layout="channels_last")
    yield front_end_row("dfm_latents")
    yield loss_row("dfm_latents")


def by_id(rows: Sequence[Row]) -> dict[str, Row]:
    return {r.id: r for r in rows}


ROWS = by_id(list(rows()))


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_noises(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
