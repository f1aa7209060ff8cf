"""Whole models: rows only; the measuring is in harness.py. Rivals are the same network with its
parameters, written out in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import Row
from dfm_fast.models import DFM_S, DFM_XL, DFMTransformer
from dfm_fast.models._functions import sincos_2d
from dfm_fast.models.dfm_plain import plain_forward

F32, BF16 = torch.float32, torch.bfloat16

# name: (model, batch, sides of the levels). Latents of pictures of 256 and 512 px.
MODELS = {
    "dfm_s_256": (DFM_S, 4, (16, 32)),
    "dfm_xl_512": (DFM_XL, 8, (32, 64)),
}


class Written(nn.Module):
    """The same parameters, in plain torch."""

    def __init__(self, model: DFMTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, levels: Sequence[Tensor], t: Tensor) -> list[Tensor | None]:
        return plain_forward(self.model, levels, t)


def call(module: nn.Module, prefix: str, names: Sequence[str]) -> Callable[..., list[Any]]:
    """The module as a function of coarse, fine, t, its table of positions and its parameters."""

    def run(coarse: Tensor, fine: Tensor, t: Tensor, *state: Tensor) -> list[Tensor | None]:
        given = {prefix + name: v for name, v in zip(names, state, strict=True)}
        return torch.func.functional_call(module, given, ([coarse, fine], t))

    return run


def model_row(name: str, dtype: torch.dtype = F32, **options: Any) -> Row:
    make, batch, sides = MODELS[name]
    with torch.device("meta"):
        model = make(input_size=(sides[0],) * 2).eval()
    state = {"position_table": model.position_table, **dict(model.named_parameters())}
    levels = tuple((batch, 4, side, side) for side in sides)
    shapes = (*levels, (batch, 2), *(tuple(v.shape) for v in state.values()))

    def adapt(inputs: list[Tensor]) -> list[Tensor]:
        """t from 0 to 1; weights that keep the magnitude, small biases and embeddings."""
        weights = [w / math.sqrt(w.shape[-1]) if w.ndim == 2 else 0.1 * w for w in inputs[4:]]
        table = sincos_2d(*model.input_size, model.hidden_size)
        return [*inputs[:2], inputs[2].sigmoid(), table, *weights]

    plain = call(Written(model), "model.", list(state))
    moved = sum(map(math.prod, shapes)) + sum(map(math.prod, levels))
    return Row(
        op="dfm",
        variant="",
        case=name,
        shapes=shapes,
        ours=call(model, "", list(state)),
        reference=plain,
        least_bytes=moved * dtype.itemsize,  # in and out; the matrix products decide
        eager=plain,
        compiled={"written out": plain},
        dtype=dtype,
        frozen=(0, 1, 2, 3),
        adapt=adapt,
        **options,
    )


def rows() -> Iterator[Row]:
    yield model_row("dfm_s_256", direction="training", quick=True)
    yield model_row("dfm_s_256")
    yield model_row("dfm_xl_512", BF16, direction="training", device="cuda", quick=True)


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_models(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
