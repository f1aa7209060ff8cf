"""Swapped classes: a subclass of the module's own class, with another forward.

Setting `module.__class__` leaves the object, its parameters, buffers, hooks and attributes alone;
isinstance stays true, `copy.deepcopy` and torch.compile see an ordinary class, and setting it back
restores all. The subclass has the name of its parent, which diffusers writes into configurations
and looks for in its lists of blocks. It is in no module, so that pickles hold its recipe instead.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from dfm_fast.acceleration._units import UNITS, Unit

Key = tuple[str, str]


@functools.cache
def swapped_class(kind: Any, key: Key) -> Any:
    """The subclass of `kind` that runs the unit's code."""
    unit = UNITS[key]
    parent_forward, run = kind.forward, unit.forward

    @functools.wraps(parent_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = run(self, *args, **kwargs)
        return parent_forward(self, *args, **kwargs) if y is None else y

    body = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_get_name": _get_name,
        "_dfm_fast_original": kind,
        "_dfm_fast_key": key,
        "forward": forward,
    }
    return type(kind)(kind.__name__, (kind,), body)


def is_swapped(kind: type) -> bool:
    return hasattr(kind, "_dfm_fast_original")


@functools.cache
def restored_class(kind: Any) -> Any:
    """The class from before; also where a wrapper such as FSDP2's was built upon a swapped one."""
    if "_dfm_fast_original" in vars(kind):
        return kind._dfm_fast_original
    bases = tuple(restored_class(b) if is_swapped(b) else b for b in kind.__bases__)
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, bases, own)


def swap(module: nn.Module, unit: Unit) -> None:
    kind: type = type(module)
    module.__class__ = swapped_class(kind, (unit.package, unit.of))


def _get_name(self: Any) -> str:
    """What repr calls it."""
    return f"{type(self).__name__}[dfm_fast]"


def _reduce_ex(self: Any, protocol: int) -> tuple[Any, ...]:
    kind = type(self)
    reduced = super(_swapped_in(kind), self).__reduce_ex__(max(2, protocol))
    own = vars(kind).get("_dfm_fast_key")
    if own is None:  # of a class that somebody built upon ours: theirs to pickle
        return reduced
    return (_rebuild, (kind._dfm_fast_original, own), *reduced[2:])


def _swapped_in(kind: type) -> Any:
    """The class, it or a parent, that has the code above."""
    return next(k for k in kind.__mro__ if "_dfm_fast_key" in vars(k))


def _rebuild(kind: type, key: Key) -> Any:
    """An empty module, for pickle and copy to fill."""
    new = swapped_class(kind, key)
    return new.__new__(new)
