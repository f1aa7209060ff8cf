"""Commands whose options are the fields of a dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def _tyro() -> Any:
    try:
        import tyro
    except ImportError as error:
        raise ImportError(f"expected tyro for the command line, got none: {error}") from error
    return tyro


def parse(kind: type[T], args: list[str], **options: Any) -> T:
    """The dataclass from its command line; `options` are tyro's."""
    return _tyro().cli(kind, args=args, **options)


def without_out(config: T) -> T:
    """Defaults whose `out` has to be given."""
    return dataclasses.replace(config, out=_tyro().MISSING)


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


def ended(outcome: Any, what: str, folder: Path) -> None:
    """Say how a run ended, once: `what` it has written to `folder`."""
    if int(os.environ.get("RANK", 0)):
        return
    if outcome.stopped_by:
        print(
            f"stopped at step {outcome.step} by {outcome.stopped_by}, saved {outcome.checkpoint}; "
            "--resume goes on from there"
        )
    else:
        print(f"trained {outcome.step} steps; the {what}: {folder}")


def saved_in(kind: type[T], out: Path | None, resume: bool) -> T | None:
    """The configuration of a folder that is resumed, if there is one."""
    from dfm_fast.training import loop
    from dfm_fast.training.config import from_json
    from dfm_fast.training.outputs import read_json

    if not (resume and out is not None and (out / loop.CONFIG).exists()):
        return None
    return from_json(kind, read_json(out / loop.CONFIG))


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
