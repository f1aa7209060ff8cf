"""QK-RMSNorm and rotary embedding: rows only; the measuring is in harness.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dfm_fast
from benchmarks.harness import Row
from benchmarks.shapes import HEADS
from dfm_fast.ops import rotaries

F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-6
Function = Callable[..., tuple[Tensor, Tensor]]


def tables(T: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Those of a square picture, made once per device and dtype, as a model has them."""
    key = T, like.shape[-1], like.device, like.dtype
    if key not in _TABLES:
        side, dtype = math.isqrt(T), torch.promote_types(like.dtype, F32)
        options: dict[str, Any] = {"device": like.device, "dtype": dtype}
        _TABLES[key] = dfm_fast.rope_2d(side, side, like.shape[-1], **options)
    return _TABLES[key]


_TABLES: dict[Any, tuple[Tensor, Tensor]] = {}


def written_out(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """What a user writes, as diffusers' FLUX: every angle twice, the pair turned by stacking."""
    cos, sin = (v.repeat_interleave(2, -1)[:, None] for v in (cos, sin))

    def one(x: Tensor, weight: Tensor) -> Tensor:
        x = F.rms_norm(x, weight.shape, weight, EPS)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-b, a), -1).flatten(-2)
        wide = torch.promote_types(x.dtype, F32)
        return (x.to(wide) * cos + turned.to(wide) * sin).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


def separate(function: Function) -> Function:
    """Of q, k and their weights."""
    return lambda q, k, *weights: function(q, k, *weights, *tables(q.shape[1], q))


def packed(function: Function, H: int) -> Function:
    """Of a projection [B, T, H + 2 Hkv, d], whose parts are views."""

    def run(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        kv = (qkv.shape[2] - H) // 2
        q, k, _ = qkv.split((H, kv, kv), 2)
        return function(q, k, *weights, *tables(q.shape[1], q))

    return run


def rope_row(
    name: str,
    dtype: torch.dtype = F32,
    direction: str = "forward",
    views: bool = False,
    **options: Any,
) -> Row:
    B, T, H, kv, d = HEADS[name]
    wrap = (lambda f: packed(f, H)) if views else separate
    parts = ((B, T, H + 2 * kv, d),) if views else ((B, T, H, d), (B, T, kv, d))
    passes = {"forward": 2, "backward": 3, "training": 5}[direction]
    table = 2 * T * (d // 2) * torch.promote_types(dtype, F32).itemsize
    return Row(
        op="qk_norm_rope",
        variant="packed" if views else "separate",
        case=name,
        shapes=(*parts, (d,), (d,)),
        ours=wrap(dfm_fast.qk_norm_rope),
        reference=wrap(rotaries.qk_norm_rope_ref),
        least_bytes=passes * B * T * (H + kv) * d * dtype.itemsize + table,
        eager=wrap(written_out),
        compiled={"written out": wrap(written_out)},
        dtype=dtype,
        direction=direction,
        **options,
    )


def rows() -> Iterator[Row]:
    yield rope_row("heads_16x64", quick=True)
    yield rope_row("heads_16x64", views=True, quick=True)
    yield rope_row("heads_16x64", BF16, views=True)
    yield rope_row("heads_16x64", direction="training", quick=True)
    yield rope_row("heads_16x64", BF16, direction="training")
    yield rope_row("snapgen_32", quick=True)
    yield rope_row("snapgen_32", BF16, views=True)
    yield rope_row("dit_xl_512")
    yield rope_row("dit_xl_512", BF16)
    yield rope_row("dit_xl_512", direction="training")
    yield rope_row("large_heads", BF16, device="cuda", quick=True)
    yield rope_row("large_heads", BF16, views=True, device="cuda")
    yield rope_row("large_heads", BF16, direction="training", device="cuda", quick=True)


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_rotaries(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
