"""Autoencoders whose latents can be scaled like pictures (DFM, arXiv 2506.19839): decode(down(z))
is to be down(x). Levels of a pyramid of latents are then latents of smaller pictures.

    loss = |decode(z) - x| + weight |decode(down(z)) - down(x)| + kl_weight KL,   z ~ encode(x)

with L1 means over all elements. down is the pyramid's: a mean of 2 x 2 (of every frame).
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dfm_fast import _checks
from dfm_fast.ops import laplacian_build
from dfm_fast.training.datasets import DataConfig, open_dataset
from dfm_fast.training.distributed import device_named
from dfm_fast.training.encoders import Autoencoder
from dfm_fast.training.monitors import caught_signals
from dfm_fast.training.orders import Ordered
from dfm_fast.training.outputs import check_folder


@dataclass(frozen=True)
class EquivarianceConfig:
    """Fine-tune an autoencoder so that its latents can be scaled like pictures."""

    autoencoder: Path
    """Folder of diffusers' AutoencoderKL, AutoencoderTiny or AutoencoderKLCogVideoX."""

    out: Path
    """Folder that the result is written to, in the same format."""

    data: DataConfig = field(default_factory=DataConfig)

    levels: int = 2
    """Of the pyramid: 2 asks for one halving, 3 also for that by 4."""

    weight: float = 0.25
    """Of the scaled latents' loss, beside the reconstruction's."""

    kl_weight: float = 1e-6
    """Of the posterior's divergence from the normal distribution."""

    steps: int = 10_000
    batch: int = 16
    lr: float = 1e-5
    warmup: int = 100
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""

    save_every: int = 1_000
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"


@dataclass(frozen=True)
class Losses:
    """Means over a batch."""

    reconstruction: Tensor
    equivariance: Tensor
    divergence: Tensor  # zero for an autoencoder without a distribution

    def total(self, weight: float, kl_weight: float) -> Tensor:
        return self.reconstruction + weight * self.equivariance + kl_weight * self.divergence


def scale_equivariance_loss(autoencoder: Autoencoder, x: Tensor, levels: int = 2) -> Losses:
    """The parts of the loss.

    Args:
        autoencoder: see `Autoencoder`; gradients go to its module's parameters.
        x: [N, C, (T,) H, W] in [-1, 1]; sides that the autoencoder's factor times 2^(levels - 1)
            divides.
        levels: the equivariance is the mean over 1 to levels - 1 halvings.
    """
    _checks.integer("scale_equivariance_loss", "levels", levels, 2)
    multiple = autoencoder.factor << (levels - 1)
    if x.shape[-1] % multiple or x.shape[-2] % multiple:
        expected = f"sides that {multiple} divides"
        _checks.fail("scale_equivariance_loss", "x", expected, list(x.shape))
    z, divergence = autoencoder.encode_sampled(x)
    x = x.expand(-1, autoencoder.module.config.in_channels, *x.shape[2:])
    reconstruction = F.l1_loss(autoencoder.decode(z), x)
    parts = []
    for _ in range(levels - 1):
        x, z = halved(x), halved(z)
        parts.append(F.l1_loss(autoencoder.decode(z), x))
    return Losses(reconstruction, torch.stack(parts).mean(), divergence)


def halved(x: Tensor) -> Tensor:
    """Half of height and width, as the pyramid does it."""
    factor = 2 if x.ndim == 4 else (1, 2, 2)
    return laplacian_build(x, 2, factor=factor)[0]


@dataclass(frozen=True)
class Finetuned:
    """How a fine-tuning ended."""

    folder: Path
    steps: int  # that were done
    stopped_by: str | None = None  # a signal


def finetune(
    config: EquivarianceConfig, *, on_step: Callable[[int, Losses], None] | None = None
) -> Finetuned:
    """Fine-tune and write, every `save_every` steps, at the end, and where a signal stops it.

    Raises:
        ValueError: configuration; a loss that is not finite, with its step.
    """
    _check(config)
    device = device_named("equivariance", config.device)
    autoencoder = Autoencoder.load(config.autoencoder, device)
    dataset = open_dataset(config.data)
    ordered = Ordered(dataset, config.seed, config.data.flip, 0.0, 0)
    module = autoencoder.module.train()
    optimizer = torch.optim.AdamW(module.parameters(), config.lr, weight_decay=0.0)
    torch.manual_seed(config.seed)
    with caught_signals() as signals:
        for step in range(config.steps):
            losses = _step(config, autoencoder, optimizer, ordered, step)
            if on_step is not None:
                on_step(step, losses)
            done = step + 1
            if signals or done % config.save_every == 0 or done == config.steps:
                _save(module, config.out)
            if signals and done < config.steps:
                return Finetuned(config.out, done, signals[0])
    return Finetuned(config.out, config.steps)


def _check(config: EquivarianceConfig) -> None:
    op = "equivariance"
    check_folder(op, config.out)
    counts = {"steps": 1, "batch": 1, "levels": 2, "warmup": 0, "save_every": 1}
    for name, least in counts.items():
        _checks.integer(op, name, getattr(config, name), least)
    for name in ("weight", "kl_weight", "clip"):
        if not getattr(config, name) >= 0:
            _checks.fail(op, name, "at least 0", getattr(config, name))
    if not config.lr > 0:
        _checks.fail(op, "lr", "a positive number", config.lr)


def _step(
    config: EquivarianceConfig,
    autoencoder: Autoencoder,
    optimizer: torch.optim.Optimizer,
    ordered: Ordered,
    step: int,
) -> Losses:
    """One step of the optimizer; the losses before it, without their graph."""
    device, parameters = autoencoder.device, list(autoencoder.module.parameters())
    positions = range(step * config.batch, (step + 1) * config.batch)
    x = torch.stack([ordered[p][0] for p in positions]).to(device)
    with torch.autocast(device.type, torch.bfloat16, config.precision == "bf16"):
        losses = scale_equivariance_loss(autoencoder, x, config.levels)
    loss = losses.total(config.weight, config.kl_weight)
    if not loss.isfinite():
        raise ValueError(f"finetune: step {step}: expected a finite loss, got {loss.item()}")
    optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / (config.warmup + 1))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
    optimizer.step()
    return Losses(*(getattr(losses, f.name).detach() for f in dataclasses.fields(losses)))


def _save(module: Any, folder: Path) -> None:
    """diffusers' files, each renamed when all are written: what was whole stays so."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as temporary:
        module.save_pretrained(temporary)
        # The configuration last: without it a folder is no autoencoder.
        for path in sorted(Path(temporary).iterdir(), key=lambda p: p.name == "config.json"):
            os.replace(path, folder / path.name)
