"""Trained models on disk: what `dfm-fast sample` opens, and what a run may begin with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfm_fast import _checks
from dfm_fast.models import DFMTransformer, SnapGenDecoder, expand_to_dfm
from dfm_fast.models._files import on_meta
from dfm_fast.models._pretrained import CONFIG, WEIGHTS
from dfm_fast.training import recipes
from dfm_fast.training.checkpoints import Checkpoints, check_fits, load, shapes_in, whole
from dfm_fast.training.outputs import read_json
from dfm_fast.training.recipes import Recipe


def open_model(
    path: Path, device: torch.device | str = "cpu", *, averaged: bool = True
) -> tuple[Recipe, DFMTransformer]:
    """The averaged weights of a training folder's last checkpoint, of one checkpoint, or of a
    folder that `save_pretrained` wrote (with a recipe where a run has exported it; see
    `recipes.implied`); in eval mode. Of checkpoints also those of the last step, not averaged.

    Raises:
        FileNotFoundError: it is none of these. ValueError: a damaged file, named.
    """
    path = Path(path)
    if (path / WEIGHTS).exists():
        return _exported(path, device)
    checkpoint = path if whole(path) else Checkpoints(path / "checkpoints").latest()
    if checkpoint is None:
        got = "a folder without any" if path.is_dir() else "no folder"
        if path.is_file():
            got = f"a file (its folder, {path.parent}, may be meant)"
        expected = "a training folder, a checkpoint or an exported model"
        raise FileNotFoundError(f"{path}: expected {expected}, got {got}")
    recipe, part = Recipe.read(checkpoint), "ema" if averaged else "model"
    shapes = shapes_in(checkpoint, part)
    model = on_meta(checkpoint / recipes.NAME, recipe.build_model, shapes)
    check_fits(checkpoint, {part: dict(model.state_dict())})
    model.to_empty(device="cpu")
    load(checkpoint, {part: dict(model.state_dict())})
    model.reset_buffers()
    return recipe, model.to(device).eval()


def _exported(folder: Path, device: torch.device | str) -> tuple[Recipe, DFMTransformer]:
    model = DFMTransformer.from_pretrained(folder, device=device)
    own = (folder / recipes.NAME).exists()
    return Recipe.read(folder) if own else recipes.implied(model.config), model


def initial(path: Path, recipe: Recipe) -> dict[str, Tensor]:
    """Weights to begin a run of `recipe` with, from what `open_model` opens; finer levels than it
    has are added by `expand_to_dfm`.

    Raises:
        ValueError: a model with other levels, classes or layers (named).
    """
    op, (_, model) = f"train: init {path}", open_model(path)
    wanted, have = recipe.model, model.num_levels
    for name, own in (("patch_sizes", model.patch_sizes), ("in_channels", model.channels)):
        if list(own) != list(wanted[name][:have]):
            _checks.fail(op, name, f"{list(wanted[name])} or the first of them", list(own))
    options = {k: v for k, v in wanted.items() if k not in ("patch_sizes", "in_channels")}
    finer = wanted["patch_sizes"][have:]
    try:
        wide = expand_to_dfm(model, finer, wanted["in_channels"][have:], **options)
    except ValueError as error:
        raise ValueError(f"{op}: {str(error).removeprefix('expand_to_dfm: ')}") from error
    return dict(wide.state_dict())


def initial_std(path: Path, std: list[float]) -> list[float]:
    """The deviations that the levels of a model were trained with, then those of `std`."""
    recipe, _ = open_model(path)
    known = recipe.measured or []
    return [*known, *std[len(known) :]]


def class_name(folder: Path) -> str | None:
    """Of what is saved in a folder, by its config.json."""
    path = Path(folder) / CONFIG
    return read_json(path).get("_class_name") if path.is_file() else None


def decoder(path: Path, recipe: Recipe, device: str) -> Callable[[Tensor], Tensor]:
    """Latents -> pictures in [-1, 1], by diffusers' autoencoder or a `SnapGenDecoder` in a local
    folder.

    Raises:
        ValueError: one for latents of other channels, or for videos where these are none.
    """
    from dfm_fast.training.encoders import Autoencoder

    if class_name(path) == SnapGenDecoder.__name__:
        own = SnapGenDecoder.from_pretrained(path, device=device)
        _check_channels(own.config["latent_channels"], recipe)
        return torch.no_grad()(lambda latents: own.decode(latents, scaled=True).sample)
    autoencoder = Autoencoder.load(path, device)
    config: Mapping[str, Any] = autoencoder.module.config
    _check_channels(config["latent_channels"], recipe)
    if autoencoder.is_video and len(recipe.shape) != 4:
        expected = f"an autoencoder of images, as samples are {list(recipe.shape)}"
        _checks.fail("sample", "--decoder", expected, type(autoencoder.module).__name__)
    return torch.no_grad()(autoencoder.decode)


def _check_channels(channels: int, recipe: Recipe) -> None:
    if channels != recipe.shape[0]:
        expected = f"an autoencoder of {recipe.shape[0]} channels"
        _checks.fail("sample", "--decoder", expected, f"{channels}")
