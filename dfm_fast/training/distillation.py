r"""Flow matching and multi-level distillation with timestep-aware scaling (SnapGen, arXiv
2412.09619), of a network with one level.

    x_t = (1 - t) x + t eps,   v = eps - x,   t' = s t / (1 + (s - 1) t),   t ~ LogitNormal(0, 1)
    task = |v - v_S|^2         kd = |v_T - v_S|^2         features = |f_T - phi(f_S)|^2
    S(task, other) = a_t task + (1 - a_t) |task| / |other| other,   the ratio a constant
    loss = S(task, kd) + S(task, features)

|.|^2 is the mean square of a sample, S the student, T the teacher, phi a small trained projector
and a_t the density of LogitNormal(0, 1) over its largest value: where t is near 0 or 1 the data say
little of v, and the teacher is listened to.

The shift of t is SD3's (arXiv 2403.03206). As in `loop`, noise and t are functions of the seed and
of the sample's place in the batch: losses do not depend on ranks or on parts of a batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfm_fast import _checks, add_noise, philox_normal
from dfm_fast.flow.flows import _T_STREAM
from dfm_fast.ops._philox import fold
from dfm_fast.training.teachers import Backbone, ask, backbone, frozen

# What ratios are cut to: a student that is its teacher would divide by 0.
LARGEST = 1e4
RATIOS = ("sample", "batch")

# --- Noise ----------------------------------------------------------------------------------------


class Noisy(NamedTuple):
    """A batch at its noise levels."""

    x_t: Tensor  # like the data
    t: Tensor  # [N]
    v: Tensor  # like the data: eps - x


def shifted(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): noise levels for s^2 times as many pixels; 0 and 1 stay."""
    if not shift > 0:
        _checks.fail("shifted", "shift", "a positive number", shift)
    return shift * t / (1 + (shift - 1) * t)


def draw_levels(
    count: int,
    seed: int,
    *,
    start: int = 0,
    shift: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """t [count] float32, logit-normal(0, 1) and shifted: those of samples start, start + 1, ... of
    the seed's batch, as `DecomposableFlow` draws them for one level."""
    z = philox_normal((count,), fold(seed, _T_STREAM), offset=start, device=device)
    return shifted(z.sigmoid(), shift)


def make_noisy(x: Tensor, seed: int, *, start: int = 0, shift: float = 1.0) -> Noisy:
    """Noise levels, noise and velocities of a batch.

    Args:
        x: data [N, C, H, W].
        seed: of noise and t, 64 bits.
        start: the place of the first sample, where x is a part of a batch.
        shift: s.

    Raises:
        TypeError, ValueError: arguments.
    """
    op = "make_noisy"
    _checks.tensor(op, "x", x, (4,))
    _checks.integer(op, "seed", seed, 0)
    _checks.integer(op, "start", start, 0)
    t = draw_levels(len(x), seed, start=start, shift=shift, device=x.device)
    x_t, v = add_noise(x, t, seed, offset=start * math.prod(x.shape[1:]))
    return Noisy(x_t, t, v)


# --- Losses ---------------------------------------------------------------------------------------

# Elements whose differences exist at a time, in whole samples: 8 MB of float32.
_BLOCK = 1 << 21


def sample_mse(x: Tensor, *targets: Tensor) -> tuple[Tensor, ...]:
    """Mean squared differences of samples to one or several targets, in one pass over x.

    Args:
        x: [N, ...], floating.
        targets: of x's shape and any floating dtype; constants.

    Returns:
        A tensor [N] per target, float32 (float64 where x is).

    Raises:
        TypeError, ValueError: dtypes, shapes, devices; a target that asks for a gradient.

    Gradients of x, the first in one pass as well: forward keeps its arguments alone, and no
    difference is as large as x.
    """
    op = "sample_mse"
    _checks.tensor(op, "x", x, range(1, 65))
    if not targets:
        _checks.fail(op, "targets", "at least one", "none")
    for target in targets:
        _checks.tensor(op, "targets", target, (x.ndim,))
        if target.shape != x.shape:
            _checks.fail(op, "targets", f"shape {list(x.shape)} like x", list(target.shape))
        if target.device != x.device:
            _checks.fail(op, "targets", f"device {x.device} like x", target.device)
        if target.requires_grad and torch.is_grad_enabled():
            _checks.fail(op, "targets", "constants", "one that requires a gradient")
    return _SampleMSE.apply(x, *targets)


class _SampleMSE(torch.autograd.Function):
    """Block by block; each is read from memory once."""

    @staticmethod
    def forward(ctx, x, *targets):
        ctx.save_for_backward(x, *targets)
        wide = torch.promote_types(x.dtype, torch.float32)
        losses = [torch.empty(len(x), dtype=wide, device=x.device) for _ in targets]
        for rows in _blocks(x):
            block = x[rows].to(wide)
            for loss, target in zip(losses, targets, strict=True):
                difference = block - target[rows].to(wide)
                loss[rows] = difference.square_().flatten(1).mean(1)
        return tuple(losses)

    @staticmethod
    def backward(ctx, *grads):
        x, *targets = ctx.saved_tensors
        nothing = [None] * len(targets)
        if torch.is_grad_enabled():  # a gradient's graph is asked for
            return _mse_gradient(x, targets, grads), *nothing
        dx = torch.empty_like(x)
        for rows in _blocks(x):
            dx[rows] = _mse_gradient(x[rows], [t[rows] for t in targets], [g[rows] for g in grads])
        return dx, *nothing


def _mse_gradient(x: Tensor, targets: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """The sum over targets of 2 g (x - target) / D."""
    wide, scale = x.to(grads[0].dtype), 2 / math.prod(x.shape[1:])
    scales = [(scale * g).view(-1, *[1] * (x.ndim - 1)) for g in grads]
    terms = ((wide - t.to(wide.dtype)) * s for t, s in zip(targets, scales, strict=True))
    return functools.reduce(torch.add, terms).to(x.dtype)


def _blocks(x: Tensor) -> list[slice]:
    rows = max(1, _BLOCK // max(1, math.prod(x.shape[1:])))
    return [slice(i, i + rows) for i in range(0, len(x), rows)]


def timestep_weights(t: Tensor) -> Tensor:
    """a_t: the density of LogitNormal(0, 1) over its largest value, that at 1/2; 0 at 0 and 1.

    t [...] in [0, 1], floating.
    """
    _checks.tensor("timestep_weights", "t", t, range(65))
    # exp(-z^2 / 2) / (4 t (1 - t)), z = logit t, where 4 t (1 - t) is 1 / cosh^2(z / 2).
    z = t.logit().abs().clamp_max(30)
    return ((1 + (-z).exp()).square() / 4 * (z - z.square() / 2).exp()).to(t.dtype)


def scaled_loss(task: Tensor, other: Tensor, t: Tensor, *, ratio: str = "sample") -> Tensor:
    """S(task, other) of samples, with the expectation left to the caller's mean.

    Args:
        task, other: losses [N], not negative.
        t: noise levels [N], as the network got them.
        ratio: |task| / |other| of each "sample", or of the means over this "batch", which makes
            samples depend on each other and on how a batch is parted.

    Returns:
        [N]. Gradients of task and other. By sample its value is that of task; what changes is
        where gradients come from.
    """
    op = "scaled_loss"
    for name, value in (("task", task), ("other", other), ("t", t)):
        _checks.tensor(op, name, value, (1,))
        if value.shape != task.shape:
            _checks.fail(op, name, f"shape {list(task.shape)} like task", list(value.shape))
    _checks.choice(op, "ratio", ratio, RATIOS)
    a = timestep_weights(t)
    size, by = task.detach(), other.detach()
    if ratio == "batch":
        size, by = size.mean(), by.mean()
    return a * task + (1 - a) * _ratio(size, by) * other


def _ratio(task: Tensor, other: Tensor) -> Tensor:
    """0 / 0 is 0."""
    return (task / other.clamp_min(torch.finfo(other.dtype).tiny)).clamp_max(LARGEST)


# --- Training -------------------------------------------------------------------------------------


def flow_matching_loss(
    student: nn.Module,
    x: Tensor,
    *,
    seed: int,
    start: int = 0,
    shift: float = 1.0,
    cond: Mapping[str, Any] | None = None,
) -> Tensor:
    """task of samples [N]. Arguments as `DistillationLoss`."""
    x_t, t, v = make_noisy(x, seed, start=start, shift=shift)
    return sample_mse(backbone(student)(x_t, t, **(cond or {})).velocity, v)[0]


class Projector(nn.Sequential):
    """phi: a student's features [N, C, H, W] to a teacher's channels and grid, by the mean over a
    place of that grid and two convolutions.

    Args:
        in_channels, out_channels: the student's and the teacher's.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            _checks.integer("Projector", name, value, 1)
        first = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        super().__init__(first, nn.SiLU(), nn.Conv2d(in_channels, out_channels, 1))

    def forward(  # type: ignore[override]  # a grid, too
        self, x: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """-> [N, out_channels, *grid]"""
        return super().forward(F.adaptive_avg_pool2d(x, grid))


class DistillationLosses(NamedTuple):
    """Of each sample, [N]; the terms of the total without gradients."""

    total: Tensor
    task: Tensor
    kd: Tensor | None
    features: Tensor | None


class DistillationLoss(nn.Module):
    """The module's loss; its trained parameters are the projector's.

    Args:
        teacher: frozen by this; see `teachers.backbone` for the kinds. None: flow matching alone.
        channels: of the student's features (`backbone(student).channels`); 0 is without their loss.
        shift: s of the noise levels.
        ratio: as `scaled_loss`.

    Raises:
        TypeError: a teacher of another kind. ValueError: numbers.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        channels: int,
        *,
        shift: float = 1.0,
        ratio: str = "sample",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        _checks.integer(op, "channels", channels, 0)
        if not shift > 0:
            _checks.fail(op, "shift", "a positive number", shift)
        self.shift, self.ratio = shift, _checks.choice(op, "ratio", ratio, RATIOS)
        # A list hides it: it is neither saved nor trained with the projector, nor moved.
        self._teacher = [None if teacher is None else frozen(teacher)]
        if teacher is None and channels:
            _checks.fail(op, "channels", "0 without a teacher", channels)
        known = self.teacher.channels if self.teacher is not None else 0
        self.projector = Projector(channels, known) if channels else None

    @property
    def teacher(self) -> Backbone | None:
        return self._teacher[0]

    def forward(
        self,
        student: nn.Module,
        x: Tensor,
        *,
        seed: int,
        start: int = 0,
        cond: Mapping[str, Any] | None = None,
        teacher_cond: Mapping[str, Any] | None = None,
    ) -> DistillationLosses:
        """The losses of a batch, or of its samples from `start` on.

        Args:
            student: see `teachers.backbone`.
            x: data [N, C, H, W].
            seed: of noise and t; one for each step, such as fold(seed, step).
            start: place of the first sample in the batch.
            cond, teacher_cond: what each network is given beside x_t and t.
        """
        where: dict[str, Any] = {"seed": seed, "start": start, "shift": self.shift}
        if self.teacher is None:
            task = flow_matching_loss(student, x, cond=cond, **where)
            return DistillationLosses(task, task.detach(), None, None)
        noisy = make_noisy(x, **where)
        with torch.no_grad():
            taught = ask(self.teacher, noisy.x_t, noisy.t, teacher_cond)
        said = backbone(student)(noisy.x_t, noisy.t, **(cond or {}))
        task, kd = sample_mse(said.velocity, noisy.v, taught.velocity)
        total, features = scaled_loss(task, kd, noisy.t, ratio=self.ratio), None
        if self.projector is not None:
            guess = self.projector(said.features, tuple(taught.features.shape[2:]))
            (features,) = sample_mse(guess, taught.features)
            total = total + scaled_loss(task, features, noisy.t, ratio=self.ratio)
            features = features.detach()
        return DistillationLosses(total, task.detach(), kd.detach(), features)
