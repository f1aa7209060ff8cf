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
    """Exit status of a call: what users get wrong is one line, not a traceback."""
    try:
        call()
    except (ValueError, TypeError, ImportError, FileNotFoundError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    return 0


def out_of(args: list[str]) -> Path | None:
    """`--out` of a command line, before the rest of it is understood."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    return parser.parse_known_args(args)[0].out
