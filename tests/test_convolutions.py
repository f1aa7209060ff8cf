"""Depthwise convolutions, beyond the shared suite."""

import pytest
import torch
from helpers import DEVICES, dtypes, relayout
from torch.nn import functional as F

import dfm_fast
from dfm_fast.nn import DepthwiseConv2d
from dfm_fast.ops.convolutions import norm_silu_depthwise_conv2d_ref

GROUPS = 4


def inputs(shape=(2, 12, 9, 10), kernel=3, device="cpu", dtype=torch.float32, mean=0.0):
    """x, norm_weight, norm_bias, weight, shift"""
    generator = torch.Generator().manual_seed(0)
    n, c = shape[:2]
    shapes = shape, (c,), (c,), (c, 1, kernel, kernel), (n, c)
    values = [torch.randn(s, generator=generator) for s in shapes]
    values[0] += mean
    return [v.to(device, dtype) for v in values]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_equals_conv2d(device, stride, kernel, layout):
    """torch's own in float64, forward and all gradients, at every padding."""
    wide = torch.float32 if torch.float64 not in dtypes(device) else torch.float64
    x, _, bias, weight, _ = inputs((2, 19, 11, 23), kernel, device)
    for padding in range(kernel):
        leaves = [v.to(wide).requires_grad_() for v in (x, weight, bias)]
        here = [relayout(leaves[0], layout), *leaves[1:]]
        got = dfm_fast.depthwise_conv2d(*here, stride=stride, padding=padding)
        exact = [v.detach().double().requires_grad_() for v in leaves]
        want = F.conv2d(*exact, stride, padding, groups=19)
        narrow = {"atol": 1e-5, "rtol": 1e-5}
        tolerance = {"atol": 1e-10, "rtol": 0} if wide == torch.float64 else narrow
        torch.testing.assert_close(got.double(), want, **tolerance)
        dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(got)
        for a, b in zip(
            torch.autograd.grad(got, leaves, relayout(dy, layout)),
            torch.autograd.grad(want, exact, dy.double()),
            strict=True,
        ):
            tolerance = (
                {"atol": 1e-9, "rtol": 0} if wide == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
            )
            torch.testing.assert_close(a.double(), b, **tolerance)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_outside_is_zero_after_the_activation(device, layout):
    """silu(offset) would be far from it."""
    x, norm_weight, _, weight, _ = inputs(device=device)
    bias = torch.full_like(norm_weight, 3.0)
    u = F.silu(F.group_norm(x.double(), GROUPS, norm_weight.double(), bias.double()))
    want = F.conv2d(u, weight.double(), padding=1, groups=12)
    got = dfm_fast.norm_silu_depthwise_conv2d(
        relayout(x, layout), None, norm_weight, bias, weight, num_groups=GROUPS
    )
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("device", DEVICES)
def test_given_statistics_change_no_bit(device, layout):
    """Forward and backward: they are a cached value, whose gradient x's own has in it."""
    leaves = [v.requires_grad_() for v in inputs(device=device)]
    x, *rest = leaves
    x = relayout(x, layout)
    found = [
        dfm_fast.norm_silu_depthwise_conv2d(x, statistics, *rest, num_groups=GROUPS)
        for statistics in (None, dfm_fast.channel_statistics(x))
    ]
    assert torch.equal(*found)
    dy = torch.ones_like(found[0]).cumsum(3)
    for a, b in zip(*(torch.autograd.grad(y, leaves, dy) for y in found), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_given_statistics_are_used(device):
    """x is not read for them again: those of another map make another norm."""
    x, *rest = inputs(device=device)
    other = dfm_fast.channel_statistics(3 * x + 1)
    got = dfm_fast.norm_silu_depthwise_conv2d(x, other, *rest, num_groups=GROUPS)
    u = dfm_fast.group_norm_silu(x, GROUPS, rest[0], rest[1], rest[3], statistics=other)
    torch.testing.assert_close(got, dfm_fast.depthwise_conv2d(u, rest[2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mean", [1e4, -3e3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_large_mean_cancels_nothing(device, layout, mean):
    x, *rest = inputs((1, 8, 48, 50), device=device, mean=mean)
    rest[-1] *= 100
    exact = norm_silu_depthwise_conv2d_ref(
        x.double(), None, *(v.double() for v in rest), num_groups=2
    )
    ref = norm_silu_depthwise_conv2d_ref(x, None, *rest, num_groups=2)
    x = relayout(x, layout)
    got = dfm_fast.norm_silu_depthwise_conv2d(
        x, dfm_fast.channel_statistics(x), *rest, num_groups=2
    )
    # Statistics are handed on in float32: to the budget comes one rounding of the mean.
    rstd = 1 / (x + rest[-1][:, :, None, None]).double().reshape(2, -1).std(1).min()
    rounding = abs(mean) * 2**-24 * rstd * rest[0].abs().max()
    rounding *= 1.1 * rest[2].abs().sum((1, 2, 3)).max()  # of silu's slope, and of all taps
    assert (got - exact).abs().max() <= 2 * (ref - exact).abs().max() + rounding


@pytest.mark.parametrize("device", DEVICES)
def test_only_x_and_statistics_are_kept(device):
    """Not the normalised map, nor the activated one."""
    x, *rest = (v.requires_grad_() for v in inputs(device=device))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dfm_fast.norm_silu_depthwise_conv2d(x, None, *rest, num_groups=GROUPS)
    maps = [t for t in kept if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in maps] == [x.data_ptr()]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_maps(layout):
    """More rows, columns and channels than any tile, ring or block of rows; blocks that move up."""
    x, *rest = inputs((1, 150, 131, 67))
    got = dfm_fast.norm_silu_depthwise_conv2d(relayout(x, layout), None, *rest, num_groups=5)
    want = norm_silu_depthwise_conv2d_ref(x, None, *rest, num_groups=5)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    for kernel, stride in ((3, 1), (7, 2)):
        x, _, _, weight, _ = inputs((1, 3, 301, 259), kernel)
        got = dfm_fast.depthwise_conv2d(relayout(x, layout), weight, stride=stride)
        want = F.conv2d(x, weight, None, stride, kernel // 2, groups=3)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [3, 5])
def test_bfloat16_is_float32_rounded_once(kernel, layout):
    """No bit less, wherever rows and pixels end within a vector or a pair of them."""
    for channels, height, width in ((1, 5, 5), (19, 4, 16), (33, 9, 31), (64, 3, 3), (70, 6, 50)):
        shape = 2, channels, height, width
        x, _, bias, weight, _ = inputs(shape, kernel, dtype=torch.bfloat16)
        given = relayout(x, layout), weight, bias
        wide = [v.float() for v in given]
        for padding in (1, 2):
            got = dfm_fast.depthwise_conv2d(*given, padding=padding)
            exact = dfm_fast.depthwise_conv2d(*wide, padding=padding)
            assert torch.equal(got, exact.bfloat16())
            want = F.conv2d(*wide, 1, padding, groups=channels)
            torch.testing.assert_close(exact, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_may_be_wider_than_the_map(device):
    """Low-precision activations with float32 parameters, as under autocast."""
    x, _, bias, weight, _ = inputs(device=device)
    leaves = [weight.requires_grad_(), bias.requires_grad_()]
    y = dfm_fast.depthwise_conv2d(x.half(), *leaves)
    assert y.dtype == torch.float16
    wide = dfm_fast.depthwise_conv2d(x.half().float(), *leaves)
    torch.testing.assert_close(y, wide.half(), atol=1e-3, rtol=1e-3)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), leaves))


@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same"])
@pytest.mark.parametrize("device", DEVICES)
def test_module_is_conv2d(device, padding):
    theirs = torch.nn.Conv2d(12, 12, 5, padding=padding, groups=12, device=device)
    ours = DepthwiseConv2d(12, 12, 5, padding=padding, groups=12, device=device)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = inputs(device=device)[0]
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert repr(ours) == repr(theirs).replace("Conv2d", "DepthwiseConv2d")


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [
        ("out_channels", {"out_channels": 24}),
        ("groups", {"groups": 6}),
        ("kernel_size", {"kernel_size": (3, 5)}),
        ("stride", {"stride": 3}),
        ("dilation", {"dilation": 2}),
        ("padding_mode", {"padding_mode": "reflect", "padding": 1}),
    ],
)
def test_module_says_what_it_does_not_do(argument, kwargs):
    with pytest.raises(ValueError, match=rf"DepthwiseConv2d: {argument}: expected .*, got "):
        DepthwiseConv2d(12, **kwargs)
