"""What of the models is exported: a module of named tensors, their dynamic sizes and examples."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from dfm_fast import _checks
from dfm_fast.models import dfm_plain, snapgen_decoder_plain, snapgen_plain
from dfm_fast.models._pretrained import Pretrained
from dfm_fast.models.dfm import DFMTransformer
from dfm_fast.models.snapgen import SnapGenUNet
from dfm_fast.models.snapgen_decoder import SnapGenDecoder

OP = "export"
Sides = tuple[int, ...]
Examples = dict[str, Any]  # tensors, or lists of them, by the names of the module's arguments
BATCH = Dim("batch")
GRID = Dim("height", min=2), Dim("width", min=2)  # of one: strides that say nothing


@dataclass(frozen=True)
class Exportable:
    """A model as one graph.

    A grid is what the sides of all its maps are multiples of: tokens, pixels of the coarsest maps.
    """

    model: Pretrained
    plain: Callable[..., Any]  # of the model and the inputs: the network in plain torch
    wrap: Callable[..., nn.Module]  # of the model
    outputs: tuple[str, ...]
    dynamic: dict[str, Any]  # of each input, as torch.export takes them
    draw: Callable[[int, Sides, torch.Generator], Examples]
    grids: tuple[Sides, ...]  # to trace with, to look at: one if it is fixed

    def examples(self, batch: int, grid: Sides, seed: int = 0) -> Examples:
        """float32, the same for the same sizes and seed."""
        return self.draw(batch, grid, torch.Generator().manual_seed(seed))


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Without the warnings of other packages."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)


def exportable(model: Any, levels: int | None, size: Sequence[int] | None) -> Exportable:
    """Raises TypeError for another model, ValueError for what it has not."""
    kinds: dict[type, Callable[..., Exportable]] = {
        SnapGenUNet: _unet,
        SnapGenDecoder: _decoder,
        DFMTransformer: _dfm,
    }
    of = kinds.get(type(model))
    if of is None:
        names = "a SnapGenUNet, SnapGenDecoder or DFMTransformer"
        _checks.fail(OP, "model", names, type(model).__name__, TypeError)
    if model.training:
        _checks.fail(OP, "model", "a model in eval mode", "training mode")
    for name, p in model.named_parameters():
        if p.dtype != torch.float32 or p.device.type != "cpu":
            _checks.fail(OP, "model", "float32 on the CPU", f"{name} in {p.dtype} on {p.device}")
    if levels is not None and type(model) is not DFMTransformer:
        _checks.fail(OP, "levels", f"None, as {type(model).__name__} has one", levels)
    return of(model, size) if levels is None else of(model, size, levels)


def _grids(size: Sequence[int] | None, unit: int, frames: bool = False) -> tuple[Sides, ...]:
    """Of the sides `size`, or two unlike ones. (Sides of 0 and 1 are special to a trace.)"""
    if size is None:
        return (6, 5), (4, 7)
    axes = ("frames", "height", "width")[3 - len(size) :]
    if len(size) not in ((2, 3) if frames else (2,)):
        _checks.fail(OP, "size", f"{'(frames,) ' if frames else ''}height and width", list(size))
    for name, n in zip(axes, size, strict=True):
        if _checks.integer(OP, f"size ({name})", n, 1) % unit and name != "frames":
            _checks.fail(OP, f"size ({name})", f"a multiple of {unit}", n)
    return ((*size[:-2], *(n // unit for n in size[-2:])),)


def _map(size: Sequence[int] | None, unit: int = 1) -> dict[int, Any]:
    """Dynamic sizes of [N, C, H, W]."""
    if size is not None:
        return {0: BATCH}
    sides = GRID if unit == 1 else [unit * side for side in GRID]
    return {0: BATCH, **dict(zip((2, 3), sides, strict=True))}


# --- SnapGen --------------------------------------------------------------------------------------


class _UNet(nn.Module):
    def __init__(self, model: Pretrained) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, ids: Tensor | None = None
    ) -> Tensor:
        return self.model(x, t, text, mask=mask, ids=ids)


def _unet(model: SnapGenUNet, size: Sequence[int] | None) -> Exportable:
    unit = 2 ** (len(model.channels) - 1)
    width = model.config["text_dim"] or model.config["cross_dim"]

    def draw(n: int, grid: Sides, generator: torch.Generator) -> Examples:
        sides, tokens = (unit * side for side in grid), 2 + n
        mask = torch.rand(n, tokens, generator=generator) < 0.7
        mask[:, 0] = True
        ids = torch.rand(n, model.num_ids, generator=generator) * 1000
        return {
            "x": torch.randn(n, model.in_channels, *sides, generator=generator),
            "t": torch.rand(n, generator=generator),
            "text": torch.randn(n, tokens, width, generator=generator),
            "mask": mask,
            **({"ids": ids} if model.num_ids else {}),
        }

    texts = {0: BATCH, 1: Dim("tokens")}
    dynamic = {"x": _map(size, unit), "t": {0: BATCH}, "text": texts, "mask": texts}
    if model.num_ids:
        dynamic["ids"] = {0: BATCH}
    return Exportable(
        model, snapgen_plain.plain_forward, _UNet, ("velocity",), dynamic, draw, _grids(size, unit)
    )


def _decoder(model: SnapGenDecoder, size: Sequence[int] | None) -> Exportable:
    channels = model.config["latent_channels"]

    def draw(n: int, grid: Sides, generator: torch.Generator) -> Examples:
        return {"latents": torch.randn(n, channels, *grid, generator=generator)}

    dynamic = {"latents": _map(size)}
    plain = snapgen_decoder_plain.plain_forward
    return Exportable(model, plain, lambda m: m, ("images",), dynamic, draw, _grids(size, 1))


# --- DFM ------------------------------------------------------------------------------------------


class _Levels(nn.Module):
    """The first levels are active in the whole batch, as in a stage of the sampler."""

    def __init__(self, model: DFMTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, levels: list[Tensor], t: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return _first_levels(self.model, self.model.num_levels, levels, t, y)


def _first_levels(
    forward: Callable[..., Any], count: int, levels: list[Tensor], t: Tensor, y: Tensor | None
) -> tuple[Tensor, ...]:
    given = len(levels)
    active = (torch.arange(count) < given).expand(t.shape[0], -1)
    return tuple(forward([*levels, *[None] * (count - given)], t, active, y=y)[:given])


def _plain_levels(
    model: DFMTransformer, levels: list[Tensor], t: Tensor, y: Tensor | None = None
) -> tuple[Tensor, ...]:
    forward = functools.partial(dfm_plain.plain_forward, model)
    return _first_levels(forward, model.num_levels, levels, t, y)


def _dfm(
    model: DFMTransformer, size: Sequence[int] | None, levels: int | None = None
) -> Exportable:
    count = model.num_levels if levels is None else _checks.integer(OP, "levels", levels, 1)
    if count > model.num_levels:
        _checks.fail(OP, "levels", f"at most {model.num_levels}", count)
    if size is not None and len(size) == 3 and model.positions != "rope":
        _checks.fail(OP, "size", "height and width, as positions are 'sincos'", list(size))
    patches, channels = model.patch_sizes[:count], model.channels[:count]

    def draw(n: int, grid: Sides, generator: torch.Generator) -> Examples:
        t = torch.rand(n, model.num_levels, generator=generator)
        t[:, count:] = 1
        shapes = [
            (n, c, *grid[:-2], *(p * side for side in grid[-2:]))
            for c, p in zip(channels, patches, strict=True)
        ]
        drawn = [torch.randn(shape, generator=generator) for shape in shapes]
        y = {"y": torch.arange(n) % (model.num_classes + 1)} if model.num_classes else {}
        return {"levels": drawn, "t": t, **y}

    dynamic = {"levels": [_map(size, p) for p in patches], "t": {0: BATCH}}
    if model.num_classes:
        dynamic["y"] = {0: BATCH}
    outputs = tuple(f"velocity_{s}" for s in range(count))
    grids = _grids(size, model.patch_sizes[-1], frames=True)
    return Exportable(model, _plain_levels, _Levels, outputs, dynamic, draw, grids)
