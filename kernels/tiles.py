"""How the kernels made of `patches` are launched: what a lane owns, and how lanes tile a level."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dfm_fast._library import INTERPRET
from dfm_fast.kernels.launching import cdiv, next_power_of_2, on_device
from dfm_fast.ops.pyramids import memory_format


class Tile(NamedTuple):
    """What a lane owns, and how many lanes of a program at most lie side by side."""

    rows: int  # of a patch, or that a lane walks down
    cols: int
    vec: int  # width of a load: along W, or along C in channels_last
    across: int = 16
    warps: int = 4


# Per kernel: (bytes an element, channels_last) -> a tile for each of SIZES, the most elements of a
# level that it serves. Chosen from static counts (see `pyramids`), to be overwritten by measured
# ones. Walks re-read two steps a lane: long ones where there are lanes enough without.
SIZES = (1 << 22, 1 << 26, 1 << 62)
_PATCHES = {
    (2, False): (Tile(4, 8, 8), Tile(8, 8, 8), Tile(8, 8, 8)),
    (2, True): (Tile(4, 4, 2), Tile(4, 8, 2), Tile(4, 8, 2)),
    (4, False): (Tile(4, 4, 4), Tile(8, 4, 4), Tile(8, 4, 4)),
    (4, True): (Tile(4, 4, 1), Tile(4, 8, 1), Tile(4, 8, 1)),
    (8, False): (Tile(4, 2, 2), Tile(4, 2, 2), Tile(4, 2, 2)),
    (8, True): (Tile(4, 4, 1), Tile(4, 4, 1), Tile(4, 4, 1)),
}
_LANES = {(2, False): (8, 8), (2, True): (8, 2), (4, False): (4, 4), (4, True): (4, 2)}
_LANES |= {(8, False): (4, 2), (8, True): (4, 1)}  # (cols, vec)
_ROWS = (8, 32, 64)
_WALKS = {key: tuple(Tile(rows, *v, across=128) for rows in _ROWS) for key, v in _LANES.items()}
# A band of a Haar level has half the columns: twice as many, for 16-byte loads of bands.
_BANDS = {key: tuple(t._replace(rows=4, cols=2 * t.cols) for t in v) for key, v in _PATCHES.items()}
TILES: dict[str, dict[tuple[int, bool], tuple[Tile, ...]]] = {
    "build": _PATCHES,
    "build_walk": _WALKS,
    "collapse": _PATCHES,
    "build_backward": _PATCHES,
    "collapse_backward": _PATCHES,
    "collapse_backward_walk": _WALKS,
    "haar": _BANDS,
}
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_NAMES |= {torch.float32: "fp32", torch.float64: "fp64"}
WARP = 64 if torch.version.hip else 32
CONSTANTS = ("ROWS", "COLS", "VEC", "LAST", "TC", "TW", "TH", "BLOCK", "WIDE")


def _power(n: int, most: int) -> int:
    """The least power of two from n on, at most `most`."""
    return min(next_power_of_2(n), most)


@functools.lru_cache(maxsize=1024)
def plan(
    name: str, shape: torch.Size, last: bool, itemsize: int, steps: int
) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    """(programs, (P, H, WP, CG), CONSTANTS, warps) for a finest level of `shape`."""
    tile = TILES[name][itemsize, last][bisect.bisect_left(SIZES, shape.numel())]
    *_, height, width = shape
    channels = shape[1] if last else 1
    planes = shape.numel() // (height * width * channels)
    rows, cols = max(tile.rows, 1 << steps), max(tile.cols, 1 << steps)
    while height < rows:
        rows //= 2
    while width % cols:
        cols //= 2
    vec = tile.vec
    while last and channels % vec:
        vec //= 2
    groups = channels // vec if last else 1
    across, down = width // cols, cdiv(height, rows)
    block = 1024 if INTERPRET else 32 * tile.warps  # the interpreter's time is per operation
    tc = _power(groups, 32)
    tw = _power(across, min(tile.across, block // tc))
    th = _power(down, block // (tc * tw))
    tp = block // (tc * tw * th)
    programs = cdiv(groups, tc) * cdiv(across, tw) * cdiv(down, th)
    programs *= cdiv(planes, tp)
    wide = 3 * height * width * channels >= 2**31  # a Haar level has 3 C channels
    constants = (rows, cols, vec, last, tc, tw, th, block, wide)
    return programs, (planes, height, across, groups), constants, max(1, block // WARP)


def is_last(x: Tensor) -> bool:
    """channels_last (2-D or 3-D)."""
    return memory_format(x) != torch.contiguous_format


def launch(
    kernel: triton.JITFunction,
    name: str,
    shape: torch.Size,  # of the finest level
    last: bool,
    tensors: Sequence[Tensor | None],
    *options: int | str,  # what the kernel takes between sizes and CONSTANTS; the last is STEPS
) -> None:
    if not shape.numel():
        return
    itemsize = tensors[0].element_size()
    programs, sizes, constants, warps = plan(name, shape, last, itemsize, options[-1])
    with on_device(tensors[0]):
        kernel[(programs,)](*tensors, *sizes, *options, *constants, num_warps=warps)


def described(
    kernel: triton.JITFunction,
    name: str,
    dtype: torch.dtype,
    last: bool,
    options: dict[str, Any],
    *,
    absent: Sequence[str] = (),
    shape: Sequence[int] = (8, 16, 1024, 1024),
) -> dict[str, Any]:
    """What `launch` compiles for such a level: the fields of an `_aot.Specialisation`."""
    itemsize = dtype.itemsize
    _, _, values, _ = plan(name, torch.Size(shape), last, itemsize, options["STEPS"])
    constants = {**options, **dict(zip(CONSTANTS, values, strict=True))}
    pointers = {a: None if a in absent else "*" for a in kernel.arg_names if a.endswith("_ptr")}
    integers = {a: "i32" for a in kernel.arg_names if a not in pointers and a not in constants}
    if not last:
        constants["CG"] = 1
    wide = constants["VEC"] if last else min(constants["VEC"], constants["COLS"])
    return {
        "kernel": kernel,
        "dtype": _NAMES[dtype],
        "arguments": pointers | integers,
        "constants": constants,
        "warps": constants["BLOCK"] // 32,
        "load_bits": 8 * itemsize * wide,
    }
