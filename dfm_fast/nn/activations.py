"""Feed-forward layers of transformers, with the names, arguments and weights of diffusers'."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dfm_fast import _checks
from dfm_fast._library import INTERPRET, differentiable
from dfm_fast.kernels import tuning
from dfm_fast.nn._hooks import hooked
from dfm_fast.nn._linears import (
    FEWEST_ROWS,
    LONGEST_SUM,
    gradient_of_input,
    gradient_of_weight,
    linear,
    own_leads,
    plain_weights,
    product,
    repays_transposing,
    sum_of_rows,
    sums_serve,
)
from dfm_fast.ops import geglu, gelu_tanh, swiglu

_ops, _aten = torch.ops.dfm_fast, torch.ops.aten


class _Activation(NamedTuple):
    halves: int  # that the projection has: 2 where one is the gate
    function: Callable[[Tensor], Tensor]
    onednn: tuple[str, str] | None  # the gate's name and form as an epilogue, where there is one
    gradient: Callable[[Tensor, Tensor], Tensor] | None  # of dy and x, where it is one operator
    glu: str = ""  # its name in `_ops.glu`, where there are two halves
    # Of dy, which it may overwrite, x and whether it is wanted: (gradient, value, sum of the
    # gradient's rows), from one read on a GPU.
    again: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor | None]] | None = None


# Modules hold their activation: all of it has a name, so that they can be pickled.


def _glu_gradient(activation: str, dy: Tensor, x: Tensor) -> Tensor:
    return _ops.glu_backward(dy, x, activation)


def _glu_again(
    activation: str, dy: Tensor, x: Tensor, summed: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    dx, y = _ops.glu_again(dy, x, activation)
    return dx, y, sum_of_rows(dx) if summed else None


def _gelu_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return _aten.gelu_backward(dy, x)


def _gelu_tanh_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return _ops.gelu_tanh_backward(dy, x, None, False)[0]


def _gelu_tanh_again(dy: Tensor, x: Tensor, summed: bool) -> tuple[Tensor, Tensor, Tensor]:
    return dy, *_ops.gelu_tanh_again(dy, x, summed)


def _silu_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return _aten.silu_backward(dy, x)


def _sigmoid_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gated(function: Callable[[Tensor], Tensor], onednn: tuple[str, str], glu: str) -> _Activation:
    gradient, again = partial(_glu_gradient, glu), partial(_glu_again, glu)
    return _Activation(2, function, onednn, gradient, glu, again)


def _geglu(approximate: str) -> _Activation:
    glu = "gelu" if approximate == "none" else "gelu_tanh"
    return _gated(partial(geglu, approximate=approximate), ("gelu", approximate), glu)


_ACTIVATIONS = {
    "geglu": _geglu("none"),
    "swiglu": _gated(swiglu, ("swish", ""), "silu"),
    "gelu": _Activation(1, F.gelu, ("gelu", "none"), _gelu_gradient),
    "gelu-approximate": _Activation(
        1, gelu_tanh, ("gelu", "tanh"), _gelu_tanh_gradient, again=_gelu_tanh_again
    ),
    "geglu-approximate": _Activation(1, _sigmoid_gelu, None, None),
    "linear-silu": _Activation(1, F.silu, ("swish", ""), _silu_gradient),
}


class _LinearOfActivation(torch.autograd.Function):
    """linear(f(h)): keeps h, where f's own backward and the linear layer's would keep f(h) too. On
    a CPU f(h) and its gradient, as large as h, come in blocks of rows and are never there whole. On
    a GPU `added` may be the bias that h has in it, whose gradient is the sum of h's."""

    @staticmethod
    def forward(ctx, h, weight, bias, activation, added):
        ctx.save_for_backward(h, weight)
        ctx.activation, ctx.bias = activation, None if bias is None else bias.dtype
        rows = h.flatten(0, -2)
        parts = [linear(activation.function(rows[p]), weight, bias) for p in _blocks(rows)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y.view(*h.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h, weight = ctx.saved_tensors
        need_dh, need_dweight, need_dbias, _, need_dadded = ctx.needs_input_grad
        rows, dh, dweight, dbias = dy.flatten(0, -2), None, None, None
        hidden, again = h.flatten(0, -2), ctx.activation.again
        if need_dbias:
            dbias = sum_of_rows(rows).to(ctx.bias)
        if need_dadded or (need_dh and need_dweight and _at_once(h, ctx.activation)):
            dvalue = (rows @ weight.to(rows.dtype)).to(h.dtype)
            dh, value, dadded = again(dvalue, hidden, need_dadded)
            if need_dweight:
                dweight = (rows.t() @ value.to(rows.dtype)).to(weight.dtype)
            return dh.view(h.shape), dweight, dbias, None, dadded if need_dadded else None
        if need_dweight:
            dweight = _weight_gradient(rows, hidden, ctx.activation).to(weight.dtype)
        if need_dh:
            dh = _hidden_gradient(rows, weight, hidden, ctx.activation).view(h.shape)
        return dh, dweight, dbias, None, None


def _at_once(h: Tensor, activation: _Activation) -> bool:
    """Whether one read of h gives its gradient and the activation again."""
    return activation.again is not None and (h.is_cuda or INTERPRET)


# Elements of a block on a CPU, which its second-level cache holds; a GPU takes all at once.
_BLOCK = 1 << 18


def _blocks(rows: Tensor) -> list[slice]:
    """One at least."""
    step = max(FEWEST_ROWS, _BLOCK // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
    return [slice(i, i + step) for i in range(0, max(1, len(rows)), max(1, step))]


def _weight_gradient(dy: Tensor, h: Tensor, activation: _Activation) -> Tensor:
    """The transpose of dy times f(h). A narrow dtype would be rounded once a block: all at once."""
    blocks = _blocks(h) if dy.dtype.itemsize >= 4 else [slice(None)]
    total: Tensor | None = None
    for part in blocks:
        total = gradient_of_weight(dy[part], activation.function(h[part]).to(dy.dtype), total)
    assert total is not None  # there is a block
    return total


def _hidden_gradient(dy: Tensor, weight: Tensor, h: Tensor, activation: _Activation) -> Tensor:
    """That of h, for dy of the linear layer, all [rows, ...]."""
    weight, dh, blocks = weight.to(dy.dtype), torch.empty_like(h), _blocks(h)
    if repays_transposing(dy, weight):
        weight = weight.t().contiguous().t()  # once
    assert activation.gradient is not None  # see `_recomputes`
    for part in blocks:
        part_dh = activation.gradient(gradient_of_input(dy[part], weight).to(h.dtype), h[part])
        if len(blocks) == 1:
            return part_dh
        dh[part] = part_dh
    return dh


def activated_linear(
    h: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str
) -> Tensor:
    """F.linear(f(h), weight, bias), whose backward computes f(h) again instead of keeping it.

    Under torch.compile it is those two alone: there the compiler decides what is kept.

    Args:
        h: [..., D], or [..., 2D] for a gated f.
        weight, bias: [E, D]; [E] or None.
        activation: f, as `FeedForward` names it ("gelu-approximate" is the tanh form).

    Returns:
        [..., E].

    Raises:
        ValueError: an activation that is not one of them, or has no gradient of its own.
    """
    op = "activated_linear"
    f = _ACTIVATIONS[_checks.choice(op, "activation", activation, tuple(_ACTIVATIONS))]
    if f.gradient is None:
        _checks.fail(op, "activation", "one with a gradient of its own", repr(activation))
    if torch.compiler.is_compiling():
        return F.linear(f.function(h), weight, bias)
    return _LinearOfActivation.apply(h, weight, bias, f, None)


class _ActivatedLinear(nn.Module):
    """`proj`, and an activation of what it gives."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool, activation: _Activation) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, activation.halves * dim_out, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return _projected(x, self, _one_kernel_serves(x, self))


class GEGLU(_ActivatedLinear):
    """`dfm_fast.geglu` of a linear layer `proj`, dim_in -> 2 dim_out -> dim_out.

    Weights and outputs as diffusers' `GEGLU`; `approximate="tanh"` is the tanh form.
    """

    def __init__(
        self, dim_in: int, dim_out: int, bias: bool = True, *, approximate: str = "none"
    ) -> None:
        _checks.choice("GEGLU", "approximate", approximate, ("none", "tanh"))
        super().__init__(dim_in, dim_out, bias, _geglu(approximate))
        self.approximate = approximate

    def extra_repr(self) -> str:
        return "" if self.approximate == "none" else f"approximate={self.approximate!r}"


class FeedForward(nn.Module):
    """Linear, activation, dropout, linear: arguments, weights and results of diffusers'.

    Args:
        dim, dim_out: widths of input and output; dim_out None is dim.
        mult, inner_dim: the hidden width is inner_dim, or int(mult * dim).
        dropout, final_dropout: between the linear layers, and after both if final_dropout.
        activation_fn: "geglu", "swiglu" (gated: the first layer is twice as wide), "gelu",
            "gelu-approximate" (tanh form), "geglu-approximate" (x sigmoid(1.702 x), with no gate in
            spite of its name), "linear-silu".

    In training backward keeps what the first layer gave and computes the activation again for the
    second one's gradient (not with dropout between them). On a CPU in inference oneDNN computes
    activation and gate as epilogues of its products, so that what the first layer gives is never
    written, only its activation: see `_inference`. On a GPU that takes one kernel of ours, where a
    table of tiles or the environment (DFM_FAST_LINEAR_GLU=1) says so.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        mult: float = 4,
        dropout: float = 0.0,
        activation_fn: str = "geglu",
        final_dropout: bool = False,
        inner_dim: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        _checks.choice("FeedForward", "activation_fn", activation_fn, tuple(_ACTIVATIONS))
        inner_dim = int(dim * mult) if inner_dim is None else inner_dim
        first = (
            GEGLU(dim, inner_dim, bias)
            if activation_fn == "geglu"
            else _ActivatedLinear(dim, inner_dim, bias, _ACTIVATIONS[activation_fn])
        )
        last = nn.Linear(inner_dim, dim if dim_out is None else dim_out, bias=bias)
        self.net = nn.ModuleList([first, nn.Dropout(dropout), last])
        if final_dropout:
            self.net.append(nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., dim_out]."""
        x = feed_forward(x, self.net[0], self.net[1], self.net[2])
        return x if len(self.net) == 3 else self.net[3](x)


class Projected(NamedTuple):
    """A first layer whose projection is part of somebody else's module."""

    proj: Any  # nn.Linear, or what takes its place
    activation: _Activation

    def __call__(self, x: Tensor) -> Tensor:
        return self.activation.function(self.proj(x))


def activation_of(name: str) -> _Activation:
    """As `FeedForward` names it."""
    return _ACTIVATIONS[name]


def feed_forward(x: Tensor, first: Any, dropout: Any, last: Any) -> Tensor:
    """last(dropout(first(x))): what `FeedForward` computes, of whatever layers."""
    if not (dropout.training and dropout.p):
        if _epilogues_serve(x, first, dropout, last):
            return _inference(x.flatten(0, -2), first, last).unflatten(0, x.shape[:-1])
        if _recomputes(x, first, dropout, last):
            (w, b), f = (first.proj.weight, first.proj.bias), first.activation
            if b is not None and b.requires_grad and _at_once(x, f) and sums_serve(x, w, b):
                h = linear(x, w, b.detach())
                return _LinearOfActivation.apply(h, last.weight, last.bias, f, b)
            return _LinearOfActivation.apply(linear(x, w, b), last.weight, last.bias, f, None)
    return last(dropout(first(x)))


def _plain(first: nn.Module | Projected, *layers: nn.Module) -> bool:
    """Whether nobody replaced the layers, or looks on."""
    if not isinstance(first, Projected):
        layers = first, *layers
        if type(first) not in (GEGLU, _ActivatedLinear):
            return False
    return not any(map(hooked, layers))


def _recomputes(
    x: Tensor, first: _ActivatedLinear | Projected, dropout: nn.Module, last: nn.Module
) -> bool:
    """Whether backward will need the activation, and it can be computed again there."""
    return (
        not torch.compiler.is_compiling()
        and _plain(first, dropout, last)
        and type(first.proj) is nn.Linear
        and not hooked(first.proj)
        and type(last) is nn.Linear
        and first.activation.gradient is not None
        and type(x) is Tensor
        and plain_weights(*first.proj.parameters(), *last.parameters())
        and differentiable(x, *first.proj.parameters(), *last.parameters())
    )


# --- Inference on a GPU ---------------------------------------------------------------------------

# A gated projection and its activation as one kernel (`kernels/gated_linears.py`). "1": wherever it
# can, "0": nowhere, else as `tuning` chooses, whose default is cuBLAS and the activation.
ONE_KERNEL = os.environ.get("DFM_FAST_LINEAR_GLU", "")


def _projected(x: Tensor, first: _ActivatedLinear, one: bool) -> Tensor:
    proj, activation = first.proj, first.activation
    if not one:
        return activation.function(proj(x))
    rows = x.flatten(0, -2)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return _ops.linear_glu(rows, proj.weight, proj.bias, activation.glu).unflatten(0, x.shape[:-1])


def _one_kernel_serves(x: Tensor, first: _ActivatedLinear) -> bool:
    if not (x.is_cuda or INTERPRET) or ONE_KERNEL == "0" or torch.compiler.is_compiling():
        return False
    if not (ONE_KERNEL or tuning.may_choose("gated_projection", x.device)):
        return False
    return _one_kernel_can(x, first) and (ONE_KERNEL == "1" or _one_kernel_chosen(x, first))


def _one_kernel_can(x: Tensor, first: _ActivatedLinear) -> bool:
    proj = first.proj
    if not first.activation.glu or type(proj) is not nn.Linear or hooked(proj):
        return False
    return (
        type(x) is Tensor
        and x.ndim >= 2
        and x.shape[-1] == proj.in_features
        and x.shape[-1] % 8 == 0  # rows of whole vectors
        and plain_weights(*proj.parameters())
        and not differentiable(x, *proj.parameters())
        and not torch.is_autocast_enabled(x.device.type)
        and all(
            p.dtype == x.dtype and p.device == x.device and p.is_contiguous()
            for p in proj.parameters()
        )
        and (x.dtype.itemsize == 2 or (x.dtype == torch.float32 and _tf32(x)))
    )


def _one_kernel_chosen(x: Tensor, first: _ActivatedLinear) -> bool:
    exact = x.dtype, x.shape[-1], first.proj.out_features // 2
    rows, run = x.numel() // max(x.shape[-1], 1), partial(_projected, x, first)
    return tuning.choose("gated_projection", x.device, rows, exact, (False, True), run)


def _tf32(x: Tensor) -> bool:
    return torch.backends.cuda.matmul.allow_tf32 or not x.is_cuda


# --- Inference on a CPU ---------------------------------------------------------------------------


def _epilogues_serve(
    x: Tensor, first: _ActivatedLinear | Projected, dropout: nn.Module, last: nn.Module
) -> bool:
    """Whether x and the layers are plain enough, and oneDNN there."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if not _plain(first, dropout) or first.activation.onednn is None:
        return False
    if any(type(m) is not nn.Linear or hooked(m) for m in (first.proj, last)):
        return False
    parameters = [*first.proj.parameters(), *last.parameters()]
    return (
        x.ndim >= 2
        and x.numel() >= FEWEST_ROWS * x.shape[-1] > 0
        and type(x) is Tensor
        and plain_weights(*parameters)
        and not differentiable(x, *parameters)
        and not torch.is_autocast_enabled("cpu")
        and all(p.dtype == x.dtype and p.is_contiguous() for p in parameters)
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _bf16_serves()))
    )


def _bf16_serves() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _inference(x: Tensor, first: _ActivatedLinear | Projected, last: nn.Linear) -> Tensor:
    """x [rows, dim] -> [rows, dim_out]. In float32 the hidden tensor comes in blocks of columns,
    but whole for a product of our own: gate, then hidden = (x W + b) gate, then its part of the
    output."""
    linear = torch.ops.mkldnn._linear_pointwise  # what Inductor calls
    assert first.activation.onednn is not None  # see `_epilogues_serve`
    activation, form = first.activation.onednn
    weight, bias, inner = first.proj.weight, first.proj.bias, last.in_features
    single = x.dtype == torch.float32
    own = single and own_leads()
    blocks = -(-inner // LONGEST_SUM) if single and not own else 1
    width = -(-inner // blocks)
    x = x.contiguous()
    y: Tensor | None = None
    for start in range(0, inner, width):
        part = slice(start, min(start + width, inner))
        gate = (
            slice(part.start + inner, part.stop + inner) if first.activation.halves == 2 else part
        )
        hidden = linear(x, weight[gate], _part(bias, gate), activation, [], form)
        if gate is not part:
            hidden = linear.binary(x, hidden, weight[part], _part(bias, part), "mul")
        if own:
            return product(hidden, last.weight, last.bias)
        columns = last.weight[:, part].contiguous()  # strided weights are very slow
        if y is None:
            y = linear(hidden, columns, last.bias, "none", [], "")
        else:
            y = linear.binary(hidden, y, columns, None, "add")
    assert y is not None  # the input has elements
    return y


def _part(bias: Tensor | None, rows: slice) -> Tensor | None:
    return None if bias is None else bias[rows]
