"""Weights of 8 bits in exported models: torchao's `Int8WeightOnlyConfig`, for convolutions too.

The weights of products (linear layers, convolutions that are not depthwise) become integers times a
scale for every output channel. Everything else stays float32, and is computed in it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dfm_fast.models._exportable import OP, quiet
from dfm_fast.models._pretrained import Pretrained

# What rounding may change an output by, relative to its largest value.
BUDGET = 5e-2


def check_installed() -> None:
    """Raises ImportError."""
    if find_spec("torchao") is None:
        raise ImportError(
            f"{OP}: weights: expected torchao to round them to int8, got none: "
            "pip install 'dfm_fast[export]'"
        )


# --- Of a module ----------------------------------------------------------------------------------


def narrow(model: Pretrained) -> Pretrained:
    """In place: a layer keeps int8 and scales, and multiplies them where its weight is read."""
    model.requires_grad_(False)
    for layer in _products(model):
        parametrize.register_parametrization(layer, "weight", _Int8())
    return model


@torch.no_grad()
def rounded(model: Pretrained) -> Pretrained:
    """In place: the values of those weights, in float32."""
    form = _Int8()
    for layer in _products(model):
        layer.weight.copy_(form(*form.right_inverse(layer.weight)))
    return model


def _products(model: nn.Module) -> list[Any]:
    return [
        m
        for m in model.modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)
    ]


class _Int8(nn.Module):
    def forward(self, values: Tensor, scale: Tensor) -> Tensor:
        return values * scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """int8 like the weight; float32 [O, 1, ...]."""
        with quiet("torchao", "torch.utils._pytree"):  # of kernels for other machines
            from torchao.quantization import Int8Tensor
            from torchao.quantization.granularity import PerRow

        found = Int8Tensor.from_hp(weight.flatten(1), PerRow())
        return found.qdata.view(weight.shape), found.scale.view(-1, *[1] * (weight.ndim - 1))


# --- Of a graph -----------------------------------------------------------------------------------


def to_dequantize_linear(graph: Any) -> None:
    """Of onnx_ir: Mul(Cast(weight), scale) -> DequantizeLinear, which runtimes know; under the
    names `layer`.weight and .weight_scale."""
    import onnx_ir

    for product in list(graph):
        cast = product.inputs[0].producer() if product.op_type == "Mul" else None
        if cast is None or cast.op_type != "Cast" or not _is_int8(cast.inputs[0]):
            continue
        weight, scale = cast.inputs[0], product.inputs[1]
        layer = weight.name.removesuffix(".parametrizations.weight.original0")
        weight.name = f"{layer}.weight"
        graph.initializers.pop(scale.name)
        values = scale.const_value.numpy().reshape(-1)
        name, kept = f"{layer}.weight_scale", onnx_ir.tensor(values)
        kept.name = name
        scale = onnx_ir.Value(
            name=name, shape=onnx_ir.Shape(values.shape), type=scale.type, const_value=kept
        )
        graph.register_initializer(scale)
        node = onnx_ir.node("DequantizeLinear", [weight, scale], {"axis": 0})
        graph.insert_after(product, node)
        (old,), (new,) = product.outputs, node.outputs
        new.name, new.shape, new.type = f"{layer}.weight_float32", old.shape, old.type
        old.replace_all_uses_with(new)
        graph.remove([product, cast], safe=True)


def _is_int8(value: Any) -> bool:
    return value.is_initializer() and value.dtype.name == "INT8"
