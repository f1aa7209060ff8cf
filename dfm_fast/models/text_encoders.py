"""Texts through frozen encoders of transformers, from local folders: CLIP-L, CLIP-G, Gemma 2.

CLIP: states before the last layer and without the final norm, as SDXL and Stable Diffusion 3 take
them; pooled, the state at the end of the text, projected where the model has a projection. It sees
the whole length it takes, padding included, without a mask, as it does there.
Gemma 2: states after the last layer and the final norm; no pooled state. Its attention is plain
products: its scores are capped, which torch's fused attention cannot do.

All are causal and padded on the right, whatever the tokenizers prefer: states of a text do not
depend on the padding behind it, and no mask is needed. (With one, a query behind the text whose
window is all padding has no key: nan in float64.)
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.models._pretrained import config_of
from dfm_fast.models.text_layouts import (
    CLIP,
    ENCODERS,
    T2I,
    TextConditions,
    TextLayout,
    TokenStates,
    join_states,
)

# What a folder's config.json names -> the class that is made of it: the text's part alone.
CLIP_CLASSES = {
    "CLIPTextModel": "CLIPTextModel",
    "CLIPTextModelWithProjection": "CLIPTextModelWithProjection",
    "CLIPModel": "CLIPTextModelWithProjection",
}
GEMMA_CLASSES = {"Gemma2Model": "Gemma2Model", "Gemma2ForCausalLM": "Gemma2Model"}
BATCH = 32  # texts at a time

StrPath = str | os.PathLike[str]
Folder = StrPath | tuple[StrPath, StrPath]

# --- One encoder ----------------------------------------------------------------------------------


class TextEncoder:
    """One frozen model of transformers and its tokenizer.

    Args:
        name: "clip_l", "clip_g" or "gemma".
        module: CLIPTextModel, CLIPTextModelWithProjection or (Gemma) Gemma2Model.
        tokenizer: the model's own.

    Attributes:
        width: of the states.
        max_length: tokens that the model takes.

    Raises:
        TypeError, ValueError: another class, a tokenizer with tokens that the model has not.
    """

    def __init__(self, name: str, module: nn.Module, tokenizer: Any) -> None:
        op = type(self).__name__
        _checks.choice(op, "name", name, ENCODERS)
        classes = sorted(set(_classes(name).values()))
        if type(module).__name__ not in classes:
            _checks.fail(op, name, " or ".join(classes), type(module).__name__, TypeError)
        self.name, self.is_clip = name, name in CLIP
        self.module, self.tokenizer = module.eval().requires_grad_(False), tokenizer
        config = config_of(module)
        self.width: int
        self.max_length: int
        self.width, self.max_length = config.hidden_size, config.max_position_embeddings
        if len(tokenizer) > config.vocab_size:
            expected = f"at most the model's {config.vocab_size} tokens"
            _checks.fail(op, f"tokenizer of {name}", expected, len(tokenizer))
        tokenizer.truncation_side = "right"

    @classmethod
    def load(
        cls,
        name: str,
        folder: Folder,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> TextEncoder:
        """From a folder in the hub's layout, with config.json, weights in safetensors and a
        tokenizer; or from two, (the model's, the tokenizer's). Nothing is downloaded.

        Args:
            name: "clip_l", "clip_g" or "gemma".
            folder: of one of `CLIP_CLASSES` or `GEMMA_CLASSES`.
            device, dtype: of the parameters; dtype None keeps what transformers chooses.

        Raises:
            FileNotFoundError: what is missing in the folder. ValueError: another model's folder,
                weights that do not fit. ImportError: no transformers.
        """
        op = f"{cls.__name__}.load"
        _checks.choice(op, "name", name, ENCODERS)
        if missing := _missing(folder):
            raise FileNotFoundError(f"{op}: {name}: {missing}")
        transformers = _transformers(op)
        model, tokenizer = _folders(folder)
        module = _load_model(transformers, op, name, model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        return cls(name, module.to(device, dtype), tokenizer)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], layout: TextLayout) -> list[TokenStates]:
        """States of each text, in host memory. What does not fit is cut, with a warning.

        Raises:
            ValueError: states that are not finite.
        """
        limit = layout.clip_length if self.is_clip else layout.max_tokens
        rows = self._tokens(texts, limit)
        fixed = limit if self.is_clip and layout.clip_tokens == "all" else 0
        states = []
        # What is computed does not depend on where it is called: it is kept.
        with torch.autocast(self.device.type, enabled=False):
            for i in range(0, len(rows), BATCH):
                states += self._forward(rows[i : i + BATCH], fixed)
        return states

    def _forward(self, rows: Sequence[list[int]], fixed: int) -> list[TokenStates]:
        """fixed: how many states count; 0: as many as tokens are given."""
        ids = self._padded(rows, fixed)
        hidden, pooled = self._clip(ids) if self.is_clip else self._gemma(ids)
        if not hidden.isfinite().all():
            expected = "finite states (float16 is too narrow for some models; bfloat16 is not)"
            _checks.fail(type(self).__name__, self.name, expected, f"inf or nan in {hidden.dtype}")
        hidden = hidden.cpu()
        each = [None] * len(rows) if pooled is None else pooled.cpu().unbind()
        # A view would keep the whole batch.
        return [
            TokenStates(h[: fixed or len(row)].clone(), None if p is None else p.clone())
            for row, h, p in zip(rows, hidden, each, strict=True)
        ]

    def _clip(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.module(input_ids=ids, output_hidden_states=True)
        projected = getattr(out, "text_embeds", None)
        return out.hidden_states[-2], out.pooler_output if projected is None else projected

    def _gemma(self, ids: Tensor) -> tuple[Tensor, None]:
        return self.module(input_ids=ids, use_cache=False).last_hidden_state, None

    def _tokens(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        """Token numbers of each text, with the first and last that the tokenizer adds."""
        whole = self.tokenizer(list(texts), verbose=False).input_ids
        for text, ids in zip(texts, whole, strict=True):
            if len(ids) > limit:
                self._warn(text, len(ids), limit)
        return self.tokenizer(list(texts), truncation=True, max_length=limit).input_ids

    def _warn(self, text: str, length: int, limit: int) -> None:
        room = limit - self.tokenizer.num_special_tokens_to_add()
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        cut = self.tokenizer.decode(ids[room:]).strip()
        message = f"{self.name} takes {limit} tokens of {length}; cut: {cut!r}"
        warnings.warn(f"{type(self).__name__}: {message}", UserWarning, stacklevel=2)

    def _padded(self, rows: Sequence[list[int]], fixed: int) -> Tensor:
        """[B, S], on the right."""
        pad = self.tokenizer.pad_token_id
        pad = (self.tokenizer.eos_token_id or 0) if pad is None else pad
        length = max(fixed, 1, *map(len, rows))
        ids = [row + [pad] * (length - len(row)) for row in rows]
        return torch.tensor(ids, device=self.device)


# --- Folders --------------------------------------------------------------------------------------


def _classes(name: str) -> dict[str, str]:
    return CLIP_CLASSES if name in CLIP else GEMMA_CLASSES


def _folders(folder: Folder) -> tuple[Path, Path]:
    """The model's, the tokenizer's."""
    model, tokenizer = folder if isinstance(folder, tuple) else (folder, folder)
    return Path(model), Path(tokenizer)


def _missing(folder: Folder) -> str:
    """What was expected and not found; "" where all is there."""
    model, tokenizer = _folders(folder)
    absent = [str(f) for f in dict.fromkeys((model, tokenizer)) if not f.is_dir()]
    if not absent:
        if not (model / "config.json").is_file():
            absent.append("config.json")
        if not any(model.glob("*.safetensors")):
            absent.append("*.safetensors")
        names = ("tokenizer.json", "tokenizer.model", "vocab.json")
        if not any((tokenizer / name).is_file() for name in names):
            absent.append("a tokenizer")
    if not absent:
        return ""
    expected = "a local folder with config.json, *.safetensors and a tokenizer (tokenizer.json, "
    expected += "tokenizer.model, or vocab.json and merges.txt), or (the model's, the tokenizer's)"
    places = " and ".join(map(str, dict.fromkeys((model, tokenizer))))
    return f"expected {expected}, got {places} without {', '.join(absent)}"


def _load_model(transformers: Any, op: str, name: str, folder: Path) -> nn.Module:
    classes = _classes(name)
    found = json.loads((folder / "config.json").read_text()).get("architectures") or ["none"]
    if found[0] not in classes:
        expected = f"architectures of {', '.join(classes)} in {folder / 'config.json'}"
        _checks.fail(op, name, expected, found[0])
    options: dict[str, Any] = {} if name in CLIP else {"attn_implementation": "eager"}
    options |= {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    module, info = getattr(transformers, classes[found[0]]).from_pretrained(folder, **options)
    if info["missing_keys"]:  # transformers draws them at random, and says so in a log
        got = f"{folder} without {', '.join(sorted(info['missing_keys'])[:3])}"
        _checks.fail(op, name, "all weights of the model", got)
    return module


def _transformers(op: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"{op}: expected transformers, got none (pip install 'dfm_fast[text]')"
        ) from error


# --- All encoders of a backbone -------------------------------------------------------------------


class TextEncoders:
    """Texts to what a backbone takes, by those encoders that are there.

        encoders = TextEncoders.from_pretrained(clip_l="clip-l/", gemma="gemma-2-2b/")
        text, mask, pooled = encoders.encode(["a fox in the snow"])

    Args:
        layout: of the backbone.
        encoders: some of its encoders, by name: those that are missing count as dropped.
        cache: texts per encoder whose states are kept, in host memory, the latest used: 0.2 MB
            (CLIP-L) and 0.4 MB (CLIP-G) of float32 each, 9 kB a token for Gemma.

    Raises:
        ValueError: encoders that are no part of the layout or of another width.
    """

    def __init__(
        self, layout: TextLayout, encoders: Mapping[str, TextEncoder], *, cache: int = 1024
    ) -> None:
        _checks.integer(type(self).__name__, "cache", cache, 0)
        self.layout, self.encoders, self.cache = layout, dict(encoders), cache
        _check_encoders(type(self).__name__, layout, self.encoders)
        self._kept = {name: OrderedDict[str, TokenStates]() for name in self.encoders}

    @classmethod
    def from_pretrained(
        cls,
        layout: TextLayout = T2I,
        *,
        clip_l: Folder | None = None,
        clip_g: Folder | None = None,
        gemma: Folder | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        cache: int = 1024,
    ) -> TextEncoders:
        """From local folders, as `TextEncoder.load` reads them.

        Raises:
            FileNotFoundError: all that is missing, by encoder and folder. ValueError, ImportError:
                as `TextEncoder.load` and the constructor.
        """
        op = f"{cls.__name__}.from_pretrained"
        folders = {"clip_l": clip_l, "clip_g": clip_g, "gemma": gemma}
        given = {name: folder for name, folder in folders.items() if folder is not None}
        _check_names(op, layout, given)
        missing = {name: _missing(folder) for name, folder in given.items()}
        if any(missing.values()):
            wrong = "; ".join(f"{name}: {text}" for name, text in missing.items() if text)
            raise FileNotFoundError(f"{op}: {wrong}")
        encoders = {
            name: TextEncoder.load(name, folder, device=device, dtype=dtype)
            for name, folder in given.items()
        }
        return cls(layout, encoders, cache=cache)

    @property
    def device(self) -> torch.device:
        return next(iter(self.encoders.values())).device

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TextEncoders:
        """Move all, in place; `to("cpu")` makes room once the texts are encoded. What is kept of
        texts stays, but for another dtype."""
        for encoder in self.encoders.values():
            encoder.module.to(device, dtype)
        if dtype is not None:
            self.clear()
        return self

    def clear(self) -> None:
        """Forget what is kept of texts."""
        for kept in self._kept.values():
            kept.clear()

    def encode(
        self,
        prompts: str | Sequence[str],
        *,
        only: Sequence[str] | None = None,
        keep: Tensor | None = None,
        padded: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TextConditions:
        """Encode texts and join their states. A text that was encoded before is not again.

        Args:
            prompts: one, or B.
            only: encoders to use, of those that are there; the others count as dropped.
            keep, padded: as `join_states`.
            device, dtype: of the result; by default the encoders' device and widest dtype.

        Returns:
            text [B, S, D], mask [B, S], pooled [B, P] or None.

        Raises:
            TypeError, ValueError: arguments; states that are not finite.
        """
        states = self.states(prompts, only)
        batch = 1 if isinstance(prompts, str) else len(prompts)
        device = self.device if device is None else device
        options: dict[str, Any] = {"padded": padded, "device": device, "dtype": dtype}
        return join_states(self.layout, states, keep, batch=batch, **options)

    def states(
        self, prompts: str | Sequence[str], only: Sequence[str] | None = None
    ) -> dict[str, list[TokenStates]]:
        """What each encoder makes of each text, in host memory and not to be written into."""
        op = f"{type(self).__name__}.encode"
        texts = [self.layout.prompt(text) for text in _check_texts(op, prompts)]
        names = tuple(self.encoders) if only is None else tuple(only)
        if unknown := [name for name in names if name not in self.encoders]:
            _checks.fail(op, "only", f"some of {', '.join(self.encoders)}", ", ".join(unknown))
        return {name: self._states(name, texts) for name in self.encoders if name in names}

    def _states(self, name: str, texts: Sequence[str]) -> list[TokenStates]:
        kept = self._kept[name]
        found = {text: kept[text] for text in texts if text in kept}
        new = [text for text in dict.fromkeys(texts) if text not in found]
        if new:
            made = self.encoders[name](new, self.layout)
            found.update(zip(new, made, strict=True))
        for text, states in found.items():
            kept[text] = states
            kept.move_to_end(text)
        while len(kept) > self.cache:
            kept.popitem(last=False)
        return [found[text] for text in texts]


def _check_names(op: str, layout: TextLayout, given: Mapping[str, Any]) -> None:
    if not given:
        _checks.fail(op, "encoders", f"some of {', '.join(layout.names)}", "none")
    for name in given:
        if name not in layout.names:
            _checks.fail(op, name, f"an encoder of the layout: {', '.join(layout.names)}", "it")


def _check_encoders(op: str, layout: TextLayout, encoders: Mapping[str, TextEncoder]) -> None:
    _check_names(op, layout, encoders)
    for name, encoder in encoders.items():
        if encoder.name != name:
            _checks.fail(op, name, f"an encoder named {name}", encoder.name)
        config, width = config_of(encoder.module), getattr(layout, name)
        if encoder.width != width:
            _checks.fail(op, name, f"width {width} of the layout", encoder.width)
        if not encoder.is_clip:
            continue
        projected = type(encoder.module).__name__ == "CLIPTextModelWithProjection"
        if projected and config.projection_dim != width:
            _checks.fail(op, name, f"a projection to {width}", config.projection_dim)
        if encoder.max_length < layout.clip_length:
            expected = f"at least clip_length = {layout.clip_length} positions"
            _checks.fail(op, name, expected, encoder.max_length)


def _check_texts(op: str, prompts: str | Sequence[str]) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        _checks.fail(op, "prompts", "a text or a sequence of texts", repr(prompts)[:80], TypeError)
    if not texts:
        _checks.fail(op, "prompts", "at least one text", "none")
    return list(texts)
