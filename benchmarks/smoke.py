"""Every operator, forward and backward, on small tensors: `python -m benchmarks.smoke cuda`.

Small enough for compute-sanitizer, which makes everything some hundred times slower: of each
operator the shared suite's first case, in both layouts; of pyramids every filter.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch

import dfm_fast
from dfm_fast._library import OPERATORS
from dfm_fast.ops._filters import FILTERS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cases import CASES
from helpers import grads


def first_case(name: str, device: str, dtype: torch.dtype) -> None:
    operator, case = OPERATORS[name], next(case for case in CASES if case.operator == name)
    for layout in ("contiguous", "channels_last"):
        args, kwargs = case.args(dtype, device, layout), dict(case.kwargs)
        if "device" in kwargs:
            kwargs["device"] = device
        operator.public(*args, **kwargs)
        grads(operator.public, args, kwargs)


def pyramids(filter: str, device: str, dtype: torch.dtype) -> None:
    sizes = {"binomial": (33, 50)}
    x = torch.randn((2, 3, *sizes.get(filter, (32, 48))), device=device).to(dtype).requires_grad_()
    levels = dfm_fast.laplacian_build(x, 3, filter=filter)
    dfm_fast.laplacian_collapse(levels, filter=filter).sum().backward()


def main() -> int:
    """How many of them failed; each says why."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    runs = [*((first_case, name) for name in OPERATORS), *((pyramids, name) for name in FILTERS)]
    failed = set()
    for dtype in (torch.float32, torch.bfloat16):
        for run, name in runs:
            try:
                run(name, device, dtype)
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception:
                print(f"\n{name}, {dtype}:\n{traceback.format_exc(limit=-4)}")
                failed.add(name)
    bad = f", {len(failed)} failed: {' '.join(sorted(failed))}" if failed else ""
    print(f"{len(OPERATORS)} operators and {len(FILTERS)} filters ran on {device}{bad}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
