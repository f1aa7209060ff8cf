"""Every operator once, forward and backward, on small tensors: `python -m benchmarks.smoke cuda`.

Small enough for compute-sanitizer, which makes everything some hundred times slower.
"""

from __future__ import annotations

import sys

import torch

import dfm_fast
from dfm_fast.ops._filters import FILTERS


def pyramids(device: str, dtype: torch.dtype) -> None:
    sizes = {"binomial": (33, 50)}
    for filter in FILTERS:
        shape = (2, 3, *sizes.get(filter, (32, 48)))
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
            x.requires_grad_()
            levels = dfm_fast.laplacian_build(x, 3, filter=filter)
            dfm_fast.laplacian_collapse(levels, filter=filter).sum().backward()
    x = torch.randn(2, 3, 32, 48, device=device).to(dtype).requires_grad_()
    dfm_fast.haar_collapse(dfm_fast.haar_build(x, 3)).sum().backward()


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        pyramids(device, dtype)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"every operator ran on {device}")


if __name__ == "__main__":
    main()
