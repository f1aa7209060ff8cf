"""Weights of published models, renamed to `DFMTransformer`'s.

Both functions take a state dict and give one for `load_state_dict`; nothing is downloaded.

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
    blocks.i.adaLN_modulation.1,            modulation: all blocks', then the head's, as rows
    final_layer.adaLN_modulation.1
    final_layer.linear [p p C_out, D]       heads [C p p, D]
    pos_embed                               computed
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_ATTENTION = ("attn.qkv", "attn.proj")
_MLP = {"mlp.fc1": "mlp.net.0.proj", "mlp.fc2": "mlp.net.2"}


def sit_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an official SiT, for `DFMTransformer(..., patch_sizes=(p,), flip_time=True)`.

    Raises:
        ValueError: keys that are missing, or that are not SiT's.
    """
    found = _transformer("sit_state_dict", state)
    return {name: -v if name.startswith("heads") else v for name, v in found.items()}


def dit_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a DiT (arXiv 2212.09748), whose layout is SiT's. It predicts noise on a schedule
    of 1000 steps: weights to start from, not a flow model.

    Raises:
        ValueError: keys that are missing, or that are not DiT's.
    """
    return _transformer("dit_state_dict", state)


def _transformer(op: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rest = {name: v for name, v in state.items() if name != "pos_embed"}

    def take(name: str) -> Tensor:
        if name not in rest:
            raise ValueError(f"{op}: state: expected the key {name!r}, got none")
        return rest.pop(name)

    patches = take("x_embedder.proj.weight")
    _, channels, patch, _ = patches.shape
    found = {
        "patch_embedding.weight": patches.flatten(1),
        "patch_bias": take("x_embedder.proj.bias").unsqueeze(0),
        "y_embedder.weight": take("y_embedder.embedding_table.weight"),
    }
    for layer in ("mlp.0", "mlp.2"):
        for kind in ("weight", "bias"):
            found[f"t_embedders.0.{layer}.{kind}"] = take(f"t_embedder.{layer}.{kind}")
    depth = 1 + max(int(name.split(".")[1]) for name in rest if name.startswith("blocks."))
    for kind in ("weight", "bias"):
        modulations = []
        for i in range(depth):
            for theirs, ours in {**{n: n for n in _ATTENTION}, **_MLP}.items():
                found[f"blocks.{i}.{ours}.{kind}"] = take(f"blocks.{i}.{theirs}.{kind}")
            modulations.append(take(f"blocks.{i}.adaLN_modulation.1.{kind}"))
        modulations.append(take(f"final_layer.adaLN_modulation.1.{kind}"))
        found[f"modulation.{kind}"] = torch.cat(modulations)
        head = take(f"final_layer.linear.{kind}")
        head = head.unflatten(0, (patch, patch, -1))[:, :, :channels]  # [p, p, C, ...]
        found[f"heads.{kind}"] = head.movedim(2, 0).flatten(0, 2).contiguous()
    if rest:
        raise ValueError(
            f"{op}: state: expected SiT's keys, got {', '.join(sorted(rest)[:5])} more"
        )
    return found
