"""A step of distillation, student and teacher: rows only; the measuring is in harness.py. The rival
is both networks and the loss written out in plain torch. Small networks spend a quarter of a step
in Python, which `torch.compile` spares: so there is ours compiled, too, as `--compile` has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.bench_acceleration import weights
from benchmarks.harness import Row
from dfm_fast.models import SnapGenUNet, snapgen_tiny
from dfm_fast.models.snapgen_plain import plain_forward
from dfm_fast.training.distillation import sample_mse, scaled_loss

# name: (network, batch, side, tokens)
CASES: dict[str, tuple[Callable[[], SnapGenUNet], int, int, int]] = {
    "digits": (snapgen_tiny, 32, 16, 4),
    "latents_32": (
        lambda: SnapGenUNet(16, (128, 256, 384), (0, 1, 1), (2, 4, 6), cross_dim=768, rope=True),
        4, 32, 77,
    ),
}  # fmt: skip


class Step(nn.Module):
    """S(task, kd) of a student, [N]: gradients of its parameters."""

    def __init__(self, make: Callable[[], SnapGenUNet], plain: bool) -> None:
        super().__init__()
        self.student, self.teacher, self.plain = make(), make(), plain

    def forward(self, x_t: Tensor, t: Tensor, v: Tensor, text: Tensor) -> Tensor:
        call = plain_forward if self.plain else lambda model, *given: model(*given)
        with torch.no_grad():
            taught = call(self.teacher, x_t, t, text)
        said = call(self.student, x_t, t, text)
        return (plain_loss if self.plain else fused_loss)(said, v, taught, t)


def fused_loss(said: Tensor, v: Tensor, taught: Tensor, t: Tensor) -> Tensor:
    return scaled_loss(*sample_mse(said, v, taught), t)


def plain_loss(said: Tensor, v: Tensor, taught: Tensor, t: Tensor) -> Tensor:
    task, kd = ((said - target).square().flatten(1).mean(1) for target in (v, taught))
    a = torch.exp(-t.logit().square() / 2) / (4 * t * (1 - t))
    return a * task + (1 - a) * (task / kd).detach() * kd


def step_row(name: str, variant: str = "", **options: Any) -> Row:
    make, batch, side, tokens = CASES[name]
    with torch.device("meta"):
        ours, plain = (Step(make, written) for written in (False, True))
    state = dict(ours.named_parameters())
    maps = (batch, ours.student.in_channels, side, side)
    given = (maps, (batch,), maps, (batch, tokens, ours.student.config["cross_dim"]))
    shapes = (*given, *(tuple(p.shape) for p in state.values()))
    frozen = (0, 1, 2, 3, *(4 + i for i, n in enumerate(state) if n.startswith("teacher.")))

    def of(module: Step) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            values = dict(zip(state, inputs[4:], strict=True))
            return torch.func.functional_call(module, values, inputs[:4])

        return run

    def adapt(inputs: list[Tensor]) -> list[Tensor]:
        x_t, t, v, text = inputs[:4]
        return [x_t, t.sigmoid(), v, text, *weights(list(state), inputs[4:])]

    return Row(
        op="distillation_step",
        variant=variant,
        case=name,
        shapes=shapes,
        ours=torch.compile(of(ours)) if variant else of(ours),
        reference=of(plain),
        least_bytes=sum(map(math.prod, shapes)) * 4,  # in; the products decide
        eager=of(plain),
        compiled={"written out": of(plain)},
        direction="training",
        whole=True,
        frozen=frozen,
        adapt=adapt,
        **options,
    )


def rows() -> Iterator[Row]:
    yield step_row("digits")
    yield step_row("digits", "compiled")
    yield step_row("latents_32")


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_distillation(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
