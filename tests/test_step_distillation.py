"""Distillation to a few steps: losses by value, who gets gradients, and that heads learn."""

import itertools

import pytest
import torch
from distillation_models import inputs, mse64, randn, snapgen

import dfm_fast
from dfm_fast.ops._philox import fold
from dfm_fast.training import discriminators, step_distillation, teachers
from dfm_fast.training.distillation import timestep_weights
from dfm_fast.training.step_distillation import (
    FeatureHeads,
    discriminator_loss,
    draw_steps,
    generator_loss,
    mean_velocity,
    step_distillation_loss,
)


def test_levels_of_a_few_steps():
    t = draw_steps(4000, 3, 4, shift=3.0)
    values, counts = t.double().unique(return_counts=True)
    plain = torch.arange(1, 5, dtype=torch.float64) / 4
    torch.testing.assert_close(values, 3 * plain / (1 + 2 * plain), atol=1e-6, rtol=0)
    assert (counts - 1000).abs().max() < 120
    assert torch.equal(draw_steps(5, 3, 1), torch.ones(5))
    assert torch.equal(t[7:40], draw_steps(33, 3, 4, start=7, shift=3.0))


def test_the_mean_velocity_is_that_of_several_steps():
    """Of every sample from its level to the next one, with levels spaced as a sampler's."""
    teacher, (x, cond) = teachers.frozen(snapgen(1)), inputs()
    shift, plain = 3.0, torch.tensor([1.0, 0.75, 0.5, 0.25])
    t = shift * plain / (1 + (shift - 1) * plain)
    got = mean_velocity(teacher, x, t, steps=4, each=3, shift=shift, cond=cond)
    for i, start in enumerate(plain.tolist()):
        u = torch.linspace(start, start - 0.25, 4)
        levels, y = shift * u / (1 + (shift - 1) * u), x[i : i + 1]
        for now, after in itertools.pairwise(levels):
            own = {"text": cond["text"][i : i + 1]}
            y = y - (now - after) * teacher(y, now.reshape(1), **own).velocity
        want = (x[i : i + 1] - y) / (levels[0] - levels[-1])
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-4, atol=1e-5)
    once = mean_velocity(teacher, x, t, steps=4, each=1, shift=shift, cond=cond)
    torch.testing.assert_close(once, teacher(x, t, **cond).velocity, rtol=1e-5, atol=1e-6)
    assert (once - got).abs().max() > 1e-3
    with pytest.raises(ValueError, match="mean_velocity: each: expected at least 1, got 0"):
        mean_velocity(teacher, x, t, steps=4, each=0)


def adversary():
    torch.manual_seed(0)
    teacher, heads = teachers.frozen(snapgen(1)), FeatureHeads(16, 8)
    return teacher, heads.eval()  # spectral norms stay as they are


def plain_logits(teacher, heads, x, s, noise, cond):
    w = s.view(-1, 1, 1, 1)
    return heads(teacher((1 - w) * x + w * noise, s, **cond).features)


def test_adversarial_losses_are_the_hinge():
    teacher, heads = adversary()
    (x, cond), x0 = inputs(), randn(4, 3, 8, 8, seed=2)
    s = torch.tensor([0.1, 0.4, 0.6, 0.9])
    noises = [
        dfm_fast.philox_normal(x.shape, fold(6, key))
        for key in (step_distillation._REAL, step_distillation._FAKE)
    ]
    assert not torch.equal(*noises)
    real, fake = (
        plain_logits(teacher, heads, d, s, n, cond) for d, n in zip((x, x0), noises, strict=True)
    )
    got = discriminator_loss(teacher, heads, x, x0, s, seed=6, cond=cond)
    want = 0.5 * ((1 - real).clamp_min(0).mean(1) + (1 + fake).clamp_min(0).mean(1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.mean(), discriminators.discriminator_loss(real, fake))
    got = generator_loss(teacher, heads, x0, s, seed=6, cond=cond)
    torch.testing.assert_close(got, -fake.mean(1), rtol=1e-4, atol=1e-5)
    part = {"text": cond["text"][2:]}
    rest = discriminator_loss(teacher, heads, x[2:], x0[2:], s[2:], seed=6, start=2, cond=part)
    torch.testing.assert_close(rest, want[2:], rtol=1e-4, atol=1e-5)


def test_gradients_go_to_one_side():
    teacher, heads = adversary()
    (x, cond), x0 = inputs(), randn(4, 3, 8, 8, seed=2).requires_grad_()
    s = torch.full((4,), 0.3)
    generator_loss(teacher, heads, x0, s, seed=6, cond=cond).sum().backward()
    assert x0.grad.abs().max() > 0
    assert all(p.grad is None and p.requires_grad for p in heads.parameters())
    x0.grad = None
    discriminator_loss(teacher, heads, x, x0, s, seed=6, cond=cond).sum().backward()
    assert x0.grad is None
    assert all(p.grad.abs().max() > 0 for n, p in heads.named_parameters() if "bias" not in n)
    assert all(p.grad is None for p in teacher.parameters())


def test_heads_learn_to_tell():
    teacher, heads = adversary()
    (x, cond), x0 = inputs(), 3 * randn(4, 3, 8, 8, seed=2)
    s, heads = torch.full((4,), 0.3), heads.train()
    optimizer = torch.optim.Adam(heads.parameters(), 1e-2)
    seen = []
    for step in range(40):
        loss = discriminator_loss(teacher, heads, x, x0, s, seed=step, cond=cond).mean()
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[-1] < 0.6 * seen[0]


def test_heads_of_several_maps():
    heads = FeatureHeads((4, 6), 8).eval()
    maps = [randn(2, 4, 3, 3), randn(2, 6, 2, 2)]
    got = heads(maps)
    want = [head(m).flatten(1) for head, m in zip(heads.heads, maps, strict=True)]
    assert torch.equal(got, torch.cat(want, 1))
    assert got.shape == (2, 13)
    # A logit moves by at most the map's change: three layers of norm 1, up to padding and steps of
    # the power iteration.
    change = 0.1 * randn(2, 6, 2, 2, seed=5)
    moved = heads([maps[0], maps[1] + change])
    assert (moved - got).abs().max() <= 3 * change.norm()


@pytest.mark.parametrize("ratio", ["sample", "batch"])
def test_step_distillation_loss(ratio):
    teacher, heads = adversary()
    student, (x, cond) = snapgen(2), inputs()
    options = {"seed": 6, "steps": 4, "weight": 0.3, "shift": 2.0, "ratio": ratio}
    conds = {"cond": cond, "teacher_cond": cond}
    got = step_distillation_loss(student, teacher, heads, x, **options, **conds)
    t = draw_steps(4, 6, 4, shift=2.0)
    x_t, v = dfm_fast.add_noise(x, t, 6)
    said = student(x_t, t, **cond)
    task, kd = mse64(said, v, teacher(x_t, t, **cond).velocity)
    x0 = x_t - t.view(-1, 1, 1, 1) * said
    adversarial = generator_loss(teacher, heads, x0, got.s, seed=6, cond=cond)
    a, size, by = timestep_weights(t.double()), task.detach(), kd.detach()
    r = size / by if ratio == "sample" else size.mean() / by.mean()
    total = a * task + (1 - a) * r * kd + 0.3 * adversarial
    noise = dfm_fast.philox_normal(x.shape, fold(6, step_distillation._FAKE))
    w = got.s.view(-1, 1, 1, 1)
    seen = teacher((1 - w) * x0 + w * noise, got.s, **cond).features
    want = total, task, kd, adversarial, x0, got.s, seen
    told = discriminator_loss(teacher, heads, x, got.x0, got.s, seed=6, cond=cond)
    known = {"cond": cond, "features": got.features}
    again = discriminator_loss(teacher, heads, x, got.x0, got.s, seed=6, **known)
    torch.testing.assert_close(again, told, rtol=1e-4, atol=1e-5)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=1e-4, atol=1e-5)
    trained = list(student.parameters())
    grads = torch.autograd.grad(got.total.sum(), trained)
    exact = torch.autograd.grad(total.sum(), trained)
    for g, e in zip(grads, exact, strict=True):
        assert (g - e).norm() <= 1e-4 * e.norm() + 1e-6
    assert not got.x0.requires_grad
    assert not torch.equal(got.s, t)


def test_errors_of_a_few_steps():
    teacher, heads = adversary()
    x, cond = inputs()
    s = torch.full((4,), 0.3)
    with pytest.raises(ValueError, match=r"discriminator_loss: x: expected shape .* like x0"):
        discriminator_loss(teacher, heads, x[:2], x, s, seed=6, cond=cond)
    with pytest.raises(ValueError, match=r"generator_loss: s: expected shape \[4\], got \[3\]"):
        generator_loss(teacher, heads, x, s[:3], seed=6, cond=cond)
    with pytest.raises(ValueError, match=r"step_distillation_loss: weight: expected at least 0"):
        step_distillation_loss(snapgen(), teacher, heads, x, seed=6, weight=-1)
    with pytest.raises(ValueError, match=r"draw_steps: steps: expected at least 1, got 0"):
        draw_steps(2, 6, 0)
    with pytest.raises(ValueError, match=r"FeatureHeads: features: expected 1 maps, got 2"):
        heads([x, x])
