"""Several linear layers as one, and one that is several.

Weights of layers that read the same input are parts of one piece of memory, one after the other:
together they are the weight of one wider layer, a view, whoever wrote into them and how. (A packed
copy would not see `weight.data.mul_`.) What gives them memory of their own, such as a new Parameter
or FSDP, makes them separate products again, and nothing else.

Where a model keeps one layer for many, such as all modulations of a DFM, a CPU is exact, and fast,
only by a product for each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dfm_fast._library import differentiable
from dfm_fast.nn._hooks import hooked
from dfm_fast.nn._linears import (
    called,
    gradient_of_input,
    gradient_of_weight,
    gradients_of_inputs,
    linear,
    single_on_cpu,
)

# --- Several as one -------------------------------------------------------------------------------


def pack(*layers: nn.Linear) -> None:
    """Move their weights into one piece of memory, if they are what they were built as."""
    if any(type(layer) is not nn.Linear for layer in layers):
        return
    weights = [layer.weight for layer in layers]
    one = weights[0]
    alike = all(w.dtype == one.dtype and w.device == one.device for w in weights)
    if not alike or one.is_meta or any(type(w) is not nn.Parameter for w in weights):
        return
    if packed(*layers) is None:
        with torch.no_grad():
            whole = torch.cat([w.detach() for w in weights])
            for w, part in zip(weights, whole.split([len(w) for w in weights]), strict=True):
                w.data = part


def packed(*layers: nn.Linear) -> Tensor | None:
    """The weight of all, [sum of outputs, inputs], if it lies there and the layers are plain."""
    if any(type(layer) is not nn.Linear for layer in layers):
        return None
    if len({layer.bias is None for layer in layers}) > 1:
        return None
    if any(map(hooked, layers)):
        return None
    weights = [layer.weight for layer in layers]
    first, end, rows = weights[0], None, 0
    for w in weights:
        if type(w) is not nn.Parameter or w.is_meta or not w.is_contiguous():
            return None
        if end is not None and (w.data_ptr() != end or w.dtype != first.dtype):
            return None
        end, rows = w.data_ptr() + w.numel() * w.element_size(), rows + len(w)
    storage = first.untyped_storage().data_ptr()
    if any(w.untyped_storage().data_ptr() != storage for w in weights):
        return None  # neighbours by chance
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))


class _PackedLinear(torch.autograd.Function):
    """linear(x, whole, bias), whose weight's gradient goes to the parts."""

    @staticmethod
    def forward(ctx, x, whole, bias, *parts):
        ctx.save_for_backward(x, *parts)  # whose versions tell of changes; `whole` has none
        ctx.whole, ctx.bias = whole, None if bias is None else bias.dtype
        return linear(x, whole, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, *parts), needs = ctx.saved_tensors, ctx.needs_input_grad
        rows, dx, dbias, grads = dy.flatten(0, -2), None, None, [None] * len(parts)
        if needs[0]:
            dx = gradient_of_input(rows, ctx.whole.to(dy.dtype)).view(x.shape).to(x.dtype)
        if needs[2]:
            dbias = rows.sum(0).to(ctx.bias)
        if any(needs[3:]):
            dw = gradient_of_weight(rows, x.to(dy.dtype).flatten(0, -2))
            grads = dw.to(parts[0].dtype).split([len(w) for w in parts])
            grads = [g if need else None for g, need in zip(grads, needs[3:], strict=True)]
        return dx, None, dbias, *grads


def linears(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """layer(x) of each, by one product where their weights are packed: then views of one tensor."""
    whole = None
    if type(x) is Tensor and not torch.compiler.is_compiling():
        whole = packed(*layers)
    if whole is None:
        return tuple(called(layer, x) for layer in layers)
    parts = [layer.weight for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers]
    bias = None if biases[0] is None else torch.cat(biases)
    if differentiable(x, *parts, *([] if bias is None else [bias])):
        y = _PackedLinear.apply(x, whole, bias, *parts)
    else:
        y = linear(x, whole, bias)
    return y.split([len(w) for w in parts], -1)


# --- One that is several --------------------------------------------------------------------------


def stacked(layer: nn.Linear, x: Tensor, layers: int) -> Tensor:
    """[layers, N, O] of x [N, K]: layer(x), whose weight is that of so many layers.

    On a CPU by a product for each. In the gradient of x one sum over all outputs, 58,000 in DFM-B,
    has four times the rounding error of a sum for each; and few rows take MKL a third of the time.
    """
    alone = (
        type(layer) is nn.Linear
        and not hooked(layer)
        and layer.bias is not None
        and single_on_cpu(x, layer.weight, layer.bias)
        and not torch.compiler.is_exporting()
    )
    if not alone:
        return layer(x).unflatten(-1, (layers, -1)).transpose(0, 1)
    return by_layers(x.expand(layers, -1, -1), layer.weight, layer.bias)


def by_layers(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[L, N, O] of x [L, N, K], weight [L * O, K], bias [L * O]: each layer has an x of its own."""
    given = x, weight, bias
    if not single_on_cpu(*given):
        weights, biases = (v.unflatten(0, (len(x), -1)) for v in (weight, bias))
        return torch.baddbmm(biases.unsqueeze(1), x, weights.transpose(1, 2))
    if differentiable(*given) and not torch.compiler.is_compiling():
        return _ByLayers.apply(*given)
    return _on_cpu(*given)


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """With the weights on the left, as MKL is slow with few rows there."""
    weights, biases = (v.unflatten(0, (len(x), -1)) for v in (weight, bias))
    return torch.baddbmm(biases.unsqueeze(-1), weights, x.transpose(1, 2)).transpose(1, 2)


class _ByLayers(torch.autograd.Function):
    """`_on_cpu`, of which torch's own gradient of x takes MKL five times as long for few rows."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _on_cpu(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad
        return (
            gradients_of_inputs(dy, weight) if need_dx else None,
            torch.bmm(dy.transpose(1, 2), x).flatten(0, 1) if need_dweight else None,
            dy.sum(1).flatten() if need_dbias else None,
        )
