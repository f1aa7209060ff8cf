"""Activations of feed-forward layers: see `dfm_fast.ops.activations` for what is computed.

Element-wise kernels count vectors of the output, row after row, so that no lane is idle whatever D
is and one row fills as much of the GPU as it can. The backward of gelu_tanh with a bias has blocks
of rows instead: each leaves its partial sum of dbias, and a second kernel adds those in order. So
does the sum of rows that is the gradient of a linear layer's bias.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_fast.kernels._aot import Specialisation
from dfm_fast.kernels.functions import exp_of_negative, sigmoid
from dfm_fast.kernels.launching import cdiv, on_device

BLOCK = 1024  # elements of a program
COLUMNS = 256  # of a program of the summing kernels
SUMMED = 128, 32  # partial sums and columns of a program that adds those, at a time
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "silu": 2}

# --- Kernels --------------------------------------------------------------------------------------


@triton.jit
def _normal(x, NARROW: tl.constexpr):
    """(cdf of the standard normal distribution, exp(-x^2 / 2)). In float32 as csrc/cpu/functions.h,
    where the coefficients are from: fewer instructions than erf, of which exp is needed anyway."""
    bell = tl.exp(-0.5 * x * x)
    if x.dtype == tl.float64:
        cdf = 0.5 + 0.5 * tl.math.erf(x * 0.70710678118654752440)
    else:
        z = tl.minimum(tl.abs(x), 15.0)
        p = z * 3.06563848e-3 + 3.32061425e-2
        p = p * z + 1.60538569e-1
        p = p * z + 4.06400055e-1
        p = p * z + 0.5
        q = z * 7.68367015e-3 + 8.32616761e-2
        q = q * z + 4.09668028e-1
        q = q * z + 1.10621703
        q = q * z + 1.61068475
        q = q * z + 1
        if NARROW:
            r = tl.rsqrt(q)
            tail = bell * p * (r * r)
        else:
            tail = bell * p / q
        cdf = tl.where(x > 0, 1 - tail, tail)
    return cdf, bell


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr, NARROW: tl.constexpr):
    """(g(x), g'(x)); NARROW: for results of 16 bits."""
    if ACTIVATION == 0:
        cdf, bell = _normal(x, NARROW)
        value = x * cdf
        slope = cdf + x * bell * 0.39894228040143267794  # 1 / sqrt(2 pi)
    else:
        if ACTIVATION == 1:  # sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
            square = x * x
            u = x * (1.59576912160573071176 + 0.07135481627260025 * square)
            u_slope = 1.59576912160573071176 + 0.21406444881780075 * square
        else:
            u = x
            u_slope = 1.0
        if NARROW:
            s = sigmoid(u, NARROW)
            both = s * (1 - s)
        else:  # neither sigmoid(u) nor 1 - sigmoid(u) cancels
            e = exp_of_negative(-tl.abs(u))
            large = 1 / (1 + e)
            small = e * large
            s = tl.where(u > 0, large, small)
            both = large * small
        value = x * s
        slope = s + x * both * u_slope
    return value, slope


@triton.jit
def _vectors(n, D, BLOCK: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr):
    """(row, column, mask) of this program's vectors; n in all, D in a row."""
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    vector = block * (BLOCK // VEC) + tl.arange(0, BLOCK // VEC)[:, None]
    # The mask is known to be alike within a vector: so loads are as wide.
    row = vector // D
    return row, vector - row * D, vector < n


@triton.jit
def _glu_kernel(
    x_ptr, dy_ptr, out_ptr, y_ptr, n, D, x_stride, dy_stride, ACTIVATION: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y of x = [a | b]; with dy: dx, and y where it is asked for. Sizes and strides in vectors of
    VEC."""
    row, column, mask = _vectors(n, D, BLOCK, VEC, WIDE)
    lane = tl.arange(0, VEC)[None, :]
    offs = (row * x_stride + column) * VEC + lane
    a = tl.load(x_ptr + offs, mask).to(ACC)
    b = tl.load(x_ptr + offs + D * VEC, mask).to(ACC)
    dtype = out_ptr.dtype.element_ty
    value, slope = _slope(b, ACTIVATION, dtype.primitive_bitwidth == 16)
    if dy_ptr is None:
        tl.store(out_ptr + (row * D + column) * VEC + lane, (a * value).to(dtype), mask)
    else:
        dy = tl.load(dy_ptr + (row * dy_stride + column) * VEC + lane, mask).to(ACC)
        to = out_ptr + (2 * row * D + column) * VEC + lane
        tl.store(to, (dy * value).to(dtype), mask)
        tl.store(to + D * VEC, (dy * a * slope).to(dtype), mask)
        if y_ptr is not None:
            tl.store(y_ptr + (row * D + column) * VEC + lane, (a * value).to(dtype), mask)


@triton.jit
def _gelu_tanh_kernel(
    x_ptr, bias_ptr, dy_ptr, out_ptr, y_ptr, n, D, x_stride, dy_stride, ACC: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y; with dy: dx, and y where it is asked for."""
    row, column, mask = _vectors(n, D, BLOCK, VEC, WIDE)
    lane = tl.arange(0, VEC)[None, :]
    x = tl.load(x_ptr + (row * x_stride + column) * VEC + lane, mask).to(ACC)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column * VEC + lane, mask).to(ACC)
    value, slope = _slope(x, 1, out_ptr.dtype.element_ty.primitive_bitwidth == 16)
    if dy_ptr is not None:
        dy = tl.load(dy_ptr + (row * dy_stride + column) * VEC + lane, mask).to(ACC)
        if y_ptr is not None:
            to = y_ptr + (row * D + column) * VEC + lane
            tl.store(to, value.to(out_ptr.dtype.element_ty), mask)
        value = dy * slope
    to = out_ptr + (row * D + column) * VEC + lane
    tl.store(to, value.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _sums_kernel(
    x_ptr, bias_ptr, dy_ptr, dx_ptr, y_ptr, partial_ptr, rows, D, x_stride, dy_stride,
    ACC: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dx of ROWS rows, GROUP at a time, their sum, and y where it is asked for; of no x, for which
    dx is dy, the sum alone."""
    first = tl.program_id(0) * ROWS
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = column < D * VEC
    total = tl.zeros((GROUP, COLUMNS), ACC)
    for start in range(0, ROWS, GROUP):
        row = first + start + tl.arange(0, GROUP)[:, None]
        mask = inside & (row < rows)
        if WIDE:
            row = row.to(tl.int64)
        dx = tl.load(dy_ptr + row * dy_stride * VEC + column, mask, other=0).to(ACC)
        if x_ptr is not None:
            dtype = dx_ptr.dtype.element_ty
            x = tl.load(x_ptr + row * x_stride * VEC + column, mask, other=0).to(ACC)
            if bias_ptr is not None:
                x += tl.load(bias_ptr + column, inside).to(ACC)
            value, slope = _slope(x, 1, dtype.primitive_bitwidth == 16)
            dx *= slope
            to = row * D * VEC + column
            tl.store(dx_ptr + to, dx.to(dtype), mask)
            if y_ptr is not None:
                tl.store(y_ptr + to, value.to(dtype), mask)
        total += dx
    to = partial_ptr + tl.program_id(0).to(tl.int64) * D * VEC + column
    tl.store(to, tl.sum(total, 0)[None, :], inside)


@triton.jit
def _sum_rows_kernel(
    partial_ptr, sum_ptr, rows, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """sum = the rows of partial [rows, D], always in one order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), partial_ptr.dtype.element_ty)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        offs = row.to(tl.int64) * D + column
        total += tl.load(partial_ptr + offs, (row < rows) & (column < D), other=0)
    out = tl.sum(total, 0)[None, :].to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + column, out, column < D)


# --- Launchers ------------------------------------------------------------------------------------


def _stride(x: Tensor) -> int:
    return x.shape[-1] if x.is_contiguous() else x.stride(-2)


def _acc(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _blocks(acc: tl.dtype, alone: bool = False) -> dict[str, int]:
    """Rows of a partial sum, and how many at a time: measured on an H200, see the performance log.
    (In a loop float64 spills.)"""
    rows, group = (4, 4) if acc == tl.float64 else (128, 8 if alone else 4)
    return {"ROWS": rows, "GROUP": group, "COLUMNS": COLUMNS}


def _sums(
    dy: Tensor,
    x: Tensor | None = None,
    bias: Tensor | None = None,
    dx: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """Of the rows of dx, which is written, and y too; of dy where there is no x."""
    D = dy.shape[-1]
    rows, out = dy.numel() // D if D else 0, dy.new_empty(D)
    if not rows:
        return out.zero_()
    given = [t for t in (dy, x) if t is not None]
    vec, acc = _vec(dy, D, *given[1:], *([] if bias is None else [bias])), _acc(dy)
    constants = _blocks(acc, x is None)
    blocks = cdiv(rows, constants["ROWS"])
    partial = dy.new_empty(blocks, D, dtype=torch.promote_types(dy.dtype, torch.float32))
    with on_device(dy):
        _sums_kernel[(blocks, cdiv(D, COLUMNS))](
            x, bias, dy, dx, y, partial, rows, D // vec, 0 if x is None else _stride(x) // vec,
            _stride(dy) // vec, **constants, ACC=acc, VEC=vec, WIDE=_wide(*given),
        )  # fmt: skip
        _sum_rows_kernel[(cdiv(D, SUMMED[1]),)](
            partial, out, blocks, D, ROWS=SUMMED[0], COLUMNS=SUMMED[1], num_warps=8
        )
    return out


def _vec(x: Tensor, D: int, *others: Tensor) -> int:
    """Elements of 16 bytes, or of the largest vector that rows and addresses allow."""
    size = x.element_size()
    starts = (t.data_ptr() // size for t in (x, *others))
    return math.gcd(16 // size, D, *(_stride(t) for t in (x, *others)), *starts)


def _wide(*tensors: Tensor) -> bool:
    """Whether an offset may pass 2^31."""
    return any(t.numel() // t.shape[-1] * _stride(t) >= 2**31 - 2 * BLOCK for t in tensors)


def _launch_glu(
    x: Tensor, dy: Tensor | None, out: Tensor, activation: str, y: Tensor | None = None
) -> Tensor:
    if out.numel() == 0:
        return out
    D, given = x.shape[-1] // 2, [x] if dy is None else [x, dy]
    vec = _vec(x, D, *given[1:])
    n = x.numel() // 2 // vec
    strides = _stride(x) // vec, 0 if dy is None else _stride(dy) // vec
    with on_device(x):
        _glu_kernel[(cdiv(n, BLOCK // vec),)](
            x, dy, out, y, n, D // vec, *strides, ACTIVATION=ACTIVATIONS[activation], ACC=_acc(x),
            BLOCK=BLOCK, VEC=vec, WIDE=_wide(*given, out),
        )  # fmt: skip
    return out


def glu(x: Tensor, activation: str) -> Tensor:
    return _launch_glu(x, None, x.new_empty((*x.shape[:-1], x.shape[-1] // 2)), activation)


def glu_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    return _launch_glu(x, dy, x.new_empty(x.shape), activation)


def glu_again(dy: Tensor, x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    return _launch_glu(x, dy, x.new_empty(x.shape), activation, y), y


def _launch_gelu_tanh(
    x: Tensor,
    bias: Tensor | None,
    dy: Tensor | None,
    y: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    out = x.new_empty(x.shape) if out is None else out
    if out.numel() == 0:
        return out
    given = [x] if dy is None else [x, dy]
    vec = _vec(x, x.shape[-1], *given[1:], *([] if bias is None else [bias]))
    n = x.numel() // vec
    strides = _stride(x) // vec, 0 if dy is None else _stride(dy) // vec
    with on_device(x):
        _gelu_tanh_kernel[(cdiv(n, BLOCK // vec),)](
            x, bias, dy, out, y, n, x.shape[-1] // vec, *strides, ACC=_acc(x), BLOCK=BLOCK, VEC=vec,
            WIDE=_wide(*given, out),
        )  # fmt: skip
    return out


def gelu_tanh(x: Tensor, bias: Tensor | None) -> Tensor:
    return _launch_gelu_tanh(x, None if bias is None else bias.contiguous(), None)


def gelu_tanh_again(dy: Tensor, x: Tensor, need_dbias: bool) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape)
    if need_dbias:
        return y, _sums(dy, x, None, dy, y)
    _launch_gelu_tanh(x, None, dy, y, dy)
    return y, x.new_empty(0)


def gelu_tanh_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    bias = None if bias is None else bias.contiguous()
    if not need_dbias:
        return _launch_gelu_tanh(x, bias, dy), x.new_empty(0)
    dx = x.new_empty(x.shape)
    return dx, _sums(dy, x, bias, dx)


def sum_of_rows(x: Tensor) -> Tensor:
    return _sums(x)


# --- Ahead of time --------------------------------------------------------------------------------

_SIZES = dict.fromkeys(("n", "rows", "D", "x_stride", "dy_stride"), "i32")


def specialisations() -> Iterator[Specialisation]:
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        acc = tl.float64 if dtype == "fp64" else tl.float32
        vec = {"fp32": 4, "fp64": 2}.get(dtype, 8)
        constants = {"ACC": acc, "BLOCK": BLOCK, "VEC": vec, "WIDE": False}
        x = {**_SIZES, "x_ptr": "*", "out_ptr": "*"}
        ways = ({}, ""), ({"dy_ptr": "*"}, "_backward"), ({"dy_ptr": "*", "y_ptr": "*"}, "_again")
        for (given, suffix), (name, index) in itertools.product(ways, ACTIVATIONS.items()):
            yield Specialisation(
                f"glu{suffix} {name}", _glu_kernel, dtype, x | given,
                constants | {"ACTIVATION": index}, load_bits=128,
            )  # fmt: skip
            if name == "gelu_tanh":
                bias = {} if "y_ptr" in given else {"bias_ptr": "*"}
                yield Specialisation(
                    f"gelu_tanh{suffix}", _gelu_tanh_kernel, dtype, x | given | bias, constants,
                    load_bits=128,
                )  # fmt: skip
        sums = {"partial_ptr": "*fp64" if dtype == "fp64" else "*fp32"}
        dx = dict.fromkeys(("x_ptr", "dx_ptr"), "*")
        for name, given in (
            ("gelu_tanh_backward dbias", {**dx, "bias_ptr": "*"}),
            ("gelu_tanh_again dbias", {**dx, "y_ptr": "*"}),
            ("sum_of_rows", {}),
        ):
            rows = {**_blocks(acc, not given), "ACC": acc, "VEC": vec}
            yield Specialisation(
                name, _sums_kernel, dtype, _SIZES | given | {"dy_ptr": "*"} | sums,
                rows | {"WIDE": False}, load_bits=128,
            )  # fmt: skip
        yield Specialisation(
            "sum_of_rows second", _sum_rows_kernel, dtype, _SIZES | sums | {"sum_ptr": "*"},
            {"ROWS": SUMMED[0], "COLUMNS": SUMMED[1]}, warps=8,
        )  # fmt: skip
