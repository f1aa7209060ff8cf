"""Upsampling convolutions, beyond the shared suite."""

import pytest
import torch
from helpers import DEVICES, assert_within_budget, relayout
from torch.nn import functional as F

import dfm_fast
from dfm_fast.nn import UpsampleConv2d
from dfm_fast.ops import _rows
from dfm_fast.ops.upsamples import (
    gradients_of_rows,
    phase_weights,
    split_phases,
    tap_gradients,
    upsample_conv2d_backward_ref,
    upsample_conv2d_ref,
)


def values(*sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def test_phases_are_the_definition():
    """Exactly, in whole numbers."""
    x, weight = (torch.round(4 * v).double() for v in values((2, 3, 5, 4), (6, 3, 3, 3)))
    y = upsample_conv2d_ref(x, weight)
    for k, phase in enumerate(phase_weights(weight)):
        a, b = k // 2, k % 2
        part = F.conv2d(x, phase, padding=1)[:, :, a : a + 5, b : b + 4]
        assert torch.equal(part, y[:, :, a::2, b::2])
    whole = F.conv2d(x, phase_weights(weight).flatten(0, 1), padding=1)
    inside = split_phases(torch.ones_like(y)) != 0
    assert torch.equal(torch.where(inside, whole, 0), split_phases(y))


def test_tap_gradients_are_the_adjoint_of_phase_weights():
    weight, dphases = (v.double() for v in values((6, 3, 3, 3), (4, 6, 3, 2, 2)))
    there, back = phase_weights(weight), tap_gradients(dphases)
    torch.testing.assert_close((there * dphases).sum(), (weight * back).sum())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("blocks", [False, True])
def test_gradients_of_rows_are_those_of_the_definition(blocks, layout, monkeypatch):
    """As exact float32 has them on a GPU: in blocks of rows, the last a rest."""
    monkeypatch.setattr(_rows, "exact_on_gpu", lambda _: blocks)
    given = values((2, 3, 9, 7), (5, 3, 3, 3), (2, 5, 18, 14), dtype=torch.float64)
    x, weight, dy = (relayout(v, layout) for v in given)
    got = gradients_of_rows(dy, x, weight, True, True)
    for a, b in zip(got, upsample_conv2d_backward_ref(dy, x, weight, True, True), strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("device", DEVICES)
def test_one_pixel(device):
    """Whose neighbours are all zeros."""
    x, weight, bias = (v.to(device) for v in values((2, 4, 1, 1), (3, 4, 3, 3), (3,)))
    y = dfm_fast.upsample_conv2d(x, weight, bias)
    torch.testing.assert_close(y, upsample_conv2d_ref(x, weight, bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_whole_numbers_are_exact(device):
    """Sums and differences of small whole numbers are not rounded."""
    sizes = (2, 7, 9, 6), (70, 7, 3, 3), (70,)
    x, weight, bias = (torch.round(3 * v).to(device) for v in values(*sizes))
    want = upsample_conv2d_ref(x.double(), weight.double(), bias.double()).float()
    for layout in ("contiguous", "channels_last"):
        got = dfm_fast.upsample_conv2d(relayout(x, layout), relayout(weight, layout), bias)
        assert torch.equal(got, want)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 100], ids=["noise", "photograph"])
def test_many_channels_stay_within_the_budget(layout, dtype, offset):
    """Random maps, and smooth ones with a large mean, whose differences are small."""
    x, weight, bias = values((1, 512, 16, 12), (96, 512, 3, 3), (96,))
    x, weight, bias = (v.to(dtype) for v in (x + offset, weight / 68, bias))
    got = dfm_fast.upsample_conv2d(relayout(x, layout), relayout(weight, layout), bias)
    ref = upsample_conv2d_ref(x, weight, bias)
    exact = upsample_conv2d_ref(x.double(), weight.double(), bias.double())
    assert_within_budget(got, ref, exact, cap=64, what=f"{layout} {dtype}", inputs=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_module_is_interpolate_and_convolution(device, bias):
    theirs = torch.nn.Conv2d(6, 10, 3, padding=1, bias=bias, device=device)
    ours = UpsampleConv2d(6, 10, bias, device=device)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = values((2, 6, 5, 7))[0].to(device)
    want = theirs(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(ours(x), want, atol=1e-5, rtol=1e-5)
    assert repr(ours) == repr(theirs).replace("Conv2d", "UpsampleConv2d")
