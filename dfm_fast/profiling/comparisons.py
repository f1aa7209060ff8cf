"""A model on our kernels against the same model without: time, memory, operators, and whether both
compute the same."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.acceleration import AccelerateReport, accelerate
from dfm_fast.models import (
    DFMTransformer,
    SnapGenDecoder,
    SnapGenUNet,
    dfm_plain,
    snapgen_decoder_plain,
    snapgen_plain,
)
from dfm_fast.profiling.clocks import interleave, peak_mib, synchronised, wall_clock
from dfm_fast.profiling.costs import tensors
from dfm_fast.profiling.profiles import Profile, profile
from dfm_fast.profiling.targets import Target, users_code

# Relative L2 distance over which two pieces of code compute different functions: a network's
# rounding stays below it. (cuDNN convolves float32 in TF32 by default.)
LOOSE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
PLAIN: dict[type[nn.Module], Callable[..., Any]] = {
    DFMTransformer: dfm_plain.plain_forward,
    SnapGenUNet: snapgen_plain.plain_forward,
    SnapGenDecoder: snapgen_decoder_plain.plain_forward,
}
ROUNDS = (5, 100)  # of timing, at least and at most
PASSES = (3, 15)  # that are recorded, at least and, within a second, at most
Call = Callable[[], Any]


@dataclass(frozen=True)
class Parity:
    """How far two results are apart.

    Attributes:
        distance: relative, in the L2 norm of all tensors together; NaN where a number is none.
        allowed: what rounding in the results' dtype may come to.
        zero: both are zeros, which says nothing about the code.
    """

    distance: float
    allowed: float
    zero: bool = False

    @property
    def holds(self) -> bool:
        return self.distance <= self.allowed  # NaN is not


@dataclass
class Side:
    """One form of the model: its profile, the seconds of calls without one (of a script, which runs
    once, with it), and MiB at most over what was there (None: not measured)."""

    title: str
    profile: Profile
    seconds: list[float]
    peak_mib: float | None


@dataclass
class Comparison:
    """What `compare` found. `before` is None where there is nothing to compare with."""

    after: Side
    before: Side | None
    parity: Parity | None
    report: AccelerateReport | None  # of a model that `accelerate` changed
    note: str = ""  # why there is no before, or no parity
    compiled: list[float] | None = None  # seconds of the form before through torch.compile

    def speedups(self, over: Sequence[float]) -> tuple[float, float, float]:
        """Quartiles of the ratios of `over` (seconds of another form) to ours, round by round:
        first, median, third."""
        ratios = [b / a for b, a in zip(over, self.after.seconds, strict=True)]
        first, median, third = statistics.quantiles(ratios, n=4) if ratios[1:] else 3 * ratios
        return first, median, third


# --- Forms of a model -----------------------------------------------------------------------------


def forms(
    target: Target,
) -> tuple[Callable[..., Any], Callable[..., Any] | None, AccelerateReport | None]:
    """(the model on our kernels, the model without, what `accelerate` did): of our models the
    plain form is the one without, of others what is given is."""
    for kind, plain in PLAIN.items():
        if isinstance(target.module, kind):
            return target.module, functools.partial(plain, target.module), None
    before = _twin(target.module)
    report = accelerate(target.module)
    return target.module, before if report.swapped else None, report


def _twin(module: nn.Module) -> nn.Module:
    """Another object with the same parameters and buffers: `accelerate` changes objects."""
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    try:
        return copy.deepcopy(module, shared)
    except Exception as error:
        got = f"{type(module).__name__}: {error}"
        _checks.fail("profile", "TARGET", "a module that copy.deepcopy copies", got)


def bound(function: Callable[..., Any], target: Target, train: bool) -> Call:
    """A call of forward, or of forward and the parameters' gradients (for fixed gradients of the
    results, drawn in the first call), that returns what it computes."""
    leaves = [p for p in target.module.parameters() if p.requires_grad]
    grads: list[Tensor] = []

    def forward() -> Any:
        with torch.no_grad():
            return function(*target.args, **target.kwargs)

    def training() -> Any:
        found = floating(function(*target.args, **target.kwargs))
        outputs = [t for t in found if t.requires_grad]
        if not grads:
            generator = torch.Generator().manual_seed(1)
            grads.extend(torch.randn(y.shape, generator=generator).to(y) for y in outputs)
        return outputs, torch.autograd.grad(outputs, leaves, grads, allow_unused=True)

    return training if train else forward


def seeded(call: Call) -> Any:
    """Its result, with the random numbers of everybody's."""
    torch.manual_seed(0)
    return call()


def floating(tree: Any) -> list[Tensor]:
    return [t for t in tensors(tree) if t.is_floating_point()]


# --- Measuring ------------------------------------------------------------------------------------


def parity(before: Any, after: Any) -> Parity:
    """Of all tensors of floating point in two results, together."""
    one, other = floating(before), floating(after)
    if [t.shape for t in one] != [t.shape for t in other]:
        return Parity(float("nan"), 0.0)
    apart = sum(
        ((a.double() - b.double()) ** 2).sum().item() for a, b in zip(one, other, strict=True)
    )
    size = sum((a.double() ** 2).sum().item() for a in one)
    allowed = max((LOOSE.get(t.dtype, 0.0) for t in one), default=0.0)
    if not size:
        return Parity(apart**0.5, allowed, zero=not apart)
    return Parity((apart / size) ** 0.5, allowed)


def compare(
    target: Target, *, train: bool, before: bool, compiled: bool = False, seconds: float = 3.0
) -> Comparison:
    """Measure the model in both forms: together, taking turns, without a profiler, then each with
    one.

    Args:
        target: the model, which `accelerate` changes in place.
        train: forward and backward; else forward without gradients.
        before: also the form without our kernels.
        compiled: time that form through torch.compile, too, as a whole.
        seconds: of taking turns, at least.

    Raises:
        UsersError: a call of the model failed.
    """
    target.module.train(train)
    ours, plain, report = forms(target)
    calls = {"after": bound(ours, target, train)}
    if before and plain is not None:
        calls["before"] = bound(plain, target, train)
        if compiled:
            calls["compiled"] = bound(torch.compile(plain), target, train)
    with users_code():
        results = {name: seeded(call) for name, call in calls.items()}  # first calls cost more
    same = parity(results["before"], results["after"]) if "before" in calls else None
    del results
    times = in_turns(calls, target.device.type, seconds)
    own = isinstance(target.module, tuple(PLAIN))
    sides = {
        name: side(title(name, own, train), calls[name], times[name], target.device.type)
        for name in sorted(calls.keys() - {"compiled"})
    }
    note = "" if plain is not None else "Nothing was swapped, so there is nothing to compare with."
    both = sides["after"], sides.get("before")
    return Comparison(*both, same, report, note, times.get("compiled"))


def in_turns(calls: dict[str, Call], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of the calls, without a profiler."""
    clocks = {name: wall_clock(synchronised(call, device)) for name, call in calls.items()}
    taken = interleave(clocks, seconds, ROUNDS)
    return {name: [t / 1e3 for t in samples] for name, samples in taken.items()}


def side(title: str, call: Call, seconds: list[float], device: str) -> Side:
    """Profile the call a few times."""
    profiles: list[Profile] = []
    start = time.monotonic()
    while len(profiles) < PASSES[0] or (len(profiles) < PASSES[1] and time.monotonic() - start < 1):
        with profile() as p:
            call()
        profiles.append(p)
    return Side(title, together(profiles), seconds, peak_mib(call, device))


def together(profiles: Sequence[Profile]) -> Profile:
    """The last one, each of its calls with the median of its times in all, and the least time
    outside of them: an interruption of the machine is in one or two. Where they did not call the
    same operators, the median one."""
    names = [[call.name for call in p.calls] for p in profiles]
    if any(other != names[0] for other in names):
        return sorted(profiles, key=lambda p: p.operator_seconds)[len(profiles) // 2]
    last, outside = profiles[-1], min(p.outside_seconds for p in profiles)
    last.calls = [
        calls[-1]._replace(seconds=statistics.median(call.seconds for call in calls))
        for calls in zip(*(p.calls for p in profiles), strict=True)
    ]
    last.seconds = last.operator_seconds + outside
    return last


def title(name: str, own: bool, train: bool) -> str:
    """before: forward in plain torch, as the plain form of a model of our `own` is."""
    what = "forward and backward" if train else "forward"
    how = {"before": "in plain torch" if own else "as it is", "after": "with dfm_fast"}
    return f"{name}: {what} {how[name]}"
