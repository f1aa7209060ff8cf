"""What a machine can do at most: copies of memory, by size, and matrix products, by dtype."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dfm_fast.nn._linears import linear
from dfm_fast.profiling.clocks import clock_of, interleave

# Bytes that a copy moves, read and written: from what a core's cache holds to what none does.
SIZES = {"cpu": [1 << n for n in range(16, 30, 2)], "cuda": [1 << n for n in range(18, 34, 3)]}
SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices


def fastest_seconds(call: Callable[[], Any], device: str) -> float:
    """Of 20 calls, or of more in a tenth of a second: a ceiling is what the machine does when
    nobody else uses it."""
    with clock_of(device) as clock:
        times = interleave({"": clock(call)}, 0.1, rounds=(20, 1000))[""]
    return min(times) / 1e3


def copy_seconds(device: str, nbytes: int) -> float:
    """Of `y.copy_(x)` that moves `nbytes`, half of them read and half written."""
    x = torch.randn(nbytes // 8, device=device)
    y = torch.empty_like(x)
    return fastest_seconds(lambda: y.copy_(x), device)


def product_flop_s(device: str, dtype: torch.dtype, side: int) -> float:
    """Of [side, side] products, by the faster of torch's library and what `nn` uses."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = min(fastest_seconds(f, device) for f in (lambda: a @ b, lambda: linear(a, b)))
    return 2 * side**3 / seconds


@dataclass
class Ceilings:
    """The floor of an operator's time. Copies are measured by size, as small ones stay in caches:
    an operator is compared with a copy that moves as many bytes.

    Attributes:
        device: "cpu" or "cuda".
        copies: (bytes moved, seconds), by size.
        products: FLOP/s by dtype; what is not there is measured when it is asked for.
    """

    device: str
    copies: list[tuple[int, float]]
    products: dict[torch.dtype, float] = field(default_factory=dict)

    def copy_seconds(self, nbytes: int) -> float:
        """Of a copy that moves so much, between the sizes measured; 0 for nothing."""
        if not nbytes:
            return 0.0
        at = bisect.bisect_left(self.copies, (nbytes, 0.0))
        if at in (0, len(self.copies)):  # a call's own cost; the memory's bandwidth
            moved, seconds = self.copies[min(at, len(self.copies) - 1)]
            return seconds * max(1.0, nbytes / moved)
        (low, a), (high, b) = self.copies[at - 1 : at + 1]
        part = math.log(nbytes / low) / math.log(high / low)
        return math.exp(math.log(a) + part * math.log(b / a))

    def product_seconds(self, flops: int, dtype: torch.dtype | None) -> float:
        """Of so many FLOPs in matrix products; 0 for none, and for integers."""
        if not flops or dtype is None or not dtype.is_floating_point:
            return 0.0
        if dtype not in self.products:
            self.products[dtype] = product_flop_s(self.device, dtype, SIDE[self.device])
        return flops / self.products[dtype]

    def __str__(self) -> str:
        largest = self.copies[-1]
        fastest = max(self.copies, key=lambda copy: copy[0] / copy[1])
        parts = [f"copies {_gb_s(largest)} GB/s from memory"]
        if fastest is not largest:
            parts.append(f"{_gb_s(fastest)} GB/s of {fastest[0] / 2**20:.3g} MiB in caches")
        parts += [
            f"matrix products {rate / 1e12:.3g} TFLOP/s in {str(dtype).removeprefix('torch.')}"
            for dtype, rate in self.products.items()
        ]
        return "Measured on this machine: " + ", ".join(parts) + "."


def _gb_s(copy: tuple[int, float]) -> str:
    return f"{copy[0] / copy[1] / 1e9:,.0f}"


def measured(device: str) -> Ceilings:
    """Those of "cpu" or "cuda", once per number of threads."""
    return _measured(device, torch.get_num_threads())


@functools.cache
def _measured(device: str, threads: int) -> Ceilings:
    copies: list[tuple[int, float]] = []
    least = math.inf
    for nbytes in reversed(SIZES[device]):
        least = min(least, copy_seconds(device, nbytes))  # what moves less takes no longer
        copies.insert(0, (nbytes, least))
    return Ceilings(device, copies)
