"""`dfm-fast sample` of a pipeline's folder: pictures of prompts or of classes."""

from __future__ import annotations

import argparse
from typing import Any

from dfm_fast import _checks

OP = "sample"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = "folders with model_index.json; --count is 1 by default, --steps one number"
    group = parser.add_argument_group("pipelines", about)
    add = group.add_argument
    add("--prompt", action="append", help="a text; repeat for several: a row of pictures for each")
    add("--negative-prompt", help="what guidance leads away from")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels")


def is_one(args: argparse.Namespace) -> bool:
    """Whether the folder has a pipeline. Raises where its options are given for another."""
    from dfm_fast.models import snapgen_folders

    found = snapgen_folders.pipeline_in(args.checkpoint) is not None
    for name in ("prompt", "negative_prompt", "size"):
        if not found and getattr(args, name) is not None:
            expected = f"a folder with {snapgen_folders.INDEX}"
            _checks.fail(OP, f"--{name.replace('_', '-')}", expected, args.checkpoint)
    return found


def run(args: argparse.Namespace, device: str) -> None:
    import torch

    from dfm_fast.models import SnapGenPipeline, snapgen_folders
    from dfm_fast.training import pictures

    options = _options(args)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    folder = snapgen_folders.pipeline_in(args.checkpoint) or args.checkpoint
    pipeline = SnapGenPipeline.from_pretrained(folder, device=device, dtype=dtype)
    if not args.prompt:
        options["class_labels"] = _labels(pipeline, args.classes)
    images = pipeline(**options, output_type="pt", progress=True).images
    columns = options["num_images_per_prompt"]
    print(pictures.write(args.out, pictures.grid(2 * images - 1, columns)))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the call, but for labels."""
    for name in ("threshold", "previews", "decoder", "shape", "batch", "compile"):
        if getattr(args, name):
            _checks.fail(OP, f"--{name}", "none: a pipeline has one level and its decoder", "one")
    if args.prompt and args.classes:
        _checks.fail(OP, "--prompt", "prompts or --classes", "both")
    given: dict[str, Any] = {"prompt": args.prompt, "negative_prompt": args.negative_prompt}
    if args.steps is not None:
        if len(args.steps) != 1:
            _checks.fail(OP, "--steps", "one number, as there is one level", args.steps)
        given["num_inference_steps"] = args.steps[0]
    if args.cfg is not None:
        given["guidance_scale"] = args.cfg
    if args.size is not None:
        given["height"], given["width"] = args.size
    count = 1 if args.count is None else _checks.integer(OP, "--count", args.count, 1)
    return {**given, "num_images_per_prompt": count, "seed": args.seed}


def _labels(pipeline: Any, classes: list[str] | None) -> list[int]:
    """Those that are named, or the first ten."""
    count = getattr(pipeline.conditions, "num_classes", 0)
    if not count:
        _checks.fail(OP, "--prompt", "at least one, as the pipeline reads texts", "none")
    for name in classes or ():
        if not name.isdecimal() or int(name) >= count:
            _checks.fail(OP, "--classes", f"numbers below {count}", name)
    return [int(name) for name in classes or range(min(10, count))]
