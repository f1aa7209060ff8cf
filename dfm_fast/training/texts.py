"""Texts to train on: encoded once by frozen encoders, kept in the run's folder, memory-mapped.

A folder of `TextTable`s of `SHARD` texts each; names of the files tell the encoders, the layout and
the texts, so that a run that goes on, or one that was stopped here, encodes nothing twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from dfm_fast import _checks
from dfm_fast.models import TextEncoder, TextEncoders, TextLayout, TextTable
from dfm_fast.models.text_layouts import ENCODERS
from dfm_fast.training.distributed import World
from dfm_fast.training.encoders import fingerprint

SHARD = 256  # texts of a file; their states are in memory while it is written
CLIP_LENGTH = 77
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TextConfig:
    """Frozen text encoders in local folders, some of the three; none: learned tokens of classes."""

    clip_l: tuple[Path, ...] = ()
    """Folder of CLIP-L, as a model hub has it; or two, the model's and the tokenizer's."""

    clip_g: tuple[Path, ...] = ()
    gemma: tuple[Path, ...] = ()

    clip_tokens: Literal["all", "prompt"] = "all"
    """Whether CLIP's padding behind a text counts; without it there is less to keep and to read."""

    max_tokens: int = 256
    """Of Gemma, for a text."""

    template: str = "{}"
    """What every text is put in, such as "a photo of a {}"."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of the encoders, and of what is kept of texts, on disk: in bf16 0.1 MB of each for CLIP-L,
    0.2 MB for CLIP-G, 5 kB a token for Gemma."""

    @property
    def folders(self) -> dict[str, tuple[Path, ...]]:
        """Of the encoders that are given."""
        return {name: getattr(self, name) for name in ENCODERS if getattr(self, name)}


class Texts(NamedTuple):
    """What a run knows of its texts."""

    encoders: TextEncoders | None  # of rank 0
    layout: TextLayout

    def of_rank_0(self) -> TextEncoders:
        assert self.encoders is not None
        return self.encoders


def load(op: str, config: TextConfig, world: World) -> Texts:
    """The encoders that are given, by rank 0.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `TextEncoder.load`.
    """
    for name, folder in config.folders.items():
        if len(folder) > 2:
            expected = "one folder, or the model's and the tokenizer's"
            _checks.fail(op, f"text.{name}", expected, f"{len(folder)} folders")
    encoders = _load(config, world) if world.main else None
    return Texts(encoders, world.share(lambda: encoders and encoders.layout))


def _load(config: TextConfig, world: World) -> TextEncoders:
    device, dtype = world.device, DTYPES[config.dtype]
    encoders = {
        name: TextEncoder.load(name, (folder[0], folder[-1]), device=device, dtype=dtype)
        for name, folder in config.folders.items()
    }
    widths = {name: encoders[name].width if name in encoders else 0 for name in ENCODERS}
    lengths = [CLIP_LENGTH, *(e.max_length for e in encoders.values() if e.is_clip)]
    layout = TextLayout(
        **widths, clip_tokens=config.clip_tokens, clip_length=min(lengths),
        max_tokens=config.max_tokens, template=config.template,
    )  # fmt: skip
    return TextEncoders(layout, encoders, cache=0)


def encoded(texts: Texts, captions: Sequence[str], folder: Path, world: World) -> TextTable:
    """The table of captions in a folder, where rank 0 writes what is missing. The encoders are then
    on the host."""
    paths = world.share(lambda: _write(texts.of_rank_0(), captions, folder))
    return TextTable.joined([TextTable.load(path) for path in paths])


def _write(encoders: TextEncoders, captions: Sequence[str], folder: Path) -> list[Path]:
    from tqdm.auto import tqdm

    modules = [encoder.module for encoder in encoders.encoders.values()]
    name = fingerprint(modules, encoders.layout, captions)
    parts = [captions[i : i + SHARD] for i in range(0, len(captions), SHARD)]
    files = {folder / f"{name}-{i:05d}.safetensors": part for i, part in enumerate(parts)}
    folder.mkdir(parents=True, exist_ok=True)
    for old in set(folder.glob("*.safetensors")) - files.keys():  # of other texts
        old.unlink()
    missing = {path: part for path, part in files.items() if not path.exists()}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for path, part in tqdm(missing.items(), "texts", disable=not missing):
            TextTable.encode(encoders, part).save(path)
    _repeat([str(w.message) for w in found])
    encoders.to("cpu")
    return list(files)


def _repeat(messages: Sequence[str]) -> None:
    """Warnings, of which there may be one for each text: the first few."""
    for message in messages[:3]:
        warnings.warn(message, stacklevel=3)
    if len(messages) > 3:
        warnings.warn(f"and {len(messages) - 3} more such warnings of texts", stacklevel=3)
