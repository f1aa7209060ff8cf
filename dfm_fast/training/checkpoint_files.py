"""Reading a checkpoint's files as data: no code in them runs, no other file is read, and no tensor
is larger than what is stored.

torch.distributed.checkpoint writes its index, and values that are no tensors, as pickles, and reads
them with all that pickles can do.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

INDEX = ".metadata"
TAIL = 1 << 16  # bytes, with the whole directory of one tensor's archive
# What an index is made of; dtypes besides.
KNOWN = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    **dict.fromkeys(("pathlib", "pathlib._local"), ("PosixPath", "WindowsPath")),
}  # fmt: skip


class Unpickler(pickle._Unpickler):
    """Of an index alone. Written in Python: the one in C makes room for as many objects as a
    damaged file claims."""

    dispatch: ClassVar = {  # of what is not here, nothing is ever written
        op: load
        for op, load in pickle._Unpickler.dispatch.items()
        if op not in pickle.BYTEARRAY8 + pickle.PERSID + pickle.BINPERSID + pickle.INST
    }

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if name in KNOWN.get(module, ()) else None
        if found is None and module == "torch":
            found = getattr(torch, name, None)
            found = found if isinstance(found, torch.dtype) else None
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint")
        return found


class Reader(FileSystemReader):
    """With an index that is looked at before anything is read."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        folder = Path(self.path)
        metadata = Unpickler(io.BytesIO((folder / INDEX).read_bytes())).load()
        _check_index(metadata, folder)
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(DefaultLoadPlanner):
    """Values that are no tensors: numbers, texts, and lists and dictionaries of them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # The base class loads anything: it is given what has nothing but values in it.
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


# --- The index ------------------------------------------------------------------------------------


def _check_index(metadata: Any, folder: Path) -> None:
    """Raise ValueError for one that is none, or claims what the files do not hold."""
    if not isinstance(metadata, Metadata) or metadata.storage_meta is None:
        raise ValueError(f"expected an index, got {type(metadata).__name__}")
    stored = _stored(metadata.storage_data, folder)
    for name, value in metadata.state_dict_metadata.items():
        if not isinstance(value, TensorStorageMetadata | BytesStorageMetadata):
            raise ValueError(f"{name}: expected a tensor or bytes, got {type(value).__name__}")
        size = 0
        if isinstance(value, TensorStorageMetadata):
            size = math.prod(value.size) * value.properties.dtype.itemsize
        if size > stored[name]:
            raise ValueError(f"{name}: expected {size} bytes, got {stored[name]}")


def _stored(parts: Mapping[MetadataIndex, Any], folder: Path) -> Counter[str]:
    """Bytes by name. Parts lie in files of the folder, side by side."""
    stored: Counter[str] = Counter()
    used: Counter[str] = Counter()
    for index, part in parts.items():
        name, start, length = part.relative_path, int(part.offset), int(part.length)
        if Path(name).name != name or name == ".." or part.transform_descriptors:
            raise ValueError(f"{index.fqn}: expected a file of the checkpoint, got {name!r}")
        used[name], stored[index.fqn] = used[name] + length, stored[index.fqn] + length
        size = (folder / name).stat().st_size
        if min(start, length) < 0 or max(start + length, used[name]) > size:
            raise ValueError(f"{name}: expected {start + length} bytes or more, got {size}")
        with (folder / name).open("rb") as file:
            file.seek(start + max(0, length - TAIL))
            _check_archive(index.fqn, file.read(min(length, TAIL)), length)
    return stored


def _check_archive(name: str, tail: bytes, length: int) -> None:
    """What torch.save wrote is a zip, not compressed: a small one that claims to be large is not
    unpacked. Its directory is at the end."""
    with zipfile.ZipFile(io.BytesIO(tail)) as archive:
        size = sum(info.file_size for info in archive.infolist())
    if size > length:
        raise ValueError(f"{name}: expected at most {length} bytes, got {size} when unpacked")
