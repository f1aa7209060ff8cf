"""A folder of images; what a picture file becomes, for every dataset that has picture files.

Grey becomes three equal channels, transparent pixels lie on white, palettes and CMYK are converted,
16-bit grey keeps its depth, EXIF orientation is applied. Then the largest centred square is resized
with an antialiased filter (Pillow's bicubic).
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dfm_fast.training.datasets import (
    DataConfig,
    Dataset,
    Item,
    files_by_class,
    numbered,
    report_skipped,
    require,
)

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
WHITE = (255, 255, 255, 255)


class Unusable(ValueError):
    """A file that is skipped, and why."""


def opened(config: DataConfig, split: str) -> Dataset:
    """The images below the split's folder."""
    require("PIL", "pillow", config.name)
    classes = dataclasses.replace(config, labels=config.labels and not config.captions)
    files, names = files_by_class(classes, split, SUFFIXES)
    size = config.size or 256
    # Headers only: what takes time is the disk. Odd metadata is no reason to leave a file out.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda file: _look(file[0], size, config.captions), files))
    pairs = list(zip(files, seen, strict=True))
    kept = [(file, text) for file, (reason, text) in pairs if reason is None]
    skipped = [(str(file[0]), reason) for file, (reason, _) in pairs if reason is not None]
    report_skipped(config, skipped, len(kept))
    files = [file for file, _ in kept]
    if config.captions:
        labels, names = numbered([text for _, text in kept])
        files = [(path, label) for (path, _), label in zip(files, labels, strict=True)]
    data = ImageFiles(files, names, size, config.strict)
    data.skipped = skipped
    return data


def _look(path: Path, size: int, captions: bool) -> tuple[str | None, str]:
    """(why a picture cannot be used, its caption)"""
    if (reason := unusable(path, size)) or not captions:
        return reason, ""
    beside = path.with_suffix(".txt")
    try:
        return None, caption(beside.read_bytes())
    except Unusable as error:
        return str(error), ""
    except OSError:
        return f"no caption: {beside.name} cannot be read", ""


def caption(data: bytes) -> str:
    """A text in UTF-8, in one line; Unusable where there is none."""
    try:
        text = " ".join(data.decode().split())
    except UnicodeDecodeError:
        raise Unusable(f"caption: expected UTF-8, got {data[:20]!r}") from None
    if not text:
        raise Unusable("caption: expected a text, got an empty one")
    return text


class Substituting(Dataset):
    """Samples of which some turn out unusable when they are read in full: then the next usable one
    stands in (the same in every run), with a warning; an error with `strict`."""

    def __init__(self, class_names: Sequence[str], strict: bool) -> None:
        super().__init__(class_names)
        self.strict = strict
        self._broken: dict[int, str] = {}

    def read(self, index: int) -> Item:
        """The sample, or `Unusable`."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Of the sample, in messages."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Item:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(index)
        for offset in range(count):
            i = (index + offset) % count
            if i in self._broken:
                continue
            try:
                return self.read(i)
            except Unusable as error:
                self.leave_out(i, str(error))
        raise ValueError(f"open_dataset: root: expected files that can be read, got {self.skipped}")

    def leave_out(self, index: int, reason: str) -> None:
        """Remember a sample that cannot be used, and warn; with `strict`, raise."""
        name = self.name(index)
        if self.strict:
            message = f"open_dataset: root: expected a file that can be read, got {name}: {reason}"
            raise ValueError(message)
        self._broken[index] = reason
        self.skipped.append((name, reason))
        warnings.warn(f"{name}: {reason}; skipped ({len(self.skipped)} so far)", stacklevel=3)


class ImageFiles(Substituting):
    """Picture files, read when they are asked for."""

    def __init__(
        self, files: Sequence[tuple[Path, int]], class_names: Sequence[str], size: int, strict: bool
    ) -> None:
        super().__init__(class_names, strict)
        self.files = files
        self.shape = (3, size, size)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index][0])

    def read(self, index: int) -> Item:
        path, label = self.files[index]
        return read_picture(path, self.shape[-1]), label


# --- Pictures -------------------------------------------------------------------------------------


def unusable(file: str | os.PathLike[str] | IO[bytes], size: int) -> str | None:
    """Why a picture cannot be used, as far as its header tells; None where it can."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return too_small(image.size, size)
    except Exception as error:  # Pillow's readers raise all sorts of it for bad bytes
        return str(unreadable(error))


def too_small(sides: tuple[int, int], size: int) -> str | None:
    if min(sides) >= size:
        return None
    return f"{sides[0]} x {sides[1]} is smaller than {size} x {size}"


def read_picture(file: str | os.PathLike[str] | IO[bytes], size: int) -> Tensor:
    """float32 [3, size, size] in [-1, 1].

    Raises:
        Unusable: not a picture, damaged, or smaller than that.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            if reason := too_small(image.size, size):
                raise Unusable(reason)
            return squared(plain(ImageOps.exif_transpose(image)), size)
    except (Unusable, MemoryError):
        raise
    except Exception as error:
        raise unreadable(error) from error


def plain(image: Image) -> Image:
    """Any mode -> RGB, or F (grey, from 0 to 255, of more than 8 bits)."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would cut it off at 255
        values = np.asarray(image).astype(np.float32)
        if values.min() < 0 or values.max() > 65535:
            raise Unusable(f"mode {image.mode} with values outside 0 to 65535")
        return Image.fromarray(values / 257)
    if image.mode == "F":
        raise Unusable("mode F: floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB")


def squared(image: Image, size: int) -> Tensor:
    """RGB or F -> float32 [3, size, size] in [-1, 1]: centre crop, antialiased resize."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    x = torch.tensor(np.asarray(fitted), dtype=torch.float32).view(size, size, -1).permute(2, 0, 1)
    return (x / 127.5 - 1).clamp(-1, 1).expand(3, size, size).contiguous()


def to_pixels(x: Tensor) -> np.ndarray:
    """[..., C, H, W] in [-1, 1] -> uint8 [..., H, W, 3], for files."""
    x = x.detach().float().cpu()
    if x.shape[-3] == 1:
        x = x.expand(*x.shape[:-3], 3, *x.shape[-2:])
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().movedim(-3, -1).numpy()


def unreadable(error: Exception) -> Unusable:
    """Why, in one short line."""
    told = str(error).splitlines()[0][:100] if str(error) else ""
    return Unusable(f"unreadable ({type(error).__name__}: {told})")
