"""Row-wise norms, their modulation and their residuals: see `dfm_fast.ops.norms`.

Forward, a program has a tile of rows of one sample, each whole: statistics and output come from one
read. Backward, a program walks over a block of rows of one sample and keeps the sums that its
modulation gets in registers; a second kernel adds those of all blocks, in order. A warp, or a few
of long rows, has a row for itself: what limits these kernels, next to memory, is instructions, and
most of those are spent on lanes that have nothing to do and on exchanges between warps. All sizes
of blocks follow from shapes, not from the device. Rows of more than 16384 elements, 8192 backward
(in float64 half of that), are more than a program's registers hold: kernels of their own go over
them in chunks, twice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dfm_fast._library import INTERPRET
from dfm_fast.kernels._aot import Specialisation
from dfm_fast.kernels.launching import (
    Layout,
    cdiv,
    layout,
    next_power_of_2,
    on_device,
    planned,
    registers,
)
from dfm_fast.kernels.long_rows import _long_backward_kernel, _long_forward_kernel
from dfm_fast.kernels.row_norms import _add_blocks_kernel, _backward_kernel, _forward_kernel

FORWARD, BACKWARD = 65536, 32768  # bytes of the longest whole row, in the arithmetic type
LONG_FORWARD, LONG_BACKWARD = 16384, 8192  # bytes of a program's chunk of longer ones, likewise
# Eight for each of an H200's multiprocessors: what a grid should have. The interpreter has one.
PROGRAMS = 8 if INTERPRET else 1056
COLUMNS = 1024 if INTERPRET else 32  # of a program that adds blocks
CHUNK = 128  # elements of a row that a warp has side by side
MULTIPROCESSORS = 1 if INTERPRET else 128  # that a backward which sums has programs for


# --- Launchers ------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """x [B, ..., D] as B samples of T rows; for rms_norm one sample of all rows."""

    B: int
    T: int
    D: int

    def strides(self, x: Layout | None) -> tuple[int, int]:
        """(from sample to sample, from row to row); 0 where there is one for all."""
        if x is None or len(x.shape) == 1:
            return 0, 0
        if math.prod(x.shape) == math.prod(self) and x.contiguous():
            sample, token = self.T * self.D, self.D
        else:
            sample, token = x.strides[0], x.strides[1] if len(x.shape) == 3 else 0
        return sample * (self.B > 1), token * (self.T > 1)


def _rows(x: Tensor, one_sample: bool = False) -> _Rows:
    first = 0 if one_sample else 1
    return _Rows(math.prod(x.shape[:first]), math.prod(x.shape[first:-1]), x.shape[-1])


@planned
def _walk(
    rows: _Rows, dtype: torch.dtype, *layouts: Layout | None
) -> tuple[list[int], dict[str, Any]]:
    """(strides in vectors, constants) of a launch on x, the first, and what is walked with it."""
    each = [rows.strides(v) for v in layouts]
    vec = math.gcd(16 // dtype.itemsize, rows.D, *itertools.chain(*each))
    far = max(rows.B * sample + rows.T * token for sample, token in each)
    wide = max(far, rows.B * rows.T * rows.D) >= 2**31 - next_power_of_2(rows.D)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    constants = {"ACC": acc, "VEC": vec, "WIDE": wide}
    return [stride // vec for pair in each for stride in pair], constants


def _each_token(rows: _Rows, modulation: Tensor | None) -> bool:
    return modulation is not None and rows.T > 1 and modulation.numel() == math.prod(rows)


class _Tiles(NamedTuple):
    """How a kernel walks over rows."""

    kernel: Any
    rows: int  # of one sample, that a program has
    constants: dict[str, int]
    warps: int  # of 32 threads
    options: dict[str, int] = {}  # noqa: RUF012


def _warps(elements: int, each: int, wide: bool, most: int = 16) -> int:
    """With `each` elements of a tile for a thread, and a quarter in float64."""
    return min(max(elements // (32 * each // (4 if wide else 1)), 1), most)


def _chunks(D: int, size: int, each: int, most: int) -> tuple[int, int]:
    """(elements of a chunk, warps of a row), with up to 4 `each` bytes of a row for a thread, as
    far as `most` warps can. A warp's part of a chunk is 128 elements, for some rows are not much
    more than a multiple of it."""
    warps = 1
    while warps < most and D * size > 128 * each * warps:
        warps *= 2
    return min(next_power_of_2(D), CHUNK * warps), warps


@planned
def _forward_tiles(rows: _Rows, wide: bool) -> _Tiles:
    """wide: float64."""
    size = 8 if wide else 4
    if rows.D * size > FORWARD:
        chunk = LONG_FORWARD // size
        return _Tiles(
            _long_forward_kernel, 1, {"ROWS": 1, "CHUNK": chunk}, _warps(chunk, 16, wide, 8)
        )
    chunk, warps = _chunks(rows.D, size, 40, 8)
    padded = cdiv(rows.D, chunk) * chunk
    tile = max(4096 // next_power_of_2(padded), 4 // warps, 1)
    tile = min(tile, next_power_of_2(max(rows.T, 1)))
    while tile > 1 and rows.B * cdiv(rows.T, tile) < PROGRAMS:
        tile //= 2
    warps = min(max(tile * chunk // CHUNK, 1), max(4, warps))
    options = registers(255) if wide else {}
    return _Tiles(_forward_kernel, tile, {"ROWS": tile, "CHUNK": chunk}, warps, options)


def _statistic(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty(x.shape[:-1], dtype=dtype, device=x.device)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _forward(
    rows: _Rows,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float | None,
    rms: bool = False,
) -> tuple[Tensor | None, ...]:
    """(residual, normed, mean, rstd), None where there is none; eps None: no norm."""
    residual = None if y is None else _like(x)
    normed, rstd = (None, None) if eps is None else (_like(x), _statistic(x))
    mean = None if eps is None or rms else _statistic(x)
    strides, constants = _walk(rows, x.dtype, *map(layout, (x, y, gate, shift, scale)))
    tiles = _forward_tiles(rows, x.dtype == torch.float64)
    blocks = cdiv(rows.T, tiles.rows)
    each = _each_token(rows, gate if eps is None else scale)
    if x.numel():
        with on_device(x):
            tiles.kernel[(rows.B * blocks,)](
                *(x, y, gate, shift, scale, residual, normed, mean, rstd),
                *(rows.T, rows.D // constants["VEC"], blocks, *strides),
                *(eps or 0.0, rms, each),
                num_warps=tiles.warps,
                **tiles.options,
                **tiles.constants,
                **constants,
            )
    return residual, normed, mean, rstd


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    _, y, _, rstd = _forward(_rows(x, True), x, None, None, None, weight, eps, True)
    return y, rstd


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _forward(_rows(x), x, None, None, shift, scale, eps)[1:]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return _forward(_rows(x), x, y, gate, None, None, None)[0]


def gated_residual_ada_layer_norm(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _forward(_rows(x), x, *rest)


@planned
def _backward_tiles(rows: _Rows, itemsize: int, each: bool, sums: int, norm: bool) -> _Tiles:
    """A block has at least four rows, for its sums to be few beside them; not so where sums fill
    the registers, of which three sums and long rows need most. There are as many programs as are at
    work at once: none waits for another to end."""
    wide, T = itemsize == 8, max(rows.T, 1)
    if rows.D * max(itemsize, 4) > BACKWARD:
        return _long_backward_tiles(rows, wide, each, norm)
    chunk, across = _chunks(rows.D, max(itemsize, 4), 20, 8)
    padded = cdiv(rows.D, chunk) * chunk
    tile = max((512 if wide else 2048) // next_power_of_2(padded), 4 // across, 1)
    tile = min(tile, next_power_of_2(T), 32)
    warps = min(max(tile * chunk // CHUNK, 1), max(4, across))
    most = 255 if wide or sums == 3 or across > 4 else 168 if sums == 2 and itemsize == 4 else 128
    tiles = 1
    if not each and padded * itemsize * sums <= 40960:
        programs = MULTIPROCESSORS * (65536 // (32 * warps * most))
        tiles = cdiv(min(max(cdiv(rows.B * rows.T, programs), 4), T), tile)
    constants = {"ROWS": tile, "tiles": tiles, "CHUNK": chunk}
    return _Tiles(_backward_kernel, tile * tiles, constants, warps, registers(most))


def _long_backward_tiles(rows: _Rows, wide: bool, each: bool, norm: bool) -> _Tiles:
    """Up to eight rows, for their sums to be few beside them, as long as there are programs for two
    on each multiprocessor, which have room for no more."""
    tile = 1 if each else min(next_power_of_2(max(rows.T, 1)), 8)
    while tile > 1 and rows.B * cdiv(rows.T, tile) < PROGRAMS // 4:
        tile //= 2
    chunk = LONG_BACKWARD // (8 if wide else 4)
    constants = {"ROWS": tile, "CHUNK": chunk // tile}
    return _Tiles(_long_backward_kernel, tile, constants, _warps(chunk, 8 if norm else 16, wide, 8))


def _backward(
    rows: _Rows,
    dr: Tensor | None,
    dn: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> list[Tensor | None]:
    """[dx, dy, dgate, dshift, dscale], None where there is none; mean None: rms_norm."""
    given = dr if dn is None else dn
    rms = mean is None
    dx, dy = (None if v is None else _like(v) for v in (x, y))
    modulation = [gate, None if rms else scale, scale]
    sums = [None if m is None else _like(m) for m in modulation]
    if not given.numel():
        return [dx, dy, *(None if v is None else v.zero_() for v in sums)]
    walked = (given, dr, dn, x, y, gate, scale)
    strides, constants = _walk(rows, given.dtype, *map(layout, walked))
    each = _each_token(rows, gate if scale is None else scale)
    wanted = [v for v in sums if v is not None]
    tiles = _backward_tiles(rows, given.element_size(), each, len(wanted), dn is not None)
    blocks = cdiv(rows.T, tiles.rows)
    targets = sums
    if wanted and not each:
        dtype = torch.promote_types(given.dtype, torch.float32)
        shape = len(wanted), rows.B, blocks, rows.D
        partial = torch.empty(shape, dtype=dtype, device=given.device)
        parts = iter(partial)
        targets = [None if v is None else next(parts) for v in sums]
    with on_device(given):
        tiles.kernel[(rows.B * blocks,)](
            *(dr, dn, x, y, gate, scale, mean, rstd, dx, dy, *targets),
            *(rows.T, rows.D // constants["VEC"], blocks, *strides[2:]),
            *(rms, each),
            num_warps=tiles.warps,
            **tiles.options,
            **tiles.constants,
            **constants,
        )
        if wanted and not each:
            grid = cdiv(rows.D, COLUMNS), rows.B, len(wanted)
            outputs = wanted + [None] * (3 - len(wanted))
            height = min(next_power_of_2(blocks), 2048 // partial.element_size())
            _add_blocks_kernel[grid](
                *(partial, *outputs, blocks, rows.D, rows.B, constants["ACC"], height, COLUMNS),
                num_warps=_warps(height * COLUMNS, 32, False),
            )
    return [dx, dy, *sums]


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dx, *_, dweight = _backward(_rows(x, True), None, dy, x, None, None, weight, None, rstd)
    return dx, x.new_empty(0) if dweight is None else dweight


def ada_layer_norm_backward(dy: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    dx, _, _, dshift, dscale = _backward(_rows(x), None, dy, x, None, None, *rest)
    return dx, dshift, dscale


def gated_residual_backward(dr: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    _, dy, dgate, _, _ = _backward(_rows(y), dr, None, None, y, gate, None)
    return dy, dgate


def gated_residual_ada_layer_norm_backward(
    dr: Tensor | None, dn: Tensor, *rest: Tensor
) -> tuple[Tensor, ...]:
    return tuple(_backward(_rows(dn), dr, dn, *rest))


# --- What is launched -----------------------------------------------------------------------------


def _specialisation(
    name: str, tiles: _Tiles, D: int, tensors: str, dtype: str, modulation: str, **constants: Any
) -> Specialisation:
    """A launch with these tensors."""
    acc = "fp64" if dtype == "fp64" else "fp32"
    kinds = {f"{t}_ptr": "*" for t in tensors.split()}
    own = ("gate_ptr", "shift_ptr", "scale_ptr", "dgate_ptr", "dshift_ptr", "dscale_ptr")
    kinds |= {k: f"*{modulation}" for k in own if k in kinds}
    if not constants["EACH"]:
        kinds |= {k: f"*{acc}" for k in own[3:] if k in kinds}
    kinds |= {k: f"*{acc}" for k in ("mean_ptr", "rstd_ptr") if k in kinds}
    arguments = tiles.kernel.arg_names
    integers = [a for a in arguments if a.islower() and a[-2:] in ("_b", "_t")]
    kinds |= dict.fromkeys([*integers, "T", "DV", "tiles", "blocks"], "i32")
    vec = {"fp32": 4, "fp64": 2}.get(dtype, 8)
    constants |= {"ACC": tl.float64 if acc == "fp64" else tl.float32, "VEC": vec, "WIDE": False}
    constants |= tiles.constants
    whole = tiles.kernel in (_forward_kernel, _backward_kernel)
    if whole:
        constants["DV"] = D // vec
    if constants.get("tiles", 1) > 1:
        del constants["tiles"]  # one alone a launch makes a constant
    bits = 64 if whole and dtype in ("bf16", "fp16") else 128
    more = {"load_bits": bits, "options": tiles.options}
    return Specialisation(name, tiles.kernel, dtype, kinds, constants, tiles.warps, **more)


def specialisations() -> Iterator[Specialisation]:
    norm = "scale out rstd"
    forward = {
        "rms_norm": f"x {norm}",
        "ada_layer_norm": f"x shift mean {norm}",
        "gated_residual": "x y gate residual",
        "gated_residual_ada_layer_norm": f"x y gate residual shift mean {norm}",
    }
    norm = "dn x scale rstd dx dscale"
    backward = {
        "rms_norm": norm,
        "ada_layer_norm": f"{norm} mean dshift",
        "gated_residual": "dr y gate dy dgate",
        "gated_residual_ada_layer_norm": f"{norm} mean dshift dr y gate dy dgate",
    }
    dtypes = [*((d, d) for d in ("bf16", "fp16", "fp32", "fp64")), ("bf16", "fp32")]
    widths = (72, 1152, 8192, 16384, 24576)
    for op, D, (dtype, modulation) in itertools.product(forward, widths, dtypes):
        width, wide = {"fp32": 4, "fp64": 8}.get(dtype, 2), dtype == "fp64"
        for EACH in [False, True] if D in (1152, 24576) and op != "rms_norm" else [False]:
            rows, constants = _Rows(32, 1024, D), {"RMS": op == "rms_norm", "EACH": EACH}
            name = f"{D}{' each token' if EACH else ''}"
            name += f" {modulation} modulation" if modulation != dtype else ""
            tiles = _forward_tiles(rows, wide)
            yield _specialisation(
                *(f"{op} {name}", tiles, D, forward[op], dtype, modulation),
                **constants | {"EPS": 1e-6},
            )
            wanted = len({"dgate", "dshift", "dscale"} & set(backward[op].split()))
            tiles = _backward_tiles(rows, width, EACH, wanted, "dn" in backward[op].split())
            yield _specialisation(
                *(f"{op}_backward {name}", tiles, D, backward[op], dtype, modulation), **constants
            )
    for dtype, rows in itertools.product(("bf16", "fp16", "fp32", "fp64"), (32, 256)):
        acc = "fp64" if dtype == "fp64" else "fp32"
        outputs = dict.fromkeys(("first_ptr", "second_ptr", "third_ptr"), "*")
        kinds = outputs | {"sums_ptr": f"*{acc}"} | dict.fromkeys(("blocks", "D", "B"), "i32")
        constants = {"ACC": getattr(tl, acc.replace("fp", "float")), "ROWS": rows}
        name = f"norms add {rows} blocks"
        constants |= {"COLUMNS": COLUMNS}
        warps = _warps(rows * COLUMNS, 32, False)
        yield Specialisation(name, _add_blocks_kernel, dtype, kinds, constants, warps)
