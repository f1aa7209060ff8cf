"""Gradients of convolutions as products of pixels' rows, [pixels, channels], by torch's matmul.

On a GPU they serve float32 that is to be exact: cuDNN's choices there (FFT, Winograd, one chain of
sums over all pixels) lose up to ten times what a product need lose.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # rows of a chain of sums, at least


def exact_on_gpu(x: Tensor) -> bool:
    """Whether x's products are of float32, on a GPU, and may not be of TF32."""
    narrow = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return x.is_cuda and x.dtype == torch.float32 and not narrow


def rows_of(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N H W, C], a view where x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """[P, A], [P, B] -> aᵀ b; exact float32 in blocks of rows, in as much memory as a at most."""
    block = max(BLOCK, b.shape[1])
    whole = len(a) // block * block if exact_on_gpu(a) else 0
    rest = a[whole:].t() @ b[whole:]
    if not whole:
        return rest
    left, right = (x[:whole].unflatten(0, (-1, block)) for x in (a, b))
    return torch.bmm(left.transpose(1, 2), right).sum(0) + rest
