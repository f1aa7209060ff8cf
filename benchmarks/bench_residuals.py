"""The residual blocks of SnapGen's decoder: rows only; the measuring is in harness.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Row
from benchmarks.shapes import RESIDUALS
from dfm_fast.ops import residuals

F32, BF16 = torch.float32, torch.bfloat16


def written_out(x: Tensor, d1: Tensor, p1: Tensor, b1: Tensor, d2: Tensor, p2: Tensor, b2: Tensor):
    h = F.conv2d(F.conv2d(x, d1, padding=1, groups=len(d1)), p1, b1)
    return x + F.conv2d(F.conv2d(F.silu(h), d2, padding=1, groups=len(d2)), p2, b2)


def residual_row(name: str, dtype: torch.dtype, **options: Any) -> Row:
    shape = RESIDUALS[name]
    c = shape[1]
    hidden = 2 * c
    weights = (c, 1, 3, 3), (hidden, c, 1, 1), (hidden,), (hidden, 1, 3, 3), (c, hidden, 1, 1), (c,)
    return Row(
        op="separable_residual",
        variant="",
        case=name,
        shapes=(shape, *weights),
        ours=residuals.separable_residual,
        reference=residuals.separable_residual_ref,
        least_bytes=(2 * math.prod(shape) + sum(map(math.prod, weights))) * dtype.itemsize,
        eager=written_out,
        compiled={"written out": written_out},
        dtype=dtype,
        layout="channels_last",
        adapt=lambda given: [v / math.sqrt(v[0].numel()) if v.ndim == 4 else v for v in given],
        **options,
    )


def rows() -> Iterator[Row]:
    for dtype in (F32, BF16):
        for name in ("decoder_32_512", "decoder_64_256", "decoder_128_128", "decoder_240_64"):
            yield residual_row(name, dtype, quick=name == "decoder_64_256")
    yield residual_row("large_decoder_32", BF16, device="cuda", quick=True)
    yield residual_row("large_decoder_64", BF16, device="cuda")


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_residuals(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
