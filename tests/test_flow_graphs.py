"""`Graphs`: CUDA graphs of a sampler's steps that outlive a call."""

import contextlib

import pytest
import torch
from helpers import recorded

from dfm_fast.flow import Graphs, Laplacian, StageSchedule, sampler


class Conditional(torch.nn.Module):
    """`conditional`, with a parameter, a list of conditions, and something computed ahead."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7))

    def modulation_table(self, t, active, *, y, more):
        return (t[:, :1].sum(-1) * y[0]).unsqueeze(-1).expand(-1, t.shape[1], -1)

    def forward(self, levels, t, active, *, y, more, modulations):
        shift = (y * self.weight + more[0]).view(-1, 1, 1, 1) + modulations.view(-1, 1, 1, 1)
        return [None if v is None else v.sin() + shift for v in levels]


@torch.no_grad()
def kept_sample(graphs, model, count=2, steps=(3, 2), scale=2.0, seed=1, y=(1.0, 2.0), **options):
    """What `DecomposableFlow.sample` does, also on a CPU: (samples, previews)."""
    decomposition, device, dtype = Laplacian(count), torch.device("cpu"), torch.float32
    y, previews = torch.tensor(y), []
    cond = {"y": y, "more": [y / 2, "a text"]}
    uncond = {"y": torch.zeros_like(y), "more": [-y, "a text"]}
    guidance = sampler.Guidance("op", scale, uncond, (0.1, 0.6))
    solver = options.get("solver", "euler")
    what = "op", model, decomposition, StageSchedule(steps), guidance, solver, cond
    keep = lambda stage, x: previews.append(x)  # noqa: E731
    run = sampler.Sampler(*what, False, keep, None, None)
    shapes = decomposition.shapes((2, 1, 8, 8))
    if graphs is not None:
        run = graphs.keep(run, tuple(shapes), device, dtype)
    return run(shapes, seed, device, dtype, False, graphs is not None), previews


@pytest.mark.parametrize(
    "options", [{}, {"solver": "heun"}, {"count": 1, "steps": (4,)}, {"scale": 1.0}]
)
def test_kept_graphs_serve_calls_of_their_kind(options, monkeypatch):
    """Graphs are recordings of the calls, which read and write the memory they were made with."""
    captures = []
    count = lambda call, state: captures.append(1) or recorded(call, state)  # noqa: E731
    monkeypatch.setattr(sampler, "capture", count)
    model, graphs, found = Conditional(), Graphs(), []
    found.append((kept_sample(graphs, model, **options), {}))
    first = len(captures)
    for change in ({"seed": 2}, {"seed": 3, "y": (5.0, -1.0)}):
        found.append((kept_sample(graphs, model, **options, **change), change))
    assert len(captures) == first > 0
    with torch.no_grad():
        model.weight.mul_(2)
    found.append((kept_sample(graphs, model, **options, seed=5), None))
    assert len(captures) == first
    for (got, previews), change in found:  # none of them was written over
        with torch.no_grad():
            model.weight.fill_(0.7 if change is not None else 1.4)
        given = {"seed": 5} if change is None else change
        want, wanted = kept_sample(None, model, **options, **given)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
        for a, b in zip(previews, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"steps": (3, 3)}, {"scale": 3.0}, {"solver": "heun"}, {"y": (1.0, 2.0, 3.0)}, "memory"],
)
def test_graphs_of_another_kind_are_captured(change, monkeypatch):
    captures = []
    monkeypatch.setattr(sampler, "capture", lambda call, _: captures.append(1) or call)
    model, graphs = Conditional(), Graphs()
    kept_sample(graphs, model)
    first = len(captures)
    if change == "memory":
        model.weight.data = model.weight.data.clone()
        change = {}
    with contextlib.suppress(RuntimeError):  # three labels for a batch of two
        kept_sample(graphs, model, **change)
    assert len(captures) > first
    again = len(captures)
    graphs.clear()
    kept_sample(graphs, model)
    assert len(captures) > again
