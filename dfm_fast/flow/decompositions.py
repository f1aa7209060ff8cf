"""Decompositions of data into levels, coarse to fine, that a flow is matched on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast._library import Shard
from dfm_fast.ops import (
    haar_build,
    haar_collapse,
    laplacian_build,
    laplacian_collapse,
    pyramid_add_noise,
    velocity_loss,
)
from dfm_fast.ops._filters import FILTERS
from dfm_fast.ops._philox import Seed
from dfm_fast.ops._scales import check_std, level_offsets
from dfm_fast.ops._velocity import velocity_loss_shard
from dfm_fast.ops.noises import pyramid_add_noise_shard
from dfm_fast.ops.pyramids import check_factor, level_sizes

Levels = list[Tensor | None]
Active = Sequence[bool] | Tensor | None


class Decomposition(nn.Module):
    """A linear, invertible map from data to levels, coarse to fine, each divided by its `std`.

    A subclass defines `split`, `merge` and `shapes`; what is here serves any of them, level by
    level, and a subclass with a fused operator overrides `add_noise` and `loss`.

    `std` ([L], a buffer, or None) is saved with the model; `measure_std` sets it from data.
    """

    def __init__(self, num_levels: int, std: Sequence[float] | None = None) -> None:
        super().__init__()
        self.num_levels = _checks.integer(type(self).__name__, "num_levels", num_levels, 1)
        self.set_std(std)

    # --- The map. To be defined ---

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """x -> levels, not standardised."""
        raise NotImplementedError

    def merge(self, levels: Sequence[Tensor]) -> Tensor:
        """The first k levels -> a picture as fine as the last of them."""
        raise NotImplementedError

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Shapes of the levels of x of `shape`. Raises where it cannot be split."""
        raise NotImplementedError

    # --- Standardisation ---

    def set_std(self, std: Sequence[float] | None) -> None:
        """Standard deviation of each level, which its values are divided by; None for 1."""
        check_std(type(self).__name__, std, self.num_levels)
        # The operators take numbers of the host: a buffer on a GPU could not be read at each call.
        self._std = None if std is None else [float(s) for s in std]
        self.register_buffer(
            "std", None if std is None else torch.tensor(self._std, dtype=torch.float64)
        )

    @torch.no_grad()
    def measure_std(self, batches: Iterable[Tensor]) -> list[float]:
        """Set `std` to the root mean square deviation of each level over batches of data.

        Raises:
            ValueError: no data, or a level that is constant or not finite.
        """
        self.set_std(None)
        count, mean, square = 0.0, [0.0] * self.num_levels, [0.0] * self.num_levels
        for x in batches:
            for s, level in enumerate(self.split(x)):
                n = float(level.numel()) / max(1, level[:1].numel())
                wide = level.double()
                other, m2 = wide.mean().item(), wide.var(unbiased=False).item()
                # Groups of equal weight per sample: counts are in samples.
                delta, total = other - mean[s], count + n
                mean[s] += delta * n / total
                square[s] += (m2 + delta * delta * count / total) * n
            count += n
        if not count:
            _checks.fail(f"{type(self).__name__}.measure_std", "batches", "data", "none")
        std = [math.sqrt(s / count) for s in square]
        self.set_std(std)
        return std

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "std")
        if saved is not None:
            self.set_std(saved.tolist())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _scaled(self, levels: Sequence[Tensor], invert: bool) -> list[Tensor]:
        if self._std is None:
            return list(levels)
        pairs = zip(levels, self._std[: len(levels)], strict=True)
        return [v * s if invert else v / s for v, s in pairs]

    # --- What a flow uses ---

    def build(self, x: Tensor) -> list[Tensor]:
        """x -> L levels, coarse to fine, standardised."""
        return self._scaled(self.split(x), invert=False)

    def collapse(self, levels: Sequence[Tensor]) -> Tensor:
        """The first k levels (all: x; fewer: a coarser picture)."""
        return self.merge(self._scaled(levels, invert=True))

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.build(x)

    def _each(
        self, x: Tensor, offset: int, active: Active, shard: Shard | None
    ) -> Iterator[tuple[int, Tensor, int, Tensor | None]]:
        """(s, level, index of its first normal, mask [N, 1] or None) of the levels to compute."""
        levels = self.build(x)
        offsets = level_offsets([v.shape for v in levels], offset, shard)
        mask = active if isinstance(active, Tensor) else None
        for s, (level, start) in enumerate(zip(levels, offsets, strict=True)):
            if mask is not None or active is None or active[s]:
                yield s, level, start, None if mask is None else mask[:, s : s + 1]

    def add_noise(
        self,
        x: Tensor,
        t: Tensor,
        seed: Seed,
        *,
        offset: int = 0,
        active: Active = None,
        targets: bool = True,
        shard: Shard | None = None,
    ) -> tuple[Levels, Levels | None]:
        """As `dfm_fast.pyramid_add_noise`. t [N, L] -> levels of x_t, levels of v or None. With a
        shard (start, batch), x is the rows from `start` of a batch, and the noise is theirs."""
        x_t: Levels = [None] * self.num_levels
        v: Levels = [None] * self.num_levels
        for s, level, start, mask in self._each(x, offset, active, shard):
            options: dict[str, Any] = {
                "offset": start,
                "num_levels": 1,
                "active": mask,
                "targets": targets,
            }
            noisy, target = pyramid_add_noise(
                level, t[:, s : s + 1], seed, factor=(2,) * (level.ndim - 2), **options
            )
            x_t[s], v[s] = noisy[0], None if target is None else target[0]
        return x_t, v if targets else None

    def loss(
        self,
        predictions: Sequence[Tensor | None],
        x: Tensor,
        seed: int | Tensor,
        *,
        offset: int = 0,
        active: Active = None,
        shard: Shard | None = None,
    ) -> Tensor:
        """As `dfm_fast.velocity_loss`, and `shard` as for `add_noise`. -> [N, L]"""
        dtype = torch.promote_types(x.dtype, torch.float32)
        columns = [x.new_zeros(x.shape[0], dtype=dtype)] * self.num_levels
        for s, level, start, mask in self._each(x, offset, active, shard):
            if predictions[s] is not None:
                one: dict[str, Any] = {
                    "offset": start,
                    "active": mask,
                    "factor": (2,) * (level.ndim - 2),
                }
                columns[s] = velocity_loss([predictions[s]], level, seed, **one)[:, 0]
        return torch.stack(columns, 1)


class Laplacian(Decomposition):
    """Laplacian pyramid of images [N, C, H, W] or videos [N, C, T, H, W]: DFM's decomposition.

    Args:
        num_levels, filter, factor: as `dfm_fast.laplacian_build`; factor 4 is a 4x jump.
        std: L numbers that the levels are divided by, or None.
    """

    def __init__(
        self,
        num_levels: int,
        filter: str = "bilinear",
        factor: int | Sequence[int] = 2,
        *,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(num_levels, std)
        op = type(self).__name__
        self.filter = _checks.choice(op, "filter", filter, FILTERS)
        check_factor(op, factor, len(factor) if isinstance(factor, Sequence) else 2)
        self.factor = factor
        self._options: dict[str, Any] = {"filter": filter, "factor": factor}

    def split(self, x: Tensor) -> Sequence[Tensor]:
        return laplacian_build(x, self.num_levels, **self._options)

    def merge(self, levels: Sequence[Tensor]) -> Tensor:
        return laplacian_collapse(list(levels), **self._options)

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        op = type(self).__name__
        shape = _checks.shape(op, "shape", shape)
        if len(shape) not in (4, 5):
            _checks.fail(op, "shape", "[N, C, H, W] or [N, C, T, H, W]", list(shape))
        # On meta tensors: the operator's own checks.
        return [tuple(v.shape) for v in self.split(torch.empty(shape, device="meta"))]

    def add_noise(
        self,
        x: Tensor,
        t: Tensor,
        seed: Seed,
        *,
        offset: int = 0,
        active: Active = None,
        targets: bool = True,
        shard: Shard | None = None,
    ) -> tuple[Levels, Levels | None]:
        return _noised(
            shard,
            x,
            t,
            seed,
            offset=offset,
            num_levels=self.num_levels,
            active=active,
            targets=targets,
            std=self._std,
            **self._options,
        )

    def loss(
        self,
        predictions: Sequence[Tensor | None],
        x: Tensor,
        seed: Seed,
        *,
        offset: int = 0,
        active: Active = None,
        shard: Shard | None = None,
    ) -> Tensor:
        options = {"active": active, "std": self._std, **self._options}
        return _lost(shard, predictions, x, seed, offset=offset, **options)

    def extra_repr(self) -> str:
        return f"{self.num_levels}, filter={self.filter!r}, factor={self.factor}"


class Haar(Decomposition):
    """Orthonormal Haar wavelets, critically sampled: [N, C, ...] coarse, then details per level.

    A jump of factor 2 has details [N, 3C, h, w] (LH, HL, HH) at the coarser side's size; a jump of
    factor 4 [N, 15C, h, w]: those of its coarser half, then the finer half's by pixel_unshuffle.
    Videos [N, C, T, H, W] are split frame by frame.

    Args:
        num_levels: at least 1.
        factor: 2 or 4: the jump from one level to the next.
        std: L numbers that the levels are divided by, or None.
    """

    def __init__(
        self, num_levels: int, factor: int = 2, *, std: Sequence[float] | None = None
    ) -> None:
        super().__init__(num_levels, std)
        if factor not in (2, 4):
            _checks.fail(type(self).__name__, "factor", "2 or 4", factor)
        self.factor = factor

    def split(self, x: Tensor) -> list[Tensor]:
        images, frames = _as_images(x)
        steps = self.factor // 2
        coarse, *details = haar_build(images, 1 + steps * (self.num_levels - 1))
        if self.factor == 4:
            pairs = zip(details[::2], details[1::2], strict=True)
            details = [torch.cat((a, F.pixel_unshuffle(b, 2)), 1) for a, b in pairs]
        return [_as_video(v, frames) for v in (coarse, *details)]

    def merge(self, levels: Sequence[Tensor]) -> Tensor:
        (coarse, *details), frames = zip(*map(_as_images, levels), strict=True)
        if self.factor == 4:
            c = 3 * coarse.shape[1]
            halves = [(v[:, :c], F.pixel_shuffle(v[:, c:], 2)) for v in details]
            details = [half for pair in halves for half in pair]
        return _as_video(haar_collapse([coarse, *details]), frames[0])

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        op = type(self).__name__
        shape = _checks.shape(op, "shape", shape)
        if len(shape) not in (4, 5):
            _checks.fail(op, "shape", "[N, C, H, W] or [N, C, T, H, W]", list(shape))
        multiple = self.factor ** (self.num_levels - 1)
        if any(n < multiple or n % multiple for n in shape[-2:]):
            _checks.fail(op, "shape", f"sides of multiples of {multiple}", list(shape))
        n, c, *frames = shape[:-2]
        sizes = level_sizes(shape[-2:], self.num_levels, (self.factor,) * 2)
        details = [(n, (self.factor**2 - 1) * c, *frames, *s) for s in sizes[:-1]]
        return [(n, c, *frames, *sizes[0]), *details]

    def add_noise(
        self, x: Tensor, t: Tensor, seed: Seed, **options: Any
    ) -> tuple[Levels, Levels | None]:
        if self.factor != 2 or x.ndim != 4:
            return super().add_noise(x, t, seed, **options)
        shard = options.pop("shard", None)
        options |= {"num_levels": self.num_levels, "std": self._std}
        return _noised(shard, x, t, seed, filter="haar", **options)

    def loss(
        self, predictions: Sequence[Tensor | None], x: Tensor, seed: int | Tensor, **options: Any
    ) -> Tensor:
        if self.factor != 2 or x.ndim != 4:
            return super().loss(predictions, x, seed, **options)
        shard = options.pop("shard", None)
        return _lost(shard, predictions, x, seed, filter="haar", std=self._std, **options)

    def extra_repr(self) -> str:
        return f"{self.num_levels}, factor={self.factor}"


def _noised(shard: Shard | None, *args: Any, **options: Any) -> tuple[Levels, Levels | None]:
    # The public function where it can be: it is the one that takes DTensors.
    if shard is None:
        return pyramid_add_noise(*args, **options)
    return pyramid_add_noise_shard(*args, shard=shard, **options)


def _lost(shard: Shard | None, *args: Any, **options: Any) -> Tensor:
    if shard is None:
        return velocity_loss(*args, **options)
    return velocity_loss_shard(*args, shard=shard, **options)


def _as_images(x: Tensor) -> tuple[Tensor, int]:
    """[N, C, T, H, W] -> ([N T, C, H, W], T); images as they are, with T = 0."""
    if x.ndim != 5:
        return x, 0
    return x.transpose(1, 2).flatten(0, 1), x.shape[2]


def _as_video(x: Tensor, frames: int) -> Tensor:
    return x.unflatten(0, (-1, frames)).transpose(1, 2).contiguous() if frames else x
