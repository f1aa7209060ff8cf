"""Training a `SnapGenUNet` on pictures with classes or captions, from configuration to pipeline:
alone, against a teacher, or to a few steps. What `dfm-fast snapgen` calls; its task for the loop is
in `students`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    TextLayout,
    snapgen_folders,
    snapgen_imagenet,
    snapgen_t2i,
    snapgen_tiny,
)
from dfm_fast.training import distributed, loop, saved, texts
from dfm_fast.training.config import OptimizerConfig
from dfm_fast.training.datasets import DataConfig
from dfm_fast.training.distributed import World
from dfm_fast.training.loop import Outcome
from dfm_fast.training.monitors import Report
from dfm_fast.training.students import Conditions, Distillation, DistillationConfig, check
from dfm_fast.training.texts import TextConfig

TOKENS, TEXTS = 4, "texts"  # of a class; the folder of encoded texts
SIZES = {"tiny": snapgen_tiny, "imagenet": snapgen_imagenet, "t2i": snapgen_t2i}


@dataclass(frozen=True)
class SnapGenConfig(DistillationConfig):
    """Train a SnapGen UNet on pictures with classes or captions: alone, against a teacher
    (--teacher), or to a few steps (--few-steps). The result is a pipeline, which `dfm-fast sample`
    takes."""

    model: Literal["tiny", "imagenet", "t2i"] = "tiny"

    tokens: int | None = None
    """Learned ones of a class, 4 where there is no text encoder."""

    text: TextConfig = field(default_factory=TextConfig)
    """Encoders of captions (--data.captions), or of the names of classes."""

    teacher: Path | None = None
    """Folder of a pipeline that is told the same, or, of classes, of a DFM transformer of one
    level."""

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
        ValueError: data without classes or captions, captions without an encoder, a teacher or
            weights that do not fit.
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
    has_texts = _has_texts(op, config)
    data = loop.opened(config.data, world)
    if not data.num_classes:
        _checks.fail(op, "data", "pictures with classes or --data.captions", config.data.name)
    channels, *sides = data[0][0].shape
    if len(sides) != 2 or sides[0] != sides[1]:
        _checks.fail(op, "data", "square pictures", [channels, *sides])
    decoder = _decoder(op, config, channels)
    given = texts.load(op, config.text, world) if has_texts else None
    torch.manual_seed(config.seed)
    student = _student(config.model, channels, given and given.layout)
    width = student.config["text_dim"] or student.config["cross_dim"]
    told: Told
    own: Conditions | None = None  # the student's, of labels
    if given is None:
        own = told = ClassTokens(data.num_classes, config.tokens or TOKENS, width)
    else:
        told = given.layout
    teacher, conditions = _teacher(op, config.teacher, told) if config.teacher else (None, None)
    first = config.init or (config.teacher if config.few_steps else None)
    if first is not None and last is None:
        _begin(op, first, student, told)
    if given is not None:
        own = conditions = texts.encoded(given, data.class_names, config.out / TEXTS, world)

    def export(unet: Any, tokens: Any, folder: Path) -> None:
        source = tokens if given is None else given.of_rank_0()
        sizes: dict[str, Any] = {"shift": config.shift, "sample_size": sides[0]}
        SnapGenPipeline(unet, decoder, source, **sizes).save_pretrained(folder)

    networks = student, teacher, own, conditions
    return Distillation(op, config, world, data, *networks, export=export, last=last)


def _has_texts(op: str, config: SnapGenConfig) -> bool:
    """Whether the network is told texts, and not classes."""
    folders = config.text.folders
    if config.data.captions and not folders:
        _checks.fail(op, "text", "an encoder, as the data has captions", "none")
    if folders and config.tokens is not None:
        _checks.fail(op, "tokens", "None beside text encoders", config.tokens)
    return bool(folders)


def _student(size: str, channels: int, layout: TextLayout | None) -> SnapGenUNet:
    """Of a preset, which takes other texts through a layer and a norm."""
    student = SIZES[size](in_channels=channels)
    if layout is None or layout.dim == student.config["cross_dim"]:
        return student
    return SIZES[size](in_channels=channels, text_dim=layout.dim)


def _decoder(op: str, config: SnapGenConfig, channels: int) -> SnapGenDecoder | None:
    latents = config.data.name == "latents"
    if latents != (config.decoder is not None):
        expected = "the decoder of the latents" if latents else "none, as there are no latents"
        _checks.fail(op, "decoder", expected, config.decoder or "none")
    if config.decoder is None:
        return None
    decoder = SnapGenDecoder.from_pretrained(config.decoder)
    if (found := decoder.config["latent_channels"]) != channels:
        _checks.fail(op, "decoder", f"{channels} channels like the latents", found)
    return decoder


# --- Weights that are there -----------------------------------------------------------------------

Told = ClassTokens | TextLayout  # what a UNet is told of a picture


def _teacher(op: str, folder: Path, told: Told) -> tuple[nn.Module, Conditions | None]:
    """A network, and what it is given for labels; of texts it is what the student is given."""
    network: nn.Module
    conditions: Conditions | None = None
    found = None
    if (at := snapgen_folders.pipeline_in(folder)) is not None:
        network, theirs = _parts(op, "teacher", at, told)
        if isinstance(theirs, ClassTokens):
            conditions, found = theirs, theirs.num_classes
    else:
        if isinstance(told, TextLayout):
            _checks.fail(op, "teacher", "a pipeline with text encoders", folder)
        try:
            recipe, network = saved.open_model(folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{op}: teacher: {error}") from error
        found, conditions = recipe.num_classes, lambda labels: {"y": labels}
    if isinstance(told, ClassTokens) and found != told.num_classes:
        _checks.fail(op, "teacher", f"{told.num_classes} classes like the data", found)
    return network, conditions


def _begin(op: str, folder: Path, student: SnapGenUNet, told: Told) -> None:
    """Give the student the weights of a pipeline."""
    if (at := snapgen_folders.pipeline_in(folder)) is None:
        _checks.fail(op, "init", f"a folder with {snapgen_folders.INDEX}", folder)
    unet, theirs = _parts(op, "init", at, told)
    pairs: list[tuple[Any, Any]] = [(student, unet)]
    if isinstance(told, ClassTokens):
        pairs.append((told, theirs))
    for ours, other in pairs:
        _check_same(op, "init", type(ours).__name__, ours.config, other.config)
        ours.load_state_dict(other.state_dict())


def _parts(op: str, name: str, folder: Path, told: Told) -> tuple[SnapGenUNet, Told]:
    """Of a pipeline, which has to be told what the student is: the same kind, and texts alike."""
    index, kinds = snapgen_folders.read_index(op, folder), ("class tokens", "text encoders")
    wanted, found = isinstance(told, TextLayout), "text_layout" in index
    if wanted != found:
        got = f"{folder} with {kinds[found]}"
        _checks.fail(op, name, f"a pipeline with {kinds[wanted]}", got)
    unet = SnapGenUNet.from_pretrained(folder / "unet")
    if not isinstance(told, TextLayout):
        return unet, ClassTokens.from_pretrained(folder / "class_tokens")
    _check_same(op, name, "text layout", told.to_dict(), index["text_layout"])
    return unet, TextLayout(**index["text_layout"])


def _check_same(
    op: str, name: str, kind: str, wanted: Mapping[str, Any], have: Mapping[str, Any]
) -> None:
    wanted, have = (json.loads(json.dumps(dict(values))) for values in (wanted, have))  # lists
    for field_name, value in wanted.items():
        if have.get(field_name) != value:
            expected = f"{field_name} = {value} like the student's {kind}"
            _checks.fail(op, name, expected, have.get(field_name))


# --- Presets --------------------------------------------------------------------------------------

_DIGITS = {
    "data": DataConfig(name="digits", size=16), "batch": 32, "workers": 0, "precision": "fp32",
    "save_every": 500, "sample_every": 500,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "captions": {"data": DataConfig(name="images", captions=True), "model": "t2i"},
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
