"""`dfm-fast sample`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfm_fast.cli import _configs, _pipelines

if TYPE_CHECKING:
    from torch import Tensor

    from dfm_fast.training.recipes import Recipe

PROG = "dfm-fast sample"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        help="a training folder, one of its checkpoints, a folder that save_pretrained wrote, or a "
        "pipeline's",
    )
    add(
        "--out",
        type=Path,
        default=Path("grid.png"),
        help="a picture; .mp4, .gif or .webp for videos",
    )
    add("--classes", nargs="+", default=None, help="numbers or names; default: the first ten")
    add("--count", type=int, default=None, help="pictures of each class (8), or in all (16)")
    add("--steps", type=int, nargs="+", help="per stage, coarse to fine")
    add("--threshold", type=float, nargs="+", help="noise level at which the next level starts")
    add("--cfg", type=float, help="scale of classifier-free guidance; 1 is without")
    add("--seed", type=int, default=0)
    add("--batch", type=int, help="pictures at once (all); another number gives other pictures")
    add("--shape", type=int, nargs="+", help="of a sample, C (T) H W; default: the model's own")
    add("--compile", action="store_true", help="through torch.compile")
    add("--previews", action="store_true", help="also the picture after each stage")
    add("--decoder", type=Path, help="a local folder of diffusers' autoencoder, for latents")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    _pipelines.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    return _configs.reported(PROG, lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    import torch

    from dfm_fast.training import pictures, saved
    from dfm_fast.training.distributed import device_named

    device = device_named("sample", args.device)
    if _pipelines.is_one(args):
        _pipelines.run(args, device)
        return
    recipe, model = saved.open_model(args.checkpoint, device)
    if args.shape:
        recipe = dataclasses.replace(recipe, shape=tuple(args.shape))
    labels, count, columns = chosen(recipe, args.classes, args.count)
    options = numbers(recipe, args)
    pictures.check_path("sample", "--out", args.out, len(recipe.shape) == 4)
    decode = saved.decoder(args.decoder, recipe, device) if args.decoder else lambda x: x
    if args.decoder is None and recipe.shape[0] not in (1, 3):
        print("latents are shown as they are; --decoder DIR decodes them", file=sys.stderr)
    if args.compile:
        model.compile()
    size = args.batch or count

    def write(path: Path, x: Tensor) -> None:
        x = torch.cat([decode(part.to(device)).cpu() for part in x.split(size)])
        print(pictures.write(path, pictures.grid(x, columns)))

    def preview(stage: int, x: Tensor) -> None:
        if stage + 1 < recipe.num_levels:
            write(args.out.with_name(f"{args.out.stem}-stage{stage + 1}{args.out.suffix}"), x)

    with torch.autocast(device, torch.bfloat16, args.precision == "bf16"):
        x = pictures.sample(
            model, recipe.build_flow(), recipe, labels, count, seed=args.seed, device=device,
            progress=True, preview=preview if args.previews else None, batch=args.batch,
            # What is compiled while a graph is captured would be in it.
            cuda_graph=False if args.compile else None, **options,
        )  # fmt: skip
    write(args.out, x)


def numbers(recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """steps, threshold and cfg, that make sense together: looked at before anything is sampled."""
    from dfm_fast import _checks
    from dfm_fast.flow import StageSchedule

    _checks.integer("sample", "--seed", args.seed, 0)
    if args.batch is not None:
        _checks.integer("sample", "--batch", args.batch, 1)
    steps = tuple(args.steps) if args.steps else recipe.steps
    if len(steps) != recipe.num_levels:
        _checks.fail("sample", "--steps", f"{recipe.num_levels} numbers, one per stage", args.steps)
    threshold = args.threshold or [recipe.flow.threshold]
    threshold = threshold[0] if len(threshold) == 1 else threshold
    StageSchedule(steps, threshold)
    if args.cfg is not None and not math.isfinite(args.cfg):
        _checks.fail("sample", "--cfg", "a finite number", args.cfg)
    return {"steps": steps, "threshold": threshold, "cfg": args.cfg}


def chosen(
    recipe: Recipe, classes: list[str] | None, count: int | None
) -> tuple[Tensor | None, int, int | None]:
    """(labels or None, number of pictures, columns or None)"""
    import torch

    from dfm_fast import _checks

    if count is not None:
        _checks.integer("sample", "--count", count, 1)
    if not recipe.num_classes:
        if classes:
            _checks.fail("sample", "--classes", "none: the model has no classes", " ".join(classes))
        return None, count or 16, None
    wanted: Sequence[int] = range(min(10, recipe.num_classes))
    if classes:
        wanted = [_class(recipe, name) for name in classes]
    each = count or 8
    return torch.tensor(list(wanted)).repeat_interleave(each), each * len(wanted), each


def _class(recipe: Recipe, name: str) -> int:
    """A label by its name, or by its number where no class is called by a number."""
    from dfm_fast import _checks

    names = list(recipe.class_names)
    if name in names:
        return names.index(name)
    numbered = any(known.isdecimal() for known in names)
    if not numbered and name.isdecimal() and int(name) < recipe.num_classes:
        return int(name)
    shown = f"{', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"
    known = f"names of classes ({shown})" if names else ""
    below = "" if numbered else f"numbers below {recipe.num_classes}"
    _checks.fail("sample", "--classes", " or ".join(filter(None, (below, known))), name)
