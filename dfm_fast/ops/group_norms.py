r"""Group normalisation with SiLU and the shift of a time embedding, over channels of maps.

    u = x + shift_c                                       never written
    y = silu(weight_c (u - m_g) / sqrt(var_g + eps) + bias_c) = silu(a_c (x - k_c) + b_c)

(Wu & He 2018, arXiv 1803.08494.) x [N, C, *] has P pixels, group g has C / G channels. Statistics
are taken per channel, centred: mean_c and M2_c = sum (x - mean_c)². A shift moves a channel's mean
and leaves its M2; then m_g = mean of (mean_c + shift_c) over the group and
var_g P C / G = sum M2_c + P sum (mean_c + shift_c - m_g)². So a producer of x can hand its
statistics on (`channel_statistics`), and what is left is one pass: a_c (x - k_c) + b_c.

With z = a (x - k) + b, dz = dy silu'(z), h = (u - m) / sqrt(var + eps), and the sums of a channel
s = sum dz, q = sum dz h:

    dx = rstd (weight dz - A - h B)       A, B = means of weight dz, weight dz h over a group
    dweight = sum_n q       dbias = sum_n s
    dshift = sum over pixels of dx = rstd (weight s - P A - P B mean of h)

In float32 (float64 for float64), rounded once. Saved for backward: x, weight, bias, shift and the
channel statistics. Bytes an element at least: forward 2 (read, write), backward 3 of the dtype's
size (x and dy read, dx written); x is read again where it no longer lies in a cache.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dfm_fast import _checks
from dfm_fast._library import define, differentiable, operator
from dfm_fast.ops._layouts import dense, empty_in, lay_out, memory_format
from dfm_fast.ops.pyramids import nbytes

_ops = torch.ops.dfm_fast
ACTIVATIONS = ("silu", "none")


class ChannelStatistics(NamedTuple):
    """Of every channel of a map [N, C, *]: what a producer hands on to the norm that follows."""

    count: int  # type: ignore[assignment]  # pixels P; tuples have a method so called
    mean: Tensor  # [N, C], float32 (float64 of float64)
    m2: Tensor  # [N, C]: sum over pixels of (x - mean)²


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _pixels(x: Tensor) -> int:
    return math.prod(x.shape[2:])


# --- References ----------------------------------------------------------------------------------


def channel_statistics_ref(x: Tensor) -> ChannelStatistics:
    """Defines `channel_statistics`: two passes."""
    wide = x.to(wide_dtype(x)).flatten(2) if x.ndim > 2 else x.to(wide_dtype(x)).unsqueeze(2)
    mean = wide.mean(2)
    return ChannelStatistics(_pixels(x), mean, (wide - mean.unsqueeze(2)).square().sum(2))


def group_norm_silu_ref(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    statistics: ChannelStatistics | None = None,
) -> Tensor:
    """Defines `group_norm_silu`; given statistics are those of x, so they change nothing."""
    u = x.to(wide_dtype(x))
    if shift is not None:
        u = u + of_channels(shift, x)
    groups = u.reshape(x.shape[0], num_groups, -1 if x.numel() else 0)
    centred = groups - groups.mean(2, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(2, keepdim=True) + eps)
    z = (centred * rstd).view(x.shape)
    z = z if weight is None else z * of_channels(weight, x)
    z = z if bias is None else z + of_channels(bias, x)
    z = F.silu(z) if activation == "silu" else z
    return lay_out(z.to(x.dtype), memory_format(x))


def of_channels(v: Tensor, x: Tensor) -> Tensor:
    """[C] or [N, C] in x's wide dtype -> broadcasts to x."""
    return v.to(wide_dtype(x)).reshape(*(v.shape if v.ndim == 2 else (1, -1)), *[1] * (x.ndim - 2))


# --- The step between statistics and maps ---------------------------------------------------------


class GroupAffine(NamedTuple):
    """All [N, C]: z = scale (x - centre) + offset, and h = (x - centre) rstd."""

    scale: Tensor
    offset: Tensor
    centre: Tensor
    rstd: Tensor


def group_affine(
    count: int,
    mean: Tensor,  # [N, C]
    m2: Tensor,  # [N, C]
    num_groups: int,
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    shift: Tensor | None,  # [N, C]
    eps: float,
) -> GroupAffine:
    """Statistics of channels -> what the norm of their groups does to each. The offset has what the
    centre lost when it was rounded, so that a large mean costs no digits."""
    n, c = mean.shape
    size = (n, num_groups, c // num_groups)
    given, wide = mean.dtype, torch.float64
    moved = mean.to(wide) if shift is None else mean.to(wide) + shift.to(wide)
    m = moved.view(size).mean(2, keepdim=True)
    squares = m2.to(wide).view(size).sum(2, keepdim=True)
    squares = squares + count * (moved.view(size) - m).square().sum(2, keepdim=True)
    rstd = torch.rsqrt(squares / (count * size[2]) + eps).expand(size).reshape(n, c)
    centre = m.expand(size).reshape(n, c)
    centre = centre if shift is None else centre - shift.to(wide)
    scale = rstd if weight is None else rstd * weight.to(wide)
    rounded = centre.to(given)
    offset = -scale * (centre - rounded.to(wide))
    offset = offset if bias is None else offset + bias.to(wide)
    return GroupAffine(scale.to(given), offset.to(given), rounded, rstd.to(given))


# --- Raw operators, in torch ----------------------------------------------------------------------


def _channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return channel_statistics_ref(x)[1:]


def _channel_statistics_backward(dmean: Tensor, dm2: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    centred = x.to(mean.dtype) - of_channels(mean, x)
    dx = of_channels(dmean / _pixels(x), x) + of_channels(2 * dm2, x) * centred
    return lay_out(dx.to(x.dtype), memory_format(x))


def _group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, *none = _fake_forward(x, weight, bias, shift, mean, m2)
    found = none[0], none[1]
    if mean is None or m2 is None:
        mean, m2 = found = _channel_statistics(x)
    affine = group_affine(_pixels(x), mean, m2, num_groups, weight, bias, shift, eps)
    z = (x.to(mean.dtype) - of_channels(affine.centre, x)) * of_channels(affine.scale, x)
    z = z + of_channels(affine.offset, x)
    return y.copy_(F.silu(z) if silu else z), *found


def _group_norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    m2: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, count, axes = mean.dtype, _pixels(x), tuple(range(2, x.ndim))
    affine = group_affine(count, mean, m2, num_groups, weight, bias, shift, eps)
    h = (x.to(wide) - of_channels(affine.centre, x)) * of_channels(affine.rstd, x)
    dz = dy.to(wide)
    if silu:
        z = h if weight is None else h * of_channels(weight, x)
        z = z + of_channels(affine.offset, x)
        sigmoid = z.sigmoid()
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    s, q = (v.sum(axes) if axes else v.clone() for v in (dz, dz * h))  # [N, C]
    w = torch.ones_like(mean) if weight is None else weight.to(wide).expand_as(mean)

    def group_mean(sums: Tensor) -> Tensor:
        sums = (w * sums).view(len(x), num_groups, x.shape[1] // num_groups)
        return (
            (sums.sum(2, keepdim=True) / (sums.shape[2] * count)).expand_as(sums).reshape(s.shape)
        )

    a, b = group_mean(s), group_mean(q)
    mean_h = (mean - affine.centre) * affine.rstd
    dshift = affine.rstd * (w * s - count * a - count * b * mean_h)
    dx = _fake_backward(dy, x, need_dx=need_dx)[0]
    if need_dx:
        dx.copy_(
            of_channels(affine.rstd, x)
            * (of_channels(w, x) * dz - of_channels(a, x) - of_channels(b, x) * h)
        )
    return dx, q.sum(0), s.sum(0), dshift


# --- Registration ---------------------------------------------------------------------------------


def _fake_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[:2], dtype=wide_dtype(x))
    return mean, torch.empty_like(mean)


def _fake_forward(x: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = empty_in(memory_format(x), x, x.shape)
    if given[3] is None:
        return y, *_fake_statistics(x)
    return y, x.new_empty(0, dtype=wide_dtype(x)), x.new_empty(0, dtype=wide_dtype(x))


def _fake_backward(dy: Tensor, x: Tensor, *_: Any, need_dx: bool) -> tuple[Tensor, ...]:
    dx = empty_in(memory_format(x), x, x.shape) if need_dx else x.new_empty(0)
    dshift = x.new_empty(x.shape[:2], dtype=wide_dtype(x))
    return dx, *(dshift.new_empty(x.shape[1]) for _ in range(2)), dshift


define(
    "channel_statistics(Tensor x) -> (Tensor, Tensor)",
    reference=_channel_statistics,
    fake=_fake_statistics,
    kernel="group_norms:channel_statistics",
    flops=lambda x: 4 * math.prod(x),
)
define(
    "channel_statistics_backward(Tensor dmean, Tensor dm2, Tensor x, Tensor mean) -> Tensor",
    reference=_channel_statistics_backward,
    fake=lambda dmean, dm2, x, mean: empty_in(memory_format(x), x, x.shape),
    kernel="group_norms:channel_statistics_backward",
    flops=lambda dmean, dm2, x, mean: 3 * math.prod(x),
)
define(
    "group_norm_silu(Tensor x, Tensor? weight, Tensor? bias, Tensor? shift, Tensor? mean, "
    "Tensor? m2, int num_groups, float eps, bool silu) -> (Tensor, Tensor, Tensor)",
    reference=_group_norm_silu,
    fake=_fake_forward,
    kernel="group_norms:group_norm_silu",
    flops=lambda x, *_: 10 * math.prod(x),
)
define(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? shift, "
    "Tensor mean, Tensor m2, int num_groups, float eps, bool silu, *, bool need_dx) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=_group_norm_silu_backward,
    fake=_fake_backward,
    kernel="group_norms:group_norm_silu_backward",
    flops=lambda dy, x, *_, **__: 20 * math.prod(x),
)

# --- Gradients ------------------------------------------------------------------------------------


class _ChannelStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        mean, m2 = _ops.channel_statistics(x)
        ctx.save_for_backward(x, mean)
        return mean, m2

    @staticmethod
    @once_differentiable
    def backward(ctx, dmean, dm2):
        return _ops.channel_statistics_backward(
            dmean.contiguous(), dm2.contiguous(), *ctx.saved_tensors
        )


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, shift, mean, m2, *rest):
        y, *found = _ops.group_norm_silu(x, weight, bias, shift, mean, m2, *rest)
        statistics = found if mean is None else (mean, m2)
        ctx.save_for_backward(x, weight, bias, shift, *statistics)
        ctx.rest = rest
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad
        dy = dense(dy, memory_format(saved[0]))
        dx, *small = _ops.group_norm_silu_backward(dy, *saved, *ctx.rest, need_dx=needed[0])
        small = [
            g.to(v.dtype) if need else None
            for g, v, need in zip(small, saved[1:4], needed[1:4], strict=True)
        ]
        return dx if needed[0] else None, *small, *[None] * 5


# --- Arguments ------------------------------------------------------------------------------------


def _check_map(op: str, x: Any) -> None:
    _checks.tensor(op, "x", x, range(2, 65))
    if _pixels(x) == 0:
        _checks.fail(op, "x", "at least one pixel", list(x.shape))


def check_vector(op: str, name: str, v: Any, x: Tensor, shape: tuple[int, ...]) -> None:
    _checks.tensor(op, name, v, (len(shape),))
    if v.shape != shape:
        _checks.fail(op, name, f"shape {list(shape)}", list(v.shape))
    if v.device != x.device:
        _checks.fail(op, name, f"device {x.device} like x", v.device)


def check_statistics(op: str, statistics: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, m2), cut off from their gradients: x's is the whole one."""
    if not isinstance(statistics, ChannelStatistics):
        got = type(statistics).__name__
        _checks.fail(op, "statistics", "ChannelStatistics", got, TypeError)
    if statistics.count != _pixels(x):
        _checks.fail(op, "statistics.count", f"{_pixels(x)} pixels of x", statistics.count)
    for name, v in zip(("mean", "m2"), statistics[1:], strict=True):
        check_vector(op, f"statistics.{name}", v, x, (x.shape[0], x.shape[1]))
        if v.dtype != wide_dtype(x):
            _checks.fail(op, f"statistics.{name}", str(wide_dtype(x)), v.dtype, TypeError)
    return statistics.mean.detach().contiguous(), statistics.m2.detach().contiguous()


def _cost(
    x: Tensor,
    num_groups: int,
    *given: Tensor | None,
    shift: Tensor | None = None,
    statistics: ChannelStatistics | None = None,
    **_: Any,
) -> int:
    small = [v for v in (*given, shift, *(statistics or ())[1:]) if v is not None]
    return nbytes(x, x, *small)


# --- Public functions -----------------------------------------------------------------------------


@operator(
    reference=channel_statistics_ref,
    raw=("channel_statistics", "channel_statistics_backward"),
    cost=lambda x: nbytes(x) + 2 * x.shape[0] * x.shape[1] * wide_dtype(x).itemsize,
)
def channel_statistics(x: Tensor) -> ChannelStatistics:
    """Pixel count, mean and centred sum of squares of every channel, in one pass over x.

    Args:
        x: [N, C, *], float32, bfloat16, float16 or float64; contiguous or channels_last.

    Returns:
        ChannelStatistics: count P, mean [N, C] and m2 [N, C] in float32 (float64 of float64),
        exact also where the mean is large: sums are of (x - mean)², never of x². Differentiable;
        but `group_norm_silu` sends no gradient through them, as its own for x has all of it.

    Raises:
        TypeError: not a floating-point tensor. ValueError: fewer than two dimensions, no pixel.
    """
    _check_map("channel_statistics", x)
    x, count = dense(x), _pixels(x)
    if differentiable(x):
        return ChannelStatistics(count, *_ChannelStatistics.apply(x))
    return ChannelStatistics(count, *_ops.channel_statistics(x))


@operator(
    reference=group_norm_silu_ref,
    raw=("group_norm_silu", "group_norm_silu_backward"),
    cost=_cost,
)
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    statistics: ChannelStatistics | None = None,
) -> Tensor:
    """silu(group_norm(x + shift)): `F.silu(F.group_norm(x + shift[..., None, None], ...))`.

    Args:
        x: [N, C, *], float32, bfloat16, float16 or float64; contiguous or channels_last (kept; any
            other layout is copied to contiguous first).
        num_groups: divides C.
        weight, bias: [C], any floating dtype, or None for 1 and 0.
        shift: [N, C], any floating dtype, or None: a time embedding, added before the norm without
            x + shift being written.
        eps: added to the variance.
        activation: "silu" or "none".
        statistics: `channel_statistics(x)`, of x before the shift, where its producer has them: x
            is then read once. A cached value, not an input: the gradient of x is that of the
            whole norm, the same with and without, and none goes to the statistics.

    Returns:
        A tensor like x, in its memory format.

    Raises:
        TypeError: dtypes, or statistics that are none. ValueError: shapes, devices, a num_groups
            that does not divide C, an unknown activation, no pixel, or another map's statistics.
    """
    op = "group_norm_silu"
    _check_map(op, x)
    channels = x.shape[1]
    if channels % _checks.integer(op, "num_groups", num_groups, 1):
        _checks.fail(op, "num_groups", f"a divisor of {channels} channels", num_groups)
    small = {"weight": weight, "bias": bias, "shift": shift}
    for name, v in small.items():
        if v is not None:
            shape = (x.shape[0], channels) if name == "shift" else (channels,)
            check_vector(op, name, v, x, shape)
            small[name] = v.contiguous()
    silu = _checks.choice(op, "activation", activation, ACTIVATIONS) == "silu"
    mean, m2 = (None, None) if statistics is None else check_statistics(op, statistics, x)
    given = (dense(x), *small.values())
    rest = mean, m2, num_groups, float(eps), silu
    if differentiable(*(v for v in given if v is not None)):
        return _GroupNormSiLU.apply(*given, *rest)
    return _ops.group_norm_silu(*given, *rest)[0]
