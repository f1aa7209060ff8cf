"""`dfm-fast train`: the command line is the dataclass `TrainConfig`, with a preset's defaults."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from dfm_fast.cli import _configs

if TYPE_CHECKING:
    from dfm_fast.training.config import TrainConfig

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

    return distributed.leave(_configs.reported(PROG, lambda: _run(args)))


def _run(args: argparse.Namespace) -> None:
    from dfm_fast.training import loop

    config = parse(args.preset, args.resume, args.rest)
    _configs.ended(loop.train(config, resume=args.resume), "model", config.out / loop.EXPORT)


def parse(preset: str | None, resume: bool, rest: list[str]) -> TrainConfig:
    """The configuration of a preset, or of the folder that is resumed, with changes."""
    from dfm_fast.training import config
    from dfm_fast.training.datasets import Name

    out, data = _early(rest)
    base = _configs.saved_in(config.TrainConfig, out, resume)
    if base is None:
        known = data if data in get_args(Name) else None  # else tyro names the choices
        base = _configs.without_out(config.preset_for(preset, known))
    description = DESCRIPTION.format(presets=", ".join(config.PRESETS))
    options = {"default": base, "prog": PROG, "description": description}
    return _configs.parse(config.TrainConfig, rest, **options)


def _early(rest: list[str]) -> tuple[Path | None, str | None]:
    """(--out, --data.name), on which the defaults of the other options depend."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data.name", dest="data")
    found = parser.parse_known_args(rest)[0]
    return found.out, found.data
