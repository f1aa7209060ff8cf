"""A DFM transformer as the training loop's task: its recipe, its losses, its samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dfm_fast.training import pictures, recipes, saved
from dfm_fast.training.config import TrainConfig
from dfm_fast.training.datasets import Dataset
from dfm_fast.training.distributed import World
from dfm_fast.training.recipes import Recipe

if TYPE_CHECKING:
    from dfm_fast.training.loop import Rows


class DFM:
    """See `loop.Task`.

    Args:
        config: of the run.
        world: this process among all.
        dataset: what is trained on.
        last: the checkpoint that the run goes on from.

    Raises:
        ValueError: a model that does not fit the data, the checkpoint, or `config.init`.
    """

    def __init__(
        self, config: TrainConfig, world: World, dataset: Dataset, last: Path | None
    ) -> None:
        self.config, self.world, self.dataset = config, world, dataset
        self.class_dropout = config.model.class_dropout
        self.recipe = self._recipe(last)
        torch.manual_seed(config.seed)
        self.model = self.averaged = self.recipe.build_model()
        self.networks = (self.model,)
        if last is None and config.init is not None:
            self.model.load_state_dict(saved.initial(config.init, self.recipe))
        self.flow = self.recipe.build_flow(config.seed)

    def _recipe(self, last: Path | None) -> Recipe:
        before = Recipe.read(last) if last else None
        std = None
        if recipes.needs_std(self.config):
            std = self._std(before, last)
        recipe = recipes.recipe_of(self.config, self.dataset, std)
        if before is not None and last is not None:
            recipe.check_same(before, last)
        return recipe

    def _std(self, before: Recipe | None, last: Path | None) -> list[float]:
        """Of the levels of the data: what the run began with, or measured."""
        config = self.config
        if before is None:
            std = self.world.share(lambda: recipes.measure(config, self.dataset))
            return std if config.init is None else saved.initial_std(config.init, std)
        if before.measured is None:
            name = "model.precondition" if config.model.precondition else "flow.standardise"
            raise ValueError(f"train: {last} does not fit this run: {name}: saved false, now true")
        return before.measured

    def groups(self) -> list[dict[str, Any]]:
        return [self.config.optimizer.group(self.model.parameters())]

    def losses(
        self, model: nn.Module, x: Tensor, labels: Tensor, rows: Rows
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms are the levels'."""
        cond = {}
        if self.recipe.num_classes:
            cond["y"] = labels.to(x.device, non_blocking=True)
        shard = rows.start, rows.batch
        levels = self.flow.loss(model, x, seed=rows.seed, shard=shard, per_level=True, **cond)
        return levels.sum(1), {f"level_{s}": v for s, v in enumerate(levels.detach().unbind(1))}

    def counts(self, batch: int, seed: int) -> dict[str, int]:
        stages = self.flow.stages(batch, seed)
        return {f"level_{s}": sum(q >= s for q in stages) for s in range(self.flow.num_levels)}

    def sample(self, average: nn.Module, count: int) -> tuple[Tensor, int | None]:
        labels = pictures.labels_of(self.recipe.num_classes, count)
        x = pictures.sample(
            average, self.flow, self.recipe, labels, count, device=self.world.device,
            cuda_graph=False,
        )  # fmt: skip
        return x, pictures.columns_of(labels)

    def export(self, average: Any, folder: Path) -> None:
        recipes.export(folder, self.recipe, average)
