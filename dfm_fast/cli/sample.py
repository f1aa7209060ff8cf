"""`dfm-fast sample`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        help="a training folder, one of its checkpoints, or an exported model",
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
    wanted = range(min(10, recipe.num_classes))
    if classes:
        wanted = [_class(recipe, name) for name in classes]
    each = count or 8
    return torch.tensor(list(wanted)).repeat_interleave(each), each * len(wanted), each


def _class(recipe, name: str) -> int:
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
