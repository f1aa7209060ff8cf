"""Group norms and channel statistics: see `dfm_fast.ops.group_norms` for what is computed.

Memory is N matrices: [C, P] (contiguous) or [P, C] (channels_last). A program has ROWS x COLS of
one of them, whatever the batch, so that one sample fills a chip too.
Three launches: moments of every tile's channels; one small kernel that merges them in order and
turns the statistics of a group into scale and offset of its channels; the pass that applies them.
Two where the last can merge for itself. Backward likewise, and once more for the weights. Merging
is in float64, so that a large mean costs no digits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_fast._library import INTERPRET
from dfm_fast.kernels._aot import Specialisation
from dfm_fast.kernels.launching import cdiv, next_power_of_2, on_device, planned, registers
from dfm_fast.kernels.map_norms import (
    _apply_kernel,
    _dx_kernel,
    _merge_apply_kernel,
    _merge_kernel,
    _merge_sums_kernel,
    _moments_kernel,
    _over_samples_kernel,
    _statistics_backward_kernel,
    _sums_kernel,
)
from dfm_fast.ops._layouts import empty_in, memory_format

TILE = 16384 if INTERPRET else 4096  # elements; the interpreter's time is per operation
LINE = 128  # bytes of channels side by side, in channels_last
LINES = 16 if INTERPRET else 128  # pixels; the interpreter's numpy adds one after another
CHANNELS = 16  # merged by a program where there are no groups
OVER_SAMPLES = {"BLOCK_C": 64, "BLOCK_N": 16}
AGAIN = 4096  # programs: each merges in 700 instructions a warp, or all wait 4 us for a launch
MERGING_REGISTERS = 128
PARTIALS = 4096  # channels x blocks that are merged at once, by 8 warps: it is latency

# --- Launching ------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a map is cut into tiles."""

    programs: int
    pixels: int
    blocks: int  # along the pixels of a sample
    block_pixels: int
    sizes: tuple[int, int, int]  # C, rows of a matrix, vectors of a row
    constants: dict[str, Any]


@planned
def plan(shape: tuple[int, ...], last: bool, itemsize: int) -> Plan:
    n, channels, pixels = shape[0], shape[1], math.prod(shape[2:])
    rows, cols = (pixels, channels) if last else (channels, pixels)
    vec = math.gcd(16 // itemsize, cols)
    tile = TILE // 2 if itemsize == 8 else TILE  # registers
    width = min(next_power_of_2(max(cols, 1)), LINE // itemsize if last else tile)
    height = min(next_power_of_2(max(rows, 1)), LINES if last else tile // width)
    row_blocks, col_blocks = cdiv(rows, height), cdiv(cols, width)
    blocks, block_pixels = (row_blocks, height) if last else (col_blocks, width)
    wide = max(math.prod(shape), 2 * n * blocks * channels) >= 2**31 - TILE
    constants = {"LAST": last, "ROWS": height, "COLS": width, "VEC": vec, "WIDE": wide}
    sizes = (channels, rows, cols // vec)
    return Plan(n * row_blocks * col_blocks, pixels, blocks, block_pixels, sizes, constants)


def _merging(tiles: Plan, size: int) -> Plan | None:
    """The plan whose programs merge their group's moments again, instead of a launch between. For
    small maps every launch is a good part of the time. Only for tiles of one group's channels, with
    eight times the elements that there are partial moments to read."""
    block = next_power_of_2(size)
    constants = tiles.constants
    rows = math.gcd(size, constants["ROWS"])
    few = 8 * tiles.blocks * block <= rows * constants["COLS"]
    if constants["LAST"] or not few:
        return None
    programs = tiles.programs // cdiv(tiles.sizes[0], constants["ROWS"]) * (tiles.sizes[0] // rows)
    if programs > AGAIN:
        return None
    merge = {"BLOCK_C": block, "BLOCK_B": next_power_of_2(tiles.blocks)}
    return tiles._replace(programs=programs, constants=constants | {"ROWS": rows} | merge)


def _merging_warps(itemsize: int) -> int:
    return 8 if itemsize == 8 else 4  # float64 spills in four


def _plan(x: Tensor) -> Plan:
    last = memory_format(x) != torch.contiguous_format
    return plan(tuple(x.shape), last, x.element_size())


def _acc(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    double = x.dtype == torch.float64
    return (torch.float64, tl.float64) if double else (torch.float32, tl.float32)


def _per_channel(x: Tensor, count: int, blocks: int = 0) -> tuple[Tensor, ...]:
    """`count` tensors [N, C], or [N, blocks, C], in the arithmetic's dtype."""
    size = (x.shape[0], blocks, x.shape[1]) if blocks else (x.shape[0], x.shape[1])
    return x.new_empty((count, *size), dtype=_acc(x)[0]).unbind()


def _merge_blocks(size: int, blocks: int) -> dict[str, int]:
    """Of `size` channels; no warp waits for others where one has little to do."""
    block = next_power_of_2(size)
    at_once = min(next_power_of_2(blocks), max(1, PARTIALS // block))
    warps = min(8, next_power_of_2(cdiv(block * at_once, 256)))
    return {"BLOCK_C": block, "BLOCK_B": at_once, "num_warps": warps}


def _partials(x: Tensor, tiles: Plan) -> tuple[Tensor, ...]:
    mean, m2 = _per_channel(x, 1, 2 * tiles.blocks)[0], _per_channel(x, 1, tiles.blocks)[0]
    _moments_kernel[(tiles.programs,)](x, mean, m2, *tiles.sizes, ACC=_acc(x)[1], **tiles.constants)
    return mean, m2


def _merge(
    x: Tensor,
    tiles: Plan,
    partials: tuple[Tensor | None, ...],
    statistics: tuple[Tensor, ...],
    size: int,
    given: tuple[Tensor | None, ...] = (None, None, None),
    affine: tuple[Tensor | None, ...] = (None, None, None, None),
    eps: float = 0.0,
) -> None:
    channels = x.shape[1]
    _merge_kernel[(x.shape[0] * cdiv(channels, size),)](
        *partials, *statistics, *given, *affine,
        channels, size, tiles.blocks, tiles.pixels, tiles.block_pixels,
        EPS=eps, **_merge_blocks(size, 1 if partials[0] is None else tiles.blocks),
    )  # fmt: skip


def merge_moments(
    x: Tensor, tiles: Plan, partials: tuple[Tensor, ...], statistics: tuple[Tensor, ...]
) -> None:
    """Those of blocks of pixels (means [N, blocks, 2, C], M2 [N, blocks, C]) into those of x's
    channels [N, C]."""
    _merge(x, tiles, partials, statistics, min(x.shape[1], CHANNELS))


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, m2 = (torch.empty_like(v) for v in _per_channel(x, 2))
    if x.numel():
        tiles = _plan(x)
        with on_device(x):
            merge_moments(x, tiles, _partials(x, tiles), (mean, m2))
    return mean, m2


def channel_statistics_backward(dmean: Tensor, dm2: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    dx = empty_in(memory_format(x), x, x.shape)
    if x.numel():
        tiles = _plan(x)
        with on_device(x):
            _statistics_backward_kernel[(tiles.programs,)](
                x, dx, dmean, dm2, mean, *tiles.sizes, tiles.pixels,
                ACC=_acc(x)[1], **tiles.constants,
            )  # fmt: skip
    return dx


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = empty_in(memory_format(x), x, x.shape)
    found = x.new_empty(0, dtype=_acc(x)[0]), x.new_empty(0, dtype=_acc(x)[0])
    if mean is None or m2 is None:
        mean, m2 = found = tuple(torch.empty_like(v) for v in _per_channel(x, 2))
    if x.numel():
        tiles, size = _plan(x), x.shape[1] // num_groups
        own = mean is found[0]
        with on_device(x):
            partials = _partials(x, tiles) if own else (None, None)
            if own and (again := _merging(tiles, size)):
                _merge_apply_kernel[(again.programs,)](
                    x, y, *partials, mean, m2, weight, bias, shift, *again.sizes,
                    size, tiles.blocks, tiles.pixels, tiles.block_pixels,
                    EPS=eps, SILU=silu, ACC=_acc(x)[1], num_warps=_merging_warps(x.itemsize),
                    **registers(MERGING_REGISTERS),
                    **again.constants,
                )  # fmt: skip
                return y, *found
            affine = _per_channel(x, 4)
            _merge(x, tiles, partials, (mean, m2), size, (weight, bias, shift), affine, eps)
            _apply_kernel[(tiles.programs,)](
                x, y, *affine[:3], *tiles.sizes, SILU=silu, ACC=_acc(x)[1], **tiles.constants
            )
    return y, *found


def group_norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    m2: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    *,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, channels = x.shape[0], x.shape[1]
    dx = empty_in(memory_format(x), x, x.shape) if need_dx else x.new_empty(0)
    dweight, dbias = (x.new_zeros(channels, dtype=mean.dtype) for _ in range(2))
    dshift = torch.empty_like(mean)
    if not x.numel():
        return dx, dweight, dbias, dshift
    tiles, size = _plan(x), channels // num_groups
    constants = {"SILU": silu, "ACC": _acc(x)[1], **tiles.constants}
    with on_device(x):
        affine = scale, offset, centre, rstd = _per_channel(x, 4)
        _merge(x, tiles, (None, None), (mean, m2), size, (weight, bias, shift), affine, eps)
        partials = _per_channel(x, 2, tiles.blocks)
        maps = scale, offset, centre
        _sums_kernel[(tiles.programs,)](dy, x, *maps, *partials, *tiles.sizes, **constants)
        s, q, constant, linear = _per_channel(x, 4)
        _merge_sums_kernel[(n * num_groups,)](
            *partials, mean, centre, rstd, weight, s, q, constant, linear, dshift,
            channels, size, tiles.blocks, tiles.pixels, **_merge_blocks(size, tiles.blocks),
        )  # fmt: skip
        _over_samples_kernel[(cdiv(channels, OVER_SAMPLES["BLOCK_C"]),)](
            s, q, dweight, dbias, n, channels, **OVER_SAMPLES
        )
        if need_dx:
            rest = *maps, constant, linear, *tiles.sizes
            _dx_kernel[(tiles.programs,)](dy, x, dx, *rest, **constants)
    return dx, dweight, dbias, dshift


def applied_norm(
    x: Tensor,
    mean: Tensor | None,
    m2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """(scale, offset, centre) [N, C] for kernels that apply the norm of given statistics to what
    they read; None where there are none."""
    if mean is None or m2 is None:
        return None, None, None
    affine, size = _per_channel(x, 4), x.shape[1] // num_groups
    _merge(x, _plan(x), (None, None), (mean, m2), size, (weight, bias, shift), affine, eps)
    return affine[:3]


# --- Ahead of time --------------------------------------------------------------------------------


def specialisations() -> Iterator[Specialisation]:
    shape = (2, 256, 64, 64)
    for dtype, last in itertools.product(("bf16", "fp16", "fp32", "fp64"), (False, True)):
        itemsize = {"fp64": 8, "fp32": 4}.get(dtype, 2)
        acc = tl.float64 if dtype == "fp64" else tl.float32
        small = "*fp64" if dtype == "fp64" else "*fp32"
        tiles = plan(shape, last, itemsize)
        layout = "NHWC" if last else "NCHW"
        kernels = {
            "moments": (_moments_kernel, ("x_ptr",), {}),
            "apply": (_apply_kernel, ("x_ptr", "y_ptr"), {"SILU": True}),
            "backward sums": (_sums_kernel, ("x_ptr", "dy_ptr"), {"SILU": True}),
            "backward dx": (_dx_kernel, ("x_ptr", "dy_ptr", "dx_ptr"), {"SILU": True}),
            "statistics backward": (_statistics_backward_kernel, ("x_ptr", "dx_ptr"), {}),
        }
        for name, (kernel, maps, options) in kernels.items():
            constants = {**options, "ACC": acc, **tiles.constants}
            yield Specialisation(
                f"group_norm {name} {layout}",
                kernel,
                dtype,
                _arguments(kernel, dict.fromkeys(maps, "*"), small, constants),
                constants,
                load_bits=128,
            )
        if last:
            continue
        merges = {
            "merge": (_merge_kernel, {"EPS": 1e-5, **_merge_blocks(8, 32)}),
            "merge of many": (_merge_kernel, {"EPS": 1e-5, **_merge_blocks(8, 512)}),
            "merge sums": (_merge_sums_kernel, _merge_blocks(8, 512)),
            "over samples": (_over_samples_kernel, OVER_SAMPLES),
        }
        again = _merging(tiles, 8).constants | {"EPS": 1e-5, "SILU": True, "ACC": acc}
        arguments = dict.fromkeys(("x_ptr", "y_ptr", "weight_ptr", "bias_ptr", "shift_ptr"), "*")
        yield Specialisation(
            "group_norm merge and apply",
            _merge_apply_kernel,
            dtype,
            _arguments(_merge_apply_kernel, arguments, small, again),
            again,
            _merging_warps(itemsize),
            load_bits=128,
            options={"maxnreg": MERGING_REGISTERS},
        )
        for name, (kernel, constants) in merges.items():
            given = dict.fromkeys(("weight_ptr", "bias_ptr", "shift_ptr"), "*")
            warps = constants.pop("num_warps", 4)
            arguments = _arguments(kernel, given, small, constants)
            yield Specialisation(f"group_norm {name}", kernel, dtype, arguments, constants, warps)


def _arguments(
    kernel: triton.JITFunction, maps: dict[str, str], small: str, constants: dict[str, Any]
) -> dict[str, str | None]:
    pointers = {a: maps.get(a, small) for a in kernel.arg_names if a.endswith("_ptr")}
    return pointers | {
        a: "i32" for a in kernel.arg_names if a not in pointers and a not in constants
    }
