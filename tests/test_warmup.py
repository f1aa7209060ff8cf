"""A warm-up calls the model once and changes nothing. Who chose its tiles: see test_tuning.py."""

import pytest
import torch
from torch import nn

import dfm_fast
from dfm_fast._library import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="the same in every backend")


class Model(nn.Module):
    """Uses random numbers, a running statistic, and lists of levels."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.calls = []

    def forward(self, levels, t, active=None):
        self.calls.append((levels, t, active, torch.is_grad_enabled()))
        x = nn.functional.dropout(self.norm(self.linear(levels[0])), training=self.training)
        return [x * t[:, None], None]


def state(model):
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return {k: v.clone() for k, v in model.state_dict().items()}, grads, model.training


def assert_same(a, b):
    torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_warm_up_changes_nothing(backward, training):
    model = Model().train(training)
    model.linear.weight.grad = torch.ones(8, 8)
    before, rng = state(model), torch.get_rng_state()
    active = torch.ones(4, 2, dtype=torch.bool)
    report = dfm_fast.warmup(model, [(4, 8), None], (4,), active=active, backward=backward)
    assert_same(state(model), before)
    assert_same(torch.get_rng_state(), rng)
    ((levels, t, given, grad),) = model.calls
    assert levels[0].shape == (4, 8)
    assert levels[0].std() > 0.5
    assert levels[1] is None
    assert t.shape == (4,)
    assert given is active
    assert grad == backward
    assert report.seconds > 0
    assert report.compiled == report.timed == 0
    assert report.tiles == {}


def test_inputs_are_like_the_model():
    model = nn.Linear(3, 3).double()
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    dfm_fast.warmup(model, (2, 3))
    x = torch.zeros(2, 3, dtype=torch.float64)
    dfm_fast.warmup(model, x)
    assert seen[0].dtype == torch.float64
    assert seen[1] is x


def test_ints_are_passed_on_as_they_are():
    seen = []
    dfm_fast.warmup(lambda *args, **kwargs: seen.append((args, kwargs)), 3, 4, steps=[1, 2])
    assert seen == [((3, 4), {"steps": [1, 2]})]


def test_errors_of_the_model_pass_through_and_change_nothing():
    model = Model().train()
    before, rng = state(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="size of tensor a"):
        dfm_fast.warmup(model, [(4, 8)], (3,))
    assert len(model.calls) == 1
    assert_same(state(model), before)
    assert_same(torch.get_rng_state(), rng)


@pytest.mark.parametrize(
    ("argument", "error", "call"),
    [
        ("inputs", ValueError, lambda: dfm_fast.warmup(nn.Linear(2, 2))),
        ("model", TypeError, lambda: dfm_fast.warmup(3, (2, 2))),
        ("model", TypeError, lambda: dfm_fast.warmup(torch.relu, (2, 2), backward=True)),
        ("backward", ValueError, lambda: dfm_fast.warmup(nn.ReLU(), (2, 2), backward=True)),
    ],
)
def test_bad_calls_of_warmup(argument, error, call):
    with pytest.raises(error, match=f"^warmup: {argument}: expected .*, got "):
        call()


def test_a_pipeline_is_warmed_up_by_its_own_sizes():
    class Pipeline:
        device, dtype = "cpu", torch.float64

        def __call__(self, prompt, *, num_inference_steps):
            self.given = prompt, num_inference_steps

    pipeline = Pipeline()
    dfm_fast.warmup(pipeline, "a cat", num_inference_steps=1)
    assert pipeline.given == ("a cat", 1)
