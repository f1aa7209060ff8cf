"""A run that trains a network with one level: by flow matching alone, against a teacher
(`distillation.DistillationLoss`), or to a few steps (`step_distillation`). The loop is `loop`'s."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.flow import DecomposableFlow, Laplacian
from dfm_fast.models import TextConditions, TextTable
from dfm_fast.models._pretrained import Pretrained
from dfm_fast.models.text_layouts import draw_kept, dropout_probability
from dfm_fast.training import distributed, loop, pictures
from dfm_fast.training.config import OptimizerConfig, RunConfig, check_run
from dfm_fast.training.datasets import Dataset
from dfm_fast.training.distillation import DistillationLoss
from dfm_fast.training.distributed import World
from dfm_fast.training.loop import Outcome, Rows
from dfm_fast.training.monitors import Report
from dfm_fast.training.recipes import ModelRecipe
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
SAMPLE_STEPS = 28  # of a grid, where the student is not for few


@dataclass(frozen=True)
class DistillationConfig(RunConfig):
    """Train a network with one level."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(betas=(0.9, 0.999), warmup=1_000)
    )
    """Its average is what is exported."""

    steps: int = 100_000
    batch: int = 64
    """Samples per step, over all ranks."""

    features: bool = True
    """Whether the teacher's features are a loss."""

    shift: float = 1.0
    """Of the noise levels; 3 at 1024 pixels."""

    ratio: Literal["sample", "batch"] = "sample"
    """Over what the teacher's losses are brought to the size of the task's; a part of a batch
    counts as one."""

    few_steps: int = 0
    """Sampling steps that the student is to take, taught by a discriminator on the teacher's
    features in place of those features themselves; 0: any number, and no discriminator. (Its
    spectral norm gains from every part of a batch: losses follow `accumulate` to some 1e-3.)"""

    teacher_steps: int = 1
    """Steps that the teacher takes in one of those; 1 is for a teacher of few steps."""

    adversarial: float = 0.1
    """Weight of the discriminator's say."""

    discriminator_lr: float = 1e-3

    class_dropout: float = 0.1
    """Chance that a label becomes the null label, for classifier-free guidance."""


def distill(
    config: DistillationConfig,
    student: Pretrained,
    teacher: nn.Module | None = None,
    *,
    conditions: Conditions | None = None,
    teacher_conditions: Conditions | None = None,
    resume: bool = False,
    on_step: Callable[[Report], None] | None = None,
) -> Outcome:
    """Train to `config.steps`, and save the student's average to `config.out / "model"`.

    Args:
        config: see `DistillationConfig`.
        student: trained in place; a `SnapGenUNet`, or a `DFMTransformer` of one level.
        teacher: see `teachers.backbone`; frozen by this. None: flow matching alone.
        conditions, teacher_conditions: of labels, of which the number of classes is no class. A
            module of the student's, such as `ClassTokens`, is trained with it, and saved in the
            checkpoints and as conditions.pt. A `TextTable`'s encoders are dropped one by one, all
            of them in a share of `class_dropout`. None: no conditions.
        resume, on_step: as `loop.train`, and so are errors. Terms of a report are task, kd and
            features, or task, kd, adversarial and discriminator; those that there are.

    Raises:
        TypeError: networks of other kinds.
    """
    op, world = "distill", distributed.start(config.device)
    check(op, config, world.size)

    def make(last: Path | None) -> Distillation:
        data, both = loop.opened(config.data, world), (conditions, teacher_conditions)
        return Distillation(op, config, world, data, student, teacher, *both, last=last)

    return loop.run(op, config, make, world, resume=resume, on_step=on_step)


def check(op: str, config: DistillationConfig, world_size: int = 1) -> None:
    """Raise ValueError where numbers make no sense; shift and ratio are the loss's."""
    check_run(op, config, world_size)
    for name, least in (("few_steps", 0), ("teacher_steps", 1)):
        _checks.integer(op, name, getattr(config, name), least)
    for name in ("adversarial", "discriminator_lr"):
        if not 0 <= getattr(config, name) < math.inf:
            _checks.fail(op, name, "a number from 0 on", getattr(config, name))
    if not 0 <= config.class_dropout <= 1:
        _checks.fail(op, "class_dropout", "from 0 to 1", config.class_dropout)


# --- What is trained ------------------------------------------------------------------------------


class Student(nn.Module):
    """A network and, where that is trained, what it is told of labels."""

    def __init__(self, network: Pretrained, conditions: nn.Module | None) -> None:
        super().__init__()
        self.network, self.conditions = network, conditions

    def told(self, labels: Tensor, cond: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """`cond`, but for labels [N] of a module of its own."""
        if cond is not None:
            return cond
        assert self.conditions is not None
        return keywords(self.conditions(labels))

    def forward(
        self, x_t: Tensor, t: Tensor, labels: Tensor, cond: Mapping[str, Any] | None
    ) -> Tensor:
        """The velocity, like x_t [N, C, H, W]; t [N]."""
        return backbone(self.network)(x_t, t, **self.told(labels, cond)).velocity


class Distilled(nn.Module):
    """All that is trained, and the losses."""

    def __init__(
        self,
        config: DistillationConfig,
        student: Student,
        loss: DistillationLoss,
        heads: FeatureHeads | None,
    ) -> None:
        super().__init__()
        self.config, self.student, self.loss, self.heads = config, student, loss, heads

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        cond: Mapping[str, Any] | None,
        teacher_cond: Mapping[str, Any],
        *,
        seed: int,
        start: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, terms), [N] each; cond: None asks the student's own module."""
        where: dict[str, Any] = {"seed": seed, "start": start, "teacher_cond": teacher_cond}
        where["cond"] = self.student.told(labels, cond)
        if self.heads is not None:
            return self._few_steps(x, where)
        losses = self.loss(self.student.network, x, **where)
        terms = losses._asdict()
        return terms.pop("total"), {n: v for n, v in terms.items() if v is not None}

    def _few_steps(self, x: Tensor, where: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        config, teacher, heads = self.config, self.loss.teacher, self.heads
        assert teacher is not None  # see `distilled`
        assert heads is not None
        losses = step_distillation_loss(
            self.student.network, teacher, heads, x, steps=config.few_steps,
            teacher_steps=config.teacher_steps, weight=config.adversarial, shift=config.shift,
            ratio=config.ratio, **where,
        )  # fmt: skip
        told = discriminator_loss(
            teacher, heads, x, losses.x0, losses.s, seed=where["seed"], start=where["start"],
            cond=where["teacher_cond"], features=losses.features,
        )  # fmt: skip
        terms = {name: getattr(losses, name) for name in ("task", "kd", "adversarial")}
        terms["discriminator"] = told.detach()
        # The heads' gradients alone: the value is the student's.
        return losses.total + (told - told.detach()), terms


def distilled(config: DistillationConfig, student: Student, teacher: nn.Module | None) -> Distilled:
    """With a projector or heads of the seed's weights, where they have a part."""
    torch.manual_seed(config.seed)
    features = config.features and teacher is not None and not config.few_steps
    channels = backbone(student.network).channels if features else 0
    loss = DistillationLoss(teacher, channels, shift=config.shift, ratio=config.ratio)
    heads = None
    if config.few_steps and loss.teacher is not None:
        heads = FeatureHeads(loss.teacher.channels)
    return Distilled(config, student, loss, heads)


class Distillation:
    """See `loop.Task`.

    Args:
        op: what errors name.
        config, student, teacher, conditions, teacher_conditions: as `distill`.
        world: this process among all.
        dataset: what is trained on.
        export: writes the averages, in place of the student's `save_pretrained` and conditions.pt.
        last: the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        op: str,
        config: DistillationConfig,
        world: World,
        dataset: Dataset,
        student: Pretrained,
        teacher: nn.Module | None,
        conditions: Conditions | None,
        teacher_conditions: Conditions | None,
        *,
        export: Export | None = None,
        last: Path | None = None,
    ) -> None:
        if teacher is None and config.few_steps:
            _checks.fail(op, "few_steps", "0 without a teacher", config.few_steps)
        if not isinstance(student, Pretrained):
            _checks.fail(op, "student", "a Pretrained", type(student).__name__, TypeError)
        self.config, self.world, self.dataset = config, world, dataset
        self.conditions, self.teacher_conditions = conditions, teacher_conditions
        # Of texts it is encoders that are dropped.
        self.class_dropout = 0.0 if isinstance(conditions, TextTable) else config.class_dropout
        self.write, self.recipe = export or saved_apart, ModelRecipe(op, student.config)
        if last is not None:
            self.recipe.check_same(last)
        for module in (teacher, teacher_conditions):
            if isinstance(module, nn.Module):
                module.to(world.device).eval()
        self.trained = conditions if isinstance(conditions, nn.Module) else None
        self.averaged, self.networks = Student(student, self.trained), (student,)
        self.model = distilled(config, self.averaged, teacher)

    def groups(self) -> list[dict[str, Any]]:
        """The heads learn at a rate of their own, with little momentum: what they learn from
        changes."""
        named, config = list(self.model.named_parameters()), self.config
        heads = [p for name, p in named if name.startswith("heads.")]
        ours = config.optimizer.group(p for name, p in named if not name.startswith("heads."))
        options = {"lr": config.discriminator_lr, "betas": (0.0, 0.99), "weight_decay": 0.0}
        return [ours, {"params": heads, **options}] if heads else [ours]

    def losses(
        self, model: nn.Module, x: Tensor, labels: Tensor, rows: Rows
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            cond = self._given(self.conditions, labels, rows) if self.trained is None else None
            same = cond is not None and self.teacher_conditions is self.conditions
            taught = cond if same else self._given(self.teacher_conditions, labels, rows)
        labels = labels.to(x.device, non_blocking=True)
        return model(x, labels, cond, taught, seed=rows.seed, start=rows.start)

    def _given(
        self, conditions: Conditions | None, labels: Tensor, rows: Rows | None
    ) -> Mapping[str, Any]:
        """Keywords of a network, for labels on the host; rows None: nothing is dropped."""
        if not isinstance(conditions, TextTable):
            labels = labels.to(self.world.device, non_blocking=True)
            return {} if conditions is None else keywords(conditions(labels))
        keep, layout = None, conditions.layout
        if rows is not None:
            positions = range(rows.position, rows.position + len(labels))
            chance = dropout_probability(layout, self.config.class_dropout)
            keep = draw_kept(layout, self.config.seed, positions, chance)
        dtype = next(self.averaged.parameters()).dtype
        return keywords(conditions(labels, keep, device=self.world.device, dtype=dtype))

    def counts(self, batch: int, seed: int) -> dict[str, int]:
        return {}

    def sample(self, average: nn.Module, count: int) -> tuple[Tensor, int | None]:
        """Without guidance."""
        labels = pictures.labels_of(self.dataset.num_classes, count)
        y = torch.zeros(count, dtype=torch.int64) if labels is None else labels
        cond = None if self.trained is not None else self._given(self.conditions, y, None)
        y = y.to(self.world.device)
        x = DecomposableFlow(Laplacian(1)).sample(
            lambda levels, t, active: [average(levels[0], t[:, 0], y, cond)],
            (count, *self.dataset.shape),
            steps=self.config.few_steps or SAMPLE_STEPS,
            shift=self.config.shift,
            seed=0,
            device=self.world.device,
            cuda_graph=False,
        )
        return x, pictures.columns_of(labels)

    def export(self, average: Any, folder: Path) -> None:
        self.write(average.network, average.conditions, folder)


def saved_apart(student: Pretrained, conditions: nn.Module | None, folder: Path) -> None:
    student.save_pretrained(folder)
    if conditions is not None:
        torch.save(conditions.state_dict(), folder.parent / "conditions.pt")


def keywords(found: Mapping[str, Any] | TextConditions) -> Mapping[str, Any]:
    """Conditions as a network takes them."""
    return {"text": found[0], "mask": found[1]} if isinstance(found, TextConditions) else found
