"""`DFMTransformer` written out in plain torch, level by level and block by block, as a user would:
what the model is held to in tests, and what benchmarks compare it with. It uses the parameters of
the model itself and nothing else of the library."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfm_fast.models._functions import (
    Levels,
    patchify,
    precondition,
    timestep_embedding,
    unpatchify,
)
from dfm_fast.models.dfm import EPS, Attention, DFMTransformer
from dfm_fast.nn.activations import FeedForward


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, T, H, d] by tables [T, d / 2], neighbours in pairs."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def attention(attn: Attention, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
    if attn.q_norm is not None and attn.k_norm is not None:
        q, k = attn.q_norm(q), attn.k_norm(k)
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    return attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(layers: FeedForward, x: Tensor) -> Tensor:
    first: Any = layers.net[0]
    return layers.net[2](F.gelu(first.proj(x), approximate="tanh"))


def embed(model: DFMTransformer, levels: Levels) -> Tensor:
    weights = model.patch_embedding.weight.split(model.sizes, 1)
    parts = zip(levels, model.patch_sizes, weights, model.patch_bias, strict=True)
    return reduce(
        torch.add,
        (b if level is None else F.linear(patchify(level, p), w, b) for level, p, w, b in parts),
    )


def condition(model: DFMTransformer, t: Tensor, active: Tensor | None, y: Tensor | None) -> Tensor:
    t = 1 - t if model.flip_time else t
    embedders = zip(model.t_embedders, timestep_embedding(t).unbind(1), strict=True)
    dtype = model.modulation.weight.dtype
    c = reduce(torch.add, (embedder.mlp(level.to(dtype)) for embedder, level in embedders))
    if model.y_embedder is not None:
        c = c + model.y_embedder(model._labels(y, len(t), t.device))
    if model.stage_embedder is not None:
        assert active is not None
        c = c + model.stage_embedder(active.sum(1) - 1)
    return c


def plain_forward(
    model: DFMTransformer,
    levels: Levels,
    t: Tensor,
    active: Tensor | None = None,
    *,
    y: Tensor | None = None,
) -> list[Tensor | None]:
    """model(levels, t, active, y=y)."""
    grid, given = model._grid(levels), list(levels)
    if model.data_std is not None:
        for s, x in enumerate(levels):
            if x is not None:
                c_in = precondition(model.data_std[s], t[:, s])[0]
                given[s] = x * c_in.view(-1, *[1] * (x.ndim - 1))
    x = embed(model, given)
    rotary = model._rotary(grid, x.device) if model.positions == "rope" else None
    x = x if rotary is not None else (x + model._position_table(grid)).to(x.dtype)
    c, dim = condition(model, t, active, y), model.hidden_size
    rows = model.modulation.weight.split(dim), model.modulation.bias.split(dim)

    def vectors(c: Tensor, first: int, count: int) -> list[Tensor]:
        c = F.silu(c)
        return [F.linear(c, rows[0][i], rows[1][i]) for i in range(first, first + count)]

    for i, block in enumerate(model.blocks):
        own = c
        if model.block_conditioning is not None:
            layer = model.block_conditioning
            own = F.linear(c, layer.weight.split(dim)[i], layer.bias.split(dim)[i])
        shift, scale, gate, shift2, scale2, gate2 = vectors(own, 6 * i, 6)
        x = x + gate.unsqueeze(1) * attention(block.attn, modulate(x, shift, scale), rotary)
        x = x + gate2.unsqueeze(1) * mlp(block.mlp, modulate(x, shift2, scale2))
    velocities: list[Tensor | None] = [None] * model.num_levels
    heads = model.heads.weight.split(model.sizes), model.heads.bias.split(model.sizes)
    for s, level in enumerate(levels):
        if level is None:
            continue
        h = modulate(x, *vectors(c, 6 * model.depth + 2 * s, 2))
        v = unpatchify(F.linear(h, heads[0][s], heads[1][s]), level, model.patch_sizes[s])
        if model.data_std is not None:
            _, c_skip, c_out = (
                c.view(-1, *[1] * (level.ndim - 1))
                for c in precondition(model.data_std[s], t[:, s])
            )
            v = c_skip * level + c_out * v
        velocities[s] = v.to(level.dtype)
    return velocities
