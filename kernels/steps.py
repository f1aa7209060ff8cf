"""Solver steps of all levels in one launch: see `dfm_fast.ops.steps` for what is computed.

A program has a block of one level; a launch takes four levels, more take another. dt, guidance and
mask are read from tables on the device, at the row that `step` says: nothing is synchronised, and a
captured launch replays with the next row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_fast.kernels._aot import Specialisation
from dfm_fast.kernels.launching import cdiv, on_device
from dfm_fast.ops._layouts import empty_in, memory_format

BLOCK = 1024
LEVELS = 4  # a launch


@triton.jit
def _level(
    x_ptr, p_ptr, c_ptr, u_ptr, y_ptr, n, column, block, dt_ptr, w_ptr, scale, mask_ptr, step_ptr,
    L, ACC: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Block `block` of one level, n vectors of VEC."""
    entry = column
    if step_ptr is not None:
        entry += tl.load(step_ptr).to(tl.int32) * L
    if WIDE:
        block = block.to(tl.int64)
    vector = block * (BLOCK // VEC) + tl.arange(0, BLOCK // VEC)[:, None]
    mask = vector < n  # known to be alike within a vector: so loads are as wide
    offs = vector * VEC + tl.arange(0, VEC)[None, :]
    x = tl.load(x_ptr + offs, mask).to(ACC)
    v = tl.load(c_ptr + offs, mask).to(ACC)
    if u_ptr is not None:
        w = scale
        if w_ptr is not None:
            w = tl.load(w_ptr + entry).to(ACC)
        u = tl.load(u_ptr + offs, mask).to(ACC)
        v = u + w * (v - u)
    change = tl.load(dt_ptr + entry).to(ACC) * v
    if p_ptr is not None:
        y = (x + tl.load(p_ptr + offs, mask).to(ACC) + change) * 0.5
    else:
        y = x + change
    if mask_ptr is not None:
        y = tl.where(tl.load(mask_ptr + column) != 0, y, x)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _step_kernel(
    x0_ptr, p0_ptr, c0_ptr, u0_ptr, y0_ptr, n0, column0,
    x1_ptr, p1_ptr, c1_ptr, u1_ptr, y1_ptr, n1, column1,
    x2_ptr, p2_ptr, c2_ptr, u2_ptr, y2_ptr, n2, column2,
    x3_ptr, p3_ptr, c3_ptr, u3_ptr, y3_ptr, n3, column3,
    end0, end1, end2, dt_ptr, w_ptr, scale, mask_ptr, step_ptr, L,
    ACC: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if block < end0:
        _level(x0_ptr, p0_ptr, c0_ptr, u0_ptr, y0_ptr, n0, column0, block, dt_ptr, w_ptr, scale,
               mask_ptr, step_ptr, L, ACC, BLOCK, VEC, WIDE)  # fmt: skip
    elif block < end1:
        if x1_ptr is not None:
            _level(x1_ptr, p1_ptr, c1_ptr, u1_ptr, y1_ptr, n1, column1, block - end0, dt_ptr,
                   w_ptr, scale, mask_ptr, step_ptr, L, ACC, BLOCK, VEC, WIDE)  # fmt: skip
    elif block < end2:
        if x2_ptr is not None:
            _level(x2_ptr, p2_ptr, c2_ptr, u2_ptr, y2_ptr, n2, column2, block - end1, dt_ptr,
                   w_ptr, scale, mask_ptr, step_ptr, L, ACC, BLOCK, VEC, WIDE)  # fmt: skip
    else:
        if x3_ptr is not None:
            _level(x3_ptr, p3_ptr, c3_ptr, u3_ptr, y3_ptr, n3, column3, block - end2, dt_ptr,
                   w_ptr, scale, mask_ptr, step_ptr, L, ACC, BLOCK, VEC, WIDE)  # fmt: skip


def _launch(
    x: Sequence[Tensor],
    predicted: Sequence[Tensor],
    v_cond: Sequence[Tensor],
    v_uncond: Sequence[Tensor],
    dt: Tensor,
    cfg_scale: Tensor | None,
    scale: float,
    mask: Tensor | None,
    step: Tensor | None,
    columns: Sequence[int],
) -> list[Tensor]:
    double = len(x) > 0 and x[0].dtype == torch.float64
    if double and cfg_scale is None:  # a Python number reaches the kernel in float32
        cfg_scale = torch.full_like(dt, scale, dtype=torch.float64)
    out = [empty_in(memory_format(v), v, v.shape) for v in x]
    vec = math.gcd(16 // x[0].element_size(), *(v.numel() for v in x)) if x else 1
    for first in range(0, len(x), LEVELS):
        part = range(first, min(first + LEVELS, len(x)))
        arguments: list[Any] = []
        ends, blocks = [], 0
        for s in part:
            p = predicted[s] if predicted else None
            u = v_uncond[s] if v_uncond else None
            arguments += [x[s], p, v_cond[s], u, out[s], x[s].numel() // vec, columns[s]]
            blocks += cdiv(x[s].numel(), BLOCK)
            ends.append(blocks)
        if blocks == 0:
            continue
        missing = LEVELS - len(part)
        arguments += [None, None, None, None, None, 0, 0] * missing
        ends += [blocks] * missing
        wide = any(x[s].numel() >= 2**31 - BLOCK for s in part)
        acc = tl.float64 if double else tl.float32
        constants = {"ACC": acc, "BLOCK": BLOCK, "VEC": vec, "WIDE": wide}
        with on_device(x[0]):
            _step_kernel[(blocks,)](
                *arguments, *ends[:3], dt, cfg_scale, scale, mask, step, dt.shape[1], **constants
            )
    return out


def cfg_euler_step(x: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return _launch(x, [], *rest)


def heun_step(x: Sequence[Tensor], predicted: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return _launch(x, predicted, *rest)


def specialisations() -> Iterator[Specialisation]:
    integers = ("end0", "end1", "end2", "L")
    for heun, guided, dtype in itertools.product(
        (False, True), (False, True), ("bf16", "fp16", "fp32", "fp64")
    ):
        table = "*fp64" if dtype == "fp64" else "*fp32"
        arguments = dict.fromkeys(integers, "i32") | {"dt_ptr": table, "step_ptr": "*i64"}
        for s in range(2):
            names = ["x", "c", "y", *(["p"] if heun else []), *(["u"] if guided else [])]
            arguments |= {f"{name}{s}_ptr": "*" for name in names}
        arguments |= {f"{name}{s}": "i32" for name in ("n", "column") for s in range(LEVELS)}
        arguments |= {"w_ptr": table} if guided else {}
        arguments |= {"scale": "fp32"}
        acc = tl.float64 if dtype == "fp64" else tl.float32
        vec = {"fp32": 4, "fp64": 2}.get(dtype, 8)
        constants = {"ACC": acc, "BLOCK": BLOCK, "VEC": vec, "WIDE": False}
        name = f"{'heun' if heun else 'cfg_euler'}_step{' guided' if guided else ''}"
        yield Specialisation(name, _step_kernel, dtype, arguments, constants, load_bits=128)
