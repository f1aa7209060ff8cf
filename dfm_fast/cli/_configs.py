"""Commands whose options are the fields of a dataclass."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
