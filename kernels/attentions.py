"""Multi-query attention on a GPU: see `dfm_fast.ops.attentions` for what is computed.

The default is the best fused backend of torch's SDPA (`dfm_fast.ops._sdpa`). The kernel here is for
short KV, a text's keys: a program has a head's keys and values on chip, all of them, and goes
through blocks of its queries; with more keys than one block holds it goes through those for each
block of queries. It serves where MEASURED says that it wins, which nobody has measured yet: the
table is empty. DFM_FAST_ATTENTION=triton takes it wherever it can be, =sdpa nowhere.

Rows are the queries of all heads of a key head: row = token * group + head. Softmax is to base 2
and goes on from block to block (Milakov and Gimelshein 2018); products are of the inputs' dtype,
sums and softmax in float32. Backward is SDPA's.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_fast._library import INTERPRET
from dfm_fast.kernels._aot import Specialisation
from dfm_fast.kernels.launching import cdiv, next_power_of_2, on_device
from dfm_fast.kernels.products import ARCHITECTURES, architecture
from dfm_fast.ops import _sdpa, attentions

SHORT = 320  # keys: more are SDPA's ground
# (major, minor) of a GPU -> the most keys for which the kernel here beat every backend of SDPA
# (benchmarks/bench_attentions.py: "triton"). Empty: not measured.
MEASURED: dict[tuple[int, int], int] = {}
PROGRAMS = 1 if INTERPRET else 264  # at least, where there are blocks enough
DTYPES = (torch.float16, torch.bfloat16)  # exact products of float32 are none of the tensor cores'


@triton.jit
def _rows(ptr, offs, mask, D: tl.constexpr, D_PAD: tl.constexpr):
    """[M, D_PAD] of rows at offs [M]; 0 where there is none."""
    i = tl.arange(0, D_PAD)[None, :]
    mask = mask[:, None] if D == D_PAD else mask[:, None] & (i < D)
    return tl.load(ptr + offs[:, None] + i, mask, other=0.0)


@triton.jit
def _keys(
    k_ptr, v_ptr, mask_ptr, first, S, k_s, v_s, D: tl.constexpr, D_PAD: tl.constexpr,
    KEYS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A block of keys [KEYS, D_PAD], their values, and which of them count."""
    s = first + tl.arange(0, KEYS)
    there = s < S
    k = _rows(k_ptr, s * k_s * VEC, there, D, D_PAD)
    v = _rows(v_ptr, s * v_s * VEC, there, D, D_PAD)
    if mask_ptr is not None:
        there = there & (tl.load(mask_ptr + s, there, other=0) != 0)
    return k, v, there


@triton.jit
def _attend(q, k, v, there, most, sum, y, scale):
    """The running softmax of q's rows with a block of keys more."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    s = tl.where(there[None, :], s, float("-inf"))
    now = tl.maximum(most, tl.max(s, axis=1))
    from_0 = tl.where(now == float("-inf"), 0.0, now)  # no key so far
    p = tl.exp2(s - from_0[:, None])
    before = tl.exp2(most - from_0)
    sum = sum * before + tl.sum(p, axis=1)
    y = y * before[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return now, sum, y


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, y_ptr, lse_ptr, scale, T, S, kv_heads, blocks,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, RESIDENT: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    if WIDE:
        pair = pair.to(tl.int64)
    b, g = pair // kv_heads, pair % kv_heads
    q_ptr += (b * q_b + g * GROUP * q_h) * VEC
    k_ptr += (b * k_b + g * k_h) * VEC
    v_ptr += (b * v_b + g * v_h) * VEC
    if mask_ptr is not None:
        mask_ptr += b * S
    if RESIDENT:
        k, v, there = _keys(k_ptr, v_ptr, mask_ptr, 0, S, k_s, v_s, D, D_PAD, KEYS, VEC)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        if WIDE:
            row = row.to(tl.int64)
        t, h = row // GROUP, row % GROUP
        q = _rows(q_ptr, (t * q_t + h * q_h) * VEC, t < T, D, D_PAD)
        most = tl.full((ROWS,), float("-inf"), tl.float32)
        sum = tl.zeros((ROWS,), tl.float32)
        y = tl.zeros((ROWS, D_PAD), tl.float32)
        if RESIDENT:
            most, sum, y = _attend(q, k, v, there, most, sum, y, scale)
        else:
            for first in range(0, S, KEYS):
                k, v, there = _keys(k_ptr, v_ptr, mask_ptr, first, S, k_s, v_s, D, D_PAD, KEYS, VEC)
                most, sum, y = _attend(q, k, v, there, most, sum, y, scale)
        y = y / tl.where(sum == 0.0, 1.0, sum)[:, None]
        out = (b * T + t) * (kv_heads * GROUP) + g * GROUP + h
        i = tl.arange(0, D_PAD)[None, :]
        mask = (t < T)[:, None] if D == D_PAD else (t < T)[:, None] & (i < D)
        tl.store(y_ptr + out[:, None] * D + i, y.to(y_ptr.dtype.element_ty), mask)
        tl.store(lse_ptr + out, (most + tl.log2(sum)) * 0.6931471805599453, t < T)


def _shape(S: int, d: int, group: int, arch: int) -> dict[str, Any]:
    """Constants of a launch. Keys stay on chip where one block has them all: 256 of 64 elements, of
    which gfx942 spills registers: 64 there. wgmma and tcgen05 need 64 rows; others spill then."""
    d_pad = max(16, next_power_of_2(d))
    most = min(256, max(16, (1 << 14) // d_pad)) if arch else 64
    keys = max(16, next_power_of_2(S))
    keys = keys if keys <= most else 64
    rows = 64 if arch in (9, 10) else 32
    names = ("GROUP", "D", "D_PAD", "ROWS", "KEYS", "RESIDENT")
    return dict(zip(names, (group, d, d_pad, rows, keys, keys >= S), strict=True))


def _options(arch: int) -> dict[str, int]:
    return {"num_warps": 4 if arch else 1, "num_stages": 2 if arch else 1}


def _triton_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    (B, T, H, d), (_, S, kv_heads, _) = q.shape, k.shape
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((B, T, H), dtype=torch.float32)
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    vec = math.gcd(16 // q.element_size(), *strides)
    arch = architecture(q.device)
    constants = _shape(S, d, H // kv_heads, arch)
    blocks = cdiv(T * constants["GROUP"], constants["ROWS"])
    pairs = B * kv_heads
    if not pairs * blocks:
        return y, lse
    # By the furthest element: a view may span more than it has.
    reach = max(sum(n * s for n, s in zip(x.shape, x.stride(), strict=True)) for x in (q, k, v))
    wide = max(reach, q.numel()) >= 2**31 - 2**16
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    grid = (min(blocks, max(1, cdiv(PROGRAMS, pairs))), pairs)
    with on_device(q):
        _forward_kernel[grid](
            q, k, v, mask, y, lse, scale / math.log(2), T, S, kv_heads, blocks,
            *(s // vec for s in strides), **constants, VEC=vec, WIDE=wide, **_options(arch),
        )  # fmt: skip
    return y, lse


def _takes(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel here serves: see the module's first lines."""
    asked = os.environ.get("DFM_FAST_ATTENTION", "")
    able = q.dtype in DTYPES and k.shape[1] <= SHORT and q.shape[3] <= 128
    if asked in ("triton", "sdpa"):
        return able and asked == "triton"
    return able and k.shape[1] <= MEASURED.get(torch.cuda.get_device_capability(q.device), -1)


def multi_query_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or k.shape[1] == 0:
        lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
        return torch.zeros_like(q, memory_format=torch.contiguous_format), lse
    if q.dtype == torch.float64:  # no fused backend has it
        return attentions._forward(q, k, v, mask, scale)
    if q.device.type == "cpu" or _takes(q, k):  # the interpreter's
        return _triton_forward(q, k, v, mask, scale)
    return _sdpa.forward(None, q, k, v, mask, scale, k.shape[2] == 1)


def multi_query_attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    y: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or k.shape[1] == 0:
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if q.device.type == "cpu" or q.dtype == torch.float64:
        return attentions._backward(dy, q, k, v, mask, y, lse, scale)
    return _sdpa.backward(None, dy, q, k, v, mask, y, lse, scale, _sdpa.view_backward(k))


def specialisations() -> Iterator[Specialisation]:
    """SnapGen's cross-attention: CLIP's 77 tokens, 256 of a language model, heads of 64."""
    for keys, dtype in itertools.product((77, 256, 320), ("bf16", "fp16")):
        arguments: dict[str, str | None] = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "y_ptr"), "*")
        arguments |= {"mask_ptr": "*u8", "lse_ptr": "*fp32", "scale": "fp32"}
        strides = [f"{x}_{axis}" for x, axes in (("q", "bth"), ("k", "bsh"), ("v", "bsh"))
                   for axis in axes]  # fmt: skip
        arguments |= dict.fromkeys(("T", "S", "kv_heads", "blocks", *strides), "i32")
        name = f"multi_query_attention {keys}"
        for target, arch in ARCHITECTURES.items():
            constants = _shape(keys, 64, 14, arch) | {"VEC": 8, "WIDE": False}
            common = {"targets": (target,), "options": _options(arch), "load_bits": 128}
            yield Specialisation(
                name, _forward_kernel, dtype, arguments, constants, matrix=True, **common
            )
