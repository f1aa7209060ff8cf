"""Group normalisation with SiLU as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.ops.group_norms import ACTIVATIONS, ChannelStatistics, group_norm_silu


class GroupNormSiLU(nn.GroupNorm):
    """`torch.nn.GroupNorm` and the SiLU after it: `dfm_fast.group_norm_silu`.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: as `torch.nn.GroupNorm`, whose
            parameters and state_dict it has.
        activation: "silu" or "none".

    Raises:
        TypeError, ValueError: as `group_norm_silu`.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "silu",
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        name = type(self).__name__
        self.activation = _checks.choice(name, "activation", activation, ACTIVATIONS)

    def forward(
        self,
        x: Tensor,
        shift: Tensor | None = None,
        statistics: ChannelStatistics | None = None,
    ) -> Tensor:
        """x [N, C, *], shift [N, C] or None, `channel_statistics(x)` or None -> like x."""
        return group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            shift,
            eps=self.eps,
            activation=self.activation,
            statistics=statistics,
        )

    def extra_repr(self) -> str:
        parent = super().extra_repr()
        return parent if self.activation == "silu" else f"{parent}, activation={self.activation!r}"
