"""Laplacian pyramids as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.ops._filters import FILTERS
from dfm_fast.ops.pyramids import (
    check_factor,
    laplacian_build,
    laplacian_collapse,
)


class LaplacianPyramid(nn.Module):
    """A Laplacian pyramid of fixed shape: `build`, `collapse`, `partial`. No parameters.

    Args:
        num_levels: levels, at least 1.
        filter: "nearest", "bilinear", "binomial" or "dct".
        factor: 1, 2 or 4 for all spatial axes, or one per axis.

    Calling the module builds: x [N, C, (T,) H, W] -> levels, coarse to fine.

    Raises:
        TypeError, ValueError: as `dfm_fast.laplacian_build`, for the arguments here at once.
    """

    def __init__(
        self,
        num_levels: int = 2,
        filter: str = "bilinear",
        factor: int | Sequence[int] = 2,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        self.num_levels = _checks.integer(op, "num_levels", num_levels, 1)
        self.filter = _checks.choice(op, "filter", filter, FILTERS)
        check_factor(op, factor, len(factor) if isinstance(factor, Sequence) else 2)
        self.factor = factor

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.build(x)

    def build(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [N, C, (T,) H, W] -> `num_levels` levels, coarse to fine."""
        return laplacian_build(x, self.num_levels, filter=self.filter, factor=self.factor)

    def collapse(self, levels: Sequence[Tensor]) -> Tensor:
        """All levels, coarse to fine -> x."""
        self._check_count("levels", len(levels), self.num_levels, self.num_levels)
        return laplacian_collapse(levels, filter=self.filter, factor=self.factor)

    def partial(self, levels: Sequence[Tensor], k: int, *, full_size: bool = False) -> Tensor:
        """The picture of the first k levels: what a coarse-to-fine sampler has after stage k.

        Args:
            levels: at least k levels, coarse to fine.
            k: 1 to `num_levels`.
            full_size: enlarge to the finest level's size by the pyramid's own `up` (as if the
                missing details were zero); needs all levels, for their sizes.
        """
        _checks.integer("LaplacianPyramid.partial", "k", k, 1)
        self._check_count("levels", len(levels), k, self.num_levels)
        if not full_size:
            return laplacian_collapse(levels[:k], filter=self.filter, factor=self.factor)
        self._check_count("levels", len(levels), self.num_levels, self.num_levels)
        blank = [level.new_zeros(()).expand_as(level) for level in levels[k:]]
        return laplacian_collapse([*levels[:k], *blank], filter=self.filter, factor=self.factor)

    def _check_count(self, argument: str, count: int, low: int, high: int) -> None:
        if not low <= count <= high:
            expected = f"{low} tensors" if low == high else f"{low} to {high} tensors"
            _checks.fail(type(self).__name__, argument, expected, count)

    def extra_repr(self) -> str:
        return f"num_levels={self.num_levels}, filter={self.filter!r}, factor={self.factor}"
