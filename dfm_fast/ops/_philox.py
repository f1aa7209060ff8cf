r"""The library's random stream: Philox4x32-10 and Box-Muller, one normal per element index.

Element i of a tensor (row-major logical index, whatever the memory format) is normal number
e = offset + i of the stream of `seed`: output e % 4 of Philox with the 64-bit key `seed` and the
128-bit counter (e // 4, 0). So the noise of an element does not depend on device, tile, thread
count, memory format or sharding. e wraps at 2^64; no two elements of a tensor share a normal.

Outputs (x0, x1, x2, x3) of one counter become two pairs of normals in cuRAND's order:

    u = float32(x) 2^-32 + 2^-33                                 in (0, 1], rounded to float32
    r = sqrt(-2 ln u_0)     (z_0, z_1) = (r sin(2 pi u_1), r cos(2 pi u_1))     and alike (2, 3)

|z| <= sqrt(66 ln 2) = 6.76. float64 tensors get all of it in float64; others are rounded once. On
every device float32 normals are within 1e-5 of these, and so is what 16-bit results on a GPU round:
normals of their own, by the hardware's sine.

Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011; Box & Muller 1958.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from dfm_fast import _checks

LARGEST = math.sqrt(66 * math.log(2))  # of all normals

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_FOLD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd


def philox(counter: Tensor, key: Tensor | int, subsequence: int = 0) -> Tensor:
    """Philox4x32-10 of (counter int64 [...], subsequence) under a key: words [..., 4] in int64."""
    c = [counter & _WORD, (counter >> 32) & _WORD]
    c += [torch.full_like(counter, (subsequence >> shift) & _WORD) for shift in (0, 32)]
    k = [key & _WORD, (key >> 32) & _WORD]
    for _ in range(10):
        # Products of two words wrap modulo 2^64: their bits are right.
        p, q = c[0] * _MULTIPLIERS[0], c[2] * _MULTIPLIERS[1]
        high_p, high_q = (p >> 32) & _WORD, (q >> 32) & _WORD
        c = [high_q ^ c[1] ^ k[0], q & _WORD, high_p ^ c[3] ^ k[1], p & _WORD]
        k = [(word + weyl) & _WORD for word, weyl in zip(k, _WEYL, strict=True)]
    return torch.stack(c, -1)


def box_muller(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Words [..., 4] in int64 -> normals [..., 4] in dtype, float32 or float64."""
    u = words.to(dtype) * 2.0**-32 + 2.0**-33
    radius, angle = (-2 * u[..., 0::2].log()).sqrt(), 2 * math.pi * u[..., 1::2]
    return torch.stack((radius * angle.sin(), radius * angle.cos()), -1).flatten(-2)


def normals_ref(
    shape: Sequence[int], state: Tensor | None, seed: int, offset: int, like: Tensor
) -> Tensor:
    """Normals of `shape`, contiguous, in promote_types(like.dtype, float32) on like's device."""
    n = math.prod(shape)
    key: Tensor | int = seed
    first = torch.full((), offset, dtype=torch.int64, device=like.device)
    if state is not None:
        key, first = state[0], first + state[1]
    blocks = torch.arange(n // 4 + 2, device=like.device)
    counters = ((first >> 2) + blocks) & ((1 << 62) - 1)  # e wraps at 2^64
    z = box_muller(philox(counters, key), torch.promote_types(like.dtype, torch.float32))
    return (
        z.flatten().index_select(0, torch.arange(n, device=like.device) + (first & 3)).view(shape)
    )


# --- Seeds ----------------------------------------------------------------------------------------

Seed = int | Tensor | None


def seed_of(
    op: str, seed: Seed, offset: int, device: torch.device, shard: object = None
) -> tuple[Tensor | None, int, int]:
    """(state, seed, offset) as the raw operators take them: `state` int64 [2] on the device, whose
    seed and offset are added to the other two; None where the numbers are known on the host.

    seed None draws a state from the device's default generator, with no synchronisation; not for a
    shard, as the ranks would draw different ones.
    """
    offset = _checks.integer(op, "offset", offset, 0)
    if isinstance(seed, Tensor):
        _check_state(op, seed, device)
        return seed, 0, offset
    if seed is None and shard is not None:
        _checks.fail(op, "seed", "a seed, equal on all ranks, for a DTensor", None)
    if seed is None:
        # Offsets that are multiples of 4 are the fast ones. The shift may wrap: all is modulo 2^64.
        return torch.empty(2, dtype=torch.int64, device=device).random_() << 2, 0, offset
    if isinstance(seed, bool) or not isinstance(seed, int):
        _checks.fail(op, "seed", "an int, an int64 tensor [2] or None", _kind(seed), TypeError)
    if not -(1 << 63) <= seed < 1 << 64:
        _checks.fail(op, "seed", "64 bits, -2^63 to 2^64 - 1", seed)
    return None, seed - (1 << 64) if seed >= 1 << 63 else seed, offset


def _kind(value: object) -> str:
    return type(value).__name__


def _check_state(op: str, seed: Tensor, device: torch.device) -> None:
    if seed.dtype != torch.int64:
        _checks.fail(op, "seed", "an int64 tensor [2] of seed and offset", seed.dtype, TypeError)
    if seed.shape != (2,):
        _checks.fail(op, "seed", "shape [2], seed and offset", list(seed.shape))
    if seed.device != device:
        _checks.fail(op, "seed", f"device {device}", seed.device)


@overload
def fold(seed: int, number: int) -> int: ...


@overload
def fold(seed: Tensor, number: int) -> Tensor: ...


def fold(seed: Tensor | int, number: int) -> Tensor | int:
    """Another seed for each number; 0 keeps the seed. Keys differ, so streams are independent."""
    if number == 0:
        return seed
    step = number * _FOLD & ((1 << 64) - 1)
    if isinstance(seed, int):
        return (seed + step) & ((1 << 64) - 1)
    step = step - (1 << 64) if step >= 1 << 63 else step
    folded = seed.clone()
    folded[0] += step  # wraps
    return folded
