"""The training loop. A step is a function of the configuration, the weights and its number: data
order, flips, dropped labels, noise, t and stages come from (seed, position). So a resumed run goes
on as if it had never stopped, on any number of ranks and with any number of parts of a batch.

What is trained, and by which losses, is a `Task`'s matter: a DFM transformer's (`dfm`, `train`) or
that of a network with one level (`students`).
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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

from dfm_fast import _checks
from dfm_fast.models._pretrained import write_bytes
from dfm_fast.ops._philox import fold
from dfm_fast.training import distributed, orders, outputs, pictures
from dfm_fast.training.checkpoints import Checkpoints, Written, load, reason
from dfm_fast.training.config import (
    AdamWConfig,
    RunConfig,
    TrainConfig,
    check,
    to_json,
)
from dfm_fast.training.datasets import DataConfig, Dataset, open_dataset
from dfm_fast.training.dfm import DFM
from dfm_fast.training.distributed import World
from dfm_fast.training.monitors import LOSS, Board, NotFinite, Report, Reports, caught_signals
from dfm_fast.training.outputs import RunError

CONFIG, CHECKPOINTS, EXPORT = "config.json", "checkpoints", "model"


def ema_decay(ema: float, step: int) -> float:
    """What an average of `step` weights keeps of itself: a short one forgets its beginning."""
    return min(ema, (1 + step) / (10 + step))


def learning_rate(options: AdamWConfig, step: int, steps: int) -> float:
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


class Rows(NamedTuple):
    """Where samples are: rows start, start + 1, ... of a step's batch."""

    seed: int  # the step's, of its noise
    start: int
    batch: int  # of all ranks
    position: int  # of the first one, in the run


class Task(Protocol):
    """What a run trains.

    Attributes:
        dataset: of (x, label); what is dropped has the label num_classes.
        class_dropout: chance of that.
        recipe: what the weights are, for checkpoints.
        model: what is trained; ranks share its gradients, so `losses` has to call it.
        averaged: the model or a module of its modules: what an average is kept of, and exported.
        networks: those that `compile` compiles.
    """

    dataset: Dataset
    class_dropout: float

    # Properties, as a type checker would have attributes be of these types exactly.
    @property
    def recipe(self) -> Written: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def averaged(self) -> nn.Module: ...
    @property
    def networks(self) -> Sequence[nn.Module]: ...

    def groups(self) -> list[dict[str, Any]]:
        """AdamW's. The first one's learning rate and clipping are the configuration's."""

    def losses(
        self, model: nn.Module, x: Tensor, labels: Tensor, rows: Rows
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of each sample, [n]: the loss, and the terms that are reported, without a graph. `model`
        is the task's, or its wrapper; x lies on its device, labels on the host."""

    def counts(self, batch: int, seed: int) -> Mapping[str, int]:
        """Samples of the step's batch that have a term, where not all have it."""

    def sample(self, average: nn.Module, count: int) -> tuple[Tensor, int | None]:
        """Samples [count, C, (T,) H, W], and how many to a line."""

    def export(self, average: nn.Module, folder: Path) -> None:
        """Write the averaged weights."""


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

    def make(last: Path | None) -> Task:
        return DFM(config, world, opened(config.data, world), last)

    return run("train", config, make, world, resume=resume, on_step=on_step)


def run(
    op: str,
    config: RunConfig,
    make: Callable[[Path | None], Task],
    world: World,
    *,
    resume: bool,
    on_step: Callable[[Report], None] | None,
) -> Outcome:
    """Train the task that `make` makes, of the checkpoint that is resumed, if any. `op` is what
    errors name; otherwise as `train`."""
    with outputs.held(op, config.out, world):
        checkpoints = Checkpoints(config.out / CHECKPOINTS, config.keep, world)
        last = checkpoints.latest()
        if not resume and last is not None:
            _checks.fail(op, "out", "a new folder, or --resume", f"one with {last.name}")
        going = Run(config, world, checkpoints, make(last))
        try:
            with caught_signals() as signals:
                return going.train(signals, on_step)
        finally:
            going.board.close()


def opened(config: DataConfig, world: World) -> Dataset:
    """What is trained on."""
    with warnings.catch_warnings():
        if not world.main:  # what is wrong with the data is told once
            warnings.simplefilter("ignore")
        return open_dataset(config, "train")


class Run:
    """A run's model, average, optimizer and place."""

    def __init__(
        self, config: RunConfig, world: World, checkpoints: Checkpoints, task: Task
    ) -> None:
        self.config, self.world, self.checkpoints, self.task = config, world, checkpoints, task
        self.model = task.model.to(world.device).train()
        # A model that FSDP2 has sharded cannot be copied: the average is, before.
        self.ema = copy.deepcopy(task.averaged).eval().requires_grad_(False)
        self.whole = self.ema  # what is exported
        self.wrapped = distributed.wrap(
            self.model, config.distribution, world, task.networks if config.compile else ()
        )
        self.sharded = world.size > 1 and config.distribution == "fsdp"
        if self.sharded:
            self.whole = distributed.hollow(self.ema)
            distributed.shard(self.ema, world)
        self.optimizer = torch.optim.AdamW(task.groups(), fused=True)
        self.step, self.position = 0, 0  # steps done, samples seen
        self.reports = Reports()
        if (last := checkpoints.latest()) is not None:
            self._load(last)
        self.board = Board(
            config.out / "logs", self.step, config.steps, config.log_every, world.main
        )
        if world.main:
            config.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(to_json(config), indent=2) + "\n"
            write_bytes(config.out / CONFIG, text.encode())

    # --- Steps ---

    def train(self, signals: list[str], on_step: Callable[[Report], None] | None) -> Outcome:
        config, last = self.config, self.checkpoints.latest()
        slices = orders.Slices(
            self.position, config.steps - self.step, config.batch, config.accumulate,
            self.world.rank, self.world.size,
        )  # fmt: skip
        batches = orders.batches(self._loader(slices))
        while self.step < config.steps:
            counts, sums = self._step(batches, slices)
            self._tell(on_step)  # of the step before
            lr = self.optimizer.param_groups[0]["lr"]
            self.reports.put(self.step, lr, counts, sums)
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

    def _loader(self, slices: orders.Slices) -> torch.utils.data.DataLoader[Any]:
        config, data = self.config, self.task.dataset
        dropout = self.task.class_dropout if data.num_classes else 0.0
        ordered = orders.Ordered(data, config.seed, config.data.flip, dropout, data.num_classes)
        return orders.loader(ordered, slices, config.workers, self.world.device.type == "cuda")

    def _step(
        self, batches: Iterator[tuple[Tensor, Tensor]], slices: orders.Slices
    ) -> tuple[dict[str, int], Tensor]:
        """(how many samples have the loss and each term; these, summed over the batch of all
        ranks, and the gradients' norm)"""
        config = self.config
        seed, sums = fold(config.seed, self.step), dict[str, Tensor]()
        # For what a model draws itself; the loop draws nothing from it.
        torch.manual_seed((seed + self.world.rank) % (1 << 63))
        for part in range(config.accumulate):
            start = slices.start(part)
            rows = Rows(seed, start, config.batch, self.position + start)
            with distributed.local_gradients(self.wrapped, part + 1 < config.accumulate):
                for name, values in self._part(*next(batches), rows).items():
                    total = values.float().sum()
                    sums[name] = sums[name] + total if name in sums else total
        norm = self._update()
        self.step, self.position = self.step + 1, self.position + config.batch
        counts = {**dict.fromkeys(sums, config.batch), **self.task.counts(config.batch, seed)}
        whole = self.world.sum(torch.stack(list(sums.values())))
        return counts, torch.cat((whole, norm.reshape(1)))

    def _part(self, x: Tensor, labels: Tensor, rows: Rows) -> dict[str, Tensor]:
        """The loss and its terms, [n] each, of which the gradients are there."""
        x = x.to(self.world.device, non_blocking=True)
        with self._narrow():
            loss, terms = self.task.losses(self.wrapped, x, labels, rows)
        # Gradients are averaged over ranks: each has its share of the batch's mean.
        (loss.sum() * (self.world.size / rows.batch)).backward()
        return {LOSS: loss.detach(), **terms}

    def _narrow(self) -> torch.autocast:
        narrow = self.config.precision == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16, narrow)

    def _update(self) -> Tensor:
        """The optimizer's step; the norm of the gradients before they were clipped."""
        lr = learning_rate(self.config.optimizer, self.step, self.config.steps)
        first = self.optimizer.param_groups[0]
        first["lr"] = lr
        limit = self.config.optimizer.clip or math.inf
        norm = nn.utils.clip_grad_norm_(first["params"], limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._average()
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    @torch.no_grad()
    def _average(self) -> None:
        """The weights after the first step, then their moving average, at first over fewer steps:
        else the first weights are a fifth of it after 1500 steps at 0.999. (torch's AveragedModel
        copies its counter to the device, and waits, at every step.)"""
        average, now = map(distributed.local_parameters, (self.ema, self.task.averaged))
        if self.step == 0:
            torch._foreach_copy_(average, now)
        else:
            move = get_ema_multi_avg_fn(ema_decay(self.config.optimizer.ema, self.step))
            move(average, now, None)

    # --- Saving ---

    def _state(self) -> dict[str, Any]:
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        return {
            "model": get_model_state_dict(self.model),
            "ema": get_model_state_dict(self.ema),
            # Its groups are the configuration's.
            "optimizer": optimizer["state"],
            "progress": {"step": self.step, "position": self.position},
        }

    def save(self) -> Path:
        self._check_weights()
        path = self.checkpoints.save(self.step, self._state(), self.task.recipe)
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
        self.step, self.position = (state["progress"][name] for name in ("step", "position"))

    def _export(self) -> None:
        """The averaged weights as a folder of their own."""
        if self.sharded:
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(self.ema, options=whole)
            if self.world.main:
                self.whole.load_state_dict(weights, assign=True)
        error: OSError | None = None
        if self.world.main:
            try:
                self.task.export(self.whole, self.config.out / EXPORT)
            except OSError as caught:
                error = caught
        if self.world.any(error is not None):
            raise RunError(
                f"could not write {self.config.out / EXPORT}: {reason(error)}; its weights are in "
                f"{self.checkpoints.latest()}"
            ) from error

    # --- Pictures ---

    def _pictures(self) -> None:
        """A grid of the average. Sharded weights are gathered by all ranks."""
        if not (self.sharded or self.world.main):
            return
        with self._narrow():
            x, columns = self.task.sample(self.ema, self.config.sample_count)
        if self.sharded:
            distributed.reshard(self.ema)  # which otherwise only a backward does
        if self.world.main:
            image = pictures.grid(x, columns)
            with self.board.optional("samples"):
                pictures.write(self.config.out / "samples" / f"step-{self.step:08d}.png", image)
            self.board.picture("samples", image, self.step)
            self.board.pause()
