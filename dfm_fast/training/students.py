"""A run that trains a network with one level: by flow matching alone, against a teacher
(`distillation.DistillationLoss`), or to a few steps (`step_distillation`); under torchrun on all
ranks, each with its part of a batch and all weights.

As in `loop`, what is drawn is a function of the seed and of the step: a run that was resumed
repeats the losses of one that was not stopped.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dfm_fast import _checks
from dfm_fast.models import TextConditions
from dfm_fast.models._pretrained import Pretrained, write_bytes
from dfm_fast.ops._philox import fold
from dfm_fast.training import distributed, orders, recipes
from dfm_fast.training.checkpoints import Checkpoints, load, step_of
from dfm_fast.training.config import OptimizerConfig, check_optimizer, to_json
from dfm_fast.training.datasets import DataConfig, open_dataset
from dfm_fast.training.distillation import DistillationLoss
from dfm_fast.training.distributed import World
from dfm_fast.training.loop import (
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    Outcome,
    ema_decay,
    learning_rate,
)
from dfm_fast.training.monitors import NotFinite, caught_signals
from dfm_fast.training.step_distillation import (
    FeatureHeads,
    discriminator_loss,
    step_distillation_loss,
)
from dfm_fast.training.teachers import backbone

# Labels [N] -> what a network is given beside x_t and t.
Conditions = Callable[[Tensor], Mapping[str, Any] | TextConditions]
# Writes averages, a student's and its conditions', to a folder.
Export = Callable[[Pretrained, nn.Module | None, Path], None]
# What a step reports, by name.
LOSSES = ("total", "task", "kd", "features", "adversarial", "discriminator")


@dataclass(frozen=True)
class DistillationConfig:
    """Train a network with one level. Networks compute in the dtype of their weights."""

    out: Path
    """Folder of checkpoints and of the exported network."""

    data: DataConfig = field(default_factory=DataConfig)

    features: bool = True
    """Whether the teacher's features are a loss."""

    shift: float = 1.0
    """Of the noise levels; 3 at 1024 pixels."""

    ratio: Literal["sample", "batch"] = "sample"
    """Over what the teacher's losses are brought to the size of the task's."""

    few_steps: int = 0
    """Sampling steps that the student is to take, taught by a discriminator on the teacher's
    features in place of those features themselves; 0: any number, and no discriminator."""

    teacher_steps: int = 1
    """Steps that the teacher takes in one of those; 1 is for a teacher of few steps."""

    adversarial: float = 0.1
    """Weight of the discriminator's say."""

    discriminator_lr: float = 1e-3

    class_dropout: float = 0.1
    steps: int = 100_000
    batch: int = 64
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(betas=(0.9, 0.999), warmup=1_000)
    )
    """Its average is what is exported."""

    seed: int = 0
    save_every: int = 5_000
    keep: int = 2
    """Checkpoints that are kept, the newest."""

    workers: int = 4
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class DistillationReport:
    """Means over a step's batch."""

    step: int  # of the first: 1
    loss: float
    task: float
    kd: float  # what there is none of is 0, here and below
    features: float
    adversarial: float
    discriminator: float
    grad_norm: float  # before it was clipped


@dataclass(frozen=True)
class StudentRecipe:
    """What a checkpoint's weights are."""

    model: dict[str, Any]  # arguments of the student

    def write(self, folder: Path) -> None:
        text = json.dumps({"model": self.model}, indent=2) + "\n"
        write_bytes(folder / recipes.NAME, text.encode())


def distill(
    config: DistillationConfig,
    student: Pretrained,
    teacher: nn.Module | None = None,
    *,
    conditions: Conditions | None = None,
    teacher_conditions: Conditions | None = None,
    resume: bool = False,
    on_step: Callable[[DistillationReport], None] | None = None,
    export: Export | None = None,
    world: World | None = None,
) -> Outcome:
    """Train to `config.steps`, and save the student's average to `config.out / "model"`.

    Args:
        config: see `DistillationConfig`.
        student: trained in place; a `SnapGenUNet`, or a `DFMTransformer` of one level.
        teacher: see `teachers.backbone`; frozen by this. None: flow matching alone.
        conditions, teacher_conditions: of labels, of which the number of classes is no class. A
            module of the student's, such as `ClassTokens`, is trained with it, and saved in the
            checkpoints and as conditions.pt. None: no conditions.
        resume: go on from the last checkpoint in `config.out`, if there is one; without it such a
            folder is an error.
        on_step: called with every step's report.
        export: writes the averages to that folder, in place of the student's `save_pretrained` and
            conditions.pt; called on rank 0.
        world: this process among all; None: as torchrun's environment says.

    Raises:
        TypeError, ValueError: configuration, networks; a checkpoint of other weights (named keys).
        NotFinite: an inf or nan, with the step and the last good checkpoint.
        CheckpointError: one that could not be written.
    """
    world = world or distributed.start(config.device)
    check(config, world.size)
    if teacher is None and config.few_steps:
        _checks.fail("distill", "few_steps", "0 without a teacher", config.few_steps)
    checkpoints = Checkpoints(config.out / CHECKPOINTS, config.keep, world)
    if not resume and (last := checkpoints.latest()) is not None:
        _checks.fail("distill", "out", "a new folder, or resume", f"one with {last.name}")
    if not isinstance(student, Pretrained):
        _checks.fail("distill", "student", "a Pretrained", type(student).__name__, TypeError)
    run = Run(config, checkpoints, student, teacher, conditions, teacher_conditions)
    with caught_signals() as signals:
        return run.train(signals, on_step, export or saved_apart)


def saved_apart(student: Pretrained, conditions: nn.Module | None, folder: Path) -> None:
    student.save_pretrained(folder)
    if conditions is not None:
        torch.save(conditions.state_dict(), folder.parent / "conditions.pt")


def check(config: DistillationConfig, world_size: int = 1) -> None:
    """Raise ValueError where numbers make no sense; shift and ratio are the loss's."""
    for name, least in (
        ("steps", 0), ("batch", 1), ("few_steps", 0), ("teacher_steps", 1), ("save_every", 1),
        ("keep", 1), ("workers", 0), ("seed", 0),
    ):  # fmt: skip
        _checks.integer("distill", name, getattr(config, name), least)
    if config.batch % world_size:
        expected = f"a multiple of {world_size} ranks"
        _checks.fail("distill", "batch", expected, config.batch)
    check_optimizer("distill", config.optimizer)
    for name in ("adversarial", "discriminator_lr"):
        if not 0 <= getattr(config, name) < math.inf:
            _checks.fail("distill", name, "a number from 0 on", getattr(config, name))
    if not 0 <= config.class_dropout <= 1:
        _checks.fail("distill", "class_dropout", "from 0 to 1", config.class_dropout)


class Run:
    """A run's networks, optimizer and place."""

    def __init__(
        self,
        config: DistillationConfig,
        checkpoints: Checkpoints,
        student: Pretrained,
        teacher: nn.Module | None,
        conditions: Conditions | None,
        teacher_conditions: Conditions | None,
    ) -> None:
        self.config, self.checkpoints = config, checkpoints
        self.world, self.device = checkpoints.world, checkpoints.world.device
        self.dataset = open_dataset(config.data, "train")
        self.conditions, self.teacher_conditions = conditions, teacher_conditions
        self.student = student.to(self.device).train()
        self.recipe = StudentRecipe(dict(student.config))
        torch.manual_seed(config.seed)
        features = config.features and teacher is not None and not config.few_steps
        channels = backbone(student).channels if features else 0
        teacher = None if teacher is None else teacher.to(self.device)
        self.loss = DistillationLoss(teacher, channels, shift=config.shift, ratio=config.ratio)
        self.trained = nn.ModuleDict({"student": student, "loss": self.loss.to(self.device)})
        if isinstance(conditions, nn.Module):
            self.trained["conditions"] = conditions.to(self.device).train()
        if isinstance(teacher_conditions, nn.Module):
            teacher_conditions.to(self.device).eval()
        kept = {name: m for name, m in self.trained.items() if name != "loss"}
        self.ema = nn.ModuleDict(copy.deepcopy(kept)).eval().requires_grad_(False)
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.trained.parameters(), options.lr, options.betas, weight_decay=options.weight_decay
        )
        self.optimizers, self.heads = {"optimizer": self.optimizer}, None
        if config.few_steps:
            self.heads = FeatureHeads(self.loss.teacher.channels).to(self.device)
            self.optimizers["heads_optimizer"] = torch.optim.AdamW(
                self.heads.parameters(), config.discriminator_lr, (0.0, 0.99), weight_decay=0.0
            )
        self.step = 0
        if (last := checkpoints.latest()) is not None:
            self._load(last)
        if self.world.main:
            config.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(to_json(config), indent=2) + "\n"
            write_bytes(config.out / CONFIG, text.encode())

    # --- Steps ---

    def train(
        self,
        signals: list[str],
        on_step: Callable[[DistillationReport], None] | None,
        export: Export,
    ) -> Outcome:
        config, saved = self.config, self.checkpoints.latest()
        slices = self._slices()
        for x, y in orders.batches(self._loader(slices)):
            report = self._step(x.to(self.device), y.to(self.device), slices.start(0))
            if on_step is not None:
                on_step(report)
            stop, done = self.world.any(bool(signals)), self.step == config.steps
            if stop or done or self.step % config.save_every == 0:
                saved = self.save()
            if stop and not done:
                return Outcome(self.step, saved, signals[0] if signals else "a signal of a rank")
        if self.world.main:
            conditions = dict(self.ema.items()).get("conditions")
            export(self.ema["student"], conditions, config.out / EXPORT)
        self.world.barrier()
        return Outcome(self.step, saved)

    def _slices(self) -> orders.Slices:
        config = self.config
        first, left = self.step * config.batch, config.steps - self.step
        return orders.Slices(first, left, config.batch, 1, self.world.rank, self.world.size)

    def _loader(self, slices: orders.Slices) -> torch.utils.data.DataLoader:
        config, classes = self.config, self.dataset.num_classes
        dropout = config.class_dropout if classes else 0.0
        ordered = orders.Ordered(self.dataset, config.seed, config.data.flip, dropout, classes)
        return orders.loader(ordered, slices, config.workers, self.device.type == "cuda")

    def _step(self, x: Tensor, y: Tensor, start: int) -> DistillationReport:
        config, seed = self.config, fold(self.config.seed, self.step)
        # For what a network draws itself.
        torch.manual_seed((seed + self.world.rank) % (1 << 63))
        losses = self._losses(x, y, seed, start)
        losses["total"].mean().backward()
        self._share(self.trained)
        limit = config.optimizer.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), limit)
        if self.heads is not None:
            losses["discriminator"].mean().backward()
            self._share(self.heads)
        found = [losses.get(name) for name in LOSSES]
        found = [x.new_zeros(()) if v is None else v.detach().float().mean() for v in found]
        found = self.world.sum(torch.stack(found)) / self.world.size
        values = [*found.tolist(), norm.item()]
        if not all(map(math.isfinite, values)):
            last = self.checkpoints.latest() or "none"
            raise NotFinite(f"step {self.step + 1}: {values}; the last good checkpoint: {last}")
        lr = learning_rate(config.optimizer, self.step, config.steps)
        self.optimizer.param_groups[0]["lr"] = lr
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        self._average()
        self.step += 1
        return DistillationReport(self.step, *values)

    def _share(self, module: nn.Module) -> None:
        """Gradients of all ranks, averaged; where some got none, none did."""
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        if self.world.size > 1 and grads:
            whole = self.world.sum(torch.cat([g.flatten() for g in grads])) / self.world.size
            for g, part in zip(grads, whole.split([g.numel() for g in grads]), strict=True):
                g.copy_(part.view_as(g))

    def _losses(self, x: Tensor, y: Tensor, seed: int, start: int) -> dict[str, Tensor | None]:
        """Of each sample, by name; the total has the student's gradients, the discriminator's loss
        those of its heads."""
        with torch.no_grad():
            taught = given(self.teacher_conditions, y)
        conditions = {"cond": given(self.conditions, y), "teacher_cond": taught, "start": start}
        if self.heads is None:
            return self.loss(self.student, x, seed=seed, **conditions)._asdict()
        config, judges = self.config, (self.loss.teacher, self.heads)
        losses = step_distillation_loss(
            self.student, *judges, x, seed=seed, steps=config.few_steps,
            teacher_steps=config.teacher_steps, weight=config.adversarial, shift=config.shift,
            ratio=config.ratio, **conditions,
        )  # fmt: skip
        told = discriminator_loss(
            *judges, x, losses.x0, losses.s, seed=seed, start=start, cond=taught,
            features=losses.features,
        )  # fmt: skip
        return {**losses._asdict(), "features": None, "discriminator": told}

    @torch.no_grad()
    def _average(self) -> None:
        """The weights after the first step, then their moving average, as in `loop`."""
        parts = [self.trained[name] for name in self.ema]
        both = list(self.ema.parameters()), [p for part in parts for p in part.parameters()]
        if self.step == 0:
            torch._foreach_copy_(*both)
        else:
            get_ema_multi_avg_fn(ema_decay(self.config.optimizer.ema, self.step))(*both, None)

    # --- Saving ---

    def _modules(self) -> dict[str, nn.Module]:
        """By the optimizers' names."""
        return {"optimizer": self.trained, "heads_optimizer": self.heads}

    def _state(self) -> dict[str, Any]:
        state = {"model": self.trained.state_dict(), "ema": self.ema.state_dict()}
        if self.heads is not None:
            state["heads"] = self.heads.state_dict()
        for name, optimizer in self.optimizers.items():
            moments = get_optimizer_state_dict(self._modules()[name], optimizer)
            state[name] = moments["state"]
        return state

    def save(self) -> Path:
        return self.checkpoints.save(self.step, self._state(), self.recipe)

    def _load(self, path: Path) -> None:
        self.step = step_of(path)
        state = load(path, self._state())
        self.trained.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        if self.heads is not None:
            self.heads.load_state_dict(state["heads"])
        for name, optimizer in self.optimizers.items():
            whole = get_optimizer_state_dict(self._modules()[name], optimizer)
            whole["state"] = state[name]
            set_optimizer_state_dict(self._modules()[name], optimizer, whole)


def given(conditions: Conditions | None, labels: Tensor) -> Mapping[str, Any]:
    """Keywords of a network."""
    found = {} if conditions is None else conditions(labels)
    if isinstance(found, TextConditions):
        return {"text": found[0], "mask": found[1]}
    return found
