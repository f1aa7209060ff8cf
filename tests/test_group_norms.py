"""Group norms and channel statistics, beyond the shared suite."""

import re

import pytest
import torch
from helpers import DEVICES, assert_within_budget, dtypes, relayout
from torch.nn import functional as F

import dfm_fast
from dfm_fast._library import INTERPRET
from dfm_fast.nn import GroupNormSiLU
from dfm_fast.ops.group_norms import channel_statistics_ref, group_norm_silu_ref

SHAPE, GROUPS = (2, 12, 6, 10), 4


def inputs(device="cpu", dtype=torch.float32, shape=SHAPE, mean=0.0):
    """x, weight, bias, shift"""
    generator = torch.Generator().manual_seed(0)
    n, c = shape[:2]
    values = [torch.randn(s, generator=generator) for s in (shape, (c,), (c,), (n, c))]
    values[0] += mean
    return [v.to(device, dtype) for v in values]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("device", DEVICES)
def test_given_statistics_change_no_bit(device, layout):
    """Forward and backward: they are a cached value, whose gradient x's own has in it."""
    for dtype in dtypes(device):
        x, *small = (v.requires_grad_() for v in inputs(device, dtype))
        y, dy = relayout(x, layout), relayout(torch.ones(SHAPE, device=device).cumsum(3), layout)
        plain = dfm_fast.group_norm_silu(y, GROUPS, *small)
        given = dfm_fast.channel_statistics(y)
        cached = dfm_fast.group_norm_silu(y, GROUPS, *small, statistics=given)
        assert torch.equal(plain, cached)
        leaves, dy = [x, *small], dy.to(dtype)
        for a, b in zip(
            *(torch.autograd.grad(v, leaves, dy) for v in (plain, cached)), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.skipif(not INTERPRET, reason="the choice of Triton's launches")
@pytest.mark.parametrize(
    ("shape", "groups", "merging"),
    [
        ((2, 12, 24, 25), 3, True),  # rows of 4 channels
        ((1, 6, 40, 30), 2, True),  # groups of 3: rows of one channel
        ((2, 12, 120, 151), 3, True),  # several blocks
        ((1, 42, 3, 3), 2, False),  # more moments than pixels to spare
    ],
)
def test_the_pass_that_applies_merges_where_that_is_little(shape, groups, merging, monkeypatch):
    kernels = pytest.importorskip("dfm_fast.kernels.group_norms")
    launch, used = kernels._merging, []
    monkeypatch.setattr(kernels, "_merging", lambda *a: used.append(launch(*a)) or used[-1])
    for given in (4, 2, 1):  # of x, weight, bias, shift
        args = inputs(shape=shape)
        small = [v if i < given else None for i, v in enumerate(args)][1:]
        got = dfm_fast.group_norm_silu(args[0], groups, *small)
        exact = group_norm_silu_ref(
            args[0].double(), groups, *(None if v is None else v.double() for v in small)
        )
        ref = group_norm_silu_ref(args[0], groups, *small)
        assert_within_budget(got, ref, exact, cap=64.0, what=f"{given} given")
        statistics = dfm_fast.channel_statistics(args[0])
        assert torch.equal(
            got, dfm_fast.group_norm_silu(args[0], groups, *small, statistics=statistics)
        )
    assert [plan is not None for plan in used] == [merging] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_given_statistics_are_used(device):
    """x is not read for them again: those of another map make another norm."""
    x, *small = inputs(device)
    other = dfm_fast.channel_statistics(3 * x + 1)
    got = dfm_fast.group_norm_silu(x, GROUPS, *small[:2], activation="none", statistics=other)
    u = (3 * x + 1).unflatten(1, (GROUPS, -1))
    mean, var = u.mean((2, 3, 4), keepdim=True), u.var((2, 3, 4), keepdim=True, correction=0)
    h = ((x.unflatten(1, (GROUPS, -1)) - mean) * torch.rsqrt(var + 1e-5)).flatten(1, 2)
    want = h * small[0][:, None, None] + small[1][:, None, None]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mean", [1e4, -3e3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_large_mean_cancels_nothing(device, layout, mean):
    x, *small = inputs(device, shape=(1, 8, 48, 50), mean=mean)
    small[-1] *= 100
    exact = channel_statistics_ref(x.double())
    got = dfm_fast.channel_statistics(relayout(x, layout))
    error = (got.m2.double() / exact.m2 - 1).abs().max()
    # E[x²] - m² in float32 is off by more than 1, merged means rounded to it by up to 1e-4.
    assert error < 1e-5
    assert (got.mean - exact.mean).abs().max() <= abs(mean) * 2**-23
    y = dfm_fast.group_norm_silu(relayout(x, layout), 2, *small)
    exact = group_norm_silu_ref(x.double(), 2, *(v.double() for v in small))
    ref = (group_norm_silu_ref(x, 2, *small).double() - exact).abs().max()
    # Statistics are handed on in float32: to the budget comes one rounding of the mean.
    rstd = 1 / (x + small[-1][:, :, None, None]).double().view(2, -1).std(1).min()
    rounding = abs(mean) * 2**-24 * rstd * small[0].abs().max()
    assert (y - exact).abs().max() <= 2 * ref + rounding


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics_of_a_jump(layout):
    """The first rows say nothing of the rest: what a shift by the first pixel gets wrong."""
    x = inputs(shape=(1, 20, 64, 40))[0] + 1e4
    x[:, :, :8] -= 1e4
    got, exact = (
        dfm_fast.channel_statistics(relayout(x, layout)),
        channel_statistics_ref(x.double()),
    )
    torch.testing.assert_close(got.m2.double(), exact.m2, atol=0, rtol=1e-6)
    constant = dfm_fast.channel_statistics(torch.full_like(x, 1 / 3))
    assert (constant.m2 >= 0).all()
    assert constant.m2.max() < 1e-10


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("device", DEVICES)
def test_pre_activations_without_bounds(device, layout):
    """Of infinite ones silu is what torch's is: infinite, and not a number."""
    x, weight, bias, _ = inputs(device)
    bias[:6] = torch.tensor([torch.inf, -torch.inf, 3e38, -3e38, 100.0, -100.0])
    got = dfm_fast.group_norm_silu(relayout(x, layout), GROUPS, weight, bias)
    want = F.silu(F.group_norm(x, GROUPS, weight, bias))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_more_blocks_than_one():
    """Large enough for several tasks of pixels, with an end that fills none."""
    x, *small = inputs(shape=(2, 40, 67, 83))
    for layout in ("contiguous", "channels_last"):
        y = dfm_fast.group_norm_silu(relayout(x, layout), 5, *small)
        want = F.silu(F.group_norm(x + small[-1][:, :, None, None], 5, *small[:2]))
        torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_parameters_may_be_wider_than_the_map(device):
    """Low-precision activations with float32 parameters, as under autocast."""
    x, *small = inputs(device)
    x, small = x.half(), [v.requires_grad_() for v in small]
    y = dfm_fast.group_norm_silu(x, GROUPS, *small)
    assert y.dtype == torch.float16
    wide = dfm_fast.group_norm_silu(x.float(), GROUPS, *small)
    torch.testing.assert_close(y, wide.half(), atol=1e-3, rtol=1e-3)
    grads = torch.autograd.grad(y.float().sum(), small)
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("device", DEVICES)
def test_module_is_group_norm_and_silu(device, activation):
    theirs = torch.nn.GroupNorm(GROUPS, SHAPE[1], eps=1e-4, device=device)
    torch.nn.init.normal_(theirs.weight), torch.nn.init.normal_(theirs.bias)
    ours = GroupNormSiLU(GROUPS, SHAPE[1], eps=1e-4, device=device, activation=activation)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x, _, _, shift = inputs(device)
    act = F.silu if activation == "silu" else lambda v: v
    moved = x + shift[:, :, None, None]
    for got, want in (
        (ours(x), act(theirs(x))),
        (ours(x, shift), act(theirs(moved))),
        (ours(x, shift, dfm_fast.channel_statistics(x)), act(theirs(moved))),
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_module_without_parameters_and_its_repr():
    x = inputs()[0]
    module = GroupNormSiLU(GROUPS, SHAPE[1], affine=False)
    torch.testing.assert_close(module(x), F.silu(F.group_norm(x, GROUPS)), atol=1e-5, rtol=1e-5)
    theirs = repr(torch.nn.GroupNorm(GROUPS, SHAPE[1], affine=False))
    assert repr(module) == theirs.replace("GroupNorm", "GroupNormSiLU")
    assert "activation='none'" in repr(GroupNormSiLU(4, 12, activation="none"))
    with pytest.raises(ValueError, match="activation: expected one of silu, none, got 'relu'"):
        GroupNormSiLU(4, 12, activation="relu")


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
def test_neighbouring_threads_read_neighbouring_vectors():
    """In channels_last a warp reads whole lines of 128 bytes: 8 threads one, the next 8 another."""
    pytest.importorskip("triton")
    from dfm_fast.kernels import _aot, group_norms

    checked = 0
    for spec in group_norms.specialisations():
        if spec.dtype != "bf16" or "NHWC" not in spec.name:
            continue
        text = _aot._compile(spec, _aot.TARGETS["sm_90"][0]).asm["ttgir"]
        layouts = dict(re.findall(r"^(#\w+) = #ttg.blocked<\{(.*)\}>", text, re.M))
        maps = re.findall(r"tt\.load .*: tensor<128x64x!tt\.ptr<bf16>, (#\w+)>", text)
        assert maps, spec.name
        for name in maps:
            assert "threadsPerWarp = [4, 8]" in layouts[name], (spec.name, layouts[name])
            checked += 1
    assert checked == 7  # moments and apply one each, the gradients' three kernels five
