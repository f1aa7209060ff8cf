"""SnapGen's UNet and decoder: rows only; the measuring is in harness.py. The UNet's rival is
diffusers' model of the same graph and weights, the decoder's is itself written out in plain
torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.bench_acceleration import CASES, call, unet, weights
from benchmarks.harness import Row
from dfm_fast.models import (
    SnapGenDecoder,
    SnapGenUNet,
    snapgen_decoder_plain,
    snapgen_from_dreamlite,
)

F32, BF16 = torch.float32, torch.bfloat16
# Latents that SnapGen's decoder makes pictures of.
PICTURES = {"pixels_512": (1, 16, 64, 64), "pixels_1024": (1, 16, 128, 128)}


# --- The UNet -------------------------------------------------------------------------------------


def velocity(name: str, cached: bool) -> Callable[..., Tensor]:
    """`SnapGenUNet` as a function of latents, text and parameters; a model of its own, as its
    weights lie side by side in memory, for each set of them. Cached: what a sampler knows before
    the first step is computed ahead."""
    built: dict[int, tuple[SnapGenUNet, dict[str, Any]]] = {}
    theirs = unet(CASES[name])
    names = [n for n, _ in theirs.named_parameters()]

    def run(sample: Tensor, text: Tensor, *parameters: Tensor) -> Tensor:
        key = parameters[0].data_ptr()
        t = torch.full(sample.shape[:1], 0.5, device=sample.device)
        if key not in built:
            own = snapgen_from_dreamlite(theirs)
            own.load_state_dict(dict(zip(names, parameters, strict=True)), assign=True)
            own.requires_grad_(False).to(memory_format=torch.channels_last)
            known = {"text": own.key_values(text), "shifts": own.time_shifts(t)} if cached else {}
            built[key] = own, known
        own, known = built[key]
        return own(sample, **known) if cached else own(sample, t, text)

    return run


def unet_row(name: str, dtype: torch.dtype, cached: bool, **options: Any) -> Row:
    case = CASES[name]
    theirs = unet(case)
    names = [name for name, _ in theirs.named_parameters()]
    shapes = (case.sample, case.text, *(tuple(p.shape) for p in theirs.parameters()))
    plain = call(theirs, names)
    return Row(
        op="snapgen_unet",
        variant="cached" if cached else "",
        case=name,
        shapes=shapes,
        ours=velocity(name, cached),
        reference=plain,
        least_bytes=(sum(map(math.prod, shapes)) + math.prod(case.sample)) * dtype.itemsize,
        eager=plain,
        compiled={"diffusers": plain},
        dtype=dtype,
        layout="channels_last",
        adapt=lambda inputs: [*inputs[:2], *weights(names, inputs[2:])],
        **options,
    )


# --- The decoder ----------------------------------------------------------------------------------


class WrittenDecoder(nn.Module):
    """The same parameters, in plain torch."""

    def __init__(self, model: SnapGenDecoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> Tensor:
        return snapgen_decoder_plain.plain_forward(self.model, latents)


def decoder_row(name: str, layout: str, dtype: torch.dtype, **options: Any) -> Row:
    with torch.device("meta"):
        model = SnapGenDecoder().eval()
    state = dict(model.named_parameters())
    shapes = (PICTURES[name], *(tuple(p.shape) for p in state.values()))
    n, _, h, w = shapes[0]

    def of(module: nn.Module, prefix: str) -> Callable[..., Tensor]:
        names = [prefix + name for name in state]

        def run(latents: Tensor, *weights: Tensor) -> Tensor:
            given = dict(zip(names, weights, strict=True))
            return torch.func.functional_call(module, given, (latents,))

        return run

    def adapt(inputs: list[Tensor]) -> list[Tensor]:
        """Weights that keep the magnitude, small biases."""
        weights = inputs[1:]
        return [
            inputs[0],
            *(v / math.sqrt(v[0].numel()) if v.ndim == 4 else 0.1 * v for v in weights),
        ]

    plain = of(WrittenDecoder(model), "model.")
    pictures = n * 3 * model.factor**2 * h * w
    return Row(
        op="snapgen_decoder",
        variant="",
        case=name,
        shapes=shapes,
        ours=of(model, ""),
        reference=plain,
        least_bytes=(sum(map(math.prod, shapes)) + pictures) * dtype.itemsize,  # in and out
        eager=plain,
        compiled={"written out": plain},
        dtype=dtype,
        layout=layout,
        adapt=adapt,
        **options,
    )


# --- Rows -----------------------------------------------------------------------------------------


def unet_rows() -> Iterator[Row]:
    """Beside diffusers' model, where it is installed."""
    try:
        for cached in (False, True):
            yield unet_row("snapgen_512", BF16, cached)
            yield unet_row("snapgen_512", F32, cached)
            yield unet_row("snapgen_1024", BF16, cached, device="cuda", quick=cached)
        yield unet_row("snapgen_1024_8", BF16, True, device="cuda")
    except ImportError:
        return


def rows() -> Iterator[Row]:
    yield from unet_rows()
    for layout in ("channels_last", "contiguous"):
        for dtype in (F32, BF16):
            yield decoder_row("pixels_512", layout, dtype, device="cpu")
    yield decoder_row("pixels_1024", "channels_last", BF16, device="cuda", quick=True)


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_snapgen(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
