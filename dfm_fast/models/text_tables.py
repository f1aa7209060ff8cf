"""Conditions that are known ahead: tables of encoded texts, names of classes, learned tokens.

Label i is row i everywhere, and the number of rows is the null label, which is no token at all
(`text_layouts`): labels of a dataset, and what `class_dropout` makes of them, go in as they are.
"""

from __future__ import annotations

import bisect
import importlib
import itertools
import json
import os
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.models._pretrained import Pretrained, write_bytes
from dfm_fast.models.text_encoders import TextEncoders
from dfm_fast.models.text_layouts import TextConditions, TextLayout, TokenStates, join_states

# --- Encoded texts --------------------------------------------------------------------------------


class TextTable:
    """Texts encoded once, for training: classes' names, or captions of a set that fits in memory.

        table = TextTable.encode(encoders, class_names)
        table.save("classes.safetensors", torch.bfloat16)  # 1000 names by CLIP-L: 118 MB
        text, mask, _ = table(labels, keep=draw_kept(table.layout, seed, positions))

    Args:
        layout: of the backbone.
        texts: N, as they were given, without the template.
        states: N of each encoder.

    Raises:
        ValueError: no text, other numbers of states.
    """

    def __init__(
        self,
        layout: TextLayout,
        texts: Sequence[str],
        states: Mapping[str, Sequence[TokenStates]],
    ) -> None:
        op = type(self).__name__
        if not texts:
            _checks.fail(op, "texts", "at least one text", "none")
        for name, rows in states.items():
            if len(rows) != len(texts):
                _checks.fail(op, f"states of {name}", f"{len(texts)}", len(rows))
        self.layout, self.texts, self.states = layout, tuple(texts), dict(states)

    @classmethod
    def encode(cls, encoders: TextEncoders, texts: Sequence[str]) -> TextTable:
        """By those encoders that are there."""
        return cls(encoders.layout, texts, encoders.states(texts))

    @classmethod
    def joined(cls, tables: Sequence[TextTable]) -> TextTable:
        """One after the other, of one layout and the same encoders; nothing is copied."""
        _check_alike(f"{cls.__name__}.joined", tables)
        texts = [text for table in tables for text in table.texts]
        states = {n: _Joined([table.states[n] for table in tables]) for n in tables[0].states}
        return cls(tables[0].layout, texts, states)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def null_class(self) -> int:
        """The label of no text."""
        return len(self)

    def __call__(
        self,
        labels: Tensor | Sequence[int],
        keep: Tensor | None = None,
        *,
        padded: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TextConditions:
        """Conditions of B labels.

        Args:
            labels: [B] int64, or B ints; `null_class` is no text.
            keep: bool [B, E], such as `draw_kept` gives: encoders that are not dropped.
            padded, dtype: as `join_states`.
            device: of the result; by default that of `labels`.
        """
        if device is None and isinstance(labels, Tensor):
            device = labels.device
        labels = _check_labels(type(self).__name__, torch.as_tensor(labels).cpu(), len(self))
        null = labels == self.null_class
        if keep is None:
            keep = torch.ones(len(labels), len(self.layout.names), dtype=torch.bool)
        if isinstance(keep, Tensor) and keep.ndim == 2 and len(keep) == len(labels):
            keep = keep.cpu() & ~null[:, None]
        picked = labels.masked_fill(null, 0).tolist()
        states = {name: [rows[i] for i in picked] for name, rows in self.states.items()}
        options: dict[str, Any] = {"padded": padded, "device": device, "dtype": dtype}
        return join_states(self.layout, states, keep, batch=len(picked), **options)

    def save(self, file: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """One file of safetensors; dtype None keeps that of the states."""
        from safetensors.torch import save

        tensors = {}
        for name, rows in self.states.items():
            hidden = torch.cat([s.hidden for s in rows])
            tensors[f"{name}.hidden"] = hidden.to(dtype)  # [sum of S, W]
            tensors[f"{name}.lengths"] = torch.tensor([len(s.hidden) for s in rows])  # [N]
            if rows[0].pooled is not None:
                pooled = [s.pooled for s in rows if s.pooled is not None]
                tensors[f"{name}.pooled"] = torch.stack(pooled).to(dtype)
        metadata = {"texts": json.dumps(self.texts), "layout": json.dumps(self.layout.to_dict())}
        write_bytes(Path(file), save(tensors, metadata))

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> TextTable:
        """What `save` wrote, memory-mapped: states are read when they are asked for.

        Raises:
            FileNotFoundError: no such file. ValueError: another file of safetensors.
        """
        from safetensors import safe_open

        if not Path(file).is_file():
            raise FileNotFoundError(f"{cls.__name__}.load: file: expected a table, got {file}")
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if not metadata.keys() >= {"texts", "layout"}:
            _checks.fail(f"{cls.__name__}.load", "file", "a saved table", file)
        layout = TextLayout(**json.loads(metadata["layout"]))
        names = [name for name in layout.names if f"{name}.hidden" in tensors]
        return cls(layout, json.loads(metadata["texts"]), {n: _Rows(tensors, n) for n in names})


class _States(Sequence[TokenStates]):
    """Of one encoder, made when they are asked for."""

    @overload
    def __getitem__(self, i: int) -> TokenStates: ...

    @overload
    def __getitem__(self, i: slice) -> list[TokenStates]: ...

    def __getitem__(self, i: int | slice) -> TokenStates | list[TokenStates]:
        places = range(len(self))[i]
        return self._row(places) if isinstance(places, int) else [*map(self._row, places)]

    @abstractmethod
    def _row(self, i: int) -> TokenStates: ...


class _Rows(_States):
    """Those of one encoder in a saved table."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        self.ends = tensors[f"{name}.lengths"].cumsum(0).tolist()
        self.hidden, self.pooled = tensors[f"{name}.hidden"], tensors.get(f"{name}.pooled")

    def __len__(self) -> int:
        return len(self.ends)

    def _row(self, i: int) -> TokenStates:
        hidden = self.hidden[self.ends[i - 1] if i else 0 : self.ends[i]]
        return TokenStates(hidden, None if self.pooled is None else self.pooled[i])


class _Joined(_States):
    """Several tables' rows of one encoder."""

    def __init__(self, parts: Sequence[Sequence[TokenStates]]) -> None:
        self.parts = parts
        self.ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def _row(self, i: int) -> TokenStates:
        part = bisect.bisect_right(self.ends, i)
        return self.parts[part][i - (self.ends[part - 1] if part else 0)]


def _check_alike(op: str, tables: Sequence[TextTable]) -> None:
    if not tables:
        _checks.fail(op, "tables", "at least one", "none")
    first = tables[0]
    for table in tables[1:]:
        for name, one, other in (
            ("layout", first.layout, table.layout),
            ("encoders", list(first.states), list(table.states)),
        ):
            if one != other:
                _checks.fail(op, "tables", f"one {name}", f"{one} and {other}")


# --- Learned tokens -------------------------------------------------------------------------------


class ClassTokens(Pretrained):
    """Learned tokens of every class, in place of a text: for class labels without an encoder.

    Args:
        num_classes: labels are 0 to num_classes - 1; `num_classes` is the null label.
        tokens: S of each class.
        dim: D, the backbone's `cross_dim`.

    Tokens are standard normal at first, about as large as an encoder's states.

    Raises:
        TypeError, ValueError: sizes; labels of another dtype or shape, or (on a CPU) out of range.
    """

    def __init__(self, num_classes: int, tokens: int, dim: int) -> None:
        super().__init__()
        op = type(self).__name__
        for name, value in (("num_classes", num_classes), ("tokens", tokens), ("dim", dim)):
            _checks.integer(op, name, value, 1)
        self.config = {"num_classes": num_classes, "tokens": tokens, "dim": dim}
        self.num_classes, self.tokens, self.dim = num_classes, tokens, dim
        self.weight = nn.Parameter(torch.empty(num_classes, tokens * dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    @property
    def null_class(self) -> int:
        """The label of no class."""
        return self.num_classes

    def forward(self, labels: Tensor) -> TextConditions:
        """[B] int64 -> text [B, S, D], mask [B, S]; for the null label no token counts."""
        _check_labels(type(self).__name__, labels, self.num_classes)
        null = labels == self.null_class
        text = F.embedding(labels.masked_fill(null, 0), self.weight)
        text = text.masked_fill(null[:, None], 0).view(-1, self.tokens, self.dim)
        return TextConditions(text, (~null)[:, None].expand(-1, self.tokens).contiguous())

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, tokens={self.tokens}, dim={self.dim}"


def _check_labels(op: str, labels: Tensor, classes: int) -> Tensor:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        _checks.fail(op, "labels", "an int64 tensor", got, TypeError)
    if labels.ndim != 1:
        _checks.fail(op, "labels", "[B]", list(labels.shape))
    # A GPU would have to wait for the answer.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and len(labels):
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high > classes:
            expected = f"0 to {classes - 1}, or {classes} for none"
            _checks.fail(op, "labels", expected, low if low < 0 else high)
    return labels


# --- Names ----------------------------------------------------------------------------------------

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def read_class_names(file: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of classes, in the order of their labels.

    Args:
        file: one name a line; or JSON (*.json), a list or an object {"0": name, ...}.

    Raises:
        FileNotFoundError: no such file. ValueError: an empty name, labels that are not 0, 1, ...

    Names that are equal but for case are a warning: their classes cannot be told apart.
    """
    op, file = "read_class_names", Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{op}: file: expected a file of names, got {file}")
    text = file.read_text(encoding="utf-8")
    given = _json_names(op, file, text) if file.suffix == ".json" else text.splitlines()
    if not given or not all(isinstance(name, str) and name.strip() for name in given):
        first = next((i for i, n in enumerate(given) if not isinstance(n, str) or not n.strip()), 0)
        _checks.fail(op, "file", f"a name for every label in {file}", f"none for label {first}")
    names = tuple(name.strip() for name in given)
    if same := _repeated(names):
        warnings.warn(f"{op}: {file}: several classes of one name: {same}", stacklevel=2)
    return names


def _json_names(op: str, file: Path, text: str) -> list[Any]:
    try:
        names = json.loads(text)
    except json.JSONDecodeError as error:
        _checks.fail(op, "file", f"JSON in {file}", error)
    if isinstance(names, dict):
        if set(names) != {str(i) for i in range(len(names))}:
            expected = f'labels "0" to "{len(names) - 1}" in {file}'
            _checks.fail(op, "file", expected, sorted(names)[:3])
        names = [names[str(i)] for i in range(len(names))]
    if not isinstance(names, list):
        _checks.fail(op, "file", f"a list or an object in {file}", type(names).__name__)
    return names


def _repeated(names: Sequence[str]) -> list[str]:
    counts = Counter(name.casefold() for name in names)
    return [name for name in counts if counts[name] > 1]


def imagenet_class_names() -> tuple[str, ...]:
    """WordNet's words for ImageNet's 1000 classes, from timm, such as "tench, Tinca tinca". Where
    classes have the same words (two cranes), their definition follows.

    Raises:
        ImportError: no timm.
    """
    try:
        info = importlib.import_module("timm.data").ImageNetInfo("imagenet-1k")
    except ImportError as error:
        expected = "timm, or names from read_class_names"
        raise ImportError(f"imagenet_class_names: expected {expected}, got {error}") from error
    names, defined = (info.label_descriptions(detailed=detailed) for detailed in (False, True))
    same = set(_repeated(names))
    return tuple(
        long if name.casefold() in same else name for name, long in zip(names, defined, strict=True)
    )
