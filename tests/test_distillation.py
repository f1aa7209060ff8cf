"""Losses of distillation: by value against plain formulas in float64, and what they promise."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distillation_models import inputs, mse64, randn, sd3, sd3_cond, snapgen
from helpers import DEVICES
from small_models import inputs as dfm_inputs
from small_models import small as small_dfm
from test_docs import blocks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dfm_fast
from dfm_fast.flow import DecomposableFlow, Laplacian
from dfm_fast.models import ClassTokens, snapgen_tiny
from dfm_fast.training import distillation, teachers
from dfm_fast.training.distillation import (
    DistillationLoss,
    flow_matching_loss,
    make_noisy,
    sample_mse,
    scaled_loss,
    timestep_weights,
)

# --- Noise levels and flow matching ---------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noisy_samples_are_the_formulas(shift, device):
    x = randn(5, 3, 4, 6, device=device)
    x_t, t, v = make_noisy(x, 11, shift=shift)
    eps = v.double() + x.double()
    w = t.double().view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t.double(), (1 - w) * x.double() + w * eps, atol=2e-6, rtol=0)
    plain = make_noisy(x, 11).t.double()
    torch.testing.assert_close(t.double(), shift * plain / (1 + (shift - 1) * plain))
    assert torch.equal(v, dfm_fast.add_noise(x, t, 11)[1])


def test_levels_are_logit_normal():
    z = distillation.draw_levels(20000, 5).double().logit()
    assert abs(z.mean()) < 0.03
    assert abs(z.std() - 1) < 0.02
    assert abs(z.pow(4).mean() - 3) < 0.25
    z = distillation.draw_levels(20000, 5, shift=3.0).double().logit()  # logit t' = logit t + ln s
    assert abs(z.mean() - math.log(3)) < 0.03
    assert abs(z.std() - 1) < 0.02


def test_parts_of_a_batch_get_what_the_batch_gets():
    x = randn(5, 3, 4, 6)
    whole, part = make_noisy(x, 11, shift=2.0), make_noisy(x[2:4], 11, start=2, shift=2.0)
    for w, p in zip(whole, part, strict=True):
        assert torch.equal(w[2:4], p)
    assert not torch.equal(make_noisy(x, 12).t, make_noisy(x, 11).t)


@pytest.mark.parametrize("start", [0, 2])
def test_flow_matching_is_that_of_one_level(start):
    model = small_dfm(patch_sizes=(2,), in_channels=3)
    (x,), _, _, y = dfm_inputs(model, batch=3)
    flow = DecomposableFlow(Laplacian(1))
    want = flow.loss(model, x, seed=9, shard=(start, 6), y=y)
    got = flow_matching_loss(model, x, seed=9, start=start, cond={"y": y})
    torch.testing.assert_close(got, want)
    shifted = flow_matching_loss(model, x, seed=9, start=start, shift=3.0, cond={"y": y})
    assert (shifted - got).abs().min() > 1e-4


# --- Mean squares in one pass ---------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block", [1, 300, 1 << 21])
@pytest.mark.parametrize("count", [1, 2])
def test_sample_mse(count, block, dtype, device, monkeypatch):
    monkeypatch.setattr(distillation, "_BLOCK", block)
    shape = (5, 3, 7, 5)  # 105 elements: blocks of 1, 2 and all samples
    x = randn(*shape, device=device, dtype=dtype).requires_grad_()
    targets = [randn(*shape, device=device, seed=i + 1) for i in range(count)]
    targets[0] = targets[0].contiguous(memory_format=torch.channels_last)
    weights = randn(count, 5, device=device, seed=9)
    got = sample_mse(x, *targets)
    (dx,) = torch.autograd.grad(sum((g * w).sum() for g, w in zip(got, weights, strict=True)), x)
    wide = x.detach().double().requires_grad_()
    want = mse64(wide, *targets)
    total = sum((g * w.double()).sum() for g, w in zip(want, weights, strict=True))
    (exact,) = torch.autograd.grad(total, wide)
    for g, w in zip(got, want, strict=True):
        # Of float32: x is exact, whatever its dtype.
        assert g.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(g.double(), w, rtol=2e-6, atol=0)
    assert dx.dtype == dtype
    eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    assert (dx.double() - exact).abs().max() <= 2 * eps * exact.abs().max()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that a call makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = func.is_view or out is None or any(out is a for a in args)
        if isinstance(out, torch.Tensor) and not views:
            self.elements = max(self.elements, out.numel())
        return out


def test_no_difference_is_as_large_as_x(monkeypatch):
    monkeypatch.setattr(distillation, "_BLOCK", 200)
    x, a, b = (randn(16, 100, seed=i) for i in range(3))
    with Largest() as seen:
        sample_mse(x, a, b)
    assert seen.elements == 200
    with Largest() as seen:
        F.mse_loss(x, a, reduction="none").mean(1)
    assert seen.elements == 1600  # the counter counts


def test_second_derivatives():
    x = randn(3, 6, dtype=torch.float64).requires_grad_()
    targets = [randn(3, 6, dtype=torch.float64, seed=i) for i in (1, 2)]
    assert torch.autograd.gradgradcheck(lambda x: sample_mse(x, *targets), (x,))


def test_targets_are_constants():
    with pytest.raises(ValueError, match=r"sample_mse: targets: expected constants"):
        sample_mse(randn(2, 6), randn(2, 6, seed=1).requires_grad_())


# --- Timestep-aware scaling -----------------------------------------------------------------------


def test_weights_are_the_papers():
    t = torch.tensor([0.02, 0.05, 0.1, 0.2, 0.3, 0.5], dtype=torch.float64)
    want = torch.tensor([0.007, 0.069, 0.249, 0.598, 0.831, 1.0], dtype=torch.float64)
    torch.testing.assert_close(timestep_weights(t), want, atol=5e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_a_normalised_density(dtype):
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    density = normal.log_prob(t.logit()).exp() / (t * (1 - t))
    got = timestep_weights(t.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), density / density.max(), rtol=1e-4, atol=1e-7)
    ends = timestep_weights(torch.tensor([0.0, 1e-30, 1.0], dtype=dtype))
    assert torch.equal(ends, torch.zeros_like(ends)) or ends.max() < 1e-90


@pytest.mark.parametrize("ratio", ["sample", "batch"])
def test_scaled_loss(ratio):
    task, other = (randn(6, seed=i).abs().requires_grad_() for i in (1, 2))
    t = torch.linspace(0.05, 0.9, 6)
    got = scaled_loss(task, other, t, ratio=ratio)
    dtask, dother = torch.autograd.grad(got.sum(), (task, other))
    a = timestep_weights(t.double())
    size, by = task.detach().double(), other.detach().double()
    r = size / by if ratio == "sample" else size.mean() / by.mean()
    torch.testing.assert_close(got.double(), a * size + (1 - a) * r * by, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dtask.double(), a, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dother.double(), (1 - a) * r, rtol=1e-5, atol=1e-7)
    if ratio == "sample":
        torch.testing.assert_close(got, task)


def test_a_student_that_is_its_teacher_has_bounded_gradients():
    v, target = randn(3, 8).requires_grad_(), randn(3, 8, seed=1)
    task, kd = sample_mse(v, target, v.detach() + torch.tensor([[0.0], [1e-5], [1e-3]]))
    loss = scaled_loss(task, kd, torch.tensor([0.01, 0.02, 0.03]))
    (dv,) = torch.autograd.grad(loss.sum(), v)
    assert loss.isfinite().all()
    assert dv.abs().max() < 4  # without a limit hundreds of thousands
    assert torch.equal(dv[0] == 0, torch.zeros(8, dtype=torch.bool))  # the task's is left


# --- Networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_snapgens_features(device):
    model = snapgen().to(device)
    x, cond = inputs(device=device)
    t = torch.linspace(0.1, 0.9, 4, device=device)
    velocity, features = teachers.backbone(model)(x, t, **cond)
    torch.testing.assert_close(velocity, model(x, t, **cond))
    norm = model.conv_norm_out
    last = F.silu(F.group_norm(features, norm.num_groups, norm.weight, norm.bias, norm.eps))
    torch.testing.assert_close(model.conv_out(last), velocity)  # what the last layers take
    assert features.shape[1] == teachers.backbone(model).channels == 16


@pytest.mark.parametrize("patch", [1, 2])
def test_sd3s_features(patch):
    model = sd3(patch=patch).eval()
    x, t, cond = randn(2, 3, 8, 4), torch.tensor([0.2, 0.7]), sd3_cond(2)
    velocity, features = teachers.backbone(model)(x, t, **cond)
    want = model(x, timestep=torch.tensor([200.0, 700.0]), **cond).sample
    torch.testing.assert_close(velocity, want)
    tokens = model.proj_out(features.permute(0, 2, 3, 1))  # [N, h, w, p p C]
    tokens = tokens.unflatten(-1, (patch, patch, 3)).permute(0, 5, 1, 3, 2, 4)
    torch.testing.assert_close(tokens.reshape(x.shape), velocity)
    assert not model.proj_out._forward_pre_hooks  # which would keep the maps


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
def test_a_backbone_in_ddp_is_a_backbone(tmp_path):
    model, (x, cond), t = teachers.backbone(snapgen()), inputs(), torch.linspace(0.1, 0.9, 4)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = teachers.backbone(nn.parallel.DistributedDataParallel(model))
        assert wrapped.channels == model.channels
        for got, want in zip(wrapped(x, t, **cond), model(x, t, **cond), strict=True):
            torch.testing.assert_close(got, want)
        del wrapped
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("patch", [1, 2])
def test_dfms_features(patch):
    model = small_dfm(patch_sizes=(patch,), in_channels=3)
    (x,), _, _, y = dfm_inputs(model, batch=2)
    t = torch.tensor([0.2, 0.7])
    velocity, features = teachers.backbone(model)(x, t, y=y)
    (want,) = model([x], t[:, None], y=y)
    torch.testing.assert_close(velocity, want)
    vectors = model._vectors(model.modulations(model.conditioning(t[:, None], None, y)))
    (again,) = model._velocities(features.flatten(2).transpose(1, 2), vectors, [x])
    torch.testing.assert_close(again, velocity)
    assert features.shape == (2, 64, 8, 8)
    assert not model.blocks[-1]._forward_hooks


def test_a_frozen_teacher_passes_gradients_on():
    teacher = teachers.frozen(snapgen())
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    x, cond = inputs()
    x.requires_grad_()
    teacher(x, torch.full((4,), 0.5), **cond).features.sum().backward()
    assert x.grad.abs().max() > 0


# --- Distillation ---------------------------------------------------------------------------------


def written_out(loss, student, x, seed, cond, teacher_cond, shift):
    """All losses in float64, from networks' float32."""
    noisy = make_noisy(x, seed, shift=shift)
    taught = loss.teacher(noisy.x_t, noisy.t, **teacher_cond)
    said = teachers.backbone(student)(noisy.x_t, noisy.t, **cond)
    task, kd = mse64(said.velocity, noisy.v, taught.velocity)
    first, _, second = loss.projector
    grid = taught.features.shape[2:]
    pooled = F.interpolate(said.features, tuple(grid), mode="area")
    hidden = F.silu(F.conv2d(pooled, first.weight, first.bias, padding=1))
    guess = F.conv2d(hidden, second.weight, second.bias)
    (features,) = mse64(guess, taught.features.detach())
    a, total = timestep_weights(noisy.t.double()), 0
    for other in (kd, features):
        total = total + a * task + (1 - a) * (task / other).detach() * other
    return total, task, kd, features


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["snapgen", "sd3"])
def test_distillation_loss(kind, shift):
    torch.manual_seed(0)
    teacher = snapgen(1, channels=(24, 48)) if kind == "snapgen" else sd3(1)
    student, (x, cond) = snapgen(2), inputs()
    teacher_cond = cond if kind == "snapgen" else sd3_cond(4)
    loss = DistillationLoss(teacher, 16, shift=shift)
    got = loss(student, x, seed=5, cond=cond, teacher_cond=teacher_cond)
    want = written_out(loss, student, x, 5, cond, teacher_cond, shift)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=1e-5, atol=0)
    trained = [*student.parameters(), *loss.parameters()]
    grads = torch.autograd.grad(got.total.sum(), trained)
    exact = torch.autograd.grad(want[0].sum(), trained)
    for g, e in zip(grads, exact, strict=True):
        assert (g - e).norm() <= 1e-4 * e.norm() + 1e-6
    assert all(p.grad is None for p in teacher.parameters())


def test_parts_of_a_batch_have_its_losses():
    loss, student, (x, cond) = DistillationLoss(snapgen(1), 16), snapgen(2), inputs()
    whole = loss(student, x, seed=5, cond=cond, teacher_cond=cond)
    rest = {"text": cond["text"][1:]}
    part = loss(student, x[1:], seed=5, start=1, cond=rest, teacher_cond=rest)
    for w, p in zip(whole, part, strict=True):
        torch.testing.assert_close(w[1:], p, rtol=1e-5, atol=1e-6)


def test_without_features_and_what_is_saved():
    loss, student, (x, cond) = DistillationLoss(snapgen(1), 0), snapgen(2), inputs()
    got = loss(student, x, seed=5, cond=cond, teacher_cond=cond)
    assert got.features is None
    assert not list(loss.parameters())
    torch.testing.assert_close(got.total.detach(), got.task)
    names = set(DistillationLoss(snapgen(1), 16).state_dict())
    assert names == {f"projector.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")}


def test_a_teacher_of_another_dtype():
    student, (x, cond) = snapgen(2), inputs()
    narrow = {"text": cond["text"].bfloat16()}
    low = DistillationLoss(snapgen(1).bfloat16(), 0)
    got = low(student, x, seed=5, cond=cond, teacher_cond=narrow)
    high = DistillationLoss(snapgen(1), 0)(student, x, seed=5, cond=cond, teacher_cond=cond)
    torch.testing.assert_close(got.task, high.task)
    torch.testing.assert_close(got.kd, high.kd, rtol=0.05, atol=0)


def distances(terms):
    """(kd, features) before and after training by the sum of these terms."""
    torch.manual_seed(0)
    loss, student, (x, cond) = DistillationLoss(snapgen(1), 16), snapgen(2), inputs(8)
    optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], 3e-3)
    seen = []
    for step in range(40):
        got = loss(student, x, seed=step, cond=cond, teacher_cond=cond)
        seen.append(torch.stack((got.kd.mean(), got.features.mean())))
        optimizer.zero_grad()
        terms(student, x, step, cond, got).mean().backward()
        optimizer.step()
    return seen[0], torch.stack(seen[-5:]).mean(0)


def test_a_student_learns_from_its_teacher():
    """Nearer than a student of the data alone, though this teacher (it is random) knows nothing of
    them, so that both pull apart."""
    before, after = distances(lambda *given: given[-1].total)
    same, alone = distances(
        lambda student, x, step, cond, _: flow_matching_loss(student, x, seed=step, cond=cond)
    )
    assert torch.equal(before, same)
    assert after[0] < 0.9 * alone[0]
    assert after[1] < 0.2 * before[1]


# --- The small preset -----------------------------------------------------------------------------


def test_the_small_preset_learns():
    torch.manual_seed(0)
    model, tokens = snapgen_tiny(), ClassTokens(10, 4, 64)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    optimizer = torch.optim.Adam([*model.parameters(), *tokens.parameters()], 2e-3)
    x, y = randn(8, 1, 16, 16, seed=1).sign(), torch.arange(8)
    seen = []
    for _ in range(12):
        text = tokens(y)
        cond = {"text": text.text, "mask": text.mask}
        loss = flow_matching_loss(model, x, seed=3, cond=cond).mean()
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[-1] < 0.8 * seen[0]


def test_the_documented_example():
    (code,) = [b for b in blocks("docs/training.md") if "DistillationLoss" in b]
    space = {}
    exec(code, space)
    assert space["losses"].total.isfinite().all()
    grads = [p.grad for p in space["loss"].parameters()]
    assert all(g.abs().max() > 0 for g in grads[2:])


# --- Errors ---------------------------------------------------------------------------------------


def test_errors_of_losses():
    x = randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"sample_mse: targets: expected shape \[2, 3, 4, 4\]"):
        sample_mse(x, x[:1])
    with pytest.raises(ValueError, match=r"sample_mse: targets: expected at least one, got none"):
        sample_mse(x)
    with pytest.raises(TypeError, match=r"sample_mse: x: expected float32"):
        sample_mse(x.int(), x)
    with pytest.raises(ValueError, match=r"scaled_loss: other: expected shape \[2\]"):
        scaled_loss(x[:2, 0, 0, 0], x[0, :, 0, 0], x[:2, 0, 0, 0])
    with pytest.raises(ValueError, match=r"scaled_loss: ratio: expected one of sample, batch"):
        scaled_loss(*[torch.ones(2)] * 3, ratio="mean")
    with pytest.raises(ValueError, match=r"shifted: shift: expected a positive number, got 0"):
        make_noisy(x, 1, shift=0)
    with pytest.raises(ValueError, match=r"make_noisy: start: expected at least 0, got -1"):
        make_noisy(x, 1, start=-1)
    with pytest.raises(TypeError, match=r"make_noisy: seed: expected an int, got NoneType"):
        make_noisy(x, None)


def test_errors_of_distillation():
    with pytest.raises(ValueError, match=r"DistillationLoss: shift: expected a positive"):
        DistillationLoss(snapgen(), 16, shift=-1.0)
    with pytest.raises(ValueError, match=r"DistillationLoss: channels: expected at least 0"):
        DistillationLoss(snapgen(), -1)
    with pytest.raises(TypeError, match=r"backbone: model: expected a SnapGenUNet.*got Linear"):
        DistillationLoss(nn.Linear(2, 2), 16)
    with pytest.raises(ValueError, match=r"DFMBackbone: model: expected one level, got 2 levels"):
        teachers.backbone(small_dfm(patch_sizes=(1, 2), in_channels=3))
