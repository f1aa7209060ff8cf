"""Attention layers of diffusers, by the processor that they have when they are called.

A processor is not part of the layer: `set_attn_processor` may change it at any time. One that is
not known here runs as it is. Projections are called as modules, with whatever adapters they have.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfm_fast.acceleration._units import first_reason, register, same, serves
from dfm_fast.nn._hooks import hooked
from dfm_fast.nn.attentions import linears
from dfm_fast.ops import multi_query_attention, qk_norm_rope

# Processors of `Attention` with one stream of tokens; only the first takes fewer key heads.
PLAIN = ("DreamLiteAttnProcessor2_0", "AttnProcessor2_0")
JOINT, FLUX = "JointAttnProcessor2_0", "FluxAttnProcessor"


def _processor(attn: Any, *names: str) -> bool:
    """Whether it has exactly one of these processors of diffusers, with no backend of its own."""
    p = attn.processor
    kind = type(p)
    return (
        kind.__name__ in names
        and kind.__module__.startswith("diffusers.")
        and getattr(p, "_attention_backend", None) is None
        and getattr(p, "_parallel_config", None) is None
    )


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim))  # [B, T, H, d]


# --- Norms of queries and keys --------------------------------------------------------------------


def _normalises_heads(norm: Any) -> bool:
    """Whether a norm is an RMSNorm with a weight and no bias, over one dimension."""
    if same(norm, nn.RMSNorm):
        return norm.weight is not None and norm.eps is not None and norm.weight.ndim == 1
    known = same(norm, "RMSNorm") and norm.weight is not None and norm.bias is None
    return known and norm.weight.ndim == 1


def _pair(norm_q: Any, norm_k: Any) -> bool:
    both = _normalises_heads(norm_q) and _normalises_heads(norm_k)
    return both and norm_q.eps == norm_k.eps


def _normed(
    norm_q: Any,
    norm_k: Any,
    q: Tensor,  # [B, T, H, d]
    k: Tensor,  # [B, S, Hkv, d]
    cos: Tensor | None = None,  # [T, d/2]
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Both normalised and rotated in one launch, or None where that is not all that happens."""
    if not _pair(norm_q, norm_k) or hooked(norm_q) or hooked(norm_k):
        return None
    if not serves(q, k, norm_q.weight, norm_k.weight) or q.shape[-1] % 2:
        return None
    return qk_norm_rope(q, k, norm_q.weight, norm_k.weight, cos, sin, eps=norm_q.eps)


def _each_normed(norm_q: Any, norm_k: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the modules, where there are any."""
    return (q if norm_q is None else norm_q(q)), (k if norm_k is None else norm_k(k))


# --- One stream of tokens -------------------------------------------------------------------------


def _one_stream(attn: Any) -> str | None:
    """Why `Attention` with one of these processors is not served."""
    shares = attn.inner_kv_dim != attn.inner_dim
    normed = attn.norm_q is not None and attn.norm_k is not None
    return first_reason(
        (attn.spatial_norm is not None or attn.group_norm is not None, "a norm of its input"),
        (attn.norm_cross is not None, "a norm of the text"),
        (attn.residual_connection, "a residual connection"),
        (attn.to_out is None, "no output projection"),
        (shares and not _processor(attn, PLAIN[0]), "a processor that does not share keys"),
        (attn.inner_dim % attn.inner_kv_dim, "a number of key heads that does not divide"),
        (normed and not _pair(attn.norm_q, attn.norm_k), "a QK norm that is no RMSNorm of heads"),
        (not normed and not shares, "neither QK norm nor shared keys: nothing to fuse"),
    )


def _joint(attn: Any) -> str | None:
    added = attn.norm_added_q is None or _pair(attn.norm_added_q, attn.norm_added_k)
    normed = _pair(attn.norm_q, attn.norm_k) and added
    return None if normed else "no QK norm that is an RMSNorm of heads: nothing to fuse"


def _refusal(attn: Any) -> str | None:
    if _processor(attn, *PLAIN):
        return _one_stream(attn)
    if _processor(attn, JOINT):
        return _joint(attn)
    return f"its processor is {type(attn.processor).__name__}"


def _saved(attn: Any) -> int:
    """Of shared keys and values a copy for every head is written and read; of one stream the
    division by 1 is. Norms count on their own."""
    copies = 4 * attn.inner_dim if attn.inner_kv_dim != attn.inner_dim else 0
    return copies + (2 * attn.out_dim if _processor(attn, *PLAIN) else 0)


@register(
    "attentions",
    "diffusers",
    "Attention",
    "attention with qk_norm_rope and multi_query_attention",
    refusal=_refusal,
    saved=_saved,
)
def attention(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **cross_attention_kwargs: Any,
) -> Any:
    if cross_attention_kwargs or not serves(hidden_states, autocast=True):
        return None
    if module.fused_projections or hidden_states.ndim != 3:
        return None
    given = hidden_states, encoder_hidden_states, attention_mask
    if _processor(module, *PLAIN) and _one_stream(module) is None:
        return _attend(module, *given)
    if _processor(module, JOINT) and attention_mask is None and _joint(module) is None:
        return _attend_jointly(module, *given[:2])
    return None


def _attend(attn: Any, x: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """x [B, T, D], text [B, S, E] or None, mask as `prepare_attention_mask` takes it."""
    d = attn.inner_dim // attn.heads
    projections = attn.to_q, attn.to_k, attn.to_v
    if text is None:
        q, k, v = (_heads(y, d) for y in linears(x, *projections))
    else:
        q = _heads(attn.to_q(x), d)
        k, v = (_heads(y, d) for y in linears(text, *projections[1:]))
    norms = attn.norm_q, attn.norm_k
    q, k = _normed(*norms, q, k) or _each_normed(*norms, q, k)
    y = _attended(attn, q, k, v, mask).flatten(2).to(q.dtype)
    y = attn.to_out[1](attn.to_out[0](y))
    return y if attn.rescale_output_factor == 1 else y / attn.rescale_output_factor


def _attended(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, H, d]. A mask of keys is ours; a bias is torch's."""
    of_keys = mask is not None and mask.dtype == torch.bool and mask.shape == k.shape[:2]
    if (mask is None or of_keys) and serves(q, k, v):
        return multi_query_attention(q, k, v, mask)
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, k.shape[1], len(q))
        mask = mask.view(len(q), attn.heads, -1, mask.shape[-1])
    return _sdpa(q, k, v, mask)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, T, H, d] each, by torch."""
    shares: dict[str, Any] = {"enable_gqa": True} if k.shape[2] != q.shape[2] else {}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **shares).transpose(1, 2)


# --- Two streams: SD3 -----------------------------------------------------------------------------


def _attend_jointly(attn: Any, x: Tensor, text: Tensor | None) -> Any:
    """x [B, T, D], text [B, S, D] or None -> like both, or like x."""
    d = attn.inner_dim // attn.heads
    q, k, v = (_heads(y, d) for y in linears(x, attn.to_q, attn.to_k, attn.to_v))
    norms = attn.norm_q, attn.norm_k
    q, k = _normed(*norms, q, k) or _each_normed(*norms, q, k)
    if text is not None:
        added = linears(text, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = (_heads(y, d) for y in added)
        norms = attn.norm_added_q, attn.norm_added_k
        text_q, text_k = _normed(*norms, text_q, text_k) or _each_normed(*norms, text_q, text_k)
        pairs = (q, text_q), (k, text_k), (v, text_v)
        q, k, v = (torch.cat(pair, 1) for pair in pairs)
    y = _sdpa(q, k, v).flatten(2).to(q.dtype)
    if text is None:
        return attn.to_out[1](attn.to_out[0](y))
    y, text = y[:, : x.shape[1]], y[:, x.shape[1] :]
    if not attn.context_pre_only:
        text = attn.to_add_out(text)
    return attn.to_out[1](attn.to_out[0](y)), text


# --- FLUX -----------------------------------------------------------------------------------------


def _flux_refusal(attn: Any) -> str | None:
    added = attn.added_kv_proj_dim is None or _pair(attn.norm_added_q, attn.norm_added_k)
    return first_reason(
        (not _processor(attn, FLUX), f"its processor is {type(attn.processor).__name__}"),
        (not _pair(attn.norm_q, attn.norm_k) or not added, "norms that are no RMSNorm of heads"),
    )


@register(
    "attentions",
    "diffusers",
    "FluxAttention",
    "attention with qk_norm_rope",
    refusal=_flux_refusal,
    # Rotation: pairs turned, both products and the sum, of q and of k; norms count on their own.
    saved=lambda attn: 2 * 8 * attn.inner_dim,
)
def flux_attention(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """The tables hold every angle twice, as `FluxPosEmbed` makes them."""
    x, text = hidden_states, encoder_hidden_states
    if kwargs or attention_mask is not None or not serves(x) or _flux_refusal(module):
        return None
    joint = module.added_kv_proj_dim is not None
    if module.fused_projections or joint != (text is not None) or not _norms_idle(module, joint):
        return None
    if not _rotary_fits(image_rotary_emb, x, text):
        return None
    projections = module.to_q, module.to_k, module.to_v
    streams = [(x, projections, (module.norm_q, module.norm_k))]
    if text is not None:
        projections = module.add_q_proj, module.add_k_proj, module.add_v_proj
        streams.insert(0, (text, projections, (module.norm_added_q, module.norm_added_k)))
    parts, start = [], 0
    for tokens, layers, norms in streams:
        tables, start = _tables(image_rotary_emb, start, tokens.shape[1])
        parts.append(_flux_heads(module, tokens, layers, norms, tables))
    q, k, v = parts[0] if len(parts) == 1 else (torch.cat(p, 1) for p in zip(*parts, strict=True))
    y = _sdpa(q, k, v).flatten(2).to(q.dtype)
    if text is None:
        return y
    text, y = y[:, : text.shape[1]].contiguous(), y[:, text.shape[1] :].contiguous()
    return module.to_out[1](module.to_out[0](y)), module.to_add_out(text)


def _norms_idle(attn: Any, joint: bool) -> bool:
    """Whether nobody looks on at what is left out, and weights are as kernels take them."""
    norms = [attn.norm_q, attn.norm_k, *((attn.norm_added_q, attn.norm_added_k) if joint else ())]
    plain = (nn.Parameter, Tensor)
    return not any(map(hooked, norms)) and all(type(n.weight) in plain for n in norms)


def _rotary_fits(rotary: Any, x: Tensor, text: Tensor | None) -> bool:
    """Whether there is no rotation, or one of all tokens."""
    if rotary is None:
        return True
    length = x.shape[1] + (0 if text is None else text.shape[1])
    return all(t.ndim == 2 and len(t) == length and t.device == x.device for t in rotary)


def _tables(rotary: Any, start: int, length: int) -> tuple[tuple[Any, Any], int]:
    """(cos, sin) [length, d/2] of a stream's tokens, and where the next stream's start."""
    end = start + length
    if rotary is None:
        return (None, None), end
    return tuple(t[start:end, ::2] for t in rotary), end


def _flux_heads(
    attn: Any, x: Tensor, layers: tuple[Any, ...], norms: tuple[Any, Any], tables: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k normalised and rotated, v [B, T, H, d]."""
    q, k, v = (_heads(y, attn.head_dim) for y in linears(x, *layers))
    weights = (n.weight for n in norms)
    q, k = qk_norm_rope(q, k, *weights, *tables, eps=norms[0].eps)
    return q, k, v
