"""Latents on disk: a folder of safetensors shards, each with `latents` [n, ...] and `labels` [n],
and latents.json, which says what they are. Shards are memory-mapped: a sample is read when it is
asked for.

Latents are stored as the model sees them, (z - shift) scale; latents.json has shift and scale, for
the way back.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfm_fast import _checks
from dfm_fast.models._files import arguments_of, read_json
from dfm_fast.models._pretrained import write_bytes
from dfm_fast.training.config import from_json
from dfm_fast.training.datasets import DataConfig, Dataset, Item, require, root_of

NAME = "latents.json"


@dataclass(frozen=True)
class LatentInfo:
    """What the latents of a folder are."""

    shape: tuple[int, ...]  # of one, (C, H, W) or (C, T, H, W)
    samples: int  # that were given; those that turned out unreadable are in no shard
    shard_size: int
    dtype: str
    class_names: tuple[str, ...]
    autoencoder: str  # its class
    fingerprint: str  # of its weights, the data and how it was encoded
    scale: tuple[float, ...]  # one number, or one per channel
    shift: tuple[float, ...]

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_size)

    def write(self, folder: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        write_bytes(folder / NAME, text.encode())

    @classmethod
    def read(cls, folder: Path) -> LatentInfo:
        """Raises FileNotFoundError where there is none."""
        if not (folder / NAME).is_file():
            expected = "a folder written by dfm-fast encode"
            raise FileNotFoundError(f"open_dataset: root: expected {expected}, got {folder}")
        values = read_json(folder / NAME)
        with arguments_of(folder / NAME):
            info = from_json(cls, values)
            info.check()
        return info

    def check(self) -> None:
        """Raise TypeError or ValueError where fields are not what the class says."""
        op = type(self).__name__
        for n in self.shape:
            _checks.integer(op, "shape", n, 1)
        _checks.integer(op, "samples", self.samples, 0)
        _checks.integer(op, "shard_size", self.shard_size, 1)
        if not all(isinstance(name, str) for name in self.class_names):
            _checks.fail(op, "class_names", "names", list(self.class_names), TypeError)
        if not all(isinstance(v, int | float) for v in (*self.scale, *self.shift)):
            _checks.fail(op, "scale and shift", "numbers", (self.scale, self.shift), TypeError)


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def opened(config: DataConfig, split: str) -> Dataset:
    require("safetensors", "safetensors", config.name)
    return Latents(root_of(config, split), labels=config.labels)


class Latents(Dataset):
    """All shards of a folder.

    Raises:
        FileNotFoundError: no such folder, or shards missing. ValueError: a damaged file, or one
            that holds something else; named.
    """

    def __init__(self, folder: str | os.PathLike[str], labels: bool = True) -> None:
        self.folder = Path(folder)
        self.info = info = LatentInfo.read(self.folder)
        super().__init__(info.class_names if labels else ())
        self.shape = info.shape
        # The first that is missing ends the search: the number is only what a file claims.
        paths = (shard_path(self.folder, i) for i in range(info.shards))
        if missing := next((path.name for path in paths if not path.is_file()), None):
            raise FileNotFoundError(
                f"open_dataset: root: expected {info.shards} shards, got {self.folder} without "
                f"{missing}; dfm-fast encode again goes on with them"
            )
        self._files: dict[int, Any] = {}
        self.labels = [self._labels(i) for i in range(info.shards)]
        self.ends = np.cumsum([len(labels) for labels in self.labels]).tolist()
        if not self.ends or not self.ends[-1]:
            _checks.fail("open_dataset", "root", "latents", f"none in {self.folder}")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self.ends, index)
        row = index - (self.ends[shard - 1] if shard else 0)
        x = self._file(shard).get_slice("latents")[row : row + 1][0]
        return x.float(), int(self.labels[shard][row]) if self.num_classes else 0

    def _labels(self, shard: int) -> torch.Tensor:
        """[n] of a shard, which holds what the folder's file says."""
        path, file = shard_path(self.folder, shard), self._file(shard)
        expected = f"latents [n, {', '.join(map(str, self.shape))}] and labels [n]"
        if not {"latents", "labels"} <= set(file.keys()):
            _checks.fail("open_dataset", "root", expected, f"{path} with {sorted(file.keys())}")
        labels, shape = file.get_tensor("labels"), file.get_slice("latents").get_shape()
        if labels.dtype != torch.int64 or shape != [*labels.shape, *self.shape]:
            got = f"{path} with latents {shape} and labels {list(labels.shape)}, {labels.dtype}"
            _checks.fail("open_dataset", "root", expected, got)
        classes = len(self.info.class_names)
        if classes and len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            got = f"{path} with {labels.min()} to {labels.max()}"
            _checks.fail("open_dataset", "root", f"labels of {classes} classes", got)
        return labels

    def _file(self, shard: int) -> Any:
        from safetensors import SafetensorError, safe_open

        path = shard_path(self.folder, shard)
        if shard not in self._files:
            try:
                self._files[shard] = safe_open(path, "pt")
            except SafetensorError as error:
                raise ValueError(
                    f"open_dataset: root: expected safetensors, got {path}, damaged "
                    f"({error}); without it dfm-fast encode makes it again"
                ) from error
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:  # mapped files cannot be sent to another process
        return {**self.__dict__, "_files": {}}


def write_shard(path: Path, items: Sequence[Item], latents: torch.Tensor) -> None:
    """Under a temporary name until it is whole. `latents` [n, ...], labels from `items`."""
    from safetensors.torch import save

    labels = torch.tensor([label for _, label in items], dtype=torch.int64)
    write_bytes(path, save({"latents": latents.contiguous(), "labels": labels}))
