"""Argument checks. Every message names operator, argument, what was expected and what was got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(op: str, argument: str, expected: str, got: object, error: type = ValueError) -> NoReturn:
    raise error(f"{op}: {argument}: expected {expected}, got {got}")


def tensor(op: str, argument: str, value: Any, ndim: Sequence[int]) -> torch.Tensor:
    """A strided floating-point tensor with one of these numbers of dimensions."""
    if not isinstance(value, torch.Tensor):
        fail(op, argument, "a tensor", type(value).__name__, TypeError)
    if value.dtype not in FLOATING:
        fail(op, argument, "float32, bfloat16, float16 or float64", value.dtype, TypeError)
    if value.layout != torch.strided:
        fail(op, argument, "a strided tensor", value.layout, TypeError)
    if value.ndim not in ndim:
        some = f"{ndim[0]} or more" if isinstance(ndim, range) else " or ".join(map(str, ndim))
        fail(op, argument, f"{some} dimensions", list(value.shape))
    return value


def like(op: str, argument: str, value: torch.Tensor, name: str, other: torch.Tensor) -> None:
    """Same dtype and device as another argument."""
    if value.dtype != other.dtype:
        fail(op, argument, f"{other.dtype} like {name}", value.dtype, TypeError)
    if value.device != other.device:
        fail(op, argument, f"device {other.device} like {name}", value.device)


def integer(op: str, argument: str, value: Any, at_least: int) -> int:
    """A Python int (not a bool) that is at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        fail(op, argument, "an int", type(value).__name__, TypeError)
    if value < at_least:
        fail(op, argument, f"at least {at_least}", value)
    return value  # type: ignore[return-value]  # a SymInt does what an int does


def choice(op: str, argument: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        fail(op, argument, f"one of {', '.join(choices)}", repr(value))
    return value


def shape(op: str, argument: str, value: Any) -> tuple[int, ...]:
    """A sequence of sizes."""
    value = (value,) if isinstance(value, int) else value
    if not isinstance(value, Sequence) or not all(isinstance(n, int | torch.SymInt) for n in value):
        fail(op, argument, "a sequence of ints", repr(value), TypeError)
    if any(n < 0 for n in value):
        fail(op, argument, "sizes of at least 0", list(value))
    return tuple(value)
