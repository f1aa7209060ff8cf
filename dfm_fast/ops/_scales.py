"""What the per-scale operators share: the levels of a decomposition, their shapes, the parts of the
random stream they take, which of them are active, and the checks of all that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfm_fast import _checks
from dfm_fast._library import Shard
from dfm_fast.ops import pyramids
from dfm_fast.ops._filters import FILTERS

_ops = torch.ops.dfm_fast
DECOMPOSITIONS = (*FILTERS, "haar")
# Raw arguments. A normal is counted as 10 FLOPs (Philox is integer work).
STREAM, PYRAMID = "Tensor? state, int seed", "str filter, int[] factor, float[] gains"
NORMAL_FLOPS = 10


def accumulation(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """t [N] against like [N, ...]."""
    return t.view(-1, *[1] * (like.ndim - 1))


def split(seed: int | Tensor) -> tuple[Tensor | None, int]:
    return (seed, 0) if isinstance(seed, Tensor) else (None, seed)


def levels_ref(
    x: Tensor, num_levels: int, filter: str, factor: Sequence[int], gains: Sequence[float]
) -> list[Tensor]:
    """Levels of x, rounded to its dtype, times their gains."""
    if filter == "haar":
        levels = pyramids.haar_build_ref(x, num_levels)
    else:
        levels = pyramids.laplacian_build_ref(x, num_levels, filter, factor)
    wide = accumulation(x)
    return [v.to(wide) * g for v, g in zip(levels, gains, strict=True)]


def where_active(y: Tensor, mask: Tensor | None, level: int) -> Tensor:
    return y if mask is None else torch.where(per_sample(mask[:, level], y), y, 0)


def build_backward(grads: list[Tensor], filter: str, factor: Sequence[int]) -> Tensor:
    """Gradients of the levels -> gradient of x."""
    if filter == "haar":
        return _ops.haar_collapse(grads)
    return _ops.laplacian_build_backward(grads, filter, factor)


def level_shapes(
    shape: Sequence[int], num_levels: int, filter: str, factor: Sequence[int]
) -> list[tuple[int, ...]]:
    """[N, C, ...] of every level, coarse to fine, for x of `shape`."""
    n, c, *sizes = shape
    if filter != "haar":
        return [(n, c, *s) for s in pyramids.level_sizes(sizes, num_levels, factor)]
    details = pyramids.level_sizes(sizes, num_levels, (2, 2))[: num_levels - 1]
    return [(n, c, *(details or [tuple(sizes)])[0]), *((n, 3 * c, *s) for s in details)]


def level_offsets(
    shapes: Sequence[Sequence[int]], offset: int, shard: Shard | None = None
) -> list[int]:
    """Index of the first normal of every level. A shard has its part of the whole batch's."""
    start, batch = (0, shapes[0][0]) if shard is None else (shard.start, shard.batch)
    offsets = []
    for _, *sizes in shapes:
        offsets.append(offset + start * math.prod(sizes))
        offset = offset + (batch * math.prod(sizes) + 3) // 4 * 4
    return offsets


def wanted_levels(
    active: Sequence[bool] | Tensor | None, num_levels: int
) -> tuple[list[bool], Tensor | None]:
    """(levels to compute, mask [N, L] or None)."""
    if active is None or isinstance(active, Tensor):
        return [True] * num_levels, None if active is None else active.contiguous()
    return list(active), None


def gains_of(std: Sequence[float] | None, num_levels: int) -> list[float]:
    return [1.0] * num_levels if std is None else [1 / s for s in std]


def level_flops(
    x: Sequence[int], wanted: Sequence[bool], filter: str, factor: Sequence[int], each: int
) -> int:
    """The pyramid's, and `each` per element of a wanted level."""
    shapes = level_shapes(x, len(wanted), filter, factor)
    pyramid = pyramids.build_flops(x, len(wanted), filter, factor)
    return pyramid + each * sum(math.prod(s) for s, w in zip(shapes, wanted, strict=True) if w)


def check_active(op: str, active: Any, x: Tensor, num_levels: int) -> None:
    if active is None:
        return
    if isinstance(active, Tensor):
        if active.dtype != torch.bool:
            _checks.fail(op, "active", "a bool tensor", active.dtype, TypeError)
        if active.shape != (x.shape[0], num_levels):
            _checks.fail(op, "active", f"shape {[x.shape[0], num_levels]}", list(active.shape))
        if active.device != x.device:
            _checks.fail(op, "active", f"device {x.device} like x", active.device)
        return
    if not isinstance(active, list | tuple) or not all(isinstance(a, bool) for a in active):
        _checks.fail(op, "active", "bools, or a bool tensor [N, L]", repr(active), TypeError)
    if len(active) != num_levels:
        _checks.fail(op, "active", f"{num_levels} levels", len(active))


def check_std(op: str, std: Any, num_levels: int) -> list[float]:
    if std is None:
        return [1.0] * num_levels
    if not isinstance(std, list | tuple) or not all(isinstance(s, int | float) for s in std):
        _checks.fail(op, "std", "a sequence of numbers", repr(std), TypeError)
    if len(std) != num_levels or not all(0 < s < math.inf for s in std):
        _checks.fail(op, "std", f"{num_levels} positive numbers, one per level", std)
    return gains_of(std, num_levels)


def check_decomposition(
    op: str, x: Tensor, num_levels: int, filter: str, factor: int | Sequence[int]
) -> tuple[int, ...]:
    """The factor per axis, all checked."""
    _checks.choice(op, "filter", filter, DECOMPOSITIONS)
    if filter == "haar":
        _checks.tensor(op, "x", x, (4,))
        if factor not in (2, (2, 2), [2, 2]):
            _checks.fail(op, "factor", "2 for filter 'haar'", factor)
    factor, _ = pyramids.plan(op, "x", x.shape[2:], num_levels, filter, factor)
    return factor
