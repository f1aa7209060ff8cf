"""Memory formats that operators keep: contiguous and channels_last (2-D and 3-D)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """contiguous_format, or channels_last (2-D, 3-D) where x is that and not contiguous."""
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    if not x.is_contiguous() and x.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def empty_in(layout: torch.memory_format, x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def lay_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x with exactly the strides of a new tensor of that layout (`contiguous` leaves those of
    sides of one, and of empty tensors, as they are)."""
    out = empty_in(layout, x, x.shape)
    return x if x.stride() == out.stride() else out.copy_(x)


def dense(x: Tensor, layout: torch.memory_format | None = None) -> Tensor:
    """x itself where it is contiguous or channels_last, else a contiguous copy."""
    if layout is None and x.is_contiguous():
        return x
    return x.contiguous(memory_format=layout or memory_format(x))
