"""`SnapGenDecoder` written out in plain torch, as a user would: what the model is held to in tests,
and what benchmarks compare it with. It uses the parameters of the model itself and nothing else of
the library."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dfm_fast.models.snapgen_decoder import SnapGenDecoder, Upsample
from dfm_fast.nn.separables import SeparableConv2d


def convolve(conv: SeparableConv2d, x: Tensor) -> Tensor:
    h = F.conv2d(x, conv.depthwise.weight, padding=1, groups=x.shape[1])
    return F.conv2d(h, conv.pointwise.weight, conv.pointwise.bias)


def upsample(conv: Upsample, x: Tensor) -> Tensor:
    h = F.conv2d(x, conv.depthwise.weight, padding=1, groups=x.shape[1])
    # Channels in the order of pixel_shuffle.
    weight, bias = (
        p.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1) for p in conv.pointwise.parameters()
    )
    return F.pixel_shuffle(F.conv2d(h, weight, bias), 2)


def plain_forward(model: SnapGenDecoder, latents: Tensor) -> Tensor:
    """model(latents)."""
    x = convolve(model.conv_in, latents)
    for stage in model.stages:
        block: Any
        for block in stage.blocks:
            x = x + convolve(block.conv2, F.silu(convolve(block.conv1, x)))
        if stage.upsample is not None:
            x = upsample(stage.upsample, x)
    return convolve(model.conv_out, F.silu(x))
