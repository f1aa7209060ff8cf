"""From a model of some levels to one of more: how a trained model becomes a DFM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dfm_fast import _checks
from dfm_fast.models._pretrained import check_state
from dfm_fast.models.dfm import DFMTransformer
from dfm_fast.models.flux import PATCH, FluxDFM

# Arguments that may change, as what the trained levels give does not: at all, or from False to
# True, which adds parameters that start as an identity.
FREE = ("checkpointing", "class_dropout", "input_size")
ADDED = ("block_conditioning", "stage_embedding")


@torch.no_grad()
def expand_to_dfm(
    model: nn.Module,
    patch_sizes: Sequence[int],
    in_channels: int | Sequence[int] | None = None,
    **options: Any,
) -> DFMTransformer | FluxDFM:
    """A trained model, and finer levels with parameters of zero (a new stage has the embedding of
    the last one): what the levels of the model were
    given is unchanged until training moves them (arXiv 2506.19839, fine-tuning).

    Args:
        model: a `DFMTransformer`, whose levels become the coarsest ones, or diffusers'
            `FluxTransformer2DModel`, which becomes the coarsest level.
        patch_sizes: of the finer levels that are new; for FLUX, whose own patches are 2 x 2, (4,)
            where a level has twice the side of the one before.
        in_channels: of theirs; None takes those of the model's finest level.
        options: arguments of `DFMTransformer` or `FluxDFM` that change: of the former
            `checkpointing`, `class_dropout`, `input_size`, `block_conditioning` and
            `stage_embedding`, where they are new, and `data_std`, which gets the finer levels'.

    Returns:
        A new model on the same device, in the same dtype, a `DFMTransformer` with copies of the
        parameters, or a `FluxDFM` that shares FLUX's memory (12 billion parameters are not held
        twice), so that training it changes the model that was given.

    Raises:
        TypeError: a model of another class. ValueError: weights or arguments that do not fit;
            options that would change what the trained levels give.
    """
    if isinstance(model, DFMTransformer):
        return _expand_own(model, patch_sizes, in_channels, options)
    # By name: diffusers is not imported for those who do not use it.
    if any(c.__name__ == "FluxTransformer2DModel" for c in type(model).__mro__):
        return _expand_flux(model, patch_sizes, in_channels, options)
    known = "a DFMTransformer or diffusers' FluxTransformer2DModel"
    _checks.fail("expand_to_dfm", "model", known, type(model).__name__, TypeError)


def _expand_own(
    model: DFMTransformer,
    patch_sizes: Sequence[int],
    in_channels: int | Sequence[int] | None,
    options: dict[str, Any],
) -> DFMTransformer:
    _check_options(model, options, len(patch_sizes))
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
            if name == "stage_embedder.weight":
                value[model.num_levels :] = given[name][-1]
        elif name == "stage_embedder.weight":
            value.zero_()
        elif name.startswith("t_embedders") and ".mlp.2." in name:
            value.zero_()  # the layer before keeps its start, so that this one gets gradients
    return wide.train(model.training)


def _check_options(model: DFMTransformer, options: dict[str, Any], new: int) -> None:
    op = "expand_to_dfm"
    old_std, std = model.data_std, options.get("data_std", model.data_std)
    if old_std is not None and (std is None or len(std) != len(old_std) + new):
        _checks.fail(op, "data_std", f"{list(old_std)} and {new} more numbers", std)
    for name, value in options.items():
        old = model.config.get(name)
        if name == "data_std" and old is not None:
            value = value[: len(old)]
        same = _plain(value) == _plain(old)
        if name in model.config and name not in FREE and not same and (old or name not in ADDED):
            expected = f"{_plain(old)}, as the model was trained"
            _checks.fail(op, name, expected, _plain(value))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _expand_flux(
    model: Any,  # diffusers' FluxTransformer2DModel
    patch_sizes: Sequence[int],
    in_channels: int | Sequence[int] | None,
    options: dict[str, Any],
) -> FluxDFM:
    arguments = {k: v for k, v in model.config.items() if not k.startswith("_")}
    own = arguments["in_channels"] // PATCH**2
    new = own if in_channels is None else in_channels
    new = (new,) * len(patch_sizes) if isinstance(new, int) else tuple(new)
    with torch.device("meta"):
        wide = FluxDFM(arguments, (PATCH, *patch_sizes), (own, *new), **options)
    check_state("expand_to_dfm", wide.transformer, model.state_dict())
    wide.transformer.load_state_dict(model.state_dict(), assign=True)
    like = model.x_embedder.weight
    for parts in (wide.patch_embedders, wide.t_embedders, wide.heads):
        parts.to(like.dtype).to_empty(device=like.device)
    wide.reset_finer_levels()
    return wide.train(model.training)
