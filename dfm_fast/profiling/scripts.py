"""A user's script under the profiler, as it is and with its models accelerated."""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfm_fast.acceleration import AccelerateReport, accelerate
from dfm_fast.profiling.comparisons import Comparison, Parity, Side, parity
from dfm_fast.profiling.costs import tensors
from dfm_fast.profiling.profiles import Profile, profile
from dfm_fast.profiling.targets import UsersError, users_code

NOT_COMPARED = "The two runs gave their model other inputs, so its results are not compared."


class Watch:
    """The calls of a run's outermost modules.

    Args:
        accelerating: swap their layers before the first call.

    Attributes:
        first: (inputs, results) of the first call; None while there was none.
        report: what was swapped, of all of them.
    """

    def __init__(self, accelerating: bool) -> None:
        self.accelerating = accelerating
        self.first: tuple[Any, Any] | None = None
        self.report = AccelerateReport()
        self._seen: set[nn.Module] = set()
        self._depth = 0

    @contextlib.contextmanager
    def watching(self, p: Profile) -> Iterator[None]:
        """`Module.__call__` is replaced: hooks would be seen by `accelerate`, and stop it."""
        call = nn.Module.__call__

        def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return call(module, *args, **kwargs)
            with p.paused():
                self._prepare(module)
                given = None if self.first else _copies((args, kwargs))
            self._depth += 1
            try:
                result = call(module, *args, **kwargs)
            finally:
                self._depth -= 1
            if given is not None:
                with p.paused():
                    self.first = given, _copies(result)
            return result

        nn.Module.__call__ = watched  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = call  # type: ignore[method-assign]

    def _prepare(self, module: nn.Module) -> None:
        if module in self._seen or not self.accelerating:
            return
        self._seen.update(module.modules())
        report = accelerate(module)
        self.report.swapped += report.swapped
        self.report.kept += report.kept
        self.report.bytes_saved += report.bytes_saved


def _copies(tree: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors(tree)]


def run(path: Path, arguments: Sequence[str], accelerating: bool) -> tuple[Profile, Watch]:
    """The script once, as `python path arguments`, in this process and from the same seed.

    Raises:
        UsersError: it raised, or ended with another status than 0.
    """
    watch, p = Watch(accelerating), profile()
    torch.manual_seed(0)
    argv, folders = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = [str(path), *arguments], [str(path.resolve().parent)]
    try:
        with users_code(), p, watch.watching(p):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as error:
        if error.code not in (None, 0):
            raise UsersError(f"{path} ended with status {error.code}") from error
    finally:
        sys.argv, sys.path[:] = argv, folders
    return p, watch


def compare_script(path: Path, arguments: Sequence[str], *, before: bool) -> Comparison:
    """Run the script as it is, then with every module that it calls accelerated.

    Raises:
        UsersError: it failed.
    """
    plain = run(path, arguments, accelerating=False) if before else None
    ours, watch = run(path, arguments, accelerating=True)
    after = _side("after: the script, its modules accelerated", ours)
    if plain is None:
        return Comparison(after, None, None, watch.report)
    before_side = _side("before: the script as it is", plain[0])
    same, note = _same(plain[1], watch)
    return Comparison(after, before_side, same, watch.report, note)


def _side(title: str, p: Profile) -> Side:
    return Side(title, p, [p.seconds], None)


def _same(before: Watch, after: Watch) -> tuple[Parity | None, str]:
    """By the first call of a module in each run, where both were given the same."""
    if before.first is None or after.first is None:
        return None, "It calls no module of torch."
    one, other = before.first[0], after.first[0]
    if len(one) != len(other) or not all(map(_equal, one, other)):
        return None, NOT_COMPARED
    return parity(before.first[1], after.first[1]), ""


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
