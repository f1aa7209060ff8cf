"""The two ceilings of a machine: `python -m benchmarks.ceilings [--device cuda]`.

Copy bandwidth (bytes read plus bytes written) and matrix products in bfloat16, on random data; the
fastest of 20 each, as `dfm-fast profile` takes them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dfm_fast.profiling.ceilings import SIDE, copy_seconds, product_flop_s
from dfm_fast.profiling.costs import call_flops


def product(device: str, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """(a product of two large square matrices, its floating-point operations)."""
    n = SIDE[torch.device(device).type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * n**3


class Operations(TorchDispatchMode):
    """Floating-point operations of matrix products, convolutions and attention, as they are called
    inside: `total`."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += call_flops(func, tuple(args), kwargs or {}, out)
        return out


def product_operations(call: Callable[[], Any]) -> int:
    """Of a call in plain torch."""
    with Operations() as counter:
        call()
    return counter.total


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.ceilings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    for mib in (8, 64, 4096) if device == "cuda" else (8, 256):
        moved = mib << 21  # read and written
        print(f"copy of {mib} MiB: {moved / copy_seconds(device, moved) / 1e9:,.0f} GB/s")
    rate = product_flop_s(device, torch.bfloat16, SIDE[device])
    print(f"matrix product {SIDE[device]}^3 in bfloat16: {rate / 1e12:,.1f} TFLOP/s")


if __name__ == "__main__":
    main()
