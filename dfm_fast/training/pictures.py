"""Samples as pictures: a model or a checkpoint's average, guidance by labels, grids as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.flow import DecomposableFlow
from dfm_fast.models._pretrained import write_bytes
from dfm_fast.ops._philox import fold
from dfm_fast.training.outputs import check_folder
from dfm_fast.training.recipes import Recipe

SHOWN = 64  # pixels that smaller pictures are enlarged to, by whole factors


def labels_of(num_classes: int, count: int) -> Tensor | None:
    """`count` labels, class by class, of at most the first ten; None without classes."""
    if not num_classes:
        return None
    classes = min(num_classes, 10, count)
    return torch.arange(count) * classes // count


def columns_of(labels: Tensor | None) -> int | None:
    """Of a grid with a row per class."""
    return None if labels is None else math.ceil(len(labels) / len(labels.unique()))


def sample(
    model: nn.Module,
    flow: DecomposableFlow,
    recipe: Recipe,
    labels: Tensor | None,
    count: int,
    *,
    steps: Sequence[int] | None = None,
    threshold: float | Sequence[float] | None = None,
    cfg: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    preview: Callable[[int, Tensor], None] | None = None,
    progress: bool = False,
    cuda_graph: bool | None = None,
    batch: int | None = None,
) -> Tensor:
    """`count` samples [count, *shape], of the classes `labels` ([count]) if there are any. What is
    None is as the recipe has it. `batch`: how many are made at once, None for all (each part has
    noise of its own, so that another `batch` gives other samples); `preview` gets all of them."""
    if batch is not None and batch < count:
        return _in_parts(
            model, flow, recipe, labels, count, batch, seed, preview,
            steps=steps, threshold=threshold, cfg=cfg, device=device, progress=progress,
            cuda_graph=cuda_graph,
        )  # fmt: skip
    cond: dict[str, Any] = {}
    cfg = recipe.flow.cfg if cfg is None else cfg
    if labels is None:
        cfg = 1.0
    else:
        y = labels.to(device)
        cond = {"y": y, "uncond": {"y": torch.full_like(y, recipe.num_classes)}}
    return flow.sample(
        model,
        (count, *recipe.shape),
        steps=recipe.steps if steps is None else tuple(steps),
        threshold=recipe.flow.threshold if threshold is None else threshold,
        cfg_scale=cfg,
        seed=seed,
        preview=preview,
        progress=progress,
        cuda_graph=cuda_graph,
        device=device,
        **cond,
    )


def _in_parts(
    model: nn.Module,
    flow: DecomposableFlow,
    recipe: Recipe,
    labels: Tensor | None,
    count: int,
    batch: int,
    seed: int,
    preview: Callable[[int, Tensor], None] | None,
    **options: Any,
) -> Tensor:
    stages: dict[int, list[Tensor]] = {}

    def note(stage: int, x: Tensor) -> None:
        stages.setdefault(stage, []).append(x.cpu())

    parts = []
    for i, first in enumerate(range(0, count, batch)):
        rows = slice(first, min(first + batch, count))
        x = sample(
            model, flow, recipe, None if labels is None else labels[rows], rows.stop - first,
            seed=fold(seed, i) if i else seed, preview=note if preview else None, **options,
        )  # fmt: skip
        parts.append(x.cpu())
    if preview is not None:
        for stage, seen in stages.items():
            preview(stage, torch.cat(seen))
    return torch.cat(parts)


def grid(x: Tensor, columns: int | None = None) -> Tensor:
    """[N, C, (T,) H, W] in [-1, 1] -> uint8 [(T,) h, w, 3], with a white line between pictures.
    Of latents, whose channels are other than 1 or 3, the first three by their largest value."""
    x = x.detach().float().cpu()
    if x.shape[1] not in (1, 3):
        x = x[:, :3]
        x = x / x.abs().amax().clamp(min=1e-6)
        x = x if x.shape[1] == 3 else x[:, :1]
    video = x.ndim == 5
    frames = (x if video else x.unsqueeze(2)).transpose(0, 2)  # [T, C, N, H, W]
    if frames.shape[1] == 1:
        frames = frames.expand(-1, 3, -1, -1, -1)
    bytes_ = ((frames.nan_to_num(-1.0) + 1) * 127.5).round().clamp(0, 255).byte()
    factor = max(1, SHOWN // min(x.shape[-2:]))
    bytes_ = bytes_.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    tiled = _tiled(bytes_, columns or math.ceil(math.sqrt(len(x))))
    return tiled if video else tiled[0]


def _tiled(frames: Tensor, columns: int) -> Tensor:
    """[T, 3, N, H, W] -> [T, h, w, 3]"""
    count, (height, width) = frames.shape[2], frames.shape[-2:]
    rows, line = math.ceil(count / columns), 2
    size = rows * (height + line) - line, columns * (width + line) - line
    out = frames.new_full((len(frames), 3, *size), 255)
    for i in range(count):
        top, left = i // columns * (height + line), i % columns * (width + line)
        out[..., top : top + height, left : left + width] = frames[:, :, i]
    return out.permute(0, 2, 3, 1)


def check_path(op: str, argument: str, path: Path, video: bool) -> None:
    """Raise where `write` could not write there: before there is anything to write."""
    from PIL import Image

    ending = path.suffix.lower()
    Image.init()
    written = {e for e, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if ending not in written and not (video and ending == ".mp4"):
        _checks.fail(op, argument, "an ending such as .png or .gif", path)
    if path.is_dir():
        _checks.fail(op, argument, "a file", f"{path}, a folder")
    check_folder(op, path.absolute().parent, argument)


def write(path: str | Path, picture: Tensor) -> Path:
    """A grid as PNG (or what the ending says), written whole; a video as .mp4 or an
    animation (.gif, .webp), or as PNG with its frames side by side."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"{path}: expected Pillow to write pictures, got none") from error
    path, options = Path(path), {}
    if path.suffix.lower() == ".mp4" and picture.ndim == 4:
        from dfm_fast.training.videos import write_frames

        path.parent.mkdir(parents=True, exist_ok=True)
        write_frames(path, picture.contiguous().numpy())
        return path
    check_path("write", "path", path, video=False)
    kind = Image.registered_extensions()[path.suffix.lower()]
    if picture.ndim == 4 and kind not in ("GIF", "WEBP"):
        picture = picture.transpose(0, 1).flatten(1, 2)
    if picture.ndim == 4:
        frames = [Image.fromarray(frame.numpy()) for frame in picture]
        image, options = frames[0], {"save_all": True, "append_images": frames[1:], "loop": 0}
    else:
        image = Image.fromarray(picture.contiguous().numpy())
    data = io.BytesIO()
    image.save(data, kind, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data.getvalue())
    return path
