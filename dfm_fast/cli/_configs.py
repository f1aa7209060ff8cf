"""Commands whose options are the fields of a dataclass."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def parse(kind: type[T], args: list[str], **options: Any) -> T:
    """The dataclass from its command line; `options` are tyro's."""
    try:
        import tyro
    except ImportError as error:
        raise ImportError(f"expected tyro for the command line, got none: {error}") from error
    return tyro.cli(kind, args=args, **options)


def reported(prog: str, call: Callable[[], None]) -> int:
    """Exit status of a call: what users get wrong (2) and what the machine refuses (1) are one
    line, not a traceback."""
    from dfm_fast.training.outputs import RunError

    try:
        call()
    except BrokenPipeError:  # who reads the output has what it wants: `main` ends quietly
        raise
    except (ValueError, TypeError, ImportError, FileNotFoundError) as error:
        return _told(prog, error, 2)
    except (RunError, OSError) as error:
        return _told(prog, error, 1)
    return 0


def out_of(args: list[str]) -> Path | None:
    """`--out` of a command line, before the rest of it is understood."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    return parser.parse_known_args(args)[0].out


def _told(prog: str, error: Exception, status: int) -> int:
    text = str(error)
    if text.startswith("Caught ") and "DataLoader worker" in text:  # its whole traceback
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    command = prog.rpartition(" ")[2]
    print(f"{prog}: {text.removeprefix(f'{command}: ')}", file=sys.stderr)
    return status
