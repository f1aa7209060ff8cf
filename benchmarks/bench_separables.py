"""Separable convolutions and SnapGen's residual block of them: rows only; the measuring is in
harness.py.

What a user writes is diffusers' block without its division by one; diffusers' own is a rival, and
so is what is written out in the other memory format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dfm_fast
from benchmarks.harness import Rival, Row, bind
from benchmarks.shapes import BLOCKS
from dfm_fast.nn import SeparableConvBlock
from dfm_fast.ops import separables

F32, BF16 = torch.float32, torch.bfloat16
GROUPS, TIME = 32, 1024


def convolve(x: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(x, depthwise, padding=1, groups=x.shape[1]), pointwise)


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


# --- One separable convolution: norm, SiLU, both convolutions, time embedding ---------------------


def written_out(x, depthwise, pointwise, shift, weight, bias):
    return convolve(norm_silu(x, weight, bias), depthwise, pointwise) + shift[:, :, None, None]


def fused(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def call(x, depthwise, pointwise, shift, weight, bias):
        return function(x, depthwise, pointwise, None, shift, None, weight, bias, num_groups=GROUPS)

    return call


def scaled(inputs: list[Tensor], norms: tuple[int, ...]) -> list[Tensor]:
    """Weights of a trained network's size: so are all maps."""
    inputs = [w / math.sqrt(w[0].numel()) if i and w.ndim == 4 else w for i, w in enumerate(inputs)]
    return [1 + 0.1 * v if i in norms else v for i, v in enumerate(inputs)]


def convolution_row(name: str, layout: str, dtype: torch.dtype, **options: Any) -> Row:
    shape, (n, c, h, w) = BLOCKS[name].shape, BLOCKS[name].shape
    hidden = 2 * BLOCKS[name].outputs
    shapes = shape, (c, 1, 3, 3), (hidden, c, 1, 1), (n, hidden), (c,), (c,)
    maps = n * h * w * (c + hidden) * (2 if options.get("direction") == "training" else 1)
    return Row(
        op="separable_conv2d",
        variant="",
        case=name,
        shapes=shapes,
        ours=fused(dfm_fast.separable_conv2d),
        reference=fused(separables.separable_conv2d_ref),
        least_bytes=(maps + sum(map(math.prod, shapes[1:]))) * dtype.itemsize,
        eager=written_out,
        compiled={"written out": written_out},
        dtype=dtype,
        layout=layout,
        adapt=lambda inputs: scaled(inputs, (4,)),
        **options,
    )


# --- The same as one kernel, against two ----------------------------------------------------------

STATISTICS: dict[Any, Any] = {}


def given_statistics(x: Tensor) -> Any:
    """Taken once for each map, as its producer hands them on."""
    key = x.data_ptr(), x.shape, x.dtype
    if key not in STATISTICS:
        STATISTICS[key] = dfm_fast.channel_statistics(x.detach())
    return STATISTICS[key]


def choose(choice: str) -> Callable[..., Tensor]:
    """The operator with that choice of `kernels.separables.ONE_KERNEL`."""

    def run(x, depthwise, pointwise, residual, weight, bias):
        from dfm_fast.kernels import separables as kernels

        before, kernels.ONE_KERNEL = kernels.ONE_KERNEL, choice
        try:
            given = {"num_groups": GROUPS, "statistics": given_statistics(x)}
            vectors = None, None, residual, weight, bias
            return dfm_fast.separable_conv2d(x, depthwise, pointwise, *vectors, **given)
        finally:
            kernels.ONE_KERNEL = before

    return run


def by_cublas(x, depthwise, pointwise, residual, weight, bias):
    """The same prologue, then a product with the residual as its epilogue."""
    given = {"num_groups": GROUPS}
    a = dfm_fast.norm_silu_depthwise_conv2d(
        x, given_statistics(x), weight, bias, depthwise, **given
    )
    rows, added = (v.permute(0, 2, 3, 1).flatten(0, 2) for v in (a, residual))
    y = torch.addmm(added, rows, pointwise.flatten(1).t())
    return y.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)


def summed(x, depthwise, pointwise, residual, weight, bias):
    return convolve(norm_silu(x, weight, bias), depthwise, pointwise) + residual


def reference_summed(x, depthwise, pointwise, residual, weight, bias):
    vectors = None, None, residual, weight, bias
    return separables.separable_conv2d_ref(x, depthwise, pointwise, *vectors, num_groups=GROUPS)


def one_kernel_row(name: str, second: bool, dtype: torch.dtype = BF16, **options: Any) -> Row:
    """A block's first or second convolution, both with a residual: what tables of tiles
    choose between."""
    (n, c, h, w), outputs = BLOCKS[name]
    c, outputs = (2 * outputs, outputs) if second else (c, 2 * outputs)
    shapes = (n, c, h, w), (c, 1, 3, 3), (outputs, c, 1, 1), (n, outputs, h, w), (c,), (c,)
    return Row(
        op="separable_one_kernel",
        variant=f"{c}_to_{outputs}",
        case=name,
        shapes=shapes,
        ours=choose("1"),
        reference=reference_summed,
        least_bytes=(sum(map(math.prod, shapes)) + n * outputs * h * w) * dtype.itemsize,
        eager=summed,
        compiled={"written out": summed},
        rivals={
            "two kernels": Rival(lambda *inputs: partial(choose("0"), *inputs)),
            "cublas": Rival(lambda *inputs: partial(by_cublas, *inputs)),
        },
        dtype=dtype,
        layout="channels_last",
        adapt=lambda inputs: scaled(inputs, (4,)),
        device="cuda",
        **options,
    )


# --- The block ------------------------------------------------------------------------------------

NAMES = ("norm1.weight", "norm1.bias", "conv1.depthwise.weight", "conv1.pointwise.weight")
NAMES += ("time_emb_proj.weight", "time_emb_proj.bias", "norm2.weight", "norm2.bias")
NAMES += ("conv2.depthwise.weight", "conv2.pointwise.weight", "conv_shortcut.weight")
NAMES += ("conv_shortcut.bias",)


def block(x, temb, w1, b1, depthwise1, pointwise1, wt, bt, w2, b2, depthwise2, pointwise2, *short):
    shift = F.linear(F.silu(temb), wt, bt)
    h = convolve(norm_silu(x, w1, b1), depthwise1, pointwise1) + shift[:, :, None, None]
    y = convolve(norm_silu(h, w2, b2), depthwise2, pointwise2)
    return (F.conv2d(x, *short) if short else x) + y


def reference_block(x, temb, w1, b1, d1, p1, wt, bt, w2, b2, d2, p2, *short):
    shift, norm = F.linear(F.silu(temb), wt, bt), {"num_groups": GROUPS}
    h = separables.separable_conv2d_ref(x, d1, p1, None, shift, None, w1, b1, **norm)
    shortcut = F.conv2d(x, *short) if short else x
    return separables.separable_conv2d_ref(h, d2, p2, None, None, shortcut, w2, b2, **norm)


def functional(make: Callable[[], torch.nn.Module]) -> Callable[..., Tensor]:
    """A layer, with the weights that it is given: loaded once for the same ones, as users do."""
    layers: dict[int, torch.nn.Module] = {}

    def loaded(weights: tuple[Tensor, ...]) -> torch.nn.Module:
        with torch.device("meta"):
            layer = make()
        for name, weight in zip(NAMES, weights, strict=False):
            owner, leaf = name.rsplit(".", 1)
            layer.get_submodule(owner)._parameters[leaf] = weight
        return layer

    def call(x: Tensor, temb: Tensor, *weights: Tensor) -> Tensor:
        key = id(weights[0])  # which its layer keeps alive
        if key not in layers:
            layers[key] = loaded(weights)
        return layers[key](x, temb)

    return call


def theirs(inputs: int, outputs: int) -> torch.nn.Module:
    from diffusers.models.unets.unet_dreamlite import ResnetBlock2DDreamLite

    widths = {"in_channels": inputs, "out_channels": outputs, "temb_channels": TIME}
    return ResnetBlock2DDreamLite(**widths, eps=1e-5, use_sep_conv=True)


def of_diffusers(direction: str) -> Callable[..., Callable[[], Any]]:
    def prepare(x: Tensor, temb: Tensor, *weights: Tensor) -> Callable[[], Any]:
        training, widths = direction == "training", (x.shape[1], weights[9].shape[0])
        layer = functional(lambda: theirs(*widths).train(training))
        return bind(layer, [x, temb, *weights], direction)

    return prepare


def in_planes(*inputs: Tensor) -> Callable[[], Tensor]:
    given = [v.contiguous() for v in inputs]
    return lambda: block(*given)


def block_row(name: str, layout: str, dtype: torch.dtype, **options: Any) -> Row:
    case = BLOCKS[name]
    (n, c, h, w), o = case.shape, case.outputs
    i, j = (c,), (2 * o,)
    weights = [i, i, (c, 1, 3, 3), (2 * o, c, 1, 1), (2 * o, TIME), j, j, j, (2 * o, 1, 3, 3)]
    weights += [(o, 2 * o, 1, 1), *([(o, c, 1, 1), (o,)] if c != o else [])]
    direction = options.get("direction", "forward")
    training = direction == "training"
    rivals = {"diffusers": Rival(of_diffusers(direction), package="diffusers")}
    if layout == "channels_last" and not training:
        rivals["contiguous"] = Rival(in_planes)
    maps = n * h * w * (2 * c + 5 * o) * (3 if training else 1)
    return Row(
        op="separable_conv_block",
        variant="",
        case=name,
        shapes=(case.shape, (n, TIME), *weights),
        ours=functional(lambda: SeparableConvBlock(c, o, TIME)),
        reference=reference_block,
        least_bytes=(maps + sum(map(math.prod, weights))) * dtype.itemsize,
        eager=block,
        compiled={"written out": block},
        rivals=rivals,
        dtype=dtype,
        layout=layout,
        adapt=lambda inputs: scaled_block(inputs),
        **options,
    )


def scaled_block(inputs: list[Tensor]) -> list[Tensor]:
    inputs = scaled(inputs, (2, 8))
    inputs[6] = inputs[6] / math.sqrt(TIME)
    return inputs


def rows() -> Iterator[Row]:
    for dtype in (F32, BF16):
        yield block_row("block_256_64", "channels_last", dtype, quick=True)
        for name in ("block_256_64", "block_512_32", "block_896_16"):
            yield convolution_row(name, "channels_last", dtype)
            if name != "block_256_64":
                yield block_row(name, "channels_last", dtype)
            yield block_row(name, "contiguous", dtype)
        yield block_row("block_1408_32", "channels_last", dtype)
        for name in ("block_256_64", "block_512_32", "block_896_16"):
            yield block_row(name, "channels_last", dtype, direction="training")
    for name in ("large_block_256", "large_block_512", "large_block_896"):
        options = {"device": "cuda", "quick": name == "large_block_256"}
        yield block_row(name, "channels_last", BF16, **options)
        yield block_row(name, "channels_last", BF16, device="cuda", direction="training")
        for second in (False, True):
            yield one_kernel_row(name, second, quick=options["quick"])
    yield one_kernel_row("large_block_256", True, torch.float16)
    yield one_kernel_row("block_256_64", True)


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_separables(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
