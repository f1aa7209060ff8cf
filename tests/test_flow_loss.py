"""The loss end to end, with no training: where the data is Gaussian the best prediction and its
loss are known. The checks are run again on losses with one thing wrong."""

import math

import pytest
import torch
from torch import nn

from dfm_fast.flow import DecomposableFlow, Haar, Laplacian

F64 = torch.float64


def test_stages_and_times_follow_their_distributions():
    flow = DecomposableFlow(Laplacian(3), stage_probs=[0.5, 0.3, 0.2], per_sample=True)
    x, seen = torch.zeros(20000, 1, 4, 4), {}

    def model(levels, t, active):
        seen.update(t=t, active=active)
        return [torch.zeros_like(v) for v in levels]

    flow.loss(model, x, seed=1)
    t, active = seen["t"], seen["active"]
    n, stage = len(t), active.sum(1) - 1
    for q, p in enumerate((0.5, 0.3, 0.2)):
        share = (stage == q).double().mean().item()
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)
        own = torch.special.logit(t[stage == q, q].double())
        assert abs(own.mean()) < 5 / math.sqrt(len(own))
        assert abs(own.std() - 1) < 5 / math.sqrt(2 * len(own))
        for s in range(q):
            earlier = torch.special.logit(t[stage == q, s].double())
            assert abs(earlier.mean() + 1.5) < 5 / math.sqrt(len(earlier))
            together = torch.corrcoef(torch.stack((own, earlier)))[0, 1]
            assert abs(together) < 5 / math.sqrt(len(own))
        assert (t[stage == q, q + 1 :] == 1).all()


def test_stages_per_batch_are_the_same_everywhere_and_resume():
    a, b = (DecomposableFlow(Laplacian(2), stage_probs=[0.6, 0.4], seed=4) for _ in range(2))
    x, model = torch.zeros(2, 1, 4, 4), lambda levels, t, active: levels

    def draw(flow, n):
        out = []
        for _ in range(n):
            out.append(flow.stages(2)[0])
            torch.rand(3)  # the global generator has no say
            flow.loss(model, x, seed=None)
        return out

    first = draw(a, 20)
    assert set(first) == {0, 1}
    assert draw(b, 10) == first[:10]
    resumed = DecomposableFlow(Laplacian(2), stage_probs=[0.6, 0.4])
    resumed.load_state_dict(b.state_dict())
    assert draw(resumed, 10) == first[10:]


def check_gaussian_loss():
    """x ~ N(0, S) on 4x4 images, dense S. Given t the best prediction is linear in the noisy
    levels, and its loss is known: the loss must come to it, sample by sample on average."""
    generator = torch.Generator().manual_seed(0)
    n, root = 3000, torch.randn(16, 16, generator=generator, dtype=F64) / 4
    x = (torch.randn(n, 16, generator=generator, dtype=F64) @ root.T).view(n, 1, 4, 4)
    decomposition = Laplacian(2)
    flow = DecomposableFlow(decomposition, stage_probs=[0.0, 1.0])
    maps = [v.flatten(1).T for v in decomposition.split(torch.eye(16, dtype=F64).view(16, 1, 4, 4))]
    cov = root @ root.T
    sizes = [4, 16]
    levels_cov = torch.cat(maps) @ cov @ torch.cat(maps).T  # of (X_1, X_2)
    expected = []

    def model(levels, t, active):
        wide = t.double()
        y = torch.cat([v.flatten(1) for v in levels], 1).double()
        scale = wide.repeat_interleave(torch.tensor(sizes), 1)  # [n, 20]
        keep = 1 - scale
        eye = torch.eye(20, dtype=F64)
        yy = keep[:, :, None] * levels_cov * keep[:, None, :] + scale[:, :, None] ** 2 * eye
        vy = scale[:, None, :] * eye - levels_cov * keep[:, None, :]  # cov(v, y)
        vv = eye + levels_cov
        gain = torch.linalg.solve(yy, vy.transpose(1, 2)).transpose(1, 2)
        left = (vv - gain @ vy.transpose(1, 2)).diagonal(dim1=1, dim2=2)
        expected.append(left[:, :4].mean(1) + left[:, 4:].mean(1))
        v = (gain @ y[:, :, None])[..., 0]
        parts = zip(v.split(sizes, 1), levels, strict=True)
        return [part.view(level.shape).to(level) for part, level in parts]

    loss = flow.loss(model, x, seed=12)
    difference = loss.double() - expected[0]
    error = difference.mean().abs() / (difference.std() / math.sqrt(n))
    assert error < 4, f"{loss.mean():.4f}, expected {expected[0].mean():.4f}: {error:.1f} s.e."
    assert difference.mean().abs() < 0.02 * expected[0].mean()


def check_zero_prediction():
    """Predicting nothing loses sum over active levels of 1 + E[X_s^2]."""
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + 0.8 * torch.randn(4000, 1, 8, 8, generator=generator)
    for stage in range(3):
        probs = [float(q == stage) for q in range(3)]
        flow = DecomposableFlow(Laplacian(3), stage_probs=probs)
        zeros = lambda levels, t, active: [None if v is None else v * 0 for v in levels]  # noqa: E731
        loss = flow.loss(zeros, x, seed=stage)
        levels = flow.decomposition.build(x)
        want = sum(1 + v.square().mean().item() for v in levels[: stage + 1])
        error = (loss.mean().item() - want) / (loss.std().item() / math.sqrt(len(x)))
        assert abs(error) < 4, f"stage {stage}: {loss.mean():.4f}, expected {want:.4f}"


def test_loss_of_the_exact_model_is_the_closed_form():
    check_gaussian_loss()


def test_loss_of_a_zero_prediction():
    check_zero_prediction()


def scaled_prediction(flow, predictions, x, seed, loss, **options):
    return loss(flow, [None if g is None else 1.3 * g for g in predictions], x, seed, **options)


def other_noise(flow, predictions, x, seed, loss, **options):
    return loss(flow, predictions, x, seed + 1, **options)


def no_noise_in_the_target(flow, predictions, x, seed, loss, **options):
    pairs = zip(predictions, flow.build(x), strict=True)
    each = [
        x.new_zeros(len(x)) if g is None else (g + v).square().flatten(1).mean(1) for g, v in pairs
    ]
    return torch.stack(each, 1)


def first_level_counted_twice(flow, predictions, x, seed, loss, **options):
    return (
        loss(flow, predictions, x, seed, **options) * torch.tensor([2.0, 1, 1])[: len(predictions)]
    )


@pytest.mark.parametrize(
    ("check", "defect"),
    [
        (check_gaussian_loss, scaled_prediction),
        (check_gaussian_loss, other_noise),
        (check_gaussian_loss, no_noise_in_the_target),
        (check_gaussian_loss, first_level_counted_twice),
        (check_zero_prediction, no_noise_in_the_target),
        (check_zero_prediction, first_level_counted_twice),
    ],
)
def test_a_broken_loss_is_caught(check, defect, monkeypatch):
    loss = Laplacian.loss
    monkeypatch.setattr(Laplacian, "loss", lambda *args, **kwargs: defect(*args, loss, **kwargs))
    with pytest.raises(AssertionError):
        check()


class Heads(nn.Module):
    """A model with a part of its own for every level."""

    def __init__(self, channels=1, levels=2):
        super().__init__()
        self.trunk = nn.Parameter(torch.ones(()))
        self.heads = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(levels))

    def forward(self, levels, t, active):
        return [
            None if v is None else self.trunk * head(v)
            for v, head in zip(levels, self.heads, strict=True)
        ]


def test_parameters_that_a_stage_skips_get_zero_gradients():
    flow, model = DecomposableFlow(Laplacian(2), stage_probs=[1.0, 0.0]), Heads()
    x = torch.randn(4, 1, 8, 8)
    flow.loss(model, x, seed=0).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.heads[0].weight.grad.abs().max() > 0
    assert all((p.grad == 0).all() for p in model.heads[1].parameters())
    # A frozen part stays without.
    model.heads[1].requires_grad_(False)
    model.zero_grad(set_to_none=True)
    flow.loss(model, x, seed=0).mean().backward()
    assert model.heads[1].weight.grad is None
    # One that is thawed again has one again.
    model.heads[1].requires_grad_(True)
    flow.loss(model, x, seed=0).mean().backward()
    assert (model.heads[1].weight.grad == 0).all()


class Renamed(nn.Module):
    """As many parameters as Heads, under other names."""

    def __init__(self):
        super().__init__()
        self.inner = Heads()

    def forward(self, *args):
        return self.inner(*args)


def test_zero_gradients_are_of_the_model_at_hand():
    """Models that come and go may live at one address: nothing is remembered beyond their lives."""
    flow, x = DecomposableFlow(Laplacian(2), stage_probs=[1.0, 0.0]), torch.randn(2, 1, 8, 8)
    for make in (Heads, Renamed) * 8:
        model = make()
        flow.loss(model, x, seed=0).mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        del model


def test_none_equals_zeros_for_the_loss():
    """Per sample, a level that nobody has active is zeros and not None: the same loss."""
    x, model = torch.randn(4, 1, 8, 8), Heads()
    losses = [
        DecomposableFlow(Laplacian(2), stage_probs=[1.0, 0.0], per_sample=each).loss(
            model, x, seed=3
        )
        for each in (False, True)
    ]
    torch.testing.assert_close(*losses)


def test_compiled_model():
    flow, model, x = DecomposableFlow(Laplacian(2)), Heads(), torch.randn(2, 1, 8, 8)
    plain = flow.loss(model, x, seed=3)
    compiled = flow.loss(torch.compile(model, backend="aot_eager"), x, seed=3)
    torch.testing.assert_close(plain, compiled)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("decomposition", [Laplacian(3), Haar(2), Haar(2, 4)], ids=str)
def test_parts_of_a_batch_lose_what_the_batch_loses(decomposition, per_sample):
    """With `shard` a sample's noise, t and stage are the whole batch's, whoever has it."""
    probs = [1 / decomposition.num_levels] * decomposition.num_levels
    flow = DecomposableFlow(decomposition, stage_probs=probs, per_sample=per_sample)
    x, seen = torch.randn(5, 3, 8, 8), []

    def model(levels, t, active):
        seen.append(t)
        return [None if v is None else 0.3 * v for v in levels]

    for seed in (*range(4), torch.tensor([7, 4])):
        seen.clear()
        whole = flow.loss(model, x, seed=seed, per_level=True)
        parts = []
        for start, end in ((0, 1), (1, 5)):
            flow.calls -= 1  # one batch: with a tensor for a seed its stages are the call's
            parts.append(
                flow.loss(model, x[start:end], seed=seed, shard=(start, 5), per_level=True)
            )
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-6)
        assert torch.equal(torch.cat(seen[1:]), seen[0])


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("shard", {"shard": 3, "seed": 0}),
        ("shard", {"shard": (1, 2), "seed": 0}),
        ("shard", {"shard": (-1, 4), "seed": 0}),
        ("seed", {"shard": (0, 4)}),
    ],
)
def test_bad_shards(argument, options):
    flow = DecomposableFlow(Laplacian(2))
    with pytest.raises(
        (TypeError, ValueError), match=f"DecomposableFlow.loss: {argument}: expecte"
    ):
        flow.loss(lambda levels, t, active: levels, torch.zeros(2, 1, 4, 4), **options)
