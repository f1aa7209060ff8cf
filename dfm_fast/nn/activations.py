"""Feed-forward layers of transformers, with the names, arguments and weights of diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast._library import differentiable
from dfm_fast.ops import geglu, gelu_tanh, swiglu


class _Activation(NamedTuple):
    halves: int  # that the projection has: 2 where one is the gate
    function: Callable[[Tensor], Tensor]
    onednn: tuple[str, str] | None  # the gate's name and form as an epilogue, where there is one


def _sigmoid_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {
    "geglu": _Activation(2, geglu, ("gelu", "none")),
    "swiglu": _Activation(2, swiglu, ("swish", "")),
    "gelu": _Activation(1, F.gelu, ("gelu", "none")),
    "gelu-approximate": _Activation(1, gelu_tanh, ("gelu", "tanh")),
    "geglu-approximate": _Activation(1, _sigmoid_gelu, None),
    "linear-silu": _Activation(1, F.silu, ("swish", "")),
}


class _ActivatedLinear(nn.Module):
    """`proj`, and an activation of what it gives."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool, activation: _Activation) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, activation.halves * dim_out, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation.function(self.proj(x))


class GEGLU(_ActivatedLinear):
    """`dfm_fast.geglu` of a linear layer `proj`, dim_in -> 2 dim_out -> dim_out.

    Weights and outputs as diffusers' `GEGLU`; `approximate="tanh"` is the tanh form.
    """

    def __init__(
        self, dim_in: int, dim_out: int, bias: bool = True, *, approximate: str = "none"
    ) -> None:
        _checks.choice("GEGLU", "approximate", approximate, ("none", "tanh"))
        function = partial(geglu, approximate=approximate)
        super().__init__(dim_in, dim_out, bias, _Activation(2, function, ("gelu", approximate)))
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

    In training backward keeps what the first layer gave, not the activation's parts. On a CPU in
    inference oneDNN computes activation and gate as epilogues of its products, so that the wide
    hidden tensor is never written: see `_inference`.
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
        first, dropout, last = self.net[0], self.net[1], self.net[2]
        if not (self.training and dropout.p) and _epilogues_serve(x, first, last):
            return _inference(x.flatten(0, -2), first, last).unflatten(0, x.shape[:-1])
        for module in self.net:
            x = module(x)
        return x


# --- Inference on a CPU ---------------------------------------------------------------------------

# torch's fp32 products on a CPU are MKL's, which are half as fast as oneDNN's on AMD's processors
# (measured, Zen 5: 896 -> 5376 of 2048 rows 116 ms, 60 ms). oneDNN orders the weights anew in every
# call, which few rows do not repay.
_FEWEST_ROWS = 256
# A sum of so many products in fp32 at most: longer ones, which oneDNN adds up one by one, have more
# than twice the rounding error of MKL's.
_LONGEST_SUM = 1024


def _epilogues_serve(x: Tensor, first: nn.Module, last: nn.Module) -> bool:
    """Whether x and the layers are plain enough, and oneDNN there."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if type(first) not in (GEGLU, _ActivatedLinear) or first.activation.onednn is None:
        return False
    if any(type(m) is not nn.Linear or _hooked(m) for m in (first.proj, last)) or _hooked(first):
        return False
    parameters = [*first.parameters(), *last.parameters()]
    return (
        x.ndim >= 2
        and x.numel() >= _FEWEST_ROWS * x.shape[-1] > 0
        and type(x) is Tensor
        and not differentiable(x, *parameters)
        and not torch.is_autocast_enabled("cpu")
        and all(p.dtype == x.dtype and p.is_contiguous() for p in parameters)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _bf16_serves()))
    )


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _bf16_serves() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _inference(x: Tensor, first: _ActivatedLinear, last: nn.Linear) -> Tensor:
    """x [rows, dim] -> [rows, dim_out]. The hidden tensor comes in blocks of columns: gate, then
    hidden = (x W + b) gate, then its part of the output."""
    linear = torch.ops.mkldnn._linear_pointwise  # what Inductor calls
    activation, form = first.activation.onednn
    weight, bias, inner = first.proj.weight, first.proj.bias, last.in_features
    blocks = -(-inner // _LONGEST_SUM) if x.dtype == torch.float32 else 1
    width = -(-inner // blocks)
    y, x = None, x.contiguous()
    for start in range(0, inner, width):
        part = slice(start, min(start + width, inner))
        gate = (
            slice(part.start + inner, part.stop + inner) if first.activation.halves == 2 else part
        )
        hidden = linear(x, weight[gate], _part(bias, gate), activation, [], form)
        if gate is not part:
            hidden = linear.binary(x, hidden, weight[part], _part(bias, part), "mul")
        columns = last.weight[:, part].contiguous()  # strided weights are very slow
        if y is None:
            y = linear(hidden, columns, last.bias, "none", [], "")
        else:
            y = linear.binary(hidden, y, columns, None, "add")
    return y


def _part(bias: Tensor | None, rows: slice) -> Tensor | None:
    return None if bias is None else bias[rows]
