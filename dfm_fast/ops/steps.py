r"""One step of an ODE solver for all levels of a pyramid at once, with classifier-free guidance.

    v_s = u_s + w_s (c_s - u_s)        guided velocity: c conditional, u unconditional, w the scale
    cfg_euler_step     y_s = x_s + dt_s v_s
    heun_step          y_s = (x_s + p_s + dt_s v_s) / 2        p = the Euler step from x, v at p

(Ho & Salimans 2022; DFM, arXiv 2506.19839, §3.3: the same w on every active level.) heun_step is
x + dt (v(x) + v(p)) / 2, Heun's second-order step, without v(x) having been kept.

dt and w may be tables [K, L] whose row is chosen on the device by `step`, an int64 scalar: a CUDA
graph replays with the next row. In float32 (float64 for float64), rounded once to x's dtype. Saved
for backward: the velocities. Bytes moved at least: every x, velocity and output once.
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
from dfm_fast.ops._layouts import dense, empty_in, lay_out, memory_format
from dfm_fast.ops.pyramids import nbytes

_ops = torch.ops.dfm_fast
Velocities = Sequence[Tensor | None]

# --- References ----------------------------------------------------------------------------------


def _entry(table: Tensor, step: Tensor | None, column: int) -> Tensor:
    """table [K, L] -> a scalar of the chosen row."""
    row = table[0] if step is None else table.index_select(0, step.view(1))[0]
    return row[column]


def _guided(
    cond: Tensor, uncond: Tensor | None, scale: Tensor | float, dtype: torch.dtype
) -> Tensor:
    cond = cond.to(dtype)
    if uncond is None:
        return cond
    uncond = uncond.to(dtype)
    return uncond + scale * (cond - uncond)


def _scalars(
    dt: Tensor, cfg_scale: Tensor | None, scale: float, step: Tensor | None, column: int
) -> tuple[Tensor, Tensor | float]:
    w = scale if cfg_scale is None else _entry(cfg_scale, step, column)
    return _entry(dt, step, column), w


def _advance(
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
    """Both steps; `predicted` is empty for Euler's. Level i is column columns[i] of the tables."""
    out = []
    for i, column in enumerate(columns):
        dtype = torch.promote_types(x[i].dtype, torch.float32)
        h, w = _scalars(dt.to(dtype), cfg_scale, scale, step, column)
        change = h * _guided(v_cond[i], v_uncond[i] if v_uncond else None, w, dtype)
        y = x[i].to(dtype)
        y = (y + predicted[i].to(dtype) + change) / 2 if predicted else y + change
        y = y if mask is None else torch.where(mask[column], y, x[i].to(dtype))
        y = y.to(x[i].dtype)
        out.append(lay_out(y.clone() if y is x[i] else y, memory_format(x[i])))
    return out


def _cfg_euler_step(x: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return _advance(x, [], *rest)


def _table(value: Tensor) -> Tensor:
    return value.unsqueeze(0) if value.ndim == 1 else value


def _reference(
    x: Sequence[Tensor],
    predicted: Sequence[Tensor],
    v_cond: Velocities,
    v_uncond: Velocities | None,
    dt: Tensor,
    cfg_scale: float | Tensor = 1.0,
    active: Any = None,
    step: Tensor | None = None,
) -> list[Tensor]:
    columns, mask = _active_columns(active, v_cond)
    table, scale = (cfg_scale, 1.0) if isinstance(cfg_scale, Tensor) else (None, cfg_scale)
    lists: tuple[Sequence[Any] | None, ...] = (x, predicted, v_cond, v_uncond)
    x_, p_, c_, u_ = ([v[i] for i in columns] if v else [] for v in lists)
    table = None if table is None else _table(table)
    y = _advance(x_, p_, c_, u_, _table(dt), table, scale, mask, step, columns)
    return _merge(x, y, columns)


def cfg_euler_step_ref(
    x: Sequence[Tensor],
    v_cond: Velocities,
    v_uncond: Velocities | None,
    dt: Tensor,
    **options: Any,
) -> list[Tensor]:
    """Defines `cfg_euler_step`."""
    return _reference(x, [], v_cond, v_uncond, dt, **options)


def heun_step_ref(
    x: Sequence[Tensor],
    predicted: Sequence[Tensor],
    v_cond: Velocities,
    v_uncond: Velocities | None,
    dt: Tensor,
    **options: Any,
) -> list[Tensor]:
    """Defines `heun_step`."""
    return _reference(x, predicted, v_cond, v_uncond, dt, **options)


def _active_columns(active: Any, v_cond: Velocities) -> tuple[list[int], Tensor | None]:
    """(levels to compute, mask [L] or None)."""
    present = [i for i, v in enumerate(v_cond) if v is not None]
    if active is None or isinstance(active, Tensor):
        return present, active
    return [i for i in present if active[i]], None


def _merge(x: Sequence[Tensor], y: Sequence[Tensor], columns: Sequence[int]) -> list[Tensor]:
    """y in the places of `columns`, x itself elsewhere."""
    out = list(x)
    for i, value in zip(columns, y, strict=True):
        out[i] = value
    return out


# --- Registration ---------------------------------------------------------------------------------


def _fake(x: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [empty_in(memory_format(v), v, v.shape) for v in x]


_REST = (
    "Tensor[] v_cond, Tensor[] v_uncond, Tensor dt, Tensor? cfg_scale, float scale, Tensor? mask, "
    "Tensor? step, int[] columns) -> Tensor[]"
)
define(
    f"cfg_euler_step(Tensor[] x, {_REST}",
    reference=_cfg_euler_step,
    fake=_fake,
    kernel="steps:cfg_euler_step",
    flops=lambda x, c, u, *_: (5 if u else 2) * sum(map(math.prod, x)),
)
define(
    f"heun_step(Tensor[] x, Tensor[] predicted, {_REST}",
    reference=_advance,
    fake=_fake,
    kernel="steps:heun_step",
    flops=lambda x, p, c, u, *_: (7 if u else 4) * sum(map(math.prod, x)),
)

# --- Gradients ------------------------------------------------------------------------------------


class _Step(torch.autograd.Function):
    """tensors: x, predicted (Heun), v_cond, v_uncond (guidance), each of len(columns)."""

    @staticmethod
    def forward(ctx, dt, cfg_scale, scale, mask, step, columns, heun, *tensors):
        ctx.save_for_backward(dt, cfg_scale, mask, step, *tensors[(1 + heun) * len(columns) :])
        ctx.rest = scale, columns, heun
        ctx.formats = [(x.dtype, memory_format(x)) for x in tensors]
        groups = _groups(tensors, len(columns), heun)
        rest = dt, cfg_scale, scale, mask, step, columns
        if heun:
            return tuple(_ops.heun_step(*groups, *rest))
        return tuple(_ops.cfg_euler_step(groups[0], *groups[2:], *rest))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        dt, cfg_scale, mask, step, *velocities = ctx.saved_tensors
        scale, columns, heun = ctx.rest
        n, guided = len(columns), len(velocities) > len(columns)
        dx, dcond, duncond = [], [], []
        ddt, dscale = torch.zeros_like(dt), None if cfg_scale is None else torch.zeros_like(dt)
        for i, column in enumerate(columns):
            wide = torch.promote_types(grads[i].dtype, torch.float32)
            h, w = _scalars(dt.to(wide), cfg_scale, scale, step, column)
            dy = grads[i].to(wide) / (2 if heun else 1)
            still = dy * 0 if mask is None else torch.where(mask[column], 0, grads[i].to(wide))
            dy = dy if mask is None else torch.where(mask[column], dy, 0)
            dx.append([dy + still, dy])
            cond, uncond = velocities[i], velocities[n + i] if guided else None
            v = _guided(cond, uncond, w, wide)
            _scatter(ddt, step, column, (dy * v).sum(dtype=torch.float64))
            dcond.append(h * dy * w if guided else h * dy)
            if guided:
                duncond.append(h * dy * (1 - w))
                if dscale is not None and uncond is not None:
                    slope = (dy * (cond.to(wide) - uncond.to(wide))).sum(dtype=torch.float64) * h
                    _scatter(dscale, step, column, slope)
        given = [d[0] for d in dx] + ([d[1] for d in dx] if heun else []) + dcond + duncond
        given = [
            lay_out(g.to(dtype), layout)
            for g, (dtype, layout) in zip(given, ctx.formats, strict=True)
        ]
        return ddt, dscale, *[None] * 5, *given


def _groups(tensors: Sequence[Tensor], n: int, heun: bool) -> list[list[Tensor]]:
    """[x, predicted, v_cond, v_uncond], empty where there is none."""
    parts = [list(tensors[i : i + n]) for i in range(0, len(tensors), n)]
    if not heun:
        parts.insert(1, [])
    return parts + [[] for _ in range(4 - len(parts))]


def _scatter(table: Tensor, step: Tensor | None, column: int, value: Tensor) -> None:
    """Write into the row that was chosen."""
    row = torch.zeros(1, dtype=torch.int64, device=table.device) if step is None else step.view(1)
    table[:, column].index_copy_(0, row, value.to(table.dtype).view(1))


# --- Arguments ------------------------------------------------------------------------------------


def _check_levels(op: str, name: str, levels: Any, x: Sequence[Tensor], holes: bool) -> None:
    if not isinstance(levels, list | tuple):
        _checks.fail(op, name, "a list or tuple of tensors", type(levels).__name__, TypeError)
    if len(levels) != len(x):
        _checks.fail(op, name, f"{len(x)} levels like x", len(levels))
    for s, level in enumerate(levels):
        if level is None and holes:
            continue
        _checks.tensor(op, f"{name}[{s}]", level, range(1, 65))
        if level.shape != x[s].shape:
            _checks.fail(op, f"{name}[{s}]", f"shape {list(x[s].shape)}", list(level.shape))
        if level.device != x[0].device:
            _checks.fail(op, f"{name}[{s}]", f"device {x[0].device} like x", level.device)


def _check_table(op: str, name: str, table: Any, x: Sequence[Tensor], step: Any) -> Tensor:
    """[L] or, with a step, [K, L] -> [K, L]."""
    _checks.tensor(op, name, table, (1, 2))
    if table.device != x[0].device:
        _checks.fail(op, name, f"device {x[0].device} like x", table.device)
    if table.shape[-1] != len(x):
        _checks.fail(op, name, f"{len(x)} columns, one per level", list(table.shape))
    if table.ndim == 2 and (step is None or table.shape[0] == 0):
        expected = f"[{len(x)}], or [K, {len(x)}] together with a step"
        _checks.fail(op, name, expected, list(table.shape))
    return _table(table).contiguous()


def _check_step(op: str, step: Any, x: Sequence[Tensor]) -> None:
    if step is None:
        return
    if not isinstance(step, Tensor) or step.dtype != torch.int64 or step.numel() != 1:
        got = f"{step.dtype} {list(step.shape)}" if isinstance(step, Tensor) else repr(step)
        _checks.fail(op, "step", "an int64 tensor of one element", got, TypeError)
    if step.device != x[0].device:
        _checks.fail(op, "step", f"device {x[0].device} like x", step.device)


def _check_active(op: str, active: Any, v_cond: Velocities, x: Sequence[Tensor]) -> None:
    if isinstance(active, Tensor):
        if active.dtype != torch.bool or active.shape != (len(x),) or active.device != x[0].device:
            got = f"{active.dtype} {list(active.shape)} on {active.device}"
            _checks.fail(op, "active", f"a bool tensor [{len(x)}] on {x[0].device}", got)
        return
    if active is None:
        return
    if not isinstance(active, list | tuple) or not all(isinstance(a, bool) for a in active):
        _checks.fail(op, "active", f"bools, or a bool tensor [{len(x)}]", repr(active), TypeError)
    if len(active) != len(x):
        _checks.fail(op, "active", f"{len(x)} levels", len(active))
    for s, on in enumerate(active):
        if on and v_cond[s] is None:
            _checks.fail(op, f"v_cond[{s}]", "a tensor, as the level is active", None, TypeError)


def _run(
    op: str,
    x: Sequence[Tensor],
    predicted: Sequence[Tensor] | None,
    v_cond: Velocities,
    v_uncond: Velocities | None,
    dt: Tensor,
    cfg_scale: float | Tensor,
    active: Any,
    step: Tensor | None,
) -> list[Tensor]:
    if not isinstance(x, list | tuple) or not x:
        _checks.fail(op, "x", "a list or tuple of tensors", repr(x), TypeError)
    _checks.tensor(op, "x[0]", x[0], range(1, 65))
    for s, level in enumerate(x):
        _checks.tensor(op, f"x[{s}]", level, range(1, 65))
        _checks.like(op, f"x[{s}]", level, "x[0]", x[0])
    _check_levels(op, "v_cond", v_cond, x, holes=True)
    if v_uncond is not None:
        _check_levels(op, "v_uncond", v_uncond, x, holes=True)
    if predicted is not None:
        _check_levels(op, "predicted", predicted, x, holes=False)
    _check_step(op, step, x)
    _check_active(op, active, v_cond, x)
    dt = _check_table(op, "dt", dt, x, step)
    table, scale = None, 1.0
    if isinstance(cfg_scale, Tensor):
        table = _check_table(op, "cfg_scale", cfg_scale, x, step).to(dt.dtype)
        rows = {len(table), len(dt)} - {1}
        if len(rows) > 1:
            _checks.fail(op, "cfg_scale", f"{len(dt)} rows like dt", list(table.shape))
        table, dt = (v.expand(max(rows, default=1), -1).contiguous() for v in (table, dt))
    elif isinstance(cfg_scale, int | float):
        scale = float(cfg_scale)
    else:
        _checks.fail(op, "cfg_scale", "a number or a tensor", type(cfg_scale).__name__, TypeError)
    if v_uncond is None and (table is not None or scale != 1):
        _checks.fail(op, "v_uncond", "velocities, as cfg_scale is not 1", None)
    columns, mask = _active_columns(active, v_cond)
    groups = _pick(op, (x, predicted, v_cond, v_uncond), columns)
    if not columns:
        return list(x)
    rest = dt, table, scale, mask, step, columns
    tensors = [t for group in groups for t in group]
    if differentiable(dt, *tensors, *(() if table is None else (table,))):
        y = _Step.apply(*rest, predicted is not None, *tensors)
    elif predicted is None:
        y = _ops.cfg_euler_step(groups[0], *groups[2:], *rest)
    else:
        y = _ops.heun_step(*groups, *rest)
    return _merge(x, y, columns)


def _pick(op: str, lists: Sequence[Any], columns: Sequence[int]) -> list[list[Tensor]]:
    """The chosen levels of each list, in the memory format of x's."""
    x: Sequence[Tensor] = lists[0]
    groups: list[list[Tensor]] = []
    for given in lists:
        groups.append([])
        for i in columns if given is not None else ():
            if given[i] is None:
                _checks.fail(op, f"v_uncond[{i}]", "a tensor, as v_cond has one", None, TypeError)
            groups[-1].append(dense(given[i], memory_format(x[i])))
    return groups


def _cost(*args: Any, cfg_scale: Any = 1.0, step: Any = None, **_: Any) -> int:
    lists, dt = args[:-1], args[-1]
    read = [t for v in lists if v is not None for t in v if t is not None]
    tables = [t for t in (dt, cfg_scale, step) if isinstance(t, Tensor)]
    return nbytes(*read, *lists[0], *tables)


# --- Public functions -----------------------------------------------------------------------------


@operator(reference=cfg_euler_step_ref, raw=("cfg_euler_step",), cost=_cost)
def cfg_euler_step(
    x: Sequence[Tensor],
    v_cond: Velocities,
    v_uncond: Velocities | None,
    dt: Tensor,
    *,
    cfg_scale: float | Tensor = 1.0,
    active: Sequence[bool] | Tensor | None = None,
    step: Tensor | None = None,
) -> list[Tensor]:
    """x_s + dt_s (u_s + w_s (c_s - u_s)) for all levels in one launch.

    Args:
        x: L states [N, ...] of one dtype, coarse to fine.
        v_cond: L velocities like x, any floating dtype; None for a level that is not active.
        v_uncond: likewise, or None for no guidance.
        dt: [L], or a table [K, L] whose row is `step`, floating, on x's device.
        cfg_scale: w: a number, [L], or a table [K, L].
        active: None (all that have a velocity), L bools, or a bool tensor [L] on x's device.
        step: int64 tensor of one element on x's device; its value is not checked.

    Returns:
        L tensors like x. A level without a velocity, or not active by L bools, is x's own tensor.

    Raises:
        TypeError: dtypes, missing velocities. ValueError: shapes, devices, lengths, or a cfg_scale
            that is not 1 without v_uncond.
    """
    op = "cfg_euler_step"
    return _run(op, x, None, v_cond, v_uncond, dt, cfg_scale, active, step)


@operator(reference=heun_step_ref, raw=("heun_step",), cost=_cost)
def heun_step(
    x: Sequence[Tensor],
    predicted: Sequence[Tensor],
    v_cond: Velocities,
    v_uncond: Velocities | None,
    dt: Tensor,
    *,
    cfg_scale: float | Tensor = 1.0,
    active: Sequence[bool] | Tensor | None = None,
    step: Tensor | None = None,
) -> list[Tensor]:
    """(x_s + predicted_s + dt_s v_s) / 2: the second half of Heun's step, all levels in one launch.

    Args:
        predicted: L states like x: `cfg_euler_step` from x over the same dt.
        v_cond, v_uncond: velocities at `predicted`.
        x, dt, cfg_scale, active, step: as `cfg_euler_step`.

    Returns, raises: as `cfg_euler_step`.
    """
    op = "heun_step"
    return _run(op, x, predicted, v_cond, v_uncond, dt, cfg_scale, active, step)
