r"""SnapGen's UNet (arXiv 2412.09619): SDXL's, thinner and shorter, of expanded separable
convolutions and multi-query attention, 379 M parameters.

Stages s of C_s channels at 1, 1/2 and 1/4 of the latent's sides. In each, going down, `layers`
times a residual block and a transformer of d_s blocks; in the middle residual, transformer,
residual; going up, one layer more, each on the map that the way down left there:

    y = x + proj_out(blocks(proj_in(group_norm(x))))                                transformer
    h = h + self_attention(norm(h))          only where maps are small
    h = h + cross_attention(norm(h), text);  h = h + feed_forward(norm(h))          block

The residual block is `nn.SeparableConvBlock`. Names of parameters are those of diffusers'
`DreamLiteUNetModel`, whose weights load as they are.

What does not change from step to step, or follows from it alone, is computed once: keys and values
of the text (`key_values`), what each residual block adds for a noise level (`time_shifts`, of all
steps of a schedule at once). Maps are channels_last and go from kernel to kernel with the
statistics of their channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfm_fast import _checks
from dfm_fast.models._functions import timestep_embedding
from dfm_fast.models._pretrained import Pretrained
from dfm_fast.models.snapgen_blocks import (
    NORM_EPS,
    DenseConvBlock,
    Downsample,
    Embedding,
    Map,
    Residual,
    Rotary,
    Stage,
    Transformer,
    Upsample,
    joined,
    modulations_of,
    residual,
    statistics_of,
)
from dfm_fast.nn._lists import ModuleList
from dfm_fast.nn._packs import linears, pack
from dfm_fast.nn.attentions import CrossAttention, KeyValues, rotary_tables
from dfm_fast.nn.group_norms import GroupNormSiLU
from dfm_fast.nn.separables import SeparableConvBlock
from dfm_fast.ops import ChannelStatistics

CONVOLUTIONS = ("expanded", "separable", "dense")
SAMPLERS = ("dense", "separable")


class SnapGenUNet(Pretrained):
    """The velocity of a noisy latent: eps - x at noise level t.

    Args:
        in_channels: of the latent and the velocity.
        channels, depths, heads: of each stage: width, blocks of a transformer (0: none), heads of
            its attentions.
        cross_dim: of the text's tokens.
        text_dim: of the tokens that are given, where a layer and a norm take them to cross_dim;
            None is without.
        layers: residual blocks of a stage going down; going up there is one more.
        mid_depth: blocks in the middle; None is that of the last stage.
        kv_heads: of keys and values in both attentions; None is as many as heads.
        self_attention: of each stage. The middle has it with the last stage.
        norm_replaces_self_attention: blocks without self-attention keep its norm, which replaces
            the stream.
        last_transformer: whether the last stage going up has its transformers.
        convolutions: of residual blocks: "expanded" (separable, the hidden map twice as wide),
            "separable" or "dense".
        samplers: "dense" or "separable".
        ff_mult: hidden widths of GEGLU layers.
        qk_norm: RMSNorm of queries and keys.
        rope: 2-D rotary embedding in self-attention.
        time_channels: of the noise level's embedding.
        num_ids: numbers beside the noise level, such as the picture's size and crop, embedded like
            it; 0 is without.
        groups: of group norms.
        checkpointing: recompute residual blocks and transformers in backward.

    Raises:
        TypeError, ValueError: arguments; in forward, shapes.
    """

    def __init__(
        self,
        in_channels: int = 16,
        channels: Sequence[int] = (256, 512, 896),
        depths: Sequence[int] = (1, 2, 4),
        heads: Sequence[int] = (4, 8, 14),
        *,
        cross_dim: int = 2304,
        text_dim: int | None = None,
        layers: int = 2,
        mid_depth: int | None = None,
        kv_heads: int | None = 1,
        self_attention: Sequence[bool] = (False, False, True),
        norm_replaces_self_attention: bool = True,
        last_transformer: bool = False,
        convolutions: str = "expanded",
        samplers: str = "dense",
        ff_mult: float = 3,
        qk_norm: bool = True,
        rope: bool = False,
        time_channels: int = 1024,
        num_ids: int = 0,
        groups: int = 32,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        _check(self.config)
        self.in_channels, self.channels, self.rope = in_channels, tuple(channels), rope
        self.head_dims = [c // h for c, h in zip(channels, heads, strict=True)]
        self.num_ids, self.checkpointing = num_ids, checkpointing
        self.frequencies = channels[0]
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.time_embedding = Embedding(channels[0], time_channels)
        self.add_embedding = Embedding(256 * num_ids, time_channels) if num_ids else None
        self.encoder_hid_proj = (
            nn.Sequential(nn.Linear(text_dim, cross_dim), nn.RMSNorm(cross_dim, NORM_EPS))
            if text_dim
            else None
        )
        self.down_blocks = ModuleList(self._down())
        self.mid_block = self._middle()
        self.up_blocks = ModuleList(self._up())
        self.conv_norm_out = GroupNormSiLU(groups, channels[0], NORM_EPS)
        self.conv_out = nn.Conv2d(channels[0], in_channels, 3, padding=1)
        self.reset_parameters()
        self._pack()

    # --- Construction ---

    def _residual(self, in_channels: int, channels: int) -> Residual:
        c = self.config
        if c["convolutions"] == "dense":
            return DenseConvBlock(in_channels, channels, c["time_channels"], c["groups"])
        return SeparableConvBlock(
            in_channels,
            channels,
            c["time_channels"],
            expansion=2 if c["convolutions"] == "expanded" else 1,
            groups=c["groups"],
            eps=NORM_EPS,
        )

    def _transformers(self, stage: int, count: int, depth: int | None = None) -> list[Transformer]:
        c = self.config
        depth = c["depths"][stage] if depth is None else depth
        given = c["channels"][stage], c["heads"][stage], depth, c, c["self_attention"][stage]
        return [Transformer(*given) for _ in range(count)] if depth else []

    def _down(self) -> list[Stage]:
        stages, width, layers = [], self.channels[0], self.config["layers"]
        for s, channels in enumerate(self.channels):
            widths = [width] + [channels] * (layers - 1)
            blocks = [self._residual(w, channels) for w in widths]
            stage = Stage(blocks, self._transformers(s, layers))
            if s < len(self.channels) - 1:
                sampler = Downsample(channels, self.config["samplers"])
                stage.downsamplers = ModuleList([sampler])
            stages.append(stage)
            width = channels
        return stages

    def _middle(self) -> Stage:
        channels, depth = self.channels[-1], self.config["mid_depth"]
        transformers = self._transformers(len(self.channels) - 1, 1, depth)
        return Stage([self._residual(channels, channels) for _ in range(2)], transformers)

    def _up(self) -> list[Stage]:
        """Inputs of a layer: the map so far, and what the way down kept."""
        stages, width, kept = [], self.channels[-1], self._kept_channels()
        for s, channels in reversed(list(enumerate(self.channels))):
            blocks = []
            for _ in range(self.config["layers"] + 1):
                blocks.append(self._residual(width + kept.pop(), channels))
                width = channels
            plain = s == 0 and not self.config["last_transformer"]
            stage = Stage(blocks, [] if plain else self._transformers(s, len(blocks)))
            if s:
                stage.upsamplers = ModuleList([Upsample(channels, self.config["samplers"])])
            stages.append(stage)
        return stages

    def _kept_channels(self) -> list[int]:
        """Widths of the maps that going down keeps: the first, each layer's, each sampler's."""
        kept = [self.channels[0]]
        for s, channels in enumerate(self.channels):
            kept += [channels] * (self.config["layers"] + (s < len(self.channels) - 1))
        return kept

    def reset_parameters(self) -> None:
        """What ends a residual branch is 0, and so is the velocity (Dhariwal & Nichol, arXiv
        2105.05233): a fresh network's transformers and residual blocks are their shortcuts."""
        for module in self.modules():
            if isinstance(module, Transformer):
                _zero(module.proj_out)
            elif isinstance(module, SeparableConvBlock):
                _zero(module.conv2.pointwise)
            elif isinstance(module, DenseConvBlock):
                _zero(module.conv2)
        _zero(self.conv_out)

    # --- Weights that are read together ---

    # All in the order of use. (`modules()` would take a tenth of the host's time of a step.)

    def _stages(self) -> list[Stage]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def _residuals(self) -> list[Residual]:
        return [block for stage in self._stages() for block in stage.resnets]

    def transformers(self) -> list[Transformer]:
        return [transformer for stage in self._stages() for transformer in stage.attentions]

    def _cross_attentions(self) -> list[CrossAttention]:
        return [b.attn2 for t in self.transformers() for b in t.transformer_blocks]

    def _text_layers(self) -> list[nn.Linear]:
        return [layer for a in self._cross_attentions() for layer in (a.to_k, a.to_v)]

    def _time_layers(self) -> list[nn.Linear]:
        return [block.time_emb_proj for block in self._residuals()]

    def _pack(self) -> None:
        pack(*self._text_layers())
        pack(*self._time_layers())

    # Both give every parameter memory of its own: .to() and the like, and copy.deepcopy.

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._pack()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    # --- Once for all steps ---

    def key_values(self, text: Tensor, mask: Tensor | None = None) -> list[KeyValues]:
        """Those of every cross-attention, by one product: `forward`'s text, once per prompt.

        Args:
            text: [B, S, cross_dim], or text_dim where there is one.
            mask: bool [B, S], True for tokens that count; None: all do.
        """
        if self.encoder_hid_proj is not None:
            text = self.encoder_hid_proj(text)
        both = iter(linears(text, *self._text_layers()))
        layers = self._cross_attentions()
        return [layer._key_values(next(both), next(both), mask) for layer in layers]

    def time_shifts(self, t: Tensor, ids: Tensor | None = None) -> Tensor:
        """What the residual blocks add for noise levels t, by one product.

        Args:
            t: [...], noise levels, 1 is pure noise.
            ids: [..., num_ids], where there are any.

        Returns:
            [..., all blocks' hidden widths]; the row of a step is `forward`'s shifts.
        """
        dtype = self.conv_in.weight.dtype
        temb = self.time_embedding(timestep_embedding(1000 * t, self.frequencies).to(dtype))
        if self.add_embedding is not None:
            ids = timestep_embedding(self._ids(ids)).flatten(-2)
            temb = temb + self.add_embedding(ids.to(dtype))
        return torch.cat(linears(F.silu(temb), *self._time_layers()), -1)

    def _ids(self, ids: Tensor | None) -> Tensor:
        if ids is None or ids.shape[-1] != self.num_ids:
            got = None if ids is None else list(ids.shape)
            _checks.fail(type(self).__name__, "ids", f"[..., {self.num_ids}]", got)
        return ids

    # --- The network ---

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        text: Tensor | Sequence[KeyValues] | None = None,
        *,
        mask: Tensor | None = None,
        ids: Tensor | None = None,
        shifts: Tensor | None = None,
        features: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The velocity.

        Args:
            x: [N, in_channels, H, W], x_t = (1 - t) x + t eps; sides that the stages divide.
            t: [N], noise levels; None beside shifts.
            text: `key_values` of a text (those of one sample serve all), or the text itself.
            mask: of a text that is given itself.
            ids: [N, num_ids], where there are any.
            shifts: [N, ...], `time_shifts` of t and ids where they are known.
            features: also give the last map, for distillation.

        Returns:
            Like x, channels_last; with `features` also [N, channels[0], H, W], what the last norm
            takes.
        """
        self._check_inputs(x, t, shifts)
        texts = self._texts(text, mask)
        if t is not None:
            shifts = self.time_shifts(t, ids)
        assert shifts is not None  # either is given
        sizes = [layer.out_features for layer in self._time_layers()]
        walk = _Walk(self, iter(shifts.split(sizes, -1)), iter(texts), x)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        last = walk(x)
        velocity = self.conv_out(self.conv_norm_out(*last))
        return (velocity, last[0]) if features else velocity

    def _texts(
        self, text: Tensor | Sequence[KeyValues] | None, mask: Tensor | None
    ) -> Sequence[KeyValues]:
        op, layers = type(self).__name__, self._cross_attentions()
        if isinstance(text, Tensor):
            width = self.config["text_dim"] or self.config["cross_dim"]
            if text.ndim != 3 or text.shape[-1] != width:
                _checks.fail(op, "text", f"[B, S, {width}]", list(text.shape))
            return self.key_values(text, mask)
        if text is None and layers:
            _checks.fail(op, "text", "key_values of a text, or a text [B, S, D]", None)
        if mask is not None:
            _checks.fail(op, "mask", "None beside key_values, which have theirs", "a mask")
        if len(text or ()) != len(layers):
            _checks.fail(op, "text", f"{len(layers)} key_values", len(text or ()))
        return text or ()

    def _check_inputs(self, x: Tensor, t: Tensor | None, shifts: Tensor | None) -> None:
        op, multiple = type(self).__name__, 2 ** (len(self.channels) - 1)
        _checks.tensor(op, "x", x, (4,))
        n, c, height, width = x.shape
        if c != self.in_channels or height % multiple or width % multiple:
            expected = f"[N, {self.in_channels}, H, W] with sides that {multiple} divides"
            _checks.fail(op, "x", expected, list(x.shape))
        if (t is None) == (shifts is None):
            got = "both" if shifts is not None else None
            _checks.fail(op, "t", "noise levels [N], or shifts in their place", got)
        if t is not None and tuple(t.shape) != (n,):
            _checks.fail(op, "t", f"shape [{n}]", list(t.shape))


class _Walk:
    """One pass through the stages: who is next in line for shifts and texts, and what is kept."""

    def __init__(self, unet: SnapGenUNet, shifts: Any, texts: Any, x: Tensor) -> None:
        self.unet, self.shifts, self.texts = unet, shifts, texts
        self.tables: dict[int, Rotary] = {}
        self.modulations = modulations_of(unet.transformers(), x)

    def __call__(self, x: Tensor) -> tuple[Tensor, None, ChannelStatistics]:
        """The first map -> what the last norm takes."""
        unet = self.unet
        kept = [Map(x).known()]  # read again on the way up
        for s, stage in enumerate(unet.down_blocks):
            for i in range(len(stage.resnets)):
                kept.append(self.layer(stage, i, kept[-1], s).known())
            if stage.downsamplers is not None:
                kept.append(Map(stage.downsamplers[0](kept[-1].x)).known())
        now = self.layer(unet.mid_block, 0, kept[-1], s)
        now = self.layer(unet.mid_block, 1, now, s)
        for s, stage in zip(reversed(range(len(unet.channels))), unet.up_blocks, strict=True):
            for i in range(len(stage.resnets)):
                now = self.layer(stage, i, joined(now, kept.pop()), s)
            if stage.upsamplers is not None:
                now = Map(stage.upsamplers[0](now.x))
        return now.x, None, statistics_of(now)

    def layer(self, stage: Stage, i: int, now: Map, s: int) -> Map:
        """A residual block, and its transformer where there is one."""
        now = self.run(residual, stage.resnets[i], now.known(), next(self.shifts))
        if i < len(stage.attentions):
            transformer = stage.attentions[i]
            texts = [next(self.texts) for _ in transformer.transformer_blocks]
            known = self.modulations.get(transformer, ())
            now = Map(self.run(transformer, now, texts, self.rotary(now.x, s), known))
        return now

    def run(self, f: Any, *given: Any) -> Any:
        if self.unet.checkpointing and torch.is_grad_enabled():
            return checkpoint(f, *given, use_reentrant=False)
        return f(*given)

    def rotary(self, x: Tensor, stage: int) -> Rotary:
        if not (self.unet.rope and self.unet.config["self_attention"][stage]):
            return ()
        if stage not in self.tables:
            given = self.unet.head_dims[stage], 1e4, x.device, x.dtype
            self.tables[stage] = rotary_tables(x.shape[2:], *given)
        return self.tables[stage]


def _zero(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _check(config: dict[str, Any]) -> None:
    op, stages = "SnapGenUNet", len(config["channels"])
    for name in ("depths", "heads", "self_attention"):
        if len(config[name]) != stages:
            _checks.fail(op, name, f"{stages} values, one per stage", config[name])
    for name in ("in_channels", "cross_dim", "layers", "time_channels", "groups"):
        _checks.integer(op, name, config[name], 1)
    _checks.integer(op, "num_ids", config["num_ids"], 0)
    for channels, depth, heads in zip(
        config["channels"], config["depths"], config["heads"], strict=True
    ):
        _checks.integer(op, "depths", depth, 0)
        _checks.integer(op, "heads", heads, 1)
        if _checks.integer(op, "channels", channels, 1) % config["groups"] or channels % heads:
            expected = f"multiples of {config['groups']} groups and of the heads"
            _checks.fail(op, "channels", expected, channels)
        if config["rope"] and channels // heads % 4:
            _checks.fail(op, "rope", "head dimensions that 4 divides", channels // heads)
    if config["channels"][0] % 2:
        _checks.fail(op, "channels", "an even first width", config["channels"][0])
    _checks.choice(op, "convolutions", config["convolutions"], CONVOLUTIONS)
    _checks.choice(op, "samplers", config["samplers"], SAMPLERS)


# --- Sizes ----------------------------------------------------------------------------------------


def snapgen_t2i(in_channels: int = 16, **options: Any) -> SnapGenUNet:
    """Text to image, for CLIP-L, CLIP-G and Gemma-2-2B: 383.7 M parameters; arguments as
    `SnapGenUNet`."""
    return SnapGenUNet(in_channels, **{"cross_dim": 2304, "rope": True, **options})


def snapgen_imagenet(in_channels: int = 16, **options: Any) -> SnapGenUNet:
    """ImageNet, a class's name as CLIP-L reads it."""
    return SnapGenUNet(in_channels, **{"cross_dim": 768, "rope": True, **options})


def snapgen_tiny(in_channels: int = 1, **options: Any) -> SnapGenUNet:
    """Small pictures such as 16 x 16 digits, in pixels, with `ClassTokens` of width 64 as the text:
    2.2 M parameters."""
    sizes = {"channels": (32, 64, 96), "depths": (0, 1, 1), "heads": (1, 2, 3)}
    widths = {"cross_dim": 64, "time_channels": 128, "groups": 16}
    return SnapGenUNet(in_channels, **{**sizes, **widths, "rope": True, **options})
