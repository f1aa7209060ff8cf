"""Norms, modulation and residuals of a transformer: rows only; the measuring is in harness.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dfm_fast
from benchmarks.harness import Row
from benchmarks.shapes import TOKENS
from dfm_fast.ops import norms

F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-6


def layer_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """What a user writes; shift and scale [B, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


def both(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    r = residual(x, y, gate)
    return r, layer_norm(r, shift, scale)


def root_mean_square(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


# op -> (what a user writes, tensors like x, modulations [B, D], tensors written)
OPS: dict[str, tuple[Callable[..., Any], int, int, int]] = {
    "rms_norm": (root_mean_square, 1, 0, 1),
    "ada_layer_norm": (layer_norm, 1, 2, 1),
    "gated_residual": (residual, 2, 1, 1),
    "gated_residual_ada_layer_norm": (both, 2, 3, 2),
}


def norm_row(op: str, name: str, dtype: torch.dtype = F32, **options: Any) -> Row:
    shape = TOKENS[name]
    written_out, big, modulations, written = OPS[op]
    small = [(shape[0], shape[2])] * modulations or [shape[2:]]
    shapes = tuple([shape] * big + small)
    # Backward reads every output's gradient and every large input, and writes the input's.
    passes = big + written
    if options.get("direction") == "training":
        passes += written + 2 * big
    total = passes * math.prod(shape) + 2 * sum(map(math.prod, small))
    return Row(
        op=op,
        variant="",
        case=name,
        shapes=shapes,
        ours=getattr(dfm_fast, op),
        reference=getattr(norms, f"{op}_ref"),
        least_bytes=total * dtype.itemsize,
        eager=written_out,
        compiled={"written out": written_out},
        dtype=dtype,
        **options,
    )


def rows() -> Iterator[Row]:
    for op in OPS:
        quick = "ada" in op
        yield norm_row(op, "dit_xl", quick=True)
        yield norm_row(op, "dit_xl", direction="training", quick=quick)
        yield norm_row(op, "dit_xl", BF16, quick=quick)
        yield norm_row(op, "dit_xl", BF16, direction="training")
        for direction in ("forward", "training"):
            options = {"direction": direction, "device": "cuda"}
            yield norm_row(op, "dit_xl_training", BF16, quick=quick, **options)
    yield norm_row("gated_residual_ada_layer_norm", "one_sample", quick=True)


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_norms(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
