"""Files that others wrote. Damaged, or claiming what they do not hold, they are a ValueError that
names them; what is made of them is in proportion to their size."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dfm_fast import _checks

M = TypeVar("M", bound=nn.Module)
BUFFERS = 64 << 20  # bytes of buffers that are not saved, beside 16 times those of the weights


def read_json(path: Path) -> dict[str, Any]:
    """An object; ValueError that names the file where it holds none."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got a damaged file: {error}") from error
    if not isinstance(values, dict):
        _checks.fail(str(path), "content", "a JSON object", type(values).__name__)
    return values


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file of safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, KeyError) as error:  # a key: a dtype that torch has not
        raise ValueError(f"{path}: damaged file: {error}") from error


@contextmanager
def arguments_of(path: Path) -> Iterator[None]:
    """What a function says of arguments that a file gave names the file. Of plain values it may be
    any error: a key that is missing, a number that is a text."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: {told}") from error


def on_meta(path: Path, make: Callable[[], M], shapes: Mapping[str, Tensor]) -> M:
    """A module without memory, made of arguments in a file, for weights of these shapes. It has not
    many more parameters than there are weights, so that a wrong depth takes no hours."""
    with arguments_of(path), torch.device("meta"), _at_most(2 * len(shapes) + 64):
        module = make()
        saved = module.state_dict()
        extra = sum(b.nbytes for name, b in module.named_buffers() if name not in saved)
        limit = BUFFERS + 16 * sum(v.nbytes for v in shapes.values())
        if extra > limit:
            raise ValueError(f"expected buffers of at most {limit} bytes, got {extra}")
    return module


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """ValueError where more are registered in this thread."""
    count, thread = 0, threading.get_ident()

    def note(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > parameters:
            raise ValueError(f"expected at most {parameters} parameters beside the weights saved")

    handle = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()
