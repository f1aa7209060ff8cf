"""Attention layers with few key heads, with the names and weights of diffusers' `Attention`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.nn._linears import called
from dfm_fast.nn._lists import ModuleList
from dfm_fast.nn._packs import linears, pack
from dfm_fast.nn.convolutions import DepthwiseConv2d
from dfm_fast.ops import multi_query_attention, qk_norm_rope, rms_norm, rope_2d
from dfm_fast.ops.convolutions import KERNEL_SIZES


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim))


class _Attention(nn.Module):
    """What the layers below have in common: their parameters."""

    packs: tuple[str, ...] = ("to_q", "to_k", "to_v")  # what reads the same input
    counts = "heads", "kv_heads"  # the names of these arguments

    def __init__(
        self,
        dim: int,
        cross_dim: int,
        heads: int,
        kv_heads: int = 1,
        *,
        head_dim: int | None = None,
        qk_norm: bool = True,
        eps: float = 1e-5,
        out_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        _checks.integer(op, "dim", dim, 1)
        of_q, of_k = self.counts
        if _checks.integer(op, of_q, heads, 1) and head_dim is None and dim % heads:
            _checks.fail(op, of_q, f"a divisor of dim = {dim}, or a head_dim", heads)
        if heads % _checks.integer(op, of_k, kv_heads, 1):
            _checks.fail(op, of_k, f"a divisor of {heads} heads", kv_heads)
        head_dim = dim // heads if head_dim is None else head_dim
        self.heads, self.kv_heads, self.head_dim, self.eps = heads, kv_heads, head_dim, eps
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, kv = heads * head_dim, kv_heads * head_dim
        self.to_q = nn.Linear(dim, inner, bias=False, **options)
        self.to_k = nn.Linear(cross_dim, kv, bias=False, **options)
        self.to_v = nn.Linear(cross_dim, kv, bias=False, **options)
        self.norm_q = nn.RMSNorm(head_dim, eps, **options) if qk_norm else None
        self.norm_k = nn.RMSNorm(head_dim, eps, **options) if qk_norm else None
        self.to_out = ModuleList([nn.Linear(inner, dim, bias=out_bias, **options)])
        pack(*self._packs())

    def _packs(self) -> list[nn.Linear]:
        return [getattr(self, name) for name in self.packs]

    # Both give every parameter memory of its own: .to() and the like, and copy.deepcopy.

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        pack(*self._packs())
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        pack(*self._packs())

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"


class MultiQueryAttention(_Attention):
    """Self-attention with few key heads, of SnapGen: to_q, to_k, to_v, RMSNorm of every head of q
    and k, rotary embedding, attention, to_out.

    Args:
        dim: of the tokens.
        heads, kv_heads: of queries; of keys and values, a divisor of it.
        head_dim: dim / heads by default.
        qk_norm: norm_q and norm_k, over the head dimension, `eps` added to the mean square.
        out_bias: of to_out.

    Parameters: to_q, to_k, to_v without bias, to_out.0, norm_q, norm_k: the `state_dict` of
    diffusers' `Attention(qk_norm="rms_norm", kv_heads=...)`. The three projections are one product.

    Raises:
        TypeError, ValueError: sizes that do not divide.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int = 1, **options: Any) -> None:
        super().__init__(dim, dim, heads, kv_heads, **options)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, dim]; cos, sin as `qk_norm_rope` takes them, or None: no rotation; mask bool
        [B, T] of the keys -> [B, T, dim]."""
        q, k, v = (_heads(y, self.head_dim) for y in linears(x, *self._packs()))
        of_q = None if self.norm_q is None else self.norm_q.weight
        of_k = None if self.norm_k is None else self.norm_k.weight
        if self.norm_q is not None or cos is not None:
            q, k = qk_norm_rope(q, k, of_q, of_k, cos, sin, eps=self.eps)
        return called(self.to_out[0], multi_query_attention(q, k, v, mask).flatten(2))


class KeyValues(NamedTuple):
    """What cross-attention makes of a text: a cache, the same for all steps of a sampler."""

    k: Tensor  # [B, S, Hkv, d], normalised
    v: Tensor
    mask: Tensor | None = None  # [B, S], bool: the tokens that count

    def map(self, f: Callable[[Tensor], Tensor]) -> KeyValues:
        """f of each."""
        return KeyValues(f(self.k), f(self.v), None if self.mask is None else f(self.mask))


class CrossAttention(_Attention):
    """Attention to a text with few key heads, of SnapGen; no rotary embedding.

        cache = attn.key_values(text, mask)   # once per prompt
        y = attn(x, cache)                    # in every step

    Args:
        dim, cross_dim: of the tokens; of the text's tokens.
        heads, kv_heads, and the rest: as `MultiQueryAttention`, with the same parameters.
    """

    packs = ("to_k", "to_v")

    def key_values(self, text: Tensor, mask: Tensor | None = None) -> KeyValues:
        """text [B, S, cross_dim]; mask bool [B, S], True for tokens that count, or None: all."""
        k, v = linears(text, *self._packs())
        return self._key_values(k, v, mask)

    def _key_values(self, k: Tensor, v: Tensor, mask: Tensor | None) -> KeyValues:
        k, v = _heads(k, self.head_dim), _heads(v, self.head_dim)
        if self.norm_k is not None:
            k = rms_norm(k, self.norm_k.weight, eps=self.eps)
        return KeyValues(k, v.contiguous(), mask)

    def forward(self, x: Tensor, text: KeyValues | Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, T, dim], a cache or a text [B, S, cross_dim] with its mask -> [B, T, dim]. A cache
        of one sample serves every batch."""
        op = type(self).__name__
        if isinstance(text, Tensor):
            text = self.key_values(text, mask)
        elif not isinstance(text, KeyValues):
            _checks.fail(op, "text", "KeyValues or a tensor", type(text).__name__, TypeError)
        elif mask is not None:
            _checks.fail(op, "mask", "None beside KeyValues, which have theirs", "a mask")
        q = _heads(called(self.to_q, x), self.head_dim)
        if self.norm_q is not None:
            q = rms_norm(q, self.norm_q.weight, eps=self.eps)
        if text.k.shape[0] == 1:
            n = x.shape[0]  # len() would fix it in an exported graph
            text = text.map(lambda part: part.expand(n, *part.shape[1:]))
        return called(self.to_out[0], multi_query_attention(q, *text).flatten(2))


class SeparableConvAttention(MultiQueryAttention):
    """Self-attention over a map whose queries, keys and values come from a depthwise-separable
    convolution: depthwise k x k, then one pointwise to [q | k | v]; RMSNorm of their heads and
    2-D rotary embedding in one pass. The norm before and the residual after are outside.

    Args:
        dim: channels.
        num_heads, num_kv_heads: of queries; of keys and values.
        kernel_size: 1, 3, 5 or 7. 1: no depthwise convolution, and no weight of one: SnapGen's
            multi-query attention, with the `state_dict` of `MultiQueryAttention`.
        qk_norm, rope: whether there is either.
        base: of the rotary angles.
    """

    counts = "num_heads", "num_kv_heads"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int = 1,
        kernel_size: int = 3,
        qk_norm: bool = True,
        rope: bool = True,
        *,
        base: float = 10000.0,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads, qk_norm=qk_norm, **options)
        op = type(self).__name__
        if _checks.integer(op, "kernel_size", kernel_size, 1) not in (1, *KERNEL_SIZES):
            _checks.fail(op, "kernel_size", "1, 3, 5 or 7", kernel_size)
        if rope and self.head_dim % 4:
            _checks.fail(op, "rope", "a head dimension that 4 divides", self.head_dim)
        self.dim, self.kernel_size, self.rope, self.base = dim, kernel_size, rope, base
        options = {k: v for k, v in options.items() if k in ("device", "dtype")}
        self.depthwise = None
        if kernel_size > 1:
            convolution = {"padding": kernel_size // 2, "bias": False, **options}
            self.depthwise = DepthwiseConv2d(dim, dim, kernel_size, **convolution)

    def forward(  # type: ignore[override]  # a map in place of tokens, which has its own tables
        self, x: Tensor, *, mask: Tensor | None = None
    ) -> Tensor:
        """x [N, C, H, W], contiguous or channels_last; mask bool [N, H W] -> like x."""
        op = type(self).__name__
        _checks.tensor(op, "x", x, (4,))
        if x.shape[1] != self.dim:
            _checks.fail(op, "x", f"{self.dim} channels", x.shape[1])
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        size = x.shape[2:]
        tables: tuple[Tensor, Tensor] | tuple[()] = ()
        if self.rope:
            tables = rotary_tables(size, self.head_dim, self.base, x.device, x.dtype)
        if self.depthwise is not None:
            x = self.depthwise(x)
        tokens = x.flatten(2).transpose(1, 2)  # [N, H W, C], a view of channels_last
        y = super().forward(tokens, *tables, mask=mask).transpose(1, 2).unflatten(2, size)
        return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}, rope={self.rope}"


def rotary_tables(
    size: Sequence[int], d: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of a map's size, made once; in an exported graph by itself, as sizes may be symbols there."""
    height, width = size
    if torch.compiler.is_exporting():
        return _tables(height, width, d, base, device, dtype)
    return _kept_tables(height, width, d, base, device, dtype)


def _tables(
    height: int, width: int, d: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return rope_2d(height, width, d, base=base, device=device, dtype=wide)


@functools.lru_cache(maxsize=16)
def _kept_tables(*given: Any) -> tuple[Tensor, Tensor]:
    """Outside inference mode, whose tensors no backward may keep."""
    with torch.inference_mode(False), torch.no_grad():
        return _tables(*given)
