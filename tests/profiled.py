"""What tests of profiles run: factories that `dfm-fast profile` is pointed at, as a user's."""

import torch
from torch import nn


def layers(channels=8):
    """A norm with SiLU and a depthwise convolution, which `accelerate` swaps, and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.GroupNorm(4, channels),
        nn.SiLU(),
        nn.Dropout(0.5),
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
    )


def with_inputs():
    return layers(), (torch.randn(2, 3, 8, 8),)


def with_named_inputs():
    return layers(), {"input": torch.randn(2, 3, 8, 8)}


def unknown():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh())


def zeros():
    module = layers()
    nn.init.zeros_(module[-1].weight)
    nn.init.zeros_(module[-1].bias)
    return module, torch.randn(1, 3, 8, 8)


def no_module():
    return 3


def embedding():
    return nn.Embedding(3, 4)


def broken():
    raise KeyError("a factory's own error")


def wrong_inputs():
    return layers(), torch.randn(1, 5, 8, 8)
