"""Whole blocks, for time and peak memory: rows only; the measuring is in harness.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dfm_fast
from benchmarks.harness import Row
from benchmarks.shapes import TOKENS
from dfm_fast.nn.activations import activated_linear
from dfm_fast.ops import activations, norms, rotaries

F32, BF16 = torch.float32, torch.bfloat16

# --- A DiT block: adaLN-Zero, QK norm, rotary embedding, tanh-GELU MLP --------------------------


def heads(qkv: Tensor, head_dim: int) -> tuple[Tensor, ...]:
    """[B, T, 3D] -> q, k, v [B, T, H, d], views."""
    return qkv.unflatten(-1, (3, -1, head_dim)).unbind(2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, d] -> [B, T, D]"""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def fused_block(ops: Any, norm_rope: Callable[..., Any], activated: Callable[..., Any]) -> Any:
    """The block of our operators, or of their references."""

    def block(x, modulation, qkv_w, out_w, up_w, up_b, down_w, q_norm, k_norm, cos, sin):
        shift, scale, gate, shift2, scale2, gate2 = modulation.chunk(6, -1)
        h = ops[0](x, shift, scale)
        q, k, v = heads(F.linear(h, qkv_w), len(q_norm))
        q, k = norm_rope(q, k, q_norm, k_norm, cos, sin)
        y = F.linear(attend(q, k, v), out_w)
        x, h = ops[1](x, y, gate, shift2, scale2)
        y = activated(F.linear(h, up_w, up_b), down_w)
        return ops[2](x, y, gate2)

    return block


OURS = fused_block(
    (dfm_fast.ada_layer_norm, dfm_fast.gated_residual_ada_layer_norm, dfm_fast.gated_residual),
    dfm_fast.qk_norm_rope,
    partial(activated_linear, activation="gelu-approximate"),
)
REFERENCE = fused_block(
    (norms.ada_layer_norm_ref, norms.gated_residual_ada_layer_norm_ref, norms.gated_residual_ref),
    rotaries.qk_norm_rope_ref,
    lambda h, weight: F.linear(activations.gelu_tanh_ref(h), weight),
)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, T, H, d] by tables [T, d / 2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def written_out(x, modulation, qkv_w, out_w, up_w, up_b, down_w, q_norm, k_norm, cos, sin):
    """What a user writes."""
    shift, scale, gate, shift2, scale2, gate2 = modulation.chunk(6, -1)
    q, k, v = heads(F.linear(modulate(x, shift, scale), qkv_w), len(q_norm))
    q, k = (F.rms_norm(t, w.shape, w, 1e-6) for t, w in ((q, q_norm), (k, k_norm)))
    y = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
    x = x + gate.unsqueeze(1) * F.linear(y, out_w)
    h = F.gelu(F.linear(modulate(x, shift2, scale2), up_w, up_b), approximate="tanh")
    return x + gate2.unsqueeze(1) * F.linear(h, down_w)


def dit_row(name: str, head_dim: int, dtype: torch.dtype = F32, **options: Any) -> Row:
    batch, tokens, dim = TOKENS[name]
    side = math.isqrt(tokens)
    weights = ((3 * dim, dim), (dim, dim), (4 * dim, dim), (4 * dim,), (dim, 4 * dim))
    shapes = ((batch, tokens, dim), (batch, 6 * dim), *weights, (head_dim,), (head_dim,))
    tables = (tokens, head_dim // 2)

    def adapt(inputs: list[Tensor]) -> list[Tensor]:
        weights = [w / math.sqrt(w.shape[-1]) for w in inputs[2:7]]
        norm_weights = [1 + 0.1 * w for w in inputs[7:9]]
        cos_sin = dfm_fast.ops.rope_2d(side, side, head_dim)
        return [*inputs[:2], *weights, *norm_weights, *cos_sin]

    moved = 2 * math.prod(shapes[0]) + sum(map(math.prod, shapes[1:]))
    return Row(
        op="dit_block",
        variant="",
        case=name,
        shapes=(*shapes, tables, tables),
        ours=OURS,
        reference=REFERENCE,
        # What goes in and out; the rest could stay on chip. The matrix products decide.
        least_bytes=moved * dtype.itemsize,
        eager=written_out,
        compiled={"written out": written_out},
        dtype=dtype,
        frozen=(9, 10),
        adapt=adapt,
        **options,
    )


def rows() -> Iterator[Row]:
    yield dit_row("dit_s", 64, direction="training", quick=True)
    yield dit_row("dit_s", 64)
    yield dit_row("dit_xl_training", 72, BF16, direction="training", device="cuda", quick=True)
    yield dit_row("dit_xl_training", 72, BF16, device="cuda")


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_blocks(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
