"""What a run tells: losses without waiting for the device, TensorBoard, a progress bar."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfm_fast.training.orders import SIGNALS


class NotFinite(RuntimeError):
    """A loss or a gradient that is inf or nan."""


@dataclass(frozen=True)
class Report:
    """What a step came to, over all ranks."""

    step: int  # of the first: 1
    loss: float  # sum over levels, mean over the batch
    levels: list[float]  # mean over samples that have the level active; nan where none has
    grad_norm: float
    lr: float


class Reports:
    """Numbers of a step on their way to the host: read one step late, so that the device has gone
    on by then."""

    def __init__(self) -> None:
        self.pending: tuple[int, float, list[int], Tensor, Any] | None = None

    def put(self, step: int, lr: float, active: list[int], batch: int, sums: Tensor) -> None:
        """`sums` [L + 1]: the losses of the levels, summed over a batch, and the gradients' norm.
        `active`: samples of the batch that have each level."""
        event = None
        if sums.is_cuda:
            sums = torch.empty_like(sums, device="cpu", pin_memory=True).copy_(
                sums, non_blocking=True
            )
            event = torch.cuda.Event()
            event.record()
        self.batch = batch
        self.pending = step, lr, active, sums, event

    def take(self) -> Report | None:
        """The last step that was put, if it was not taken yet. Raises NotFinite."""
        if self.pending is None:
            return None
        step, lr, active, sums, event = self.pending
        self.pending = None
        if event is not None:
            event.synchronize()
        *levels, norm = sums.tolist()
        loss = sum(levels) / self.batch
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFinite(f"step {step}: loss {loss}, norm of the gradients {norm}")
        means = [v / n if n else math.nan for v, n in zip(levels, active, strict=True)]
        return Report(step, loss, means, norm, lr)


class Board:
    """Scalars (means since the last ones), pictures, and the bar. Does nothing on other ranks."""

    def __init__(self, folder: Path, step: int, steps: int, every: int, main: bool) -> None:
        self.every, self.main = every, main
        self.recent: list[Report] = []
        self.images, self.since = 0, time.perf_counter()
        if not main:
            return
        from tqdm.auto import tqdm

        self.writer = _writer(folder, step)
        seconds = 1 if sys.stderr.isatty() else 30  # between lines of a log
        options = {"desc": "training", "unit": "step", "mininterval": seconds}
        self.bar = tqdm(total=steps, initial=step, **options)

    def step(self, report: Report, images: int) -> None:
        self.recent.append(report)
        self.images += images
        if not self.main:
            self.recent.clear()
            return
        self.bar.update()
        if report.step % self.every == 0:
            self._write(report)

    def _write(self, report: Report) -> None:
        now = time.perf_counter()
        rate = self.images / max(now - self.since, 1e-9)
        loss = sum(r.loss for r in self.recent) / len(self.recent)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} images/s", refresh=False)
        scalars = {"loss": loss, "lr": report.lr, "images_per_second": rate}
        scalars["grad_norm"] = sum(r.grad_norm for r in self.recent) / len(self.recent)
        for s in range(len(report.levels)):
            seen = [r.levels[s] for r in self.recent if not math.isnan(r.levels[s])]
            if seen:
                scalars[f"loss/level_{s}"] = sum(seen) / len(seen)
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, report.step)
        self.recent, self.images, self.since = [], 0, now

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """A grid; of a video, the first frame."""
        if self.main:
            frame = image if image.ndim == 3 else image[0]
            self.writer.add_image(name, frame, step, dataformats="HWC")

    def pause(self) -> None:
        """Time until now does not count for images/s."""
        self.since, self.images = time.perf_counter(), 0

    def close(self) -> None:
        if self.main:
            self.bar.close()
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
        signal.signal(number, before[number])

    try:
        for s in SIGNALS:
            signal.signal(s, note)
        yield came
    finally:
        for s in SIGNALS:
            signal.signal(s, before[s])
