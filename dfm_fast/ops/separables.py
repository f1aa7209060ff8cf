r"""Separable convolutions: depthwise, then pointwise, with what stands around them in a block.

    u = x, or silu(group norm of x)
    a[n, c] = depthwise_weight[c] * u[n, c]              k x k, padding k // 2
    y[n, o] = sum over c of pointwise_weight[o, c] a[n, c] + bias[o] + shift[n, o] + residual[n, o]

x [N, C, H, W], y [N, O, H, W]. The norm is `group_norm_silu`'s, from statistics of x's channels;
y's own can be handed on to the next norm (bias, shift and residual included), as count, mean and
centred M2. So SnapGen's residual block (arXiv 2412.09619) is two calls, and no activated map, no
sum with the time embedding and no sum with the shortcut is written.

    da = pointwise_weightᵀ dy        dpointwise_weight = dy aᵀ        dresidual = dy
    dshift[n] = sum over pixels of dy                    dbias = sum over n of dshift

and from da those of `norm_silu_depthwise_conv2d`. Sums in float32 (float64 for float64); y is
rounded once from a that is rounded to the dtype of x at most, da and du are rounded to it. Saved
for backward: x, the weights, and x's statistics; norm, SiLU and depthwise convolution are computed
again. Bytes at least: x, residual, weights and y once; backward x and dy read, dx written.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dfm_fast import _checks
from dfm_fast._library import define, differentiable, operator
from dfm_fast.ops._layouts import dense, empty_in, lay_out, memory_format
from dfm_fast.ops._rows import product_over_rows, rows_of
from dfm_fast.ops.convolutions import check_depthwise, norm_silu_depthwise_conv2d_ref
from dfm_fast.ops.group_norms import (
    ChannelStatistics,
    channel_statistics_ref,
    check_statistics,
    check_vector,
    of_channels,
    wide_dtype,
)
from dfm_fast.ops.pyramids import nbytes

_ops = torch.ops.dfm_fast

# --- Reference ------------------------------------------------------------------------------------


def separable_conv2d_ref(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    num_groups: int | None = None,
    eps: float = 1e-5,
    statistics: ChannelStatistics | None = None,
    with_statistics: bool = False,
) -> Tensor | tuple[Tensor, ChannelStatistics]:
    """Defines `separable_conv2d`; given statistics are those of x."""
    wide = x.to(wide_dtype(x)).contiguous()
    kernel = depthwise_weight.to(wide.dtype)
    if num_groups is None:
        a = F.conv2d(wide, kernel, padding=kernel.shape[-1] // 2, groups=x.shape[1])
    else:
        norm = None, norm_weight, norm_bias
        a = norm_silu_depthwise_conv2d_ref(wide, *norm, kernel, num_groups=num_groups, eps=eps)
    y = _finish(F.conv2d(a, pointwise_weight.to(wide.dtype)), bias, shift, residual)
    y = lay_out(y.to(x.dtype), memory_format(x))
    return (y, channel_statistics_ref(y)) if with_statistics else y


def _finish(
    y: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The epilogue, in the wide dtype."""
    y = y if bias is None else y + of_channels(bias, y)
    y = y if shift is None else y + of_channels(shift, y)
    return y if residual is None else y + residual.to(y.dtype)


# --- Raw operators, in torch ----------------------------------------------------------------------


def _separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    *norm: Any,
    with_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, m2, norm_weight, norm_bias, num_groups, eps = norm
    wide = x.to(wide_dtype(x))
    norm = mean, m2, norm_weight, norm_bias, None, num_groups, eps
    padding = [depthwise_weight.shape[-1] // 2] * 2
    a = _ops.depthwise_conv2d(wide, depthwise_weight, None, *norm, 1, padding)
    found = _fake_forward(x, depthwise_weight, pointwise_weight, with_statistics=with_statistics)
    y = F.conv2d(a, pointwise_weight.to(a.dtype)) if a.numel() else found[0].to(a.dtype)
    found[0].copy_(_finish(y, bias, shift, residual))
    if with_statistics:
        for to, v in zip(found[1:], channel_statistics_ref(found[0])[1:], strict=True):
            to.copy_(v)
    return found


def _pointwise_conv2d_backward(
    dy: Tensor, a: Tensor, weight: Tensor, need_da: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    return pointwise_backward(dy, a, weight, need_da, need_dweight, wide_dtype(a))


def pointwise_backward(
    dy: Tensor, a: Tensor, weight: Tensor, need_da: bool, need_dweight: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """By torch's products in `dtype`."""
    found = _fake_pointwise(dy, a, weight, need_da=need_da, need_dweight=need_dweight)
    if not a.numel():
        return found[0], found[1].zero_()
    given = (v.to(dtype) for v in (dy, a, weight))
    *grads, _ = torch.ops.aten.convolution_backward(
        *given, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, (need_da, need_dweight, False)
    )
    for to, grad, need in zip(found, grads, (need_da, need_dweight), strict=True):
        if need:
            to.copy_(grad)
    return found


def pointwise_backward_of_rows(
    dy: Tensor, a: Tensor, weight: Tensor, need_da: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """As `pointwise_conv2d_backward`, maps as [pixels, channels]: (da, dweight), dy for what is not
    asked; dweight is rounded at once."""
    with torch.autocast(a.device.type, enabled=False):
        (n, c, h, w), rows = a.shape, rows_of(dy)
        da = dweight = dy
        if need_da:
            da = (rows @ weight.flatten(1)).view(n, h, w, c).permute(0, 3, 1, 2)
        if need_dweight:
            dweight = product_over_rows(rows, rows_of(a)).view(weight.shape)
        return da, dweight


# --- Registration ---------------------------------------------------------------------------------


def _fake_forward(
    x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, *_: Any, with_statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, (h, w) = x.shape[0], x.shape[2:]
    y = empty_in(memory_format(x), x, (n, pointwise_weight.shape[0], h, w))
    size = tuple(y.shape[:2]) if with_statistics else (0,)
    mean, m2 = (x.new_empty(size, dtype=wide_dtype(x)) for _ in range(2))
    return y, mean, m2


def _fake_pointwise(
    dy: Tensor, a: Tensor, weight: Tensor, *, need_da: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    da = empty_in(memory_format(a), a, a.shape) if need_da else a.new_empty(0)
    return da, a.new_empty(weight.shape if need_dweight else (0,), dtype=wide_dtype(a))


def _pointwise_flops(x: Any, weight: Any) -> int:
    return 2 * math.prod(x) * weight[0]


define(
    "separable_conv2d(Tensor x, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? bias, "
    "Tensor? shift, Tensor? residual, Tensor? mean, Tensor? m2, Tensor? norm_weight, "
    "Tensor? norm_bias, int num_groups, float eps, *, bool with_statistics) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_separable_conv2d,
    fake=_fake_forward,
    kernel="separables:separable_conv2d",
    flops=lambda x, depthwise, pointwise, *_, **__: (
        _pointwise_flops(x, pointwise) + 2 * math.prod(x) * depthwise[-1] ** 2
    ),
)
define(
    "pointwise_conv2d_backward(Tensor dy, Tensor a, Tensor weight, *, bool need_da, "
    "bool need_dweight) -> (Tensor, Tensor)",
    reference=_pointwise_conv2d_backward,
    fake=_fake_pointwise,
    kernel="separables:pointwise_conv2d_backward",
    flops=lambda dy, a, weight, *, need_da, need_dweight: (
        (need_da + need_dweight) * _pointwise_flops(a, weight)
    ),
)

# --- Gradients ------------------------------------------------------------------------------------


class _SeparableConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, depthwise, pointwise, bias, shift, residual, weight, beta, *rest):
        mean, m2, num_groups, eps, with_statistics = rest
        norm = mean, m2, weight, beta, num_groups, eps
        ctx.save_for_backward(x, depthwise, pointwise, mean, m2, weight, beta)
        ctx.rest = num_groups, eps
        ctx.dtypes = [None if v is None else v.dtype for v in (bias, shift, residual)]
        epilogue = bias, shift, residual
        y, *found = _ops.separable_conv2d(
            x, depthwise, pointwise, *epilogue, *norm, with_statistics=with_statistics
        )
        ctx.mark_non_differentiable(*found)
        return y, *found

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, depthwise, pointwise, mean, m2, *affine = ctx.saved_tensors
        need = ctx.needs_input_grad
        norm = mean, m2, *affine, None, *ctx.rest
        geometry = 1, [depthwise.shape[-1] // 2] * 2
        dy = dense(dy, memory_format(x))
        need_du = need[0] or need[6] or need[7]
        da, dpointwise = _pointwise_gradients(
            ctx, dy, x, depthwise, pointwise, norm, geometry, need_du or need[1]
        )
        dx: Tensor | None = None
        ddepthwise: Any = None
        dnorm: list[Any] = [None, None]
        if need_du or need[1]:
            needs = {"need_du": need_du, "need_dweight": need[1]}
            du, ddepthwise, _ = _ops.depthwise_conv2d_backward(
                da, x, depthwise, *norm, *geometry, **needs
            )
            dx = du
            if need_du and mean is not None:
                given = *affine, None, mean, m2, *ctx.rest, True
                dx, *dnorm = _ops.group_norm_silu_backward(du, x, *given, need_dx=need[0])
        return (
            dx if need[0] else None,
            ddepthwise.to(depthwise.dtype) if need[1] else None,
            dpointwise.to(pointwise.dtype) if need[2] else None,
            *_epilogue_gradients(ctx, dy),
            *(dnorm[i].to(affine[i].dtype) if need[6 + i] else None for i in range(2)),
            *[None] * 5,
        )


def _pointwise_gradients(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    norm: tuple[Any, ...],
    geometry: tuple[Any, ...],
    need_da: bool,
) -> tuple[Tensor, Tensor]:
    """(da, dpointwise); a is made again where it is needed."""
    need_dweight = ctx.needs_input_grad[2]
    if not need_da and not need_dweight:
        return dy, dy
    a = _ops.depthwise_conv2d(x, depthwise, None, *norm, *geometry) if need_dweight else x
    if _multiplies_rows(a):
        return pointwise_backward_of_rows(dy, a, pointwise, need_da, need_dweight)
    return _ops.pointwise_conv2d_backward(
        dy, a, pointwise, need_da=need_da, need_dweight=need_dweight
    )


def _multiplies_rows(a: Tensor) -> bool:
    """Where products of pixels' rows beat the gradients of a convolution: oneDNN's of bfloat16, by
    2.0 ms to 2.8 (896 to 1792 channels at 16²; 2.4 to 3.0 for 512 at 32²)."""
    last = memory_format(a) != torch.contiguous_format
    return a.device.type == "cpu" and a.dtype == torch.bfloat16 and last and _ONEDNN_HAS_BF16


_ONEDNN_HAS_BF16 = torch.backends.mkldnn.is_available() and bool(
    torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


def _epilogue_gradients(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """Of bias, shift and residual."""
    need_bias, need_shift, need_residual = ctx.needs_input_grad[3:6]
    bias, shift, _ = ctx.dtypes
    sums = dy.sum((2, 3), dtype=wide_dtype(dy)) if need_bias or need_shift else dy
    return [
        sums.sum(0).to(bias) if need_bias else None,
        sums.to(shift) if need_shift else None,
        dy if need_residual else None,
    ]


# --- Arguments ------------------------------------------------------------------------------------


def _check_pointwise(op: str, x: Tensor, weight: Any) -> None:
    name = "pointwise_weight"
    _checks.tensor(op, name, weight, (4,))
    _checks.like(op, name, weight, "x", x)
    if weight.shape[1:] != (x.shape[1], 1, 1) or not weight.shape[0]:
        _checks.fail(op, name, f"shape [O, {x.shape[1]}, 1, 1]", list(weight.shape))


def _check_residual(op: str, residual: Any, x: Tensor, outputs: int) -> Tensor:
    _checks.tensor(op, "residual", residual, (4,))
    _checks.like(op, "residual", residual, "x", x)
    shape = [x.shape[0], outputs, *x.shape[2:]]
    if list(residual.shape) != shape:
        _checks.fail(op, "residual", f"shape {shape}", list(residual.shape))
    return dense(residual, memory_format(x))


def _check_norm(
    op: str, x: Tensor, num_groups: Any, norm: dict[str, Any], statistics: Any
) -> tuple[Tensor | None, Tensor | None, int]:
    """(mean, m2, number of groups): None and 1 where there is no norm."""
    if num_groups is None:
        for name, v in (*norm.items(), ("statistics", statistics)):
            if v is not None:
                _checks.fail(op, name, "None without num_groups", type(v).__name__)
        return None, None, 1
    if x.shape[1] % _checks.integer(op, "num_groups", num_groups, 1):
        _checks.fail(op, "num_groups", f"a divisor of {x.shape[1]} channels", num_groups)
    if statistics is None:
        return *_ops.channel_statistics(x.detach()), num_groups
    return *check_statistics(op, statistics, x), num_groups


def _cost(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, *given: Tensor | None, **named: Any
) -> int:
    vectors = [v for v in (*given, *named.values()) if isinstance(v, Tensor)]
    vectors += (named.get("statistics") or ())[1:]
    outputs = x.shape[0] * pointwise.shape[0]
    y = outputs * math.prod(x.shape[2:]) * x.element_size()
    found = 2 * outputs * wide_dtype(x).itemsize if named.get("with_statistics") else 0
    return nbytes(x, depthwise, pointwise, *vectors) + y + found


# --- Public function ------------------------------------------------------------------------------


@overload
def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    num_groups: int | None = None,
    eps: float = 1e-5,
    statistics: ChannelStatistics | None = None,
    with_statistics: Literal[False] = False,
) -> Tensor: ...


@overload
def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    num_groups: int | None = None,
    eps: float = 1e-5,
    statistics: ChannelStatistics | None = None,
    with_statistics: Literal[True],
) -> tuple[Tensor, ChannelStatistics]: ...


@operator(
    reference=separable_conv2d_ref,
    raw=(
        "separable_conv2d",
        "pointwise_conv2d_backward",
        "depthwise_conv2d",
        "depthwise_conv2d_backward",
    ),
    cost=_cost,
)
def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    num_groups: int | None = None,
    eps: float = 1e-5,
    statistics: ChannelStatistics | None = None,
    with_statistics: bool = False,
) -> Tensor | tuple[Tensor, ChannelStatistics]:
    """Depthwise and pointwise convolution, with the norm and SiLU before and the sums after them:

        u = x if num_groups is None else group_norm_silu(x, num_groups, norm_weight, norm_bias)
        a = F.conv2d(u, depthwise_weight, padding=k // 2, groups=C)
        y = F.conv2d(a, pointwise_weight, bias) + shift[:, :, None, None] + residual

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64; contiguous or channels_last (kept;
            any other layout is copied to contiguous first).
        depthwise_weight: [C, 1, k, k], any floating dtype; k is 3, 5 or 7.
        pointwise_weight: [O, C, 1, 1], like x.
        bias, shift: [O] and [N, O], any floating dtype, or None. A shift is a time embedding.
        residual: [N, O, H, W], like x, or None.
        norm_weight, norm_bias: [C], any floating dtype, or None for 1 and 0.
        num_groups: divides C; None is no norm and no SiLU.
        eps: added to the variance.
        statistics: `channel_statistics(x)` from x's producer; None takes them here, one pass over x
            more. A cached value, not an input: the gradient of x is that of the whole norm.
        with_statistics: also return those of y, for the norm that follows.

    Returns:
        [N, O, H, W] in the dtype and memory format of x; or (y, ChannelStatistics of y), which have
        bias, shift and residual in them and take no gradient.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, a num_groups that does not divide C, options
            of a norm without num_groups, another map's statistics.
    """
    op = "separable_conv2d"
    check_depthwise(op, x, depthwise_weight, 1, None, "depthwise_weight")
    _check_pointwise(op, x, pointwise_weight)
    x, (n, channels), outputs = dense(x), x.shape[:2], pointwise_weight.shape[0]
    small = {"bias": bias, "shift": shift, "norm_weight": norm_weight, "norm_bias": norm_bias}
    sizes = (outputs,), (n, outputs), (channels,), (channels,)
    for (name, v), size in zip(small.items(), sizes, strict=True):
        if v is not None:
            check_vector(op, name, v, x, size)
            small[name] = v.contiguous()
    residual = None if residual is None else _check_residual(op, residual, x, outputs)
    bias, shift, *norm = small.values()
    affine = {"norm_weight": norm[0], "norm_bias": norm[1]}
    mean, m2, groups = _check_norm(op, x, num_groups, affine, statistics)
    given = x, depthwise_weight.contiguous(), dense(pointwise_weight), bias, shift, residual
    rest = groups, float(eps)
    if differentiable(*(v for v in (*given, *norm) if v is not None)):
        y, *found = _SeparableConv2d.apply(*given, *norm, mean, m2, *rest, with_statistics)
    else:
        y, *found = _ops.separable_conv2d(
            *given, mean, m2, *norm, *rest, with_statistics=with_statistics
        )
    return (y, ChannelStatistics(math.prod(y.shape[2:]), *found)) if with_statistics else y
