"""Activations, and whole feed-forward layers: rows only; the measuring is in harness.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dfm_fast
from benchmarks.harness import Rival, Row
from benchmarks.shapes import FEED_FORWARDS, FeedForwardCase
from dfm_fast.nn import GEGLU, FeedForward
from dfm_fast.nn import activations as layers_module
from dfm_fast.ops import activations

F32, BF16 = torch.float32, torch.bfloat16


def gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What a user writes, and diffusers."""

    def run(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return a * activation(b)

    return run


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


WRITTEN = {"geglu": gated(F.gelu), "swiglu": gated(F.silu), "gelu_tanh": gelu_tanh}


def activation_row(op: str, name: str, dtype: torch.dtype = F32, **options: Any) -> Row:
    case = FEED_FORWARDS[name]
    biased = op == "gelu_tanh"
    width = case.inner if biased else 2 * case.inner
    shapes = ((*case.tokens, width), *([(width,)] if biased else []))
    x, y = math.prod(shapes[0]), math.prod(case.tokens) * case.inner
    small = width if biased else 0
    backward = options.get("direction") == "training"  # x and dy read, dx and dbias written more
    moved = x + y + small + (2 * x + y + 2 * small if backward else 0)
    return Row(
        op=op,
        variant="bias" if biased else "",
        case=name,
        shapes=shapes,
        ours=getattr(dfm_fast, op),
        reference=getattr(activations, f"{op}_ref"),
        least_bytes=moved * dtype.itemsize,
        eager=WRITTEN[op],
        compiled={"written out": WRITTEN[op]},
        dtype=dtype,
        **options,
    )


def layers(case: FeedForwardCase) -> Callable[..., Tensor]:
    """x, then weights and biases: what diffusers' FeedForward does."""
    activation = WRITTEN[case.activation]

    def run(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(activation(F.linear(x, w1, b1)), w2, b2)

    return run


def module(case: FeedForwardCase) -> Callable[..., Tensor]:
    """Ours, with the weights that it is given."""
    activation = {"gelu_tanh": "gelu-approximate"}.get(case.activation, case.activation)
    with torch.device("meta"):
        layer = FeedForward(case.dim, inner_dim=case.inner, activation_fn=activation)
    names = list(layer.state_dict())

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, given, (x,))

    return run


def like_trained(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Weights that keep the magnitude."""
    return [w / math.sqrt(w.shape[1]) if w.ndim == 2 else w for w in inputs]


def feed_forward_row(name: str, dtype: torch.dtype = F32, **options: Any) -> Row:
    case = FEED_FORWARDS[name]
    first = case.inner if case.activation == "gelu_tanh" else 2 * case.inner
    x = (*case.tokens, case.dim)
    shapes = (x, (first, case.dim), (first,), (case.dim, case.inner), (case.dim,))
    least = (sum(map(math.prod, shapes)) + math.prod(x)) * dtype.itemsize
    return Row(
        op="feed_forward",
        variant=case.activation,
        case=name,
        shapes=shapes,
        ours=module(case),
        reference=layers(case),
        least_bytes=least,
        eager=layers(case),
        compiled={"written out": layers(case)},
        dtype=dtype,
        adapt=like_trained,
        **options,
    )


def gated_linear_row(name: str, dtype: torch.dtype, **options: Any) -> Row:
    """The first layer alone, as one kernel against cuBLAS and `geglu`: what tables of
    tiles choose between."""
    case = FEED_FORWARDS[name]
    with torch.device("meta"):
        layer = GEGLU(case.dim, case.inner)

    def choose(choice: str) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            before, layers_module.ONE_KERNEL = layers_module.ONE_KERNEL, choice
            try:
                given = {"proj.weight": weight, "proj.bias": bias}
                return torch.func.functional_call(layer, given, (x,))
            finally:
                layers_module.ONE_KERNEL = before

        return run

    def written(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return WRITTEN["geglu"](F.linear(x, weight, bias))

    shapes = ((*case.tokens, case.dim), (2 * case.inner, case.dim), (2 * case.inner,))
    least = sum(map(math.prod, shapes)) + math.prod(case.tokens) * case.inner
    return Row(
        op="gated_linear",
        variant="geglu",
        case=name,
        shapes=shapes,
        ours=choose("1"),
        reference=written,
        least_bytes=least * dtype.itemsize,
        eager=written,
        compiled={"written out": written},
        rivals={"cublas": Rival(lambda *inputs: partial(choose("0"), *inputs))},
        dtype=dtype,
        adapt=like_trained,
        **options,
    )


def rows() -> Iterator[Row]:
    training = partial(activation_row, direction="training")
    yield activation_row("geglu", "snapgen", quick=True)
    yield activation_row("geglu", "snapgen", BF16)
    yield training("geglu", "snapgen")
    yield activation_row("swiglu", "snapgen")
    yield activation_row("gelu_tanh", "dit", quick=True)
    yield activation_row("gelu_tanh", "dit", BF16)
    yield training("gelu_tanh", "dit")
    yield feed_forward_row("snapgen", quick=True)
    yield feed_forward_row("snapgen", BF16)
    yield feed_forward_row("dit")
    for name in ("geglu", "swiglu"):
        yield activation_row(name, "large_snapgen", BF16, device="cuda", quick=True)
    yield activation_row("gelu_tanh", "large_dit", BF16, device="cuda", quick=True)
    yield training("geglu", "large_snapgen", BF16, device="cuda")
    yield training("gelu_tanh", "large_dit", BF16, device="cuda")
    yield feed_forward_row("large_snapgen", BF16, device="cuda", quick=True)
    yield gated_linear_row("large_snapgen", BF16, device="cuda", quick=True)
    yield gated_linear_row("snapgen_batch", BF16, device="cuda")
    yield gated_linear_row("snapgen", BF16, device="cuda")
    yield gated_linear_row("large_snapgen", torch.float16, device="cuda")


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_activations(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
