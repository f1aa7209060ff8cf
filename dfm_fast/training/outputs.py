"""Where a run writes: looked at before any work, and one run's alone."""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dfm_fast import _checks
from dfm_fast.models._files import read_json as read_json
from dfm_fast.training.distributed import World

LOCK = ".lock"
NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP  # of file systems that have none


class RunError(RuntimeError):
    """What ends a run that was given rightly."""


def check_folder(op: str, folder: Path, argument: str = "out") -> None:
    """Raise ValueError where `folder` cannot be a folder that is written to; nothing is made."""
    folder = Path(folder)
    at = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not at.is_dir():
        _checks.fail(op, argument, "a folder", f"{folder}: {at} is none")
    if not os.access(at, os.W_OK | os.X_OK):
        _checks.fail(op, argument, "a folder that can be written to", f"{folder}: {at} cannot")


@contextmanager
def held(op: str, folder: Path, world: World) -> Iterator[None]:
    """The folder is this run's alone: rank 0 sees to it, all fail where it cannot."""
    error: Exception | None = None
    with ExitStack() as stack:
        if world.main:
            try:
                check_folder(op, folder)
                stack.enter_context(alone(op, folder))
            except (ValueError, OSError) as caught:
                error = caught
        if world.any(error is not None):
            raise error or ValueError(f"{op}: out: rank 0 cannot use {folder}")
        yield


@contextmanager
def alone(op: str, folder: Path) -> Iterator[None]:
    """Hold a folder, which is made; ValueError where another process holds it. A process that dies
    holds nothing on, and neither do its forks, as they would with flock."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = _locked(op, folder)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(handle)
        if made:  # and nothing came into it
            with suppress(OSError):
                folder.rmdir()


def _locked(op: str, folder: Path) -> int:
    while True:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.read(handle, 32).decode() or "unknown"
            os.close(handle)
            _checks.fail(
                op, "out", "a folder that no other run writes to", f"{folder}, process {owner}'s"
            )
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise
            warnings.warn(f"{folder}: no lock against a second run here: {error}", stacklevel=4)
        # Whoever held it has removed the file since: then this one is nobody's.
        if _same_file(handle, folder / LOCK):
            os.ftruncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
            return handle
        os.close(handle)


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
