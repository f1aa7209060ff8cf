"""The two ceilings of a machine: `python -m benchmarks.ceilings [--device cuda]`.

Copy bandwidth (bytes read plus bytes written) and matrix products in bfloat16, on random data.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.clocks import clock_of


def median_ms(call: Callable[[], Any], device: str, samples: int = 20) -> float:
    with clock_of(device) as clock:
        sample = clock(call)
        for _ in range(3):
            sample()
        return statistics.median(sample() for _ in range(samples))


def copy_gb_s(device: str, mib: int) -> float:
    x = torch.randn(mib << 18, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() * x.element_size() / median_ms(lambda: y.copy_(x), device) / 1e6


def matmul_tflop_s(device: str, n: int) -> float:
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return 2 * n**3 / median_ms(lambda: a @ b, device) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.ceilings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    for mib in (8, 64, 4096) if device == "cuda" else (8, 256):
        print(f"copy of {mib} MiB: {copy_gb_s(device, mib):,.0f} GB/s")
    n = 8192 if device == "cuda" else 1024
    print(f"matrix product {n}^3 in bfloat16: {matmul_tflop_s(device, n):,.1f} TFLOP/s")


if __name__ == "__main__":
    main()
