"""Weights of published models, renamed to `DFMTransformer`'s and `SnapGenUNet`'s.

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
from typing import Any

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.models._pretrained import config_of
from dfm_fast.models.snapgen import SnapGenUNet

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


# --- DreamLite's UNet, of SnapGen's design --------------------------------------------------------

# What a configuration of diffusers' `DreamLiteUNetModel` must say for `SnapGenUNet` to compute it.
_DREAMLITE = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim_type": (None, "text_proj_rms"),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None, "time"),
    "addition_time_embed_dim": (None, 256),
    "num_class_embeds": (None,),
    "upcast_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "qk_norm": (None, "rms_norm"),
    "num_mid_layers": (1,),
}


def snapgen_from_dreamlite(unet: nn.Module) -> SnapGenUNet:
    """A `SnapGenUNet` that computes what diffusers' `DreamLiteUNetModel` does, with its weights.

    Its timestep is 1000 t. Parameters have the same names; where projections of its transformers
    are 1x1 convolutions, they become linear layers.

    Args:
        unet: the model.

    Raises:
        ValueError: a configuration that `SnapGenUNet` has no form of, by its key.
    """
    op, config = "snapgen_from_dreamlite", dict(config_of(unet))
    for key, allowed in _DREAMLITE.items():
        if any(value not in allowed for value in _listed(config[key], 1)):
            expected = " or ".join(map(repr, allowed))
            _checks.fail(op, f"unet.config.{key}", expected, repr(config[key]))
    with torch.device("meta"):
        model = SnapGenUNet(**_dreamlite_config(op, config))
    state = {
        name: v.flatten(1) if v.ndim == 4 and name.split(".")[-2] in ("proj_in", "proj_out") else v
        for name, v in unet.state_dict().items()
    }
    one = next(iter(state.values()))
    model = model.to(one.dtype).to_empty(device=one.device)
    model.load_state_dict(state)
    return model.train(unet.training)


def _listed(value: Any, stages: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * stages


def _dreamlite_config(op: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`SnapGenUNet`'s arguments."""
    widths, kinds = config["block_out_channels"], config["down_block_types"]
    stages, going_up = len(widths), config["up_block_types"]
    depths = _listed(config["transformer_layers_per_block"], stages)
    plain = ["CrossAttn" not in kind for kind in kinds]
    mirrored = [kind.replace("DownBlock", "UpBlock") for kind in reversed(kinds)]
    last = "CrossAttn" in going_up[-1]
    if list(going_up[:-1]) != mirrored[:-1] or (last and going_up[-1] != mirrored[-1]):
        _checks.fail(op, "unet.config.up_block_types", f"{mirrored} but for the last", going_up)
    one = {}
    for key in ("layers_per_block", "cross_attention_dim"):
        values = _listed(config[key], stages)
        one[key] = values[0]
        if len(set(values)) > 1:
            _checks.fail(op, f"unet.config.{key}", "one for all stages", values)
    return {
        "in_channels": config["in_channels"],
        "channels": list(widths),
        "depths": [0 if p else d for p, d in zip(plain, depths, strict=True)],
        "heads": _listed(config["attention_head_dim"], stages),  # diffusers calls their number so
        "cross_dim": one["cross_attention_dim"],
        "text_dim": config["encoder_hid_dim"] if config["encoder_hid_dim_type"] else None,
        "layers": one["layers_per_block"],
        "mid_depth": depths[-1],
        "kv_heads": config["num_kv_heads"],
        "self_attention": ["CrossAttnDown" in kind for kind in kinds],
        "last_transformer": last,
        "convolutions": "expanded" if config["use_sep_conv"] else "dense",
        "ff_mult": config["ff_mult"],
        "qk_norm": config["qk_norm"] is not None,
        "time_channels": config["time_embedding_dim"] or 4 * widths[0],
        "num_ids": (config["projection_class_embeddings_input_dim"] or 0) // 256,
        "groups": config["norm_num_groups"],
    }
