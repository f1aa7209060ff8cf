"""SnapGen's decoder and its residual blocks: rows only; the measuring is in harness.py. The rivals
are the same written out in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Row
from benchmarks.shapes import RESIDUALS
from dfm_fast.models import SnapGenDecoder, snapgen_decoder_plain
from dfm_fast.ops import residuals

F32, BF16 = torch.float32, torch.bfloat16
# Latents that the decoder makes pictures of.
PICTURES = {"pixels_512": (1, 16, 64, 64), "pixels_1024": (1, 16, 128, 128)}


# --- A residual block -----------------------------------------------------------------------------


def written_out(
    x: Tensor, d1: Tensor, p1: Tensor, b1: Tensor, d2: Tensor, p2: Tensor, b2: Tensor
) -> Tensor:
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


def rows() -> Iterator[Row]:
    for layout in ("channels_last", "contiguous"):
        for dtype in (F32, BF16):
            yield decoder_row("pixels_512", layout, dtype, device="cpu")
    yield decoder_row("pixels_1024", "channels_last", BF16, device="cuda", quick=True)
    for dtype in (F32, BF16):
        for name in ("decoder_32_512", "decoder_64_256", "decoder_128_128", "decoder_240_64"):
            yield residual_row(name, dtype, quick=name == "decoder_64_256")
    yield residual_row("large_decoder_32", BF16, device="cuda", quick=True)
    yield residual_row("large_decoder_64", BF16, device="cuda")


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_decoders(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
