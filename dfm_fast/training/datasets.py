"""Data, all map-style: `open_dataset(config, split)[index]` is (x, label).

x is float32 [C, H, W] or [C, T, H, W] in [-1, 1] (latents: as they were written). Order, shuffling
and flips are the training loop's, so that a run can be resumed at any step.

| name | what it reads |
|---|---|
| digits | scikit-learn's handwritten digits, 8 x 8, resized; embedded, with labels |
| photos | crops of photographs that scikit-learn and Matplotlib ship; embedded, without labels |
| images | a folder of images, subfolders are classes |
| videos | a folder of videos, subfolders are classes |
| webdataset | tar shards of images with a label (.cls) |
| latents | safetensors shards written by `dfm-fast encode` |
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from dfm_fast import _checks

Name = Literal["digits", "photos", "images", "videos", "webdataset", "latents"]
SPLITS = ("train", "test")
CAPTIONED = ("images", "webdataset")
Item = tuple[Tensor, int]


@dataclass(frozen=True)
class DataConfig:
    """What to train on or to evaluate against."""

    name: Name = "digits"
    """digits and photos are embedded; the others read `root`."""

    root: Path | None = None
    """Folder (webdataset also: one tar file, or a pattern such as data/{000..099}.tar)."""

    test_root: Path | None = None
    """The same for the test split, with the same subfolders for classes."""

    size: int = 0
    """Height and width; 0: 16 for digits, 64 for photos, 256 else; latents keep theirs."""

    frames: int = 17
    """Frames of a clip (videos)."""

    frame_stride: int = 1
    """Take every n-th frame of a video."""

    crop_stride: int = 4
    """Distance between neighbouring crops of a photograph, in pixels."""

    labels: bool = True
    """False: without class labels, whatever the data has."""

    captions: bool = False
    """Each picture's own text in place of a class: the .txt beside it; in shards also "caption" in
    its .json. A class is then a caption, of that name."""

    strict: bool = False
    """Unreadable or too small files are an error; otherwise they are skipped, counted and named."""

    flip: bool = False
    """Mirror every other sample at random (done by the training loop)."""


class Dataset(torch.utils.data.Dataset[Item]):
    """What all datasets have.

    Attributes:
        shape: of x, (C, H, W) or (C, T, H, W).
        class_names: one per class, empty for data without labels (then every label is 0).
        skipped: (name, reason) of every file that was left out.
    """

    shape: tuple[int, ...]

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        self.class_names = tuple(class_names)
        self.skipped: list[tuple[str, str]] = []

    @property
    def num_classes(self) -> int:
        """0: without labels."""
        return len(self.class_names)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Item:
        raise NotImplementedError


def open_dataset(config: DataConfig, split: str = "train") -> Dataset:
    """The dataset that a configuration names.

    Args:
        config: see `DataConfig`.
        split: "train" or "test".

    Raises:
        ImportError: a library that this kind of data needs, by name. FileNotFoundError, ValueError:
            no such folder, nothing usable in it, bad sizes; with `strict`, the files that are
            unreadable or too small.
    """
    _checks.choice("open_dataset", "split", split, SPLITS)
    _checks.choice("open_dataset", "name", config.name, list(_OPENERS))
    for field, least in (("size", 0), ("frames", 1), ("frame_stride", 1), ("crop_stride", 1)):
        _checks.integer("open_dataset", field, getattr(config, field), least)
    if config.captions and (config.name not in CAPTIONED or not config.labels):
        expected = f"False without labels and for data other than {' and '.join(CAPTIONED)}"
        _checks.fail("open_dataset", "captions", expected, f"True for {config.name}")
    return _OPENERS[config.name](config, split)


# --- Embedded -------------------------------------------------------------------------------------


class TensorData(Dataset):
    """Samples that are all in memory."""

    def __init__(self, x: Tensor, labels: Tensor, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        self.x, self.labels = x, labels  # [N, C, H, W], [N]
        self.shape = tuple(x.shape[1:])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Item:
        return self.x[index], int(self.labels[index])


def digits(config: DataConfig, split: str) -> Dataset:
    """1797 digits of 8 x 8, four fifths of every class for training."""
    require("sklearn", "scikit-learn", config.name)
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    images, labels = parts[SPLITS.index(split)], parts[2 + SPLITS.index(split)]
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    size = config.size or 16
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=size < 8)
    names = [str(digit) for digit in range(10)] if config.labels else ()
    return TensorData(x, torch.tensor(labels) * bool(names), names)


class Crops(Dataset):
    """Square crops of pictures at given places."""

    def __init__(self, pictures: Sequence[Tensor], places: Tensor, size: int) -> None:
        super().__init__()
        self.pictures, self.places = pictures, places  # uint8 [3, H, W]; [N, 3]: picture, top, left
        self.shape = (3, size, size)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Item:
        picture, top, left = self.places[index].tolist()
        size = self.shape[-1]
        crop = self.pictures[picture][:, top : top + size, left : left + size]
        return crop.float() / 127.5 - 1, 0


def photos(config: DataConfig, split: str) -> Dataset:
    """Crops on a grid, of regions that are the split's alone: no pixel is in both splits."""
    size, places = config.size or 64, []
    if size > min(min(picture.shape[1:]) for picture in photographs()):
        _checks.fail("open_dataset", "size", "crops that fit the photographs", size)
    for i, picture in enumerate(photographs()):
        taken = held_out(picture.shape[1], picture.shape[2], size)
        # Pixels of the test region in every window: none for training, all for test.
        count = F.avg_pool2d(taken[None, None].double(), size, config.crop_stride)[0, 0]
        inside = count == 0 if split == "train" else count == 1
        corners = inside.nonzero() * config.crop_stride
        places.append(F.pad(corners, (1, 0), value=i))
    where = torch.cat(places)
    if not len(where):
        expected = f"crops small enough for a {split} region of their own"
        _checks.fail("open_dataset", "size", expected, size)
    return Crops(photographs(), where, size)


@cache
def photographs() -> tuple[Tensor, ...]:
    """uint8 [3, H, W]: a palace, a flower, a portrait."""
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        require(module, package, "photos")
    require("PIL", "pillow", "photos")
    from matplotlib.cbook import get_sample_data
    from PIL import Image
    from sklearn.datasets import load_sample_images

    arrays = load_sample_images().images
    portrait: Any = get_sample_data("grace_hopper.jpg")  # a file, as it is no array's
    with portrait as file:
        arrays.append(importlib.import_module("numpy").asarray(Image.open(file).convert("RGB")))
    return tuple(torch.tensor(a).permute(2, 0, 1).contiguous() for a in arrays)


def held_out(height: int, width: int, size: int) -> Tensor:
    """bool [height, width]: the test region, squares of 3/2 the crop's side in every fourth place,
    by a knight's moves, so that they lie all over the picture with room between them."""
    side = size * 3 // 2
    rows, columns = (torch.arange(n) // side for n in (height, width))
    return (columns + 2 * rows[:, None]) % 4 == 1


# --- What the readers of files share --------------------------------------------------------------


def require(module: str, package: str, name: str) -> Any:
    """The module, or an error that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"open_dataset: {name}: expected {package}, got none (pip install 'dfm_fast[train]')"
        ) from error


def root_of(config: DataConfig, split: str) -> Path:
    """The split's folder."""
    field = "root" if split == "train" else "test_root"
    root = getattr(config, field)
    if root is None:
        _checks.fail("open_dataset", field, f"a path for {config.name} ({split})", None)
    return Path(root)


def files_by_class(
    config: DataConfig, split: str, suffixes: Iterable[str]
) -> tuple[list[tuple[Path, int]], list[str]]:
    """Sorted (path, label) below the split's folder, and the names of its classes.

    Subfolders are classes, in alphabetical order; files in the folder itself have none, and then
    nothing has. Links are followed; what begins with a dot is left out.
    """
    root, suffixes = root_of(config, split), tuple(suffixes)
    if not root.is_dir():
        raise FileNotFoundError(f"open_dataset: root: expected a folder, got {root}")
    paths = sorted(path for path in _files_below(root) if path.suffix.lower() in suffixes)
    if not paths:
        kinds = ", ".join(suffixes)
        _checks.fail("open_dataset", "root", f"files ({kinds})", f"none in {root}")
    parts = [path.relative_to(root).parts for path in paths]
    loose = [p[0] for p in parts if len(p) == 1]
    if config.labels and loose and len(loose) < len(parts):
        warnings.warn(
            f"open_dataset: root: {len(loose)} files lie in {root} itself ({loose[0]} ...): its "
            "subfolders are no classes, and the data has no labels",
            stacklevel=2,
        )
    if not config.labels or loose:
        return [(path, 0) for path in paths], []
    names = class_folders(config, root)
    return [(path, names.index(p[0])) for path, p in zip(paths, parts, strict=True)], names


def _files_below(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """All that is no folder, links followed (a dangling one too: whoever reads it will tell);
    nothing hidden, and no folder inside itself."""
    status = folder.stat()
    if (own := (status.st_dev, status.st_ino)) in above:
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_below(path, above | {own})
        else:
            yield path


def class_folders(config: DataConfig, root: Path) -> list[str]:
    """Names of the subfolders of `root`; those of config.root, where it has them, so that a class
    that the test split lacks does not shift the labels."""
    own = _subfolders(root)
    if config.root is None or not Path(config.root).is_dir():
        return own
    train = _subfolders(Path(config.root))
    if unknown := set(own) - set(train):
        _checks.fail("open_dataset", "test_root", f"classes of {config.root}", sorted(unknown))
    return train


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def numbered(texts: Sequence[str]) -> tuple[list[int], list[str]]:
    """The number of each one among those there are, in alphabetical order."""
    names = sorted(set(texts))
    numbers = {name: i for i, name in enumerate(names)}
    return [numbers[text] for text in texts], names


def report_skipped(config: DataConfig, skipped: Sequence[tuple[str, str]], kept: int) -> None:
    """A warning with a count and names; an error with `strict`, or where nothing is left."""
    if not skipped:
        return
    shown = "; ".join(f"{name}: {reason}" for name, reason in skipped[:10])
    more = f"; and {len(skipped) - 10} more" if len(skipped) > 10 else ""
    if config.strict or not kept:
        _fail_skipped(f"{len(skipped)} of {len(skipped) + kept}: {shown}{more}")
    message = f"open_dataset: {len(skipped)} of {len(skipped) + kept} files skipped: {shown}{more}"
    warnings.warn(message, stacklevel=2)


def _fail_skipped(got: str) -> NoReturn:
    _checks.fail("open_dataset", "root", "files that can be read and are large enough", got)


def _lazy(module: str) -> Any:
    """An opener in a module of its own, whose libraries are imported when it is asked for."""

    def opener(config: DataConfig, split: str) -> Dataset:
        return importlib.import_module(f"dfm_fast.training.{module}").opened(config, split)

    return opener


_OPENERS = {
    "digits": digits,
    "photos": photos,
    "images": _lazy("images"),
    "videos": _lazy("videos"),
    "webdataset": _lazy("tars"),
    "latents": _lazy("latents"),
}
