"""What a training run is: dataclasses, from which the command line is made, and presets."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from dfm_fast import _checks
from dfm_fast.training.datasets import DataConfig, Name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
Size = Literal["S", "B", "L", "XL"]
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


@dataclass(frozen=True)
class ModelConfig:
    """The DFM transformer; see docs/models.md."""

    size: Size = "B"
    """Width, layers and heads; each may be replaced below."""

    width: int | None = None
    depth: int | None = None
    heads: int | None = None

    patch_sizes: tuple[int, ...] = (1, 2)
    """One per level, coarse to fine, so that all levels have the same tokens; one number is plain
    flow matching."""

    positions: Literal["sincos", "rope"] = "rope"
    qk_norm: bool = True

    block_conditioning: bool = False
    """A layer of every block's own on the conditioning, the identity at first."""

    stage_embedding: bool = False
    """Embed how many levels are active."""

    flip_time: bool = False
    """Embed 1 - t: for weights (`init`) of models whose time runs from noise to data, as SiT's."""

    precondition: bool = False
    """EDM's preconditioning, by the deviations of the levels of the data."""

    checkpointing: bool = False
    """Compute blocks again in backward, to save memory."""

    class_dropout: float = 0.1
    """Chance that a label becomes the null label, for classifier-free guidance."""


@dataclass(frozen=True)
class FlowConfig:
    """The decomposition, the loss, and how to sample; see docs/flow.md."""

    decomposition: Literal["laplacian", "haar"] = "laplacian"

    filter: Literal["nearest", "bilinear", "binomial", "dct"] = "bilinear"
    """Of the Laplacian pyramid."""

    factor: tuple[int, ...] = (2,)
    """From one level to the next: 2 or 4, or one per axis such as 1 2 2 (frames, height, width)."""

    standardise: bool = False
    """Divide every level by its deviation, measured on the data before the first step."""

    stage_probs: tuple[float, ...] | None = None
    """Chance of each stage; by default 0.9, 0.09, ..., the last the rest."""

    per_sample: bool = False
    """Draw the stage for every sample, not for a batch."""

    location: float = 0.0
    """Of the logit-normal of a stage's own noise level."""

    earlier_location: float = -1.5
    """Of the coarser levels'."""

    scale: float = 1.0

    sample_steps: tuple[int, ...] = ()
    """Steps per stage; by default 30, then 10 for every finer level (40 for one level)."""

    threshold: float = 0.1
    """Noise level at which the next level starts."""

    cfg: float = 1.5
    """Guidance of the sample grids, and the default of `dfm-fast sample`; 1 is without."""


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW, its learning rate, and what gradients are cut to."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01

    warmup: int = 10_000
    """Steps in which the learning rate rises from 0."""

    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; cosine falls to 0 at the last step."""

    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""

    def group(self, parameters: Iterable[Any]) -> dict[str, Any]:
        """Arguments of torch's AdamW."""
        options = {"lr": self.lr, "betas": self.betas, "weight_decay": self.weight_decay}
        return {"params": list(parameters), **options}


@dataclass(frozen=True)
class OptimizerConfig(AdamWConfig):
    """The same, and the moving average of its weights."""

    ema: float = 0.9999
    """Share that the average of the weights keeps at a step; at first no more than
    (1 + step) / (10 + step)."""


@dataclass(frozen=True)
class RunConfig:
    """What every run of the loop has."""

    out: Path
    """Folder of checkpoints, logs, sample grids and the exported model."""

    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    steps: int = 400_000
    batch: int = 256
    """Samples per step, over all ranks."""

    accumulate: int = 1
    """Parts that a rank's share of a batch is computed in; the result is the same."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: autocast; weights, optimizer and sums stay in float32."""

    compile: bool = False
    distribution: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: replicated weights, or sharded ones (FSDP2)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = 4
    """Processes that load data, per rank."""

    seed: int = 0
    """Of weights, data order and noise: the run is a function of it and of the batch size."""

    save_every: int = 5_000
    keep: int = 2
    """Checkpoints that are kept, the newest."""

    log_every: int = 50
    sample_every: int = 5_000
    """Steps between sample grids; 0 is never."""

    sample_count: int = 40


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Train a DFM transformer."""

    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)

    init: Path | None = None
    """Folder of weights to begin with: a saved or exported model, or a run. A model of fewer levels
    gets the finer ones, which change nothing at first."""


# --- Presets --------------------------------------------------------------------------------------


def _paper(size: Size, data: DataConfig, patches: tuple[int, ...], **flow: Any) -> dict[str, Any]:
    """The paper's recipe and network; latents are made by `dfm-fast encode`. The class's own
    defaults give the rotary positions and the QK norm."""
    network: dict[str, Any] = {
        "block_conditioning": True,
        "stage_embedding": True,
        "precondition": True,
    }
    return {
        "data": data,
        "model": ModelConfig(size=size, patch_sizes=patches, **network),
        "flow": FlowConfig(**flow),
        "distribution": "fsdp" if size == "XL" else "ddp",
        "compile": True,
    }


def _own(name: Name, patches: tuple[int, ...], **flow: Any) -> dict[str, Any]:
    """Data of one's own: the paper's recipe of the middle size, and patches for its resolution."""
    return {
        "data": DataConfig(name=name),
        "model": ModelConfig(patch_sizes=patches),
        "flow": FlowConfig(**flow),
    }


_LATENTS = DataConfig(name="latents", root=Path("latents"))
_TINY = {"precision": "fp32", "workers": 0, "keep": 2}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        **_TINY,
        "data": DataConfig(name="digits", size=16),
        "model": ModelConfig(width=128, depth=4, heads=4, patch_sizes=(2, 4)),
        "flow": FlowConfig(stage_probs=(0.7, 0.3)),
        "optimizer": OptimizerConfig(lr=1e-3, warmup=100, schedule="cosine", ema=0.995),
        "steps": 3000, "batch": 64, "save_every": 500, "sample_every": 500,
    },
    "photos": {
        **_TINY,
        "data": DataConfig(name="photos", size=64, flip=True),
        "model": ModelConfig(width=256, depth=6, heads=4, patch_sizes=(4, 8)),
        "flow": FlowConfig(stage_probs=(0.7, 0.3), cfg=1.0),
        "optimizer": OptimizerConfig(lr=5e-4, warmup=200, schedule="cosine", ema=0.999),
        "steps": 5000, "batch": 32, "save_every": 500, "sample_every": 500, "sample_count": 16,
    },
    "images": _own("images", (8, 16)),
    "webdataset": _own("webdataset", (8, 16)),
    "videos": _own("videos", (8, 16), factor=(1, 2, 2)),
    "latents": _own("latents", (1, 2)),
    "imagenet-512-b": _paper("B", _LATENTS, (1, 2), threshold=0.3),
    "imagenet-512-l": _paper("L", _LATENTS, (1, 2), threshold=0.3),
    "imagenet-512-xl": _paper("XL", _LATENTS, (1, 2), threshold=0.3),
    "imagenet-1024-b": _paper("B", _LATENTS, (1, 4), factor=(4,), threshold=0.05),
    "imagenet-1024-xl": _paper("XL", _LATENTS, (1, 4), factor=(4,), threshold=0.05),
    "imagenet-1024-b-3": _paper("B", _LATENTS, (1, 2, 4), threshold=0.05),
    "kinetics-512-xl": _paper(
        "XL", _LATENTS, (1, 2), factor=(1, 2, 2), standardise=True, threshold=0.3
    ),
}  # fmt: skip


def preset(name: str, out: str | Path, **changes: Any) -> TrainConfig:
    """The configuration of a preset, with fields of `TrainConfig` replaced."""
    _checks.choice("preset", "name", name, list(PRESETS))
    return TrainConfig(**{**PRESETS[name], "out": Path(out), **changes})


def preset_for(name: str | None, data: str | None) -> TrainConfig:
    """The preset `name`, with what belongs to its data replaced where `data` is of another name;
    without a name, the preset that is called as the data."""
    base = preset(name or data or "digits", Path())
    if data is None or data == base.data.name:
        return base
    own = preset(data, Path())
    return dataclasses.replace(
        base,
        data=own.data,
        model=dataclasses.replace(base.model, patch_sizes=own.model.patch_sizes),
        flow=dataclasses.replace(base.flow, factor=own.flow.factor),
    )


# --- Checks ---------------------------------------------------------------------------------------


def check(config: TrainConfig, world_size: int) -> None:
    """Raise ValueError where numbers make no sense; those of the model and the flow are theirs."""
    op = "train"
    check_run(op, config, world_size)
    if config.data.captions:
        _checks.fail(op, "data.captions", "False, as the model is told classes", True)
    for section in ("model", "flow"):
        _check_numbers(op, section, getattr(config, section))
    levels, steps = len(config.model.patch_sizes), config.flow.sample_steps
    if steps and len(steps) != levels:
        _checks.fail(op, "flow.sample_steps", f"{levels} numbers, one per level", steps)
    for n in steps:
        _checks.integer(op, "flow.sample_steps", n, 1)


def check_run(op: str, config: RunConfig, world_size: int) -> None:
    """The part that all runs share."""
    for name, least in (
        ("steps", 0), ("batch", 1), ("accumulate", 1), ("workers", 0), ("save_every", 1),
        ("keep", 1), ("log_every", 1), ("sample_every", 0), ("sample_count", 1), ("seed", 0),
    ):  # fmt: skip
        _checks.integer(op, name, getattr(config, name), least)
    parts = world_size * config.accumulate
    if config.batch % parts:
        expected = f"a multiple of {parts} ({world_size} ranks x accumulate {config.accumulate})"
        _checks.fail(op, "batch", expected, config.batch)
    check_optimizer(op, config.optimizer)


def check_optimizer(op: str, options: AdamWConfig) -> None:
    _checks.integer(op, "optimizer.warmup", options.warmup, 0)
    _check_numbers(op, "optimizer", options)


def _check_numbers(op: str, section: str, options: Any) -> None:
    for name, (expected, holds) in _NUMBERS.items():
        of, _, field_name = name.partition(".")
        values = getattr(options, field_name, ()) if of == section else ()
        for value in values if isinstance(values, tuple) else (values,):
            if not (math.isfinite(value) and holds(value)):
                _checks.fail(op, name, expected, value)


_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "optimizer.lr": ("a positive number", lambda v: v > 0),
    "optimizer.betas": ("from 0 to below 1", lambda v: 0 <= v < 1),
    "optimizer.weight_decay": ("at least 0", lambda v: v >= 0),
    "optimizer.ema": ("from 0 to below 1", lambda v: 0 <= v < 1),
    "optimizer.clip": ("at least 0", lambda v: v >= 0),
    "model.class_dropout": ("from 0 to 1", lambda v: 0 <= v <= 1),
    "flow.location": ("a finite number", lambda v: True),
    "flow.earlier_location": ("a finite number", lambda v: True),
    "flow.scale": ("a positive number", lambda v: v > 0),
    "flow.threshold": ("from 0 to below 1", lambda v: 0 <= v < 1),
    "flow.cfg": ("a finite number", lambda v: True),
}


# --- As JSON --------------------------------------------------------------------------------------


def to_json(config: Any) -> dict[str, Any]:
    """Plain values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(kind: type[T], values: Mapping[str, Any]) -> T:
    """The inverse of `to_json`; fields that are not there keep their defaults."""
    hints, known = get_type_hints(kind), {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - known):
        _checks.fail(kind.__name__, "fields", f"some of {sorted(known)}", unknown)
    return kind(**{name: _plain_to(hints[name])(value) for name, value in values.items()})


def _plain_to(hint: Any) -> Callable[[Any], Any]:
    options = get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return lambda value: from_json(hint, value)
    if get_origin(hint) is tuple:
        return tuple
    if hint is Path:
        return Path
    if type(None) in options:
        (inner,) = (o for o in options if o is not type(None))
        return lambda value: None if value is None else _plain_to(inner)(value)
    return lambda value: value
