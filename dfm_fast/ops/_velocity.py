"""The loss of predicted velocities; the formulas are in `noises`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfm_fast import _checks
from dfm_fast._library import Shard, define, differentiable, operator
from dfm_fast.ops import pyramids
from dfm_fast.ops._layouts import dense, empty_in, lay_out, memory_format
from dfm_fast.ops._philox import normals_ref, seed_of
from dfm_fast.ops._scales import (
    NORMAL_FLOPS,
    PYRAMID,
    STREAM,
    accumulation,
    build_backward,
    check_active,
    check_decomposition,
    check_std,
    gains_of,
    level_flops,
    level_offsets,
    level_shapes,
    levels_ref,
    per_sample,
    split,
    wanted_levels,
    where_active,
)

_ops = torch.ops.dfm_fast

# --- References ----------------------------------------------------------------------------------


def _residuals(
    predictions: Sequence[Tensor],
    x: Tensor,
    wanted: Sequence[bool],
    state: Tensor | None,
    seed: int,
    offsets: Sequence[int],
    filter: str,
    factor: Sequence[int],
    gains: Sequence[float],
) -> list[tuple[int, Tensor]]:
    """(s, G_s - v_s) of the wanted levels."""
    given = iter(predictions)
    return [
        (s, next(given).to(level.dtype) - (normals_ref(level.shape, state, seed, o, x) - level))
        for s, (level, o) in enumerate(
            zip(levels_ref(x, len(wanted), filter, factor, gains), offsets, strict=True)
        )
        if wanted[s]
    ]


def _velocity_loss(
    predictions: Sequence[Tensor],
    x: Tensor,
    mask: Tensor | None,
    wanted: Sequence[bool],
    *rest: Any,
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The means of squares, and with `save` what they are of."""
    columns = [x.new_zeros(x.shape[0], dtype=accumulation(x)) for _ in wanted]
    saved, layout = [], memory_format(x)
    for s, r in _residuals(predictions, x, wanted, *rest):
        columns[s] = where_active(r.square().flatten(1).mean(1), mask, s)
        if save:
            saved.append(lay_out(where_active(r, mask, s), layout))
    return torch.stack(columns, 1), saved


def _velocity_loss_backward(
    grad: Tensor,
    residuals: Sequence[Tensor],
    mask: Tensor | None,
    wanted: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """dG_s = 2 (G_s - v_s) grad[n, s] / (elements of a sample), of the wanted levels."""
    out, levels = [], [s for s, w in enumerate(wanted) if w]
    for s, r in zip(levels, residuals, strict=True):
        scale = per_sample(grad[:, s].to(r.dtype), r) * (2 / max(1, r[:1].numel()))
        out.append(lay_out(where_active(r * scale, mask, s).to(dtype), memory_format(r)))
    return out


def velocity_loss_ref(
    predictions: Sequence[Tensor | None],
    x: Tensor,
    seed: int | Tensor,
    *,
    offset: int = 0,
    active: Sequence[bool] | Tensor | None = None,
    filter: str = "bilinear",
    factor: Sequence[int] = (2, 2),
    std: Sequence[float] | None = None,
) -> Tensor:
    """Predictions, coarse to fine, and x -> [N, L]; defines `velocity_loss`."""
    count = len(predictions)
    wanted, mask = wanted_levels(active, count)
    wanted = [w and g is not None for w, g in zip(wanted, predictions, strict=True)]
    offsets = level_offsets(level_shapes(x.shape, count, filter, factor), offset)
    given = [g for g, w in zip(predictions, wanted, strict=True) if w and g is not None]
    options = filter, factor, gains_of(std, count)
    rest = *split(seed), offsets, *options
    return _velocity_loss(given, x, mask, wanted, *rest, save=False)[0]


# --- Registration ---------------------------------------------------------------------------------


def _loss_fake(
    predictions: Sequence[Tensor], x: Tensor, mask: Any, wanted: Any, *_: Any, save: bool
) -> tuple[Tensor, list[Tensor]]:
    loss = x.new_empty((x.shape[0], len(wanted)), dtype=accumulation(x))
    saved = [empty_in(memory_format(x), loss, g.shape) for g in predictions] if save else []
    return loss, saved


def _loss_backward_fake(
    grad: Any, residuals: Sequence[Tensor], mask: Any, wanted: Any, dtype: torch.dtype
) -> list[Tensor]:
    return [empty_in(memory_format(r), r.to(dtype), r.shape) for r in residuals]


define(
    f"velocity_loss(Tensor[] predictions, Tensor x, Tensor? mask, bool[] wanted, {STREAM}, "
    f"int[] offsets, {PYRAMID}, *, bool save) -> (Tensor, Tensor[])",
    reference=_velocity_loss,
    fake=_loss_fake,
    kernel="noises:velocity_loss",
    flops=lambda p, x, mask, wanted, state, seed, offsets, filter, factor, *_, **__: level_flops(
        x, wanted, filter, factor, NORMAL_FLOPS + 5
    ),
)
define(
    "velocity_loss_backward(Tensor grad, Tensor[] residuals, Tensor? mask, bool[] wanted, "
    "ScalarType dtype) -> Tensor[]",
    reference=_velocity_loss_backward,
    fake=_loss_backward_fake,
    kernel="noises:velocity_loss_backward",
    flops=lambda grad, residuals, *_: sum(map(math.prod, residuals)),
)

# --- Gradients ------------------------------------------------------------------------------------


class _VelocityLoss(torch.autograd.Function):
    """Keeps G_s - v_s in place of G_s and x: a training step makes its noise once."""

    @staticmethod
    def forward(ctx, x, mask, wanted, state, seed, offsets, options, *predictions):
        given = list(predictions), x, mask, wanted, state, seed, offsets
        loss, residuals = _ops.velocity_loss(*given, *options, save=True)
        ctx.save_for_backward(mask, *residuals)
        ctx.rest = wanted, options, [g.dtype for g in predictions]
        ctx.x = x.shape, x.dtype, memory_format(x)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        mask, *residuals = ctx.saved_tensors
        wanted, (filter, factor, gains), dtypes = ctx.rest
        dtype = dtypes[0] if len(set(dtypes)) == 1 else grad.dtype
        dg = _ops.velocity_loss_backward(grad.contiguous(), residuals, mask, wanted, dtype)
        dg = [g.to(own) for g, own in zip(dg, dtypes, strict=True)]
        dx = None
        if ctx.needs_input_grad[0]:  # v_s = eps - gain X_s: what G_s gets, times the gain
            (shape, dtype, layout), given, levels = ctx.x, iter(dg), []
            for s, sizes in enumerate(level_shapes(shape, len(wanted), filter, factor)):
                g = next(given) * gains[s] if wanted[s] else grad.new_zeros(sizes)
                levels.append(lay_out(g.to(dtype), layout))
            dx = build_backward(levels, filter, factor)
        return dx, *[None] * 6, *dg


# --- Public function ------------------------------------------------------------------------------


def velocity_loss_shard(
    predictions: Sequence[Tensor | None],
    x: Tensor,
    seed: int | Tensor,
    *,
    offset: int = 0,
    active: Sequence[bool] | Tensor | None = None,
    filter: str = "bilinear",
    factor: int | Sequence[int] = 2,
    std: Sequence[float] | None = None,
    shard: Shard | None = None,
) -> Tensor:
    op = "velocity_loss"
    _checks.tensor(op, "x", x, (4, 5))
    if not isinstance(predictions, list | tuple):
        got = type(predictions).__name__
        _checks.fail(op, "predictions", "a list or tuple of tensors", got, TypeError)
    count = _checks.integer(op, "predictions", len(predictions), 1)
    factor = check_decomposition(op, x, count, filter, factor)
    check_active(op, active, x, count)
    wanted, mask = wanted_levels(active, count)
    shapes = level_shapes(x.shape, count, filter, factor)
    wanted = _check_predictions(op, predictions, x, shapes, active, wanted)
    gains = check_std(op, std, count)
    if seed is None:
        _checks.fail(op, "seed", "the seed that the noise was made with", None, TypeError)
    state, seed, offset = seed_of(op, seed, offset, x.device, shard)
    offsets = level_offsets(shapes, offset, shard)
    x = dense(x)
    layout = memory_format(x)
    given = [dense(g, layout) for g, w in zip(predictions, wanted, strict=True) if w]
    arguments, options = (x, mask, wanted, state, seed, offsets), (filter, factor, gains)
    if differentiable(x, *given):
        return _VelocityLoss.apply(*arguments, options, *given)
    return _ops.velocity_loss(given, *arguments, *options, save=False)[0]


def _check_predictions(
    op: str,
    predictions: Sequence[Tensor | None],
    x: Tensor,
    shapes: Sequence[tuple[int, ...]],
    active: Any,
    wanted: Sequence[bool],
) -> list[bool]:
    """Levels that count: active, and predicted."""
    chosen = not (active is None or isinstance(active, Tensor))
    for s, (g, shape) in enumerate(zip(predictions, shapes, strict=True)):
        name = f"predictions[{s}]"
        if g is None:
            if chosen and wanted[s]:
                _checks.fail(op, name, "a tensor, as the level is active", None, TypeError)
            continue
        _checks.tensor(op, name, g, (x.ndim,))
        if g.shape != shape:
            _checks.fail(op, name, f"shape {list(shape)}", list(g.shape))
        if g.device != x.device:
            _checks.fail(op, name, f"device {x.device} like x", g.device)
    return [w and g is not None for w, g in zip(wanted, predictions, strict=True)]


@operator(
    reference=velocity_loss_ref,
    raw=("velocity_loss", "velocity_loss_backward"),
    cost=lambda predictions, x, *_, **__: (
        pyramids.nbytes(x, *(g for g in predictions if g is not None))
        + x.shape[0] * len(predictions) * accumulation(x).itemsize
    ),
    on_shard=velocity_loss_shard,
)
def velocity_loss(
    predictions: Sequence[Tensor | None],
    x: Tensor,
    seed: int | Tensor,
    *,
    offset: int = 0,
    active: Sequence[bool] | Tensor | None = None,
    filter: str = "bilinear",
    factor: int | Sequence[int] = 2,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Mean squared error of predicted velocities, per sample and level: mean (G_s - v_s)^2.

    The targets v_s = eps_s - X_s are made again from x and the seed; nothing was stored. For
    gradients autograd keeps G_s - v_s, in float32, and neither G_s nor x.

    Args:
        predictions: L tensors G_s like the levels of x, coarse to fine, any floating dtype; None
            for a level that is not active.
        x: the data that `pyramid_add_noise` was given.
        seed, offset, filter, factor, std: as given to it; an int or an int64 tensor [2].
        active: None (all that are predicted), L bools, or a bool tensor [N, L].

    Returns:
        [N, L] in float32 (float64 for float64 x); 0 where a level is not active.

    Raises:
        TypeError: dtypes, a missing prediction. ValueError: shapes, devices, filter, factor.

    Gradients of predictions and x. DFM (arXiv 2506.19839) §3.
    """
    return velocity_loss_shard(
        predictions, x, seed, offset=offset, active=active, filter=filter, factor=factor, std=std
    )
