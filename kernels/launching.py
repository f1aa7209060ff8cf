"""What launchers share. They run before every launch: what they compute from shapes is kept, and
Triton's own host functions take microseconds each."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dfm_fast._library import INTERPRET

# For what follows from shapes, strides and dtypes. Many shapes at once are rare.
planned = functools.lru_cache(maxsize=4096)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest that is not less than n, 1 at least."""
    return 1 << max(n - 1, 0).bit_length()


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Make x's device current, which is where Triton launches; free where it already is."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


class Layout(NamedTuple):
    """Where a tensor's elements lie, as plans are kept by it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def contiguous(self) -> bool:
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != expected:
                return 0 in self.shape
            expected *= n
        return True


def layout(x: Tensor | None) -> Layout | None:
    return None if x is None else Layout(x.shape, x.stride())


def registers(most: int) -> dict[str, int]:
    """An option: ptxas spills 8 bytes for a step of occupancy unless told what is enough."""
    return {} if INTERPRET or torch.version.hip else {"maxnreg": most}
