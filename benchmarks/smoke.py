"""Every operator, forward and backward, on small tensors: `python -m benchmarks.smoke cuda`.

Small enough for compute-sanitizer, which makes everything some hundred times slower: of each
operator the shared suite's first case, in both layouts; of pyramids every filter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import dfm_fast
from dfm_fast._library import OPERATORS
from dfm_fast.ops._filters import FILTERS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cases import CASES
from helpers import grads


def first_cases(device: str, dtype: torch.dtype) -> None:
    cases = {case.operator: case for case in reversed(CASES)}
    for name, operator in OPERATORS.items():
        for layout in ("contiguous", "channels_last"):
            args = cases[name].args(dtype, device, layout)
            kwargs = dict(cases[name].kwargs)
            if "device" in kwargs:
                kwargs["device"] = device
            operator.public(*args, **kwargs)
            grads(operator.public, args, kwargs)


def pyramids(device: str, dtype: torch.dtype) -> None:
    sizes = {"binomial": (33, 50)}
    for filter in FILTERS:
        shape = (2, 3, *sizes.get(filter, (32, 48)))
        x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        levels = dfm_fast.laplacian_build(x, 3, filter=filter)
        dfm_fast.laplacian_collapse(levels, filter=filter).sum().backward()


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        first_cases(device, dtype)
        pyramids(device, dtype)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(OPERATORS)} operators ran on {device}")


if __name__ == "__main__":
    main()
