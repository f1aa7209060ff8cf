"""`dfm-fast snapgen`: the command line is the dataclass `SnapGenConfig` with a preset."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dfm_fast.cli import _configs

if TYPE_CHECKING:
    from dfm_fast.training.snapgen import SnapGenConfig

PROG = "dfm-fast snapgen"


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

    config = _parse(args.preset, args.resume, args.rest)
    _configs.ended(train_snapgen(config, resume=args.resume), "pipeline", config.out / loop.EXPORT)


def _parse(preset: str | None, resume: bool, rest: list[str]) -> SnapGenConfig:
    """The configuration of a preset, or of the folder that is resumed, with changes."""
    from dfm_fast.training import snapgen

    kind = snapgen.SnapGenConfig
    base = _configs.saved_in(kind, _configs.out_of(rest), resume)
    if base is None:
        base = _configs.without_out(snapgen.preset(preset or "digits", ""))
    description = _description(list(snapgen.PRESETS))
    return _configs.parse(kind, rest, default=base, prog=PROG, description=description)


def _description(presets: list[str]) -> str:
    return (
        "Train a SnapGen UNet on pictures with classes, or with captions (--data.captions) by text "
        "encoders (--text.clip-l FOLDER ...): alone, against --teacher FOLDER, or with --few-steps "
        "N. Two options come before all others: --preset NAME takes the defaults of one of "
        f"{', '.join(presets)} (without it, of digits); --resume goes on from the last checkpoint "
        "in --out."
    )
