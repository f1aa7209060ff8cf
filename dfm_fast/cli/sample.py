"""`dfm-fast sample`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dfm_fast.cli import _pipelines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        help="a training folder, one of its checkpoints, an exported model, or a pipeline",
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
    add("--previews", action="store_true", help="also the picture after each stage")
    add("--decoder", type=Path, help="a local folder of diffusers' autoencoder, for latents")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    _pipelines.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except (ValueError, TypeError, ImportError, FileNotFoundError) as error:
        print(f"dfm-fast sample: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    import torch

    from dfm_fast.training import pictures, saved

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if _pipelines.is_one(args):
        return _pipelines.run(args, device)
    recipe, model = saved.open_model(args.checkpoint, device)
    labels, count, columns = chosen(recipe, args.classes, args.count)
    decode = saved.decoder(args.decoder, recipe, device) if args.decoder else lambda x: x
    if args.decoder is None and recipe.shape[0] not in (1, 3):
        print("latents are shown as they are; --decoder DIR decodes them", file=sys.stderr)

    def write(path: Path, x) -> None:
        print(pictures.write(path, pictures.grid(decode(x), columns)))

    def preview(stage: int, x) -> None:
        if stage + 1 < recipe.num_levels:
            write(args.out.with_name(f"{args.out.stem}-stage{stage + 1}{args.out.suffix}"), x)

    threshold = args.threshold
    if threshold is not None and len(threshold) == 1:
        threshold = threshold[0]
    with torch.autocast(device, torch.bfloat16, args.precision == "bf16"):
        x = pictures.sample(
            model, recipe.build_flow(), recipe, labels, count, steps=args.steps,
            threshold=threshold, cfg=args.cfg, seed=args.seed, device=device, progress=True,
            preview=preview if args.previews else None,
        )  # fmt: skip
    write(args.out, x)
    return 0


def chosen(recipe, classes: list[str] | None, count: int | None):
    """(labels or None, number of pictures, columns or None)"""
    import torch

    from dfm_fast import _checks

    if count is not None:
        _checks.integer("sample", "--count", count, 1)
    if not recipe.num_classes:
        if classes:
            _checks.fail("sample", "--classes", "none: the model has no classes", " ".join(classes))
        return None, count or 16, None
    names = {name: i for i, name in enumerate(recipe.class_names)}
    wanted = []
    for name in classes or map(str, range(min(10, recipe.num_classes))):
        number = int(name) if name.isdecimal() else names.get(name, -1)
        if not 0 <= number < recipe.num_classes:
            expected = f"numbers below {recipe.num_classes}, or names of classes"
            _checks.fail("sample", "--classes", expected, name)
        wanted.append(number)
    each = count or 8
    return torch.tensor(wanted).repeat_interleave(each), each * len(wanted), each
