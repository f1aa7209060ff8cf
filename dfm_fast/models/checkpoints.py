"""Weights of published models, renamed to `DFMTransformer`'s.

Each function takes a state dict and gives one for `load_state_dict`; nothing is downloaded.

SiT (arXiv 2401.08740) has one level, its time runs from noise (0) to data (1) and its velocity is
x - eps. Ours is eps - x at noise level 1 - t: heads change their sign, and the model is made with
`flip_time=True`. Where the model was trained to give a variance too (`learn_sigma`), of 2C outputs
the first C are the velocity.

    SiT                                     here
    x_embedder.proj.weight [D, C, p, p]     patch_embedding.weight [D, C p p], patch_bias [1, D]
    t_embedder.mlp                          t_embedders.0.mlp
    y_embedder.embedding_table              y_embedder
    blocks.i.attn.qkv, proj                 the same
    blocks.i.mlp.fc1, fc2                   blocks.i.mlp.net.0.proj, net.2
    blocks.i.adaLN_modulation.1,            modulation: all blocks', then the heads', as rows
    final_layer.adaLN_modulation.1
    final_layer.linear [p p C_out, D]       heads [C p p, D]
    pos_embed                               computed

A DFM on SiT's blocks has an x_embedder, a t_embedder and a final_layer for each level. `LEVELS`
says what they are called where nothing else is known; see `dfm_sit_state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfm_fast import _checks

_ATTENTION = ("attn.qkv", "attn.proj")
_MLP = {"mlp.fc1": "mlp.net.0.proj", "mlp.fc2": "mlp.net.2"}
# A level's parts: SiT's names in the plural, with the level's number, 0 the coarsest.
LEVELS = {
    "x_embedder": "x_embedders.{}",
    "t_embedder": "t_embedders.{}",
    "final_layer": "final_layers.{}",
}
_SINGLE = {name: name for name in LEVELS}


def sit_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an official SiT, for `DFMTransformer(..., patch_sizes=(p,), flip_time=True)`.

    Raises:
        ValueError: keys that are missing, or that are not SiT's.
    """
    found = _transformer("sit_state_dict", "SiT's", state, _SINGLE, 1)
    return {name: -v if name.startswith("heads") else v for name, v in found.items()}


def dit_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a DiT (arXiv 2212.09748), whose layout is SiT's. It predicts noise on a schedule
    of 1000 steps: weights to start from, not a flow model.

    Raises:
        ValueError: keys that are missing, or that are not DiT's.
    """
    return _transformer("dit_state_dict", "DiT's", state, _SINGLE, 1)


def dfm_sit_state_dict(
    state: Mapping[str, Tensor],
    num_levels: int = 2,
    *,
    names: Mapping[str, str] = LEVELS,
    ignore: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Weights of a DFM on SiT's blocks, as the paper's authors released one, for
    `DFMTransformer(...)`: time runs from data (0) to noise (1), as here.

    What a level's parts are called in that release is documented nowhere outside its code, which
    is for non-commercial use and which this function was written without. The defaults, `LEVELS`,
    are SiT's names with a level's number: a guess, never tried on the release. Where a checkpoint's
    keys differ, give its own; `sorted(state)` shows them. A part that is not there is an error
    that names its key.

    Args:
        state: keys may begin with "module.", as DistributedDataParallel saves them.
        num_levels: L.
        names: of "x_embedder", "t_embedder" and "final_layer": what stands there for SiT's name,
            with {} for the level's number, 0 the coarsest.
        ignore: beginnings of keys to leave out, such as "projectors" of models trained with REPA
            (arXiv 2410.06940).

    Raises:
        ValueError: keys that are missing, or that are of no part; names that are wrong.
    """
    op = "dfm_sit_state_dict"
    if names.keys() != LEVELS.keys():
        _checks.fail(op, "names", f"the keys {', '.join(LEVELS)}", ", ".join(names))
    state = {name.removeprefix("module."): v for name, v in state.items()}
    state = {name: v for name, v in state.items() if not name.startswith(tuple(ignore))}
    return _transformer(op, "a DFM's", state, names, num_levels)


def _transformer(
    op: str, whose: str, state: Mapping[str, Tensor], names: Mapping[str, str], num_levels: int
) -> dict[str, Tensor]:
    rest = {name: v for name, v in state.items() if name != "pos_embed"}

    def take(name: str) -> Tensor:
        if name not in rest:
            _checks.fail(op, "state", f"the key {name!r}", f"{', '.join(sorted(rest)[:5])} ...")
        return rest.pop(name)

    parts = [{n: to.format(s) for n, to in names.items()} for s in range(num_levels)]
    patches = [take(f"{part['x_embedder']}.proj.weight") for part in parts]
    found = {
        "patch_embedding.weight": torch.cat([p.flatten(1) for p in patches], 1),
        "patch_bias": torch.stack([take(f"{part['x_embedder']}.proj.bias") for part in parts]),
        "y_embedder.weight": take("y_embedder.embedding_table.weight"),
    }
    depth = 1 + max((int(n.split(".")[1]) for n in rest if n.startswith("blocks.")), default=-1)
    for kind in ("weight", "bias"):
        for s, part in enumerate(parts):
            for layer in ("mlp.0", "mlp.2"):
                theirs = f"{part['t_embedder']}.{layer}.{kind}"
                found[f"t_embedders.{s}.{layer}.{kind}"] = take(theirs)
        modulations, heads = [], []
        for i in range(depth):
            for theirs, ours in {**{n: n for n in _ATTENTION}, **_MLP}.items():
                found[f"blocks.{i}.{ours}.{kind}"] = take(f"blocks.{i}.{theirs}.{kind}")
            modulations.append(take(f"blocks.{i}.adaLN_modulation.1.{kind}"))
        for part, weight in zip(parts, patches, strict=True):
            modulations.append(take(f"{part['final_layer']}.adaLN_modulation.1.{kind}"))
            heads.append(_head(take(f"{part['final_layer']}.linear.{kind}"), weight))
        found[f"modulation.{kind}"] = torch.cat(modulations)
        found[f"heads.{kind}"] = torch.cat(heads)
    if rest:
        _checks.fail(op, "state", f"{whose} keys", f"{', '.join(sorted(rest)[:5])} more")
    return found


def _head(rows: Tensor, patches: Tensor) -> Tensor:
    """[p p C_out, ...] -> [C p p, ...], of the first C outputs."""
    _, channels, patch, _ = patches.shape
    rows = rows.unflatten(0, (patch, patch, -1))[:, :, :channels]  # [p, p, C, ...]
    return rows.movedim(2, 0).flatten(0, 2)
