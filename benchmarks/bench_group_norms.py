"""Group norms with SiLU, and channel statistics: rows only; the measuring is in harness.py.

Least bytes of a norm: x read once and y written once (2 elements), though one pass over x for the
statistics comes before; past a cache that holds a sample the memory sees 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dfm_fast
from benchmarks.harness import Row
from benchmarks.shapes import MAPS
from dfm_fast.ops import group_norms

F32, BF16 = torch.float32, torch.bfloat16
GROUPS = 32
LAYOUTS = ("contiguous", "channels_last")


def written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def with_shift(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    return written_out(x + shift[:, :, None, None], weight, bias)


def in_groups(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *small: function(x, GROUPS, *small)


def norm_row(
    name: str, layout: str, dtype: torch.dtype = F32, shift: bool = False, **options: Any
) -> Row:
    shape = MAPS[name]
    small = [shape[1:2]] * 2 + ([shape[:2]] if shift else [])
    theirs = with_shift if shift else written_out
    elements = math.prod(shape) * (5 if options.get("direction") == "training" else 2)
    return Row(
        op="group_norm_silu",
        variant="shift" if shift else "plain",
        case=name,
        shapes=(shape, *small),
        ours=in_groups(dfm_fast.group_norm_silu),
        reference=in_groups(group_norms.group_norm_silu_ref),
        least_bytes=(elements + 2 * sum(map(math.prod, small))) * dtype.itemsize,
        eager=theirs,
        compiled={"written out": theirs},
        dtype=dtype,
        layout=layout,
        **options,
    )


def mean_and_m2(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a user writes, without cancellation."""
    var, mean = torch.var_mean(x.float() if x.dtype != torch.float64 else x, (2, 3), correction=0)
    return mean, var * (x.shape[2] * x.shape[3])


def statistics_row(name: str, layout: str, dtype: torch.dtype = F32, **options: Any) -> Row:
    shape = MAPS[name]
    return Row(
        op="channel_statistics",
        variant="",
        case=name,
        shapes=(shape,),
        ours=lambda x: dfm_fast.channel_statistics(x)[1:],
        reference=lambda x: group_norms.channel_statistics_ref(x)[1:],
        least_bytes=math.prod(shape) * dtype.itemsize + 2 * math.prod(shape[:2]) * 4,
        eager=mean_and_m2,
        compiled={"var_mean": mean_and_m2},
        dtype=dtype,
        layout=layout,
        **options,
    )


def rows() -> Iterator[Row]:
    for layout in LAYOUTS:
        yield norm_row("unet_256_64", layout, quick=True)
    for layout in LAYOUTS:
        yield norm_row("unet_256_64", layout, BF16)
        yield norm_row("unet_256_64", layout, shift=True)
        yield norm_row("unet_256_64", layout, direction="training")
        yield statistics_row("unet_256_64", layout)
        for name in ("unet_256_128", "unet_512_64", "unet_896_32", "unet_1792_32"):
            yield norm_row(name, layout)
            yield norm_row(name, layout, BF16, device="cuda")
            yield norm_row(name, layout, BF16, direction="training", device="cuda")
        yield norm_row("maps_past_l2", layout, BF16, device="cuda", quick=True)


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_group_norms(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
