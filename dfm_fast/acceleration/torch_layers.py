"""Layers of torch.nn, and what follows one another in a Sequential."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from dfm_fast import nn as ours
from dfm_fast.acceleration._units import (
    first_reason,
    original,
    plain,
    register,
    same,
    serves,
)
from dfm_fast.nn._hooks import hooked
from dfm_fast.nn.activations import Projected, activation_of, feed_forward
from dfm_fast.ops import group_norm_silu, upsample_conv2d
from dfm_fast.ops.convolutions import KERNEL_SIZES

# --- Norms ----------------------------------------------------------------------------------------


@register(
    "norms",
    "torch",
    "RMSNorm",
    "RMSNorm",
    saved=lambda m: 5 * math.prod(m.normalized_shape),  # square, mean, two products
)
def rms_norm(module: Any, x: Tensor) -> Tensor | None:
    if not serves(x, module.weight) or x.shape[-len(module.normalized_shape) :] != tuple(
        module.normalized_shape
    ):
        return None
    return ours.RMSNorm.forward(module, x)


@register("norms", "torch", "GroupNorm", "group_norm")
def group_norm(module: nn.GroupNorm, input: Tensor) -> Tensor | None:
    return normalised(module, input, activation="none")


def normalised(
    norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None, *, activation: str = "silu"
) -> Tensor | None:
    """activation(norm(x + shift)), x [N, C, *], shift [N, C]; None where no kernel takes it."""
    if not serves(x, norm.weight, norm.bias, shift) or x.ndim < 2:
        return None
    if x.shape[1] != norm.num_channels:
        return None
    given = x, norm.num_groups, norm.weight, norm.bias, shift
    return group_norm_silu(*given, eps=norm.eps, activation=activation)


# --- Convolutions ---------------------------------------------------------------------------------


def depthwise_refusal(conv: nn.Conv2d) -> str | None:
    sides = [(k, k) for k in KERNEL_SIZES]
    channels = conv.in_channels
    return first_reason(
        (conv.out_channels != channels or conv.groups != channels, "groups of several channels"),
        (conv.kernel_size not in sides, "a kernel that is not 3x3, 5x5 or 7x7"),
        (conv.stride not in ((1, 1), (2, 2)), "a stride that is not 1 or 2"),
        (conv.dilation != (1, 1), "dilation"),
        (conv.padding_mode != "zeros", "padding that is not of zeros"),
        (
            not isinstance(conv.padding, str) and max(conv.padding) >= conv.kernel_size[0],
            "padding of a kernel or more",
        ),
    )


@register(
    "convolutions",
    "torch",
    "Conv2d",
    "DepthwiseConv2d",
    knows=lambda m: m.groups > 1,
    refusal=depthwise_refusal,
)
def depthwise_conv2d(module: Any, input: Tensor) -> Tensor | None:
    if not serves(input, module.weight, module.bias) or input.ndim != 4:
        return None
    if input.shape[1] != module.in_channels:
        return None
    return ours.DepthwiseConv2d.forward(module, input)


def upsamples(conv: Any) -> bool:
    """Whether a convolution is the one that `upsample_conv2d` computes after doubling."""
    return (
        same(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.padding in ((1, 1), "same")
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def upsampled(conv: nn.Conv2d, x: Tensor) -> Tensor | None:
    """conv of x doubled, x [N, C, H, W]; None where no kernel takes it."""
    if not plain(conv, nn.Conv2d) or not serves(x, conv.weight, conv.bias):
        return None
    if x.ndim != 4 or x.shape[1] != conv.in_channels:
        return None
    return upsample_conv2d(x, conv.weight, conv.bias)


# --- Sequential -----------------------------------------------------------------------------------


def _group(layers: list[nn.Module], i: int) -> tuple[str, int]:
    """What layers i, i + 1, ... are together ("" for one alone), and how many they are."""
    first, *after = (original(type(m)) for m in layers[i : i + 4])
    if first is nn.GroupNorm and after[:1] == [nn.SiLU]:
        return "norm_silu", 2
    if first is nn.Upsample and after[:1] == [nn.Conv2d] and _doubles(layers[i]):
        return ("upsample", 2) if upsamples(layers[i + 1]) else ("", 1)
    if first is nn.Linear and after[:2] == [nn.GELU, nn.Linear]:
        return "mlp", 3
    if first is nn.Linear and after == [nn.GELU, nn.Dropout, nn.Linear]:
        return "mlp", 4
    return "", 1


def _doubles(layer: Any) -> bool:
    return layer.scale_factor in (2, (2, 2)) and layer.mode == "nearest" and layer.size is None


def _groups(sequence: nn.Sequential) -> list[tuple[str, list[nn.Module]]]:
    layers, i, groups = list(sequence), 0, []
    while i < len(layers):
        name, length = _group(layers, i)
        groups.append((name, layers[i : i + length]))
        i += length
    return groups


def _together(name: str, layers: list[Any], x: Any) -> Any:
    """The group's result by one operator, or None."""
    if not name or any(map(hooked, layers)):
        return None
    if name == "norm_silu":
        return normalised(layers[0], x)
    if name == "upsample":
        return upsampled(layers[1], x)
    first, gelu, *dropout, last = layers
    return projected(x, first, GELU[gelu.approximate], last, *dropout)


def _sequential_saved(sequence: nn.Sequential) -> int:
    saved = {
        "norm_silu": lambda norm, *_: 2 * norm.num_channels,  # SiLU reads and writes a map
        "upsample": lambda _, conv: 8 * conv.in_channels,  # the doubled map, written and read
        "mlp": lambda first, *_: 2 * first.out_features,  # GELU reads and writes the hidden tensor
    }
    return sum(saved[name](*layers) for name, layers in _groups(sequence) if name)


@register(
    "blocks",
    "torch",
    "Sequential",
    "Sequential of fused pairs",
    knows=lambda m: any(name for name, _ in _groups(m)),
    saved=_sequential_saved,
)
def sequential(module: nn.Sequential, input: Any) -> Any:
    for name, layers in _groups(module):
        y = _together(name, layers, input)
        if y is None:
            y = input
            for layer in layers:
                y = layer(y)
        input = y
    return input


# --- Linear, activation, linear -------------------------------------------------------------------

# The forms of GELU, as `nn.FeedForward` names them.
GELU = {"none": "gelu", "tanh": "gelu-approximate"}


def projected(
    x: Tensor, proj: nn.Module, name: str, last: nn.Module, dropout: nn.Module | None = None
) -> Tensor | None:
    """last(dropout(activation(proj(x)))) as `nn.FeedForward` computes it; the layers may be others
    than torch's: then they are called. None where no kernel takes x."""
    if not serves(x, *proj.parameters(), *last.parameters(), autocast=True):
        return None
    first = Projected(proj, activation_of(name))
    return feed_forward(x, first, nn.Dropout(0.0) if dropout is None else dropout, last)
