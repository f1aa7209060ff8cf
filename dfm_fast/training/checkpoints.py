"""Checkpoints of a run: written whole or not at all, by all ranks, and read by any number of them.

A checkpoint is a folder `step-00001000` of torch.distributed.checkpoint and the run's recipe. It is
written under a temporary name, flushed to the disk and renamed; only then the oldest go.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, TensorStorageMetadata

from dfm_fast.training.checkpoint_files import Planner, Reader
from dfm_fast.training.distributed import World
from dfm_fast.training.outputs import RunError

PREFIX, TEMPORARY = "step-", ".tmp-"
NAME = re.compile(rf"{PREFIX}\d+")


class Written(Protocol):
    """What a run's weights are, as files beside them: its recipe."""

    def write(self, folder: Path) -> None: ...


class CheckpointError(RunError):
    """A checkpoint that could not be written; the older ones are as they were."""


class Checkpoints:
    """The checkpoints in a folder, of which the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int = 2, world: World | None = None) -> None:
        self.folder, self.keep = Path(folder), keep
        self.world = world or World(0, 1, torch.device("cpu"))

    def all(self) -> list[Path]:
        """Whole ones, oldest first; folders of other names (a user's copies) are none."""
        named = [p for p in self.folder.glob(f"{PREFIX}*") if NAME.fullmatch(p.name)]
        return sorted((p for p in named if whole(p)), key=step_of)

    def latest(self) -> Path | None:
        found = self.all()
        return found[-1] if found else None

    def save(self, step: int, state: dict[str, Any], recipe: Written) -> Path:
        """All ranks call it. Raises CheckpointError on all of them where one cannot write."""
        target = self.folder / f"{PREFIX}{step:08d}"
        if whole(target):  # the same run at the same step
            return target
        temporary = self.folder / f"{TEMPORARY}{target.name}"
        self._together(target, lambda: self._prepare(temporary))
        self._together(target, lambda: _write(state, temporary), everywhere=True)
        self._together(target, lambda: self._finish(temporary, target, recipe))
        return target

    def _together(self, target: Path, action: Callable[[], Any], everywhere: bool = False) -> None:
        """Do it on rank 0, or everywhere; fail everywhere where it fails somewhere."""
        error: BaseException | None = None
        if everywhere or self.world.main:
            try:
                action()
            except (OSError, RuntimeError, dcp.CheckpointException) as caught:
                error = caught
        if not self.world.any(error is not None):
            return
        if self.world.main:
            shutil.rmtree(self.folder / f"{TEMPORARY}{target.name}", ignore_errors=True)
        last = self.latest() or "none"
        raise CheckpointError(
            f"could not save {target}: {reason(error)}; the last good checkpoint: {last}"
        ) from error

    def _prepare(self, temporary: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{TEMPORARY}*"):  # of a run that was killed
            shutil.rmtree(left)
        temporary.mkdir()

    def _finish(self, temporary: Path, target: Path, recipe: Written) -> None:
        recipe.write(temporary)
        flush(temporary)
        shutil.rmtree(target, ignore_errors=True)  # one of that name that is not whole
        os.rename(temporary, target)
        flush(self.folder)
        for old in self.all()[: -self.keep]:
            # Renamed first: what is half removed must not look whole.
            gone = self.folder / f"{TEMPORARY}{old.name}"
            os.rename(old, gone)
            shutil.rmtree(gone, ignore_errors=True)


def load(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fill `state` (tensors in place) from a checkpoint, whatever ranks wrote it.

    Raises:
        ValueError: one that names every key that is missing, or of another shape; a damaged file.
    """
    check_fits(path, state)
    with _alone_is_fine(), _named(path):
        dcp.load(state, storage_reader=Reader(path), planner=Planner())
    return state


def _write(state: dict[str, Any], folder: Path) -> None:
    with _alone_is_fine():
        dcp.save(state, checkpoint_id=folder)


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Without torch's warning that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What cannot be read is a ValueError that names the checkpoint, and the one before."""
    try:
        yield
    # Pickle raises all sorts of errors for bad bytes; CheckpointException is no Exception.
    except (Exception, dcp.CheckpointException) as error:
        older = [p for p in Checkpoints(path.parent).all() if step_of(p) < step_of(path)]
        rest = (
            f"; the one before, {older[-1]}, is used where this one is moved away" if older else ""
        )
        raise ValueError(f"{path}: damaged checkpoint: {reason(error)}{rest}") from error


def _index(path: Path) -> dict[str, STORAGE_TYPES]:
    """What is stored, by the keys that torch.distributed.checkpoint has made."""
    with _named(path):
        return Reader(path).read_metadata().state_dict_metadata


def check_fits(path: Path, state: Mapping[str, Any]) -> None:
    saved, wrong = _index(path), []
    for name, own in _flat(state).items():
        there = saved.get(name)
        if there is None:
            wrong.append(f"{name}: missing")
        elif isinstance(there, TensorStorageMetadata) != isinstance(own, Tensor):
            wrong.append(f"{name}: expected {type(own).__name__}, got {type(there).__name__}")
        elif isinstance(there, TensorStorageMetadata) and there.size != own.shape:
            wrong.append(f"{name}: expected shape {list(own.shape)}, got {list(there.size)}")
    if wrong:
        raise ValueError(f"checkpoint {path} does not fit the model: " + "; ".join(sorted(wrong)))


def shapes_in(path: Path, part: str) -> dict[str, Tensor]:
    """Tensors without memory like those of a part of a checkpoint, such as "ema"."""
    return {
        name: torch.empty(v.size, dtype=v.properties.dtype, device="meta")
        for name, v in _index(path).items()
        if name.startswith(f"{part}.") and isinstance(v, TensorStorageMetadata)
    }


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys as torch.distributed.checkpoint joins them."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, Mapping)
        found |= _flat(value, f"{name}.") if nested else {name: value}
    return found


def whole(path: Path) -> bool:
    return (path / ".metadata").exists()


def step_of(path: Path) -> int:
    """-1 for a folder of another name, such as a copy."""
    return int(path.name.removeprefix(PREFIX)) if NAME.fullmatch(path.name) else -1


def flush(folder: Path) -> None:
    """To the disk: the entries of a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: BaseException | None) -> str:
    """In one line; of what failed on the ranks, the first."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while error is not None and not isinstance(error, OSError) and error.__cause__ is not None:
        error = error.__cause__
    if "inline_container" in str(error):  # torch's way to say it
        return "OSError: a file could not be written whole: is the disk full?"
    return "another rank failed" if error is None else f"{type(error).__name__}: {error}"
