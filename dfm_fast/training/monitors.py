"""What a run tells: losses without waiting for the device, TensorBoard, a progress bar."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfm_fast.training.orders import SIGNALS
from dfm_fast.training.outputs import RunError

LOSS = "loss"


class NotFinite(RunError):
    """A loss, a gradient or a weight that is inf or nan."""


@dataclass(frozen=True)
class Report:
    """What a step came to, over all ranks."""

    step: int  # of the first: 1
    loss: float  # mean over the batch
    terms: dict[str, float]  # its parts, by name: means over the samples that have them
    grad_norm: float  # before it was clipped
    lr: float
    time: float = field(default=0.0, compare=False)  # when it was done, by time.perf_counter


class Reports:
    """Numbers of a step on their way to the host: read one step late, so that the device has gone
    on by then."""

    def __init__(self) -> None:
        self.pending: tuple[int, float, dict[str, int], Tensor, Any, float] | None = None

    def put(self, step: int, lr: float, counts: dict[str, int], sums: Tensor) -> None:
        """`counts`: samples of the batch that have the loss and each term. `sums`
        [len(counts) + 1]: these, summed over the batch, and the gradients' norm."""
        event = None
        if sums.is_cuda:
            sums = torch.empty_like(sums, device="cpu", pin_memory=True).copy_(
                sums, non_blocking=True
            )
            event = torch.cuda.Event()
            event.record()
        self.pending = step, lr, counts, sums, event, time.perf_counter()

    def take(self) -> Report | None:
        """The last step that was put, if it was not taken yet. Raises NotFinite."""
        if self.pending is None:
            return None
        step, lr, counts, sums, event, done = self.pending
        self.pending = None
        if event is not None:
            event.synchronize()
            done = time.perf_counter()
        *values, norm = sums.tolist()
        terms = {n: v / c for (n, c), v in zip(counts.items(), values, strict=True) if c}
        if not all(map(math.isfinite, (*terms.values(), norm))):
            shown = ", ".join(f"{name} {value:g}" for name, value in terms.items())
            raise NotFinite(f"step {step}: {shown}, norm of the gradients {norm:g}")
        return Report(step, terms.pop(LOSS), terms, norm, lr, done)


class Board:
    """Scalars (means since the last ones), pictures, and the bar. Does nothing on other ranks. A
    log that cannot be written is told once, and the run goes on without."""

    def __init__(self, folder: Path, step: int, steps: int, every: int, main: bool) -> None:
        self.every, self.main = every, main
        self.recent: list[Report] = []
        self.images, self.since = 0, time.perf_counter()
        self.told: set[str] = set()  # what could not be written
        self.writer: Any = None
        if not main:
            return
        from tqdm.auto import tqdm

        with self.optional("logs"):
            self.writer = _writer(folder, step)
        seconds = 1 if sys.stderr.isatty() else 30  # between lines of a log
        options = {"desc": "training", "unit": "step", "mininterval": seconds}
        self.bar = tqdm(total=steps, initial=step, **options)

    def step(self, report: Report, images: int) -> None:
        if not self.main:
            return
        self.recent.append(report)
        self.images += images
        self.bar.update()
        if report.step % self.every == 0:
            self._write()

    def _write(self) -> None:
        report = self.recent[-1]
        loss = sum(r.loss for r in self.recent) / len(self.recent)
        scalars, told = {LOSS: loss, "lr": report.lr}, f"loss {loss:.4f}"
        if self.images:  # none since a pause: then there is no speed
            rate = self.images / max(report.time - self.since, 1e-9)
            scalars["images_per_second"], told = rate, f"{told}, {rate:.1f} images/s"
        self.bar.set_postfix_str(told, refresh=False)
        scalars["grad_norm"] = sum(r.grad_norm for r in self.recent) / len(self.recent)
        for name in dict.fromkeys(name for r in self.recent for name in r.terms):
            seen = [r.terms[name] for r in self.recent if name in r.terms]
            scalars[f"{LOSS}/{name}"] = sum(seen) / len(seen)
        self.recent, self.images = [], 0
        self.since = max(self.since, report.time)
        with self.optional("logs"):
            for name, value in scalars.items() if self.writer is not None else ():
                self.writer.add_scalar(name, value, report.step)

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """A grid; of a video, the first frame."""
        if self.main and self.writer is not None:
            frame = image if image.ndim == 3 else image[0]
            with self.optional("logs"):
                self.writer.add_image(name, frame, step, dataformats="HWC")

    def pause(self) -> None:
        """Time until now does not count for images/s, and neither do the images."""
        self.since, self.images = time.perf_counter(), 0

    @contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """A run goes on without what cannot be written (a full disk), and says so once."""
        try:
            yield
        except OSError as error:
            if what == "logs":
                self.writer = None
            if what not in self.told:
                print(f"{what}: not written from here on: {error}", file=sys.stderr)
            self.told.add(what)

    def close(self) -> None:
        if not self.main:
            return
        if self.recent:  # of a window that the end, or a signal, has cut off
            self._write()
        self.bar.close()
        if self.writer is not None:
            with self.optional("logs"):
                self.writer.close()


def _writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"train: expected tensorboard for the logs, got none: {error}") from error
    # Steps that a killed run had logged beyond its last checkpoint are logged again.
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


@contextmanager
def caught_signals() -> Iterator[list[str]]:
    """Names of signals that came; a second one ends the process as ever."""
    came: list[str] = []
    before = {s: signal.getsignal(s) for s in SIGNALS}

    def note(number: int, _: Any) -> None:
        came.append(signal.Signals(number).name)
        signal.signal(number, before[signal.Signals(number)])

    try:
        for s in SIGNALS:
            signal.signal(s, note)
        yield came
    finally:
        for s in SIGNALS:
            signal.signal(s, before[s])
