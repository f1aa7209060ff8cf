"""WebDataset shards: tar files in which the files of a sample stand together under one key.

Names and expansion of patterns are webdataset's own functions. Its pipelines are streams, though,
which cannot be resumed in the middle or shuffled exactly: here an index of where every file lies in
its tar makes them map-style.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from dfm_fast import _checks
from dfm_fast.training.datasets import (
    DataConfig,
    Dataset,
    Item,
    numbered,
    report_skipped,
    require,
    root_of,
)
from dfm_fast.training.images import SUFFIXES, Substituting, Unusable, caption, read_picture

LABELS = ("cls", "json")  # an integer; or an object with one under "label"
LARGEST = 1 << 20  # bytes of a label's file; labels, of which each has a class


@dataclass(frozen=True)
class Sample:
    shard: str
    key: str
    start: int  # of the picture's bytes
    size: int
    label: int | None
    caption: str | None = None


def opened(config: DataConfig, split: str) -> Dataset:
    """The samples of all shards that the split's root names."""
    require("webdataset", "webdataset", config.name)
    require("PIL", "pillow", config.name)
    shards = shard_paths(root_of(config, split))
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda shard: _indexed(shard, config.captions), shards))
    samples = [sample for found, _ in parts for sample in found]
    skipped = [pair for _, left_out in parts for pair in left_out]
    if not samples and not skipped:
        _checks.fail("open_dataset", "root", f"pictures ({', '.join(SUFFIXES)})", f"none: {shards}")
    report_skipped(config, skipped, len(samples))
    if config.captions:
        labels, names = numbered([sample.caption or "" for sample in samples])
        pairs = zip(samples, labels, strict=True)
        samples = [replace(sample, label=label, caption=None) for sample, label in pairs]
    else:
        names = _class_names(config, samples)
    data = Tars(samples, names, config.size or 256, config.strict)
    data.skipped = skipped
    return data


class Tars(Substituting):
    """Pictures in tar files, read from where they lie."""

    def __init__(
        self, samples: Sequence[Sample], class_names: Sequence[str], size: int, strict: bool
    ) -> None:
        super().__init__(class_names, strict)
        self.samples = samples
        self.shape = (3, size, size)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return f"{self.samples[index].shard}: {self.samples[index].key}"

    def read(self, index: int) -> Item:
        sample = self.samples[index]
        with open(sample.shard, "rb") as file:
            file.seek(sample.start)
            data = io.BytesIO(file.read(sample.size))
        label = sample.label if self.num_classes else 0
        return read_picture(data, self.shape[-1]), label or 0


def shard_paths(root: Path) -> list[str]:
    """Tar files of a folder, or those that a pattern such as data/{000..099}.tar names."""
    from webdataset.shardlists import expand_urls

    if root.is_dir():
        paths = sorted(str(p) for p in root.glob("*.tar") if not p.name.startswith("."))
    else:
        paths = expand_urls(str(root))
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or not paths:
        raise FileNotFoundError(f"open_dataset: root: expected tar files, got {missing or root}")
    return paths


def _indexed(shard: str, captions: bool) -> tuple[list[Sample], list[tuple[str, str]]]:
    """(samples, what is left out) of a shard; labels or captions are read, pictures are not."""
    samples, left_out = [], []
    try:
        with tarfile.open(shard, "r:") as tar:
            for key, members in _grouped(tar):
                try:
                    samples.append(_sample(shard, key, members, tar, captions))
                except Unusable as error:
                    left_out.append((f"{shard}: {key}", str(error)))
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        left_out.append((shard, f"unreadable ({error})"))
    return samples, left_out


def _grouped(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, extension -> file) of neighbours that share a key."""
    from webdataset.tariterators import base_plus_ext

    last, at = "", -1
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        # tarfile goes where a header sends it: with a negative size, back to itself for ever.
        if member.offset <= at or member.size < 0:
            raise tarfile.ReadError(f"negative size at {member.offset}")
        at = member.offset
        key, extension = base_plus_ext(member.name)
        if not member.isfile() or member.issparse() or key is None:
            continue
        if key != last and members:
            yield last, members
            members = {}
        last = key
        members[extension.lower()] = member
    if members:
        yield last, members


def _sample(
    shard: str,
    key: str,
    members: dict[str, tarfile.TarInfo],
    tar: tarfile.TarFile,
    captions: bool,
) -> Sample:
    pictures = [m for ext, m in members.items() if f".{ext.rsplit('.', 1)[-1]}" in SUFFIXES]
    if not pictures:
        raise Unusable(f"no picture among {sorted(members)}")
    place = shard, key, pictures[0].offset_data, pictures[0].size
    if captions:
        return Sample(*place, None, _caption(tar, members))
    label = next((_label(ext, tar, members[ext]) for ext in LABELS if ext in members), None)
    return Sample(*place, label)


def _caption(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> str:
    if "txt" in members:
        return caption(_bytes(tar, members["txt"]))
    if "json" not in members:
        raise Unusable(f"no caption among {sorted(members)}")
    data = _bytes(tar, members["json"])
    try:
        value = json.loads(data)["caption"]
    except (ValueError, KeyError, TypeError):
        value = None
    if not isinstance(value, str):
        raise Unusable(f'caption: expected a text under "caption", got {data[:20]!r}')
    return caption(value.encode())


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int = -1) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # only of what is no file
    return file.read(most)


def _label(extension: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> int | None:
    data = _bytes(tar, member, LARGEST)
    try:
        value = json.loads(data)
        value = value.get("label") if extension == "json" else value
    except (ValueError, AttributeError, RecursionError):
        value = repr(data[:20])
    if value is not None and (not isinstance(value, int) or not 0 <= value < LARGEST):
        raise Unusable(f"label: expected an integer from 0 on, got {value}")
    return value


def _class_names(config: DataConfig, samples: Sequence[Sample]) -> list[str]:
    """Classes 0 to the largest label; none where some sample has no label."""
    labels = [sample.label for sample in samples if sample.label is not None]
    if not config.labels or len(labels) < len(samples):
        return []
    return [str(i) for i in range(max(labels) + 1)]
