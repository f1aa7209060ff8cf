r"""Normalisation of queries and keys per head, then rotary position embedding, in one pass.

    n_i = w_i x_i / sqrt(mean_j x_j^2 + eps)                     QK-RMSNorm, over the head dimension
    (y_a, y_b) = (n_a cos - n_b sin, n_a sin + n_b cos)          RoPE, one angle per pair (a, b)

x is a row of d elements: one token of one head of q [B, T, H, d] or k [B, T, Hkv, d]. Pairs are
(2i, 2i+1), interleaved, or (i, i + d/2), halves. (Zhang & Sennrich 2019; Henry et al. 2020, arXiv
2010.04245; Su et al. 2021, arXiv 2104.09864.) Either part may be left out.

q and k are read where they are, strided views of a packed projection too; what comes out is
contiguous. In float32 (float64 for float64), rounded once. Backward, from the gradients dy:

    dn_a = cos dy_a + sin dy_b,  dn_b = cos dy_b - sin dy_a        the rotation back
    dx = (w dn - x mean_j(w_j dn_j x_j) rstd^2) rstd,  dw = sum over rows of dn x rstd

Saved are the inputs alone, not even q or k where they are only rotated: a row's
rstd = 1 / sqrt(mean x^2 + eps) is cheaper to compute again than to read. Bytes moved at least, b
bytes an element of q and k: forward 2 b, backward 3 b (only rotated: 2 b), and the tables.
Gradients of the tables (learned frequencies) are plain torch, in several passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfm_fast import _checks
from dfm_fast._library import define, differentiable, operator
from dfm_fast.ops.pyramids import nbytes

_ops = torch.ops.dfm_fast

# --- References ----------------------------------------------------------------------------------


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """[..., d] -> first and second of every pair, [..., d/2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)
    return a, b


def _from_pairs(a: Tensor, b: Tensor, interleaved: bool) -> Tensor:
    return torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, T, H, d] by angles [T, d/2] or [B, T, d/2]."""
    cos, sin = (v.to(x.dtype).unsqueeze(-2) for v in (cos, sin))
    a, b = _pairs(x, interleaved)
    return _from_pairs(a * cos - b * sin, a * sin + b * cos, interleaved)


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _normalise(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else x * _rstd(x, eps) * weight.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def qk_norm_rope_ref(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """Defines `qk_norm_rope`."""

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        y = _normalise(_wide(x), weight, eps)
        y = y if cos is None or sin is None else _rotate(y, cos, sin, interleaved)
        return y.to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


def _forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    args = q, k, q_weight, k_weight, cos, sin
    q, k = qk_norm_rope_ref(*args, eps=eps, interleaved=interleaved)
    return _contiguous(q), _contiguous(k)


def _contiguous(x: Tensor) -> Tensor:
    """New memory: outputs never are the arguments."""
    return torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)


def _row_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
    weights: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dw), where dw is empty if not wanted."""
    dtype, dn, x = x.dtype, _wide(dy), _wide(x)
    none = x.new_empty(0, dtype=torch.float32 if weight is None else weight.dtype)
    if cos is not None and sin is not None:
        dn = _rotate(dn, cos, -sin, interleaved)
    if weight is None:
        return _contiguous(dn.to(dtype)), none
    rstd, g = _rstd(x, eps), dn * weight.to(x.dtype)
    dx = (g - x * (g * x).mean(-1, keepdim=True) * rstd * rstd) * rstd
    dw = (dn * (x * rstd)).sum((0, 1, 2)).to(weight.dtype) if weights else none
    return _contiguous(dx.to(dtype)), dw


def _backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rest = cos, sin, eps, interleaved, weights
    dq, dq_weight = _row_gradients(dq, q, q_weight, *rest)
    dk, dk_weight = _row_gradients(dk, k, k_weight, *rest)
    return dq, dk, dq_weight, dk_weight


# --- Registration ---------------------------------------------------------------------------------


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty(q), _empty(k)


def _fake_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def weight_gradient(weight: Tensor | None) -> Tensor:
        dtype = torch.float32 if weight is None else weight.dtype
        return q.new_empty(0 if weight is None or not rest[-1] else q.shape[-1], dtype=dtype)

    return _empty(q), _empty(k), weight_gradient(q_weight), weight_gradient(k_weight)


def _flops(q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, *_: Any) -> int:
    per_row = [(4 if w else 0) + (3 if cos else 0) for w in (q_weight, k_weight)]
    return math.prod(q) * per_row[0] + math.prod(k) * per_row[1]


_REST = (
    "Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, "
    "bool interleaved"
)
define(
    f"qk_norm_rope({_REST}) -> (Tensor, Tensor)",
    reference=_forward,
    fake=_fake,
    kernel="rotaries:qk_norm_rope",
    flops=_flops,
)
define(
    f"qk_norm_rope_backward(Tensor dq, Tensor dk, {_REST}, bool weights)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_backward,
    fake=_fake_backward,
    kernel="rotaries:qk_norm_rope_backward",
    flops=lambda dq, dk, *rest: 3 * _flops(*rest),
)

# --- Gradients ------------------------------------------------------------------------------------


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, eps, interleaved, learned):
        # What is only turned is not needed to turn back, unless for the angles' gradients.
        kept_q = q if learned or q_weight is not None else None
        kept_k = k if learned or k_weight is not None else None
        ctx.save_for_backward(kept_q, kept_k, q_weight, k_weight, cos, sin)
        ctx.rest = eps, interleaved
        return _ops.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        (q, k, *saved), needs = ctx.saved_tensors, ctx.needs_input_grad
        dq, dk = _rows(dq), _rows(dk)
        saved = dq if q is None else q, dk if k is None else k, *saved
        grads = [None] * 4
        if any(needs[:4]):
            weights = needs[2] or needs[3]
            grads = _ops.qk_norm_rope_backward(dq, dk, *saved, *ctx.rest, weights)
        tables = (
            _table_gradients(dq, dk, *saved, *ctx.rest) if needs[4] or needs[5] else (None,) * 2
        )
        given = (*grads, *tables)
        return (
            *(g if need else None for g, need in zip(given, needs, strict=False)),
            None,
            None,
            None,
        )


def _table_gradients(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Sums over the heads, and over the batch if the table has none."""
    dims = (0, 2) if cos.ndim == 2 else (2,)
    dcos: Any = 0
    dsin: Any = 0
    for dy, x, weight in ((dq, q, q_weight), (dk, k, k_weight)):
        n_a, n_b = _pairs(_normalise(_wide(x), weight, eps), interleaved)
        dy_a, dy_b = _pairs(_wide(dy), interleaved)
        dcos = dcos + (dy_a * n_a + dy_b * n_b).sum(dims)
        dsin = dsin + (dy_b * n_a - dy_a * n_b).sum(dims)
    return dcos.to(cos.dtype), dsin.to(sin.dtype)


# --- Public function ------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous: any strides but the last."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_weight(op: str, name: str, weight: Any, q: Tensor) -> Tensor:
    _checks.tensor(op, name, weight, (1,))
    if weight.shape[0] != q.shape[-1]:
        _checks.fail(op, name, f"[{q.shape[-1]}], the head dimension", list(weight.shape))
    if weight.device != q.device:
        _checks.fail(op, name, f"device {q.device} like q", weight.device)
    return weight.contiguous()


def _check_tables(op: str, q: Tensor, k: Tensor, cos: Any, sin: Any) -> tuple[Tensor, Tensor]:
    _checks.tensor(op, "cos", cos, (2, 3))
    _checks.tensor(op, "sin", sin, (2, 3))
    B, T, _, d = q.shape
    if cos.shape != (T, d // 2) and cos.shape != (B, T, d // 2):
        expected = f"[{T}, {d // 2}] or [{B}, {T}, {d // 2}]"
        _checks.fail(op, "cos", expected, list(cos.shape))
    if cos.device != q.device:
        _checks.fail(op, "cos", f"device {q.device} like q", cos.device)
    if sin.shape != cos.shape or sin.dtype != cos.dtype or sin.device != cos.device:
        expected, got = (f"{v.dtype} {list(v.shape)} on {v.device}" for v in (cos, sin))
        _checks.fail(op, "sin", f"{expected} like cos", got)
    if k.shape[1] != T:
        _checks.fail(op, "k", f"{T} tokens like q, for its angles", k.shape[1])
    return cos.contiguous(), sin.contiguous()


def _check_heads(op: str, q: Any, k: Any) -> None:
    _checks.tensor(op, "q", q, (4,))
    _checks.tensor(op, "k", k, (4,))
    _checks.like(op, "k", k, "q", q)
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        expected = f"[{q.shape[0]}, T, heads, {q.shape[3]}] like q"
        _checks.fail(op, "k", expected, list(k.shape))
    if q.shape[3] % 2 or q.shape[3] == 0:
        _checks.fail(op, "q", "an even head dimension", q.shape[3])


def _cost(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    **_: Any,
) -> int:
    small = [v for v in (q_weight, k_weight, cos, sin) if v is not None]
    return nbytes(q, k, q, k, *small)


@operator(reference=qk_norm_rope_ref, raw=("qk_norm_rope", "qk_norm_rope_backward"), cost=_cost)
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of every head of q and k, then rotary embedding, in one launch.

    Args:
        q: [B, T, H, d], d even; any strides whose last is 1 are read in place, such as views of
            a packed projection [B, T, (H + 2 Hkv) d].
        k: [B, T, Hkv, d] like q; its T may differ where there are no tables.
        q_weight, k_weight: [d], any floating dtype, or None: that tensor is not normalised. For
            a norm without a weight pass ones.
        cos, sin: [T, d/2] or [B, T, d/2], any floating dtype (float32 is best), one angle per
            pair, as from `rope_2d`; or both None: no rotation.
        eps: added to the mean square.
        interleaved: pairs are (2i, 2i+1) (FLUX, CogVideoX), else (i, i + d/2) (GPT-NeoX, LLaMA).

    Returns:
        q [B, T, H, d] and k [B, T, Hkv, d], contiguous, in their dtype.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, an odd d, one table without the other, or
            neither weight nor table.

    FLUX's norm_q, norm_k and `apply_rotary_emb(..., use_real_unbind_dim=-1, sequence_dim=1)`, whose
    tables [T, d] hold every angle twice: `cos[:, ::2]`.
    """
    op = "qk_norm_rope"
    _check_heads(op, q, k)
    if q_weight is not None:
        q_weight = _check_weight(op, "q_weight", q_weight, q)
    if k_weight is not None:
        k_weight = _check_weight(op, "k_weight", k_weight, q)
    if cos is not None or sin is not None:
        cos, sin = _check_tables(op, q, k, cos, sin)
    elif q_weight is None and k_weight is None:
        _checks.fail(op, "q_weight", "a weight or rotary tables: something to compute", None)
    args = _rows(q), _rows(k), q_weight, k_weight, cos, sin
    if differentiable(*(v for v in args if v is not None)):
        learned = any(v is not None and v.requires_grad for v in (cos, sin))
        return _QKNormRope.apply(*args, eps, interleaved, learned)
    return _ops.qk_norm_rope(*args, eps, interleaved)


# --- Tables ---------------------------------------------------------------------------------------


def _axial(
    op: str,
    sizes: Sequence[int],
    axes: Sequence[int],
    base: float,
    spacing: float | Sequence[float],
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Tables of a grid: axis i has axes[i] of the head's dimensions."""
    steps = [spacing] * len(sizes) if isinstance(spacing, int | float) else list(spacing)
    if len(steps) != len(sizes):
        _checks.fail(op, "spacing", f"a number, or {len(sizes)}", spacing)
    if not base > 0:
        _checks.fail(op, "base", "a positive number", base)
    angles = []
    for i, (n, dim, step) in enumerate(zip(sizes, axes, steps, strict=True)):
        index = torch.arange(n, dtype=torch.float64, device=device)
        power = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
        angle = torch.outer((index + 0.5) * step - 0.5, float(base) ** -power)
        shape = [1] * len(sizes) + [-1]
        shape[i] = n
        angles.append(angle.view(shape).expand(*sizes, -1))
    angle = torch.cat(angles, -1).flatten(0, -2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rope_2d(
    height: int,
    width: int,
    head_dim: int,
    *,
    base: float = 10000.0,
    spacing: float | Sequence[float] = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Rotary tables of an image's tokens, row by row: half of the head for y, half for x.

    Args:
        height, width: tokens.
        head_dim: a multiple of 4.
        base: pair i of an axis with n dimensions turns by base^(-2i/n) a position.
        spacing: positions between neighbours, one number or one per axis. Positions are 0, 1, ...;
            at spacing s the centres of s of those each, (i + 1/2) s - 1/2: a grid s times coarser
            lies where the finer one does.

    Returns:
        cos, sin [height * width, head_dim / 2], angles computed in float64.

    Raises:
        TypeError, ValueError: sizes that are no positive ints, a head_dim that does not divide.
    """
    op = "rope_2d"
    sizes = _checks.integer(op, "height", height, 1), _checks.integer(op, "width", width, 1)
    if _checks.integer(op, "head_dim", head_dim, 4) % 4:
        _checks.fail(op, "head_dim", "a multiple of 4", head_dim)
    return _axial(op, sizes, (head_dim // 2,) * 2, base, spacing, device, dtype)


def rope_3d(
    frames: int,
    height: int,
    width: int,
    head_dim: int,
    *,
    axes: Sequence[int] | None = None,
    base: float = 10000.0,
    spacing: float | Sequence[float] = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Rotary tables of a video's tokens, frame by frame, each row by row.

    Args:
        frames, height, width: tokens.
        head_dim: even.
        axes: dimensions for t, y and x, each even, head_dim in sum. By default a third each, y's
            and x's rounded down to even and the rest for t, as Wan does: 44, 42, 42 of 128.
            CogVideoX has 16, 24, 24 of 64, HunyuanVideo 16, 56, 56 of 128.
        base, spacing: as `rope_2d`.

    Returns:
        cos, sin [frames * height * width, head_dim / 2], angles computed in float64.

    Raises:
        TypeError, ValueError: sizes that are no positive ints, axes that do not add up.
    """
    op = "rope_3d"
    given = {"frames": frames, "height": height, "width": width}
    sizes = [_checks.integer(op, name, n, 1) for name, n in given.items()]
    if _checks.integer(op, "head_dim", head_dim, 2) % 2:
        _checks.fail(op, "head_dim", "an even number", head_dim)
    if axes is None:
        third = 2 * (head_dim // 6)
        axes = head_dim - 2 * third, third, third
    wrong = any(n < 0 or n % 2 for n in axes)
    if len(axes) != 3 or wrong or sum(axes) != head_dim:
        _checks.fail(op, "axes", f"three even numbers that add up to {head_dim}", list(axes))
    return _axial(op, sizes, axes, base, spacing, device, dtype)
