"""`dfm-fast snapgen`: the command line is the dataclass `SnapGenConfig` with a preset."""

from __future__ import annotations

import argparse
import dataclasses
import os

from dfm_fast.cli import _configs

PROG = "dfm-fast snapgen"
EVERY = 50  # steps between lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from dfm_fast.training.snapgen import PRESETS

    parser.allow_abbrev = False
    parser.add_argument("--preset", choices=list(PRESETS), metavar="NAME")
    parser.add_argument("--resume", action="store_true")


def run(args: argparse.Namespace) -> int:
    from dfm_fast.training import distributed

    return distributed.leave(_configs.reported(PROG, lambda: _run(args)))


def _run(args: argparse.Namespace) -> None:
    from dfm_fast.training import loop
    from dfm_fast.training.snapgen import train_snapgen
    from dfm_fast.training.students import DistillationReport

    config = _parse(args.preset, args.resume, args.rest)

    main = int(os.environ.get("RANK", 0)) == 0

    def tell(report: DistillationReport) -> None:
        if main and (report.step % EVERY == 0 or report.step in (1, config.steps)):
            told = {name: value for name, value in vars(report).items() if value}
            print("  ".join(f"{name} {value:.4g}" for name, value in told.items()), flush=True)

    outcome = train_snapgen(config, resume=args.resume, on_step=tell)
    if not main:
        return
    if outcome.stopped_by:
        print(f"stopped by {outcome.stopped_by}, saved {outcome.checkpoint}; --resume goes on")
    else:
        print(f"trained {outcome.step} steps; the pipeline: {config.out / loop.EXPORT}")


def _parse(preset: str | None, resume: bool, rest: list[str]):
    """The configuration of a preset, or of the folder that is resumed, with changes."""
    from dfm_fast.training import loop, snapgen
    from dfm_fast.training.config import from_json
    from dfm_fast.training.outputs import read_json

    out = _configs.out_of(rest)
    options = {"prog": PROG, "description": _description(list(snapgen.PRESETS))}
    if resume and out is not None and (out / loop.CONFIG).exists():
        base = from_json(snapgen.SnapGenConfig, read_json(out / loop.CONFIG))
        return _configs.parse(snapgen.SnapGenConfig, rest, default=base, **options)
    import tyro

    base = dataclasses.replace(snapgen.preset(preset or "digits", ""), out=tyro.MISSING)
    return _configs.parse(snapgen.SnapGenConfig, rest, default=base, **options)


def _description(presets: list[str]) -> str:
    return (
        "Train a SnapGen UNet on pictures with classes: alone, against --teacher FOLDER, or with "
        "--few-steps N. Two options come before all others: --preset NAME takes the defaults of "
        f"one of {', '.join(presets)} (without it, of digits); --resume goes on from the last "
        "checkpoint in --out."
    )
