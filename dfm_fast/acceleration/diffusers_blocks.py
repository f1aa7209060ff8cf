"""Transformer blocks of diffusers with adaLN-Zero.

A gate, a sum, and the norm that follows with its modulation are one pass over memory. Attention,
feed-forward layers and modulations are called as the modules they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfm_fast.acceleration._units import first_reason, register, serves
from dfm_fast.acceleration.diffusers_layers import fits, modulated, without_weights
from dfm_fast.ops import gated_residual, gated_residual_ada_layer_norm


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y, x and y [B, T, D], gate [B, D]."""
    if _fits(x, y, gate):
        return gated_residual(x, y, gate)
    return x + gate.unsqueeze(1) * y


def gated_modulated(
    norm: Any, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """r = x + gate y, and norm(r) (1 + scale) + shift."""
    if _fits(x, y, gate) and fits(norm, x, shift, scale):
        return gated_residual_ada_layer_norm(x, y, gate, shift, scale, eps=norm.eps)
    x = gated(x, y, gate)
    return x, modulated(norm, x, shift, scale)


def _fits(x: Tensor, y: Tensor, gate: Tensor) -> bool:
    """Whether kernels take them, of one dtype."""
    return (
        serves(x, y, gate)
        and x.ndim == 3
        and y.shape == x.shape
        and gate.shape == (x.shape[0], x.shape[2])
    )


def _clipped(x: Tensor) -> Tensor:
    """As the original keeps float16 finite."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _width(norm: Any) -> int:
    return norm.normalized_shape[0]


NO_NORM = "a norm with weights before the feed-forward layer"
NEW = "block with gated_residual_ada_layer_norm"

# --- FLUX -----------------------------------------------------------------------------------------


@register(
    "blocks",
    "diffusers",
    "FluxTransformerBlock",
    NEW,
    refusal=lambda block: first_reason(
        (not (without_weights(block.norm2) and without_weights(block.norm2_context)), NO_NORM)
    ),
    # Of each stream: gate, sum, norm, product and sum, 11 passes, become 4; gate and sum, 5, 3.
    saved=lambda block: 2 * (7 + 2) * _width(block.norm2),
)
def flux_block(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """-> (text, image)"""
    normed, *of_image = module.norm1(hidden_states, emb=temb)
    normed_text, *of_text = module.norm1_context(encoder_hidden_states, emb=temb)
    y, y_text, *of_ip = module.attn(
        hidden_states=normed,
        encoder_hidden_states=normed_text,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x = _second_half(module.norm2, module.ff, hidden_states, y, *of_image)
    x = x + of_ip[0] if of_ip else x
    text = _second_half(
        module.norm2_context, module.ff_context, encoder_hidden_states, y_text, *of_text
    )
    return _clipped(text), x


def _second_half(
    norm: Any,
    ff: Any,
    x: Tensor,  # [B, T, D]
    y: Tensor,  # [B, T, D]: what attention gave
    gate: Tensor,  # [B, D], as the others
    shift: Tensor,
    scale: Tensor,
    gate_mlp: Tensor,
) -> Tensor:
    x, normed = gated_modulated(norm, x, y, gate, shift, scale)
    return gated(x, ff(normed), gate_mlp)


@register(
    "blocks",
    "diffusers",
    "FluxSingleTransformerBlock",
    "block with gated_residual",
    saved=lambda block: 2 * block.proj_out.out_features,
)
def flux_single_block(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """-> (text, image)"""
    length = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed, gate = module.norm(x, emb=temb)
    mlp = module.act_mlp(module.proj_mlp(normed))
    y = module.attn(
        hidden_states=normed,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x = _clipped(gated(x, module.proj_out(torch.cat([y, mlp], dim=2)), gate))
    return x[:, :length], x[:, length:]


# --- SD3 ------------------------------------------------------------------------------------------


def _joint_refusal(block: Any) -> str | None:
    norms = [block.norm2, *([] if block.norm2_context is None else [block.norm2_context])]
    return None if all(map(without_weights, norms)) else NO_NORM


def _joint_saved(block: Any) -> int:
    streams = 1 if block.context_pre_only else 2
    return (9 * streams + (2 if block.use_dual_attention else 0)) * _width(block.norm2)


@register(
    "blocks", "diffusers", "JointTransformerBlock", NEW, refusal=_joint_refusal, saved=_joint_saved
)
def joint_block(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor] | None:
    """-> (text or None, image)"""
    if module._chunk_size is not None:
        return None
    options = joint_attention_kwargs or {}
    normed, gate, shift, scale, gate_mlp, *dual = module.norm1(hidden_states, emb=temb)
    if module.context_pre_only:
        normed_text, of_text = module.norm1_context(encoder_hidden_states, temb), []
    else:
        normed_text, *of_text = module.norm1_context(encoder_hidden_states, emb=temb)
    y, y_text = module.attn(hidden_states=normed, encoder_hidden_states=normed_text, **options)
    x = hidden_states
    if module.use_dual_attention:
        x = gated(x, y, gate)
        y, gate = module.attn2(hidden_states=dual[0], **options), dual[1]
    x = _second_half(module.norm2, module.ff, x, y, gate, shift, scale, gate_mlp)
    if module.context_pre_only:
        return None, x
    text = _second_half(
        module.norm2_context, module.ff_context, encoder_hidden_states, y_text, *of_text
    )
    return text, x


# --- DiT ------------------------------------------------------------------------------------------


@register(
    "blocks",
    "diffusers",
    "BasicTransformerBlock",
    NEW,
    knows=lambda block: block.norm_type == "ada_norm_zero",
    refusal=lambda block: first_reason(
        (block.attn2 is not None, "cross-attention beside adaLN-Zero"),
        (block.pos_embed is not None, "positions of its own"),
        (not without_weights(block.norm3), NO_NORM),
    ),
    saved=lambda block: 9 * _width(block.norm3),
)
def dit_block(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor | None:
    if cross_attention_kwargs or module._chunk_size is not None or hidden_states.ndim != 3:
        return None
    x = hidden_states
    normed, *modulation = module.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
    y = module.attn1(
        normed,
        encoder_hidden_states=encoder_hidden_states if module.only_cross_attention else None,
        attention_mask=attention_mask,
    )
    return _second_half(module.norm3, module.ff, x, y, *modulation)
