"""`dfm-fast decoder`: the command line is the dataclass `DecoderConfig`."""

from __future__ import annotations

import argparse
from typing import Any

from dfm_fast.cli import _configs

PROG = "dfm-fast decoder"
DESCRIPTION = """\
Train a small decoder for the latents of a frozen autoencoder. --resume, before all other options,
goes on from the last checkpoint in --out, with its configuration, if there is one.
"""
EVERY = 50  # steps between lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.allow_abbrev = False
    parser.add_argument("--resume", action="store_true")


def run(args: argparse.Namespace) -> int:
    return _configs.reported(PROG, lambda: _run(args.resume, args.rest))


def _run(resume: bool, rest: list[str]) -> None:
    from dfm_fast.training import loop
    from dfm_fast.training.decoders import DecoderConfig, DecoderReport, train_decoder

    base = _configs.saved_in(DecoderConfig, _configs.out_of(rest), resume)
    options: dict[str, Any] = {"prog": PROG, "description": DESCRIPTION}
    options |= {} if base is None else {"default": base}
    config = _configs.parse(DecoderConfig, rest, **options)

    def tell(report: DecoderReport) -> None:
        if report.step % EVERY == 0 or report.step in (1, config.steps):
            values = "  ".join(f"{name} {value:.4g}" for name, value in vars(report).items())
            print(values, flush=True)

    outcome = train_decoder(config, resume=resume, on_step=tell)
    _configs.ended(outcome, "decoder", config.out / loop.EXPORT)
