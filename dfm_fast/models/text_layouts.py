r"""What a backbone is told of a text: states of several encoders joined, each of them optional.

Tokens of CLIP-L and CLIP-G are the same pieces of the text, so their states lie side by side in
the channels; those of Gemma follow along the sequence, as Stable Diffusion 3 joins CLIP and T5
(arXiv 2403.03206, section 5.1):

    text = [ clip_l_1 | clip_g_1 | 0 ]    mask = [ 1      [B, S, D], D the larger of the two widths
           [   ...    |   ...    | 0 ]             ...
           [      gemma_1        | 0 ]             1
           [        ...          | 0 ]             0 ]    beyond the text's end

An encoder that is dropped in training, or is not there at inference, leaves no trace: zeros in its
channels, no token of its own in the mask. Without Gemma there are CLIP's tokens alone; without any
there is none, which is the unconditional. Attention to no token is 0 (`multi_query_attention`) and
costs nothing, and it is the same in training and in guidance, whatever a batch is padded to.
Stable Diffusion 3 drops by zeros that are attended to: of projections without bias that is 0 too
where all are dropped, but where one is, its zeros take a share of the attention that depends on how
many they are. The empty text is a text: a negative prompt, not the unconditional.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfm_fast import _checks

ENCODERS = ("clip_l", "clip_g", "gemma")
CLIP = ("clip_l", "clip_g")
CLIP_TOKENS = ("all", "prompt")


class TokenStates(NamedTuple):
    """What one encoder makes of one text."""

    hidden: Tensor  # [S, W], of the tokens that count
    pooled: Tensor | None = None  # [W]


class TextConditions(NamedTuple):
    """Texts as a backbone takes them."""

    text: Tensor  # [B, S, D], 0 where mask is False
    mask: Tensor  # [B, S] bool, the tokens that count
    pooled: Tensor | None = None  # [B, P], of the CLIPs; 0 where dropped

    def unconditional(self) -> TextConditions:
        """Of the same shapes, with no token: `uncond` of guidance."""
        text, mask = torch.zeros_like(self.text), torch.zeros_like(self.mask)
        return TextConditions(
            text, mask, None if self.pooled is None else torch.zeros_like(self.pooled)
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TextConditions:
        text, mask, pooled = self
        pooled = None if pooled is None else pooled.to(device, dtype)
        return TextConditions(text.to(device, dtype), mask.to(device), pooled)


@dataclass(frozen=True)
class TextLayout:
    """Which encoders a backbone is trained with, and how their states are joined. It belongs to
    the backbone: what is encoded for it at inference needs the same.

    Raises:
        TypeError, ValueError: sizes, a template without {}.
    """

    clip_l: int = 768
    """Width of CLIP-L; 0: not a part."""

    clip_g: int = 1280
    gemma: int = 2304

    clip_tokens: str = "all"
    """"all": the padding behind a text counts, as in SDXL and Stable Diffusion 3: it has seen the
    whole text. "prompt": from the first token to the end of the text; fewer keys, less work."""

    clip_length: int = 77
    """Tokens that CLIP takes, of which two are the start and the end."""

    max_tokens: int = 256
    """Tokens of Gemma at most."""

    template: str = "{}"
    """What every text is put in, such as "a photo of a {}"."""

    def __post_init__(self) -> None:
        op = type(self).__name__
        for name in ENCODERS:
            _checks.integer(op, name, getattr(self, name), 0)
        if not self.names:
            _checks.fail(op, "clip_l", "a width of some encoder", "0 for all")
        _checks.choice(op, "clip_tokens", self.clip_tokens, CLIP_TOKENS)
        _checks.integer(op, "clip_length", self.clip_length, 3)
        _checks.integer(op, "max_tokens", self.max_tokens, 2)
        if not isinstance(self.template, str) or self.template.count("{}") != 1:
            _checks.fail(op, "template", "a text with one {}", repr(self.template))

    @property
    def names(self) -> tuple[str, ...]:
        """The encoders that are a part, in the order of `keep`."""
        return tuple(name for name in ENCODERS if getattr(self, name))

    @property
    def dim(self) -> int:
        """D, the backbone's `cross_dim`."""
        return max(self.clip_l + self.clip_g, self.gemma)

    @property
    def pooled_dim(self) -> int:
        """P; 0: there is no pooled state."""
        return self.clip_l + self.clip_g

    @property
    def max_length(self) -> int:
        """S at most."""
        return self.clip_length * bool(self.pooled_dim) + self.max_tokens * bool(self.gemma)

    def prompt(self, text: str) -> str:
        """The text in the template. No `str.format`: texts have braces of their own."""
        before, after = self.template.split("{}")
        return before + text + after

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `TextLayout(**values)` is the way back."""
        return dataclasses.asdict(self)


T2I = TextLayout()  # D = 2304: Gemma-2-2B's width, over CLIP's 768 + 1280
CLASS_NAMES = TextLayout(clip_g=0, gemma=0)  # D = 768

# --- Dropping -------------------------------------------------------------------------------------


def dropout_probability(layout: TextLayout, unconditional: float = 0.1) -> float:
    """Chance of each encoder by which all are dropped together in that part of the samples: 0.464
    for three and a tenth, as Stable Diffusion 3."""
    if not 0 <= unconditional <= 1:
        _checks.fail("dropout_probability", "unconditional", "0 to 1", unconditional)
    return unconditional ** (1 / len(layout.names))


def draw_kept(
    layout: TextLayout,
    seed: int,
    positions: Sequence[int],
    probabilities: float | Mapping[str, float] | None = None,
) -> Tensor:
    """Which encoders training keeps, each drawn on its own.

    Args:
        layout: of E encoders.
        seed, positions: the run's seed and B places in its order of samples: what is drawn is a
            function of the two, so that a resumed run draws the same, on any number of ranks.
        probabilities: chance that an encoder is dropped, for all or by name (0 for one that is not
            named); None: `dropout_probability(layout)`.

    Returns:
        bool [B, E], the `keep` of `join_states`.
    """
    op = "draw_kept"
    _checks.integer(op, "seed", seed, 0)
    if probabilities is None:
        probabilities = dropout_probability(layout)
    if not isinstance(probabilities, Mapping):
        probabilities = dict.fromkeys(layout.names, probabilities)
    if unknown := sorted(probabilities.keys() - set(layout.names)):
        _checks.fail(op, "probabilities", f"names of {', '.join(layout.names)}", unknown)
    chances = [probabilities.get(name, 0.0) for name in layout.names]
    if not all(0 <= p <= 1 for p in chances):
        _checks.fail(op, "probabilities", "0 to 1", chances)
    rows = [_kept(seed, int(position), chances) for position in positions]
    return torch.tensor(rows, dtype=torch.bool).view(len(rows), len(chances))


def _kept(seed: int, position: int, chances: Sequence[float]) -> list[bool]:
    # A key of its own: nothing else that is drawn at this position goes along with it.
    generator = random.Random(f"text encoders {seed} {position}")
    return [generator.random() >= p for p in chances]


# --- Joining --------------------------------------------------------------------------------------


def join_states(
    layout: TextLayout,
    states: Mapping[str, Sequence[TokenStates]],
    keep: Tensor | None = None,
    *,
    batch: int | None = None,
    padded: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TextConditions:
    """Join what encoders made of B texts.

    Args:
        layout: of the backbone.
        states: B of each encoder; those of the layout that are missing count as dropped.
        keep: bool [B, E], in the order of `layout.names`; None keeps all.
        batch: B, where `states` has no encoder.
        padded: S is `layout.max_length`, one shape for compiled code; otherwise as short as this
            batch allows. Tokens that are added are masked out: results are the same.
        device, dtype: of the result; by default on the states' device, in their widest dtype.

    Returns:
        text [B, S, D], S at least 1; mask [B, S]; pooled [B, P], or None in a layout without CLIP.

    Raises:
        TypeError, ValueError: encoders that are no part of the layout, other numbers of texts,
            widths or lengths.
    """
    batch = _check_states(layout, states, batch)
    kept = _check_keep(layout, keep, batch)
    rows = {
        name: [s if k else None for s, k in zip(states[name], kept[name], strict=True)]
        for name in states
    }
    given = [s.hidden for name in states for s in states[name]]
    found = {"dtype": _widest(given), "device": given[0].device if given else None}
    text, mask = zip(*_blocks(layout, rows, batch, padded, found), strict=True)
    pooled = _pooled(layout, rows, batch, found) if layout.pooled_dim else None
    return TextConditions(torch.cat(text, 1), torch.cat(mask, 1), pooled).to(device, dtype)


Rows = Mapping[str, Sequence[TokenStates | None]]


def _blocks(
    layout: TextLayout, rows: Rows, batch: int, padded: bool, found: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """(text, mask) of the CLIPs together, then of Gemma."""
    parts = [(CLIP, layout.clip_length), (("gemma",), layout.max_tokens)]
    parts = [(names, length) for names, length in parts if any(getattr(layout, n) for n in names)]
    lengths = [length if padded else _longest(rows, names) for names, length in parts]
    if not sum(lengths):
        lengths[0] = 1  # operators need not take an empty sequence
    return [
        _block(layout, rows, names, (batch, length), found)
        for (names, _), length in zip(parts, lengths, strict=True)
    ]


def _block(
    layout: TextLayout,
    rows: Rows,
    names: Sequence[str],
    shape: tuple[int, int],
    found: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Encoders side by side, tokens [B, S] of each sample from the left."""
    text = torch.zeros(*shape, layout.dim, **found)
    lengths, start = [0] * shape[0], 0
    for name in names:
        end = start + getattr(layout, name)
        for i, s in enumerate(rows.get(name, ())):
            if s is not None:
                text[i, : len(s.hidden), start:end] = s.hidden
                lengths[i] = max(lengths[i], len(s.hidden))
        start = end
    mask = torch.arange(shape[1]) < torch.tensor(lengths).view(-1, 1)
    return text, mask.to(found["device"])


def _pooled(layout: TextLayout, rows: Rows, batch: int, found: dict[str, Any]) -> Tensor:
    pooled, start = torch.zeros(batch, layout.pooled_dim, **found), 0
    for name in CLIP:
        end = start + getattr(layout, name)
        for i, s in enumerate(rows.get(name, ())):
            if s is not None and s.pooled is not None:
                pooled[i, start:end] = s.pooled
        start = end
    return pooled


def _longest(rows: Rows, names: Sequence[str]) -> int:
    given = (s for name in names for s in rows.get(name, ()) if s is not None)
    return max((len(s.hidden) for s in given), default=0)


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    dtypes = {t.dtype for t in tensors} or {torch.float32}
    widest = dtypes.pop()
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def _check_states(
    layout: TextLayout, states: Mapping[str, Sequence[TokenStates]], batch: int | None
) -> int:
    """The number of texts."""
    op = "join_states"
    if unknown := sorted(states.keys() - set(layout.names)):
        _checks.fail(op, "states", f"encoders of {', '.join(layout.names)}", ", ".join(unknown))
    counts = {len(rows) for rows in states.values()} | ({batch} if batch is not None else set())
    if len(counts) != 1:
        _checks.fail(op, "states", "one number of texts", sorted(counts) or "no encoder, no batch")
    for name, rows in states.items():
        limit = layout.clip_length if name in CLIP else layout.max_tokens
        for s in rows:
            if s.hidden.ndim != 2 or s.hidden.shape[1] != getattr(layout, name):
                expected = f"hidden [S, {getattr(layout, name)}]"
                _checks.fail(op, f"states of {name}", expected, list(s.hidden.shape))
            if len(s.hidden) > limit:
                _checks.fail(op, f"states of {name}", f"at most {limit} tokens", len(s.hidden))
    return counts.pop()


def _check_keep(layout: TextLayout, keep: Tensor | None, batch: int) -> dict[str, list[bool]]:
    """By encoder."""
    shape = [batch, len(layout.names)]
    if keep is None:
        keep = torch.ones(shape, dtype=torch.bool)
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        _checks.fail("join_states", "keep", "a bool tensor", got, TypeError)
    if list(keep.shape) != shape:
        _checks.fail("join_states", "keep", f"{shape} for {layout.names}", list(keep.shape))
    return dict(zip(layout.names, keep.t().tolist(), strict=True))
