r"""Activations of feed-forward layers, each in one pass over what the projection before it gave.

    geglu      y = a gelu(b)      x = [a | b] along the last dimension: b is the gate
    swiglu     y = a silu(b)
    gelu_tanh  y = gelu(x + bias), tanh form

    gelu(b) = b Φ(b),  Φ(b) = (1 + erf(b / √2)) / 2
    tanh form: Φ(b) = (1 + tanh(u)) / 2 = sigmoid(2u),  u = √(2/π) (b + 0.044715 b³)
    silu(b) = b sigmoid(b)

`linear_glu` is either glu of a linear layer's output, without that output in memory; forward only,
and not public: `nn.FeedForward` calls it. (Hendrycks & Gimpel 2016, arXiv 1606.08415; Shazeer 2020,
arXiv 2002.05202.) x is [..., 2D], or [..., D]. Backward saves x (and bias) only and computes the
rest again: with g the activation,

    da = dy g(b),  db = dy a g'(b),  dbias = sum of dx over rows

dbias is summed in two stages, in an order that depends on nothing but the number of rows. In
float32 (float64 for float64), rounded once. Bytes moved at least, in elements of y: geglu and
swiglu 3 forward, 5 backward; gelu_tanh 2 forward, 3 backward; the bias is small.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfm_fast import _checks
from dfm_fast._library import define, differentiable, operator
from dfm_fast.ops._layouts import lay_out, memory_format
from dfm_fast.ops.pyramids import nbytes

_ops = torch.ops.dfm_fast
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}  # approximate, as torch names it -> activation

# --- References ----------------------------------------------------------------------------------


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(dy, x, approximate=approximate)


def _wide(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [t.to(dtype) for t in tensors]


def _glu(x: Tensor, activation: str) -> Tensor:
    a, b = _wide(x)[0].chunk(2, -1)
    return (a * _activate(b, activation)).to(x.dtype)


def _glu_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    dy, wide = _wide(dy, x)
    a, b = wide.chunk(2, -1)
    da, db = dy * _activate(b, activation), _activate_backward(dy * a, b, activation)
    return torch.cat((da, db), -1).to(x.dtype)


def _linear_glu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    wide, weight = _wide(x, weight)
    bias = None if bias is None else bias.to(wide.dtype)
    return _glu(F.linear(wide, weight, bias), activation).to(x.dtype)


def _gelu_tanh(x: Tensor, bias: Tensor | None) -> Tensor:
    (wide,) = _wide(x)
    wide = wide if bias is None else wide + _wide(bias)[0]
    return _activate(wide, "gelu_tanh").to(x.dtype)


def _gelu_tanh_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    wide, dy = _wide(x, dy)
    wide = wide if bias is None else wide + _wide(bias)[0]
    dx = _activate_backward(dy, wide, "gelu_tanh").contiguous()
    dbias = dx.flatten(0, -2).sum(0) if need_dbias else dx.new_empty(0)
    return dx.to(x.dtype), dbias.to(x.dtype)


def _gelu_tanh_again(dy: Tensor, x: Tensor, need_dbias: bool) -> tuple[Tensor, Tensor]:
    dx, dbias = _gelu_tanh_backward(dy, x, None, need_dbias)
    dy.copy_(dx)
    return _gelu_tanh(x, None), dbias


def _sum_of_rows(x: Tensor) -> Tensor:
    return _wide(x)[0].flatten(0, -2).sum(0).to(x.dtype)


def geglu_ref(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Defines `geglu`."""
    return _glu(x, _GELU[approximate])


def swiglu_ref(x: Tensor) -> Tensor:
    """Defines `swiglu`."""
    return _glu(x, "silu")


def gelu_tanh_ref(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Defines `gelu_tanh`."""
    return _gelu_tanh(x, bias)


# --- Registration ---------------------------------------------------------------------------------

# Raw operators take rows at one stride, the last dimension contiguous, and give contiguous tensors.


def _glu_fake(x: Tensor, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _gelu_tanh_backward_fake(
    dy: Tensor, x: Tensor, bias: Tensor | None, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if need_dbias else 0)


def _gelu_tanh_again_fake(dy: Tensor, x: Tensor, need_dbias: bool) -> tuple[Tensor, Tensor]:
    return _gelu_tanh_backward_fake(dy, x, None, need_dbias)


# FLOPs: an exponential or erf counts as ten, a division as one.
define(
    "glu(Tensor x, str activation) -> Tensor",
    reference=_glu,
    fake=_glu_fake,
    kernel="activations:glu",
    flops=lambda x, *_: 7 * math.prod(x),
)
define(
    "glu_backward(Tensor dy, Tensor x, str activation) -> Tensor",
    reference=_glu_backward,
    fake=lambda dy, x, activation: x.new_empty(x.shape),
    kernel="activations:glu_backward",
    flops=lambda dy, x, *_: 15 * math.prod(x),
)
# For `nn.FeedForward` on a GPU, in training, dx and y: backward needs what it did not keep, too.
# That of gelu_tanh is contiguous, puts dx where dy is, and gives (y, the sum of dx's rows), which
# is the gradient of the bias of a linear layer that gave x.
define(
    "glu_again(Tensor dy, Tensor x, str activation) -> (Tensor, Tensor)",
    reference=lambda dy, x, activation: (_glu_backward(dy, x, activation), _glu(x, activation)),
    fake=lambda dy, x, activation: (x.new_empty(x.shape), _glu_fake(x, activation)),
    kernel="activations:glu_again",
    flops=lambda dy, x, *_: 16 * math.prod(x),
)
define(
    "gelu_tanh_again(Tensor(a!) dy, Tensor x, bool need_dbias) -> (Tensor, Tensor)",
    reference=_gelu_tanh_again,
    fake=_gelu_tanh_again_fake,
    kernel="activations:gelu_tanh_again",
    flops=lambda dy, x, *_: 30 * math.prod(x),
)
# Of a linear layer: dy [..., D] -> [D], the sum of its rows.
define(
    "bias_backward(Tensor dy) -> Tensor",
    reference=_sum_of_rows,
    fake=lambda x: x.new_empty(x.shape[-1]),
    kernel="activations:sum_of_rows",
    flops=lambda x: math.prod(x),
)
# For `nn.FeedForward` on a GPU, in inference: x [M, K], its rows at one stride, weight [2D, K].
define(
    "linear_glu(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor",
    reference=_linear_glu,
    fake=lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0] // 2),
    kernel="gated_linears:linear_glu",
    flops=lambda x, weight, *_: x[0] * weight[0] * (2 * x[1] + 7),
)
define(
    "gelu_tanh(Tensor x, Tensor? bias) -> Tensor",
    reference=_gelu_tanh,
    fake=lambda x, bias: x.new_empty(x.shape),
    kernel="activations:gelu_tanh",
    flops=lambda x, *_: 18 * math.prod(x),
)
define(
    "gelu_tanh_backward(Tensor dy, Tensor x, Tensor? bias, bool need_dbias) -> (Tensor, Tensor)",
    reference=_gelu_tanh_backward,
    fake=_gelu_tanh_backward_fake,
    kernel="activations:gelu_tanh_backward",
    flops=lambda dy, x, *_: 28 * math.prod(x),
)

# --- Gradients ------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """x itself where its rows lie at one stride and have contiguous elements, as those of a slice
    of a wider projection; else a contiguous copy."""
    if x.is_contiguous():
        return x
    size, stride = x.shape, x.stride()
    even = all(stride[i] == stride[i + 1] * size[i + 1] for i in range(x.ndim - 2))
    return x if even and stride[-1] == 1 else x.contiguous()


def _laid_out(y: Tensor, like: Tensor) -> Tensor:
    """y (contiguous) in the memory format of `like`."""
    layout = memory_format(like)
    return y if layout == torch.contiguous_format else lay_out(y, layout)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation):
        ctx.save_for_backward(x)
        ctx.activation = activation
        return _laid_out(_ops.glu(_rows(x), activation), x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return _laid_out(_ops.glu_backward(_rows(dy), _rows(x), ctx.activation), x), None


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return _laid_out(_ops.gelu_tanh(_rows(x), bias), x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        need_dx, need_dbias = ctx.needs_input_grad
        dx, dbias = _ops.gelu_tanh_backward(_rows(dy), _rows(x), bias, need_dbias)
        return _laid_out(dx, x) if need_dx else None, dbias if need_dbias else None


# --- Public functions -----------------------------------------------------------------------------


def _glu_cost(x: Tensor, **_: Any) -> int:
    return nbytes(x) * 3 // 2


def _gelu_tanh_cost(x: Tensor, bias: Tensor | None = None) -> int:
    return 2 * nbytes(x) + (0 if bias is None else nbytes(bias))


def _run_glu(op: str, x: Tensor, activation: str) -> Tensor:
    _checks.tensor(op, "x", x, range(2, 65))
    if x.shape[-1] % 2:
        _checks.fail(op, "x", "an even last dimension", list(x.shape))
    if differentiable(x):
        return _Glu.apply(x, activation)
    return _laid_out(_ops.glu(_rows(x), activation), x)


@operator(reference=geglu_ref, raw=("glu", "glu_backward"), cost=_glu_cost)
def geglu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """a gelu(b), where x = [a | b] along its last dimension, in one pass.

    Args:
        x: [..., 2D], two or more dimensions. Rows may lie at any one stride (a slice of a wider
            projection) without a copy.
        approximate: "none" (erf) or "tanh", as `torch.nn.functional.gelu`.

    Returns:
        [..., D] in x's dtype and memory format.

    Raises:
        TypeError: x is not a floating-point tensor. ValueError: fewer than two dimensions, an odd
            last one, or another `approximate`.
    """
    activation = _GELU[_checks.choice("geglu", "approximate", approximate, tuple(_GELU))]
    return _run_glu("geglu", x, activation)


@operator(reference=swiglu_ref, raw=("glu", "glu_backward"), cost=_glu_cost)
def swiglu(x: Tensor) -> Tensor:
    """a silu(b), where x = [a | b] along its last dimension, in one pass.

    Args, returns, raises: as `geglu`. (Of two orders in use this is diffusers': the second half is
    the gate.)
    """
    return _run_glu("swiglu", x, "silu")


@operator(reference=gelu_tanh_ref, raw=("gelu_tanh", "gelu_tanh_backward"), cost=_gelu_tanh_cost)
def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(x + bias) in its tanh form, in one pass.

    Args:
        x: [..., D], two or more dimensions; rows at any one stride, as in `geglu`.
        bias: [D] of x's dtype, or None: that of the projection before.

    Returns:
        Like x, in its dtype and memory format.

    Raises:
        TypeError: dtypes. ValueError: fewer than two dimensions, a bias of another shape or device.
    """
    op = "gelu_tanh"
    _checks.tensor(op, "x", x, range(2, 65))
    if bias is not None:
        _checks.tensor(op, "bias", bias, (1,))
        _checks.like(op, "bias", bias, "x", x)
        if bias.shape[0] != x.shape[-1]:
            _checks.fail(op, "bias", f"shape [{x.shape[-1]}]", list(bias.shape))
    if differentiable(x) if bias is None else differentiable(x, bias):
        return _GeluTanh.apply(x, bias)
    return _laid_out(_ops.gelu_tanh(_rows(x), bias), x)
