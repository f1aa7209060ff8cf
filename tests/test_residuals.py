"""Layers of a decoder without norms: values of each backend, and what they are compiled into."""

import pytest
import torch
from helpers import DEVICES, assert_within_budget, dtypes
from torch import nn

from dfm_fast.models.snapgen_decoder import Block, Upsample
from dfm_fast.ops.residuals import (
    separable_residual,
    separable_residual_ref,
    separable_upsample,
    separable_upsample_ref,
)

# name: (shape of x, hidden channels of a block; of an upsampling a quarter of its outputs)
MAPS = {
    "block": ((2, 16, 6, 8), 32),
    "odd": ((2, 19, 5, 11), 7),
    "strips": ((1, 8, 5, 135), 20),  # of columns, the last of seven
    "tall": ((2, 5, 41, 3), 70),  # more rows than are kept, two panels
    "narrow_strips": ((1, 4, 4, 37), 600),  # of 16 columns
    "pixel": ((3, 8, 1, 1), 5),
}
UPSAMPLES = {"residual": False, "upsample": True}


def inputs(shape, hidden, upsample, device, dtype, bias=True):
    """x and weights; channels_last."""
    generator, c = torch.Generator().manual_seed(0), shape[1]
    sizes = [(c, 4 * hidden)] if upsample else [(c, hidden), (hidden, c)]
    values = [torch.randn(shape, generator=generator)]
    for channels, outputs in sizes:
        values.append(torch.randn(channels, 1, 3, 3, generator=generator) / 3)
        values.append(torch.randn(outputs, channels, 1, 1, generator=generator) / channels**0.5)
        values.append(torch.randn(outputs, generator=generator) if bias else None)
    values = [None if v is None else v.to(device, dtype) for v in values]
    return [values[0].contiguous(memory_format=torch.channels_last), *values[1:]]


@pytest.mark.parametrize("upsample", UPSAMPLES.values(), ids=UPSAMPLES)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("device", DEVICES)
def test_values(device, name, upsample):
    ours, reference = (
        (separable_upsample, separable_upsample_ref)
        if upsample
        else (separable_residual, separable_residual_ref)
    )
    for dtype in dtypes(device):
        for bias in (True, False):
            given = inputs(*MAPS[name], upsample, device, dtype, bias)
            got, ref = ours(*given), reference(*given)
            exact = reference(*(None if v is None else v.cpu().double() for v in given))
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert_within_budget(got, ref, exact, cap=64, what=f"{name} {dtype}", inputs=dtype)
            assert torch.equal(got, ours(*given))


@pytest.mark.parametrize("upsample", UPSAMPLES.values(), ids=UPSAMPLES)
def test_operators_are_registered_as_torch_wants_them(upsample):
    name = "separable_upsample" if upsample else "separable_residual"
    given = inputs(*MAPS["odd"], upsample, "cpu", torch.float32)
    torch.library.opcheck(getattr(torch.ops.dfm_fast, name).default, given)


@pytest.mark.parametrize("make", [lambda: Block(6, 2), lambda: Upsample(6, 4)], ids=UPSAMPLES)
def test_layers_with_and_without_gradients_agree(make):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(2, 6, 9, 7).contiguous(memory_format=torch.channels_last)
    with_graph = layer(x)
    assert with_graph.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(layer(x), with_graph, atol=1e-5, rtol=1e-5)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x), atol=0, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_of_one_sample_reaches_another(device):
    given = inputs((2, 8, 7, 5), 12, False, device, torch.float32)
    want = separable_residual(*given)[:1]
    given[0][1] = float("nan")
    assert torch.equal(separable_residual(*given)[:1], want)


def test_a_raw_operator_refuses_other_maps_and_weights():
    if not torch._C._dispatch_has_kernel_for_dispatch_key("dfm_fast::separable_residual", "CPU"):
        pytest.skip("without the extension the reference serves")
    x, *weights = inputs((1, 4, 6, 5), 8, False, "cpu", torch.float32)
    with pytest.raises(RuntimeError, match="separable_residual: expected a channels_last x"):
        separable_residual(x.contiguous(), *weights)
    weights[3] = nn.Parameter(torch.zeros(7, 1, 3, 3))
    with pytest.raises(RuntimeError, match=r"expected weights \[8, 1, 3, 3\]"):
        separable_residual(x, *weights)
