"""`accelerate` and `restore`: other people's models run this library's code, in place."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from torch import nn

from dfm_fast import _checks
from dfm_fast.acceleration._classes import is_swapped, restored_class, swap
from dfm_fast.acceleration._trials import agrees
from dfm_fast.acceleration._units import KINDS, Unit, takes_the_same, unit_of, unwrapped


@dataclass
class AccelerateReport:
    """What `accelerate` did.

    Attributes:
        swapped: (name, old, new): a module of the class `old` now runs `new`.
        kept: (name, reason): a module of a known class that stays as it is.
        bytes_saved: of activations, that one forward pass in inference no longer reads or writes,
            for one position of every swapped module: a pixel of its input map, a token of its input
            sequence. Counted from the modules' widths, in their parameters' dtype, every operator
            of the old code reading its inputs and writing its result once; nothing twice, where
            swapped modules are nested. Times positions it is the traffic saved at a resolution.
    """

    swapped: list[tuple[str, str, str]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    bytes_saved: int = 0

    def __str__(self) -> str:
        if not self.swapped:
            lines = ["Nothing was swapped."]
            if not self.kept:
                lines = ["Nothing was swapped: no module is of a class that dfm_fast knows."]
        else:
            saved = f"{self.bytes_saved:,} bytes of activations less per position"
            lines = [f"Swapped {_counted(len(self.swapped))}, {saved}:"]
            pairs = Counter((old, new) for _, old, new in self.swapped)
            lines += [f"  {n:4} x {old} -> {new}" for (old, new), n in sorted(pairs.items())]
        if self.kept:
            lines.append(f"Kept {_counted(len(self.kept))}:")
            reasons = Counter(reason for _, reason in self.kept)
            lines += [f"  {n:4} x {reason}" for reason, n in sorted(reasons.items())]
        return "\n".join(lines)


def _counted(n: int) -> str:
    return "1 module" if n == 1 else f"{n} modules"


def accelerate(model: nn.Module, *, only: Collection[str] | None = None) -> AccelerateReport:
    """Let the modules of a model run this library's kernels, in place.

    Every module object stays, with its parameters, names, hooks and `state_dict`; what changes is
    its class, to a subclass of it with another forward. Where a call cannot be served as it comes
    (an inner layer with a hook or an adapter, autocast around a norm, a tracer), the old forward
    runs. Twice is once. `restore` undoes it.

    Args:
        model: any module: of diffusers, of a vision transformer, of torch's layers; bare, frozen,
            compiled, with adapters, or wrapped by FSDP or DDP.
        only: None for all, or what to swap: kinds ("activations", "attentions", "blocks",
            "convolutions", "norms") and patterns of modules' names as in `model.named_modules()`
            ("down_blocks.*"; see `fnmatch`). With both, a module must be of one of the kinds and
            match one of the patterns.

    Returns:
        What was swapped, and what was not and why.

    Raises:
        TypeError: model, only. ValueError: an entry of only that is no kind and matches no module.
    """
    if not isinstance(model, nn.Module):
        _checks.fail("accelerate", "model", "a torch.nn.Module", type(model).__name__, TypeError)
    report = AccelerateReport()
    for name, module, unit in _selected(model, only):
        reason = _refusal(module, unit)
        if reason is not None:
            report.kept.append((name, f"{unwrapped(type(module)).__name__}: {reason}"))
            continue
        report.swapped.append((name, unwrapped(type(module)).__name__, unit.new))
        report.bytes_saved += unit.saved(module) * _itemsize(module)
        swap(module, unit)
    return report


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: every module gets its own class back.

    Args:
        model: as it was given to `accelerate`; also one that was not.

    Returns:
        The model itself.

    Raises:
        TypeError: model.
    """
    if not isinstance(model, nn.Module):
        _checks.fail("restore", "model", "a torch.nn.Module", type(model).__name__, TypeError)
    for module in model.modules():
        if is_swapped(type(module)):
            kind: type = type(module)
            module.__class__ = restored_class(kind)
    return model


def _selected(
    model: nn.Module, only: Collection[str] | None
) -> Iterable[tuple[str, nn.Module, Unit]]:
    """Modules of known classes that `only` names, with their names and what is known."""
    found = ((name, m, unit_of(m)) for name, m in model.named_modules())
    known = [(name, m, unit) for name, m, unit in found if unit is not None]
    if only is None:
        return known
    if isinstance(only, str) or not isinstance(only, Collection):
        got = type(only).__name__
        _checks.fail("accelerate", "only", "a collection of kinds and patterns", got, TypeError)
    if wrong := [entry for entry in only if not isinstance(entry, str)]:
        _checks.fail("accelerate", "only", "entries of str", repr(wrong[0]), TypeError)
    names = [name for name, _ in model.named_modules()]
    patterns = [entry for entry in only if entry not in KINDS]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            expected = f"{', '.join(KINDS)}, or a pattern that matches a module's name"
            _checks.fail("accelerate", "only", expected, repr(pattern))
    kinds = set(only) - set(patterns) or (set(KINDS) if patterns else set())
    return [
        (name, m, unit)
        for name, m, unit in known
        if unit.kind in kinds
        and (not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns))
    ]


def _refusal(module: nn.Module, unit: Unit) -> str | None:
    kind = unwrapped(type(module))
    if is_swapped(kind):
        return "already accelerated"
    if "forward" in module.__dict__:
        return "its forward is replaced, by a hook of another library or by hand"
    if not takes_the_same(unit, kind):
        return "its forward takes other arguments than the version that is known"
    try:
        reason = unit.refusal(module)
    except AttributeError as error:
        reason = f"not the version that is known: {error}"
    if reason is not None:
        return reason
    if unit.trial is not None:
        return agrees(module, unit)
    return None


def _itemsize(module: nn.Module) -> int:
    return next((p.dtype.itemsize for p in module.parameters()), 4)
