"""What tells pictures from decoded ones, and its hinge losses (arXiv 1705.02894)."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dfm_fast import _checks


class PatchDiscriminator(nn.Sequential):
    """PatchGAN (arXiv 1611.07004): a logit for every place of a grid of 1 / 2^layers of the sides,
    each of a patch of 54 pixels with three layers. Spectral norm bounds its slope; norms over the
    batch would make a picture's logits depend on its neighbours'.

    Args:
        channels: of the pictures.
        width: channels after the first layer, doubled by each of the next.
        layers: that halve the sides.
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3) -> None:
        for name, value in (("channels", channels), ("width", width), ("layers", layers)):
            _checks.integer("PatchDiscriminator", name, value, 1)
        widths = [channels, *(width << i for i in range(layers))]
        convolutions = [nn.Conv2d(i, o, 4, 2, 1) for i, o in itertools.pairwise(widths)]
        convolutions += [nn.Conv2d(widths[-1], n, 3, 1, 1) for n in (widths[-1], 1)]
        found: list[nn.Module] = []
        for convolution in convolutions:
            found += [spectral_norm(convolution), nn.LeakyReLU(0.2)]
        super().__init__(*found[:-1])


def discriminator_loss(real: Tensor, decoded: Tensor) -> Tensor:
    """Of the logits of pictures and of decoded ones: 0 where they are over 1 and under -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + decoded).mean())


def generator_loss(decoded: Tensor) -> Tensor:
    """Of the logits of decoded pictures."""
    return -decoded.mean()
