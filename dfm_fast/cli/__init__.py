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
    "report": "turn benchmark results into a table, plots and an HTML page",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("dfm-fast", description=sys.modules["dfm_fast"].__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else argv
    for name, help in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help)
        if name in argv[:1]:
            importlib.import_module(f"dfm_fast.cli.{name}").add_arguments(command)
    args = parser.parse_args(argv)
    try:
        status = importlib.import_module(f"dfm_fast.cli.{args.command}").run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `dfm-fast report | head` has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status
