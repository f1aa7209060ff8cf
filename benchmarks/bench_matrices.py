"""Linear layers of transformers in float32 on a CPU: rows only; the measuring is in harness.py.
Rivals are torch's, which is MKL's or oneDNN's as the build has it, and oneDNN's as Inductor calls
it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Rival, Row
from dfm_fast.nn._linears import linear

# name: (rows, inputs, outputs)
LINEARS = {
    "dit_s_qkv": (1024, 384, 1152),
    "dit_s_down": (1024, 1536, 384),
    "dit_b_qkv": (1024, 768, 2304),
    "dit_b_down": (1024, 3072, 768),
    "few_rows": (64, 768, 3072),
}


def onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear_row(name: str, direction: str) -> Row:
    rows, size, outputs = LINEARS[name]
    shapes = ((rows, size), (outputs, size), (outputs,))
    once = sum(map(math.prod, shapes)) + rows * outputs
    training = direction == "training"
    return Row(
        op="linear",
        variant="",
        case=name,
        shapes=shapes,
        ours=linear,
        reference=F.linear,
        least_bytes=4 * (2 if training else 1) * once,
        eager=F.linear,
        compiled={"linear": F.linear},
        rivals={} if training else {"onednn": Rival(partial(partial, onednn))},
        direction=direction,
        device="cpu",
        adapt=lambda inputs: [inputs[0], inputs[1] / math.sqrt(size), inputs[2]],
    )


def rows() -> Iterator[Row]:
    for name in LINEARS:
        for direction in ("forward", "training"):
            yield linear_row(name, direction)


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_matrices(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
