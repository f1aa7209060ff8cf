"""`dfm-fast train`: the command line is the dataclass `TrainConfig`, with a preset's defaults."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import get_args

from dfm_fast.cli import _configs

PROG = "dfm-fast train"

DESCRIPTION = """\
Train a DFM transformer on images, videos or latents. Two options come before all others: --preset
NAME takes the defaults of one of {presets}
(without it, of the one that is called as --data.name, or of digits); --resume goes on from the last
checkpoint in --out, with its configuration, if there is one.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from dfm_fast.training.config import PRESETS

    parser.allow_abbrev = False
    parser.add_argument("--preset", choices=list(PRESETS), metavar="NAME")
    parser.add_argument("--resume", action="store_true")


def run(args: argparse.Namespace) -> int:
    from dfm_fast.training import distributed

    return distributed.leave(_status(args))


def _status(args: argparse.Namespace) -> int:
    from dfm_fast.training import loop

    def call() -> None:
        config = parse(args.preset, args.resume, args.rest)
        _tell(loop.train(config, resume=args.resume), config)

    return _configs.reported(PROG, call)


def parse(preset: str | None, resume: bool, rest: list[str]):
    """The configuration of a preset, or of the folder that is resumed, with changes."""
    try:
        import tyro
    except ImportError as error:
        raise ImportError(f"expected tyro for the command line, got none: {error}") from error
    from dfm_fast.training import config, loop
    from dfm_fast.training.datasets import Name
    from dfm_fast.training.outputs import read_json

    out, data = _early(rest)
    saved = out / loop.CONFIG if out else None
    if resume and saved is not None and saved.exists():
        base = config.from_json(config.TrainConfig, read_json(saved))
    else:
        known = data if data in get_args(Name) else None  # else tyro names the choices
        base = dataclasses.replace(config.preset_for(preset, known), out=tyro.MISSING)
    description = DESCRIPTION.format(presets=", ".join(config.PRESETS))
    return tyro.cli(config.TrainConfig, default=base, args=rest, prog=PROG, description=description)


def _early(rest: list[str]) -> tuple[Path | None, str | None]:
    """(--out, --data.name), on which the defaults of the other options depend."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data.name", dest="data")
    found = parser.parse_known_args(rest)[0]
    return found.out, found.data


def _tell(outcome, config) -> None:
    from dfm_fast.training import loop

    if int(os.environ.get("RANK", 0)):
        return
    if outcome.stopped_by:
        print(
            f"stopped at step {outcome.step} by {outcome.stopped_by}, saved {outcome.checkpoint}; "
            "--resume goes on from there"
        )
    else:
        print(f"trained {outcome.step} steps; the model: {config.out / loop.EXPORT}")
