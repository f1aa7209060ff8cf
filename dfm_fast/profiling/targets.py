"""What `dfm-fast profile` is pointed at: a model, and the inputs that it is called with."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dfm_fast import _checks
from dfm_fast.models import (
    DFM_B,
    DFM_L,
    DFM_S,
    DFM_XL,
    DFMTransformer,
    SnapGenDecoder,
    SnapGenUNet,
    snapgen_imagenet,
    snapgen_t2i,
    snapgen_tiny,
)
from dfm_fast.profiling.costs import tensors

OP = "profile"
LAST = torch.channels_last
TOKENS = 77  # of a text, as CLIP reads it
Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # a model, args and kwargs


class UsersError(Exception):
    """Code of the user's ended in the exception that this was raised from."""


@contextlib.contextmanager
def users_code() -> Iterator[None]:
    """What raises inside is not about the arguments: its traceback is to be shown."""
    try:
        yield
    except Exception as error:
        raise UsersError(f"{type(error).__name__}: {error}") from error


@dataclass
class Target:
    """A model and what it is called with."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    note: str = ""  # where something was guessed

    @property
    def device(self) -> torch.device:
        """Of its parameters, or of its inputs where it has none."""
        found = [*self.module.parameters(), *tensors((self.args, self.kwargs))]
        return found[0].device if found else torch.device("cpu")

    def given(self) -> str:
        """The shapes of its inputs."""
        found = tensors((self.args, self.kwargs))
        return ", ".join("x".join(map(str, t.shape)) or "a number" for t in found)


def load(
    target: str, batch: int, size: int | None, device: torch.device, dtype: torch.dtype | None
) -> Target:
    """The preset or the factory `package.module:callable`.

    Args:
        batch, size: of inputs that are made here; None is the preset's usual size.
        device, dtype: of the model and of inputs of floating point; dtype None keeps them.

    Raises:
        ValueError: no such preset, module or callable; a size that does not fit. TypeError: what
            the factory returns is no module. UsersError: the factory raised.
    """
    _checks.integer(OP, "--batch", batch, 1)
    if size is not None:
        _checks.integer(OP, "--size", size, 1)
    if ":" in target:
        found = _cast(_made(target, batch, size), dtype)
    elif target in PRESETS:
        found = _preset(target, batch, size, dtype or torch.float32)
    else:
        known = f"a preset ({', '.join(PRESETS)}), package.module:callable or file.py"
        _checks.fail(OP, "TARGET", known, repr(target))
    found.module.to(device)
    found.args, found.kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.to(device), (found.args, found.kwargs)
    )
    return found


def _cast(found: Target, dtype: torch.dtype | None) -> Target:
    """All of floating point."""
    if dtype is not None:
        found.module.to(dtype)
        found.args, found.kwargs = pytree.tree_map_only(
            Tensor,
            lambda t: t.to(dtype) if t.is_floating_point() else t,
            (found.args, found.kwargs),
        )
    return found


# --- Presets --------------------------------------------------------------------------------------


def _preset(name: str, batch: int, size: int | None, dtype: torch.dtype) -> Target:
    make, usual = PRESETS[name]
    torch.manual_seed(0)
    module, args, kwargs = make(batch, usual if size is None else size, dtype)
    randomise(module)
    return Target(name, module.to(dtype), args, kwargs)


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Normal numbers where a new model has zeros: it would give zeros, whatever its kernels."""
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        if not p.any():
            scale = 0.1 if p.ndim < 2 else p[0].numel() ** -0.5
            p.copy_(scale * torch.randn(p.shape, generator=generator))


def _dfm(make: Callable[..., DFMTransformer], batch: int, size: int, dtype: torch.dtype) -> Made:
    """Two levels of latents, the finer one's sides of `size`, and labels."""
    if size % 2:
        _checks.fail(OP, "--size", "an even number, for the coarser level", size)
    model = make(input_size=(size // 2,) * 2)
    levels = [torch.randn(batch, 4, side, side).to(dtype) for side in (size // 2, size)]
    t = torch.rand(batch, 2)  # noise levels are float32, as the sampler's
    labels = torch.arange(batch) % model.num_classes
    return model, (levels, t, torch.ones(t.shape, dtype=torch.bool)), {"y": labels}


def _snapgen(make: Callable[[], SnapGenUNet], batch: int, size: int, dtype: torch.dtype) -> Made:
    """Latents with sides of `size`, a noise level and a text."""
    model = make()
    factor = 2 ** (len(model.channels) - 1)
    if size % factor:
        _checks.fail(OP, "--size", f"a multiple of {factor}, for the stages", size)
    x = torch.randn(batch, model.in_channels, size, size).to(dtype, memory_format=LAST)
    text = torch.randn(batch, TOKENS, model.config["cross_dim"]).to(dtype)
    return channels_last(model), (x, torch.rand(batch), text), {}


def _decoder(batch: int, size: int, dtype: torch.dtype) -> Made:
    """Latents with sides of `size`."""
    model = SnapGenDecoder()
    x = torch.randn(batch, model.config["latent_channels"], size, size)
    return channels_last(model), (x.to(dtype, memory_format=LAST),), {}


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=LAST)  # type: ignore[call-overload]  # torch's stub lacks it


# name: (what makes model and inputs, the usual size: latents of pictures of 256 or 512 px; digits)
PRESETS: dict[str, tuple[Callable[..., Made], int]] = {
    "DFM_S": (functools.partial(_dfm, DFM_S), 32),
    "DFM_B": (functools.partial(_dfm, DFM_B), 32),
    "DFM_L": (functools.partial(_dfm, DFM_L), 32),
    "DFM_XL": (functools.partial(_dfm, DFM_XL), 32),
    "snapgen_t2i": (functools.partial(_snapgen, snapgen_t2i), 64),
    "snapgen_imagenet": (functools.partial(_snapgen, snapgen_imagenet), 64),
    "snapgen_tiny": (functools.partial(_snapgen, snapgen_tiny), 16),
    "snapgen_decoder": (_decoder, 64),
}


# --- Models of the user's -------------------------------------------------------------------------


def _made(target: str, batch: int, size: int | None) -> Target:
    factory = _factory(target)
    with users_code():
        made = factory()
    module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        expected = "a callable that returns a torch.nn.Module, or (module, inputs)"
        _checks.fail(OP, "TARGET", expected, f"{target} -> {type(made).__name__}", TypeError)
    if inputs is None:
        x = _guessed(target, module, batch, size)
        return Target(target, module, (x,), note="an input guessed from the first layer")
    if isinstance(inputs, dict):
        return Target(target, module, (), inputs)
    return Target(target, module, tuple(inputs) if isinstance(inputs, tuple) else (inputs,))


def _factory(target: str) -> Callable[[], Any]:
    """package.module:callable, of what is installed or lies in the current folder."""
    path, _, name = target.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        with users_code():
            module = importlib.import_module(path)
    except UsersError as error:
        if isinstance(error.__cause__, ImportError):
            _checks.fail(OP, "TARGET", "a module that can be imported", f"{path!r}: {error}")
        raise
    factory: Any = module
    for part in name.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        expected = f"a callable of {path}, such as {', '.join(known[:8]) or 'none it has'}"
        _checks.fail(OP, "TARGET", expected, repr(name))
    return factory


def _guessed(target: str, module: nn.Module, batch: int, size: int | None) -> Tensor:
    """An input for the first layer: a map for a convolution, rows for a linear layer."""
    kinds: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and type(layer) in kinds:
            return torch.randn(batch, layer.in_channels, *[size or 64] * kinds[type(layer)])
        if isinstance(layer, nn.Linear):
            return torch.randn(batch, size or 256, layer.in_features)
        if isinstance(layer, nn.Embedding):
            break
    expected = "(module, inputs) for a module whose first layer is no convolution or linear layer"
    _checks.fail(OP, "TARGET", expected, f"{target} -> {type(module).__name__}")


def script(target: str) -> Path | None:
    """The file that a target is, if it is to be one."""
    path = Path(target)
    if path.suffix != ".py":
        return None
    if not path.is_file():
        _checks.fail(OP, "TARGET", "a script that is there", repr(target))
    return path
