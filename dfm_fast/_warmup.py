"""Everything that a first call waits for, ahead of it: kernels compiled, tiles chosen."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dfm_fast import _checks
from dfm_fast.kernels import tuning


@dataclass(frozen=True)
class WarmupReport:
    """What a warm-up did."""

    seconds: float
    compiled: int  # Triton kernels, compiled or read from Triton's cache
    tiles: dict[str, str]  # bucket -> "shipped", "cache", "timed" or "default", of those new to us

    @property
    def timed(self) -> int:
        """Buckets whose candidates were timed."""
        return sum(source == "timed" for source in self.tiles.values())


def warmup(
    model: Callable[..., Any], *inputs: Any, backward: bool = False, **conditions: Any
) -> WarmupReport:
    """Call a model once, so that its first real call of these sizes finds its kernels compiled and,
    with DFM_FAST_AUTOTUNE=1, tuned. Call it once for every size, in the mode (train or eval, under
    autocast or not) of the calls to come.

    Nothing of the model is changed, nor any generator of random numbers: parameters, their
    gradients and buffers are as before, even after an error.

    Args:
        model: a module, or what else is called, such as a `SnapGenPipeline`.
        inputs, conditions: what it is called with. A tuple of ints stands for a tensor of that
            shape with normal values, of the model's dtype and device; other lists, tuples and dicts
            are looked into, and all else is passed on as it is.
        backward: compute gradients, too, of all that the model's outputs sum to.

    Raises:
        ValueError: no inputs, or DFM_FAST_AUTOTUNE neither 0 nor 1. TypeError: a model that cannot
            be called, or, with `backward`, is no `torch.nn.Module`. What the model raises.
    """
    _check(model, inputs or conditions, backward)
    tuning.autotune()
    device, dtype = _home(model)
    start, before = time.perf_counter(), set(tuning.sources)
    compiled = _compiled()
    with _unchanged(model, device):
        args, kwargs = pytree.tree_map(
            lambda leaf: torch.randn(leaf, device=device, dtype=dtype) if _is_shape(leaf) else leaf,
            (list(inputs), conditions),  # a tuple of all could be taken for a shape
            is_leaf=_is_shape,
        )
        with torch.set_grad_enabled(backward):
            out = model(*args, **kwargs)
        if backward:
            _differentiate(model, out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    tiles = {key[1]: source for key, source in tuning.sources.items() if key not in before}
    return WarmupReport(time.perf_counter() - start, _compiled() - compiled, tiles)


def _check(model: Any, given: Any, backward: bool) -> None:
    if not callable(model):
        _checks.fail("warmup", "model", "a module or a function", type(model).__name__, TypeError)
    if not given:
        _checks.fail("warmup", "inputs", "what the model is called with, or shapes of it", "none")
    if backward and not isinstance(model, nn.Module):
        got = type(model).__name__
        _checks.fail("warmup", "model", "a module, to go backward through", got, TypeError)


def _home(model: Any) -> tuple[torch.device, torch.dtype]:
    """Where the model's tensors are, and their floating-point dtype."""
    if isinstance(model, nn.Module):
        for p in (*model.parameters(), *model.buffers()):
            if p.is_floating_point():
                return p.device, p.dtype
    device = torch.device(getattr(model, "device", "cpu"))
    return device, getattr(model, "dtype", torch.float32)


def _is_shape(leaf: Any) -> bool:
    return (
        isinstance(leaf, tuple)
        and len(leaf) > 0
        and all(isinstance(n, int) and not isinstance(n, bool) for n in leaf)
    )


def _differentiate(model: Any, out: Any) -> None:
    """Gradients that nobody keeps: no `.grad` is touched, no hook of one runs."""
    total = [t.float().sum() for t in pytree.tree_leaves(out) if _differentiable(t)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not total or not parameters:
        _checks.fail("warmup", "backward", "outputs and parameters with gradients", "none")
    torch.autograd.grad(torch.stack(total).sum(), parameters, allow_unused=True)


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


@contextmanager
def _unchanged(model: Any, device: torch.device) -> Iterator[None]:
    """Buffers (a norm's running statistics) and random numbers go back to what they were."""
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


def _compiled() -> int:
    """Kernels of ours that Triton has in this process. It is not imported for that."""
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("dfm_fast.kernels.")]
    kernels = {id(k): k for m in modules for k in vars(m).values() if hasattr(k, "device_caches")}
    return sum(len(cache[0]) for k in kernels.values() for cache in k.device_caches.values())
