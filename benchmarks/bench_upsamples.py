"""Nearest upsampling and a 3x3 convolution: rows only; the measuring is in harness.py."""

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
from benchmarks.shapes import UPSAMPLES
from dfm_fast.ops import upsamples

F32, BF16 = torch.float32, torch.bfloat16


def written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def upsample_row(name: str, layout: str, dtype: torch.dtype, **options: Any) -> Row:
    shape = UPSAMPLES[name]
    channels = shape[1]
    weight = channels, channels, 3, 3
    maps = 5 * math.prod(shape) * (2 if options.get("direction") == "training" else 1)
    return Row(
        op="upsample_conv2d",
        variant="",
        case=name,
        shapes=(shape, weight, (channels,)),
        ours=dfm_fast.upsample_conv2d,
        reference=upsamples.upsample_conv2d_ref,
        least_bytes=(maps + math.prod(weight) + channels) * dtype.itemsize,
        eager=written_out,
        compiled={"written out": written_out},
        dtype=dtype,
        layout=layout,
        adapt=lambda inputs: [inputs[0], inputs[1] / math.sqrt(9 * channels), inputs[2]],
        **options,
    )


def rows() -> Iterator[Row]:
    for dtype in (F32, BF16):
        for layout in ("channels_last", "contiguous"):
            for name in ("up_512_32", "up_256_64", "up_896_16"):
                quick = layout == "channels_last" and name == "up_512_32"
                yield upsample_row(name, layout, dtype, quick=quick)
    yield upsample_row("up_512_32", "channels_last", F32, direction="training")
    yield upsample_row("large_up_512", "channels_last", BF16, device="cuda", quick=True)
    yield upsample_row("large_up_512", "channels_last", BF16, device="cuda", direction="training")


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_upsamples(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
