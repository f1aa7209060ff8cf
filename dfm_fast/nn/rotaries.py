"""Normalisation of queries and keys with rotary embedding, as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.ops import qk_norm_rope


class QKNormRotary(nn.Module):
    """RMSNorm of every head of q and k, then rotary embedding: `dfm_fast.qk_norm_rope`.

    Args:
        head_dim: d, even.
        eps: added to the mean square.
        interleaved: pairs are (2i, 2i+1), else (i, i + d/2).
        elementwise_affine: False normalises without weights.

    Parameters: norm_q.weight and norm_k.weight [d], named as in diffusers' attention.

    Raises:
        TypeError, ValueError: as `qk_norm_rope`.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        eps: float = 1e-6,
        interleaved: bool = True,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        if _checks.integer(op, "head_dim", head_dim, 2) % 2:
            _checks.fail(op, "head_dim", "an even number", head_dim)
        self.head_dim, self.eps, self.interleaved = head_dim, eps, interleaved
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_q = nn.RMSNorm(head_dim, eps, elementwise_affine, **options)
        self.norm_k = nn.RMSNorm(head_dim, eps, elementwise_affine, **options)
        ones = None if elementwise_affine else torch.ones(head_dim, **options)
        self.ones: Tensor | None
        self.register_buffer("ones", ones, persistent=False)

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """q [B, T, H, d], k [B, T, Hkv, d], cos and sin [T, d/2], [B, T, d/2] or None: no rotation
        -> q, k, contiguous."""
        weights = self.ones, self.ones
        if self.ones is None:
            weights = self.norm_q.weight, self.norm_k.weight
        options: dict[str, Any] = {"eps": self.eps, "interleaved": self.interleaved}
        return qk_norm_rope(q, k, *weights, cos, sin, **options)

    def extra_repr(self) -> str:
        return f"interleaved={self.interleaved}"
