"""A class that is known by its layout alone is compared by value before it is believed."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from dfm_fast._library import INTERPRET
from dfm_fast.acceleration._units import Unit, unwrapped

# Relative, of float64 results (float32 under Triton's interpreter, whose kernels have no float64).
CLOSE = 1e-4 if INTERPRET else 1e-9
_DTYPE = torch.float32 if INTERPRET else torch.float64
_FOUND: dict[Any, str | None] = {}


def agrees(module: nn.Module, unit: Unit) -> str | None:
    """None if the unit computes what the module does, else why it is not taken. Tried once for all
    modules of one class and configuration, on a copy with random weights on the CPU."""
    key = unwrapped(type(module)), unit.package, unit.of, _configuration(module)
    if key not in _FOUND:
        _FOUND[key] = _compare(module, unit)
    return _FOUND[key]


def _configuration(module: nn.Module) -> str:
    plain = (bool, int, float, str)
    own = [[(k, v) for k, v in vars(m).items() if isinstance(v, plain)] for m in module.modules()]
    shapes = [(name, *p.shape) for name, p in module.named_parameters()]
    return repr((module, own, shapes))


@torch.no_grad()
def _compare(module: nn.Module, unit: Unit) -> str | None:
    assert unit.trial is not None
    try:
        shadow = _shadow(module)
        inputs = unit.trial(shadow)
        want = type(shadow).forward(shadow, *inputs)
        got = unit.forward(shadow, *inputs)
        close = got is not None and got.shape == want.shape
        if close and (got - want).norm() <= CLOSE * want.norm():
            return None
    except Exception as error:
        return f"it has the name and layout of {unit.of}, but cannot be tried: {error}"
    return f"it has the name and layout of {unit.of}, but computes something else"


def _shadow(module: nn.Module) -> nn.Module:
    """A copy without hooks and without FSDP, in eval mode, with random weights."""
    shadow = _copied(module, {})
    generator = torch.Generator().manual_seed(0)
    for p in shadow.parameters():
        p.normal_(generator=generator).mul_(p[0].numel() ** -0.5 if p.ndim > 1 else 1)
    return shadow


def _copied(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """All modules new, their tensors new and empty, every other attribute the same object."""
    if module in done:
        return done[module]
    kind = unwrapped(type(module))
    new = done[module] = kind.__new__(kind)
    hooks: dict[str, Any] = {n: OrderedDict() for n in vars(module) if n.endswith("_hooks")}
    vars(new).update({**vars(module), **hooks, "training": False})
    new._parameters, new._buffers = (
        {name: None if p is None else _empty(p) for name, p in tensors.items()}
        for tensors in (module._parameters, module._buffers)
    )
    new._modules = {k: m if m is None else _copied(m, done) for k, m in module._modules.items()}
    return new


def _empty(p: Tensor) -> Tensor:
    dtype = _DTYPE if p.is_floating_point() else p.dtype
    new = torch.zeros(p.shape, dtype=dtype)
    return nn.Parameter(new, False) if isinstance(p, nn.Parameter) else new


def randn(*shape: int) -> Tensor:
    """An input of a trial."""
    generator = torch.Generator().manual_seed(shape[-1])
    return torch.randn(shape, generator=generator, dtype=_DTYPE)
