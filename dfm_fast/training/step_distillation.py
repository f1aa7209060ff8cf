r"""Distillation to a few steps, against a discriminator on the teacher's features (SnapGen, arXiv
2412.09619; UFOGen, arXiv 2311.09257).

The student denoises x_t to x0 = x_t - t v at the levels that few steps visit. Data and x0, both
noised anew to a level s, are told apart by small heads on the features of the frozen teacher:

    discriminator = (relu(1 - D(x_s)) + relu(1 + D(x0_s))) / 2        generator = -D(x0_s)
    loss = S(task, kd) + weight generator

with `distillation`'s S. A teacher of few steps says kd's velocity itself; one of many takes several
steps in one of the student's, and their mean is what the student learns. Noise and levels are
functions of the seed and of the sample's place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dfm_fast import _checks, add_noise, philox_normal
from dfm_fast.ops._philox import fold
from dfm_fast.training.distillation import draw_levels, sample_mse, scaled_loss, shifted
from dfm_fast.training.teachers import Backbone, ask, backbone

# Seeds of what is drawn beside the student's noise: far from those of other steps.
_STEPS, _LEVELS, _REAL, _FAKE = 1 << 61, 1 << 60, 1 << 59, 1 << 58


class FeatureHeads(nn.Module):
    """A discriminator of maps of features: for each map a logit per place, of three convolutions.
    As in `PatchDiscriminator`, spectral norm bounds their slope.

    Args:
        channels: of the map, or of each of several.
        width: of the hidden layers.
    """

    def __init__(self, channels: int | Sequence[int], width: int = 64) -> None:
        super().__init__()
        op = type(self).__name__
        channels = [channels] if isinstance(channels, int) else list(channels)
        _checks.integer(op, "width", width, 1)
        for c in channels:
            _checks.integer(op, "channels", c, 1)
        self.heads = nn.ModuleList(_head(c, width) for c in channels)

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        """Maps [N, C, h, w] -> logits [N, places of all maps].

        Raises:
            ValueError: another number of maps.
        """
        maps = [features] if isinstance(features, Tensor) else list(features)
        if len(maps) != len(self.heads):
            _checks.fail(type(self).__name__, "features", f"{len(self.heads)} maps", len(maps))
        dtype = next(self.parameters()).dtype
        pairs = zip(self.heads, maps, strict=True)
        return torch.cat([head(m.to(dtype)).flatten(1) for head, m in pairs], 1)


def _head(channels: int, width: int) -> nn.Sequential:
    first, second = nn.Conv2d(channels, width, 1), nn.Conv2d(width, width, 3, padding=1)
    layers = [spectral_norm(layer) for layer in (first, second, nn.Conv2d(width, 1, 1))]
    return nn.Sequential(layers[0], nn.LeakyReLU(0.2), layers[1], nn.LeakyReLU(0.2), layers[2])


# --- Noise ----------------------------------------------------------------------------------------


def draw_steps(
    count: int,
    seed: int,
    steps: int,
    *,
    start: int = 0,
    shift: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """t [count] float32: uniform of the levels 1/steps, 2/steps, ..., 1 that a sampler of so many
    steps visits, shifted."""
    _checks.integer("draw_steps", "steps", steps, 1)
    z = philox_normal((count,), fold(seed, _STEPS), offset=start, device=device)
    step = (torch.special.ndtr(z) * steps).floor().clamp_max(steps - 1) + 1
    return shifted(step / steps, shift)


def mean_velocity(
    teacher: Backbone,
    x_t: Tensor,
    t: Tensor,
    *,
    steps: int,
    each: int,
    shift: float = 1.0,
    cond: Mapping[str, Any] | None = None,
) -> Tensor:
    """(x_t - x_t') / (t - t') where the teacher takes `each` steps of Euler from t to t', the next
    level of a sampler of `steps` steps; of one step it is its velocity.

    Args:
        x_t: [N, C, H, W].
        t: [N], of `draw_steps`.
    """
    _checks.integer("mean_velocity", "each", each, 1)
    last = (t / (shift - (shift - 1) * t) * steps).round()  # the step of t: 1 to steps
    x, now = x_t, t
    for k in range(1, each + 1):
        after = shifted((last - k / each) / steps, shift)
        velocity = ask(teacher, x, now, cond).velocity
        if each == 1:
            return velocity
        x, now = x - (now - after).view(-1, 1, 1, 1) * velocity, after
    return (x_t - x) / (t - now).view(-1, 1, 1, 1)


def denoised(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x0 = x_t - t v, [N, C, H, W]; t [N]."""
    return x_t - t.view(-1, 1, 1, 1).to(x_t.dtype) * v


def _features(
    teacher: Backbone, x: Tensor, s: Tensor, key: int, start: int, cond: Mapping[str, Any] | None
) -> Tensor:
    """The teacher's, of x at noise levels s."""
    x_s, _ = add_noise(x, s, key, offset=start * math.prod(x.shape[1:]))
    return ask(teacher, x_s, s, cond).features


# --- Losses ---------------------------------------------------------------------------------------


def discriminator_loss(
    teacher: Backbone,
    heads: nn.Module,
    x: Tensor,
    x0: Tensor,
    s: Tensor,
    *,
    seed: int,
    start: int = 0,
    cond: Mapping[str, Any] | None = None,
    features: Tensor | None = None,
) -> Tensor:
    """The hinge loss of data and of what the student made; gradients of the heads alone.

    Args:
        teacher: a `teachers.frozen` network.
        heads: its features -> logits [N, places].
        x, x0: data, and denoised by the student, [N, C, H, W].
        s: [N], noise levels that both are noised to, each with noise of its own.
        seed: of the noise.
        start: place of the first sample in the batch.
        cond: what the teacher is given.
        features: the teacher's of the noised x0, where they are known (`StepLosses.features`).

    Returns:
        [N].
    """
    _check_pair("discriminator_loss", x, x0, s)
    with torch.no_grad():
        real = _features(teacher, x, s, fold(seed, _REAL), start, cond)
        if features is None:
            features = _features(teacher, x0, s, fold(seed, _FAKE), start, cond)
    return 0.5 * (F.relu(1 - heads(real)).mean(1) + F.relu(1 + heads(features)).mean(1))


def generator_loss(
    teacher: Backbone,
    heads: nn.Module,
    x0: Tensor,
    s: Tensor,
    *,
    seed: int,
    start: int = 0,
    cond: Mapping[str, Any] | None = None,
) -> Tensor:
    """[N]; arguments as `discriminator_loss`, and the same noise. Gradients of x0, through the
    teacher; the heads get none."""
    _check_pair("generator_loss", x0, x0, s)
    return _generator(teacher, heads, x0, s, seed, start, cond)[0]


def _generator(
    teacher: Backbone,
    heads: nn.Module,
    x0: Tensor,
    s: Tensor,
    seed: int,
    start: int,
    cond: Mapping[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    """(loss [N], the features it saw)"""
    features = _features(teacher, x0, s, fold(seed, _FAKE), start, cond)
    with _constant(heads):
        return -heads(features).mean(1), features.detach()


def _check_pair(op: str, x: Tensor, x0: Tensor, s: Tensor) -> None:
    _checks.tensor(op, "x0", x0, (4,))
    if x.shape != x0.shape:
        _checks.fail(op, "x", f"shape {list(x0.shape)} like x0", list(x.shape))
    if s.shape != x0.shape[:1]:
        _checks.fail(op, "s", f"shape [{len(x0)}]", list(s.shape))


@contextmanager
def _constant(module: nn.Module) -> Iterator[None]:
    """Parameters that a graph takes as constants."""
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


class StepLosses(NamedTuple):
    """Of each sample, [N], and what the discriminator is to see; gradients of the total alone."""

    total: Tensor
    task: Tensor
    kd: Tensor
    adversarial: Tensor
    x0: Tensor  # [N, C, H, W]
    s: Tensor  # [N], the levels that x0 was noised to
    features: Tensor  # [N, C, h, w], the teacher's of it


def step_distillation_loss(
    student: nn.Module,
    teacher: Backbone,
    heads: nn.Module,
    x: Tensor,
    *,
    seed: int,
    steps: int = 4,
    teacher_steps: int = 1,
    weight: float = 0.1,
    shift: float = 1.0,
    ratio: str = "sample",
    start: int = 0,
    cond: Mapping[str, Any] | None = None,
    teacher_cond: Mapping[str, Any] | None = None,
) -> StepLosses:
    """The student's loss. `discriminator_loss(teacher, heads, x, losses.x0, losses.s, seed=seed)`
    is the heads'.

    Args:
        student: see `teachers.backbone`.
        teacher, heads: as `discriminator_loss`.
        x: data [N, C, H, W].
        seed: of noise and levels; one for each step.
        steps: that the student is to take.
        teacher_steps: that the teacher takes in one of those.
        weight: of the adversarial loss; our choice, as the paper's is not known.
        shift: of the levels.
        ratio: as `distillation.scaled_loss`.
        start: place of the first sample in the batch.
        cond, teacher_cond: what each network is given.
    """
    op = "step_distillation_loss"
    _checks.tensor(op, "x", x, (4,))
    if not weight >= 0:
        _checks.fail(op, "weight", "at least 0", weight)
    where: dict[str, Any] = {"start": start, "shift": shift, "device": x.device}
    t = draw_steps(len(x), seed, steps, **where)
    s = draw_levels(len(x), fold(seed, _LEVELS), **where)
    x_t, v = add_noise(x, t, seed, offset=start * math.prod(x.shape[1:]))
    with torch.no_grad():
        taught = mean_velocity(
            teacher, x_t, t, steps=steps, each=teacher_steps, shift=shift, cond=teacher_cond
        )
    said = backbone(student)(x_t, t, **(cond or {})).velocity
    task, kd = sample_mse(said, v, taught)
    x0 = denoised(x_t, said, t)
    adversarial, seen = _generator(teacher, heads, x0, s, seed, start, teacher_cond)
    total = scaled_loss(task, kd, t, ratio=ratio) + weight * adversarial
    told = task.detach(), kd.detach(), adversarial.detach()
    return StepLosses(total, *told, x0.detach(), s, seen)
