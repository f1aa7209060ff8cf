"""`dfm_fast.accelerate` on models of diffusers: rows only; the measuring is in harness.py.

The rival is the same model as it comes, eager and compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import Row
from dfm_fast import accelerate

F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A configuration of `DreamLiteUNetModel`, and what it is given."""

    sample: tuple[int, ...]  # latents
    text: tuple[int, ...]
    config: tuple[tuple[str, Any], ...]


# SnapGen's UNet as diffusers has it: 384 M parameters.
SNAPGEN = (
    ("in_channels", 16),
    ("out_channels", 16),
    ("block_out_channels", (256, 512, 896)),
    ("transformer_layers_per_block", (1, 2, 4)),
    ("attention_head_dim", (4, 8, 14)),  # diffusers' name for the number of heads
    ("ff_mult", 3),
    ("cross_attention_dim", 2304),
    ("use_linear_projection", True),
)
# The same graph, thin, for a smoke test.
THIN = {
    **dict(SNAPGEN),
    "block_out_channels": (32, 64, 96),
    "transformer_layers_per_block": 1,
    "attention_head_dim": (1, 2, 3),
    "cross_attention_dim": 24,
}
CASES = {
    "thin": Case((1, 16, 8, 8), (1, 4, 24), tuple(THIN.items())),
    "snapgen_512": Case((1, 16, 64, 64), (1, 77, 2304), SNAPGEN),
    # With and without the text: one picture, and eight.
    "snapgen_1024": Case((2, 16, 128, 128), (2, 256, 2304), SNAPGEN),
    "snapgen_1024_8": Case((16, 16, 128, 128), (16, 256, 2304), SNAPGEN),
}


def unet(case: Case) -> nn.Module:
    """With no memory."""
    from diffusers.models.unets.unet_dreamlite import DreamLiteUNetModel

    with torch.device("meta"):
        return DreamLiteUNetModel(**dict(case.config)).eval().requires_grad_(False)


class AtTime(nn.Module):
    """Its velocity at one time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, text: Tensor) -> Tensor:
        return self.model(sample, 500, encoder_hidden_states=text, return_dict=False)[0]


def call(model: nn.Module, names: Sequence[str]) -> Callable[..., Tensor]:
    """The model as a function of latents, text and its parameters."""
    module = AtTime(model)

    def run(sample: Tensor, text: Tensor, *parameters: Tensor) -> Tensor:
        given = {f"model.{name}": p for name, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(module, given, (sample, text))

    return run


def weights(names: Sequence[str], normal: Sequence[Tensor]) -> list[Tensor]:
    """That keep the magnitude; small biases, and norms about 1."""
    scaled = [0.1 * p if p.ndim == 1 else p / math.sqrt(p[0].numel()) for p in normal]
    norms = ["norm" in name and name.endswith("weight") for name in names]
    return [1 + p if norm else p for p, norm in zip(scaled, norms, strict=True)]


def unet_row(name: str, dtype: torch.dtype = F32, **options: Any) -> Row:
    case = CASES[name]
    theirs, ours = unet(case), unet(case)
    accelerate(ours)
    names = [name for name, _ in theirs.named_parameters()]
    shapes = (case.sample, case.text, *(tuple(p.shape) for p in theirs.parameters()))
    plain = call(theirs, names)
    moved = sum(map(math.prod, shapes)) + math.prod(case.sample)
    return Row(
        op="accelerated_unet",
        variant="",
        case=name,
        shapes=shapes,
        ours=call(ours, names),
        reference=plain,
        least_bytes=moved * dtype.itemsize,  # in and out; the matrix products decide
        eager=plain,
        compiled={"diffusers": plain},
        dtype=dtype,
        adapt=lambda inputs: [*inputs[:2], *weights(names, inputs[2:])],
        **options,
    )


def rows() -> Iterator[Row]:
    """Of diffusers' model, where it is installed."""
    try:
        yield unet_row("snapgen_512", BF16)
        yield unet_row("snapgen_512", BF16, layout="channels_last")
        yield unet_row("snapgen_512")
        yield unet_row("snapgen_1024", BF16, device="cuda", quick=True)
        yield unet_row("snapgen_1024", BF16, device="cuda", layout="channels_last")
    except ImportError:
        return


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_acceleration(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
