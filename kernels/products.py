"""What kernels that multiply matrices share: tiles, the step of a main loop, and its precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_fast._library import INTERPRET
from dfm_fast.ops._layouts import memory_format

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}  # bytes an element
# Target -> architecture, as `architecture` gives it.
ARCHITECTURES = {"sm_80": 8, "sm_90": 9, "sm_100": 10, "sm_120": 12, "gfx942": 0}


class Tile(NamedTuple):
    """What a program computes, and how: outputs BM x BN, BK terms of their sums at a time."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


# Of convolutions, the default first, of which `tuning` chooses. By bytes an element, and whether in
# channels_last: planes take more registers, as their tiles are not loaded in vectors where the
# number of pixels is any. Those of 2 bytes are products of tensor cores (wgmma on sm_90); float32
# in TF32 too where torch's are allowed to.
TILES = {
    (2, True): (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
    (2, False): (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    (4, True): (Tile(64, 64, 16, 4, 2),),
    (4, False): (Tile(64, 64, 16, 4, 2),),
    (8, True): (Tile(16, 16, 16, 4, 1),),
    (8, False): (Tile(16, 16, 16, 4, 1),),
}
# The interpreter's time is per operation: there a large default.
INTERPRETED = Tile(256, 256, 256, 4, 1)


def architecture(device: torch.device) -> int:
    """The compute capability's major version; 0: AMD."""
    if device.type != "cuda":
        return 9  # under the interpreter
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


def is_last(x: Tensor) -> bool:
    return memory_format(x) != torch.contiguous_format


def tiles_of(dtype: torch.dtype, last: bool) -> tuple[Tile, ...]:
    """Those a convolution may take, the default first."""
    own = TILES[dtype.itemsize, last]
    return (INTERPRETED, *own) if INTERPRET else own


def to_check(tiles: Sequence[Tile], dtype: str) -> Iterator[tuple[str, Tile, tuple[str, ...]]]:
    """(what a name ends in, tile, targets) of candidates for `dfm-fast check`: the default on all
    targets; the others on sm_90, not again for fp16, whose instructions are bf16's. Elsewhere they
    may not compile: tuning then skips them."""
    yield "", tiles[0], tuple(ARCHITECTURES)
    if dtype != "fp16":
        for tile in tiles[1:]:
            yield suffix(tile), tile, ("sm_90",)


def suffix(tile: Tile) -> str:
    return " " + "x".join(map(str, tile))


def accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def precision(x: Tensor) -> str:
    """Of a convolution's products of float32."""
    narrow = x.dtype == torch.float32 and x.is_cuda and torch.backends.cudnn.allow_tf32
    return "tf32" if narrow else "ieee"


@triton.jit
def multiply_step(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, products of float64 without tensor cores. Those of exact float32 are one chain of
    sums: of each step its own, or it grows with all terms, and with what Triton takes for its first
    (bias and residual, where there is one step). The limit, which is for float8, forbids that."""
    if acc.dtype == tl.float64:
        return acc + tl.sum(a[:, :, None] * b[None, :, :], 1)
    elif a.dtype == tl.float32 and PRECISION == "ieee":
        own = tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1])
        return acc + own
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def grouped_tile(tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row, column) of this program's tile: down GROUP rows of tiles, then to the next column, so
    that tiles at work together share what they read."""
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def row_of(ptr, offs, mask, ACC: tl.constexpr):
    """[1, BN] of a vector, for all rows of an accumulator."""
    return tl.load(ptr + offs, mask, other=0.0).to(ACC)[None, :]
