"""What a model needs to be built again and sampled, with no dataset at hand: a JSON file beside its
weights, in checkpoints and in exported folders."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfm_fast import _checks
from dfm_fast.flow import DecomposableFlow, Decomposition, Haar, Laplacian
from dfm_fast.models import DFMTransformer
from dfm_fast.models._files import arguments_of, read_json
from dfm_fast.models._pretrained import write_bytes
from dfm_fast.training.config import SIZES, FlowConfig, TrainConfig, from_json, to_json
from dfm_fast.training.datasets import Dataset
from dfm_fast.training.orders import draw

NAME = "recipe.json"
MEASURED = 1024  # samples that deviations are measured on
MEMORY = ("checkpointing",)  # arguments of the model that change no number
LATER = {"block_conditioning": False, "flip_time": False}  # not in the recipes of older runs


@dataclass(frozen=True)
class Recipe:
    """Model, flow and data shape of a run."""

    model: dict[str, Any]  # arguments of DFMTransformer
    flow: FlowConfig
    std: list[float] | None  # of the levels, that they are divided by
    shape: tuple[int, ...]  # of a sample
    num_classes: int
    class_names: tuple[str, ...] = ()
    data: str = ""  # name of the dataset

    @property
    def num_levels(self) -> int:
        return len(self.model["patch_sizes"])

    @property
    def measured(self) -> list[float] | None:
        """Deviations of the levels of the data, where they were needed."""
        return self.std or self.model["data_std"]

    @property
    def steps(self) -> tuple[int, ...]:
        """Of a sample, per stage."""
        if self.flow.sample_steps:
            return self.flow.sample_steps
        return (30, *[10] * (self.num_levels - 1)) if self.num_levels > 1 else (40,)

    def build_model(self) -> DFMTransformer:
        return DFMTransformer(**self.model)

    def build_flow(self, seed: int = 0) -> DecomposableFlow:
        flow = self.flow
        return DecomposableFlow(
            decomposition(flow, self.num_levels, self.std),
            stage_probs=flow.stage_probs,
            per_sample=flow.per_sample,
            location=flow.location,
            earlier_location=flow.earlier_location,
            scale=flow.scale,
            seed=seed,
        )

    def write(self, folder: Path) -> None:
        text = json.dumps({**to_json(self)}, indent=2) + "\n"
        write_bytes(folder / NAME, text.encode())

    @classmethod
    def read(cls, folder: Path) -> Recipe:
        """Raises ValueError, which names the file, where it holds no recipe."""
        values = read_json(folder / NAME)
        with arguments_of(folder / NAME):
            recipe = from_json(cls, values)
            recipe.check()
        return recipe

    def check(self) -> None:
        """Raise TypeError or ValueError where fields are not what the class says."""
        op = type(self).__name__
        for name, kind in (("model", dict), ("data", str), ("shape", tuple)):
            if not isinstance(getattr(self, name), kind):
                expected, got = kind.__name__, type(getattr(self, name)).__name__
                _checks.fail(op, name, f"a {expected}", got, TypeError)
        for n in self.shape:
            _checks.integer(op, "shape", n, 1)
        _checks.integer(op, "num_classes", self.num_classes, 0)
        if not all(isinstance(name, str) for name in self.class_names):
            _checks.fail(op, "class_names", "names", list(self.class_names), TypeError)

    def check_same(self, saved: Recipe, where: Path) -> None:
        """Raise one ValueError that names what a checkpoint was trained with and this run is not.
        The loss and the sampler may change; what the weights mean may not."""
        pairs = [
            (f"model.{k}", saved.model.get(k, LATER.get(k)), v)
            for k, v in self.model.items()
            if k not in MEMORY
        ]
        # A Haar transform has no filter to choose.
        laplacian = ("filter",) if self.flow.decomposition == "laplacian" else ()
        pairs += [
            (f"flow.{k}", getattr(saved.flow, k), getattr(self.flow, k))
            for k in ("decomposition", *laplacian, "factor", "standardise")
        ]
        names = "shape", "num_classes", "std"
        pairs += [(f"data.{k}", getattr(saved, k), getattr(self, k)) for k in names]
        plain = [(name, json.dumps(a), json.dumps(b)) for name, a, b in pairs]
        wrong = [f"{name}: saved {a}, now {b}" for name, a, b in plain if a != b]
        if wrong := wrong or self._renamed(saved):
            raise ValueError(f"train: {where} does not fit this run: " + "; ".join(wrong))

    def _renamed(self, saved: Recipe) -> list[str]:
        """The first class that has another name: from there on labels mean something else."""
        both = enumerate(zip(saved.class_names, self.class_names, strict=False))
        moved = [(i, a, b) for i, (a, b) in both if a != b]
        return [
            f"data.class_names: class {i} of {self.num_classes}: saved {json.dumps(a)}, "
            f"now {json.dumps(b)}"
            for i, a, b in moved[:1]
        ]


@dataclass(frozen=True)
class ModelRecipe:
    """Of a model that its constructor's arguments make; `op` is what errors name."""

    op: str
    model: dict[str, Any]

    def write(self, folder: Path) -> None:
        text = json.dumps({"model": self.model}, indent=2) + "\n"
        write_bytes(folder / NAME, text.encode())

    def check_same(self, where: Path) -> None:
        """Raise one ValueError that names what a checkpoint has and this run has not."""
        with arguments_of(where / NAME):
            saved = dict(read_json(where / NAME)["model"])
        now = json.loads(json.dumps(self.model))  # lists, not tuples
        names = sorted((saved.keys() | now.keys()) - set(MEMORY))
        pairs = [(name, saved.get(name), now.get(name)) for name in names]
        if wrong := [f"{name}: saved {a}, now {b}" for name, a, b in pairs if a != b]:
            raise ValueError(f"{self.op}: {where} does not fit this run: " + "; ".join(wrong))


def decomposition(
    flow: FlowConfig, num_levels: int, std: Sequence[float] | None = None
) -> Decomposition:
    factor: Any = flow.factor[0] if len(flow.factor) == 1 else flow.factor  # Haar takes one alone
    if flow.decomposition == "haar":
        return Haar(num_levels, factor, std=std)
    return Laplacian(num_levels, flow.filter, factor, std=std)


def recipe_of(config: TrainConfig, dataset: Dataset, std: list[float] | None) -> Recipe:
    """The recipe of a run. `std` are the deviations of the levels where they are needed: see
    `measure`."""
    model, shape = config.model, tuple(dataset.shape)
    levels = len(model.patch_sizes)
    split = decomposition(config.flow, levels)
    shapes = split.shapes((1, *shape))
    width, depth, heads = (
        own or default
        for own, default in zip(
            (model.width, model.depth, model.heads), SIZES[model.size], strict=True
        )
    )
    grid = _tokens(shapes, model.patch_sizes)
    divided = config.flow.standardise
    arguments = {
        "in_channels": [s[1] for s in shapes],
        "patch_sizes": list(model.patch_sizes),
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads,
        "num_classes": dataset.num_classes,
        # Labels are dropped by the data order, which is the same on any number of ranks.
        "class_dropout": 0.0,
        "input_size": list(grid[-2:]),
        "positions": model.positions,
        "qk_norm": model.qk_norm,
        "block_conditioning": model.block_conditioning,
        "stage_embedding": model.stage_embedding,
        "data_std": ([1.0] * levels if divided else std) if model.precondition else None,
        "flip_time": model.flip_time,
        "checkpointing": model.checkpointing,
    }
    return Recipe(
        arguments, config.flow, std if divided else None, shape, dataset.num_classes,
        tuple(getattr(dataset, "class_names", ())), config.data.name,
    )  # fmt: skip


def implied(model: dict[str, Any]) -> Recipe:
    """The recipe of a saved model that has none beside it, as far as its arguments tell: a Haar
    decomposition where the levels' channels differ, else a Laplacian whose factor is that of the
    patches; samples of the size that the model keeps positions of.

    Raises:
        ValueError: patches that are of neither.
    """
    patches, grid = model["patch_sizes"], model["input_size"]
    channels, levels = model["in_channels"], len(model["patch_sizes"])
    first = channels if isinstance(channels, int) else channels[0]
    haar = not isinstance(channels, int) and len(set(channels)) > 1
    growth = {b / a for a, b in itertools.pairwise(patches)}
    if growth and growth not in (({1.0},) if haar and levels == 2 else ({2.0}, {4.0})):
        expected = f"patches that grow by 2 or by 4, as there is no {NAME}"
        _checks.fail("sample", "patch_sizes", expected, list(patches))
    flow = FlowConfig(
        decomposition="haar" if haar else "laplacian",
        factor=(2 if haar or not growth else int(growth.pop()),),
    )
    side = patches[-1] * (2 if haar else 1)
    shape = (first, *(n * side for n in grid))
    return Recipe(model, flow, None, shape, model["num_classes"])


def needs_std(config: TrainConfig) -> bool:
    return config.flow.standardise or config.model.precondition


def measure(config: TrainConfig, dataset: Dataset) -> list[float]:
    """Deviations of the levels over the first samples of the run."""
    split = decomposition(config.flow, len(config.model.patch_sizes))

    def batches() -> Iterator[Tensor]:
        for first in range(0, min(len(dataset), MEASURED), 64):
            positions = range(first, min(first + 64, len(dataset), MEASURED))
            drawn = (draw(config.seed, p, len(dataset)).index for p in positions)
            yield torch.stack([dataset[i][0] for i in drawn])

    return split.measure_std(batches())


def _tokens(shapes: Sequence[tuple[int, ...]], patches: Sequence[int]) -> tuple[int, ...]:
    """Tokens ((T,) h, w), which all levels must have alike."""
    grids = []
    for s, (shape, p) in enumerate(zip(shapes, patches, strict=True)):
        if shape[-2] % p or shape[-1] % p:
            got = f"{p} for level {s}, {shape[-2]} x {shape[-1]}"
            _checks.fail("train", "model.patch_sizes", "numbers that divide the levels' sides", got)
        grids.append((*shape[2:-2], shape[-2] // p, shape[-1] // p))
    if len(set(grids)) > 1:
        got = f"{list(patches)}: tokens {grids}"
        _checks.fail("train", "model.patch_sizes", "as many tokens on every level", got)
    return grids[0]


def export(folder: Path, recipe: Recipe, model: DFMTransformer) -> None:
    """A folder with config.json, model.safetensors and the recipe: what `dfm-fast sample` takes,
    and `DFMTransformer.from_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe.write(folder)
    model.save_pretrained(folder)
