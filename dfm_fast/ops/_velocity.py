"""The loss of predicted velocities; the formulas are in `noises`."""

from __future__ import annotations

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
) -> Tensor:
    columns = [x.new_zeros(x.shape[0], dtype=accumulation(x)) for _ in wanted]
    for s, r in _residuals(predictions, x, wanted, *rest):
        columns[s] = where_active(r.square().flatten(1).mean(1), mask, s)
    return torch.stack(columns, 1)


def _velocity_loss_backward(
    grad: Tensor,
    predictions: Sequence[Tensor],
    x: Tensor,
    mask: Tensor | None,
    wanted: Sequence[bool],
    *rest: Any,
) -> list[Tensor]:
    """dG_s = 2 (G_s - v_s) grad[n, s] / (elements of a sample), of the wanted levels."""
    layout, out = memory_format(x), []
    residuals = _residuals(predictions, x, wanted, *rest)
    for (s, r), g in zip(residuals, predictions, strict=True):
        scale = per_sample(grad[:, s].to(r.dtype), r) * (2 / max(1, r[:1].numel()))
        out.append(lay_out(where_active(r * scale, mask, s).to(g.dtype), layout))
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
    return _velocity_loss(given, x, mask, wanted, *split(seed), offsets, *options)


# --- Registration ---------------------------------------------------------------------------------


def _loss_fake(predictions: Any, x: Tensor, mask: Any, wanted: Any, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], len(wanted)), dtype=accumulation(x))


def _loss_backward_fake(grad: Any, predictions: Any, x: Tensor, *_: Any) -> list[Tensor]:
    return [empty_in(memory_format(x), g, g.shape) for g in predictions]


define(
    f"velocity_loss(Tensor[] predictions, Tensor x, Tensor? mask, bool[] wanted, {STREAM}, "
    f"int[] offsets, {PYRAMID}) -> Tensor",
    reference=_velocity_loss,
    fake=_loss_fake,
    kernel="noises:velocity_loss",
    flops=lambda p, x, mask, wanted, state, seed, offsets, filter, factor, *_: level_flops(
        x, wanted, filter, factor, NORMAL_FLOPS + 5
    ),
)
define(
    f"velocity_loss_backward(Tensor grad, Tensor[] predictions, Tensor x, Tensor? mask, "
    f"bool[] wanted, {STREAM}, int[] offsets, {PYRAMID}) -> Tensor[]",
    reference=_velocity_loss_backward,
    fake=_loss_backward_fake,
    kernel="noises:velocity_loss_backward",
    flops=lambda g, p, x, mask, wanted, state, seed, offsets, filter, factor, *_: level_flops(
        x, wanted, filter, factor, NORMAL_FLOPS + 4
    ),
)

# --- Gradients ------------------------------------------------------------------------------------


class _VelocityLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, wanted, state, seed, offsets, options, *predictions):
        ctx.save_for_backward(x, mask, state, *predictions)
        ctx.rest = wanted, seed, offsets, options
        stream = state, seed, offsets
        return _ops.velocity_loss(list(predictions), x, mask, wanted, *stream, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mask, state, *predictions = ctx.saved_tensors
        wanted, seed, offsets, options = ctx.rest
        filter, factor, gains = options
        stream = state, seed, offsets
        grad = grad.contiguous()
        dg = _ops.velocity_loss_backward(grad, predictions, x, mask, wanted, *stream, *options)
        dx = None
        if ctx.needs_input_grad[0]:  # v_s = eps - gain X_s: what G_s gets, times the gain
            given, levels = iter(dg), []
            for s, shape in enumerate(level_shapes(x.shape, len(wanted), filter, factor)):
                g = next(given) * gains[s] if wanted[s] else x.new_zeros(shape)
                levels.append(lay_out(g.to(x.dtype), memory_format(x)))
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
    return _ops.velocity_loss(given, *arguments, *options)


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

    The targets v_s = eps_s - X_s are made again from x and the seed; nothing was stored.

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
