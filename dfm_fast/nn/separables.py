"""Separable convolutions and SnapGen's residual block of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfm_fast import _checks
from dfm_fast.nn._hooks import hooked
from dfm_fast.nn._linears import linear
from dfm_fast.ops import ChannelStatistics, channel_statistics, separable_conv2d, upsample_conv2d
from dfm_fast.ops._layouts import memory_format


class SeparableConv2d(nn.Module):
    """`dfm_fast.separable_conv2d` with the parameters of two `torch.nn.Conv2d`: `depthwise.weight`
    [C, 1, k, k] and `pointwise.weight` [O, C, 1, 1], `pointwise.bias` where there is one.

    Args:
        in_channels, out_channels: C, O.
        kernel_size: 3, 5 or 7; stride 1, padding kernel_size // 2.
        bias: whether the pointwise convolution has one.

    Raises:
        ValueError: a kernel_size that is none of these.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size not in (3, 5, 7):
            _checks.fail("SeparableConv2d", "kernel_size", "3, 5 or 7", kernel_size)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        half, groups = kernel_size // 2, in_channels
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, kernel_size, 1, half, groups=groups, bias=False, **options
        )
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=bias, **options)

    def forward(
        self,
        x: Tensor,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        norm: nn.GroupNorm | None = None,
        statistics: ChannelStatistics | None = None,
        with_statistics: bool = False,
    ) -> Tensor | tuple[Tensor, ChannelStatistics]:
        """x [N, C, H, W] -> [N, O, H, W]; with SiLU(norm(x)) in x's place where a norm is given,
        whose statistics may be; other arguments as `separable_conv2d`."""
        options: dict[str, Any] = {"with_statistics": with_statistics}
        if norm is not None:
            options |= {"num_groups": norm.num_groups, "eps": norm.eps}
        return separable_conv2d(
            x,
            self.depthwise.weight,
            _narrow(self.pointwise.weight, x),
            self.pointwise.bias,
            shift,
            residual,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            statistics=statistics,
            **options,
        )


class SeparableConvBlock(nn.Module):
    """SnapGen's residual block; state_dict and results of diffusers' `ResnetBlock2DDreamLite` with
    `use_sep_conv=True`, whose weights load as they are:

        h = conv1(silu(norm1(x))) + time_emb_proj(silu(temb))
        y = conv2(silu(norm2(h))) + (x, or conv_shortcut(x) where widths differ)

    Two fused calls and one pass for the statistics of x: h is written once and comes with its own
    statistics; neither an activated map nor a sum is written.

    Args:
        in_channels, out_channels: of x and y.
        time_channels: of temb.
        expansion: h has expansion * out_channels channels.
        groups, eps: of both norms.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int = 1024,
        *,
        expansion: int = 2,
        groups: int = 32,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = expansion * out_channels
        self.norm1 = nn.GroupNorm(groups, in_channels, eps, **options)
        self.conv1 = SeparableConv2d(in_channels, hidden, **options)
        self.time_channels = time_channels
        self.time_emb_proj = nn.Linear(time_channels, hidden, **options)
        self.norm2 = nn.GroupNorm(groups, hidden, eps, **options)
        self.conv2 = SeparableConv2d(hidden, out_channels, **options)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, **options)
            if in_channels != out_channels
            else None
        )

    def forward(
        self,
        x: Tensor,
        temb: Tensor | None = None,
        statistics: ChannelStatistics | None = None,
        with_statistics: bool = False,
        *,
        shift: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ChannelStatistics]:
        """x [N, C, H, W], temb [N, time_channels], `channel_statistics(x)` or None ->
        y [N, out_channels, H, W] in the memory format of x; or (y, those of y), for the block that
        follows, which then reads its input once less. `shift` [N, hidden] in place of temb is
        time_emb_proj(silu(temb)), where a model computed those of all its blocks at once."""
        op = "SeparableConvBlock"
        _checks.tensor(op, "x", x, (4,))
        if shift is None:
            temb = _checks.tensor(op, "temb", temb, (2,))
            if temb.shape != (x.shape[0], self.time_channels):
                wanted = [x.shape[0], self.time_channels]
                _checks.fail(op, "temb", f"shape {wanted}", list(temb.shape))
            shift = self.time_emb_proj(F.silu(temb))
        elif temb is not None:
            _checks.fail(op, "shift", "None beside temb, which gives it", "both")
        statistics = channel_statistics(x.detach()) if statistics is None else statistics
        h, found = self.conv1(x, shift, None, self.norm1, statistics, with_statistics=True)
        return self.conv2(h, None, self._shortcut(x), self.norm2, found, with_statistics)

    def _shortcut(self, x: Tensor) -> Tensor:
        """Of channels_last as a linear layer: on a CPU oneDNN's convolution sums one product after
        the other, and 1408 of them have more than twice the rounding error of the definition; on a
        GPU cuDNN's adds the bias in a pass of its own. (float32 there as torch allows it: in TF32
        convolutions, products not.)"""
        conv = self.conv_shortcut
        if conv is None:
            return x
        plain = type(conv) is nn.Conv2d and not hooked(conv)
        serves = x.device.type == "cpu" or x.element_size() == 2
        if not (plain and serves) or memory_format(x) != torch.channels_last:
            return conv(x)
        return linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


class UpsampleConv2d(nn.Conv2d):
    """`dfm_fast.upsample_conv2d`: nearest upsampling by 2, then this 3x3 convolution.

    Parameters and state_dict of `torch.nn.Conv2d(in_channels, out_channels, 3, padding=1)`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, 3, padding=1, bias=bias, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, O, 2H, 2W]."""
        bias = None if self.bias is None else _narrow(self.bias, x)
        return upsample_conv2d(x, _narrow(self.weight, x), bias)


def _narrow(weight: Tensor, x: Tensor) -> Tensor:
    """Under autocast in the dtype of x, as torch's own convolutions have it."""
    if weight.dtype == x.dtype:  # and torch does not ask a meta tensor for its autocast
        return weight
    return weight.to(x.dtype) if torch.is_autocast_enabled(x.device.type) else weight
