"""What is known of other people's modules: one `Unit` for each class that has faster code here.

Units are registered by the files beside this one, by package and name of the class; so no package
is imported for it. A class of no package ("") is known by its name, attributes and arguments alone,
and is compared by value before it is believed (`_trials`).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.nn._hooks import hooked

KINDS = ("activations", "attentions", "blocks", "convolutions", "norms")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Unit:
    """Faster code for one class.

    `forward` takes the module and what its class's forward takes, under the same names, and returns
    None where it cannot serve this call: then the class's own code runs.
    """

    kind: str
    package: str  # the first part of the class's __module__, or "": any
    of: str  # the class's name
    new: str  # what runs instead, as the report calls it
    forward: Callable[..., Any]
    refusal: Callable[[Any], str | None]  # why this configuration is not served, if it is not
    saved: Callable[[Any], int]  # elements not read and not written any more, per position
    knows: Callable[[Any], bool]  # whether a module of that name is meant at all
    trial: Callable[[Any], tuple[Tensor, ...]] | None = None  # small inputs, to compare by value


UNITS: dict[tuple[str, str], Unit] = {}


def register(
    kind: str,
    package: str,
    of: str,
    new: str,
    *,
    refusal: Callable[[Any], str | None] = lambda module: None,
    saved: Callable[[Any], int] = lambda module: 0,
    knows: Callable[[Any], bool] = lambda module: True,
    trial: Callable[[Any], tuple[Tensor, ...]] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the forward of a unit."""

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        unit = Unit(kind, package, of, new, forward, refusal, saved, knows, trial)
        UNITS[package, of] = unit
        return forward

    return decorate


def unit_of(module: nn.Module) -> Unit | None:
    """What is known of its class, or of the class that FSDP2 wrapped."""
    kind = unwrapped(type(module))
    package = kind.__module__.partition(".")[0]
    unit = UNITS.get((package, kind.__name__)) or UNITS.get(("", kind.__name__))
    try:
        return unit if unit is not None and unit.knows(module) else None
    except AttributeError:  # another class of that name
        return None


def unwrapped(kind: type) -> Any:
    """X of the class FSDPX that `fully_shard` gives a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and len(kind.__bases__) == 2 and kind.__bases__[0] is fsdp.FSDPModule:
        return kind.__bases__[1]
    return kind


@functools.cache
def takes_the_same(unit: Unit, kind: Any) -> bool:
    """Whether the class's forward has the arguments of the version that is known."""
    theirs, ours = (list(inspect.signature(f).parameters) for f in (kind.forward, unit.forward))
    return theirs[1:] == ours[1:]


# --- What a unit asks while it runs ---------------------------------------------------------------


def original(kind: type) -> type:
    """The class that a swapped one stands for."""
    return vars(kind).get("_dfm_fast_original", kind)


def same(module: Any, *kinds: type | str) -> bool:
    """Whether it is exactly of one of these classes; a str is the name of a class of diffusers."""
    kind = original(type(module))
    return kind in kinds or (kind.__module__.startswith("diffusers.") and kind.__name__ in kinds)


def plain(module: Any, *kinds: type | str) -> bool:
    """Whether it is the `same`, and may be left out because nobody would notice."""
    return same(module, *kinds) and not hooked(module)


def idle(dropout: Any) -> bool:
    """Whether a dropout does nothing now."""
    return plain(dropout, nn.Dropout, nn.Identity) and not (
        dropout.training and getattr(dropout, "p", 0)
    )


def serves(x: Any, *parameters: Tensor | None, autocast: bool = False) -> bool:
    """Whether kernels take x and the parameters: plain tensors of one type and place, on a device
    that has kernels, outside of what operators of the library do not support (torch.func, forward
    mode, tracers, autocast where it would change the result's dtype)."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return False
    device = x.device
    if device.type not in DEVICES or x.dtype not in _checks.FLOATING or not x.numel():
        return False
    if device.type == "cuda" and x.dtype == torch.float64:
        return False
    cast = torch.is_autocast_enabled(device.type)
    if (cast and not autocast) or _transformed():
        return False
    return all(_beside(p, x, cast) for p in parameters)


def _beside(p: Tensor | None, x: Tensor, cast: bool) -> bool:
    if p is None:
        return True
    exact = type(p) is nn.Parameter or type(p) is Tensor
    return exact and p.device == x.device and (cast or p.dtype == x.dtype)


def _transformed() -> bool:
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def first_reason(*conditions: tuple[Any, str]) -> str | None:
    """The reason of the first condition that holds."""
    return next((reason for holds, reason in conditions if holds), None)
