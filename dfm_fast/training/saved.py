"""Trained models on disk: what `dfm-fast sample` opens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dfm_fast.models import DFMTransformer
from dfm_fast.models._pretrained import WEIGHTS
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


def decoder(path: Path, recipe: Recipe, device: str) -> Callable[[Tensor], Tensor]:
    """Latents -> pictures in [-1, 1], by diffusers' autoencoder in a local folder."""
    from dfm_fast.training.encoders import Autoencoder

    return torch.no_grad()(Autoencoder.load(path, device).decode)
