r"""Attention whose heads share keys and values: multi-query, grouped-query and multi-head.

    y_th = sum_s p_ths v_sg,  p_ths = exp(scale q_th . k_sg) / sum over s,  g = h Hkv // H

q [B, T, H, d]; k, v [B, S, Hkv, d], Hkv a divisor of H: one key head for all (Shazeer 2019,
arXiv 1911.02150), some (Ainslie et al. 2023, arXiv 2305.13245), or each its own. Every query
attends to all keys, or to those of `mask` [B, S]; where a sample has none, y and its gradients are
0.

As all heads attend to the same keys, one key head is attention of T H queries in one head, and all
operators here see q so, without a copy. Scores are never in memory: with
lse_th = log sum_s exp(scale q_th . k_sg), to base 2 on a CPU and, as SDPA has it, to e on a GPU,
kept for backward beside q, k, v and y, in float32 (float64 for float64), and D_th = dy_th . y_th,

    dv_s = sum_th p_ths dy_th
    g_ths = p_ths (dy_th . v_s - D_th)
    dq_th = scale sum_s g_ths k_s,   dk_s = scale sum_th g_ths q_th

Bytes moved at least, b bytes an element: forward b (2 B T H d + 2 B S Hkv d), backward about twice
that; but 4 B T H S d operations decide, 10 in backward.

A CPU has its own kernel (csrc/cpu/attentions.cpp), a GPU the fused backends of torch's SDPA.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfm_fast import _checks
from dfm_fast._library import define, differentiable, operator
from dfm_fast.ops.pyramids import nbytes

_ops = torch.ops.dfm_fast

# --- Reference ------------------------------------------------------------------------------------


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


def _by_key_head(x: Tensor, k: Tensor) -> Tensor:
    """[B, T, H, d] -> [B, T, Hkv, heads of one, d]"""
    return x.unflatten(2, (k.shape[2], -1))


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[B, T, Hkv, heads of one, S]"""
    scores = torch.einsum("btgrd,bsgd->btgrs", _by_key_head(q, k), k) * scale
    return scores if mask is None else scores.masked_fill(~mask[:, None, None, None], -math.inf)


def _without_keys(mask: Tensor | None, v: Tensor) -> tuple[Tensor | None, Tensor]:
    """(mask, v): a sample without any key gets the mean of its values, which are 0."""
    if mask is None:
        return None, v
    some = mask.any(1, keepdim=True)
    return mask | ~some, v.where(some[:, :, None, None], 0)


def multi_query_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Defines `multi_query_attention`."""
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q, k, v))
    mask, v = _without_keys(mask, v)
    p = _scores(q, k, mask, _scale(q, scale)).softmax(-1)
    return torch.einsum("btgrs,bsgd->btgrd", p, v).flatten(2, 3).to(dtype)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, save: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    y = multi_query_attention_ref(q, k, v, mask, scale=scale).contiguous()
    if not save:
        return y, y.new_empty(0, dtype=wide)
    return y, _scores(q.to(wide), k.to(wide), mask, scale).logsumexp(-1).flatten(2)


def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    y: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    dy, q, k, v = (x.to(wide) for x in (dy, q, k, v))
    every, v = _without_keys(mask, v)
    p = _scores(q, k, every, scale).softmax(-1)
    dy = _by_key_head(dy, k)
    dp = torch.einsum("btgrd,bsgd->btgrs", dy, v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("btgrs,bsgd->btgrd", ds, k).flatten(2, 3)
    dk = torch.einsum("btgrs,btgrd->bsgd", ds, _by_key_head(q, k))
    dv = torch.einsum("btgrs,btgrd->bsgd", p, dy)
    if mask is not None:
        dv = dv.where(mask[:, :, None, None], 0)
    dq, dk, dv = (_empty(x).copy_(x).to(dtype) for x in (dq, dk, dv))
    return dq, dk, dv


# --- Registration ---------------------------------------------------------------------------------


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, save: bool) -> Any:
    sizes = q.shape[:3] if save else (0,)
    return _empty(q), q.new_empty(sizes, dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_backward(dy: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return tuple(_empty(x) for x in given[:3])


def _flops(q: Any, k: Any, *_: Any) -> int:
    return 4 * math.prod(q) * k[1]


_GIVEN = "Tensor q, Tensor k, Tensor v, Tensor? mask"
define(
    f"multi_query_attention({_GIVEN}, float scale, bool save) -> (Tensor, Tensor)",
    reference=_forward,
    fake=_fake,
    kernel="attentions:multi_query_attention",
    flops=_flops,
)
define(
    f"multi_query_attention_backward(Tensor dy, {_GIVEN}, Tensor y, Tensor lse, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_backward,
    fake=_fake_backward,
    kernel="attentions:multi_query_attention_backward",
    flops=lambda dy, *rest: 5 * _flops(*rest) // 2,
)

# --- Gradients ------------------------------------------------------------------------------------


class _MultiQueryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        y, lse = _ops.multi_query_attention(q, k, v, mask, scale, True)
        ctx.save_for_backward(q, k, v, mask, y, lse)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        grads = _ops.multi_query_attention_backward(_rows(dy), *ctx.saved_tensors, ctx.scale)
        needs = ctx.needs_input_grad[:3]
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


# --- Public function ------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous: any strides but the last."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(op: str, q: Any, k: Any, v: Any, mask: Any) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(op, name, x, (4,))
        _checks.like(op, name, x, "q", q)
    B, _, H, d = q.shape
    if H == 0 or d == 0:
        _checks.fail(op, "q", "at least one head of at least one element", list(q.shape))
    if k.shape[0] != B or k.shape[3] != d:
        _checks.fail(op, "k", f"[{B}, S, heads, {d}] like q", list(k.shape))
    if k.shape[2] == 0 or H % k.shape[2]:
        _checks.fail(op, "k", f"a number of heads that divides {H}", k.shape[2])
    if v.shape != k.shape:
        _checks.fail(op, "v", f"{list(k.shape)} like k", list(v.shape))
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        _checks.fail(op, "mask", "a tensor of bool", got, TypeError)
    if mask.shape != k.shape[:2]:
        _checks.fail(op, "mask", f"{list(k.shape[:2])}, the keys", list(mask.shape))
    if mask.device != q.device:
        _checks.fail(op, "mask", f"device {q.device} like q", mask.device)


def _cost(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **_: Any) -> int:
    return nbytes(q, k, v, q, *([] if mask is None else [mask]))


@operator(
    reference=multi_query_attention_ref,
    raw=("multi_query_attention", "multi_query_attention_backward"),
    cost=_cost,
)
def multi_query_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """softmax(scale q kᵀ) v, with fewer heads of k and v than of q.

    Args:
        q: [B, T, H, d]; any strides whose last is 1 are read in place, such as views of a packed
            projection [B, T, (H + 2 Hkv) d].
        k, v: [B, S, Hkv, d] like q, Hkv a divisor of H: 1 is multi-query, H multi-head attention.
            Head h of q attends to head h Hkv // H, as after `repeat_interleave`.
        mask: bool [B, S], the keys that a sample's queries attend to, or None: all. A sample that
            attends to none gets 0, and so do its gradients.
        scale: of the scores; None is 1 / sqrt(d).

    Returns:
        [B, T, H, d], contiguous, in q's dtype; `.flatten(2)` is what the output projection takes.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, a number of heads that does not divide.
        RuntimeError: on a GPU, what no fused backend of torch's SDPA takes.

    On a GPU torch's SDPA serves, and its backward is deterministic where
    `torch.use_deterministic_algorithms(True)` asks for it. float64 is written out there, scores and
    all.
    """
    _check("multi_query_attention", q, k, v, mask)
    args = *(_rows(x) for x in (q, k, v)), mask, _scale(q, scale)
    if differentiable(q, k, v):
        return _MultiQueryAttention.apply(*args)
    return _ops.multi_query_attention(*args, False)[0]
