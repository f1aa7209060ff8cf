"""`dfm_fast.profile()`: where the time of a block of code goes, and how much of it must."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch

from dfm_fast import _checks

if TYPE_CHECKING:
    from dfm_fast.profiling.ceilings import Ceilings
    from dfm_fast.profiling.recorder import Call, Recorder

BY = ("operator", "shape")


@dataclass(frozen=True)
class Row:
    """The calls of one operator, or of one operator with tensors of the same shapes."""

    name: str
    shapes: str  # "" where they differ
    calls: int
    seconds: float
    bytes: int
    flops: int
    launches: int
    copy_seconds: float  # of copies that move as many bytes, each call's
    product_seconds: float  # of matrix products of as many FLOPs
    floor: float  # seconds: the larger of the two, call by call

    @property
    def bound(self) -> str:
        """What most of the floor is: "copy", "FLOPs", or "" where nothing is moved."""
        if not self.floor:
            return ""
        return "FLOPs" if self.product_seconds > self.copy_seconds else "copy"

    @property
    def above_floor(self) -> float:
        """Seconds that a better kernel could save at most."""
        return max(0.0, self.seconds - self.floor)


class Profile:
    """What ran inside a `with` block; see `profile`.

    Attributes:
        seconds: of the block, without the recording.
        calls: of operators, in order.
        device: "cuda" if a tensor was there, else "cpu".
        ceilings: of the device, measured when they are first asked for.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls: list[Call] = []
        self.device = "cpu"
        self._recorder: Recorder | None = None
        self._trace: Any = None

    # --- The block ---

    def __enter__(self) -> Self:
        from dfm_fast.profiling.recorder import Recorder

        if self._recorder is not None:
            _fail("block", "one block for each profile", "a second one")
        if torch.autograd._profiler_enabled():
            _fail("block", "no other profiler of torch to be running", "one that is")
        gpu = torch.cuda.is_available()
        kinds = torch.profiler.ProfilerActivity
        activities = [kinds.CPU, *([kinds.CUDA] if gpu else [])]
        self._recorder = Recorder(labels=gpu)
        self._trace = torch.profiler.profile(activities=activities, acc_events=True)
        self._trace.__enter__()
        self._recorder.__enter__()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        from dfm_fast.profiling.recorder import unseen_seconds, with_kernels

        recorder = self._running()
        if recorder.device == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - self._start
        recorder.__exit__(*error)
        self._trace.__exit__(*error)
        self.device, self.calls = recorder.device, recorder.calls
        recording = recorder.own_seconds + len(self.calls) * unseen_seconds()
        self.seconds = max(wall - recording, sum(call.seconds for call in self.calls))
        if self.device == "cuda":
            self.calls = with_kernels(self.calls, self._trace.events())

    def paused(self) -> AbstractContextManager[None]:
        """What runs inside is left out, while the block runs."""
        return self._running().paused()

    def _running(self) -> Recorder:
        if self._recorder is None:
            _fail("block", "a block that has begun", "none")
        return self._recorder

    # --- Figures ---

    @functools.cached_property
    def ceilings(self) -> Ceilings:
        from dfm_fast.profiling.ceilings import measured

        return measured(self.device)

    @property
    def operator_seconds(self) -> float:
        """Of all operators; on a GPU of their kernels."""
        return sum(call.seconds for call in self.calls)

    @property
    def outside_seconds(self) -> float:
        """Of the block, in no operator: Python, dispatch; on a GPU, the time it waits."""
        return max(0.0, self.seconds - self.operator_seconds)

    @property
    def floor(self) -> float:
        """Seconds that these operators take at least, each at the ceiling that binds it."""
        return sum(row.floor for row in self.rows())

    def rows(self, by: str = "operator") -> list[Row]:
        """The calls summed up, the longest time first.

        Args:
            by: "operator", or "shape": those of other shapes apart.
        """
        _checks.choice("profile", "by", by, BY)
        self._done()
        groups: dict[tuple[str, str], list[Call]] = {}
        for call in self.calls:
            key = (call.name, call.shapes if by == "shape" else "")
            groups.setdefault(key, []).append(call)
        rows = [_row(*key, calls, self.ceilings) for key, calls in groups.items()]
        return sorted(rows, key=lambda row: -row.seconds)

    def _done(self) -> None:
        if self._trace is None or not self.seconds:
            _fail("block", "its end before results are asked for", "none yet")

    # --- What is shown ---

    def table(self, by: str = "operator", limit: int = 20) -> str:
        """The rows as text, at most `limit` of them and the rest as one."""
        from dfm_fast.profiling.tables import text

        return text(self, by, limit)

    def summary(self) -> str:
        """What it comes to, in sentences."""
        from dfm_fast.profiling.words import summary

        return summary(self)

    def trace(self, path: str | os.PathLike[str]) -> Path:
        """Write the trace of torch's profiler, which chrome://tracing and ui.perfetto.dev show.

        Raises:
            ValueError: a path that cannot be written to.
        """
        return _written("trace", path, self._export)

    def picture(self, path: str | os.PathLike[str], limit: int = 15) -> Path:
        """Write a PNG: the time of the `limit` longest operators, and their floors.

        Raises:
            ValueError: a path that cannot be written to. ImportError: no matplotlib.
        """
        from dfm_fast.profiling.pictures import bars

        return _written("picture", path, lambda: bars({"operators": self}, limit))

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.summary()}"

    def _repr_html_(self) -> str:
        from dfm_fast.profiling.tables import html

        return html(self, "operator", 20)

    def _export(self) -> bytes:
        self._done()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._trace.export_chrome_trace(str(path))
            return path.read_bytes()


def profile() -> Profile:
    """Measure the operators that run inside a `with` block, torch's as well as ours.

    ```
    model(x)  # what only a first call costs
    with dfm_fast.profile() as p:
        model(x)
    print(p)  # a table and what it comes to
    p.trace("trace.json")
    p.picture("operators.png")
    ```

    Every operator of the dispatcher is timed (on a GPU its kernels are), and compared with the
    least bytes it must move, at the speed of a copy of as many, or with its FLOPs, at the speed of
    a matrix product, whichever takes longer: the floor. Both speeds are measured, which takes some
    seconds, when a table is first asked for. A function that torch.compile has yet to compile runs
    uncompiled inside the block; of one that is compiled only calls of operators are seen.

    Returns:
        A `Profile`, which is the value of the block. A notebook shows it as a table.

    Raises:
        ValueError: another profiler is running; a second block; results before the end.
    """
    return Profile()


def _row(name: str, shapes: str, calls: Sequence[Call], ceilings: Ceilings) -> Row:
    copies = [ceilings.copy_seconds(call.bytes) for call in calls]
    products = [ceilings.product_seconds(call.flops, call.dtype) for call in calls]
    return Row(
        name=name,
        shapes=shapes,
        calls=len(calls),
        seconds=sum(call.seconds for call in calls),
        bytes=sum(call.bytes for call in calls),
        flops=sum(call.flops for call in calls),
        launches=sum(call.launches for call in calls),
        copy_seconds=sum(copies),
        product_seconds=sum(products),
        floor=sum(map(max, copies, products)),
    )


def _written(what: str, path: str | os.PathLike[str], make: Callable[[], bytes]) -> Path:
    """The file, whole; a path that cannot be one is an error before anything is made."""
    from dfm_fast.models._pretrained import write_bytes
    from dfm_fast.training.outputs import check_folder

    path = Path(path)
    if path.is_dir():
        _checks.fail(f"profile.{what}", "path", "a file", f"{path}, a folder")
    check_folder(f"profile.{what}", path.absolute().parent, "path")
    data = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
    return path


def _fail(argument: str, expected: str, got: str) -> NoReturn:
    _checks.fail("profile", argument, expected, got)
