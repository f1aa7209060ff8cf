r"""Row-wise norms of transformers, their modulation (adaLN) and their gated residuals.

A row is the last dimension, of D elements; sums and means are over it:

    rms_norm          y = x rstd w                      rstd = (mean x^2 + eps)^(-1/2)
    ada_layer_norm    y = xhat (1 + scale) + shift      xhat = (x - mean) rstd
    gated_residual    r = x + gate y
    gated_residual_ada_layer_norm                       r, then the norm of r as rounded

(Zhang & Sennrich 2019; Peebles & Xie, arXiv 2212.09748, adaLN-Zero.) Gate, shift and scale are
[B, D], one row per sample, or like x, one per token; strided chunks of one projection are read
where they lie. rstd of ada_layer_norm is (mean (x - mean)^2 + eps)^(-1/2), centred: the mean is
subtracted first, then what its rounding left over, and only then squares are taken.

With g = dy (1 + scale), or dy w, and without the means of g for rms_norm:

    dx = rstd (g - mean g - xhat mean(g xhat))      dshift = sum dy      dscale = sum dy xhat
    dr = that of the norm + the residual's own      dx = dr      dy = gate dr     dgate = sum dr y

The sums are over the rows that share the modulation: over blocks of rows first, then over the
blocks in order, so no result depends on the number of threads. In float32 (float64 for float64),
rounded once. Saved for backward: x or r, y, gate, scale, w, and per row mean and rstd. Bytes moved
at least, n rows of D elements, b bytes each: norms 2 n D b forward, 3 n D b backward;
gated_residual 3 and 3; both at once 4 and 6.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfm_fast import _checks
from dfm_fast._library import define, differentiable, operator
from dfm_fast.ops._layouts import lay_out
from dfm_fast.ops._modulation import (
    check_beside,
    check_branch,
    check_modulation,
    check_x,
    walkable,
)
from dfm_fast.ops.pyramids import nbytes

_ops = torch.ops.dfm_fast

# --- References ----------------------------------------------------------------------------------


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _per_token(m: Tensor, x: Tensor) -> Tensor:
    """Modulation [B, D] or like x -> broadcast over x [B, ..., D], in x's arithmetic type."""
    m = m.to(_wide(x))
    return m if m.shape == x.shape else m.view(len(m), *[1] * (x.ndim - 2), m.shape[-1])


def _rstd(centred: Tensor, eps: float) -> Tensor:
    return (centred.square().mean(-1, keepdim=True) + eps).rsqrt()


def _centre(x: Tensor, mean: Tensor) -> Tensor:
    """x - mean, without the mean that rounding `mean` left in it."""
    centred = x - mean
    return centred - centred.mean(-1, keepdim=True)


def rms_norm_ref(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """Defines `rms_norm`."""
    wide = x.to(_wide(x))
    y = wide * _rstd(wide, eps)
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype)


def ada_layer_norm_ref(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Defines `ada_layer_norm`."""
    wide = x.to(_wide(x))
    centred = _centre(wide, wide.mean(-1, keepdim=True))
    xhat = centred * _rstd(centred, eps)
    return (xhat * (1 + _per_token(scale, x)) + _per_token(shift, x)).to(x.dtype)


def gated_residual_ref(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Defines `gated_residual`."""
    wide = _wide(x)
    return (x.to(wide) + _per_token(gate, x) * y.to(wide)).to(x.dtype)


def gated_residual_ada_layer_norm_ref(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Defines `gated_residual_ada_layer_norm`."""
    residual = gated_residual_ref(x, y, gate)
    return residual, ada_layer_norm_ref(residual, shift, scale, eps=eps)


def _new(value: Tensor, like: Tensor | None = None) -> Tensor:
    """As a raw operator returns it: contiguous, in the dtype of `like`."""
    value = value if like is None else value.to(like.dtype)
    return lay_out(value, torch.contiguous_format)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    rstd = _rstd(x.to(_wide(x)), eps).squeeze(-1)
    return _new(rms_norm_ref(x, weight, eps=eps)), _new(rstd)


def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    xhat = x.to(rstd.dtype) * rstd.unsqueeze(-1)
    g = dy.to(rstd.dtype)
    dweight = (g * xhat).flatten(0, -2).sum(0) if weight is not None else g.new_empty(0)
    g = g if weight is None else g * weight.to(g.dtype)
    dx = rstd.unsqueeze(-1) * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    return _new(dx, x), _new(dweight, x if weight is None else weight)


def _ada_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(_wide(x))
    mean = wide.mean(-1, keepdim=True)
    rstd = _rstd(_centre(wide, mean), eps)
    y = ada_layer_norm_ref(x, shift, scale, eps=eps)
    return _new(y), _new(mean.squeeze(-1)), _new(rstd.squeeze(-1))


def _over_rows(value: Tensor, modulation: Tensor) -> Tensor:
    """The gradient of a modulation: summed over the rows that share it, in its dtype."""
    if value.shape != modulation.shape:
        value = value.flatten(1, -2).sum(1)
    return _new(value, modulation)


def _norm_gradients(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in the arithmetic type, dshift, dscale)."""
    dy, rstd = dy.to(rstd.dtype), rstd.unsqueeze(-1)
    xhat = _centre(x.to(rstd.dtype), mean.unsqueeze(-1)) * rstd
    g = dy * (1 + _per_token(scale, x))
    dx = rstd * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    return dx, _over_rows(dy.clone(), scale), _over_rows(dy * xhat, scale)


def _ada_layer_norm_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dshift, dscale = _norm_gradients(dy, x, scale, mean, rstd)
    return _new(dx, x), dshift, dscale


def _gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return _new(gated_residual_ref(x, y, gate))


def _gated_residual_backward(dresidual: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    wide = _wide(dresidual)
    dr = dresidual.to(wide)
    return _new(dr * _per_token(gate, dr), y), _over_rows(dr * y.to(wide), gate)


def _gated_residual_ada_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual = _gated_residual(x, y, gate)
    return residual, *_ada_layer_norm(residual, shift, scale, eps)


def _gated_residual_ada_layer_norm_backward(
    dresidual: Tensor | None,
    dnormed: Tensor,
    residual: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dr, dshift, dscale = _norm_gradients(dnormed, residual, scale, mean, rstd)
    dr = dr if dresidual is None else dr + dresidual.to(dr.dtype)
    dy, dgate = _gated_residual_backward(dr, y, gate)
    return _new(dr, residual), dy, dgate, dshift, dscale


# --- Registration ---------------------------------------------------------------------------------


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _statistic(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:-1], dtype=_wide(x), device=x.device)


define(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
    reference=_rms_norm,
    fake=lambda x, weight, eps: (_like(x), _statistic(x)),
    kernel="norms:rms_norm",
    flops=lambda x, weight, eps: 4 * math.prod(x),
)
define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor, Tensor)",
    reference=_rms_norm_backward,
    fake=lambda dy, x, weight, rstd: (
        _like(x),
        x.new_empty(0) if weight is None else _like(weight),
    ),
    kernel="norms:rms_norm_backward",
    flops=lambda dy, x, *_: 8 * math.prod(x),
)
define(
    "ada_layer_norm(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    reference=_ada_layer_norm,
    fake=lambda x, shift, scale, eps: (_like(x), _statistic(x), _statistic(x)),
    kernel="norms:ada_layer_norm",
    flops=lambda x, *_: 8 * math.prod(x),
)
define(
    "ada_layer_norm_backward(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_ada_layer_norm_backward,
    fake=lambda dy, x, scale, *_: (_like(x), _like(scale), _like(scale)),
    kernel="norms:ada_layer_norm_backward",
    flops=lambda dy, x, *_: 14 * math.prod(x),
)
define(
    "gated_residual(Tensor x, Tensor y, Tensor gate) -> Tensor",
    reference=_gated_residual,
    fake=lambda x, y, gate: _like(x),
    kernel="norms:gated_residual",
    flops=lambda x, *_: 2 * math.prod(x),
)
define(
    "gated_residual_backward(Tensor dresidual, Tensor y, Tensor gate) -> (Tensor, Tensor)",
    reference=_gated_residual_backward,
    fake=lambda dresidual, y, gate: (_like(y), _like(gate)),
    kernel="norms:gated_residual_backward",
    flops=lambda dresidual, *_: 3 * math.prod(dresidual),
)
define(
    "gated_residual_ada_layer_norm(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_gated_residual_ada_layer_norm,
    fake=lambda x, *_: (_like(x), _like(x), _statistic(x), _statistic(x)),
    kernel="norms:gated_residual_ada_layer_norm",
    flops=lambda x, *_: 10 * math.prod(x),
)
define(
    "gated_residual_ada_layer_norm_backward(Tensor? dresidual, Tensor dnormed, Tensor residual, "
    "Tensor y, Tensor gate, Tensor scale, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_gated_residual_ada_layer_norm_backward,
    fake=lambda dresidual, dnormed, residual, y, gate, scale, *_: (
        *(_like(residual), _like(y)),
        *(_like(gate), _like(scale), _like(scale)),
    ),
    kernel="norms:gated_residual_ada_layer_norm_backward",
    flops=lambda dresidual, dnormed, *_: 18 * math.prod(dnormed),
)

# --- Gradients ------------------------------------------------------------------------------------


def _wanted(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Those of inputs that need one."""
    return tuple(
        g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=True)
    )


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd = _ops.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx, dweight = _ops.rms_norm_backward(dy.contiguous(), *ctx.saved_tensors)
        return _wanted(ctx, dx, dweight, None)


class _AdaLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, eps):
        y, mean, rstd = _ops.ada_layer_norm(x, shift, scale, eps)
        ctx.save_for_backward(x, scale, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _wanted(ctx, *_ops.ada_layer_norm_backward(walkable(dy), *ctx.saved_tensors), None)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gate):
        ctx.save_for_backward(y, gate)
        return _ops.gated_residual(x, y, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, dresidual):
        return _wanted(ctx, dresidual, *_branch_gradients(ctx, dresidual))


def _branch_gradients(ctx: Any, dresidual: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(dy, dgate) of x + gate y, whose dx is dresidual itself."""
    if not any(ctx.needs_input_grad[1:3]):
        return None, None
    y, gate = ctx.saved_tensors[:2]
    return _ops.gated_residual_backward(walkable(dresidual), y, gate)


class _GatedResidualAdaLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gate, shift, scale, eps):
        ctx.set_materialize_grads(False)  # an output that is not used costs nothing
        residual, normed, mean, rstd = _ops.gated_residual_ada_layer_norm(
            x, y, gate, shift, scale, eps
        )
        ctx.save_for_backward(y, gate, residual, scale, mean, rstd)
        return residual, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, dresidual, dnormed):
        if dnormed is None and dresidual is None:
            return (None,) * 6
        if dnormed is None:
            branch = _branch_gradients(ctx, dresidual)
            return _wanted(ctx, dresidual, *branch, None, None, None)
        y, gate, residual, scale, mean, rstd = ctx.saved_tensors
        gradients = _ops.gated_residual_ada_layer_norm_backward(
            None if dresidual is None else walkable(dresidual),
            walkable(dnormed),
            *(residual, y, gate, scale, mean, rstd),
        )
        return _wanted(ctx, *gradients, None)


def _cost(*tensors: Tensor | None, outputs: int = 1, **_: Any) -> int:
    given = [t for t in tensors if t is not None]
    return nbytes(*given, *[given[0]] * outputs)


# --- Public functions -----------------------------------------------------------------------------


@operator(reference=rms_norm_ref, raw=("rms_norm", "rms_norm_backward"), cost=_cost)
def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Args:
        x: [..., D], floating.
        weight: [D], any floating dtype (float64 only beside float64), or None.
        eps: added to the mean of squares, at least 0.

    Returns:
        Like x, contiguous.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, eps.

    As torch.nn.functional.rms_norm over one dimension.
    """
    check_x("rms_norm", x, 1, eps)
    if weight is not None:
        _checks.tensor("rms_norm", "weight", weight, (1,))
        check_beside("rms_norm", "weight", weight, x)
        if weight.shape[0] != x.shape[-1]:
            _checks.fail("rms_norm", "weight", f"[{x.shape[-1]}]", list(weight.shape))
        weight = weight.contiguous()
    x = x.contiguous()
    if differentiable(x, *(() if weight is None else (weight,))):
        return _RMSNorm.apply(x, weight, float(eps))
    return _ops.rms_norm(x, weight, float(eps))[0]


@operator(
    reference=ada_layer_norm_ref, raw=("ada_layer_norm", "ada_layer_norm_backward"), cost=_cost
)
def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm without weights over the last dimension, then times (1 + scale) plus shift.

    Args:
        x: [B, ..., D], floating; commonly [B, T, D].
        shift, scale: both [B, D], or both like x; of one floating dtype, which may differ from x's
            (float64 only beside float64). Chunks of one tensor are read where they lie.
        eps: added to the variance, at least 0.

    Returns:
        Like x, contiguous.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, eps.

    Source: DiT's modulate(norm(x), shift, scale), arXiv 2212.09748.
    """
    check_x("ada_layer_norm", x, 2, eps)
    check_modulation("ada_layer_norm", x, shift=shift, scale=scale)
    x, shift, scale = walkable(x), walkable(shift), walkable(scale)
    if differentiable(x, shift, scale):
        return _AdaLayerNorm.apply(x, shift, scale, float(eps))
    return _ops.ada_layer_norm(x, shift, scale, float(eps))[0]


@operator(
    reference=gated_residual_ref, raw=("gated_residual", "gated_residual_backward"), cost=_cost
)
def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y.

    Args:
        x: [B, ..., D], floating; commonly [B, T, D].
        y: like x; its dtype may be narrower, as a branch under autocast has it.
        gate: [B, D] or like x, any floating dtype (float64 only beside float64).

    Returns:
        Like x, contiguous.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices.
    """
    check_x("gated_residual", x, 2, 0)
    check_branch("gated_residual", x, y)
    check_modulation("gated_residual", x, gate=gate)
    x, y, gate = walkable(x), walkable(y), walkable(gate)
    if differentiable(x, y, gate):
        return _GatedResidual.apply(x, y, gate)
    return _ops.gated_residual(x, y, gate)


@operator(
    reference=gated_residual_ada_layer_norm_ref,
    raw=("gated_residual_ada_layer_norm", "gated_residual_ada_layer_norm_backward"),
    cost=lambda *tensors, **_: _cost(*tensors, outputs=2),
)
def gated_residual_ada_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`gated_residual` and `ada_layer_norm` of it in one pass, equal to the two one by one.

    Args:
        x, y: as for `gated_residual`.
        gate, shift, scale: all [B, D], or all like x; of one dtype, as for `ada_layer_norm`.
        eps: added to the variance, at least 0.

    Returns:
        (x + gate y, its modulated norm), both like x, contiguous.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, eps.
    """
    op = "gated_residual_ada_layer_norm"
    check_x(op, x, 2, eps)
    check_branch(op, x, y)
    check_modulation(op, x, gate=gate, shift=shift, scale=scale)
    x, y, gate, shift, scale = (walkable(v) for v in (x, y, gate, shift, scale))
    if differentiable(x, y, gate, shift, scale):
        return _GatedResidualAdaLayerNorm.apply(x, y, gate, shift, scale, float(eps))
    return _ops.gated_residual_ada_layer_norm(x, y, gate, shift, scale, float(eps))[:2]
