"""The training loop. A step is a function of the configuration, the weights and its number: data
order, flips, dropped labels, noise, t and stages come from (seed, position). So a resumed run goes
on as if it had never stopped, on any number of ranks and with any number of parts of a batch."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import Dataset

from dfm_fast import _checks
from dfm_fast.models._pretrained import write_bytes
from dfm_fast.ops._philox import fold
from dfm_fast.training import distributed, orders, outputs, pictures, recipes, saved
from dfm_fast.training.checkpoints import Checkpoints, load, reason
from dfm_fast.training.config import OptimizerConfig, TrainConfig, check, to_json
from dfm_fast.training.datasets import open_dataset
from dfm_fast.training.distributed import World
from dfm_fast.training.monitors import Board, NotFinite, Report, Reports, caught_signals
from dfm_fast.training.outputs import RunError
from dfm_fast.training.recipes import Recipe

CONFIG, CHECKPOINTS, EXPORT = "config.json", "checkpoints", "model"


def ema_decay(ema: float, step: int) -> float:
    """What an average of `step` weights keeps of itself: a short one forgets its beginning."""
    return min(ema, (1 + step) / (10 + step))


def learning_rate(options: OptimizerConfig, step: int, steps: int) -> float:
    """Of a step, the first of which is 0."""
    beyond = step - options.warmup
    if beyond < 0:
        return options.lr * (step + 1) / (options.warmup + 1)
    if options.schedule == "constant":
        return options.lr
    return options.lr * 0.5 * (1 + math.cos(math.pi * beyond / max(1, steps - options.warmup)))


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    checkpoint: Path | None  # the last one
    stopped_by: str | None = None  # a signal


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    on_step: Callable[[Report], None] | None = None,
    world: World | None = None,
) -> Outcome:
    """Train to `config.steps`; under torchrun on all ranks.

    Args:
        config: see `TrainConfig`.
        resume: go on from the last checkpoint in `config.out`, if there is one; without it such a
            folder is an error.
        on_step: called with every step's report, one step late.

    Raises:
        ValueError: configuration; a checkpoint of another model (named keys).
        NotFinite: an inf or nan, with the step and the last good checkpoint.
        CheckpointError: one that could not be written.
        RunError: a model that could not be written at the end; its weights are in a checkpoint.
    """
    world = world or distributed.start(config.device)
    check(config, world.size)
    with outputs.held("train", config.out, world):
        checkpoints = Checkpoints(config.out / CHECKPOINTS, config.keep, world)
        if not resume and (last := checkpoints.latest()) is not None:
            _checks.fail("train", "out", "a new folder, or --resume", f"one with {last.name}")
        run = Run(config, world, checkpoints)
        try:
            with caught_signals() as signals:
                return run.train(signals, on_step)
        finally:
            run.board.close()


class Run:
    """A run's model, average, optimizer and place."""

    def __init__(self, config: TrainConfig, world: World, checkpoints: Checkpoints) -> None:
        self.config, self.world, self.checkpoints = config, world, checkpoints
        self.dataset = _opened(config, world)
        last = checkpoints.latest()
        self.recipe = self._recipe(last)
        torch.manual_seed(config.seed)
        model = self.recipe.build_model()
        if last is None and config.init is not None:
            model.load_state_dict(saved.initial(config.init, self.recipe))
        self.model = model.to(world.device).train()
        self.flow = self.recipe.build_flow(config.seed)
        # A model that FSDP2 has sharded cannot be copied: the average is, before.
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.wrapped = distributed.wrap(self.model, config.distribution, world, config.compile)
        self.sharded = world.size > 1 and config.distribution == "fsdp"
        if self.sharded:
            distributed.shard(self.ema, world)
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), options.lr, options.betas,
            weight_decay=options.weight_decay, fused=True,
        )  # fmt: skip
        self.step, self.position = 0, 0  # steps done, samples seen
        self.reports = Reports()
        if last is not None:
            self._load(last)
        self.board = Board(
            config.out / "logs", self.step, config.steps, config.log_every, world.main
        )
        if world.main:
            config.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(to_json(config), indent=2) + "\n"
            write_bytes(config.out / CONFIG, text.encode())

    def _recipe(self, last: Path | None) -> Recipe:
        before = Recipe.read(last) if last else None
        std = None
        if recipes.needs_std(self.config):
            std = self._std(before, last)
        recipe = recipes.recipe_of(self.config, self.dataset, std)
        if before:
            recipe.check_same(before, last)
        return recipe

    def _std(self, before: Recipe | None, last: Path | None) -> list[float]:
        """Of the levels of the data: what the run began with, or measured."""
        config = self.config
        if before is None:
            std = self.world.share(lambda: recipes.measure(config, self.dataset))
            return std if config.init is None else saved.initial_std(config.init, std)
        if before.measured is None:
            name = "model.precondition" if config.model.precondition else "flow.standardise"
            raise ValueError(f"train: {last} does not fit this run: {name}: saved false, now true")
        return before.measured

    # --- Steps ---

    def train(self, signals: list[str], on_step: Callable[[Report], None] | None) -> Outcome:
        config, last = self.config, self.checkpoints.latest()
        slices = orders.Slices(
            self.position, config.steps - self.step, config.batch, config.accumulate,
            self.world.rank, self.world.size,
        )  # fmt: skip
        batches = orders.batches(self._loader(slices))
        while self.step < config.steps:
            sums, active = self._step(batches, slices)
            self._tell(on_step)  # of the step before
            lr = self.optimizer.param_groups[0]["lr"]
            self.reports.put(self.step, lr, active, config.batch, sums)
            stop = self.world.any(bool(signals))
            done = self.step == config.steps
            if stop or done or self.step % config.save_every == 0:
                self._tell(on_step)  # nothing is saved that was not seen to be finite
                last = self.save()
            if config.sample_every and (done or self.step % config.sample_every == 0) and not stop:
                self._tell(on_step)
                self._pictures()
            if stop and not done:
                return Outcome(self.step, last, signals[0] if signals else "a signal of a rank")
        self._export()
        return Outcome(self.step, last)

    def _tell(self, on_step: Callable[[Report], None] | None) -> None:
        try:
            report = self.reports.take()
        except NotFinite as error:
            last = self.checkpoints.latest() or "none"
            raise NotFinite(f"{error}; the last good checkpoint: {last}") from None
        if report is not None:
            self.board.step(report, self.config.batch)
            if on_step is not None:
                on_step(report)

    def _loader(self, slices: orders.Slices) -> torch.utils.data.DataLoader:
        config, classes = self.config, self.recipe.num_classes
        dropout = config.model.class_dropout if classes else 0.0
        ordered = orders.Ordered(self.dataset, config.seed, config.data.flip, dropout, classes)
        return orders.loader(ordered, slices, config.workers, self.world.device.type == "cuda")

    def _step(self, batches: Any, slices: orders.Slices) -> tuple[Tensor, list[int]]:
        """(losses of the levels, summed over the batch of all ranks, and the gradients' norm; how
        many samples have each level)"""
        config, device = self.config, self.world.device
        seed = fold(config.seed, self.step)
        # For what a model draws itself; the loop draws nothing from it.
        torch.manual_seed((seed + self.world.rank) % (1 << 63))
        sums = torch.zeros(self.flow.num_levels, device=device)
        for part in range(config.accumulate):
            x, y = next(batches)
            x = x.to(device, non_blocking=True)
            cond = {"y": y.to(device, non_blocking=True)} if self.recipe.num_classes else {}
            narrow = torch.autocast(device.type, torch.bfloat16, config.precision == "bf16")
            with distributed.local_gradients(self.wrapped, part + 1 < config.accumulate):
                with narrow:
                    loss = self.flow.loss(
                        self.wrapped, x, seed=seed, shard=(slices.start(part), config.batch),
                        per_level=True, **cond,
                    )  # fmt: skip
                # Gradients are averaged over ranks: each has its share of the batch's mean.
                (loss.sum() * (self.world.size / config.batch)).backward()
            sums += loss.detach().sum(0)
        norm = self._update()
        self.step, self.position = self.step + 1, self.position + config.batch
        stages = self.flow.stages(config.batch, seed)
        active = [sum(q >= s for q in stages) for s in range(self.flow.num_levels)]
        return torch.cat((self.world.sum(sums), norm.reshape(1))), active

    def _update(self) -> Tensor:
        """The optimizer's step; the norm of the gradients before they were clipped."""
        lr = learning_rate(self.config.optimizer, self.step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        limit = self.config.optimizer.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._average()
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    @torch.no_grad()
    def _average(self) -> None:
        """The weights after the first step, then their moving average, at first over fewer steps:
        else the first weights are a fifth of it after 1500 steps at 0.999. (torch's AveragedModel
        copies its counter to the device, and waits, at every step.)"""
        both = [distributed.local_parameters(m) for m in (self.ema, self.model)]
        if self.step == 0:
            torch._foreach_copy_(*both)
        else:
            get_ema_multi_avg_fn(ema_decay(self.config.optimizer.ema, self.step))(*both, None)

    # --- Saving ---

    def _state(self) -> dict[str, Any]:
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        return {
            "model": get_model_state_dict(self.model),
            "ema": get_model_state_dict(self.ema),
            # Its groups are the configuration's.
            "optimizer": optimizer["state"],
            "progress": {
                "step": self.step, "position": self.position, "flow": self.flow.get_extra_state(),
            },
        }  # fmt: skip

    def save(self) -> Path:
        self._check_weights()
        path = self.checkpoints.save(self.step, self._state(), self.recipe)
        self.board.pause()
        return path

    def _check_weights(self) -> None:
        """A finite loss is of the weights before the step: these may have become inf or nan."""
        both = [distributed.local_parameters(m) for m in (self.model, self.ema)]
        # A rank may have no part of a parameter that is sharded.
        parts = [p.detach() for part in both for p in part if p.numel()]
        largest = torch._foreach_norm(parts, math.inf)
        broken = bool(largest) and not torch.stack(largest).isfinite().all().item()
        if self.world.any(broken):
            last = self.checkpoints.latest() or "none"
            raise NotFinite(
                f"step {self.step}: weights that are not finite; the last good checkpoint: {last}"
            )

    def _load(self, path: Path) -> None:
        state = load(path, self._state())
        set_model_state_dict(self.model, state["model"])
        set_model_state_dict(self.ema, state["ema"])
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        optimizer["state"] = state["optimizer"]
        set_optimizer_state_dict(self.model, self.optimizer, optimizer)
        progress = state["progress"]
        self.step, self.position = progress["step"], progress["position"]
        self.flow.set_extra_state({**progress["flow"], "seed": self.config.seed})

    def _export(self) -> None:
        """The averaged weights as a folder of their own."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.ema, options=whole)
        error: OSError | None = None
        if self.world.main:
            try:
                recipes.export(self.config.out / EXPORT, self.recipe, weights)
            except OSError as caught:
                error = caught
        if self.world.any(error is not None):
            raise RunError(
                f"could not write {self.config.out / EXPORT}: {reason(error)}; its weights are in "
                f"{self.checkpoints.latest()}, which dfm-fast sample takes"
            ) from error

    # --- Pictures ---

    def _pictures(self) -> None:
        """A grid of the average. Sharded weights are gathered by all ranks."""
        if not (self.sharded or self.world.main):
            return
        count, device = self.config.sample_count, self.world.device
        labels = pictures.labels_of(self.recipe, count)
        narrow = torch.autocast(device.type, torch.bfloat16, self.config.precision == "bf16")
        with narrow:
            x = pictures.sample(
                self.ema, self.flow, self.recipe, labels, count, device=device,
                cuda_graph=False,
            )  # fmt: skip
        if self.sharded:
            self.ema.reshard()  # which otherwise only a backward does
        if self.world.main:
            image = pictures.grid(x, _columns(labels, count))
            with self.board.optional("samples"):
                pictures.write(self.config.out / "samples" / f"step-{self.step:08d}.png", image)
            self.board.picture("samples", image, self.step)
            self.board.pause()


def _columns(labels: Tensor | None, count: int) -> int | None:
    """One row per class."""
    return None if labels is None else math.ceil(count / len(labels.unique()))


def _opened(config: TrainConfig, world: World) -> Dataset:
    with warnings.catch_warnings():
        if not world.main:  # what is wrong with the data is told once
            warnings.simplefilter("ignore")
        return open_dataset(config.data, "train")
