"""From a model of some levels to one of more: how a trained model becomes a DFM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dfm_fast.models.dfm import DFMTransformer


@torch.no_grad()
def expand_to_dfm(
    model: DFMTransformer,
    patch_sizes: Sequence[int],
    in_channels: int | Sequence[int] | None = None,
    **options: Any,
) -> DFMTransformer:
    """A trained model, and finer levels with parameters of zero: what the levels of the model were
    given is unchanged until training moves them (arXiv 2506.19839, fine-tuning).

    Args:
        model: its levels become the coarsest ones.
        patch_sizes: of the finer levels that are new.
        in_channels: of theirs; None takes those of the model's finest level.
        options: arguments of `DFMTransformer` that change, such as `data_std`.

    Returns:
        A new model on the same device, in the same dtype.
    """
    config = {**model.config, **options}
    new = model.channels[-1] if in_channels is None else in_channels
    new = (new,) * len(patch_sizes) if isinstance(new, int) else tuple(new)
    config |= {
        "patch_sizes": (*model.patch_sizes, *patch_sizes),
        "in_channels": (*model.channels, *new),
    }
    like = model.patch_bias
    with torch.device(like.device):
        wide = DFMTransformer(**config).to(like.dtype)
    own, given = wide.state_dict(), model.state_dict()
    for name, value in own.items():
        if name in given:  # what is new lies behind what was there, in every parameter
            value.zero_()[tuple(map(slice, given[name].shape))] = given[name]
        elif name.startswith("t_embedders") and ".mlp.2." in name:
            value.zero_()  # the layer before keeps its start, so that this one gets gradients
    return wide.train(model.training)
