"""What the models compute without parameters: patches, positions, noise levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfm_fast import _checks

FREQUENCIES = 256  # of a noise level's embedding
Levels = Sequence[Tensor | None]


def timestep_embedding(t: Tensor, size: int = FREQUENCIES, max_period: float = 1e4) -> Tensor:
    """t [...] -> [..., size]: cosines, then sines, of t max_period^(-i / (size / 2)); t as it is,
    from 0 to 1."""
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float().unsqueeze(-1) * torch.exp(steps * (-math.log(max_period) / half))
    return torch.cat((angles.cos(), angles.sin()), -1)


def sincos_2d(height: int, width: int, dim: int, device: Any = None) -> Tensor:
    """[height * width, dim]: sines and cosines of the column, then of the row, dim / 4 frequencies
    10000^(-i / (dim / 4)) each."""
    count = dim // 4
    steps = torch.arange(count, dtype=torch.float64, device=device)
    frequencies = 10000.0 ** (-steps / count)
    parts = []
    for n, axis in ((width, 1), (height, 0)):
        angles = torch.arange(n, dtype=torch.float64, device=device).unsqueeze(1) * frequencies
        part = torch.cat((angles.sin(), angles.cos()), -1).unsqueeze(1 - axis)
        parts.append(part.expand(height, width, -1))
    return torch.cat(parts, -1).flatten(0, 1).float()


def patchify(x: Tensor, patch: int) -> Tensor:
    """[N, C, (T,) H, W] -> [N, (T) h w, C p p]: frame by frame, row by row; in a patch C by C."""
    frames = x.unsqueeze(2) if x.ndim == 4 else x
    tiles = frames.unflatten(-2, (-1, patch)).unflatten(-1, (-1, patch))  # [N, C, T, h, p, w, p]
    return tiles.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, like: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`, to the shape of `like`."""
    _, c, *frames, height, width = like.shape
    grid = (*(frames or (1,)), height // patch, width // patch)
    tiles = tokens.unflatten(-1, (c, patch, patch)).unflatten(1, grid)  # [N, T, h, w, C, p, p]
    return tiles.permute(0, 4, 1, 2, 5, 3, 6).reshape(like.shape)


def token_grid(
    op: str, levels: Levels, channels: Sequence[int], patch_sizes: Sequence[int]
) -> tuple[int, ...]:
    """Tokens (T, h, w), alike for all levels that are given."""
    grid = None
    if len(levels) != len(channels):
        _checks.fail(op, "levels", f"{len(channels)} levels", len(levels))
    for s, (x, c, p) in enumerate(zip(levels, channels, patch_sizes, strict=True)):
        if x is None:
            continue
        if x.ndim not in (4, 5) or x.shape[1] != c or x.shape[-2] % p or x.shape[-1] % p:
            shape = f"[N, {c}, (T,) H, W] with sides that {p} divides"
            _checks.fail(op, f"levels[{s}]", shape, list(x.shape))
        here = (*(x.shape[2:3] if x.ndim == 5 else (1,)), x.shape[-2] // p, x.shape[-1] // p)
        if grid is not None and here != grid:
            _checks.fail(op, f"levels[{s}]", f"tokens {grid} like the coarser levels", here)
        grid = here
    if grid is None:
        _checks.fail(op, "levels", "at least one level", "None for all")
    return grid


def precondition(sigma: float, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """EDM's (arXiv 2206.00364) for this flow: (c_in, c_skip, c_out) of t, for data of deviation
    sigma. v = c_skip x_t + c_out F(c_in x_t): F sees and gives values of variance 1."""
    d = (1 - t).square() * sigma**2 + t.square()
    return d.rsqrt(), (t - (1 - t) * sigma**2) / d, sigma * d.rsqrt()
