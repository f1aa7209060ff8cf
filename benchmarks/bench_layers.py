"""Layers of SnapGen's UNet, one row each: rows only; the measuring is in harness.py.

A layer is built once, of the row's weights. Rivals: diffusers' layer of the same weights, where it
has one; for cross-attention of cached keys and values also torch's operators on such a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dfm_fast
from benchmarks.bench_blocks import rotate
from benchmarks.harness import Rival, Row
from benchmarks.shapes import ATTENTION_LAYERS, CONVOLUTION_LAYERS
from dfm_fast.ops import attentions, norms, rotaries, separables, upsamples

F32, BF16 = torch.float32, torch.bfloat16
EPS, HEAD_DIM = 1e-5, 64
Function = Callable[..., Any]


def built(make: Callable[..., nn.Module], names: Sequence[str], first: int) -> Function:
    """The layer as a function of the row's inputs, whose weights begin at `first`; made once for
    every set of them."""
    cache: dict[Any, nn.Module] = {}

    def call(*inputs: Tensor) -> Any:
        key = inputs[first].data_ptr(), inputs[first].dtype
        if key not in cache:
            cache[key] = load(make(*inputs), names, inputs[first:])
        return cache[key](*inputs[:first])

    return call


def load(layer: nn.Module, names: Sequence[str], weights: Sequence[Tensor]) -> nn.Module:
    like = weights[0]
    layer = layer.to(like.device, like.dtype).eval().requires_grad_(False)
    layer.load_state_dict(dict(zip(names, weights, strict=True)))
    return layer


def of_diffusers(call: Callable[..., Function]) -> Rival:
    return Rival(call, package="diffusers")


def scaled(inputs: list[Tensor], first: int) -> list[Tensor]:
    """Weights of a trained network's size, so that all maps are of size one; norms near one."""
    weights = [
        w / math.sqrt(w[0].numel()) if w.ndim > 1 else (1 + 0.1 * w if len(w) == HEAD_DIM else w)
        for w in inputs[first:]
    ]
    return [*inputs[:first], *weights]


def layer_row(layer: str, case: str, first: int, shapes: Sequence[Any], **options: Any) -> Row:
    """`first` of the shapes are data; all are read once, and a tensor like the first is written."""
    moved = math.prod(shapes[0]) + sum(map(math.prod, shapes))
    given = {"variant": "", "dtype": F32, "adapt": lambda inputs: scaled(inputs, first), **options}
    size = given["dtype"].itemsize
    return Row(op=layer, case=case, shapes=tuple(shapes), least_bytes=moved * size, **given)


# --- Attention ------------------------------------------------------------------------------------

NAMES = "to_q.weight", "to_k.weight", "to_v.weight", "norm_q.weight", "norm_k.weight"
NAMES += "to_out.0.weight", "to_out.0.bias"


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def heads(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight).unflatten(-1, (-1, HEAD_DIM))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head of keys for all queries, by strides of zero."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def rope_tables(size: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(like.dtype, F32)
    return rotaries.rope_2d(*size, HEAD_DIM, device=like.device, dtype=wide)


def written(norm: Function = rms_norm, rope: Function = rotate, attend: Function = sdpa) -> Any:
    """Functions that a user writes, or of our references."""

    def cross(x, text, wq, wk, wv, gq, gk, wo, bo):
        q, k, v = (heads(t, w) for t, w in ((x, wq), (text, wk), (text, wv)))
        return F.linear(attend(norm(q, gq), norm(k, gk), v).flatten(2), wo, bo)

    def own(x, *weights):
        return cross(x, x, *weights)

    def of_map(x, depthwise, wq, wk, wv, gq, gk, wo, bo):
        tables, size = rope_tables(x.shape[2:], x), x.shape[2:]
        a = F.conv2d(x, depthwise, padding=1, groups=x.shape[1])
        q, k, v = (heads(a.flatten(2).transpose(1, 2), w) for w in (wq, wk, wv))
        q, k = (rope(norm(t, g), *tables) for t, g in ((q, gq), (k, gk)))
        y = F.linear(attend(q, k, v).flatten(2), wo, bo)
        return y.transpose(1, 2).unflatten(2, size)

    return cross, own, of_map


EAGER = written()
REFERENCE = written(
    lambda x, weight: norms.rms_norm_ref(x, weight, eps=EPS),
    lambda x, cos, sin: rotaries.qk_norm_rope_ref(x, x, None, None, cos, sin)[0],
    attentions.multi_query_attention_ref,
)


def with_cache(layer: nn.Module) -> nn.Module:
    """The layer when the text's keys and values are there."""
    cache: dict[int, Any] = {}

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer
            self.load_state_dict = layer.load_state_dict

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            if text.data_ptr() not in cache:
                cache[text.data_ptr()] = layer.key_values(text)
            return layer(x, cache[text.data_ptr()])

    return Cached()


def keys_given(x: Tensor, text: Tensor, *weights: Tensor) -> Callable[[], Tensor]:
    wq, wk, wv, gq, gk, wo, bo = weights
    k, v = rms_norm(heads(text, wk), gk), heads(text, wv)
    return lambda: F.linear(sdpa(rms_norm(heads(x, wq), gq), k, v).flatten(2), wo, bo)


def their_attention(x: Tensor, *rest: Tensor) -> Callable[[], Tensor]:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0

    text, weights = (rest[0] if len(rest) == 8 else None), rest[-7:]
    theirs = Attention(
        query_dim=x.shape[-1],
        cross_attention_dim=None if text is None else text.shape[-1],
        heads=len(weights[0]) // HEAD_DIM,
        kv_heads=1,
        dim_head=HEAD_DIM,
        qk_norm="rms_norm",
        eps=EPS,
        processor=DreamLiteAttnProcessor2_0(),
    )
    load(theirs, NAMES, weights)
    return lambda: theirs(x, text)


def attention_row(layer: str, case: str, dtype: torch.dtype, variant: str = "") -> Row:
    batch, side, dim, tokens, cross_dim = ATTENTION_LAYERS[case]
    shape = (batch, side**2, dim)
    inner, kv = dim, HEAD_DIM
    keys = dim if layer == "multi_query_attention_layer" else cross_dim
    weights = (inner, dim), (kv, keys), (kv, keys), (HEAD_DIM,), (HEAD_DIM,), (dim, inner), (dim,)
    options: dict[str, Any] = {"dtype": dtype, "variant": variant}
    rivals = {"diffusers": of_diffusers(their_attention)}
    if layer == "multi_query_attention_layer":
        ours = built(lambda x, *_: dfm_fast.nn.MultiQueryAttention(dim, dim // 64), NAMES, 1)
        plain, exact, shapes = EAGER[1], REFERENCE[1], (shape, *weights)
    else:
        cached = with_cache if variant == "cached" else lambda made: made

        def make(*_: Tensor) -> nn.Module:
            return cached(dfm_fast.nn.CrossAttention(dim, cross_dim, dim // 64))

        ours, shapes = built(make, NAMES, 2), (shape, (batch, tokens, cross_dim), *weights)
        plain, exact = EAGER[0], REFERENCE[0]
        if variant == "cached":
            rivals["keys given"] = Rival(keys_given)
    return layer_row(
        layer,
        case,
        len(shapes) - 7,
        shapes,
        ours=ours,
        reference=exact,
        eager=plain,
        compiled={"written out": plain},
        rivals=rivals,
        **options,
    )


def map_attention_row(case: str, dtype: torch.dtype) -> Row:
    batch, side, dim, *_ = ATTENTION_LAYERS[case]
    weights = (dim, dim), (HEAD_DIM, dim), (HEAD_DIM, dim), (HEAD_DIM,), (HEAD_DIM,)
    shapes = (batch, dim, side, side), (dim, 1, 3, 3), *weights, (dim, dim), (dim,)
    names = "depthwise.weight", *NAMES
    return layer_row(
        "separable_conv_attention",
        case,
        1,
        shapes,
        ours=built(lambda *_: dfm_fast.nn.SeparableConvAttention(dim, dim // 64), names, 1),
        reference=REFERENCE[2],
        eager=EAGER[2],
        compiled={"written out": EAGER[2]},
        rivals={"diffusers": "it has no such layer"},
        dtype=dtype,
        layout="channels_last",
    )


# --- Convolutions ---------------------------------------------------------------------------------


def separable(x: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(x, depthwise, padding=1, groups=x.shape[1]), pointwise)


def upsampled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def their_separable(x: Tensor, *weights: Tensor) -> Callable[[], Tensor]:
    from diffusers.models.unets.unet_dreamlite import DepthwiseSeparableConv

    theirs = DepthwiseSeparableConv(x.shape[1], len(weights[1]), 3, padding=1)
    theirs = load(theirs, ("depthwise.weight", "pointwise.weight"), weights)
    theirs = theirs.to(memory_format=torch.channels_last)
    return lambda: theirs(x)


def their_upsample(x: Tensor, *weights: Tensor) -> Callable[[], Tensor]:
    from diffusers.models.upsampling import Upsample2D

    theirs = load(Upsample2D(x.shape[1], use_conv=True), ("conv.weight", "conv.bias"), weights)
    theirs = theirs.to(memory_format=torch.channels_last)
    return lambda: theirs(x)


def separable_row(case: str, dtype: torch.dtype) -> Row:
    shape, outputs = CONVOLUTION_LAYERS[case]
    shapes = shape, (shape[1], 1, 3, 3), (outputs, shape[1], 1, 1)
    names = "depthwise.weight", "pointwise.weight"
    return layer_row(
        "separable_conv_layer",
        case,
        1,
        shapes,
        ours=built(lambda *_: dfm_fast.nn.SeparableConv2d(shape[1], outputs), names, 1),
        reference=separables.separable_conv2d_ref,
        eager=separable,
        compiled={"written out": separable},
        rivals={"diffusers": of_diffusers(their_separable)},
        dtype=dtype,
        layout="channels_last",
    )


def upsample_row(case: str, dtype: torch.dtype) -> Row:
    shape, outputs = CONVOLUTION_LAYERS[case]
    shapes = shape, (outputs, shape[1], 3, 3), (outputs,)
    return layer_row(
        "upsample_conv_layer",
        case,
        1,
        shapes,
        ours=built(lambda *_: dfm_fast.nn.UpsampleConv2d(*shapes[1][1::-1]), ("weight", "bias"), 1),
        reference=upsamples.upsample_conv2d_ref,
        eager=upsampled,
        compiled={"written out": upsampled},
        rivals={"diffusers": of_diffusers(their_upsample)},
        dtype=dtype,
        layout="channels_last",
    )


def rows() -> Iterator[Row]:
    for dtype in (F32, BF16):
        for case in ("layer_896_32", "layer_512_64"):
            yield attention_row("cross_attention", case, dtype, "text")
            yield attention_row("cross_attention", case, dtype, "cached")
        yield attention_row("multi_query_attention_layer", "layer_896_32", dtype)
        yield map_attention_row("layer_896_32", dtype)
        yield separable_row("conv_512_32", dtype)
        yield upsample_row("conv_512_32", dtype)


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_layers(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
