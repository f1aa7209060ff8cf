r"""Depthwise convolutions: every channel with a filter of its own, alone or after a norm and SiLU.

    u[n, c, i, j] = x, or silu(group norm of x); 0 for i, j outside of the map
    y[n, c, i, j] = bias[c] + sum over a, b of weight[c, 0, a, b] u[n, c, s i + a - p, s j + b - q]

x [N, C, H, W], weight [C, 1, k, k], k = 3, 5 or 7, stride s = 1 or 2, padding (p, q). The norm is
that of `group_norm_silu`: from the statistics of channels it is one scale, offset and centre per
sample and channel, so that norm, SiLU and convolution are one pass over x. Zeros are laid around
the activated map: what is outside is 0, not silu(offset).

    du[n, c, i, j] = sum over a, b of weight[c, 0, a, b] dy[n, c, (i + p - a) / s, (j + q - b) / s]
    dweight[c, 0, a, b] = sum over n, i, j of dy[n, c, i, j] u[n, c, s i + a - p, s j + b - q]
    dbias[c] = sum over n, i, j of dy

and from du the gradients of the norm are those of `group_norm_silu`, the whole one for x: the
statistics are a cached value. Sums in float32 (float64 for float64), rounded once; du goes in
float32 to the norm's backward. Saved for backward: x, weight, and statistics; norm and SiLU are
computed again. Bytes an element at least: forward 2 (read, write), backward 3 (x and dy read, dx
written), of the dtype's size.

The block that these are for is that of SnapGen (arXiv 2412.09619).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from dfm_fast import _checks
from dfm_fast._library import define, differentiable, operator
from dfm_fast.ops._layouts import dense, empty_in, lay_out, memory_format
from dfm_fast.ops.group_norms import (
    ChannelStatistics,
    check_statistics,
    check_vector,
    group_affine,
    group_norm_silu_ref,
    of_channels,
    wide_dtype,
)
from dfm_fast.ops.pyramids import nbytes

_ops = torch.ops.dfm_fast
KERNEL_SIZES = (3, 5, 7)
Padding = int | Sequence[int] | None


def padding_pair(padding: Padding, kernel: int) -> tuple[int, int]:
    """Of rows and columns; None keeps the size at stride 1."""
    if padding is None:
        return kernel // 2, kernel // 2
    if isinstance(padding, int):
        return padding, padding
    return tuple(padding)  # type: ignore[return-value]  # other lengths: see _check_padding


def out_sizes(x: Tensor, kernel: int, stride: int, padding: tuple[int, int]) -> tuple[int, ...]:
    """(H, W) of the convolved map."""
    pairs = zip(x.shape[2:], padding, strict=True)
    return tuple((n + 2 * p - kernel) // stride + 1 for n, p in pairs)


# --- References ----------------------------------------------------------------------------------


def depthwise_conv2d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Padding = None,
) -> Tensor:
    """Defines `depthwise_conv2d`."""
    y = _convolve(
        x.to(wide_dtype(x)), weight, bias, stride, padding_pair(padding, weight.shape[-1])
    )
    return lay_out(y.to(x.dtype), memory_format(x))


def norm_silu_depthwise_conv2d_ref(
    x: Tensor,
    statistics: ChannelStatistics | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None = None,
    *,
    num_groups: int,
    eps: float = 1e-5,
    stride: int = 1,
    padding: Padding = None,
) -> Tensor:
    """Defines `norm_silu_depthwise_conv2d`; given statistics are those of x."""
    wide = x.to(wide_dtype(x))
    u = group_norm_silu_ref(wide, num_groups, norm_weight, norm_bias, shift, eps=eps)
    y = _convolve(u, weight, None, stride, padding_pair(padding, weight.shape[-1]))
    return lay_out(y.to(x.dtype), memory_format(x))


def _convolve(u: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Any) -> Tensor:
    bias = None if bias is None else bias.to(u.dtype)
    with torch.autocast(u.device.type, enabled=False):
        return F.conv2d(u, weight.to(u.dtype), bias, stride, padding, groups=u.shape[1])


# --- Raw operators, in torch ----------------------------------------------------------------------


def _activated(x: Tensor, mean: Tensor | None, m2: Tensor | None, *norm: Any) -> Tensor:
    """u in the wide dtype, contiguous: x itself where no statistics are given."""
    if mean is None or m2 is None:
        return x.to(wide_dtype(x)).contiguous()
    norm_weight, norm_bias, shift, num_groups, eps = norm
    count = math.prod(x.shape[2:])
    affine = group_affine(count, mean, m2, num_groups, norm_weight, norm_bias, shift, eps)
    x = x.to(mean.dtype).contiguous()  # the error of torch's convolutions depends on the layout
    z = (x - of_channels(affine.centre, x)) * of_channels(affine.scale, x)
    return F.silu(z + of_channels(affine.offset, x))


def _depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    *norm, stride, padding = rest
    y = _fake_forward(x, weight, bias, *rest)
    return y.copy_(_convolve(_activated(x, *norm), weight, bias, stride, padding))


def _depthwise_conv2d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, *rest: Any, need_du: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    *norm, stride, padding = rest
    du, dweight, dbias = _fake_backward(
        dy, x, weight, *norm, need_du=need_du, need_dweight=need_dweight
    )
    wide, groups = dy.to(wide_dtype(x)).contiguous(), x.shape[1]
    w = weight.to(wide.dtype)
    if need_du:
        du.copy_(conv2d_input(x.shape, w, wide, stride, padding, groups=groups))
    if need_dweight:
        u = _activated(x, *norm)
        dweight.copy_(conv2d_weight(u, w.shape, wide, stride, padding, groups=groups))
        torch.sum(wide, (0, 2, 3), out=dbias)
    return du, dweight, dbias


# --- Registration ---------------------------------------------------------------------------------


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    *_, stride, padding = rest
    sizes = out_sizes(x, weight.shape[-1], stride, padding)
    return empty_in(memory_format(x), x, (*x.shape[:2], *sizes))


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    *_: Any,
    need_du: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    like = x.new_empty(0, dtype=x.dtype if mean is None else wide_dtype(x))
    du = empty_in(memory_format(x), like, x.shape) if need_du else like
    sizes = (tuple(weight.shape), tuple(weight.shape[:1])) if need_dweight else ((0,), (0,))
    dweight, dbias = (x.new_empty(n, dtype=wide_dtype(x)) for n in sizes)
    return du, dweight, dbias


def _flops(y: Sequence[int], weight: Sequence[int]) -> int:
    return 2 * math.prod(y) * math.prod(weight[1:])


_NORM = (
    "Tensor? mean, Tensor? m2, Tensor? norm_weight, Tensor? norm_bias, Tensor? shift, "
    "int num_groups, float eps"
)
define(
    f"depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, {_NORM}, int stride, int[2] padding) "
    "-> Tensor",
    reference=_depthwise_conv2d,
    fake=_fake_forward,
    kernel="convolutions:depthwise_conv2d",
    flops=lambda x, weight, *rest: _flops(x, weight) // rest[-2] ** 2,
)
define(
    f"depthwise_conv2d_backward(Tensor dy, Tensor x, Tensor weight, {_NORM}, int stride, "
    "int[2] padding, *, bool need_du, bool need_dweight) -> (Tensor, Tensor, Tensor)",
    reference=_depthwise_conv2d_backward,
    fake=_fake_backward,
    kernel="convolutions:depthwise_conv2d_backward",
    flops=lambda dy, x, weight, *_, need_du, need_dweight: (
        _flops(dy, weight) * (need_du + need_dweight)
    ),
)

# --- Gradients ------------------------------------------------------------------------------------

NO_NORM = (None, None, None, None, None, 1, 0.0)


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.rest = stride, padding
        ctx.bias_dtype = weight.dtype if bias is None else bias.dtype
        return _ops.depthwise_conv2d(x, weight, bias, *NO_NORM, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_dx, *need = ctx.needs_input_grad[:3]
        dy, needs = dense(dy, memory_format(x)), {"need_du": need_dx, "need_dweight": any(need)}
        given = dy, x, weight, *NO_NORM, *ctx.rest
        dx, dweight, dbias = _ops.depthwise_conv2d_backward(*given, **needs)
        return (
            dx if need_dx else None,
            dweight.to(weight.dtype) if need[0] else None,
            dbias.to(ctx.bias_dtype) if need[1] else None,
            None,
            None,
        )


class _NormSiLUDepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, norm_weight, norm_bias, shift, mean, m2, num_groups, eps, *rest):
        ctx.save_for_backward(x, weight, mean, m2, norm_weight, norm_bias, shift)
        ctx.rest = (num_groups, eps), rest
        norm = mean, m2, norm_weight, norm_bias, shift, num_groups, eps
        return _ops.depthwise_conv2d(x, weight, None, *norm, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, m2, *small = ctx.saved_tensors
        need_dx, need_dweight, *need_small = ctx.needs_input_grad[:5]
        of_norm, rest = ctx.rest
        needs = {"need_du": need_dx or any(need_small), "need_dweight": need_dweight}
        given = dense(dy, memory_format(x)), x, weight, mean, m2, *small, *of_norm, *rest
        du, dweight, _ = _ops.depthwise_conv2d_backward(*given, **needs)
        grads: list[Any] = [None] * 4
        if needs["need_du"]:
            norm = *small, mean, m2, *of_norm, True
            grads = list(_ops.group_norm_silu_backward(du, x, *norm, need_dx=need_dx))
        dweight = dweight.to(weight.dtype) if need_dweight else None
        small = [
            g.to(v.dtype) if need else None
            for g, v, need in zip(grads[1:], small, need_small, strict=True)
        ]
        return grads[0] if need_dx else None, dweight, *small, *[None] * 6


# --- Arguments ------------------------------------------------------------------------------------


def check_depthwise(
    op: str, x: Any, weight: Any, stride: Any, padding: Any, name: str = "weight"
) -> tuple[int, int]:
    """The padding as a pair, when x [N, C, H, W] and weight [C, 1, k, k] fit one another."""
    _checks.tensor(op, "x", x, (4,))
    _checks.tensor(op, name, weight, (4,))
    channels, kernel = x.shape[1], weight.shape[-1]
    if channels == 0 or math.prod(x.shape[2:]) == 0:
        _checks.fail(op, "x", "at least one channel and pixel", list(x.shape))
    if kernel not in KERNEL_SIZES or weight.shape != (channels, 1, kernel, kernel):
        shape = f"shape [{channels}, 1, k, k] with k = 3, 5 or 7"
        _checks.fail(op, name, shape, list(weight.shape))
    if weight.device != x.device:
        _checks.fail(op, name, f"device {x.device} like x", weight.device)
    if _checks.integer(op, "stride", stride, 1) > 2:
        _checks.fail(op, "stride", "1 or 2", stride)
    return _check_padding(op, padding, x, kernel)


def _check_padding(op: str, padding: Any, x: Tensor, kernel: int) -> tuple[int, int]:
    if isinstance(padding, str) or not isinstance(padding, int | Sequence | None):
        _checks.fail(op, "padding", "an int, a pair or None", repr(padding), TypeError)
    pair = padding_pair(padding, kernel)
    if len(pair) != 2:
        _checks.fail(op, "padding", "an int, a pair or None", padding)
    for p, n in zip(pair, x.shape[2:], strict=True):
        if _checks.integer(op, "padding", p, 0) >= kernel:
            _checks.fail(op, "padding", f"less than the kernel's side {kernel}", padding)
        if n + 2 * p < kernel:
            most = f"a map of at least {kernel} with it around"
            _checks.fail(op, "padding", most, f"{padding} around {list(x.shape[2:])}")
    return pair


def _cost(x: Tensor, *given: Any, stride: int = 1, padding: Padding = None, **named: Any) -> int:
    statistics = [v for s in given if isinstance(s, ChannelStatistics) for v in s[1:]]
    small = [v for v in (*given, named.get("shift"), *statistics) if isinstance(v, Tensor)]
    kernel = next(v.shape[-1] for v in small if v.ndim == 4)
    y = math.prod(out_sizes(x, kernel, stride, padding_pair(padding, kernel)))
    return nbytes(x, *small) + math.prod(x.shape[:2]) * y * x.element_size()


# --- Public functions -----------------------------------------------------------------------------


@operator(
    reference=depthwise_conv2d_ref,
    raw=("depthwise_conv2d", "depthwise_conv2d_backward"),
    cost=_cost,
)
def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Padding = None,
) -> Tensor:
    """`F.conv2d(x, weight, bias, stride, padding, groups=C)`.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64; contiguous or channels_last (kept;
            any other layout is copied to contiguous first).
        weight: [C, 1, k, k], any floating dtype; k is 3, 5 or 7.
        bias: [C], any floating dtype, or None.
        stride: 1 or 2.
        padding: zeros around the map: an int, a pair (rows, columns), each less than k, or None
            for k // 2, which keeps the size at stride 1.

    Returns:
        [N, C, (H + 2 p - k) // stride + 1, ...] in the dtype and memory format of x.

    Raises:
        TypeError: dtypes, a stride or padding that is no int. ValueError: shapes, devices, a stride
            or padding out of range, a map with its padding smaller than the kernel.
    """
    op = "depthwise_conv2d"
    padding = check_depthwise(op, x, weight, stride, padding)
    if bias is not None:
        check_vector(op, "bias", bias, x, (x.shape[1],))
        bias = bias.contiguous()
    given = dense(x), weight.contiguous(), bias
    if differentiable(*(v for v in given if v is not None)):
        return _DepthwiseConv2d.apply(*given, stride, padding)
    return _ops.depthwise_conv2d(*given, *NO_NORM, stride, padding)


@operator(
    reference=norm_silu_depthwise_conv2d_ref,
    raw=("depthwise_conv2d", "depthwise_conv2d_backward", "group_norm_silu_backward"),
    cost=_cost,
)
def norm_silu_depthwise_conv2d(
    x: Tensor,
    statistics: ChannelStatistics | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None = None,
    *,
    num_groups: int,
    eps: float = 1e-5,
    stride: int = 1,
    padding: Padding = None,
) -> Tensor:
    """depthwise_conv2d(group_norm_silu(x, num_groups, norm_weight, norm_bias, shift), weight), in
    one pass over x: the activated map is not written, nor kept for backward.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64; contiguous or channels_last (kept;
            any other layout is copied to contiguous first).
        statistics: `channel_statistics(x)`, of x before the shift, from its producer; None takes
            them here, one pass over x more. A cached value, not an input: the gradient of x is that
            of the whole norm, and none goes to the statistics.
        norm_weight, norm_bias: [C], any floating dtype, or None for 1 and 0.
        weight: [C, 1, k, k], any floating dtype; k is 3, 5 or 7.
        shift: [N, C], any floating dtype, or None: added to x before the norm.
        num_groups: divides C.
        eps: added to the variance.
        stride, padding: as `depthwise_conv2d`; zeros around the map after norm and SiLU.

    Returns:
        As `depthwise_conv2d`.

    Raises:
        TypeError, ValueError: as `depthwise_conv2d` and `group_norm_silu`.
    """
    op = "norm_silu_depthwise_conv2d"
    padding = check_depthwise(op, x, weight, stride, padding)
    channels = x.shape[1]
    if channels % _checks.integer(op, "num_groups", num_groups, 1):
        _checks.fail(op, "num_groups", f"a divisor of {channels} channels", num_groups)
    small = {"norm_weight": norm_weight, "norm_bias": norm_bias, "shift": shift}
    for name, v in small.items():
        if v is not None:
            shape = (x.shape[0], channels) if name == "shift" else (channels,)
            check_vector(op, name, v, x, shape)
            small[name] = v.contiguous()
    x, weight = dense(x), weight.contiguous()
    if statistics is None:
        mean, m2 = _ops.channel_statistics(x.detach())
    else:
        mean, m2 = check_statistics(op, statistics, x)
    rest = num_groups, float(eps), stride, padding
    if differentiable(*(v for v in (x, weight, *small.values()) if v is not None)):
        return _NormSiLUDepthwiseConv2d.apply(x, weight, *small.values(), mean, m2, *rest)
    norm = mean, m2, *small.values(), *rest[:2]
    return _ops.depthwise_conv2d(x, weight, None, *norm, *rest[2:])
