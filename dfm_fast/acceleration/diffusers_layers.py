"""Layers of diffusers: residual blocks, upsampling, norms, feed-forward layers.

Functions have the arguments of the forward they stand for. What a function leaves out (a norm, an
activation, a dropout) it leaves out only where it is plain; everything else is called as a module.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from dfm_fast.acceleration._units import (
    first_reason,
    idle,
    plain,
    register,
    same,
    serves,
)
from dfm_fast.acceleration.torch_layers import GELU, normalised, projected, upsampled, upsamples
from dfm_fast.nn import SeparableConv2d, SeparableConvBlock
from dfm_fast.nn._hooks import hooked
from dfm_fast.ops import ada_layer_norm, channel_statistics, geglu, rms_norm, swiglu

# --- Residual blocks ------------------------------------------------------------------------------


def _residual_refusal(block: Any) -> str | None:
    return first_reason(
        (
            block.time_emb_proj is not None and block.time_embedding_norm != "default",
            "an embedding that is not simply added",
        ),
        (not same(block.nonlinearity, nn.SiLU), "an activation that is not SiLU"),
    )


def _residual_saved(block: Any) -> int:
    """Elements per pixel: of separable blocks 7 i + 24 o become 2 i + 5 o, and i + o go where there
    is a shortcut; else SiLU and the sum with the embedding read and write a map each."""
    i, o = block.in_channels, block.out_channels
    if _separable(block):
        return 5 * i + 19 * o + (i + o if block.conv_shortcut is not None else 0)
    return 2 * i + (4 if block.time_emb_proj is not None else 2) * o


def _separable(block: Any) -> bool:
    """Whether both convolutions are separable, in the form that has a kernel."""
    return all(
        same(conv, "DepthwiseSeparableConv")
        and same(conv.depthwise, nn.Conv2d)
        and same(conv.pointwise, nn.Conv2d)
        and conv.depthwise.bias is None
        and conv.depthwise.kernel_size == (3, 3)
        and conv.depthwise.stride == conv.depthwise.padding == (1, 1)
        for conv in (block.conv1, block.conv2)
    )


def residual_block(block: Any, input_tensor: Tensor, temb: Tensor | None) -> Tensor | None:
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + temb))), x [N, C, H, W]."""
    if block.time_emb_proj is None and temb is not None:
        return None
    if _fits_separable_block(block, input_tensor, temb):
        y = _separable_block(block, input_tensor, temb)
    else:
        y = _dense_block(block, input_tensor, temb)
    return y if block.output_scale_factor == 1 else y / block.output_scale_factor


def _fits_separable_block(block: Any, x: Tensor, temb: Tensor | None) -> bool:
    if not _separable(block) or block.upsample is not None or block.downsample is not None:
        return False
    if (temb is None) != (block.time_emb_proj is None):
        return False
    convs = block.conv1, block.conv2
    skipped = block.norm1, block.norm2, block.nonlinearity, block.dropout, *convs
    parts = [part for conv in convs for part in (conv.depthwise, conv.pointwise)]
    if any(map(hooked, (*skipped, *parts))) or not idle(block.dropout):
        return False
    own = [p for m in (*skipped, *parts) for p in m._parameters.values()]
    same_norms = all(plain(norm, nn.GroupNorm) for norm in skipped[:2])
    return same_norms and serves(x, *own) and (temb is None or serves(temb))


def _separable_block(block: Any, x: Tensor, temb: Tensor | None) -> Tensor:
    """`nn.SeparableConvBlock`, two fused calls and one pass for the statistics of x."""
    shift = None
    if temb is not None:
        shift = block.time_emb_proj(temb if block.skip_time_act else F.silu(temb))
    statistics = channel_statistics(x.detach())
    h, found = SeparableConv2d.forward(
        block.conv1, x, shift, None, block.norm1, statistics, with_statistics=True
    )
    seen = block.conv_shortcut is not None and hooked(block.conv_shortcut)
    shortcut = block.conv_shortcut(x) if seen else SeparableConvBlock._shortcut(block, x)
    y = SeparableConv2d.forward(block.conv2, h, None, shortcut, block.norm2, found)
    return cast(Tensor, y)  # without statistics


def _dense_block(block: Any, x: Tensor, temb: Tensor | None) -> Tensor:
    """Norms, the sum with the embedding and SiLU in one pass each; the convolutions as they are."""
    h = _norm_silu(block, block.norm1, x)
    resize = block.downsample if block.upsample is None else block.upsample
    if resize is not None:
        if block.upsample is not None and len(h) >= 64:  # as the original, for torch's kernel
            x, h = x.contiguous(), h.contiguous()
        x, h = resize(x), resize(h)
    h = block.conv1(h)
    if block.time_emb_proj is not None:
        temb = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
    h = block.conv2(block.dropout(_norm_silu(block, block.norm2, h, temb)))
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x.contiguous() if block.training else x)
    return x + h


def _norm_silu(block: Any, norm: Any, x: Tensor, shift: Tensor | None = None) -> Tensor:
    """silu(norm(x + shift)), shift [N, C]."""
    if plain(norm, nn.GroupNorm) and plain(block.nonlinearity, nn.SiLU):
        y = normalised(norm, x, shift)
        if y is not None:
            return y
    return block.nonlinearity(norm(x if shift is None else x + shift[:, :, None, None]))


def _resnet_block(block: Any, input_tensor: Tensor, temb: Any, *args: Any, **kwargs: Any) -> Any:
    return None if args or kwargs else residual_block(block, input_tensor, temb)


register(
    "blocks",
    "diffusers",
    "ResnetBlock2DDreamLite",
    "SeparableConvBlock",
    refusal=_residual_refusal,
    saved=_residual_saved,
)(residual_block)
register(
    "blocks",
    "diffusers",
    "ResnetBlock2D",
    "residual block with group_norm_silu",
    refusal=_residual_refusal,
    saved=_residual_saved,
)(_resnet_block)

# --- Upsampling -----------------------------------------------------------------------------------


def _conv(up: Any) -> Any:
    return up.conv if up.name == "conv" else up.Conv2d_0


@register(
    "convolutions",
    "diffusers",
    "Upsample2D",
    "UpsampleConv2d",
    knows=lambda up: up.use_conv or up.use_conv_transpose,
    refusal=lambda up: first_reason(
        (up.use_conv_transpose or not up.interpolate, "no doubling by interpolation"),
        (up.norm is not None, "a norm before it"),
        (not upsamples(_conv(up)), "a convolution that is not a plain 3x3 with padding 1"),
    ),
    saved=lambda up: 8 * up.channels,  # the doubled map is written and read
)
def upsample_2d(
    module: Any, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
) -> Tensor | None:
    twice = [2 * n for n in hidden_states.shape[2:]]
    if args or kwargs or (output_size is not None and list(output_size) != twice):
        return None
    return upsampled(_conv(module), hidden_states)


# --- Norms ----------------------------------------------------------------------------------------


@register(
    "norms",
    "diffusers",
    "RMSNorm",
    "RMSNorm",
    refusal=lambda norm: first_reason(
        (norm.bias is not None, "a bias"), (len(norm.dim) != 1, "a weight of several dimensions")
    ),
    saved=lambda norm: 5 * norm.dim[0],  # square, mean, two products
)
def rms_norm_of_rows(module: Any, hidden_states: Tensor) -> Tensor | None:
    x, width = hidden_states, module.dim[0]
    if not serves(x, module.weight) or x.shape[-1] != width:
        return None
    return rms_norm(x, module.weight, eps=module.eps)


def without_weights(norm: Any) -> bool:
    """Whether a norm is a LayerNorm of the last dimension and nothing more."""
    known = same(norm, nn.LayerNorm, "FP32LayerNorm")
    return known and norm.weight is norm.bias is None and len(norm.normalized_shape) == 1


def modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift, x [B, T, D], shift and scale [B, D]."""
    if fits(norm, x, shift, scale):
        return ada_layer_norm(x, shift, scale, eps=norm.eps)
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def fits(norm: Any, x: Tensor, *modulation: Tensor) -> bool:
    """Whether the norm may be left out, and kernels take x and vectors [B, D]."""
    return (
        without_weights(norm)
        and not hooked(norm)
        and serves(x, *modulation)
        and x.ndim == 3
        and x.shape[-1] == norm.normalized_shape[0]
        and all(m.shape == (x.shape[0], x.shape[2]) for m in modulation)
    )


def _modulated_refusal(layer: Any) -> str | None:
    return None if without_weights(layer.norm) else "its norm has weights, or is no LayerNorm"


def _ada(of: str, **options: Any) -> Any:
    """Registers a layer of one modulated norm; its steps after the mean are a pass each."""
    options = {"refusal": _modulated_refusal, "saved": _modulated_saved, **options}
    return register("norms", "diffusers", of, "ada_layer_norm", **options)


def _modulated_saved(layer: Any, norms: int = 1) -> int:
    return 4 * norms * layer.norm.normalized_shape[0]  # a product and a sum, read and written


@_ada("AdaLayerNormZero")
def ada_layer_norm_zero(
    module: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: Any = None,
    emb: Tensor | None = None,
) -> tuple[Tensor, ...]:
    if module.emb is not None:
        emb = module.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *rest = module.linear(module.silu(emb)).chunk(6, dim=1)
    return modulated(module.norm, x, shift, scale), *rest


@_ada("AdaLayerNormZeroSingle")
def ada_layer_norm_zero_single(
    module: Any, x: Tensor, emb: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shift, scale, gate = module.linear(module.silu(emb)).chunk(3, dim=1)
    return modulated(module.norm, x, shift, scale), gate


@_ada("AdaLayerNormContinuous")
def ada_layer_norm_continuous(module: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    emb = module.linear(module.silu(conditioning_embedding).to(x.dtype))
    scale, shift = emb.chunk(2, dim=1)
    return modulated(module.norm, x, shift, scale)


@_ada("SD35AdaLayerNormZeroX", saved=lambda layer: _modulated_saved(layer, 2))
def ada_layer_norm_zero_x(
    module: Any, hidden_states: Tensor, emb: Tensor | None = None
) -> tuple[Tensor, ...] | None:
    if hooked(module.norm):  # it would be called twice
        return None
    shift, scale, *rest, shift2, scale2, gate2 = module.linear(module.silu(emb)).chunk(9, dim=1)
    y, y2 = (modulated(module.norm, hidden_states, *m) for m in ((shift, scale), (shift2, scale2)))
    return y, *rest, y2, gate2


@_ada(
    "AdaLayerNorm",
    refusal=lambda layer: (
        "scale and shift for the whole batch" if layer.chunk_dim != 1 else _modulated_refusal(layer)
    ),
)
def ada_layer_norm_of_timestep(
    module: Any, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None
) -> Tensor:
    if module.emb is not None:
        temb = module.emb(timestep)
    shift, scale = module.linear(module.silu(temb)).chunk(2, dim=1)
    return modulated(module.norm, x, shift, scale)


# --- Feed-forward layers --------------------------------------------------------------------------


def _activation(first: Any) -> str | None:
    """What `nn.FeedForward` calls a first layer, if it has it."""
    if same(first, "GEGLU"):
        return "geglu"
    if same(first, "SwiGLU"):
        return "swiglu" if same(first.activation, nn.SiLU) else None
    if same(first, "GELU"):
        return GELU.get(first.approximate)
    if same(first, "LinearActivation") and same(first.activation, nn.SiLU):
        return "linear-silu"
    return None


def _known_layers(ff: Any) -> bool:
    return (
        len(ff.net) in (3, 4)
        and isinstance(ff.net[1], nn.Dropout)
        and _activation(ff.net[0]) is not None
    )


@register(
    "activations",
    "diffusers",
    "FeedForward",
    "FeedForward",
    refusal=lambda ff: None if _known_layers(ff) else "layers that nn.FeedForward does not have",
    # SiLU or GELU alone; gates count with their own layers.
    saved=lambda ff: 2 * ff.net[2].in_features if same(ff.net[0], "GELU") else 0,
)
def feed_forward(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    if args or kwargs or not _known_layers(module):
        return None
    first, dropout, last, *final = module.net
    inner = [first.activation] if isinstance(getattr(first, "activation", 0), nn.Module) else []
    name = _activation(first)
    if name is None or any(map(hooked, (first, first.proj, dropout, last, *inner))):
        return None
    x = projected(hidden_states, first.proj, name, last, dropout)
    return final[0](x) if final and x is not None else x


def _gate_saved(layer: Any) -> int:
    return layer.proj.out_features  # the activated half, written and read


@register("activations", "diffusers", "GEGLU", "geglu", saved=_gate_saved)
def geglu_layer(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    if args or kwargs:
        return None
    h = module.proj(hidden_states)
    if serves(h, autocast=True):
        return geglu(h)
    value, gate = h.chunk(2, dim=-1)
    return value * module.gelu(gate)


@register("activations", "diffusers", "SwiGLU", "swiglu", saved=_gate_saved)
def swiglu_layer(module: Any, hidden_states: Tensor) -> Tensor:
    h = module.proj(hidden_states)
    if plain(module.activation, nn.SiLU) and serves(h, autocast=True):
        return swiglu(h)
    value, gate = h.chunk(2, dim=-1)
    return value * module.activation(gate)
