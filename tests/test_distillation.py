"""Losses of distillation: by value against plain formulas in float64, and what they promise."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES
from small_models import inputs as dfm_inputs
from small_models import small as small_dfm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dfm_fast
from dfm_fast.flow import DecomposableFlow, Laplacian
from dfm_fast.models import ClassTokens, SnapGenUNet, snapgen_tiny
from dfm_fast.training import discriminators, distillation, step_distillation, teachers
from dfm_fast.training.distillation import (
    DistillationLoss,
    flow_matching_loss,
    make_noisy,
    sample_mse,
    scaled_loss,
    timestep_weights,
)
from dfm_fast.training.step_distillation import (
    FeatureHeads,
    discriminator_loss,
    draw_steps,
    generator_loss,
    step_distillation_loss,
)

SIZES = {"in_channels": 3, "channels": (16, 32), "depths": (0, 1), "heads": (1, 2), "groups": 8}
WIDTHS = {"cross_dim": 12, "time_channels": 16, "self_attention": (False, True), "layers": 1}


def randn(*shape, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def randomise(module, seed=0):
    """Random where a new model is zero; magnitudes are kept."""
    for i, p in enumerate(module.parameters()):
        value = randn(*p.shape, seed=1000 * seed + i)
        p.data.copy_(1 + 0.1 * value if p.ndim == 1 else value / math.sqrt(p[0].numel()))
    return module


def snapgen(seed=0, **options):
    return randomise(SnapGenUNet(**{**SIZES, **WIDTHS, **options}), seed)


def sd3(seed=0, patch=2):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=patch, in_channels=3, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
        pooled_projection_dim=10, out_channels=3, pos_embed_max_size=8,
    )  # fmt: skip
    return randomise(model, seed)


def sd3_cond(n, device="cpu"):
    text = randn(n, 5, 12, seed=3, device=device)
    return {"encoder_hidden_states": text, "pooled_projections": randn(n, 10, seed=4).to(device)}


def data(n=4, device="cpu"):
    return randn(n, 3, 8, 8, seed=7, device=device), {"text": randn(n, 5, 12, seed=8).to(device)}


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
    t = draw_steps(40, 3, 4)
    assert torch.equal(t[7:], draw_steps(33, 3, 4, start=7))


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


def mse64(x, *targets):
    return [(x.double() - t.double()).square().flatten(1).mean(1) for t in targets]


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


def test_a_student_that_is_its_teacher_has_finite_gradients():
    v, target = randn(3, 8).requires_grad_(), randn(3, 8, seed=1)
    task, kd = sample_mse(v, target, v.detach() + torch.tensor([[0.0], [1e-12], [1e-3]]))
    loss = scaled_loss(task, kd, torch.tensor([0.01, 0.02, 0.03]))
    (dv,) = torch.autograd.grad(loss.sum(), v)
    assert loss.isfinite().all()
    assert dv.isfinite().all()


# --- Networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_snapgens_features(device):
    model = snapgen().to(device)
    x, cond = data(device=device)
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
    x, cond = data()
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
    student, (x, cond) = snapgen(2), data()
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
    loss, student, (x, cond) = DistillationLoss(snapgen(1), 16), snapgen(2), data()
    whole = loss(student, x, seed=5, cond=cond, teacher_cond=cond)
    rest = {"text": cond["text"][1:]}
    part = loss(student, x[1:], seed=5, start=1, cond=rest, teacher_cond=rest)
    for w, p in zip(whole, part, strict=True):
        torch.testing.assert_close(w[1:], p, rtol=1e-5, atol=1e-6)


def test_without_features_and_what_is_saved():
    loss, student, (x, cond) = DistillationLoss(snapgen(1), 0), snapgen(2), data()
    got = loss(student, x, seed=5, cond=cond, teacher_cond=cond)
    assert got.features is None
    assert not list(loss.parameters())
    torch.testing.assert_close(got.total.detach(), got.task)
    names = set(DistillationLoss(snapgen(1), 16).state_dict())
    assert names == {f"projector.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")}


def test_a_teacher_of_another_dtype():
    student, (x, cond) = snapgen(2), data()
    narrow = {"text": cond["text"].bfloat16()}
    low = DistillationLoss(snapgen(1).bfloat16(), 0)
    got = low(student, x, seed=5, cond=cond, teacher_cond=narrow)
    high = DistillationLoss(snapgen(1), 0)(student, x, seed=5, cond=cond, teacher_cond=cond)
    torch.testing.assert_close(got.task, high.task)
    torch.testing.assert_close(got.kd, high.kd, rtol=0.05, atol=0)


def distances(terms):
    """(kd, features) before and after training by the sum of these terms."""
    torch.manual_seed(0)
    loss, student, (x, cond) = DistillationLoss(snapgen(1), 16), snapgen(2), data(8)
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
    """It comes nearer, and nearer than a student of the data alone."""
    before, after = distances(lambda *given: given[-1].total)
    same, alone = distances(
        lambda student, x, step, cond, _: flow_matching_loss(student, x, seed=step, cond=cond)
    )
    print(before, after, alone)
    assert torch.equal(before, same)
    assert (after < 0.5 * before).all()
    assert (after < 0.8 * alone).all()


# --- A few steps ----------------------------------------------------------------------------------


def test_levels_of_a_few_steps():
    t = draw_steps(4000, 3, 4, shift=3.0)
    values, counts = t.double().unique(return_counts=True)
    plain = torch.arange(1, 5, dtype=torch.float64) / 4
    torch.testing.assert_close(values, 3 * plain / (1 + 2 * plain), atol=1e-6, rtol=0)
    assert (counts - 1000).abs().max() < 120
    assert torch.equal(draw_steps(5, 3, 1), torch.ones(5))


def adversary():
    torch.manual_seed(0)
    teacher, heads = teachers.frozen(snapgen(1)), FeatureHeads(16, 8)
    return teacher, heads.eval()  # spectral norms stay as they are


def plain_logits(teacher, heads, x, s, noise, cond):
    w = s.view(-1, 1, 1, 1)
    return heads(teacher((1 - w) * x + w * noise, s, **cond).features)


def test_adversarial_losses_are_the_hinge():
    teacher, heads = adversary()
    (x, cond), x0 = data(), randn(4, 3, 8, 8, seed=2)
    s = torch.tensor([0.1, 0.4, 0.6, 0.9])
    fold = step_distillation.fold
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
    (x, cond), x0 = data(), randn(4, 3, 8, 8, seed=2).requires_grad_()
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
    (x, cond), x0 = data(), 3 * randn(4, 3, 8, 8, seed=2)
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
    student, (x, cond) = snapgen(2), data()
    options = {"seed": 6, "steps": 4, "weight": 0.3, "shift": 2.0, "ratio": ratio}
    conds = {"cond": cond, "teacher_cond": cond}
    got = step_distillation_loss(student, teacher, heads, x, **options, **conds)
    t = draw_steps(4, 6, 4, shift=2.0)
    x_t, v = dfm_fast.add_noise(x, t, 6)
    said = student(x_t, t, **cond)
    task, kd = mse64(said, v, teacher(x_t, t, **cond).velocity)
    x0 = x_t - t.view(-1, 1, 1, 1) * said
    adversarial = generator_loss(teacher, heads, x0, got.s, seed=6, cond=cond)
    total = scaled_loss(task, kd, t.double(), ratio=ratio) + 0.3 * adversarial
    want = total, task, kd, adversarial, x0, got.s
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=1e-4, atol=1e-5)
    trained = list(student.parameters())
    grads = torch.autograd.grad(got.total.sum(), trained)
    exact = torch.autograd.grad(total.sum(), trained)
    for g, e in zip(grads, exact, strict=True):
        assert (g - e).norm() <= 1e-4 * e.norm() + 1e-6
    assert not got.x0.requires_grad
    assert not torch.equal(got.s, t)


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


def test_errors_of_a_few_steps():
    teacher, heads = adversary()
    x, cond = data()
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
