"""`dfm-fast encode`: the command line is the dataclass `EncodeConfig`."""

from __future__ import annotations

import argparse

from dfm_fast.cli import _configs

PROG = "dfm-fast encode"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.allow_abbrev = False


def run(args: argparse.Namespace) -> int:
    return _configs.reported(PROG, lambda: _run(args.rest))


def _run(rest: list[str]) -> None:
    from dfm_fast.training.encoders import EncodeConfig, encode

    config = _configs.parse(EncodeConfig, rest, prog=PROG)
    info = encode(config, progress=True)
    print(f"{config.out}: {info.samples} latents {list(info.shape)} in {info.shards} shards")
