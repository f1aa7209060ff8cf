"""SnapGen's UNet: rows only; the measuring is in harness.py. Its rival is diffusers' model of the
same graph and weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_acceleration import CASES, call, unet, weights
from benchmarks.harness import Row
from dfm_fast.models import SnapGenUNet, snapgen_from_dreamlite

F32, BF16 = torch.float32, torch.bfloat16


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


def rows() -> Iterator[Row]:
    """Beside diffusers' model, where it is installed."""
    try:
        for cached in (False, True):
            yield unet_row("snapgen_512", BF16, cached)
            yield unet_row("snapgen_512", F32, cached)
            yield unet_row("snapgen_1024", BF16, cached, device="cuda", quick=cached)
        yield unet_row("snapgen_1024_8", BF16, True, device="cuda")
    except ImportError:
        return


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_snapgen(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
