"""Solver steps of all levels: rows only; the measuring is in harness.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dfm_fast
from benchmarks.harness import Row
from benchmarks.shapes import CASES
from dfm_fast.ops import steps
from dfm_fast.ops._scales import level_shapes

F32, BF16 = torch.float32, torch.bfloat16
SCALE, DT = 1.5, (-0.03, -0.1, -0.05)


def times(like: Tensor, count: int) -> Tensor:
    """dt, made once per device and dtype, as a sampler has it."""
    key = like.device, like.dtype
    if key not in _TIMES:
        wide = torch.promote_types(like.dtype, F32)
        _TIMES[key] = torch.tensor(DT, dtype=wide, device=like.device)
    return _TIMES[key][:count]


_TIMES: dict[Any, Tensor] = {}


def on_levels(function: Callable[..., list[Tensor]], count: int) -> Callable[..., list[Tensor]]:
    """Of x, v_cond, v_uncond, each of `count` levels."""

    def run(*inputs: Tensor) -> list[Tensor]:
        groups = (list(inputs[i : i + count]) for i in range(0, 3 * count, count))
        return function(*groups, times(inputs[0], count), cfg_scale=SCALE)

    return run


def written_out(x, cond, uncond, dt, cfg_scale):
    """What a user writes, level by level."""
    v = [u + cfg_scale * (c - u) for c, u in zip(cond, uncond, strict=True)]
    return [a + dt[s] * w for s, (a, w) in enumerate(zip(x, v, strict=True))]


def step_row(name: str, dtype: torch.dtype = F32, **options: Any) -> Row:
    case = CASES[name]
    shapes = level_shapes(case.shape, case.num_levels, "bilinear", (2, 2))
    count = len(shapes)
    return Row(
        op="cfg_euler_step",
        variant="guided",
        case=name,
        shapes=tuple(shapes) * 3,
        ours=on_levels(dfm_fast.cfg_euler_step, count),
        reference=on_levels(steps.cfg_euler_step_ref, count),
        least_bytes=4 * sum(map(math.prod, shapes)) * dtype.itemsize,
        eager=on_levels(written_out, count),
        compiled={"written out": on_levels(written_out, count)},
        dtype=dtype,
        **options,
    )


def rows() -> Iterator[Row]:
    yield step_row("one_latent", quick=True)
    yield step_row("dfm_latents", quick=True)
    yield step_row("front_end")
    yield step_row("dfm_latents", BF16)
    yield step_row("large_latents", BF16, device="cuda", quick=True)


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_steps(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
