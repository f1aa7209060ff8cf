"""The two ceilings of a machine: `python -m benchmarks.ceilings [--device cuda]`.

Copy bandwidth (bytes read plus bytes written) and matrix products in bfloat16, on random data; the
fastest of 20 each, as `dfm-fast profile` takes them.
"""

from __future__ import annotations

import argparse

import torch

from dfm_fast.profiling.ceilings import SIDE, copy_seconds, product_flop_s


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
