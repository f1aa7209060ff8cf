r"""A product of two matrices in float32 or float64, for linear layers on a CPU. Not public:
`nn._linears` knows where it is faster than torch's.

    c = a b + other

A matrix of rows or of columns that lie side by side in memory is read as it is, but for an a of
columns, which is transposed first, once. Sums of 128 products at most are added up, so the error is
under that of one chain. The number of threads changes no bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfm_fast._library import define

_ops = torch.ops.dfm_fast


def matrix_product_ref(a: Tensor, b: Tensor, other: Tensor | None = None) -> Tensor:
    """Defines `matrix_product`."""
    return a @ b if other is None else torch.addmm(other, a, b)


def _fake(a: Tensor, b: Tensor, other: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


define(
    "matrix_product(Tensor a, Tensor b, Tensor? other=None) -> Tensor",
    reference=matrix_product_ref,
    fake=_fake,
    kernel=None,
    flops=lambda a, b, *_: 2 * a[0] * a[1] * b[1],
)


def matrix_product(a: Tensor, b: Tensor, other: Tensor | None = None) -> Tensor:
    """a [M, K], b [K, N], other [N] or [M, N] or None, all alike -> [M, N]. Has no gradient."""
    return _ops.matrix_product(a, b, other)
