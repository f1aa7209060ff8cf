r"""When each level is denoised: the sampling schedule of a coarse-to-fine flow.

With n_s steps in stage s, b_s = n_1 + ... + n_(s-1), N = n_1 + ... + n_S and thresholds tau_s, the
noise level of level s before step k is (DFM, arXiv 2506.19839, §3.3; 1 is pure noise)

    t_s(k) = 1                                             k <= b_s              waiting
    t_s(k) = 1 - (1 - tau_s) (k - b_s) / n_s               b_s <= k <= b_(s+1)   its own stage
    t_s(k) = tau_s (1 - (k - b_(s+1)) / (N - b_(s+1)))     k >= b_(s+1)          with the finer ones

and the last level falls from 1 to 0 in its own stage: all end at 0 together.

With one level a shift s spends more steps where there is much noise, as large pictures need
(Stable Diffusion 3, arXiv 2403.03206, §5.3.2):

    t'(k) = s t(k) / (1 + (s - 1) t(k))
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dfm_fast import _checks


class StageSchedule:
    """Steps per stage and the noise level at which a level hands over to the next.

    Args:
        steps: L numbers of steps, at least 1 each.
        threshold: noise level in [0, 1) at which the next level starts, for every level but the
            last: a number, or L - 1 of them (L where the last is 0, which it is anyway).
        shift: s, positive; 1 is none. Only with one level: it would move the thresholds, too.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        steps: Sequence[int] | int,
        threshold: float | Sequence[float] = 0.1,
        shift: float = 1.0,
    ) -> None:
        op = type(self).__name__
        steps = (steps,) if isinstance(steps, int) else steps
        if not isinstance(steps, Sequence) or not steps:
            _checks.fail(op, "steps", "a sequence of numbers of steps", repr(steps), TypeError)
        self.steps = tuple(_checks.integer(op, f"steps[{s}]", n, 1) for s, n in enumerate(steps))
        self.threshold = _thresholds(op, threshold, len(self.steps))
        self.shift = _shift(op, shift, len(self.steps))

    @property
    def num_levels(self) -> int:
        return len(self.steps)

    @property
    def stages(self) -> list[range]:
        """The steps of each stage."""
        ends = [0, *itertools.accumulate(self.steps)]
        return [range(a, b) for a, b in itertools.pairwise(ends)]

    def table(self) -> Tensor:
        """t [N + 1, L] in float64, on the CPU: row k before step k, the last row 0."""
        total, columns = sum(self.steps), []
        k = torch.arange(total + 1, dtype=torch.float64)
        for own, tau in zip(self.stages, self.threshold, strict=True):
            begin, end = own.start, own.stop
            t = 1 - (1 - tau) * (k - begin).clamp(0, end - begin) / (end - begin)
            if end < total:
                rest = tau * (1 - (k - end) / (total - end))
                t = torch.where(k > end, rest, t)
            columns.append(t)
        t = torch.stack(columns, 1)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def active(self) -> Tensor:
        """[N, L] bool: whether a level is denoised in step k."""
        stages = self.stages
        return torch.stack([torch.arange(sum(self.steps)) >= own.start for own in stages], 1)

    def __repr__(self) -> str:
        shift = "" if self.shift == 1 else f", shift={self.shift:g}"
        return f"StageSchedule(steps={self.steps}, threshold={self.threshold[:-1]}{shift})"


def _shift(op: str, shift: float, num_levels: int) -> float:
    if isinstance(shift, bool) or not isinstance(shift, int | float):
        _checks.fail(op, "shift", "a number", repr(shift), TypeError)
    if not (0 < shift < math.inf):
        _checks.fail(op, "shift", "a positive number", shift)
    if shift != 1 and num_levels > 1:
        _checks.fail(op, "shift", f"1, as there are {num_levels} levels", shift)
    return float(shift)


def _thresholds(op: str, threshold: float | Sequence[float], num_levels: int) -> tuple[float, ...]:
    """One per level; the last level's is 0."""
    if isinstance(threshold, int | float) and not isinstance(threshold, bool):
        threshold = [float(threshold)] * (num_levels - 1)
    if not isinstance(threshold, Sequence) or not all(
        isinstance(tau, int | float) for tau in threshold
    ):
        expected = "a number, or one per level but the last"
        _checks.fail(op, "threshold", expected, repr(threshold), TypeError)
    values = [float(tau) for tau in threshold]
    if len(values) == num_levels and values[-1] == 0:
        values.pop()
    if len(values) != num_levels - 1:
        expected = f"{num_levels - 1} numbers, one per level but the last"
        _checks.fail(op, "threshold", expected, list(threshold))
    if not all(0 <= tau < 1 for tau in values):
        _checks.fail(op, "threshold", "noise levels in [0, 1)", list(threshold))
    return (*values, 0.0)
