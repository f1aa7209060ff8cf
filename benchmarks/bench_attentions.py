"""Multi-query attention: rows only; the measuring is in harness.py."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dfm_fast
from benchmarks.harness import Rival, Row, bind
from benchmarks.shapes import ATTENTIONS
from dfm_fast.ops import attentions

F32, BF16 = torch.float32, torch.bfloat16
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """[B, H, T, d], by a fused backend on a GPU: what a user who knows does."""
    with sdpa_kernel(FUSED) if q.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, **options)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What diffusers' DreamLite does: keys and values written once for every head."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The queries of all heads as those of one."""
    y = sdpa(q.flatten(1, 2).unsqueeze(1), k.transpose(1, 2), v.transpose(1, 2))
    return y.squeeze(1).unflatten(1, q.shape[1:3])


def expand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys with strides of 0."""
    heads = q.shape[2], k.shape[2]
    k, v = (
        x.unsqueeze(3).expand(-1, -1, -1, heads[0] // heads[1], -1).flatten(2, 3) for x in (k, v)
    )
    return sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).contiguous()


def enable_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own option, by whatever backend it finds."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return y.transpose(1, 2).contiguous()


def triton_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ours for short KV, taken or not."""
    from dfm_fast.kernels.attentions import _triton_forward

    return _triton_forward(q, k, v, None, 1 / math.sqrt(q.shape[-1]))[0]


def attention_row(
    name: str, dtype: torch.dtype = F32, direction: str = "forward", **options: Any
) -> Row:
    B, T, S, H, kv, d = ATTENTIONS[name]

    def rival(function: Function, **more: Any) -> Rival:
        return Rival(lambda *inputs: bind(function, inputs, direction), **more)

    rivals: dict[str, Rival | str] = {"expand": rival(expand), "enable_gqa": rival(enable_gqa)}
    if kv == 1:
        rivals["view"] = rival(view)
    if direction == "forward" and dtype != F32 and S <= 320:
        rivals["triton"] = rival(triton_kernel, device="cuda")
    passes = {"forward": 1, "training": 3}[direction]
    return Row(
        op="multi_query_attention",
        variant="",
        case=name,
        shapes=((B, T, H, d), (B, S, kv, d), (B, S, kv, d)),
        ours=dfm_fast.multi_query_attention,
        reference=attentions.multi_query_attention_ref,
        least_bytes=passes * 2 * B * d * (T * H + S * kv) * dtype.itemsize,
        eager=repeated,
        compiled={"repeated": repeated, "expand": expand},
        rivals=rivals,
        dtype=dtype,
        direction=direction,
        **options,
    )


def rows() -> Iterator[Row]:
    for name in ("self_32", "clip_32", "text_32", "clip_64", "text_64"):
        yield attention_row(name, quick=name in ("self_32", "clip_32"))
        yield attention_row(name, BF16, quick=name in ("self_32", "clip_32"))
    yield attention_row("grouped_32")
    for dtype in (F32, BF16):
        yield attention_row("self_32", dtype, "training", quick=dtype == F32)
        yield attention_row("text_64", dtype, "training")
    yield attention_row("large_self", BF16, device="cuda", quick=True)
    yield attention_row("large_text", BF16, device="cuda", quick=True)
    yield attention_row("large_self", BF16, "training", device="cuda")


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_attentions(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
