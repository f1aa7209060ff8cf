"""Schedules, decompositions, and bad input of the flow."""

import math

import pytest
import torch
from torch import nn

from dfm_fast.flow import DecomposableFlow, Haar, Laplacian, StageSchedule

F64 = torch.float64

# --- Schedule ---


def test_schedule_of_two_stages():
    """[30, 10], tau = 0.1: t_1 = 1 - 0.03 k, then 0.1 - 0.01 j, while t_2 = 1 - 0.1 j."""
    t = StageSchedule([30, 10], 0.1).table()
    assert t.shape == (41, 2)
    k, j = torch.arange(30, dtype=F64), torch.arange(11, dtype=F64)
    expected_1 = torch.cat((1 - 0.03 * k, 0.10 - 0.01 * j))
    expected_2 = torch.cat((torch.ones(30, dtype=F64), 1 - 0.1 * j))
    torch.testing.assert_close(t, torch.stack((expected_1, expected_2), 1), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("steps", "threshold"),
    [
        ((10,), 0.1),
        ((7, 5, 3), 0.2),
        ((4, 4, 4, 4), (0.3, 0.2, 0.1)),
        ((1, 1), 0.0),
        ((3, 2), (0.5, 0)),
    ],
)
def test_schedules_fall_from_one_to_zero(steps, threshold):
    schedule = StageSchedule(steps, threshold)
    t, active = schedule.table(), schedule.active()
    assert t.shape == (sum(steps) + 1, len(steps))
    assert (t[0] == 1).all()
    assert (t[-1].abs() < 1e-12).all()
    assert (t.diff(dim=0) <= 1e-12).all()
    taus = threshold if isinstance(threshold, tuple) else (threshold,) * len(steps)
    for s, stage in enumerate(schedule.stages):
        assert (t[: stage.start + 1, s] == 1).all()
        assert not active[: stage.start, s].any()
        assert active[stage.start :, s].all()
        if s + 1 < len(steps):
            assert t[stage.stop, s] == pytest.approx(taus[s], abs=1e-12)


@pytest.mark.parametrize(
    ("argument", "args", "error"),
    [
        ("steps", ([],), TypeError),
        ("steps", (3.0,), TypeError),
        ("steps[1]", ([3, 0],), ValueError),
        ("steps[0]", ([2.0, 3],), TypeError),
        ("threshold", ([3, 3], [0.1, 0.2]), ValueError),
        ("threshold", ([3, 3, 3], [0.1]), ValueError),
        ("threshold", ([3, 3], 1.0), ValueError),
        ("threshold", ([3, 3], -0.1), ValueError),
        ("threshold", ([3, 3], "0.1"), TypeError),
    ],
)
def test_bad_schedules(argument, args, error):
    with pytest.raises(error, match=r"StageSchedule: ") as caught:
        StageSchedule(*args)
    assert f"StageSchedule: {argument}: expected " in str(caught.value)
    assert ", got " in str(caught.value)


# --- Decompositions ---


@pytest.mark.parametrize(
    ("decomposition", "shape"),
    [
        (Laplacian(1), (2, 3, 5, 7)),
        (Laplacian(3), (2, 3, 16, 24)),
        (Laplacian(2, "binomial"), (1, 2, 9, 11)),
        (Laplacian(2, "dct"), (1, 2, 16, 8)),
        (Laplacian(2, factor=4), (1, 2, 16, 8)),
        (Laplacian(2, "nearest", (1, 2, 2)), (1, 2, 3, 8, 8)),
        (Haar(1), (2, 3, 5, 7)),
        (Haar(3), (2, 3, 16, 24)),
        (Haar(2, 4), (2, 3, 16, 8)),
        (Haar(3, 4), (1, 1, 32, 16)),
        (Haar(2), (2, 3, 5, 8, 8)),
        (Haar(2, 4), (2, 3, 2, 8, 8)),
    ],
    ids=str,
)
def test_decompositions_invert_and_standardise(decomposition, shape):
    x = 3 + torch.randn(shape, dtype=F64)
    levels = decomposition.build(x)
    assert [tuple(v.shape) for v in levels] == decomposition.shapes(shape)
    torch.testing.assert_close(decomposition.collapse(levels), x, atol=1e-12, rtol=0)
    if isinstance(decomposition, Haar):  # orthonormal and critically sampled
        assert sum(v.numel() for v in levels) == x.numel()
        energy = sum(v.square().sum() for v in levels)
        torch.testing.assert_close(energy, x.square().sum())
    std = decomposition.measure_std([x, x[:1] - 1])
    both = torch.cat((x, x[:1] - 1))
    want = [v.std(unbiased=False).item() for v in decomposition.split(both)]
    assert std == pytest.approx(want, rel=1e-9)
    for v in decomposition.build(both):
        assert v.std(unbiased=False).item() == pytest.approx(1, rel=1e-9)
    torch.testing.assert_close(
        decomposition.collapse(decomposition.build(x)), x, atol=1e-11, rtol=0
    )
    decomposition.set_std(None)


def test_std_is_saved_with_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = DecomposableFlow(Laplacian(2))

    source, target = Model(), Model()
    source.flow.decomposition.measure_std([torch.randn(4, 1, 8, 8)])
    source.flow.calls = 7
    assert "flow.decomposition.std" in source.state_dict()
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 1, 8, 8)
    for a, b in zip(
        source.flow.decomposition.build(x), target.flow.decomposition.build(x), strict=True
    ):
        assert torch.equal(a, b)
    assert target.flow.calls == 7
    # What a checkpoint does not hold stays; that it is missing is said.
    kept = source.flow.decomposition.std.tolist()
    with pytest.raises(RuntimeError, match="std"):
        source.load_state_dict(Model().state_dict())
    source.load_state_dict({}, strict=False)
    assert source.flow.decomposition.std.tolist() == kept


@pytest.mark.parametrize("decomposition", [Haar(2, 4), Haar(2)], ids=str)
def test_level_by_level_is_the_fused_form(decomposition):
    """What serves any decomposition gives the noise, loss and gradients of the fused operators."""
    fused = Haar(3, std=[2.0, 0.5, 1.5])
    x, t = torch.randn(3, 2, 8, 8, requires_grad=True), torch.rand(3, 3)
    generic = super(Haar, fused)
    for active in (None, [True, True, False], torch.tensor([[True, False, True]] * 3)):
        a = fused.add_noise(x, t, 5, active=active)
        b = generic.add_noise(x, t, 5, active=active)
        for p, q in zip(a[0] + a[1], b[0] + b[1], strict=True):
            assert (p is None) == (q is None)
            if p is not None:
                torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)
        guesses = [None if v is None else torch.randn_like(v) for v in a[0]]
        losses = [f.loss(guesses, x, 5, active=active) for f in (fused, generic)]
        torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
        grads = [torch.autograd.grad(loss.sum(), x)[0] for loss in losses]
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
    video = torch.randn(2, 2, 3, 8, 8)
    noisy, v = decomposition.add_noise(video, torch.zeros(2, 2), 5)
    for level, got, target in zip(decomposition.build(video), noisy, v, strict=True):
        torch.testing.assert_close(got, level)
        assert target.shape == level.shape


# --- Bad input ---


def bad_loss(flow=None, model=None, x=None, **options):
    flow = flow or DecomposableFlow(Laplacian(2), stage_probs=[0.0, 1.0])
    model = model or (lambda levels, t, active: levels)
    return lambda: flow.loss(model, torch.zeros(2, 1, 8, 8) if x is None else x, **options)


def bad_sample(flow=None, model=None, shape=(2, 1, 8, 8), steps=(2, 2), **options):
    flow = flow or DecomposableFlow(Laplacian(2))
    return lambda: flow.sample(
        model or (lambda levels, t, active: levels), shape, steps=steps, **options
    )


def nan_in_second(levels, t, active):
    return [v if v is None or t[0, 0] > 0.1 else v * math.nan for v in levels]


CHECKED = DecomposableFlow(Laplacian(2), stage_probs=[0.0, 1.0], check=True)
BAD = [
    ("DecomposableFlow", "decomposition", TypeError, lambda: DecomposableFlow("laplacian")),
    (
        "DecomposableFlow",
        "stage_probs",
        ValueError,
        lambda: DecomposableFlow(Laplacian(2), stage_probs=[0.5, 0.6]),
    ),
    (
        "DecomposableFlow",
        "stage_probs",
        ValueError,
        lambda: DecomposableFlow(Laplacian(2), stage_probs=[1.0]),
    ),
    (
        "DecomposableFlow",
        "stage_probs",
        ValueError,
        lambda: DecomposableFlow(Laplacian(2), stage_probs=[1.5, -0.5]),
    ),
    (
        "DecomposableFlow",
        "stage_probs",
        TypeError,
        lambda: DecomposableFlow(Laplacian(2), stage_probs=0.9),
    ),
    ("Laplacian", "num_levels", ValueError, lambda: Laplacian(0)),
    ("Laplacian", "filter", ValueError, lambda: Laplacian(2, "haar")),
    ("Laplacian", "std", ValueError, lambda: Laplacian(2, std=[1.0])),
    ("Haar", "factor", ValueError, lambda: Haar(2, 3)),
    ("Haar", "shape", ValueError, lambda: Haar(3).shapes((1, 1, 6, 8))),
    ("Laplacian.measure_std", "batches", ValueError, lambda: Laplacian(2).measure_std([])),
    ("DecomposableFlow.loss", "x", TypeError, bad_loss(x="x")),
    ("DecomposableFlow.loss", "x", ValueError, bad_loss(x=torch.zeros(3, 4))),
    ("DecomposableFlow.loss", "seed", TypeError, bad_loss(seed=0.5)),
    ("DecomposableFlow.loss", "seed", TypeError, bad_loss(seed=torch.zeros(2))),
    ("DecomposableFlow.loss", "seed", ValueError, bad_loss(seed=torch.tensor([1, 2, 3]))),
    (
        "DecomposableFlow.loss",
        "model",
        TypeError,
        bad_loss(model=lambda levels, t, active: levels[0]),
    ),
    (
        "DecomposableFlow.loss",
        "model",
        ValueError,
        bad_loss(model=lambda levels, t, active: levels[:1]),
    ),
    (
        "DecomposableFlow.loss",
        "model",
        TypeError,
        bad_loss(model=lambda levels, t, active: [None, None]),
    ),
    (
        "DecomposableFlow.loss",
        "model",
        ValueError,
        bad_loss(model=lambda levels, t, active: levels[::-1]),
    ),
    (
        "DecomposableFlow.loss",
        "model",
        ValueError,
        bad_loss(CHECKED, lambda levels, t, active: [v * math.inf for v in levels]),
    ),
    ("DecomposableFlow.sample", "model", ValueError, bad_sample(CHECKED, nan_in_second)),
    ("DecomposableFlow.sample", "steps", ValueError, bad_sample(steps=(3,))),
    ("StageSchedule", "threshold", ValueError, bad_sample(threshold=(0.1, 0.1))),
    ("DecomposableFlow.sample", "solver", ValueError, bad_sample(solver="rk4")),
    ("DecomposableFlow.sample", "uncond", ValueError, bad_sample(cfg_scale=2.0)),
    ("DecomposableFlow.sample", "uncond", TypeError, bad_sample(cfg_scale=2.0, uncond=3)),
    ("DecomposableFlow.sample", "cfg_scale", TypeError, bad_sample(cfg_scale="2")),
    ("DecomposableFlow.sample", "cfg_interval", ValueError, bad_sample(cfg_interval=(0.5, 0.1))),
    ("DecomposableFlow.sample", "cfg_interval", ValueError, bad_sample(cfg_interval=0.5)),
    ("DecomposableFlow.sample", "dtype", TypeError, bad_sample(dtype=torch.int32)),
    ("DecomposableFlow.sample", "cuda_graph", ValueError, bad_sample(cuda_graph=True)),
    ("DecomposableFlow.sample", "seed", TypeError, bad_sample(seed="1")),
    ("Laplacian", "shape", ValueError, bad_sample(shape=(1, 8, 8))),
    ("laplacian_build", "x", ValueError, bad_sample(shape=(1, 1, 7, 8))),
]


@pytest.mark.parametrize(
    ("op", "argument", "error", "call"), BAD, ids=lambda v: v if isinstance(v, str) else ""
)
def test_bad_input_is_one_clear_error(op, argument, error, call):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert f"{op}: {argument}: expected " in message
    assert ", got " in message


def test_checking_names_level_and_step():
    with pytest.raises(ValueError, match="finite velocities of level 0 in step 2"):
        bad_sample(CHECKED, nan_in_second)()
