"""Norms as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.ops import ada_layer_norm, rms_norm


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` by `dfm_fast.rms_norm`: same arguments, state_dict, repr and defaults.

    eps=None is, as there, the machine epsilon of the arithmetic: float32's, or float64's for
    float64. Under autocast x keeps its dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., *normalized_shape] -> like x."""
        dims = len(self.normalized_shape)
        if x.shape[-dims:] != self.normalized_shape:
            expected = f"[..., {', '.join(map(str, self.normalized_shape))}]"
            _checks.fail(type(self).__name__, "x", expected, list(x.shape))
        wide = torch.promote_types(x.dtype, torch.float32)
        eps = torch.finfo(wide).eps if self.eps is None else self.eps
        if dims == 1:
            return rms_norm(x, self.weight, eps=eps)
        weight = None if self.weight is None else self.weight.flatten()
        return rms_norm(x.flatten(-dims), weight, eps=eps).view(x.shape)


class AdaLayerNorm(nn.Module):
    """LayerNorm whose shift and scale come from a conditioning vector: adaLN, and adaLN-Zero.

    `linear` projects silu(emb) to `chunks` vectors a sample; weights of diffusers' layers load as
    they are:

        2    scale, shift                                        AdaLayerNormContinuous
        3    shift, scale, gate                                  AdaLayerNormZeroSingle
        6    shift, scale, gate, then those of the MLP           AdaLayerNormZero

    (Theirs with elementwise_affine=False, or without embeddings of their own.) Note the order of 2.

    Args:
        embedding_dim: D, the elements of a token.
        conditioning_dim: elements of emb; None is D.
        chunks: 2, 3 or 6.
        eps: of the norm. diffusers' default is 1e-5 with 2 chunks.
        bias: of `linear`.

    Raises:
        TypeError, ValueError: sizes and chunks, here at once.
    """

    def __init__(
        self,
        embedding_dim: int,
        conditioning_dim: int | None = None,
        *,
        chunks: int = 2,
        eps: float = 1e-6,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        _checks.integer(op, "embedding_dim", embedding_dim, 1)
        if conditioning_dim is None:
            conditioning_dim = embedding_dim
        _checks.integer(op, "conditioning_dim", conditioning_dim, 1)
        if chunks not in (2, 3, 6):
            _checks.fail(op, "chunks", "2, 3 or 6", chunks)
        self.embedding_dim, self.chunks, self.eps = embedding_dim, chunks, eps
        width = chunks * embedding_dim
        self.linear = nn.Linear(conditioning_dim, width, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor | tuple[Tensor, ...]:
        """x [B, ..., D], emb [B, conditioning_dim] -> y like x; with 3 chunks (y, gate), with 6
        (y, gate, shift_mlp, scale_mlp, gate_mlp), each of the others [B, D]."""
        first, second, *rest = self.linear(nn.functional.silu(emb)).chunk(self.chunks, dim=-1)
        shift, scale = (second, first) if self.chunks == 2 else (first, second)
        y = ada_layer_norm(x, shift, scale, eps=self.eps)
        return (y, *rest) if rest else y

    def extra_repr(self) -> str:
        return f"{self.embedding_dim}, chunks={self.chunks}, eps={self.eps}"
