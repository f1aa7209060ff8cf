"""What a call of SnapGen's pipeline asks for, checked before any work; pictures in their forms."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfm_fast import _checks
from dfm_fast.models.text_tables import ClassTokens

if TYPE_CHECKING:
    from dfm_fast.models.snapgen_pipeline import SnapGenPipeline

OUTPUTS = ("pil", "np", "pt", "latent")
SEEDS = 1 << 64


@dataclass(frozen=True)
class Request:
    """B prompts or labels, `each` pictures of every one."""

    prompts: list[str]  # B, or none beside labels
    negatives: list[str] | None  # B, or None: no text
    labels: list[int]  # B, or none beside prompts
    each: int
    size: tuple[int, int, int]  # of a picture's latents, [C, h, w]

    @property
    def rows(self) -> int:
        """B"""
        return len(self.prompts or self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, C, h, w] of all latents."""
        return (self.rows * self.each, *self.size)


def make_request(
    op: str,
    pipeline: SnapGenPipeline,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    class_labels: int | Sequence[int] | Tensor | None,
    each: int,
    height: int | None,
    width: int | None,
) -> Request:
    if (prompt is None) == (class_labels is None):
        got = "neither" if prompt is None else "both"
        _checks.fail(op, "prompt", "prompts, or class_labels in their place", got)
    prompts: list[str] = []
    labels: list[int] = []
    negatives = None
    if prompt is None:
        labels = _labels(op, pipeline, class_labels)
        if negative_prompt is not None:
            _checks.fail(op, "negative_prompt", "None beside class_labels", repr(negative_prompt))
    else:
        if isinstance(pipeline.conditions, ClassTokens):
            _checks.fail(op, "prompt", "class_labels, as there is no text encoder", repr(prompt))
        prompts = _texts(op, "prompt", prompt)
        negatives = _negatives(op, negative_prompt, len(prompts))
    each = _checks.integer(op, "num_images_per_prompt", each, 1)
    sides = _side(op, pipeline, "height", height), _side(op, pipeline, "width", width)
    return Request(prompts, negatives, labels, each, (pipeline.unet.in_channels, *sides))


def _texts(op: str, name: str, texts: Any) -> list[str]:
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        _checks.fail(op, name, "a text or a sequence of texts", repr(texts)[:80], TypeError)
    if not texts:
        _checks.fail(op, name, "at least one text", "none")
    return list(texts)


def _negatives(op: str, texts: Any, count: int) -> list[str] | None:
    if texts is None:
        return None
    given = _texts(op, "negative_prompt", texts)
    if isinstance(texts, str):
        return given * count
    if len(given) != count:
        _checks.fail(op, "negative_prompt", f"one text, or {count} like prompt", len(given))
    return given


def _labels(op: str, pipeline: SnapGenPipeline, labels: Any) -> list[int]:
    tokens = pipeline.conditions
    if not isinstance(tokens, ClassTokens):
        _checks.fail(op, "class_labels", "a prompt, as there are no class tokens", labels)
    if isinstance(labels, Tensor):
        if labels.dtype != torch.int64 or labels.ndim > 1:
            got = f"{labels.dtype} {list(labels.shape)}"
            _checks.fail(op, "class_labels", "an int64 tensor [B]", got, TypeError)
        labels = labels.tolist()
    labels = [labels] if isinstance(labels, int) else labels
    if not isinstance(labels, Sequence) or isinstance(labels, str):
        _checks.fail(op, "class_labels", "an int, or a sequence of ints", repr(labels), TypeError)
    if not labels:
        _checks.fail(op, "class_labels", "at least one label", "none")
    for label in labels:
        if _checks.integer(op, "class_labels", label, 0) > tokens.num_classes:
            expected = f"0 to {tokens.num_classes - 1}, or {tokens.num_classes} for none"
            _checks.fail(op, "class_labels", expected, label)
    return list(labels)


def _side(op: str, pipeline: SnapGenPipeline, name: str, pixels: int | None) -> int:
    """Latents along a side."""
    pixels = pipeline.sample_size * pipeline.factor if pixels is None else pixels
    if _checks.integer(op, name, pixels, 1) % pipeline.multiple:
        _checks.fail(op, name, f"a multiple of {pipeline.multiple}", pixels)
    return pixels // pipeline.factor


# --- How it is sampled ----------------------------------------------------------------------------


def check_sampling(op: str, steps: Any, scale: Any, interval: Any) -> None:
    _checks.integer(op, "num_inference_steps", steps, 1)
    finite_number(op, "guidance_scale", scale)
    if not isinstance(interval, Sequence) or len(interval) != 2:
        _checks.fail(op, "guidance_interval", "(low, high)", repr(interval), TypeError)
    low, high = (finite_number(op, "guidance_interval", bound) for bound in interval)
    if not 0 <= low <= high <= 1:
        _checks.fail(op, "guidance_interval", "0 <= low <= high <= 1", tuple(interval))


def finite_number(op: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _checks.fail(op, name, "a number", repr(value), TypeError)
    if not math.isfinite(value):
        _checks.fail(op, name, "a finite number", value)
    return float(value)


def check_latents(op: str, latents: Any, shape: Sequence[int]) -> None:
    if latents is None:
        return
    _checks.tensor(op, "latents", latents, (4,))
    if tuple(latents.shape) != tuple(shape):
        _checks.fail(op, "latents", f"shape {list(shape)}", list(latents.shape))


def draw_seeds(op: str, seed: Any, generator: Any, count: int) -> list[int]:
    """One for each picture, from 0 to 2^64 - 1."""
    if seed is not None and generator is not None:
        _checks.fail(op, "seed", "a seed or a generator", "both")
    if isinstance(seed, int):
        first = _seed(op, seed)
        return [(first + i) % SEEDS for i in range(count)]
    if seed is not None:
        if not isinstance(seed, Sequence):
            _checks.fail(op, "seed", "an int, or one for each picture", repr(seed), TypeError)
        if len(seed) != count:
            _checks.fail(op, "seed", f"one, or {count}, one for each picture", len(seed))
        return [_seed(op, s) for s in seed]
    several = isinstance(generator, Sequence)
    generators = generator if several else [generator] * count
    if len(generators) != count:
        _checks.fail(op, "generator", f"one, or {count}, one for each picture", len(generators))
    kinds = torch.Generator if several else torch.Generator | None
    if not all(isinstance(g, kinds) for g in generators):
        got = [type(g).__name__ for g in generators[:3]]
        _checks.fail(op, "generator", "torch.Generator", got, TypeError)
    return [_drawn(g) for g in generators]


def _seed(op: str, seed: Any) -> int:
    if _checks.integer(op, "seed", seed, 0) >= SEEDS:
        _checks.fail(op, "seed", "0 to 2^64 - 1", seed)
    return seed


def _drawn(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(1 << 62, (1,), generator=generator, device=device))


# --- Pictures -------------------------------------------------------------------------------------


def check_output(op: str, output_type: Any) -> None:
    _checks.choice(op, "output_type", output_type, OUTPUTS)
    if output_type == "pil" and importlib.util.find_spec("PIL") is None:
        raise ImportError(f"{op}: output_type: expected Pillow for 'pil', got none")


def converted(pictures: Tensor, output_type: str) -> Any:
    """[N, C, H, W] from 0 to 1 -> what `output_type` names, other than latents."""
    if output_type == "pt":
        return pictures
    pictures = pictures.permute(0, 2, 3, 1).contiguous().cpu()
    return pictures.numpy() if output_type == "np" else _pil(pictures)


def _pil(pictures: Tensor) -> list[Any]:
    """[N, H, W, C], on the CPU."""
    from PIL import Image

    # One channel is grey: [H, W].
    values = (255 * pictures).round().byte().numpy()
    return [Image.fromarray(v[..., 0] if v.shape[-1] == 1 else v) for v in values]
