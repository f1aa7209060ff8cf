"""`SnapGenUNet` written out in plain torch, layer by layer, as a user would: what the model is held
to in tests. It uses the parameters of the model itself and nothing else of the library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfm_fast.models._functions import timestep_embedding
from dfm_fast.models.dfm_plain import rotate
from dfm_fast.models.snapgen import SnapGenUNet
from dfm_fast.models.snapgen_blocks import (
    Embedding,
    Residual,
    Stage,
    Transformer,
    TransformerBlock,
)
from dfm_fast.nn.activations import FeedForward
from dfm_fast.nn.attentions import CrossAttention, MultiQueryAttention

Angles = tuple[Tensor, Tensor]  # their cosines and sines


def norm(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)


def convolution(layer: nn.Module, x: Tensor) -> Tensor:
    """A dense convolution, or a depthwise and a pointwise one."""
    convs: Iterable[Any] = [layer] if isinstance(layer, nn.Conv2d) else layer.children()
    for conv in convs:
        x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)
    return x


def residual(block: Residual, x: Tensor, temb: Tensor) -> Tensor:
    h = convolution(block.conv1, F.silu(norm(block.norm1, x)))
    h = h + block.time_emb_proj(F.silu(temb))[..., None, None]
    h = convolution(block.conv2, F.silu(norm(block.norm2, h)))
    return h + (x if block.conv_shortcut is None else convolution(block.conv_shortcut, x))


def attention(
    layer: MultiQueryAttention | CrossAttention,
    x: Tensor,
    source: Tensor,
    mask: Tensor | None,
    rotary: Angles | None,
) -> Tensor:
    q, k, v = (
        f(a).unflatten(-1, (-1, layer.head_dim))
        for f, a in ((layer.to_q, x), (layer.to_k, source), (layer.to_v, source))
    )
    if layer.norm_q is not None and layer.norm_k is not None:
        q, k = layer.norm_q(q), layer.norm_k(k)
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    repeats = layer.heads // layer.kv_heads
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    mask = None if mask is None else mask[:, None, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return layer.to_out[0](y.transpose(1, 2).flatten(2))


def feed_forward(layer: FeedForward, x: Tensor) -> Tensor:
    first: Any = layer.net[0]
    hidden, gate = first.proj(x).chunk(2, -1)
    return layer.net[2](hidden * F.gelu(gate))


def transformer_block(
    block: TransformerBlock, x: Tensor, text: Tensor, mask: Tensor | None, rotary: Angles | None
) -> Tensor:
    if block.norm1 is not None:
        normed = block.norm1(x)
        own = block.attn1
        x = normed if own is None else x + attention(own, normed, normed, None, rotary)
    x = x + attention(block.attn2, block.norm2(x), text, mask, None)
    return x + feed_forward(block.ff, block.norm3(x))


def rotary_2d(height: int, width: int, dim: int, like: Tensor) -> Angles:
    """Angles [height width, dim / 2]: the row's for the first half of a head, the column's."""
    wide = torch.promote_types(like.dtype, torch.float32)
    steps = torch.arange(dim // 4, dtype=torch.float64, device=like.device)
    frequencies = 10000.0 ** (-steps / (dim // 4))
    rows, columns = (
        torch.arange(n, dtype=torch.float64, device=like.device)[:, None] * frequencies
        for n in (height, width)
    )
    angles = torch.cat((rows.repeat_interleave(width, 0), columns.repeat(height, 1)), -1)
    return angles.cos().to(wide), angles.sin().to(wide)


def transformer(
    layer: Transformer, x: Tensor, text: Tensor, mask: Tensor | None, rope: bool
) -> Tensor:
    tokens = layer.proj_in(norm(layer.norm, x).flatten(2).transpose(1, 2))
    for block in layer.transformer_blocks:
        rotary = None
        if rope and block.attn1 is not None:
            rotary = rotary_2d(x.shape[2], x.shape[3], block.attn1.head_dim, tokens)
        tokens = transformer_block(block, tokens, text, mask, rotary)
    return x + layer.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


def time_embedding(unet: SnapGenUNet, t: Tensor, ids: Tensor | None) -> Tensor:
    def mlp(layers: Embedding, x: Tensor) -> Tensor:
        return layers.linear_2(F.silu(layers.linear_1(x.to(layers.linear_1.weight.dtype))))

    temb = mlp(unet.time_embedding, timestep_embedding(1000 * t, unet.frequencies))
    if unet.add_embedding is not None:
        assert ids is not None
        temb = temb + mlp(unet.add_embedding, timestep_embedding(ids).flatten(-2))
    return temb


def plain_forward(
    unet: SnapGenUNet,
    x: Tensor,
    t: Tensor,
    text: Tensor,
    *,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """unet(x, t, text, mask=mask, ids=ids)."""
    temb = time_embedding(unet, t, ids)
    text = text if unet.encoder_hid_proj is None else unet.encoder_hid_proj(text)

    def layers(stage: Stage, x: Tensor, kept: list[Tensor] | None = None) -> Iterator[Tensor]:
        for i, block in enumerate(stage.resnets):
            x = residual(block, x if kept is None else torch.cat((x, kept.pop()), 1), temb)
            if i < len(stage.attentions):
                x = transformer(stage.attentions[i], x, text, mask, unet.rope)
            yield x

    x = convolution(unet.conv_in, x)
    kept = [x]
    for stage in unet.down_blocks:
        kept.extend(layers(stage, kept[-1]))
        if stage.downsamplers is not None:
            kept.append(convolution(stage.downsamplers[0].conv, kept[-1]))
    *_, x = layers(unet.mid_block, kept[-1])
    for stage in unet.up_blocks:
        *_, x = layers(stage, x, kept)
        if stage.upsamplers is not None:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = convolution(stage.upsamplers[0].conv, x)
    return convolution(unet.conv_out, F.silu(norm(unet.conv_norm_out, x)))
