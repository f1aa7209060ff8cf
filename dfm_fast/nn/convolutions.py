"""Depthwise convolution as a module."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.ops.convolutions import KERNEL_SIZES, Padding, depthwise_conv2d


class DepthwiseConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with a filter per channel: `dfm_fast.depthwise_conv2d`.

    Args:
        in_channels, ...: as `torch.nn.Conv2d`, whose parameters and state_dict it has.
        groups: `in_channels` where it is not given.
        padding: 0 as there, or "same".

    Raises:
        ValueError: anything but in_channels = out_channels = groups, a square kernel of 3, 5 or 7,
            stride 1 or 2, no dilation, padding of zeros: `torch.nn.Conv2d` is the layer for that.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: Literal["zeros"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        out_channels = in_channels if out_channels is None else out_channels
        groups = in_channels if groups is None else groups
        given = in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        super().__init__(*given, padding_mode, device, dtype)
        self._check()

    def _check(self) -> None:
        name, channels = type(self).__name__, self.in_channels
        sides = [(k, k) for k in KERNEL_SIZES]
        allowed: dict[str, tuple[Any, list[Any]]] = {
            "out_channels": (self.out_channels, [channels]),
            "groups": (self.groups, [channels]),
            "kernel_size": (self.kernel_size, sides),
            "stride": (self.stride, [(1, 1), (2, 2)]),
            "dilation": (self.dilation, [(1, 1)]),
            "padding_mode": (self.padding_mode, ["zeros"]),
        }
        for argument, (got, choices) in allowed.items():
            if got not in choices:
                expected = " or ".join(map(str, choices))
                _checks.fail(name, argument, f"{expected} (else torch.nn.Conv2d)", got)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C, ...], in its memory format."""
        padding: Padding = self.padding if isinstance(self.padding, tuple) else None
        if self.padding == "valid":
            padding = 0
        return depthwise_conv2d(x, self.weight, self.bias, stride=self.stride[0], padding=padding)
