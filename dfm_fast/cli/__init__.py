"""The `dfm-fast` command: one module per subcommand, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "info": "what serves which operator on this machine, and why",
    "check": "compile every GPU kernel for every target, with no GPU",
    "tune": "time the kernels' tiles on this GPU, into a table",
    "encode": "write the latents of images or videos, to train on",
    "equivariance": "fine-tune an autoencoder so that its latents can be scaled",
    "decoder": "train a small decoder for the latents of a frozen autoencoder",
    "train": "train a DFM transformer on images, videos or latents",
    "snapgen": "train a SnapGen UNet on classes or captions, against a teacher, or to a few steps",
    "sample": "pictures from a trained model",
    "profile": "where a model's time goes, with and without this library's kernels",
    "export": "a trained model as one file of ONNX or torch.export",
    "report": "turn benchmark results into a table, plots and an HTML page",
}
PASSES_ON = (
    "encode",
    "equivariance",
    "decoder",
    "train",
    "snapgen",
)  # what it does not know, to a parser of its own


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("dfm-fast", description=sys.modules["dfm_fast"].__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else argv
    for name, help in COMMANDS.items():
        # `train --help` lists the fields of its configuration, which a library adds.
        own = name not in PASSES_ON
        command = commands.add_parser(name, help=help, description=help, add_help=own)
        if name in argv[:1]:
            importlib.import_module(f"dfm_fast.cli.{name}").add_arguments(command)
    args, rest = parser.parse_known_args(argv)
    if args.command in PASSES_ON:
        args.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status = importlib.import_module(f"dfm_fast.cli.{args.command}").run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `dfm-fast report | head` has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status
