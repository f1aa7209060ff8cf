"""Row-wise norms, their modulation and their residuals: see `dfm_fast.ops.norms`.

Forward, a program has a tile of rows of one sample, each whole: statistics and output come from one
read. Backward, a program walks over a block of rows of one sample and keeps the sums that its
modulation gets in registers; a second kernel adds those of all blocks, in order. All sizes of
blocks follow from shapes, not from the device. Rows of more than 16384 elements are left to the
reference: no model that we know has them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from dfm_fast.kernels._aot import Specialisation
from dfm_fast.kernels.resample import on_device
from torch import Tensor

from dfm_fast.ops import norms as reference

MAX_ROW = 16384
PROGRAMS = 1056  # eight for each of an H200's multiprocessors: what a grid should have
COLUMNS = 32  # of a program that adds blocks


@triton.jit
def _tile(ptr, b, t, stride_b, stride_t, offs_d, mask, VEC: tl.constexpr, ACC: tl.constexpr):
    """Rows t [R, 1] of sample b, all of their elements [1, D]. Strides count vectors."""
    return tl.load(ptr + (b * stride_b + t * stride_t) * VEC + offs_d, mask, other=0.0).to(ACC)


@triton.jit
def _centre(x, mean, mask, D):
    """x - mean, without the mean that rounding `mean` left in it; 0 outside the mask."""
    centred = tl.where(mask, x - mean, 0.0)
    rest = tl.sum(centred, 1, keep_dims=True) / D
    return tl.where(mask, centred - rest, 0.0)


@triton.jit
def _rsqrt(x):
    """Correctly rounded steps: there is one a row."""
    if x.dtype == tl.float64:
        return 1 / tl.sqrt(x)
    else:
        return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def _forward_kernel(
    x_ptr,  # [B, T, D], rows strided
    y_ptr,  # like x, or None: no residual
    gate_ptr,  # [B, D] or [B, T, D], rows strided
    shift_ptr,
    scale_ptr,  # rms_norm: weight [D], or None
    residual_ptr,  # [B, T, D]
    out_ptr,  # [B, T, D], or None: no norm
    mean_ptr,  # [B, T], or None: rms_norm
    rstd_ptr,  # [B, T]
    T, DV, tiles,
    x_b, x_t, y_b, y_t, gate_b, gate_t, shift_b, shift_t, scale_b, scale_t,
    EPS: tl.constexpr, RMS: tl.constexpr, EACH: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """EACH: every token has its own modulation. D = DV VEC."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    b, first = pid // tiles, pid % tiles * ROWS
    D = DV * VEC
    t, offs_d = first + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask_d, mask_t = offs_d < D, t < T
    mask = mask_d & mask_t
    # One row for all tokens is loaded once, and broadcast.
    m_t, m_mask = (t, mask) if EACH else (tl.zeros([1, 1], tl.int32), mask_d)
    row = b * T + t
    to = row * DV * VEC + offs_d
    x = _tile(x_ptr, b, t, x_b, x_t, offs_d, mask, VEC, ACC)
    if y_ptr is not None:
        y = _tile(y_ptr, b, t, y_b, y_t, offs_d, mask, VEC, ACC)
        gate = _tile(gate_ptr, b, m_t, gate_b, gate_t, offs_d, m_mask, VEC, ACC)
        rounded = (x + gate * y).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + to, rounded, mask)
        x = rounded.to(ACC)  # the norm is of the rounded residual
    if out_ptr is not None:
        if not RMS:
            mean = tl.sum(x, 1, keep_dims=True) / D
            tl.store(mean_ptr + row, mean, mask_t)
            x = _centre(x, mean, mask, D)
        rstd = _rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + EPS)
        tl.store(rstd_ptr + row, rstd, mask_t)
        out = x * rstd
        if scale_ptr is not None:
            scale = _tile(scale_ptr, b, m_t, scale_b, scale_t, offs_d, m_mask, VEC, ACC)
            out *= scale if RMS else 1 + scale
        if shift_ptr is not None:
            out += _tile(shift_ptr, b, m_t, shift_b, shift_t, offs_d, m_mask, VEC, ACC)
        tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _gradients(
    t, b, mask, mask_t, m_t, m_mask, offs_d, dr_ptr, dn_ptr, x_ptr, gate_ptr, scale_ptr, mean_ptr,
    rstd_ptr, T, D, dr_b, dr_t, dn_b, dn_t, x_b, x_t, scale_b, scale_t,
    RMS: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(gradient of the residual or of x, of the norm's output, normalised x) of a tile."""
    if dn_ptr is None:
        dr = _tile(dr_ptr, b, t, dr_b, dr_t, offs_d, mask, VEC, ACC)
        return dr, dr, dr
    else:
        dn = _tile(dn_ptr, b, t, dn_b, dn_t, offs_d, mask, VEC, ACC)
        x = _tile(x_ptr, b, t, x_b, x_t, offs_d, mask, VEC, ACC)
        rstd = tl.load(rstd_ptr + b * T + t, mask_t, other=0.0)
        if not RMS:
            x = _centre(x, tl.load(mean_ptr + b * T + t, mask_t, other=0.0), mask, D)
        xhat = x * rstd
        g = dn
        if scale_ptr is not None:
            scale = _tile(scale_ptr, b, m_t, scale_b, scale_t, offs_d, m_mask, VEC, ACC)
            g = dn * scale if RMS else dn * (1 + scale)
        dr = g - xhat * (tl.sum(g * xhat, 1, keep_dims=True) / D)
        if not RMS:
            dr -= tl.sum(g, 1, keep_dims=True) / D
        dr *= rstd
        if dr_ptr is not None:
            dr += _tile(dr_ptr, b, t, dr_b, dr_t, offs_d, mask, VEC, ACC)
        return dr, dn, xhat


@triton.jit
def _put(ptr, value, sums, to, mask, EACH: tl.constexpr):
    """A gradient of the modulation: stored where every token has its own, else added up."""
    if EACH:
        tl.store(ptr + to, value.to(ptr.dtype.element_ty), mask)
        return sums
    else:
        return sums + tl.sum(value, 0, keep_dims=True)


@triton.jit
def _backward_kernel(
    dr_ptr,  # [B, T, D], rows strided, or None: the residual has no gradient of its own
    dn_ptr,  # likewise; None: no norm
    x_ptr,
    y_ptr,  # None: no residual
    gate_ptr,  # [B, D] or [B, T, D], rows strided
    scale_ptr,
    mean_ptr,  # [B, T]
    rstd_ptr,
    dx_ptr,  # [B, T, D]
    dy_ptr,
    dgate_ptr,  # EACH: [B, T, D]; else sums of blocks of rows [B, blocks, D]; None: not asked for
    dshift_ptr,
    dscale_ptr,
    T, DV, blocks,
    dr_b, dr_t, dn_b, dn_t, x_b, x_t, y_b, y_t, gate_b, gate_t, scale_b, scale_t,
    RMS: tl.constexpr, EACH: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Block of TILES tiles of ROWS rows of one sample."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    b, first = pid // blocks, pid % blocks * (ROWS * TILES)
    D = DV * VEC
    offs_d = tl.arange(0, BLOCK)[None, :]
    mask_d = offs_d < D
    dgate = tl.zeros([1, BLOCK], ACC)
    dshift, dscale = dgate, dgate
    for i in range(TILES):
        t = first + i * ROWS + tl.arange(0, ROWS)[:, None]
        mask_t = t < T
        mask = mask_d & mask_t
        m_t, m_mask = (t, mask) if EACH else (tl.zeros([1, 1], tl.int32), mask_d)
        to = (b * T + t) * DV * VEC + offs_d
        dr, dn, xhat = _gradients(
            t, b, mask, mask_t, m_t, m_mask, offs_d, dr_ptr, dn_ptr, x_ptr, gate_ptr, scale_ptr,
            mean_ptr, rstd_ptr, T, D, dr_b, dr_t, dn_b, dn_t, x_b, x_t, scale_b, scale_t,
            RMS, VEC, ACC,
        )  # fmt: skip
        if dx_ptr is not None:
            tl.store(dx_ptr + to, dr.to(dx_ptr.dtype.element_ty), mask)
        if dshift_ptr is not None:
            dshift = _put(dshift_ptr, dn, dshift, to, mask, EACH)
        if dscale_ptr is not None:
            dscale = _put(dscale_ptr, dn * xhat, dscale, to, mask, EACH)
        if y_ptr is not None:
            gate = _tile(gate_ptr, b, m_t, gate_b, gate_t, offs_d, m_mask, VEC, ACC)
            tl.store(dy_ptr + to, (gate * dr).to(dy_ptr.dtype.element_ty), mask)
            y = _tile(y_ptr, b, t, y_b, y_t, offs_d, mask, VEC, ACC)
            dgate = _put(dgate_ptr, dr * y, dgate, to, mask, EACH)
    if not EACH:
        at = pid * DV * VEC + offs_d
        if dgate_ptr is not None:
            tl.store(dgate_ptr + at, dgate, mask_d)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + at, dshift, mask_d)
        if dscale_ptr is not None:
            tl.store(dscale_ptr + at, dscale, mask_d)


@triton.jit
def _add_blocks_kernel(
    sums_ptr,  # [K, B, blocks, D]
    first_ptr,  # [B, D] each; None after the K-th
    second_ptr,
    third_ptr,
    blocks, D, B,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    b, k = tl.program_id(1), tl.program_id(2)
    offs_d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = offs_d < D
    row = (k * B + b).to(tl.int64) * blocks
    total = tl.zeros([COLUMNS], ACC)
    for i in range(0, blocks, ROWS):
        block = i + tl.arange(0, ROWS)[:, None]
        offs = (row + block) * D + offs_d[None, :]
        total += tl.sum(tl.load(sums_ptr + offs, (block < blocks) & mask[None, :], other=0.0), 0)
    offs = b.to(tl.int64) * D + offs_d
    if k == 0:
        tl.store(first_ptr + offs, total.to(first_ptr.dtype.element_ty), mask)
    elif k == 1:
        if second_ptr is not None:
            tl.store(second_ptr + offs, total.to(second_ptr.dtype.element_ty), mask)
    else:
        if third_ptr is not None:
            tl.store(third_ptr + offs, total.to(third_ptr.dtype.element_ty), mask)


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


def _warps(elements: int, most: int) -> int:
    """Of 32 threads, with about `most` elements a thread."""
    return min(max(elements // (32 * most), 1), 16)


def _forward_tile(rows: _Rows) -> int:
    """Rows of a program: 4096 elements, fewer where the grid would have too few programs."""
    tile = max(4096 // triton.next_power_of_2(rows.D), 1)
    tile = min(tile, triton.next_power_of_2(rows.T))
    while tile > 1 and rows.B * triton.cdiv(rows.T, tile) < PROGRAMS:
        tile //= 2
    return tile


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
                num_warps=_warps(tile * constants["BLOCK"], 32),
                **constants,
            )
    return residual, normed, mean, rstd


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    if x.shape[-1] > MAX_ROW:
        return reference._rms_norm(x, weight, eps)
    _, y, _, rstd = _forward(_rows(x, True), x, None, None, None, weight, eps, True)
    return y, rstd


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    if x.shape[-1] > MAX_ROW:
        return reference._ada_layer_norm(x, shift, scale, eps)
    return _forward(_rows(x), x, None, None, shift, scale, eps)[1:]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    if x.shape[-1] > MAX_ROW:
        return reference._gated_residual(x, y, gate)
    return _forward(_rows(x), x, y, gate, None, None, None)[0]


def gated_residual_ada_layer_norm(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if x.shape[-1] > MAX_ROW:
        return reference._gated_residual_ada_layer_norm(x, *rest)
    return _forward(_rows(x), x, *rest)


def _backward_blocks(rows: _Rows, each: bool) -> tuple[int, int]:
    """(rows of a tile, tiles of a block). A block has at least four rows, for its sums to be few
    beside them; not so where the sums of whole rows fill the registers."""
    block = triton.next_power_of_2(rows.D)
    tile = min(max(1024 // block, 1), triton.next_power_of_2(rows.T))
    if each or block > 8192:
        return tile, 1
    length = max(triton.cdiv(rows.B * rows.T, PROGRAMS), 4, tile)
    return tile, triton.next_power_of_2(triton.cdiv(min(length, rows.T), tile))


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
    tile, tiles = _backward_blocks(rows, each)
    blocks = triton.cdiv(rows.T, tile * tiles)
    wanted = [v for v in sums if v is not None]
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
                num_warps=_warps(tile * constants["BLOCK"], 16),
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


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    if x.shape[-1] > MAX_ROW:
        return reference._rms_norm_backward(dy, x, weight, rstd)
    dx, *_, dweight = _backward(_rows(x, True), None, dy, x, None, None, weight, None, rstd)
    return dx, x.new_empty(0) if dweight is None else dweight


def ada_layer_norm_backward(dy: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    if x.shape[-1] > MAX_ROW:
        return reference._ada_layer_norm_backward(dy, x, *rest)
    dx, _, _, dshift, dscale = _backward(_rows(x), None, dy, x, None, None, *rest)
    return dx, dshift, dscale


def gated_residual_backward(dr: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    if y.shape[-1] > MAX_ROW:
        return reference._gated_residual_backward(dr, y, gate)
    _, dy, dgate, _, _ = _backward(_rows(y), dr, None, None, y, gate, None)
    return dy, dgate


def gated_residual_ada_layer_norm_backward(
    dr: Tensor | None, dn: Tensor, *rest: Tensor
) -> tuple[Tensor, ...]:
    if dn.shape[-1] > MAX_ROW:
        return reference._gated_residual_ada_layer_norm_backward(dr, dn, *rest)
    return tuple(_backward(_rows(dn), dr, dn, *rest))


# --- What is launched -----------------------------------------------------------------------------


def _specialisation(
    name: str, kernel: Any, tensors: str, dtype: str, modulation: str, elements: int, **constants
) -> Specialisation:
    """A launch with these tensors, on rows whose tiles have `elements` elements."""
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
    warps = _warps(elements, 32 if kernel is _forward_kernel else 16)
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
    for op, width, (dtype, modulation) in itertools.product(forward, (72, 1152, 16384), dtypes):
        each = [False, True] if width == 1152 and op != "rms_norm" else [False]
        rows = _Rows(32, 1024, width)
        block, rms = triton.next_power_of_2(width), op == "rms_norm"
        for EACH in each:
            name = f"{width}{' each token' if EACH else ''}"
            name += f" {modulation} modulation" if modulation != dtype else ""
            constants = {"RMS": rms, "EACH": EACH, "BLOCK": block}
            tile = _forward_tile(rows)
            yield _specialisation(
                *(f"{op} {name}", _forward_kernel, forward[op], dtype, modulation, tile * block),
                **constants | {"EPS": 1e-6, "ROWS": tile},
            )
            tile, tiles = _backward_blocks(rows, EACH)
            yield _specialisation(
                *(f"{op}_backward {name}", _backward_kernel, backward[op]),
                *(dtype, modulation, tile * block),
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
