"""The sampler end to end, with no training: where the data is Gaussian the velocity is known
exactly, and so are the samples. The check is run again on samplers with one thing wrong."""

import math
from types import SimpleNamespace

import pytest
import torch

import dfm_fast
from dfm_fast.flow import DecomposableFlow, Laplacian, StageSchedule, flows, sampler
from dfm_fast.ops._scales import level_offsets

F64 = torch.float64

# --- Sampling: independent Gaussian levels have an exact velocity, Euler an affine map ---


def velocity(x, t, mean, std):
    """E[eps - X | x_t = x] for X ~ N(mean, std^2)."""
    d = (1 - t) ** 2 * std**2 + t**2
    centred = x - (1 - t) * mean
    return (t * centred / d) - (mean + (1 - t) * std**2 * centred / d)


class GaussianLevels:
    """The exact model of independent levels N(mean_s, std_s^2), and what it was called with."""

    def __init__(self, means, stds):
        self.means, self.stds, self.calls = means, stds, []

    def __call__(self, levels, t, active):
        self.calls.append((t[0].tolist(), active[0].tolist()))
        assert (t == t[:1]).all()
        out = []
        for s, level in enumerate(levels):
            assert (level is not None) == bool(active[0, s])
            column = t[:, s].to(F64).view(-1, *[1] * 3)
            moments = self.means[s], self.stds[s]
            out.append(None if level is None else velocity(level.to(F64), column, *moments))
        return out


def affine(table, mean, std, s, begin):
    """Euler on the exact velocity: level = a * noise + b."""
    a, b = 1.0, 0.0
    for k in range(begin, len(table) - 1):
        t, dt = table[k, s].item(), (table[k + 1, s] - table[k, s]).item()
        b0 = velocity(0.0, t, mean, std)
        slope = velocity(1.0, t, mean, std) - b0
        a, b = a * (1 + dt * slope), b * (1 + dt * slope) + dt * b0
    return a, b


SETTINGS = {
    1: ((12,), ()),
    2: ((30, 10), (0.1,)),
    3: ((7, 5, 3), (0.3, 0.15)),
}


def check_sampler(levels, decomposition=None):
    """Every sample is the known affine map of its noise; so are mean, deviation and correlation."""
    steps, thresholds = SETTINGS[levels]
    means, stds = [0.7, 0.0, 0.2][:levels], [1.3, 0.4, 0.25][:levels]
    decomposition = decomposition or Laplacian(levels)
    flow, model, shape = (
        DecomposableFlow(decomposition),
        GaussianLevels(means, stds),
        (512, 2, 8, 8),
    )
    x = flow.sample(
        model, shape, steps=steps, threshold=thresholds, seed=3, dtype=F64, device="cpu"
    )
    schedule = StageSchedule(steps, thresholds)
    table, shapes = schedule.table(), decomposition.shapes(shape)
    # What the model saw.
    assert len(model.calls) == sum(steps), "number of calls"
    for k, (t, active) in enumerate(model.calls):
        assert t == pytest.approx(table[k].tolist(), abs=1e-6), f"t of step {k}"
        assert active == schedule.active()[k].tolist(), f"active levels of step {k}"
    # Exactly: noise of the documented stream, mapped.
    parts = []
    for s, start in enumerate(level_offsets(shapes, 0)):
        a, b = affine(table, means[s], stds[s], s, schedule.stages[s].start)
        parts.append(a * dfm_fast.philox_normal(shapes[s], 3, offset=start, dtype=F64) + b)
    torch.testing.assert_close(x, decomposition.collapse(parts), atol=2e-5, rtol=1e-5)
    # In distribution: covariance of an image by pushing every unit of noise through the collapse.
    cov, mean = 0.0, 0.0
    for s, one in enumerate(shapes):
        a, b = affine(table, means[s], stds[s], s, schedule.stages[s].start)
        n = math.prod(one[2:])
        units = [torch.zeros(n, 1, *v[2:], dtype=F64) for v in shapes]
        units[s] = torch.eye(n, dtype=F64).view(n, 1, *one[2:])
        columns = decomposition.collapse(units).flatten(1)
        cov = cov + a * a * columns.T @ columns
        mean = mean + b * columns.sum(0)
    samples = x.flatten(0, 1).flatten(1)
    n = len(samples)
    error = (samples.mean(0) - mean).abs() / (cov.diagonal() / n).sqrt()
    assert error.max() < 5, f"mean off by {error.max():.1f} standard errors"
    deviation = (samples.std(0) / cov.diagonal().sqrt() - 1).abs().max()
    assert deviation < 5 / math.sqrt(2 * n), f"standard deviation off by {deviation:.3f}"
    got, pair = torch.corrcoef(samples.T)[27, 28], cov[27, 28]
    want = pair / (cov[27, 27] * cov[28, 28]).sqrt()
    assert abs(got - want) < 5 / math.sqrt(n), f"neighbours correlate {got:.3f}, not {want:.3f}"


@pytest.mark.parametrize("levels", SETTINGS)
def test_sampler_is_exact_on_gaussian_levels(levels):
    check_sampler(levels)


def test_sampler_with_standardised_levels_and_a_jump_of_four():
    check_sampler(2, Laplacian(2, "nearest", std=[2.0, 0.3]))
    check_sampler(2, Laplacian(2, factor=4))


class Tied(StageSchedule):
    def table(self):
        return super().table()[:, -1:].expand(-1, 2).clone()


class OneStepMore(StageSchedule):
    def __init__(self, steps, *rest):
        super().__init__((steps[0] + 1, *steps[1:]), *rest)


def zero_noise(shape, *_, dtype, **__):
    return torch.zeros(shape, dtype=dtype)


def scaled_velocity(self, *args, call=sampler.Sampler._call):
    return [None if v is None else 1.02 * v for v in call(self, *args)]


def first_level_frozen(self, stage, k, x, at, step=sampler.Sampler._step):
    after = step(self, stage, k, x, at)
    return [x[0], *after[1:]] if stage else after


def next_row(*args, step, function=sampler.cfg_euler_step, **kwargs):
    return function(*args, step=(step + 1).clamp(max=len(args[3]) - 1), **kwargs)


SAMPLER_DEFECTS = {
    "zero noise": (sampler, "philox_normal", zero_noise),
    "one noise for all levels": (sampler, "level_offsets", lambda shapes, o: [o] * len(shapes)),
    "tied times": (flows, "StageSchedule", Tied),
    "one step more": (flows, "StageSchedule", OneStepMore),
    "scaled velocity": (sampler.Sampler, "_call", scaled_velocity),
    "first level frozen in the last stage": (sampler.Sampler, "_step", first_level_frozen),
    "step of the next row": (sampler, "cfg_euler_step", next_row),
}


@pytest.mark.parametrize("defect", SAMPLER_DEFECTS)
def test_a_broken_sampler_is_caught(defect, monkeypatch):
    monkeypatch.setattr(*SAMPLER_DEFECTS[defect])
    with pytest.raises(AssertionError):
        check_sampler(2)


def test_one_level_is_plain_flow_matching():
    """Loss and sampler against flow matching written out."""
    flow, x = DecomposableFlow(Laplacian(1)), torch.randn(4, 2, 5, 6)
    seen = {}

    def model(levels, t, active, scale):
        seen.update(x=levels[0], t=t[:, 0])
        return [scale * levels[0]]

    loss = flow.loss(model, x, seed=9, scale=0.5)
    t = seen["t"].view(-1, 1, 1, 1)
    eps = dfm_fast.philox_normal(x.shape, 9)
    torch.testing.assert_close(seen["x"], (1 - t) * x + t * eps)
    want = (0.5 * seen["x"] - (eps - x)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, want)
    got = flow.sample(model, (4, 2, 5, 6), steps=8, seed=2, scale=0.5)
    y = dfm_fast.philox_normal((4, 2, 5, 6), 2)
    for _ in range(8):
        y = y - 0.5 * y / 8
    torch.testing.assert_close(got, y)


def test_gaussian_mixture_in_one_level():
    """Exact velocity of an even mixture of N(-2, 0.3^2) and N(2, 0.3^2) per element."""
    mu, std = 2.0, 0.3

    def model(levels, t, active):
        x, t = levels[0], t[:, 0].view(-1, 1, 1, 1).to(levels[0])
        var = (1 - t) ** 2 * std**2 + t**2
        left, right = (-(((x - m * (1 - t)) ** 2) / (2 * var)) for m in (-mu, mu))
        weight = torch.sigmoid(right - left)
        return [weight * velocity(x, t, mu, std) + (1 - weight) * velocity(x, t, -mu, std)]

    flow = DecomposableFlow(Laplacian(1))
    x = flow.sample(model, (256, 4, 4, 4), steps=100, solver="heun", seed=1, dtype=F64).flatten()
    n, positive = len(x), (x > 0).double().mean().item()
    assert abs(positive - 0.5) < 5 * 0.5 / math.sqrt(n)
    side = x.abs()
    assert abs(side.mean().item() - mu) < 5 * std / math.sqrt(n) + 0.005
    assert abs(side.std().item() / std - 1) < 5 / math.sqrt(2 * n) + 0.02


def test_heun_converges_faster_than_euler():
    means, stds = [0.7, 0.1], [1.3, 0.4]
    flow, shape = DecomposableFlow(Laplacian(2)), (4, 1, 8, 8)

    def run(solver, n):
        model = GaussianLevels(means, stds)
        options = {"steps": (n, n), "seed": 3, "dtype": F64, "solver": solver}
        return flow.sample(model, shape, **options), len(model.calls)

    fine, _ = run("heun", 400)
    errors = {}
    for solver in ("euler", "heun"):
        for n in (20, 40):
            x, calls = run(solver, n)
            errors[solver, n] = (x - fine).abs().max().item()
            assert calls == 2 * n * (1 + (solver == "heun"))
    assert 1.6 < errors["euler", 20] / errors["euler", 40] < 2.5
    assert errors["heun", 20] / errors["heun", 40] > 3
    assert errors["heun", 40] < errors["euler", 40] / 5


# --- Guidance ---


def conditional(levels, t, active, y, calls=None):
    if calls is not None:
        calls.append((len(t), y.tolist()))
    shift = y.view(-1, 1, 1, 1)
    return [None if v is None else v + shift.to(v) for v in levels]


def test_guidance_combines_both_and_stacks_them_in_one_call():
    flow, shape = DecomposableFlow(Laplacian(2)), (2, 1, 4, 4)
    y, null = torch.tensor([1.0, 2.0]), torch.zeros(2)
    options = {"steps": (2, 2), "seed": 4}
    calls = []
    got = flow.sample(
        conditional, shape, cfg_scale=3.0, uncond={"y": null}, y=y, calls=calls, **options
    )
    assert calls == [(4, [1.0, 2.0, 0.0, 0.0])] * 4
    # v + y with scale 3 and null 0 is v + 3 y.
    want = flow.sample(conditional, shape, y=3 * y, **options)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    # Lists and the like are stacked, too; what cannot be makes two calls, and the same picture.
    for wrap, unwrap, counts in (
        (lambda y: [{"y": y}, "a text"], lambda y: y[0]["y"], [4] * 4),
        (lambda y: [{"y": y}, y.sum().item()], lambda y: y[0]["y"], [2] * 8),
        (lambda y: SimpleNamespace(y=y), lambda y: y.y, [2] * 8),
    ):
        calls.clear()
        other = flow.sample(
            lambda levels, t, active, y, f=unwrap: conditional(levels, t, active, f(y), calls),
            shape,
            cfg_scale=3.0,
            uncond={"y": wrap(null)},
            y=wrap(y),
            **options,
        )
        assert [n for n, _ in calls] == counts
        torch.testing.assert_close(got, other)


def test_guidance_interval_is_tested_on_each_levels_own_t():
    flow, shape = DecomposableFlow(Laplacian(2)), (1, 1, 4, 4)
    y, null, steps = torch.ones(1), torch.zeros(1), (4, 4)
    calls = []
    got = flow.sample(
        conditional,
        shape,
        steps=steps,
        threshold=0.2,
        seed=4,
        cfg_scale=2.0,
        cfg_interval=(0.3, 0.7),
        uncond={"y": null},
        y=y,
        calls=calls,
    )
    table = StageSchedule(steps, 0.2).table()
    x = [
        dfm_fast.philox_normal((1, 1, 2, 2), 4),
        dfm_fast.philox_normal((1, 1, 4, 4), 4, offset=4),
    ]
    guided = []
    for k in range(8):
        row, inside = table[k], [0.3 <= t <= 0.7 for t in table[k].tolist()]
        on = [True, k >= 4]
        guided.append(any(i and a for i, a in zip(inside, on, strict=True)))
        for s in range(2):
            if on[s]:
                w = 2.0 if inside[s] else 1.0
                x[s] = x[s] + (table[k + 1, s] - row[s]).item() * (x[s] + w)
    torch.testing.assert_close(got, dfm_fast.laplacian_collapse(x), atol=1e-5, rtol=1e-5)
    assert [n == 2 for n, _ in calls] == guided  # outside the interval half the work is saved


def test_previews_are_partial_collapses():
    flow, shape = DecomposableFlow(Laplacian(3)), (2, 1, 16, 16)
    model, seen = GaussianLevels([0.0] * 3, [1.0, 0.5, 0.5]), []
    options = {"steps": (3, 2, 2), "seed": 6, "dtype": F64}
    x = flow.sample(model, shape, preview=lambda s, picture: seen.append((s, picture)), **options)
    assert [(s, tuple(p.shape)) for s, p in seen] == [
        (0, (2, 1, 4, 4)),
        (1, (2, 1, 8, 8)),
        (2, (2, 1, 16, 16)),
    ]
    assert torch.equal(seen[-1][1], x)
    # The first preview is what a one-level flow makes of the same noise, stopped at tau = 0.1.
    y = dfm_fast.philox_normal((2, 1, 4, 4), 6, dtype=F64)
    for k in range(3):
        t = 1 - 0.3 * k
        y = y - 0.3 * velocity(y, t, 0.0, 1.0)
    torch.testing.assert_close(seen[0][1], y, atol=1e-6, rtol=1e-6)


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    flow = DecomposableFlow(Laplacian(1))
    flow.sample(lambda levels, t, active: levels, (1, 1, 4, 4), steps=3, seed=0, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_a_shift_is_stable_diffusion_3s():
    t = StageSchedule(4, shift=3.0).table()[:, 0]
    assert t.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-15)
    assert torch.equal(StageSchedule(4, shift=1.0).table(), StageSchedule(4).table())
    flow, model = DecomposableFlow(Laplacian(1)), GaussianLevels([0.7], [1.3])
    options = {"seed": 3, "dtype": F64}
    x = flow.sample(model, (2, 1, 4, 4), steps=4, shift=3.0, **options)
    a, b = affine(t.view(-1, 1), 0.7, 1.3, 0, 0)
    eps = dfm_fast.philox_normal((2, 1, 4, 4), 3, dtype=F64)
    torch.testing.assert_close(x, a * eps + b, atol=1e-6, rtol=1e-6)


def test_noise_that_is_given_is_what_levels_start_from():
    flow = DecomposableFlow(Laplacian(2))
    model = GaussianLevels([0.7, 0.0], [1.3, 0.4])
    shape, options = (3, 1, 8, 8), {"steps": (3, 2), "dtype": F64}
    starts = level_offsets(flow.decomposition.shapes(shape), 0)
    noise = [
        dfm_fast.philox_normal(s, 5, offset=o, dtype=F64)
        for s, o in zip(flow.decomposition.shapes(shape), starts, strict=True)
    ]
    before = [v.clone() for v in noise]
    state = torch.get_rng_state()
    given = flow.sample(model, shape, noise=noise, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(given, flow.sample(model, shape, seed=5, **options))
    flow.sample(model, shape, noise=noise, on_step=lambda k, x: x[1].zero_(), **options)
    assert all(map(torch.equal, noise, before))
    with pytest.raises(
        ValueError, match=r"sample: noise\[1\]: expected shape .*, got \[3, 1, 4, 4\]"
    ):
        flow.sample(model, shape, noise=[noise[0], noise[0]], **options)
    with pytest.raises(TypeError, match=r"noise: expected a list of 2 tensors, got Tensor"):
        flow.sample(model, shape, noise=noise[0], **options)


def test_what_is_written_after_a_step_goes_on():
    flow, seen = DecomposableFlow(Laplacian(1)), []

    def zero_once(k, levels):
        seen.append(k)
        if k == 1:
            levels[0].zero_()

    # v = 1 from then on: -1 times what is left of t.
    x = flow.sample(
        lambda levels, t, active: [torch.ones_like(levels[0])],
        (1, 1, 4, 4),
        steps=4,
        seed=0,
        on_step=zero_once,
    )
    assert seen == [0, 1, 2, 3]
    torch.testing.assert_close(x, torch.full_like(x, -0.5))


@pytest.mark.parametrize(
    ("steps", "shift", "error"),
    [(4, 0, ValueError), (4, math.inf, ValueError), (4, "3", TypeError), ((4, 4), 3.0, ValueError)],
)
def test_bad_shifts(steps, shift, error):
    with pytest.raises(error, match="StageSchedule: shift: expected"):
        StageSchedule(steps, shift=shift)


def test_replayed_stages_are_the_plain_loop(monkeypatch):
    """The loop over captured steps; capture is replaced by a call that restores the state."""

    def capture(call, state):
        before = [v.clone() for v in state]
        call()
        for v, old in zip(state, before, strict=True):
            v.copy_(old)
        return call

    monkeypatch.setattr(sampler, "capture", capture)
    flow, shape, y = DecomposableFlow(Laplacian(2)), (2, 1, 4, 4), torch.tensor([1.0, 2.0])
    run = sampler.Sampler.__call__
    for solver in ("euler", "heun"):
        options = {
            "steps": (4, 4),
            "seed": 4,
            "cfg_scale": 2.0,
            "cfg_interval": (0.1, 0.6),
            "uncond": {"y": torch.zeros(2)},
            "y": y,
            "solver": solver,
        }
        plain = flow.sample(conditional, shape, cuda_graph=False, **options)
        with monkeypatch.context() as patch:
            patch.setattr(sampler.Sampler, "__call__", lambda self, *a: run(self, *a[:-1], True))
            replayed = flow.sample(conditional, shape, **options)
        torch.testing.assert_close(replayed, plain, atol=1e-6, rtol=1e-6)
