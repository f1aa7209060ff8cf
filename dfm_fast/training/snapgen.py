"""Training a `SnapGenUNet` on pictures with classes, from configuration to pipeline: alone, against
a teacher, or to a few steps. What `dfm-fast snapgen` calls; the run itself is in `students`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dfm_fast import _checks
from dfm_fast.models import (
    ClassTokens,
    SnapGenDecoder,
    SnapGenPipeline,
    SnapGenUNet,
    snapgen_folders,
    snapgen_imagenet,
    snapgen_t2i,
    snapgen_tiny,
)
from dfm_fast.training import distributed, loop, saved
from dfm_fast.training.config import OptimizerConfig
from dfm_fast.training.datasets import DataConfig
from dfm_fast.training.distributed import World
from dfm_fast.training.loop import Outcome
from dfm_fast.training.monitors import Report
from dfm_fast.training.students import Conditions, Distillation, DistillationConfig, check

SIZES = {"tiny": snapgen_tiny, "imagenet": snapgen_imagenet, "t2i": snapgen_t2i}


@dataclass(frozen=True)
class SnapGenConfig(DistillationConfig):
    """Train a SnapGen UNet on pictures with classes: alone, against a teacher (--teacher), or to a
    few steps (--few-steps). The result is a pipeline, which `dfm-fast sample` takes."""

    model: Literal["tiny", "imagenet", "t2i"] = "tiny"

    tokens: int = 4
    """Learned ones of a class, in place of a text."""

    teacher: Path | None = None
    """Folder of a pipeline with classes, or of a DFM transformer of one level."""

    init: Path | None = None
    """Folder of a pipeline to begin with; of few steps by default the teacher's."""

    decoder: Path | None = None
    """Folder of a `SnapGenDecoder`, where the data are latents."""


def train_snapgen(
    config: SnapGenConfig,
    *,
    resume: bool = False,
    on_step: Callable[[Report], None] | None = None,
) -> Outcome:
    """Train to `config.steps`, and save the pipeline of the averages to `config.out / "model"`.

    Args:
        config: see `SnapGenConfig`.
        resume, on_step: as `loop.train`, and so are errors.

    Raises:
        ValueError: data without classes, a teacher or weights that do not fit.
        FileNotFoundError: folders that are no model's.
    """
    op, world = "snapgen", distributed.start(config.device)
    check(op, config, world.size)
    if config.few_steps and config.teacher is None:
        _checks.fail(op, "few_steps", "0 without a teacher", config.few_steps)

    def make(last: Path | None) -> Distillation:
        return _task(op, config, world, last)

    return loop.run(op, config, make, world, resume=resume, on_step=on_step)


def _task(op: str, config: SnapGenConfig, world: World, last: Path | None) -> Distillation:
    data = loop.opened(config.data, world)
    if not data.num_classes:
        _checks.fail(op, "data", "pictures with classes", config.data.name)
    channels, *sides = data[0][0].shape
    if len(sides) != 2 or sides[0] != sides[1]:
        _checks.fail(op, "data", "square pictures", [channels, *sides])
    decoder = _decoder(op, config, channels)
    teacher, told = (
        _teacher(op, config.teacher, data.num_classes) if config.teacher else (None,) * 2
    )
    torch.manual_seed(config.seed)
    student = SIZES[config.model](in_channels=channels)
    width = student.config["text_dim"] or student.config["cross_dim"]
    tokens = ClassTokens(data.num_classes, config.tokens, width)
    first = config.init or (config.teacher if config.few_steps else None)
    if first is not None and last is None:
        _begin(op, first, student, tokens)

    def export(unet: SnapGenUNet, conditions: ClassTokens, folder: Path) -> None:
        sizes = {"shift": config.shift, "sample_size": sides[0]}
        SnapGenPipeline(unet, decoder, conditions, **sizes).save_pretrained(folder)

    given = data, student, teacher, tokens, told
    return Distillation(op, config, world, *given, export=export, last=last)


def _decoder(op: str, config: SnapGenConfig, channels: int) -> SnapGenDecoder | None:
    latents = config.data.name == "latents"
    if latents != (config.decoder is not None):
        expected = "the decoder of the latents" if latents else "none, as there are no latents"
        _checks.fail(op, "decoder", expected, config.decoder or "none")
    if not latents:
        return None
    decoder = SnapGenDecoder.from_pretrained(config.decoder)
    if (found := decoder.config["latent_channels"]) != channels:
        _checks.fail(op, "decoder", f"{channels} channels like the latents", found)
    return decoder


def _teacher(op: str, folder: Path, classes: int) -> tuple[nn.Module, Conditions]:
    """A network, and what it is given for labels."""
    if (at := snapgen_folders.pipeline_in(folder)) is not None:
        pipeline = _pipeline(op, "teacher", at)
        found, network, conditions = (
            pipeline.conditions.num_classes,
            pipeline.unet,
            pipeline.conditions,
        )
    else:
        try:
            recipe, network = saved.open_model(folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{op}: teacher: {error}") from error
        found, conditions = recipe.num_classes, lambda labels: {"y": labels}
    if found != classes:
        _checks.fail(op, "teacher", f"{classes} classes like the data", found)
    return network, conditions


def _begin(op: str, folder: Path, student: SnapGenUNet, tokens: ClassTokens) -> None:
    """Give the student the weights of a pipeline."""
    if (at := snapgen_folders.pipeline_in(folder)) is None:
        _checks.fail(op, "init", f"a folder with {snapgen_folders.INDEX}", folder)
    pipeline = _pipeline(op, "init", at)
    for ours, theirs in ((student, pipeline.unet), (tokens, pipeline.conditions)):
        wanted, have = (json.loads(json.dumps(m.config)) for m in (ours, theirs))  # lists alike
        for name, value in wanted.items():
            if have.get(name) != value:
                expected = f"{name} = {value} like the student's {type(ours).__name__}"
                _checks.fail(op, "init", expected, have.get(name))
        ours.load_state_dict(theirs.state_dict())


def _pipeline(op: str, name: str, folder: Path) -> SnapGenPipeline:
    pipeline = SnapGenPipeline.from_pretrained(folder)
    if not isinstance(pipeline.conditions, ClassTokens):
        _checks.fail(op, name, "a pipeline with class tokens", f"{folder} with text encoders")
    return pipeline


# --- Presets --------------------------------------------------------------------------------------

_DIGITS = {
    "data": DataConfig(name="digits", size=16), "batch": 32, "workers": 0, "precision": "fp32",
    "save_every": 500, "sample_every": 500,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        **_DIGITS,
        "steps": 2000,
        "optimizer": OptimizerConfig(lr=1e-3, warmup=100, schedule="cosine", ema=0.995),
    },
    "digits-4": {
        **_DIGITS,
        "steps": 300,
        "save_every": 100,
        "few_steps": 4,
        "teacher_steps": 7,
        "optimizer": OptimizerConfig(lr=2e-4, warmup=50, schedule="cosine", ema=0.99),
    },
}


def preset(name: str, out: str | Path, **changes: Any) -> SnapGenConfig:
    """The configuration of a preset, with fields replaced."""
    _checks.choice("preset", "name", name, list(PRESETS))
    return dataclasses.replace(SnapGenConfig(Path(out), **PRESETS[name]), **changes)
