"""Trained models on disk: what `dfm-fast sample` opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dfm_fast.models import DFMTransformer, SnapGenDecoder
from dfm_fast.models._pretrained import CONFIG, WEIGHTS
from dfm_fast.training import recipes
from dfm_fast.training.checkpoints import Checkpoints, load
from dfm_fast.training.recipes import Recipe


def open_model(
    path: Path, device: torch.device | str = "cpu", *, averaged: bool = True
) -> tuple[Recipe, DFMTransformer]:
    """The averaged weights of a training folder's last checkpoint, of one checkpoint, or of an
    exported folder; in eval mode. Of checkpoints also those of the last step, not averaged.

    Raises:
        FileNotFoundError: it is none of these.
    """
    path = Path(path)
    if (path / recipes.NAME).exists() and (path / WEIGHTS).exists():
        return Recipe.read(path), DFMTransformer.from_pretrained(path, device=device)
    checkpoint = (
        path if (path / ".metadata").exists() else Checkpoints(path / "checkpoints").latest()
    )
    if checkpoint is None:
        raise FileNotFoundError(
            f"{path}: expected a training folder, a checkpoint or an exported model, got "
            + ("a folder without any" if path.is_dir() else "no folder")
        )
    recipe = Recipe.read(checkpoint)
    model = recipe.build_model()
    load(checkpoint, {"ema" if averaged else "model": dict(model.state_dict())})
    return recipe, model.to(device).eval()


def class_name(folder: Path) -> str | None:
    """Of what is saved in a folder, by its config.json."""
    path = Path(folder) / CONFIG
    return json.loads(path.read_text()).get("_class_name") if path.is_file() else None


def decoder(path: Path, recipe: Recipe, device: str) -> Callable[[Tensor], Tensor]:
    """Latents -> pictures in [-1, 1], by diffusers' autoencoder or a `SnapGenDecoder` in a local
    folder."""
    from dfm_fast.training.encoders import Autoencoder

    if class_name(path) == SnapGenDecoder.__name__:
        own = SnapGenDecoder.from_pretrained(path, device=device)
        return torch.no_grad()(lambda latents: own.decode(latents, scaled=True).sample)
    return torch.no_grad()(Autoencoder.load(path, device).decode)
