"""DFM transformers: rows only; the measuring is in harness.py. Rivals are the same network with its
parameters, written out in plain torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import Rival, Row, compile_
from dfm_fast.flow import DecomposableFlow, Graphs, Laplacian
from dfm_fast.models import DFM_B, DFM_S, DFM_XL, DFMTransformer
from dfm_fast.models._functions import sincos_2d
from dfm_fast.models.dfm_plain import plain_forward

F32, BF16 = torch.float32, torch.bfloat16

# name: (model, batch, sides of the levels). Latents of pictures of 256 and 512 px.
MODELS = {
    "dfm_s_256": (DFM_S, 4, (16, 32)),
    "dfm_b_256": (DFM_B, 2, (16, 32)),
    "dfm_xl_512": (DFM_XL, 8, (32, 64)),
}
# Steps of a row of sampling: on a CPU a quarter of the usual 40.
STEPS = {"cpu": (7, 3), "cuda": (30, 10)}


class Written(nn.Module):
    """The same parameters, in plain torch."""

    def __init__(self, model: DFMTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, levels: Sequence[Tensor], t: Tensor, active: Tensor | None = None
    ) -> list[Tensor | None]:
        return plain_forward(self.model, levels, t, active)


class Sampling(nn.Module):
    """One sample by the library's loop, for all: the model is what differs. On a GPU its graphs are
    kept from call to call."""

    def __init__(self, network: nn.Module, side: int, steps: Sequence[int]) -> None:
        super().__init__()
        self.network, self.shape, self.steps = network, (1, 4, side, side), steps
        self.flow = DecomposableFlow(Laplacian(2))
        # Of each dtype: those of another kind would replace them.
        self.graphs: dict[torch.dtype, Graphs] = defaultdict(Graphs)

    @torch.no_grad()
    def forward(self) -> Tensor:
        w = next(self.network.parameters())
        options = {"steps": self.steps, "seed": 0, "device": w.device, "dtype": w.dtype}
        options["cuda_graph"] = self.graphs[w.dtype] if w.is_cuda else None
        return self.flow.sample(self.network, self.shape, **options)


def call(module: nn.Module, prefix: str, names: Sequence[str]) -> Callable[..., list[Any]]:
    """The module as a function of coarse, fine, t, its table of positions and its parameters."""

    def run(coarse: Tensor, fine: Tensor, t: Tensor, *state: Tensor) -> list[Tensor | None]:
        given = {prefix + name: v for name, v in zip(names, state, strict=True)}
        return torch.func.functional_call(module, given, ([coarse, fine], t))

    return run


def prepared(name: str) -> tuple[DFMTransformer, dict[str, Tensor]]:
    """The model with no memory, and what a row gives it: positions and parameters."""
    make, _, sides = MODELS[name]
    with torch.device("meta"):
        model = make(input_size=(sides[0],) * 2).eval()
    return model, {"position_table": model.position_table, **dict(model.named_parameters())}


def given_to(model: DFMTransformer, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Weights that keep the magnitude, small biases and embeddings."""
    weights = [w / math.sqrt(w.shape[-1]) if w.ndim == 2 else 0.1 * w for w in inputs[1:]]
    return [sincos_2d(*model.input_size, model.hidden_size), *weights]


def model_row(name: str, dtype: torch.dtype = F32, **options: Any) -> Row:
    _, batch, sides = MODELS[name]
    model, state = prepared(name)
    levels = tuple((batch, 4, side, side) for side in sides)
    shapes = (*levels, (batch, 2), *(tuple(v.shape) for v in state.values()))

    def adapt(inputs: list[Tensor]) -> list[Tensor]:
        return [*inputs[:2], inputs[2].sigmoid(), *given_to(model, inputs[3:])]

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
        whole=options.get("direction") == "training",
        **options,
    )


def sampling_row(name: str, dtype: torch.dtype = F32, device: str = "cpu", **options: Any) -> Row:
    """A batch of one. The loop itself does not compile: the rival's model does."""
    make, _, sides = MODELS[name]
    model, state = prepared(name)
    shapes = tuple(tuple(v.shape) for v in state.values())
    result = (1, 4, sides[-1], sides[-1])

    def sampling(network: nn.Module, prefix: str) -> Callable[..., Tensor]:
        loop = Sampling(network, sides[-1], STEPS[device])
        names = [f"network.{prefix}{name}" for name in state]

        def run(*given: Tensor) -> Tensor:
            return torch.func.functional_call(loop, dict(zip(names, given, strict=True)), ())

        return run

    def compiled(table: Tensor, *weights: Tensor) -> Callable[[], Tensor]:
        own = make(input_size=model.input_size).eval()
        own.load_state_dict(dict(zip(list(state)[1:], weights, strict=True)), False, assign=True)
        own.position_table = table
        network = compile_(Written(own), table.device.type)
        return Sampling(network, sides[-1], STEPS[device])

    plain = sampling(Written(model), "model.")
    weights = sum(map(math.prod, shapes))
    return Row(
        op="dfm_sampling",
        variant="steps_" + "_".join(map(str, STEPS[device])),
        case=name,
        shapes=shapes,
        ours=sampling(model, ""),
        reference=plain,
        least_bytes=(sum(STEPS[device]) * weights + math.prod(result)) * dtype.itemsize,
        eager=plain,
        compiled={},
        rivals={"compiled model": Rival(compiled)},
        dtype=dtype,
        adapt=lambda inputs: given_to(model, inputs),
        device=device,
        **options,
    )


def rows() -> Iterator[Row]:
    yield model_row("dfm_s_256", direction="training", quick=True)
    yield model_row("dfm_s_256")
    yield sampling_row("dfm_s_256")
    yield model_row("dfm_b_256", direction="training")
    yield sampling_row("dfm_b_256")
    yield sampling_row("dfm_xl_512", BF16, "cuda", quick=True)
    yield model_row("dfm_xl_512", BF16, direction="training", device="cuda", quick=True)


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_models(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
