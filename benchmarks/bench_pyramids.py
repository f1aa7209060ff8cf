"""Laplacian and Haar pyramids: rows only; the measuring is in harness.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

import dfm_fast
from benchmarks import rivals_pyramids as rivals
from benchmarks.harness import Row
from benchmarks.shapes import CASES, Case
from dfm_fast.ops import pyramids

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Functions(NamedTuple):
    """Of the inputs, as a Row wants them."""

    shapes: tuple[tuple[int, ...], ...]
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    forms: dict[str, Callable[..., Any]]  # the first is the eager one


def per_axis(case: Case) -> tuple[int, ...]:
    spatial = len(case.shape) - 2
    return (case.factor,) * spatial if isinstance(case.factor, int) else case.factor


def level_shapes(case: Case, haar: bool) -> tuple[tuple[int, ...], ...]:
    n, c, *sizes = case.shape
    levels = pyramids.level_sizes(sizes, case.num_levels, per_axis(case))
    if haar:
        return (n, c, *levels[0]), *((n, 3 * c, *s) for s in levels[:-1])
    return tuple((n, c, *s) for s in levels)


def least_bytes(op: str, case: Case, dtype: torch.dtype, backward: bool) -> int:
    """Inputs read once, outputs written once. The gradient of a collapse's finest level is that of
    its output, not written again."""
    levels = sum(map(math.prod, level_shapes(case, op.startswith("haar"))))
    x = math.prod(case.shape)
    alias = x if op == "laplacian_collapse" and backward else 0
    return (levels + x - alias) * dtype.itemsize


def stacked(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The function of a sequence of levels as one of separate levels."""
    return lambda *levels: function(levels, *args, **kwargs)


def laplacian_functions(op: str, filter: str, case: Case) -> Functions:
    factor, levels = per_axis(case), case.num_levels
    options = {"filter": filter, "factor": factor}
    forms = rivals.forms(filter, factor)
    if op == "laplacian_build":
        return Functions(
            (case.shape,),
            partial(dfm_fast.laplacian_build, num_levels=levels, **options),
            partial(pyramids.laplacian_build_ref, num_levels=levels, **options),
            {name: rivals.build(form, levels) for name, form in forms.items()},
        )
    # Forms that differ in `down` alone are one and the same here.
    ups = {form.up: name.split(" + ")[-1] for name, form in forms.items()}
    return Functions(
        level_shapes(case, haar=False),
        stacked(dfm_fast.laplacian_collapse, **options),
        stacked(pyramids.laplacian_collapse_ref, **options),
        {name: rivals.collapse(up) for up, name in ups.items()},
    )


def haar_functions(op: str, filter: str, case: Case) -> Functions:
    levels = case.num_levels
    if op == "haar_build":
        return Functions(
            (case.shape,),
            partial(dfm_fast.haar_build, num_levels=levels),
            partial(pyramids.haar_build_ref, num_levels=levels),
            {n: rivals.haar_build(split, levels) for n, split in rivals.HAAR_SPLITS.items()},
        )
    return Functions(
        level_shapes(case, haar=True),
        stacked(dfm_fast.haar_collapse),
        stacked(pyramids.haar_collapse_ref),
        {name: rivals.haar_collapse(merge) for name, merge in rivals.HAAR_MERGES.items()},
    )


def row(
    op: str,
    filter: str,
    name: str,
    dtype: torch.dtype = F32,
    layout: str = "contiguous",
    direction: str = "forward",
    **options: Any,
) -> Row:
    case, backward = CASES[name], direction == "backward"
    functions = (haar_functions if filter == "haar" else laplacian_functions)(op, filter, case)
    plain = dtype == F32 and not backward
    return Row(
        op=op,
        variant=filter,
        case=name,
        shapes=functions.shapes,
        ours=functions.ours,
        reference=functions.reference,
        least_bytes=least_bytes(op, case, dtype, backward),
        eager=next(iter(functions.forms.values())),
        compiled=functions.forms,
        rivals=rivals.libraries(op, filter, case.num_levels, plain),
        dtype=dtype,
        layout=layout,
        direction=direction,
        **options,
    )


BUILD, COLLAPSE = "laplacian_build", "laplacian_collapse"
DIRECTIONS, LAST = ("forward", "backward"), "channels_last"


def quick_rows() -> Iterator[Row]:
    """A few minutes: every goal, and one row of every kind."""
    make = partial(row, quick=True)
    for direction in DIRECTIONS:
        yield make(BUILD, "bilinear", "dfm_latents", direction=direction)
        yield make(COLLAPSE, "bilinear", "dfm_latents", direction=direction)
    for op in (BUILD, COLLAPSE):
        yield make(op, "bilinear", "dfm_latents", BF16)
    yield make(BUILD, "bilinear", "dfm_latents", layout=LAST)
    for op in (BUILD, COLLAPSE):
        yield make(op, "binomial", "photos_512")
    yield make("haar_build", "haar", "dfm_latents")
    yield make(BUILD, "nearest", "dfm_latents")
    yield make(BUILD, "dct", "dfm_latents")
    yield make(BUILD, "bilinear", "video_latents")
    yield make(BUILD, "bilinear", "dfm_latents_x4")
    for op in (BUILD, COLLAPSE):
        yield make(op, "bilinear", "large_latents", BF16, device="cuda")


def full_rows() -> Iterator[Row]:
    """Everything else worth a line."""
    for op in (BUILD, COLLAPSE):
        for direction in DIRECTIONS:
            for dtype in (BF16, F16):
                yield row(op, "bilinear", "dfm_latents", dtype, direction=direction)
            yield row(op, "bilinear", "dfm_latents", layout=LAST, direction=direction)
            yield row(op, "bilinear", "dfm_latents", BF16, LAST, direction)
            for filter in ("nearest", "dct"):
                yield row(op, filter, "dfm_latents", direction=direction)
            for name in ("sd_vae_latents", "video_latents", "dfm_latents_x4"):
                yield row(op, "bilinear", name, direction=direction)
            yield row(op, "binomial", "photos_512", direction=direction)
            yield row(op, "binomial", "photos_1024", direction=direction)
            for dtype in (F32, BF16):
                yield row(
                    op, "bilinear", "large_latents", dtype, direction=direction, device="cuda"
                )
        yield row(op, "binomial", "photos_512", BF16)
        yield row(op, "binomial", "photos_512", layout=LAST)
        yield row(op, "binomial", "large_latents", device="cuda")
    for op in ("haar_build", "haar_collapse"):
        for direction in DIRECTIONS:
            yield row(op, "haar", "dfm_latents", direction=direction)
        yield row(op, "haar", "photos_1024")
        yield row(op, "haar", "dfm_latents", BF16)


ROWS = {r.id: r for r in quick_rows()}
ROWS |= {r.id: r for r in full_rows() if r.id not in ROWS}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_pyramids(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
