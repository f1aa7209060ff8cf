"""The folder of SnapGen's pipeline, after Stable Diffusion 3's in the hub's layout:

    model_index.json    {_class_name, components: {folder: class}, text_layout, shift, ...}
    unet/               SnapGenUNet
    decoder/ or vae/    SnapGenDecoder; AutoencoderKL or AutoencoderTiny of diffusers; none: pixels
    class_tokens/       ClassTokens, or any of
    text_encoder/  text_encoder_2/  text_encoder_3/     CLIP-L, CLIP-G, Gemma 2 of transformers
    tokenizer/     tokenizer_2/     tokenizer_3/        and theirs

The index names what belongs to the pipeline; classes other than these are never made.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dfm_fast import _checks
from dfm_fast.models._files import arguments_of, read_json
from dfm_fast.models._pretrained import Pretrained, write_bytes
from dfm_fast.models.snapgen import SnapGenUNet
from dfm_fast.models.snapgen_decoder import SnapGenDecoder
from dfm_fast.models.text_encoders import TextEncoders
from dfm_fast.models.text_layouts import ENCODERS, TextLayout
from dfm_fast.models.text_tables import ClassTokens

INDEX, PIPELINE = "model_index.json", "SnapGenPipeline"
OURS: dict[str, type[Pretrained]] = {
    "unet": SnapGenUNet,
    "decoder": SnapGenDecoder,
    "class_tokens": ClassTokens,
}
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
# By the names of a layout: the model's folder, the tokenizer's.
TEXTS = {
    name: (f"text_encoder{end}", f"tokenizer{end}")
    for name, end in zip(ENCODERS, ("", "_2", "_3"), strict=True)
}
NUMBERS = ("shift", "sample_size", "scaling_factor", "shift_factor")


class Pixels(nn.Module):
    """The decoder where there are no latents."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            latent_channels=channels, scaling_factor=1.0, shift_factor=0.0, block_out_channels=(0,)
        )

    def decode(self, z: torch.Tensor) -> tuple[torch.Tensor]:
        return (z,)


# --- Writing --------------------------------------------------------------------------------------


def save(
    folder: str | os.PathLike[str],
    unet: SnapGenUNet,
    decoder: nn.Module,
    conditions: TextEncoders | ClassTokens,
    numbers: Mapping[str, float],
) -> None:
    folder = Path(folder)
    parts: dict[str, Any] = {"unet": unet}
    if not isinstance(decoder, Pixels):
        parts["decoder" if isinstance(decoder, Pretrained) else "vae"] = decoder
    index: dict[str, Any] = {"_class_name": PIPELINE, "components": {}}
    if isinstance(conditions, TextEncoders):
        index["text_layout"] = conditions.layout.to_dict()
        for name, encoder in conditions.encoders.items():
            parts |= zip(TEXTS[name], (encoder.module, encoder.tokenizer), strict=True)
    else:
        parts["class_tokens"] = conditions
    for name, part in parts.items():
        index["components"][name] = type(part).__name__
        if isinstance(part, Pretrained):
            part.save_pretrained(folder / name)
        else:
            _save_whole(part.save_pretrained, folder / name)
    index |= numbers
    write_bytes(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _save_whole(save: Callable[[str], Any], folder: Path) -> None:
    """What others write file by file: into a folder beside it, then renamed, the config last."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        save(made)
        files = sorted(Path(made).iterdir(), key=lambda file: file.name == "config.json")
        for file in files:
            os.replace(file, folder / file.name)


# --- Reading --------------------------------------------------------------------------------------


def pipeline_in(folder: str | os.PathLike[str]) -> Path | None:
    """The folder, if it is a pipeline's, or the one that a run has exported into it."""
    places = Path(folder), Path(folder) / "model"
    return next((place for place in places if (place / INDEX).is_file()), None)


def load(
    op: str,
    folder: str | os.PathLike[str],
    encoders: Sequence[str] | None,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Arguments of the pipeline's constructor."""
    folder = Path(folder)
    index = read_index(op, folder)
    names = _components(op, folder, index)
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    found: dict[str, Any] = {"decoder": None}
    found |= {n: OURS[n].from_pretrained(folder / n, **options) for n in names if n in OURS}
    if "vae" in names:
        found["decoder"] = _autoencoder(op, folder / "vae", names["vae"]).to(device, dtype)
    conditions = found.pop("class_tokens", None)
    if conditions is None:
        with arguments_of(folder / INDEX):
            layout = TextLayout(**index["text_layout"])
        options |= _encoders(op, folder, names, encoders)
        conditions = TextEncoders.from_pretrained(layout, **options)
    elif encoders is not None:
        _checks.fail(op, "encoders", f"None, as {folder} has class tokens", encoders)
    return {**found, "conditions": conditions, **{n: index[n] for n in NUMBERS if n in index}}


def read_index(op: str, folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{op}: folder: expected {INDEX}, got {folder} without it")
    index = read_json(folder / INDEX)
    if index.get("_class_name") != PIPELINE:
        _checks.fail(op, "folder", f"a {PIPELINE}'s", f"{folder}, a {index.get('_class_name')}'s")
    return index


def _components(op: str, folder: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """Folder -> class, of a pipeline that is whole."""
    names, where = index.get("components", {}), f"components in {folder / INDEX}"
    if not isinstance(names, dict):
        _checks.fail(op, where, "folders and their classes", type(names).__name__)
    known = {*OURS, "vae", *(name for pair in TEXTS.values() for name in pair)}
    if unknown := sorted(names.keys() - known):
        _checks.fail(op, where, f"some of {', '.join(sorted(known))}", ", ".join(unknown))
    if "unet" not in names or {"decoder", "vae"} <= names.keys():
        expected = "unet, and decoder, vae or (of pixels) neither"
        _checks.fail(op, where, expected, ", ".join(names) or "none")
    texts = any(pair[0] in names for pair in TEXTS.values())
    if texts == ("class_tokens" in names) or texts != ("text_layout" in index):
        expected = "class_tokens, or text encoders and a text_layout"
        _checks.fail(op, where, expected, ", ".join(names))
    return dict(names)


def _encoders(
    op: str, folder: Path, names: Mapping[str, str], wanted: Sequence[str] | None
) -> dict[str, tuple[Path, Path]]:
    """By the names of a layout, folders of the model and the tokenizer."""
    there = {
        name: (folder / model, folder / tokenizer)
        for name, (model, tokenizer) in TEXTS.items()
        if model in names
    }
    wanted = tuple(there) if wanted is None else tuple(wanted)
    if not wanted or (unknown := [name for name in wanted if name not in there]):
        got = ", ".join(unknown) if wanted else "none"
        _checks.fail(op, "encoders", f"some of {', '.join(there)}", got)
    return {name: there[name] for name in wanted}


def _autoencoder(op: str, folder: Path, name: str) -> nn.Module:
    _checks.choice(op, f"class of {folder}", name, AUTOENCODERS)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{op}: vae: expected config.json, got {folder} without it")
    try:
        kind = getattr(importlib.import_module("diffusers"), name)
    except ImportError as error:
        raise ImportError(f"{op}: vae: expected diffusers, got none") from error
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    module, info = kind.from_pretrained(folder, **options)
    if info["missing_keys"]:
        got = f"{folder} without {', '.join(sorted(info['missing_keys'])[:3])}"
        _checks.fail(op, "vae", "all weights of the model", got)
    return module
