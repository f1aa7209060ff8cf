"""The parts of SnapGen's UNet: residual blocks, transformers, samplers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfm_fast._library import differentiable
from dfm_fast.nn._hooks import hooked
from dfm_fast.nn._linears import called
from dfm_fast.nn._lists import ModuleList
from dfm_fast.nn.activations import FeedForward
from dfm_fast.nn.attentions import CrossAttention, KeyValues, MultiQueryAttention
from dfm_fast.nn.convolutions import DepthwiseConv2d
from dfm_fast.nn.group_norms import GroupNormSiLU
from dfm_fast.nn.separables import SeparableConv2d, SeparableConvBlock, UpsampleConv2d
from dfm_fast.ops import (
    ChannelStatistics,
    ada_layer_norm,
    channel_statistics,
    gated_residual_ada_layer_norm,
)

NORM_EPS, TRANSFORMER_NORM_EPS = 1e-5, 1e-6
Rotary = tuple[Tensor, Tensor] | tuple[()]


class Map(NamedTuple):
    """[N, C, H, W], and its channels' statistics where who wrote it had them."""

    x: Tensor
    statistics: ChannelStatistics | None = None

    def known(self) -> Map:
        """With statistics."""
        return self if self.statistics else Map(self.x, statistics_of(self))


def statistics_of(given: Map) -> ChannelStatistics:
    return given.statistics or channel_statistics(given.x.detach())


def joined(a: Map, b: Map) -> Map:
    """Along the channels, whose statistics are just beside each other."""
    first, second = statistics_of(a), statistics_of(b)
    mean, m2 = (torch.cat(pair, 1) for pair in zip(first[1:], second[1:], strict=True))
    return Map(torch.cat((a.x, b.x), 1), ChannelStatistics(second.count, mean, m2))


def residual(block: Residual, given: Map, shift: Tensor) -> Map:
    """Either residual block, on a map with statistics."""
    if isinstance(block, SeparableConvBlock):
        return Map(*block(given.x, None, given.statistics, True, shift=shift))
    return Map(block(given.x, shift, given.statistics))


class DenseConvBlock(nn.Module):
    """The residual block with two 3x3 convolutions, as SDXL has it."""

    def __init__(self, in_channels: int, channels: int, time_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, in_channels, NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, channels)
        self.norm2 = GroupNormSiLU(groups, channels, NORM_EPS)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        same = in_channels == channels
        self.conv_shortcut = None if same else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor, shift: Tensor, statistics: ChannelStatistics) -> Tensor:
        """x [N, C, H, W], shift [N, channels] -> [N, channels, H, W]."""
        h = self.conv1(self.norm1(x, None, statistics))
        h = self.conv2(self.norm2(h, shift))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


Residual = SeparableConvBlock | DenseConvBlock


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each on a norm and added.

    Without self-attention either the first norm stays and what it gives takes the stream's place
    (DreamLite's blocks), or nothing does.
    """

    def __init__(self, dim: int, heads: int, config: dict[str, Any], self_attention: bool) -> None:
        super().__init__()
        options = {"qk_norm": config["qk_norm"], "eps": NORM_EPS}
        kv_heads = config["kv_heads"] or heads
        first = self_attention or config["norm_replaces_self_attention"]
        self.norm1 = nn.LayerNorm(dim, NORM_EPS) if first else None
        self.attn1 = None
        if self_attention:
            self.attn1 = MultiQueryAttention(dim, heads, kv_heads, **options)
        self.norm2 = nn.LayerNorm(dim, NORM_EPS)
        self.attn2 = CrossAttention(dim, config["cross_dim"], heads, kv_heads, **options)
        self.norm3 = nn.LayerNorm(dim, NORM_EPS)
        self.ff = FeedForward(dim, mult=config["ff_mult"])

    def norms(self) -> list[nn.LayerNorm]:
        """In the order of use."""
        return [norm for norm in (self.norm1, self.norm2, self.norm3) if norm is not None]

    def forward(self, x: Tensor, text: KeyValues, rotary: Rotary) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        if self.norm1 is not None:
            normed = self.norm1(x)
            x = normed if self.attn1 is None else x + self.attn1(normed, *rotary)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Transformer blocks on the pixels of a map."""

    def __init__(
        self, dim: int, heads: int, depth: int, config: dict[str, Any], self_attention: bool
    ) -> None:
        super().__init__()
        self.norm = GroupNormSiLU(config["groups"], dim, TRANSFORMER_NORM_EPS, activation="none")
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = ModuleList(
            TransformerBlock(dim, heads, config, self_attention) for _ in range(depth)
        )
        self.proj_out = nn.Linear(dim, dim)

    def forward(
        self,
        given: Map,
        texts: Sequence[KeyValues],
        rotary: Rotary,
        modulations: Sequence[Tensor] = (),
    ) -> Tensor:
        """[N, C, H, W], the text's keys and values for each block, its `modulations_of` where there
        are any -> [N, C, H, W]."""
        x = self.norm(given.x, None, given.statistics)
        tokens = called(self.proj_in, x.permute(0, 2, 3, 1).flatten(1, 2))
        if modulations:
            tokens = self._blocks_in_one_pass_each(tokens, texts, rotary, iter(modulations))
        else:
            for block, text in zip(self.transformer_blocks, texts, strict=True):
                tokens = block(tokens, text, rotary)
        y = called(self.proj_out, tokens).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return given.x + y

    def _blocks_in_one_pass_each(
        self, x: Tensor, texts: Sequence[KeyValues], rotary: Rotary, modulations: Iterator[Tensor]
    ) -> Tensor:
        """What the blocks compute, every sum and the norm after it in one pass over memory."""
        y = None  # what is still to be added to x
        for block, text in zip(self.transformer_blocks, texts, strict=True):
            if block.norm1 is not None:
                x, normed = _sum_and_norm(x, y, next(modulations), block.norm1.eps)
                x, y = (normed, None) if block.attn1 is None else (x, block.attn1(normed, *rotary))
            x, normed = _sum_and_norm(x, y, next(modulations), block.norm2.eps)
            y = block.attn2(normed, text)
            x, normed = _sum_and_norm(x, y, next(modulations), block.norm3.eps)
            y = block.ff(normed)
        return x if y is None else x + y


def modulations_of(
    transformers: Sequence[Transformer], x: Tensor
) -> dict[Transformer, list[Tensor]]:
    """Of each, its LayerNorms as gate 1, shift and scale [3, D] in float32, of which `ops` have one
    pass for a sum and the norm after it; {} where that is no gain, or not exact. w = 1 + (w - 1)
    holds in float32 for all weights of 16 bits but those under 2^-13, which it moves by 2^-25."""
    blocks = [block for t in transformers for block in t.transformer_blocks]
    norms = [norm for block in blocks for norm in block.norms()]
    serves = (
        len(norms) > 0
        and x.element_size() == 2
        and not any(map(hooked, (*blocks, *norms)))
        and all(type(n) is nn.LayerNorm and type(n.weight) is nn.Parameter for n in norms)
        and all(n.weight.dtype == x.dtype and n.bias is not None for n in norms)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
        and not differentiable(x, *(p for n in norms for p in n.parameters()))
    )
    if not serves:
        return {}
    scale = torch.cat([n.weight for n in norms]).float() - 1
    rows = torch.stack((torch.ones_like(scale), torch.cat([n.bias for n in norms]).float(), scale))
    found = iter(rows.split([len(n.weight) for n in norms], 1))
    return {t: [next(found) for b in t.transformer_blocks for _ in b.norms()] for t in transformers}


def _sum_and_norm(
    x: Tensor, y: Tensor | None, modulation: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + y, its norm); y None: (x, its norm)."""
    gate, shift, scale = (row.expand(len(x), -1) for row in modulation)
    if y is None:
        return x, ada_layer_norm(x, shift, scale, eps=eps)
    return gated_residual_ada_layer_norm(x, y, gate, shift, scale, eps=eps)


class Downsample(nn.Module):
    """Stride 2: a 3x3 convolution, or a depthwise one and a pointwise one."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.conv = (
            nn.Conv2d(channels, channels, 3, 2, 1)
            if kind == "dense"
            else nn.Sequential(
                DepthwiseConv2d(channels, stride=2, padding=1, bias=False),
                nn.Conv2d(channels, channels, 1),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H / 2, W / 2]."""
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest, then a 3x3 convolution, or a separable one."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        dense = kind == "dense"
        self.conv = (UpsampleConv2d if dense else SeparableConv2d)(channels, channels, bias=True)
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2 H, 2 W]."""
        return self.conv(x if self.dense else F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """Residual blocks, each with its transformer where there are any, and a sampler."""

    def __init__(self, resnets: Sequence[Residual], attentions: Sequence[Transformer]) -> None:
        super().__init__()
        self.resnets, self.attentions = ModuleList(resnets), ModuleList(attentions)
        self.downsamplers: ModuleList[Downsample] | None = None
        self.upsamplers: ModuleList[Upsample] | None = None


class Embedding(nn.Module):
    """linear, SiLU, linear"""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(size, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))
