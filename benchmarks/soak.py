"""Trains and samples for minutes, and watches the process: memory, open files, threads.

    python -m benchmarks.soak --minutes 30

A round goes on with a run from its last checkpoint, for some steps, and samples from what is saved:
all that a long job does, so that what a step, a checkpoint or a sampler keeps adds up. After the
warm-up the median of the second half may lie `MEGABYTES` above that of the first: 30 minutes find a
leak of some kilobytes a round. Files and threads may not become more at all.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

MEGABYTES = 8.0
WARM_UP = 3  # rounds: libraries are imported, pools and caches filled
LEAST = 10  # rounds after it, however short the time


@dataclass(frozen=True)
class Usage:
    """Of this process, at a time in seconds."""

    time: float
    megabytes: float  # resident
    files: int
    threads: int

    def __str__(self) -> str:
        return (
            f"{self.time:7.0f} s {self.megabytes:8.1f} MB {self.files:4} files "
            f"{self.threads:3} threads"
        )


def usage(start: float) -> Usage:
    gc.collect()  # of what is not frozen, which is quick
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    files, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    return Usage(time.monotonic() - start, megabytes, files, threads)


def soak(
    work: Callable[[int], None], seconds: float, tell: Callable[[Usage], None] | None = None
) -> list[Usage]:
    """Do rounds of work for so long, and measure after each; the warm-up is left out. `tell` gets
    one a minute."""
    start, told, seen, count = time.monotonic(), 0.0, [], 0
    gc.freeze()
    while count < WARM_UP + LEAST or time.monotonic() - start < seconds:
        work(count)
        count += 1
        now = usage(start)
        if count > WARM_UP:
            seen.append(now)
        if tell is not None and now.time >= told:
            tell(now)
            told = now.time + 60
    return seen


def growth(seen: Sequence[Usage]) -> list[str]:
    """What has become more, in words."""
    halves = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    before, after = (statistics.median(u.megabytes for u in half) for half in halves)
    found = []
    if after - before > MEGABYTES:
        got = f"{after - before:.1f} MB in {len(seen)} rounds"
        found.append(f"memory: expected at most {MEGABYTES} MB more, got {got}")
    for name in ("files", "threads"):
        first, last = (max(getattr(u, name) for u in half) for half in halves)
        if last > first:
            found.append(f"{name}: expected at most {first}, got {last}")
    return found


class Rounds:
    """A small DFM on digits."""

    def __init__(self, folder: Path, steps: int = 4) -> None:
        self.folder, self.steps = folder, steps

    def __call__(self, count: int) -> None:
        from dfm_fast.training import loop, pictures, saved
        from dfm_fast.training.config import FlowConfig, ModelConfig, preset

        config = preset(
            "digits", self.folder, steps=(count + 1) * self.steps, save_every=self.steps,
            sample_every=self.steps, sample_count=4, batch=8, device="cpu",
            model=ModelConfig(width=32, depth=2, heads=2, patch_sizes=(2, 4)),
            flow=FlowConfig(sample_steps=(2, 1)),
        )  # fmt: skip
        loop.train(config, resume=count > 0)
        recipe, model = saved.open_model(self.folder)
        labels = torch.arange(4)
        x = pictures.sample(model, recipe.build_flow(), recipe, labels, 4, steps=(2, 1))
        assert x.isfinite().all()
        for old in (self.folder / "samples").iterdir():
            old.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    seconds = 60 * parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as folder:
        seen = soak(Rounds(Path(folder)), seconds, lambda now: print(now, flush=True))
    print(seen[0], seen[-1], f"{len(seen)} rounds after the warm-up", sep="\n")
    found = growth(seen)
    print("\n".join(found) or "flat")
    return len(found)


if __name__ == "__main__":
    raise SystemExit(main())
