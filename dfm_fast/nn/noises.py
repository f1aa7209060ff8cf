"""Per-scale noise injection as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.ops import pyramid_add_noise
from dfm_fast.ops._philox import Seed
from dfm_fast.ops._scales import DECOMPOSITIONS, check_std
from dfm_fast.ops.pyramids import check_factor

Levels = list[Tensor | None]


class PerScaleNoise(nn.Module):
    """Pyramid, noise and velocity targets of every level: `dfm_fast.pyramid_add_noise`.

    Args:
        num_levels: at least 1.
        filter: "nearest", "bilinear", "binomial", "dct" or "haar".
        factor: 1, 2 or 4 for all spatial axes, or one per axis.
        targets: False leaves out the velocities.
        std: L numbers that the levels are divided by, or None.

    No parameters. In eval mode it does the same: noise is what it is for.

    Raises:
        TypeError, ValueError: as `pyramid_add_noise`, for the arguments here at once.
    """

    def __init__(
        self,
        num_levels: int = 2,
        filter: str = "bilinear",
        factor: int | Sequence[int] = 2,
        *,
        targets: bool = True,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        self.num_levels = _checks.integer(op, "num_levels", num_levels, 1)
        self.filter = _checks.choice(op, "filter", filter, DECOMPOSITIONS)
        check_factor(op, factor, len(factor) if isinstance(factor, Sequence) else 2)
        check_std(op, std, num_levels)
        self.factor, self.targets, self.std = factor, targets, std

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        seed: Seed = None,
        *,
        active: Sequence[bool] | Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Levels, Levels | None]:
        """x [N, C, (T,) H, W], t [N, L] -> (levels of x_t, levels of v), coarse to fine."""
        return pyramid_add_noise(
            x,
            t,
            seed,
            num_levels=self.num_levels,
            filter=self.filter,
            factor=self.factor,
            active=active,
            targets=self.targets,
            std=self.std,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        return f"num_levels={self.num_levels}, filter={self.filter!r}, factor={self.factor}"
