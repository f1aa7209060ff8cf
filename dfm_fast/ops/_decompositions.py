"""Raw operators of inference in torch's own, for graphs that others run: `torch.export`, ONNX.

Where torch has the operator (a norm, attention) it stands there as one, for a runtime to know it;
the order of its sums is the runtime's. Statistics that are given with a map are the map's own, so a
norm takes them again. In multi-query attention no key or value is repeated: the queries of heads
that share one are queries of one head.

`ONNX_FORMS` are for what ONNX or its runtime has badly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dfm_fast.ops.activations import _activate
from dfm_fast.ops.attentions import _without_keys
from dfm_fast.ops.group_norms import channel_statistics_ref, of_channels
from dfm_fast.ops.residuals import pixels_of
from dfm_fast.ops.rotaries import _rotate

_ops = torch.ops.dfm_fast


def _none(x: Tensor, count: int = 2) -> tuple[Tensor, ...]:
    """Outputs that nobody reads."""
    return tuple(x.new_empty(0) for _ in range(count))


# --- Norms ----------------------------------------------------------------------------------------


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return F.rms_norm(x, x.shape[-1:], weight, eps), x.new_empty(0)


def _per_token(m: Tensor, x: Tensor) -> Tensor:
    """[B, D] or like x -> broadcasts over x [B, ..., D]."""
    return m if m.ndim == x.ndim else m.unflatten(0, (-1, *[1] * (x.ndim - 2)))


def _ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return normed * (1 + _per_token(scale, x)) + _per_token(shift, x), *_none(x)


def _gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + _per_token(gate, x) * y


def _gated_residual_ada_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, ...]:
    residual = _gated_residual(x, y, gate)
    return residual, *_ada_layer_norm(residual, shift, scale, eps)


def _channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return channel_statistics_ref(x)[1:]


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
) -> tuple[Tensor, ...]:
    u = x if shift is None else x + of_channels(shift, x)
    # Of channels_last torch takes E[x²] - m² on a CPU.
    z = F.group_norm(u.contiguous(), num_groups, weight, bias, eps)
    found = _channel_statistics(x) if mean is None else _none(x)
    return F.silu(z) if silu else z, *found


# --- Convolutions ---------------------------------------------------------------------------------


def _depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    stride: int,
    padding: list[int],
) -> Tensor:
    if mean is not None:
        norm = norm_weight, norm_bias, shift, mean, m2, num_groups, eps
        x = _group_norm_silu(x, *norm, silu=True)[0]
    return F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1])


def _separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    num_groups: int,
    eps: float,
    *,
    with_statistics: bool,
) -> tuple[Tensor, ...]:
    norm = mean, m2, norm_weight, norm_bias, None, num_groups, eps
    padding = [depthwise_weight.shape[-1] // 2] * 2
    a = _depthwise_conv2d(x, depthwise_weight, None, *norm, 1, padding)
    y = F.conv2d(a, pointwise_weight, bias)
    y = y if shift is None else y + of_channels(shift, y)
    y = y if residual is None else y + residual
    return y, *(_channel_statistics(y) if with_statistics else _none(y))


_NO_NORM = (None, None, None, None, 1, 0.0)


def _separable(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, bias: Tensor | None, *residual: Tensor
) -> Tensor:
    rest = None, *(residual or (None,)), *_NO_NORM
    return _separable_conv2d(x, depthwise, pointwise, bias, *rest, with_statistics=False)[0]


def _separable_residual(
    x: Tensor,
    depthwise1: Tensor,
    pointwise1: Tensor,
    bias1: Tensor | None,
    depthwise2: Tensor,
    pointwise2: Tensor,
    bias2: Tensor | None,
) -> Tensor:
    h = F.silu(_separable(x, depthwise1, pointwise1, bias1))
    return _separable(h, depthwise2, pointwise2, bias2, x)


def _separable_upsample(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, bias: Tensor | None
) -> Tensor:
    return pixels_of(_separable(x, depthwise, pointwise, bias))


def _upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


# --- Transformers ---------------------------------------------------------------------------------


def _glu(x: Tensor, activation: str) -> Tensor:
    hidden, gate = x.chunk(2, -1)
    return hidden * _activate(gate, activation)


def _linear_glu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return _glu(F.linear(x, weight, bias), activation)


def _gelu_tanh(x: Tensor, bias: Tensor | None) -> Tensor:
    return _activate(x if bias is None else x + bias, "gelu_tanh")


def _qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x if weight is None else F.rms_norm(x, x.shape[-1:], weight, eps)
        return x if cos is None or sin is None else _rotate(x, cos, sin, interleaved)

    return one(q, q_weight), one(k, k_weight)


def _multi_query_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, save: bool
) -> tuple[Tensor, Tensor]:
    """[B, T, H, d] as [B, Hkv, T heads of one, d]: with one key head no copy."""
    mask, v = _without_keys(mask, v)
    heads = q.unflatten(2, (k.shape[2], -1)).transpose(1, 2)  # [B, Hkv, T, heads of one, d]
    mask = None if mask is None else mask[:, None, None]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(heads.flatten(2, 3), k, v, mask, scale=scale)
    y = y.unflatten(2, heads.shape[2:4]).transpose(1, 2)
    return y.flatten(2, 3), *_none(q, 1)


FORMS: dict[Any, Callable[..., Any]] = {
    _ops.ada_layer_norm: _ada_layer_norm,
    _ops.channel_statistics: _channel_statistics,
    _ops.depthwise_conv2d: _depthwise_conv2d,
    _ops.gated_residual: _gated_residual,
    _ops.gated_residual_ada_layer_norm: _gated_residual_ada_layer_norm,
    _ops.gelu_tanh: _gelu_tanh,
    _ops.glu: _glu,
    _ops.group_norm_silu: _group_norm_silu,
    _ops.linear_glu: _linear_glu,
    _ops.multi_query_attention: _multi_query_attention,
    _ops.qk_norm_rope: _qk_norm_rope,
    _ops.rms_norm: _rms_norm,
    _ops.separable_conv2d: _separable_conv2d,
    _ops.separable_residual: _separable_residual,
    _ops.separable_upsample: _separable_upsample,
    _ops.upsample_conv2d: _upsample_conv2d,
}

# --- For ONNX -------------------------------------------------------------------------------------


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """By InstanceNormalization. GroupNormalization (opset 21) is defined there by E[x²] - m², which
    is how ONNX Runtime computes it on a CPU: at mean 100 and deviation 1 it is wrong by 2e-2."""
    groups = x.unflatten(1, (num_groups, -1)).flatten(2)
    y = F.instance_norm(groups, eps=eps).view(x.shape)
    y = y if weight is None else y * of_channels(weight, x)
    return y if bias is None else y + of_channels(bias, x)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Two products. Attention (opset 23) takes a mask in ONNX Runtime that is as large as the
    scores only; before it there is no such operator."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(-1) @ v


ONNX_FORMS: dict[Any, Callable[..., Any]] = {
    F.group_norm: _group_norm,
    F.scaled_dot_product_attention: _attention,
}


class StandardForms(TorchFunctionMode):
    """Inside, forms take the place of what they are forms of: a trace has them alone."""

    def __init__(self, forms: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.forms = forms

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        form = self.forms.get(getattr(func, "overloadpacket", func))
        if form is None:
            return func(*args, **(kwargs or {}))
        with self:  # for the forms within
            return form(*args, **(kwargs or {}))
