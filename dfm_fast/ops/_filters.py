"""The filters of the pyramids: one sparse matrix per axis, down, up, and their transposes.

They define the operators' boundary rules too; the reference and the general Triton kernel gather
by them, and the tests derive their bounds from them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FILTERS = ("nearest", "bilinear", "binomial", "dct")


class Taps(NamedTuple):
    """A sparse matrix [n_out, n_in], K entries a row: y[i] = sum_k weight[i, k] x[index[i, k]]."""

    index: Tensor  # type: ignore[assignment]  # int64 [n_out, K]; tuples have a method so called
    weight: Tensor  # float64 [n_out, K]
    n_in: int


@functools.cache
def _dct_down() -> Tensor:
    """[4, 8]: C4^T [I 0] C8 / sqrt(2); the 1/sqrt(2) keeps the mean. up = 2 down^T."""

    def basis(n: int) -> Tensor:  # orthonormal DCT-II [frequency, sample]
        k, m = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
        scale = torch.full_like(k, math.sqrt(2 / n))
        scale[0] = math.sqrt(1 / n)
        return scale * torch.cos(math.pi * (m + 0.5) * k / n)

    return basis(4).T @ basis(8)[:4] / math.sqrt(2)


def _reflect_101(i: Tensor, n: int) -> Tensor:
    """... 2 1 | 0 1 ... n-1 | n-2 n-3 ...: OpenCV's BORDER_REFLECT_101, for any i."""
    if n == 1:
        return torch.zeros_like(i)
    i = i.remainder(2 * n - 2)
    return torch.where(i < n, i, 2 * n - 2 - i)


def _down_taps(filter: str, n: int) -> tuple[Tensor, Tensor]:
    i = torch.arange(half(n))[:, None]
    if filter == "binomial":
        weight = torch.tensor([1, 4, 6, 4, 1], dtype=torch.float64) / 16
        return _reflect_101(2 * i + torch.arange(-2, 3), n), weight.expand(len(i), 5)
    if filter == "dct":
        return i // 4 * 8 + torch.arange(8), _dct_down()[i[:, 0] % 4]
    return 2 * i + torch.arange(2), torch.full((len(i), 2), 0.5, dtype=torch.float64)


def _up_taps(filter: str, n: int) -> tuple[Tensor, Tensor]:
    m, j = half(n), torch.arange(n)[:, None]
    i, odd = j // 2, (j % 2).bool()
    if filter == "nearest":
        return i, torch.ones(n, 1, dtype=torch.float64)
    if filter == "bilinear":
        index = torch.where(odd, i + torch.arange(2), i - 1 + torch.arange(2)).clamp(0, m - 1)
        near, far = torch.tensor([[3.0, 1.0], [1.0, 3.0]], dtype=torch.float64) / 4
        return index, torch.where(odd, near, far)
    if filter == "dct":
        return j // 8 * 4 + torch.arange(4), 2 * _dct_down().T[j[:, 0] % 8]
    index = i + torch.arange(-1, 2)
    index = torch.where(index < 0, min(1, m - 1), index).clamp(max=m - 1)
    even = torch.tensor([1.0, 6.0, 1.0], dtype=torch.float64) / 8
    return index, torch.where(odd, torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64), even)


def _transpose(taps: Taps) -> Taps:
    """The same matrix's transpose, rows padded with zero weights to the longest."""
    n_out = len(taps.index)
    keep = taps.weight.flatten() != 0
    column, weight = taps.index.flatten()[keep], taps.weight.flatten()[keep]
    row = torch.arange(n_out)[:, None].expand_as(taps.index).flatten()[keep]
    order = column.argsort(stable=True)
    column, row, weight = column[order], row[order], weight[order]
    count = torch.bincount(column, minlength=taps.n_in)
    slot = torch.arange(len(column)) - (count.cumsum(0) - count)[column]
    shape = (taps.n_in, max(1, int(count.max())))
    index = torch.zeros(shape, dtype=torch.int64)
    padded = torch.zeros(shape, dtype=torch.float64)
    index[column, slot] = row
    padded[column, slot] = weight
    return Taps(index, padded, n_out)


@functools.lru_cache(maxsize=512)
def axis_taps(filter: str, kind: str, n: int) -> Taps:
    """The matrix of one axis whose fine side is n; kind is down, up, down_adjoint or up_adjoint."""
    direction, adjoint = kind.removesuffix("_adjoint"), kind.endswith("_adjoint")
    if direction == "down":
        taps = Taps(*_down_taps(filter, n), n)
    else:
        taps = Taps(*_up_taps(filter, n), half(n))
    return _transpose(taps) if adjoint else taps


def half(n: int) -> int:
    """Side of the coarser level: n/2, rounded up where a filter takes odd sides."""
    return (n + 1) // 2


def halvings(factor: Sequence[int]) -> list[tuple[int, ...]]:
    """A factor as 2x steps; each names the axes it halves: (1, 2, 4) -> [(1, 2), (2,)]."""
    steps = max(factor).bit_length() - 1
    return [tuple(a for a, f in enumerate(factor) if f >= 2 << s) for s in range(steps)]


def halve(sizes: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(half(n) if a in axes else n for a, n in enumerate(sizes))
