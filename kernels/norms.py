"""Row-wise norms, their modulation and their residuals: see `dfm_fast.ops.norms`.

Forward, a program has a tile of rows of one sample, each whole: statistics and output come from one
read. Backward, a program walks over a block of rows of one sample and keeps the sums that its
modulation gets in registers; a second kernel adds those of all blocks, in order. All sizes of
blocks follow from shapes, not from the device. Rows of more than 16384 elements, 8192 backward, are
left to the reference (in float64 half of that), with a warning: a program's registers do not hold
them.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_fast._library import INTERPRET
from dfm_fast.kernels._aot import Specialisation
from dfm_fast.kernels.resample import on_device
from dfm_fast.kernels.row_norms import _add_blocks_kernel, _backward_kernel, _forward_kernel
from dfm_fast.ops import norms as reference

FORWARD, BACKWARD = 65536, 32768  # bytes of the longest row, in the arithmetic type
# Eight for each of an H200's multiprocessors: what a grid should have. The interpreter has one.
PROGRAMS = 8 if INTERPRET else 1056
COLUMNS = 1024 if INTERPRET else 32  # of a program that adds blocks


# --- Launchers ------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """x [B, ..., D] as B samples of T rows; for rms_norm one sample of all rows."""

    B: int
    T: int
    D: int

    def strides(self, x: Tensor | None) -> tuple[int, int]:
        """(from sample to sample, from row to row); 0 where there is one for all."""
        if x is None or x.ndim == 1:
            return 0, 0
        if x.numel() == self.B * self.T * self.D and x.is_contiguous():
            sample, token = self.T * self.D, self.D
        else:
            sample, token = x.stride(0), x.stride(1) if x.ndim == 3 else 0
        return sample * (self.B > 1), token * (self.T > 1)


def _rows(x: Tensor, one_sample: bool = False) -> _Rows:
    first = 0 if one_sample else 1
    return _Rows(math.prod(x.shape[:first]), math.prod(x.shape[first:-1]), x.shape[-1])


def _common(rows: _Rows, x: Tensor, *others: Tensor | None) -> tuple[list[int], dict[str, Any]]:
    """(strides in vectors, constants) of a launch on x and what is walked along with it."""
    each = [rows.strides(v) for v in (x, *others)]
    vec = math.gcd(16 // x.element_size(), rows.D, *itertools.chain(*each))
    far = max(rows.B * sample + rows.T * token for sample, token in each)
    wide = max(far, rows.B * rows.T * rows.D) >= 2**31 - triton.next_power_of_2(rows.D)
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    block = triton.next_power_of_2(rows.D)
    constants = {"ACC": acc, "BLOCK": block, "VEC": vec, "WIDE": wide}
    return [stride // vec for pair in each for stride in pair], constants


def _each_token(rows: _Rows, modulation: Tensor | None) -> bool:
    return modulation is not None and rows.T > 1 and modulation.numel() == math.prod(rows)


def _warps(kernel: Any, elements: int, acc: tl.dtype, norm: bool) -> int:
    """Of 32 threads, with 32 elements of a tile each, backward 8, and a quarter in float64. At most
    8 where a norm goes backward: what threads need besides their elements is then spent fewer
    times, and the longest rows just fit."""
    each = 32 if kernel is _forward_kernel else 8
    most = 8 if kernel is _backward_kernel and norm else 16
    each //= 4 if acc == tl.float64 else 1
    return min(max(elements // (32 * each), 1), most)


def _forward_tile(rows: _Rows) -> int:
    """Rows of a program: 4096 elements, fewer where the grid would have too few programs."""
    tile = max(4096 // triton.next_power_of_2(rows.D), 1)
    tile = min(tile, triton.next_power_of_2(max(rows.T, 1)))
    while tile > 1 and rows.B * triton.cdiv(rows.T, tile) < PROGRAMS:
        tile //= 2
    return tile


def _up_to(most: int, fallback: Callable[..., Any]) -> Callable[..., Any]:
    """Leave rows that no program can hold to the reference."""

    def decorate(launch: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            x = args[1] if args[0] is None else args[0]
            limit = most // (8 if x.dtype == torch.float64 else 4)
            if x.shape[-1] <= limit:
                return launch(*args)
            warnings.warn(
                f"{launch.__name__}: rows of {x.shape[-1]} elements run in plain torch; the kernel "
                f"takes up to {limit}",
                stacklevel=2,
            )
            return fallback(*args)

        return call

    return decorate


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
    strides, constants = _common(rows, x, y, gate, shift, scale)
    tile = _forward_tile(rows)
    tiles = triton.cdiv(rows.T, tile)
    each = _each_token(rows, gate if eps is None else scale)
    if x.numel():
        with on_device(x):
            _forward_kernel[(rows.B * tiles,)](
                *(x, y, gate, shift, scale, residual, normed, mean, rstd),
                *(rows.T, rows.D // constants["VEC"], tiles, *strides),
                *(eps or 0.0, rms, each),
                ROWS=tile,
                num_warps=_warps(
                    _forward_kernel, tile * constants["BLOCK"], constants["ACC"], eps is not None
                ),
                **constants,
            )
    return residual, normed, mean, rstd


@_up_to(FORWARD, reference._rms_norm)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    _, y, _, rstd = _forward(_rows(x, True), x, None, None, None, weight, eps, True)
    return y, rstd


@_up_to(FORWARD, reference._ada_layer_norm)
def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _forward(_rows(x), x, None, None, shift, scale, eps)[1:]


@_up_to(FORWARD, reference._gated_residual)
def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return _forward(_rows(x), x, y, gate, None, None, None)[0]


@_up_to(FORWARD, reference._gated_residual_ada_layer_norm)
def gated_residual_ada_layer_norm(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _forward(_rows(x), x, *rest)


def _backward_blocks(rows: _Rows, each: bool, sums: int) -> tuple[int, int]:
    """(rows of a tile, tiles of a block); `sums` is bytes of x times sums, per element. A
    block has at least four rows, for its sums to be few beside them; not so where sums fill the
    registers."""
    block, T = triton.next_power_of_2(rows.D), max(rows.T, 1)
    tile = min(max(1024 // block, 1), triton.next_power_of_2(T), 32)
    if each or block * sums > 40960:
        return tile, 1
    length = max(triton.cdiv(rows.B * rows.T, PROGRAMS), 4, tile)
    return tile, triton.next_power_of_2(triton.cdiv(min(length, T), tile))


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
    strides, constants = _common(rows, given, dr, dn, x, y, gate, scale)
    each = _each_token(rows, gate if scale is None else scale)
    wanted = [v for v in sums if v is not None]
    tile, tiles = _backward_blocks(rows, each, given.element_size() * len(wanted))
    blocks = triton.cdiv(rows.T, tile * tiles)
    targets = sums
    if wanted and not each:
        dtype = torch.promote_types(given.dtype, torch.float32)
        shape = len(wanted), rows.B, blocks, rows.D
        partial = torch.empty(shape, dtype=dtype, device=given.device)
        parts = iter(partial)
        targets = [None if v is None else next(parts) for v in sums]
    with on_device(given):
        if given.numel():
            _backward_kernel[(rows.B * blocks,)](
                *(dr, dn, x, y, gate, scale, mean, rstd, dx, dy, *targets),
                *(rows.T, rows.D // constants["VEC"], blocks, *strides[2:]),
                *(rms, each),
                ROWS=tile,
                TILES=tiles,
                num_warps=_warps(
                    _backward_kernel, tile * constants["BLOCK"], constants["ACC"], dn is not None
                ),
                **constants,
            )
        if wanted and not each and rows.B:
            grid = triton.cdiv(rows.D, COLUMNS), rows.B, len(wanted)
            outputs = wanted + [None] * (3 - len(wanted))
            height = min(triton.next_power_of_2(max(blocks, 1)), 128)
            _add_blocks_kernel[grid](
                partial, *outputs, blocks, rows.D, rows.B, constants["ACC"], height, COLUMNS
            )
    return [dx, dy, *sums]


@_up_to(BACKWARD, reference._rms_norm_backward)
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dx, *_, dweight = _backward(_rows(x, True), None, dy, x, None, None, weight, None, rstd)
    return dx, x.new_empty(0) if dweight is None else dweight


@_up_to(BACKWARD, reference._ada_layer_norm_backward)
def ada_layer_norm_backward(dy: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    dx, _, _, dshift, dscale = _backward(_rows(x), None, dy, x, None, None, *rest)
    return dx, dshift, dscale


@_up_to(BACKWARD, reference._gated_residual_backward)
def gated_residual_backward(dr: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    _, dy, dgate, _, _ = _backward(_rows(y), dr, None, None, y, gate, None)
    return dy, dgate


@_up_to(BACKWARD, reference._gated_residual_ada_layer_norm_backward)
def gated_residual_ada_layer_norm_backward(
    dr: Tensor | None, dn: Tensor, *rest: Tensor
) -> tuple[Tensor, ...]:
    return tuple(_backward(_rows(dn), dr, dn, *rest))


# --- What is launched -----------------------------------------------------------------------------


def _specialisation(
    name: str, kernel: Any, tensors: str, dtype: str, modulation: str, **constants: Any
) -> Specialisation:
    """A launch with these tensors."""
    acc = "fp64" if dtype == "fp64" else "fp32"
    kinds = {f"{t}_ptr": "*" for t in tensors.split()}
    own = ("gate_ptr", "shift_ptr", "scale_ptr", "dgate_ptr", "dshift_ptr", "dscale_ptr")
    kinds |= {k: f"*{modulation}" for k in own if k in kinds}
    if not constants["EACH"]:
        kinds |= {k: f"*{acc}" for k in own[3:] if k in kinds}
    kinds |= {k: f"*{acc}" for k in ("mean_ptr", "rstd_ptr") if k in kinds}
    integers = [a for a in kernel.arg_names if a.islower() and a[-2:] in ("_b", "_t")]
    kinds |= dict.fromkeys([*integers, "T", "DV", "tiles", "blocks"], "i32")
    vec = {"fp32": 4, "fp64": 2}.get(dtype, 8)
    constants |= {"ACC": tl.float64 if acc == "fp64" else tl.float32, "VEC": vec, "WIDE": False}
    elements = constants["ROWS"] * constants["BLOCK"]
    warps = _warps(kernel, elements, constants["ACC"], "rstd" in tensors)
    return Specialisation(name, kernel, dtype, kinds, constants, warps, load_bits=128)


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
    for op, D, (dtype, modulation) in itertools.product(forward, (72, 1152, 8192, 16384), dtypes):
        width = {"fp32": 4, "fp64": 8}.get(dtype, 2)
        for EACH in [False, True] if D == 1152 and op != "rms_norm" else [False]:
            rows, block = _Rows(32, 1024, D), triton.next_power_of_2(D)
            name = f"{D}{' each token' if EACH else ''}"
            name += f" {modulation} modulation" if modulation != dtype else ""
            constants = {"RMS": op == "rms_norm", "EACH": EACH, "BLOCK": block}
            if D * max(width, 4) <= FORWARD:
                tile = _forward_tile(rows)
                yield _specialisation(
                    *(f"{op} {name}", _forward_kernel, forward[op], dtype, modulation),
                    **constants | {"EPS": 1e-6, "ROWS": tile},
                )
            if D * max(width, 4) <= BACKWARD:
                wanted = len({"dgate", "dshift", "dscale"} & set(backward[op].split()))
                tile, tiles = _backward_blocks(rows, EACH, width * wanted)
                yield _specialisation(
                    *(f"{op}_backward {name}", _backward_kernel, backward[op], dtype, modulation),
                    **constants | {"ROWS": tile, "TILES": tiles},
                )
    for dtype, rows in itertools.product(("bf16", "fp16", "fp32", "fp64"), (32, 128)):
        acc = "fp64" if dtype == "fp64" else "fp32"
        outputs = dict.fromkeys(("first_ptr", "second_ptr", "third_ptr"), "*")
        kinds = outputs | {"sums_ptr": f"*{acc}"} | dict.fromkeys(("blocks", "D", "B"), "i32")
        constants = {"ACC": getattr(tl, acc.replace("fp", "float")), "ROWS": rows}
        name = f"norms add {rows} blocks"
        constants |= {"COLUMNS": COLUMNS}
        yield Specialisation(name, _add_blocks_kernel, dtype, kinds, constants)
