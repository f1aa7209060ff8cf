"""Every operator that runs, with its time, bytes and FLOPs: a dispatch mode."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dfm_fast.profiling.costs import call_flops, moved_bytes, tensors

PLAIN = (torch.Tensor, torch.nn.Parameter)
LABEL = "dfm_fast.profile "  # of ranges in the trace; on a GPU kernels are found by them


class Call(NamedTuple):
    """One call of an operator of the dispatcher."""

    name: str  # "dfm_fast::rms_norm"
    shapes: str  # of its tensors: "4x256x384, 384"
    seconds: float  # on a GPU of its kernels
    bytes: int  # least read and written
    flops: int
    dtype: torch.dtype | None  # of its first tensor of floating point, else of its first
    launches: int  # kernels and copies on a GPU


class Recorder(TorchDispatchMode):
    """Keeps a `Call` for each operator that runs inside, backward too. What an operator calls
    itself is its own: nothing is counted twice.

    Args:
        labels: name each call in the trace of torch's profiler.
    """

    def __init__(self, labels: bool) -> None:
        super().__init__()
        self.labels = labels
        self.calls: list[Call] = []
        self.own_seconds = 0.0  # of the recording itself
        self.device = "cpu"  # "cuda" once a tensor is there
        self.last = 0.0  # perf_counter at the end of the last operator, on the host

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if any(t not in PLAIN for t in types):  # such as DTensor, which comes back with tensors
            return NotImplemented
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        if _is_composite(func):  # in inference mode these come whole
            with self:
                return func.decompose(*args, **kwargs)
        entered = time.perf_counter()
        label = f"{LABEL}{len(self.calls)} {func.name()}"
        with torch.profiler.record_function(label) if self.labels else contextlib.nullcontext():
            start = time.perf_counter()
            out = func(*args, **kwargs)
            end = time.perf_counter()
        self.calls.append(self._call(func, args, kwargs, out, end - start))
        self.last = time.perf_counter()
        self.own_seconds += self.last - entered - (end - start)
        return out

    def _call(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, seconds: float
    ) -> Call:
        given = tensors((args, kwargs))
        involved = [*given, *tensors(out)]
        if any(t.is_cuda for t in involved):
            self.device = "cuda"
        floating = [t.dtype for t in involved if t.is_floating_point()]
        dtype = next(iter(floating or [t.dtype for t in involved]), None)
        shapes = ", ".join("x".join(map(str, t.shape)) for t in given)
        cost = moved_bytes(func, args, kwargs, out), call_flops(func, args, kwargs, out)
        return Call(func.name().partition(".")[0], shapes, seconds, *cost, dtype, 0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is not recorded; its time counts as the recording's own."""
        start = time.perf_counter()
        with _disable_current_modes():
            yield
        self.own_seconds += time.perf_counter() - start


_COMPOSITE: dict[Any, bool] = {}


def _is_composite(func: Any) -> bool:
    """Whether the operator is written in terms of others alone."""
    if func not in _COMPOSITE:
        _COMPOSITE[func] = torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), torch._C.DispatchKey.CompositeImplicitAutograd
        )
    return _COMPOSITE[func]


@functools.cache
def unseen_seconds(calls: int = 300) -> float:
    """Of recording one call, what `own_seconds` cannot hold: the ways into Python and back."""

    def loop() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            x.neg()
        return time.perf_counter() - start

    x, recorder = torch.zeros(1), Recorder(labels=False)
    plain = min(loop() for _ in range(3))
    with recorder:
        recorded = []
        for _ in range(3):
            before = recorder.own_seconds
            recorded.append(loop() - (recorder.own_seconds - before))
    return max(0.0, min(recorded) - plain) / calls


# --- Kernels on a GPU -----------------------------------------------------------------------------


def with_kernels(calls: list[Call], events: Any) -> list[Call]:
    """The calls with the time and number of their kernels, from the labelled ranges in the events
    of torch's profiler."""
    found = {}
    for event in events:
        if event.name.startswith(LABEL) and event.device_type == torch.autograd.DeviceType.CPU:
            found[int(event.name.removeprefix(LABEL).split()[0])] = _device_work(event)
    done = []
    for i, call in enumerate(calls):
        microseconds, launches = found.get(i, (0.0, 0))
        done.append(call._replace(seconds=microseconds / 1e6, launches=launches))
    return done


def _device_work(event: Any) -> tuple[float, int]:
    """(microseconds, number) of the kernels of a range and of what lies in it. The range itself is
    on the GPU's timeline too, as an annotation."""
    own = [k.duration for k in event.kernels if not k.name.startswith(LABEL)]
    inner = [_device_work(child) for child in event.cpu_children]
    return sum(own) + sum(t for t, _ in inner), len(own) + sum(n for _, n in inner)
