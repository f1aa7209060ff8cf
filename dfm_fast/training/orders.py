"""Which sample comes when, as a function of (seed, position): nothing that a resumed run would have
to restore, and the same on any number of ranks and workers.

Position p counts samples since the first step. Every epoch, len(dataset) positions, is a
permutation of its own. A step takes the next B positions, its global batch; with W ranks and A
parts (gradient accumulation), part a of rank r is the (a W + r)-th of its A W slices.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

SIGNALS = signal.SIGTERM, signal.SIGINT


class Draw(NamedTuple):
    """A sample as it comes: its index in the dataset, whether mirrored, whether without label."""

    index: int  # type: ignore[assignment]  # tuples have a method so called
    flip: bool
    drop: bool


def draw(seed: int, position: int, length: int, class_dropout: float = 0.0) -> Draw:
    """What comes at a position, in a dataset of `length` samples."""
    epoch, place = divmod(position, length)
    # Python's generator is the same everywhere for an int, and all bits of it count.
    generator = random.Random(position << 64 | seed)
    flip, drop = generator.random() < 0.5, generator.random() < class_dropout
    return Draw(int(_permutation(seed, epoch, length)[place]), flip, drop)


@lru_cache(maxsize=2)  # this epoch's and, at its end, the next one's
def _permutation(seed: int, epoch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(random.Random(epoch << 64 | seed).getrandbits(63))
    return torch.randperm(length, generator=generator)


class Items(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Any]: ...


class Ordered(Dataset[tuple[Tensor, Any]]):
    """A dataset by position, with flips and dropped labels.

    Args:
        dataset: map-style, of (x, label).
        flip: mirror (the last axis of x) every other sample at random.
        class_dropout: chance of the label `null_class`.
    """

    def __init__(
        self, dataset: Items, seed: int, flip: bool, class_dropout: float, null_class: int
    ) -> None:
        self.dataset, self.seed, self.flip = dataset, seed, flip
        self.class_dropout, self.null_class = class_dropout, null_class

    def __getitem__(self, position: int) -> tuple[Tensor, Any]:
        drawn = draw(self.seed, position, len(self.dataset), self.class_dropout)
        x, label = self.dataset[drawn.index]
        x = x.flip(-1) if self.flip and drawn.flip else x
        return x, self.null_class if drawn.drop else label


class Slices(Sampler[list[int]]):
    """Positions of one rank's parts, step after step from `first`."""

    def __init__(
        self, first: int, steps: int, batch: int, parts: int, rank: int, world_size: int
    ) -> None:
        self.first, self.steps, self.batch = first, steps, batch
        self.parts, self.rank, self.world_size = parts, rank, world_size

    @property
    def rows(self) -> int:
        """Of a part."""
        return self.batch // (self.parts * self.world_size)

    def start(self, part: int) -> int:
        """First row of a part in the global batch."""
        return (part * self.world_size + self.rank) * self.rows

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            for part in range(self.parts):
                start = self.first + step * self.batch + self.start(part)
                yield list(range(start, start + self.rows))


def loader(ordered: Ordered, slices: Slices, workers: int, pin_memory: bool) -> DataLoader[Any]:
    """Batches (x [n, ...], labels [n]) in order, whatever the number of workers. `batches` starts
    them."""
    return DataLoader(
        ordered,
        batch_sampler=slices,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals,
    )


def batches(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """An iterator, whose workers never die of a signal that the whole process group gets: the
    process that trains needs them to finish its step."""
    # Held back until a worker has come to `leave_signals`, which runs after torch's own handlers.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def leave_signals(_: int = 0) -> None:
    """In a worker: signals are the parent's matter. Its own SIGTERM, with which Python ends the
    workers that are left at its exit, still ends them: else it would wait for them for ever."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:  # for native threads that do not block it
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    while True:
        came = signal.sigwaitinfo(SIGNALS)
        if came.si_signo == signal.SIGTERM and came.si_pid == os.getppid():
            os._exit(0)
