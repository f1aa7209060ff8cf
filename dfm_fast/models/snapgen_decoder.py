"""SnapGen's tiny decoder (arXiv 2412.09619): latents of 16 channels and an eighth of the sides, as
Stable Diffusion 3's, to pictures. Separable convolutions, no attention, no norm at all, no
convolution beside a residual; blocks are fewer where maps are larger.

The paper gives 1.38 M parameters and no table of layers. This one is our choice:

| sides at 1024 px | layers | parameters | GMAC |
|---|---|---:|---:|
| 128² | separable convolution 16 -> 240 | 4,224 | 0.07 |
| 128² | 4 blocks of 240 | 950,400 | 15.52 |
| 128² -> 256² | upsampling 240 -> 128 | 125,552 | 2.05 |
| 256² | 3 blocks of 128 | 208,128 | 13.56 |
| 256² -> 512² | upsampling 128 -> 64 | 34,176 | 2.22 |
| 512² | 2 blocks of 64 | 36,608 | 9.50 |
| 512² -> 1024² | upsampling 64 -> 32 | 8,896 | 2.30 |
| 1024² | 1 block of 32 | 5,056 | 5.20 |
| 1024² | SiLU, separable convolution 32 -> 3 | 387 | 0.40 |
| | all | 1,373,427 | 50.8 |

TAESD's decoder has 1.23 M parameters and 283 GMAC, Stable Diffusion 3's 49.55 M and 5,236.

A block of width c, with h of 2 c channels, and an upsampling layer:

    h = conv1(x)        y = x + conv2(silu(h))        conv: depthwise 3x3, pointwise, bias
    y[2i + a, 2j + b] = part 2a + b of the channels of conv(x)[i, j]      (sub-pixel convolution)

It computes a map of 4 times the channels on the small grid: for 64 -> 32 channels on a CPU with
AVX-512 0.3 (float32) and 0.2 (bfloat16) of the time of `upsample_conv2d`, with 0.45 of its
parameters, which the blocks get. Without norms a pixel depends on its surroundings only, so that
parts of a picture decoded apart are those of the whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfm_fast import _checks
from dfm_fast._library import differentiable
from dfm_fast.models._pretrained import Pretrained
from dfm_fast.nn._lists import ModuleList
from dfm_fast.nn.separables import SeparableConv2d
from dfm_fast.ops import ChannelStatistics, separable_conv2d
from dfm_fast.ops._layouts import lay_out, memory_format
from dfm_fast.ops.group_norms import wide_dtype
from dfm_fast.ops.residuals import pixels_of, separable_residual, separable_upsample

LAST = torch.channels_last
Span = tuple[int, int]  # along an axis: the first pixel, and one past the last


class Config(dict[str, Any]):
    """A configuration whose values are attributes too, as pipelines of diffusers ask for them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Decoded(NamedTuple):
    """What `decode` returns: `.sample` or `[0]`, as pipelines of diffusers ask for it."""

    sample: Tensor  # [N, out_channels, f h, f w]


# --- Layers ---------------------------------------------------------------------------------------


def silu_separable(conv: SeparableConv2d, x: Tensor) -> Tensor:
    """conv(silu(x)), x [N, C, H, W]. Without gradients SiLU is no pass over x of its
    own: it is that of the operator's norm, the identity by statistics of mean 0 and variance 1.
    (The gradient through it would still be a norm's.)"""
    if (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_exporting():
        return conv(F.silu(x))
    (n, c, h, w), wide = x.shape, wide_dtype(x)
    mean, m2 = x.new_zeros((n, c), dtype=wide), x.new_full((n, c), h * w, dtype=wide)
    statistics = ChannelStatistics(h * w, mean, m2)
    return separable_conv2d(x, *_weights(conv), num_groups=c, eps=0.0, statistics=statistics)


def _weights(conv: SeparableConv2d) -> tuple[Tensor, Tensor, Tensor]:
    bias = conv.pointwise.bias
    assert bias is not None  # all of the decoder have one
    return conv.depthwise.weight, conv.pointwise.weight, bias


class Block(nn.Module):
    """x + conv2(silu(conv1(x)))."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.conv1 = SeparableConv2d(channels, expansion * channels, bias=True)
        self.conv2 = SeparableConv2d(expansion * channels, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> the same, channels_last."""
        x = x.contiguous(memory_format=LAST)
        given = x, *_weights(self.conv1), *_weights(self.conv2)
        if differentiable(*given):
            return self.conv2(F.silu(self.conv1(x)), residual=x)
        return separable_residual(*given)


class Upsample(SeparableConv2d):
    """A separable convolution to four times the channels, which become four pixels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, 4 * out_channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # the map and nothing else
        """x [N, C, H, W] -> [N, O, 2H, 2W], channels_last."""
        x = x.contiguous(memory_format=LAST)
        given = x, *_weights(self)
        if differentiable(*given):
            return pixels_of(cast(Tensor, super().forward(x)))
        return separable_upsample(*given)


class Stage(nn.Module):
    """The blocks of one resolution, and the way to the next one."""

    def __init__(self, channels: int, outputs: int | None, blocks: int, expansion: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(channels, expansion) for _ in range(blocks)))
        self.upsample = None if outputs is None else Upsample(channels, outputs)


# --- The decoder ----------------------------------------------------------------------------------


class SnapGenDecoder(Pretrained):
    """Latents [N, latent_channels, h, w] -> pictures [N, out_channels, f h, f w] of about [-1, 1],
    f = 2^(stages - 1).

    Args:
        latent_channels, out_channels: of latents and pictures.
        block_out_channels: widths of the stages, the largest maps first, as diffusers has them.
        layers_per_block: blocks of the stages, in the same order.
        expansion: of a block's hidden channels.
        scaling_factor, shift_factor: a diffusion model's latents are (z - shift) scale; z is what
            the decoder takes. The defaults are Stable Diffusion 3's.

    Computes in channels_last, whatever the latents' memory format, which the pictures have.

    Raises:
        TypeError, ValueError: numbers that make no decoder.
    """

    def __init__(
        self,
        latent_channels: int = 16,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (32, 64, 128, 240),
        layers_per_block: Sequence[int] = (1, 2, 3, 4),
        expansion: int = 2,
        scaling_factor: float = 1.5305,
        shift_factor: float = 0.0609,
    ) -> None:
        super().__init__()
        self.config = Config(
            latent_channels=latent_channels,
            out_channels=out_channels,
            block_out_channels=list(block_out_channels),
            layers_per_block=list(layers_per_block),
            expansion=expansion,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
        )
        _check(self.config)
        widths = [*reversed(block_out_channels)]
        self.conv_in = SeparableConv2d(latent_channels, widths[0], bias=True)
        self.stages = ModuleList(
            Stage(channels, outputs, blocks, expansion)
            for channels, outputs, blocks in zip(
                widths, (*widths[1:], None), reversed(layers_per_block), strict=True
            )
        )
        self.conv_out = SeparableConv2d(widths[-1], out_channels, bias=True)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights that keep variances, as no norm does (torch's own would divide them by 9
        in every separable convolution); no biases. At first blocks are the identity, and the four
        pixels of an upsampling are alike: nearest, no checkerboard."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Block):
                nn.init.zeros_(module.conv2.pointwise.weight)
            elif isinstance(module, Upsample):
                parts = module.pointwise.weight.unflatten(0, (4, -1))
                parts[1:] = parts[:1].clone()

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.stages) - 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.pointwise.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv_in.pointwise.weight.device

    def forward(self, latents: Tensor) -> Tensor:
        """latents z [N, C, h, w], like the parameters -> [N, out_channels, f h, f w]."""
        self._check_latents(latents)
        x = self.conv_in(latents.contiguous(memory_format=LAST))
        for stage in self.stages:
            x = stage.blocks(x)
            x = x if stage.upsample is None else stage.upsample(x)
        return lay_out(silu_separable(self.conv_out, x), memory_format(latents))

    def decode(
        self,
        latents: Tensor,
        return_dict: bool = True,
        *,
        tile: int | None = None,
        scaled: bool = False,
        generator: torch.Generator | None = None,
    ) -> Decoded:
        """Pictures of latents, as `AutoencoderKL.decode` of diffusers gives them.

        Args:
            latents: [N, C, h, w], like the parameters.
            return_dict, generator: for pipelines of diffusers, and without effect.
            tile: compute squares of so many latents at a time, each with the surroundings that it
                depends on: memory is that of a tile, and pixels are those of the whole up to
                rounding. With 64 about half of the work is done twice, with 128 a quarter.
            scaled: the latents are a diffusion model's, (z - shift_factor) scaling_factor.

        Raises:
            TypeError, ValueError: latents of another shape or dtype, a tile that is no int.
        """
        op = type(self).__name__
        self._check_latents(latents)
        z = self.unscale(latents) if scaled else latents
        if tile is None or _checks.integer(op, "tile", tile, 1) >= max(z.shape[2:]):
            return Decoded(self(z))
        height, width = (self.factor * side for side in z.shape[2:])
        pictures = z.new_empty((len(z), self.config["out_channels"], height, width))
        for spans in itertools.product(*(_spans(side, tile) for side in z.shape[2:])):
            rows, columns = (slice(*_scaled(span, self.factor)) for span in spans)
            pictures[:, :, rows, columns] = self._tile(z, spans)
        return Decoded(lay_out(pictures, memory_format(latents)))

    def unscale(self, latents: Tensor) -> Tensor:
        """Latents of a diffusion model, (z - shift_factor) scaling_factor -> z."""
        return latents / self.config["scaling_factor"] + self.config["shift_factor"]

    # --- Tiles ---

    def _margins(self) -> list[tuple[int, int]]:
        """Of every stage, pixels beside a tile that it needs, and that its blocks leave right: a
        block sees two pixels, any other convolution one."""
        margins: list[tuple[int, int]] = []
        after = 1  # of the last stage: conv_out's
        for stage in reversed(self.stages):
            left = after if stage.upsample is None else (after + 1) // 2 + 1
            after = left + 2 * len(stage.blocks)
            margins.insert(0, (after, left))
        return margins

    def _tile(self, z: Tensor, spans: Sequence[Span]) -> Tensor:
        """[N, out_channels, f rows, f columns] of the latents in `spans`. What has been computed
        from a cut that is no edge of the picture is dropped before every upsampling."""
        margins, sides = self._margins(), list(z.shape[2:])
        have = [_widened(s, margins[0][0] + 1, n) for s, n in zip(spans, sides, strict=True)]
        x = self.conv_in(_cut(z, [(0, n) for n in sides], have))
        for (_, left), stage in zip(margins, self.stages, strict=True):
            x = stage.blocks(x)
            keep = [_widened(s, left, n) for s, n in zip(spans, sides, strict=True)]
            x, have = _cut(x, have, keep), keep
            if stage.upsample is not None:
                x, sides = stage.upsample(x), [2 * n for n in sides]
                have, spans = ([_scaled(s, 2) for s in pair] for pair in (have, spans))
        return _cut(silu_separable(self.conv_out, x), have, spans)

    def _check_latents(self, latents: Any) -> None:
        op, channels = type(self).__name__, self.config["latent_channels"]
        _checks.tensor(op, "latents", latents, (4,))
        _checks.like(op, "latents", latents, "the parameters", self.conv_in.pointwise.weight)
        if latents.shape[1] != channels or not latents.numel():
            _checks.fail(op, "latents", f"shape [N, {channels}, h, w]", list(latents.shape))


def _check(config: Config) -> None:
    op = "SnapGenDecoder"
    for name in ("latent_channels", "out_channels", "expansion"):
        _checks.integer(op, name, config[name], 1)
    for name, least in (("block_out_channels", 1), ("layers_per_block", 0)):
        for value in config[name]:
            _checks.integer(op, name, value, least)
    stages, given = len(config["block_out_channels"]), len(config["layers_per_block"])
    if not stages or given != stages:
        expected = f"{stages} numbers, one per stage" if stages else "at least one stage"
        _checks.fail(op, "layers_per_block", expected, given)
    if not config["scaling_factor"] > 0:
        _checks.fail(op, "scaling_factor", "a positive number", config["scaling_factor"])


def _spans(size: int, tile: int) -> Iterator[Span]:
    return ((first, min(first + tile, size)) for first in range(0, size, tile))


def _scaled(span: Span, factor: int) -> Span:
    return factor * span[0], factor * span[1]


def _widened(span: Span, margin: int, size: int) -> Span:
    return max(0, span[0] - margin), min(size, span[1] + margin)


def _cut(x: Tensor, have: Sequence[Span], keep: Sequence[Span]) -> Tensor:
    """Of a map of the spans `have`, the part `keep`, channels_last."""
    (i, m), (j, n) = ((k[0] - h[0], k[1] - k[0]) for h, k in zip(have, keep, strict=True))
    return x[:, :, i : i + m, j : j + n].contiguous(memory_format=LAST)
