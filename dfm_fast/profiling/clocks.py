"""Clocks, and the loop in which all providers take turns."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

ROUNDS = (11, 300)  # at least, at most
Sampler = Callable[[], float]  # milliseconds of one call


def wall_clock(call: Callable[[], Any]) -> Sampler:
    """A sampler: milliseconds of one call on the CPU."""

    def sample() -> float:
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) / 1e6

    return sample


def synchronised(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The call, which on a GPU ends when its kernels have."""
    if device == "cpu":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def settled(sample: Sampler, seconds: float = 0.01) -> Sampler:
    """The sampler after a pause. torch's threads spin some milliseconds after their work, and would
    take half the machine from a library with threads of its own (measured: OpenCV 13.4 ms straight
    after a torch operator, 8.6 after a pause, 7.8 alone)."""

    def sample_after_pause() -> float:
        time.sleep(seconds)
        return sample()

    return sample_after_pause


def cuda_clock(flush: Tensor) -> Callable[[Callable[[], Any]], Sampler]:
    """Clock of the GPU: `flush`, larger than L2, is overwritten before every sample."""

    def clock(call: Callable[[], Any]) -> Sampler:
        replay = capture(call) or call
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            flush.zero_()  # also keeps the GPU busy until the replay is queued
            begin.record()
            replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)

        sample.is_plain_call = replay is call  # type: ignore[attr-defined]  # functions take any
        return sample

    return clock


def capture(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """The call as a CUDA graph's replay, None where it cannot be captured (it copies from the host,
    or synchronises). A backward must have been built on the current stream."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            keep = call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None

    # The graph writes into `keep`: its memory must live as long as the graph.
    def replay() -> Any:
        graph.replay()
        return keep

    return replay


@contextlib.contextmanager
def clock_of(device: str) -> Iterator[Callable[[Callable[[], Any]], Sampler]]:
    """A clock; on a GPU all inside runs on a side stream, as captures require."""
    if device == "cpu":
        yield wall_clock
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield cuda_clock(torch.empty(256 << 20, dtype=torch.uint8, device=device))


def interleave(
    samplers: dict[str, Sampler], seconds: float, rounds: tuple[int, int] = ROUNDS
) -> dict[str, list[float]]:
    """Samples of all: every round takes one of each, in a new order."""
    names, order = list(samplers), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    for sampler in samplers.values():  # warm-up
        sampler()
    gc.collect()
    gc.disable()
    try:
        start, done = time.monotonic(), 0
        while done < rounds[0] or (done < rounds[1] and time.monotonic() - start < seconds):
            order.shuffle(names)
            for name in names:
                times[name].append(samplers[name]())
            done += 1
    finally:
        gc.enable()
    return times


def cpu_seconds() -> tuple[float, float, float] | None:
    """(everybody's, idle, ours) so far, over all cores; None where the system does not tell."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    idle, own = ticks[3] + ticks[4], os.times()
    tick = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - idle) / tick, idle / tick, own.user + own.system


def crowd(before: tuple[float, ...] | None, after: tuple[float, ...] | None) -> float:
    """Share of the machine that others used meanwhile, where little of it was idle; else 0."""
    if before is None or after is None:
        return 0.0
    busy, idle, own = (b - a for a, b in zip(before, after, strict=True))
    total = busy + idle
    return max(0.0, busy - own) / total if total > 0 and idle < 0.3 * total else 0.0


def plain_call_ms(call: Callable[[], Any], calls: int = 20) -> float:
    """Milliseconds per call on the GPU, launched one by one from Python."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / calls


def count_launches(call: Callable[[], Any]) -> int:
    """Kernels and copies that one call puts on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    cuda = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    # Inductor annotates its graphs, and annotations appear on the GPU's timeline too.
    labels = ("##", "Torch-Compiled Region")
    return sum(not e.is_user_annotation and not e.name.startswith(labels) for e in cuda)


def peak_mib(call: Callable[[], Any], device: str) -> float:
    """MiB allocated by one call at most, over what was there."""
    if device == "cpu":
        return _peak_mib_cpu(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _peak_mib_cpu(call: Callable[[], Any]) -> float:
    return max(itertools.accumulate(allocations(call)), default=0) / 2**20


def allocations(call: Callable[[], Any]) -> list[int]:
    """Bytes that torch's CPU allocator gave (taken back: negative) during one call, in order, from
    the profiler's record. What the call returns is alive at the end."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        keep = call()
    del keep
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return [nbytes for _, nbytes in sorted(changes)]
