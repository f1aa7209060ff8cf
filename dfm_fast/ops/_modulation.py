"""Arguments of the operators on rows: checks, and the strides that kernels take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfm_fast import _checks


def walkable(x: Tensor) -> Tensor:
    """x itself where a kernel can walk it: rows dense, and one stride between the rows of a sample
    ([B, D] and [B, T, D] always have one)."""
    walks = x.is_contiguous() or (x.ndim <= 3 and x.stride(-1) == 1)
    return x if walks else x.contiguous()


def check_x(op: str, x: Any, at_least: int, eps: Any) -> None:
    _checks.tensor(op, "x", x, range(at_least, 65))
    if x.shape[-1] == 0:
        _checks.fail(op, "x", "a last dimension of at least 1", list(x.shape))
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        _checks.fail(op, "eps", "a number", repr(eps), TypeError)
    if not eps >= 0:
        _checks.fail(op, "eps", "at least 0", eps)


def check_beside(op: str, name: str, value: Any, x: Tensor) -> None:
    """On x's device, and not float64 where the arithmetic is in float32."""
    if value.device != x.device:
        _checks.fail(op, name, f"device {x.device} like x", value.device)
    if value.dtype == torch.float64 != x.dtype:
        _checks.fail(
            op, name, f"float64 only where x is, which is {x.dtype}", value.dtype, TypeError
        )


def check_modulation(op: str, x: Tensor, **modulation: Any) -> None:
    """Each [B, D] or like x, all alike."""
    first = next(iter(modulation))
    for name, m in modulation.items():
        _checks.tensor(op, name, m, range(2, 65))
        check_beside(op, name, m, x)
        like = modulation[first]
        # Not against both: where sizes are symbols, that would say that T is not D.
        if m.shape != (x.shape if m.ndim == x.ndim else (x.shape[0], x.shape[-1])):
            expected = f"[{x.shape[0]}, {x.shape[-1]}] or {list(x.shape)} like x"
            _checks.fail(op, name, expected, list(m.shape))
        if m.shape != like.shape:
            _checks.fail(op, name, f"{list(like.shape)} like {first}", list(m.shape))
        _checks.like(op, name, m, first, like)


def check_branch(op: str, x: Tensor, y: Any) -> None:
    _checks.tensor(op, "y", y, range(2, 65))
    if y.shape != x.shape:
        _checks.fail(op, "y", f"{list(x.shape)} like x", list(y.shape))
    if y.device != x.device:
        _checks.fail(op, "y", f"device {x.device} like x", y.device)
    if torch.promote_types(x.dtype, y.dtype) != x.dtype:
        _checks.fail(op, "y", f"{x.dtype} like x, or narrower", y.dtype, TypeError)
