"""Separable convolutions and SnapGen's residual block, beyond the shared suite."""

import pytest
import torch
from helpers import DEVICES, assert_within_budget, dtypes, relayout
from torch import nn
from torch.nn import functional as F

import dfm_fast
from dfm_fast._library import INTERPRET
from dfm_fast.nn import SeparableConv2d, SeparableConvBlock
from dfm_fast.ops import _rows
from dfm_fast.ops.group_norms import channel_statistics_ref
from dfm_fast.ops.separables import separable_conv2d_ref

SHAPE, OUTPUTS, GROUPS = (2, 24, 13, 9), 40, 4


def inputs(device="cpu", dtype=torch.float32, layout="contiguous", shape=SHAPE, outputs=OUTPUTS):
    """x, depthwise and pointwise weight, bias, shift, residual, norm weight and bias"""
    generator = torch.Generator().manual_seed(0)
    n, c, h, w = shape
    vectors = (outputs,), (n, outputs), (n, outputs, h, w), (c,), (c,)
    sizes = shape, (c, 1, 3, 3), (outputs, c, 1, 1), *vectors
    values = [torch.randn(size, generator=generator) for size in sizes]
    values[2] /= c**0.5
    return [relayout(v.to(device, dtype), layout) for v in values]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("device", DEVICES)
def test_it_hands_on_the_statistics_of_what_it_gives(device, layout):
    for dtype in dtypes(device):
        given = inputs(device, dtype, layout)
        y, found = dfm_fast.separable_conv2d(*given, num_groups=GROUPS, with_statistics=True)
        assert torch.equal(y, dfm_fast.separable_conv2d(*given, num_groups=GROUPS))
        want = channel_statistics_ref(y)
        assert found.count == want.count == 13 * 9
        assert found.mean.dtype == want.mean.dtype
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(found.mean, want.mean, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(found.m2, want.m2, atol=0, rtol=5 * tolerance)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("device", DEVICES)
def test_statistics_do_not_cancel(device, layout):
    """A shift of 1e4 moves the mean; E[x²] - m² in float32 would lose M2 altogether."""
    given = inputs(device, layout=layout, shape=(1, 16, 33, 20))
    given[4] += 1e4
    y, found = dfm_fast.separable_conv2d(*given, num_groups=GROUPS, with_statistics=True)
    want = channel_statistics_ref(y.double())
    assert (found.m2.double() / want.m2 - 1).abs().max() < 1e-5
    assert (found.mean - want.mean).abs().max() <= 1e4 * 2**-22


@pytest.mark.parametrize("device", DEVICES)
def test_statistics_take_no_gradient_and_change_none(device):
    given = [v.requires_grad_() for v in inputs(device)]
    y, found = dfm_fast.separable_conv2d(*given, num_groups=GROUPS, with_statistics=True)
    plain = dfm_fast.separable_conv2d(*given, num_groups=GROUPS)
    assert not found.mean.requires_grad
    assert not found.m2.requires_grad
    dy = torch.randn_like(y)
    a, b = (torch.autograd.grad(v, given, dy) for v in (y, plain))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_given_statistics_are_used(device):
    given = inputs(device)
    statistics = dfm_fast.channel_statistics(given[0])
    plain = dfm_fast.separable_conv2d(*given, num_groups=GROUPS)
    cached = dfm_fast.separable_conv2d(*given, num_groups=GROUPS, statistics=statistics)
    assert torch.equal(plain, cached)
    other = dfm_fast.channel_statistics(2 * given[0] + 1)
    assert not torch.equal(
        plain, dfm_fast.separable_conv2d(*given, num_groups=GROUPS, statistics=other)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [512, 577])
def test_long_sums_stay_within_the_budget(channels, layout, dtype):
    """Where one chain of products per output would be over it; several bands, a rest of a panel."""
    given = inputs("cpu", dtype, layout, (1, channels, 20, 12), 200)
    got = dfm_fast.separable_conv2d(*given, num_groups=1)
    plain = [v.contiguous() for v in given]
    ref = separable_conv2d_ref(*plain, num_groups=1)
    exact = separable_conv2d_ref(*(v.double() for v in plain), num_groups=1)
    assert_within_budget(got, ref, exact, cap=64, what=f"{channels} {layout}", inputs=dtype)


@pytest.mark.skipif(INTERPRET, reason="there torch's convolution serves")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_rows_are_those_of_the_convolution(dtype, layout, monkeypatch):
    """What a GPU is given, here on a CPU: float64 in place of exact float32."""
    separables = pytest.importorskip("dfm_fast.kernels.separables")
    for module in (separables, _rows):
        monkeypatch.setattr(module, "exact_on_gpu", lambda x: x.dtype == torch.float64)
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 5, 9, 8), (2, 7, 9, 8), (5, 7, 1, 1)
    dy, a, weight = (torch.randn(s, generator=generator).to(dtype) for s in sizes)
    dy, a = relayout(dy, layout), relayout(a, layout)
    got = separables.pointwise_conv2d_backward(dy, a, weight, need_da=True, need_dweight=True)
    want = torch.ops.dfm_fast.pointwise_conv2d_backward(
        dy, a, weight, need_da=True, need_dweight=True
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-1 if dtype == torch.bfloat16 else 1e-9, rtol=2e-2)
        assert x.stride() == y.stride()
    for needs in ((True, False), (False, True)):
        some = separables.pointwise_conv2d_backward(
            dy, a, weight, need_da=needs[0], need_dweight=needs[1]
        )
        for x, y, need in zip(some, got, needs, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y) if need else not x.numel()


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_module_is_two_convolutions(device, bias, kernel):
    x, norm = inputs(device)[0], nn.GroupNorm(GROUPS, SHAPE[1], device=device)
    ours = SeparableConv2d(SHAPE[1], OUTPUTS, kernel, bias, device=device)
    names = ["depthwise.weight", "pointwise.weight", *(["pointwise.bias"] if bias else [])]
    assert list(ours.state_dict()) == names
    torch.testing.assert_close(ours(x), ours.pointwise(ours.depthwise(x)), atol=1e-5, rtol=1e-5)
    want = ours.pointwise(ours.depthwise(F.silu(norm(x))))
    torch.testing.assert_close(ours(x, norm=norm), want, atol=1e-5, rtol=1e-5)


def test_module_refuses_other_kernels():
    with pytest.raises(ValueError, match="kernel_size: expected 3, 5 or 7, got 4"):
        SeparableConv2d(4, 8, 4)


@pytest.mark.parametrize(
    ("x", "temb", "message"),
    [
        ((2, 32, 4, 4), (2, 20), r"temb: expected shape \[2, 24\], got \[2, 20\]"),
        ((2, 32, 4, 4), (1, 24), r"temb: expected shape \[2, 24\], got \[1, 24\]"),
        ((2, 32, 4, 4), (24,), r"temb: expected 2 dimensions, got \[24\]"),
        ((32, 4, 4), (2, 24), r"x: expected 4 dimensions, got \[32, 4, 4\]"),
    ],
)
def test_bad_calls_of_the_block(x, temb, message):
    block = SeparableConvBlock(32, 32, 24)
    with pytest.raises(ValueError, match=f"^SeparableConvBlock: {message}"):
        block(torch.zeros(x), torch.zeros(temb))


# --- The block, against diffusers' ----------------------------------------------------------------


def blocks(in_channels, out_channels, device="cpu", dtype=torch.float32):
    """(diffusers', ours) with the same weights."""
    unet = pytest.importorskip("diffusers.models.unets.unet_dreamlite")
    torch.manual_seed(0)
    theirs = unet.ResnetBlock2DDreamLite(
        in_channels=in_channels,
        out_channels=out_channels,
        temb_channels=64,
        eps=1e-5,
        use_sep_conv=True,
    )
    for norm in (theirs.norm1, theirs.norm2):
        nn.init.normal_(norm.weight, 1, 0.2), nn.init.normal_(norm.bias, 0, 0.2)
    ours = SeparableConvBlock(in_channels, out_channels, 64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(device, dtype), ours.to(device, dtype)


def block_inputs(in_channels, device="cpu", dtype=torch.float32, layout="contiguous"):
    generator = torch.Generator().manual_seed(1)
    sizes = (2, in_channels, 12, 10), (2, 64)
    return [
        relayout(torch.randn(s, generator=generator).to(device, dtype), layout).requires_grad_()
        for s in sizes
    ]


def results(block, x, temb):
    """Output, and gradients of x, temb and all parameters, in float64."""
    y = block(x, temb)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return [v.double() for v in (y, *torch.autograd.grad(y, [x, temb, *block.parameters()], dy))]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("widths", [(64, 64), (96, 32), (32, 64), (1408, 512)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_block_is_that_of_diffusers(device, widths, layout):
    theirs, ours = blocks(*widths, device)
    given = block_inputs(widths[0], device, layout=layout)
    y = ours(*given)
    assert relayout(y.detach(), layout).stride() == y.stride()
    for got, want in zip(results(ours, *given), results(theirs, *given), strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("widths", [(64, 64), (96, 32)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_block_in_bfloat16_is_at_least_as_exact(device, widths, layout):
    if torch.bfloat16 not in dtypes(device):
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    low = torch.bfloat16
    theirs, ours = blocks(*widths, device, low)
    given = block_inputs(widths[0], device, low, layout)
    got, ref = results(ours, *given), results(theirs, *given)
    exact, _ = blocks(*widths, device, torch.float64)
    exact.load_state_dict(theirs.state_dict())
    wide = [v.detach().double().requires_grad_() for v in given]
    for g, r, e in zip(got, ref, results(exact, *wide), strict=True):
        assert (g - e).norm() <= 2 * (r - e).norm() + torch.finfo(low).eps / 2 * e.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_block_takes_statistics_of_its_input(device):
    _, ours = blocks(64, 32, device)
    x, temb = block_inputs(64, device)
    given = dfm_fast.channel_statistics(x.detach())
    assert torch.equal(ours(x, temb), ours(x, temb, given))


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_hand_on_statistics(device):
    _, ours = blocks(64, 64, device)
    x, temb = block_inputs(64, device)
    y, found = ours(x, temb, with_statistics=True)
    assert torch.equal(y, ours(x, temb))
    want = channel_statistics_ref(y)
    assert found.count == want.count == 120
    torch.testing.assert_close(found.mean, want.mean, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(found.m2, want.m2, atol=0, rtol=1e-5)
    assert not found.mean.requires_grad
    z, plain = ours(y, temb, found), ours(y, temb)
    torch.testing.assert_close(z, plain, atol=1e-5, rtol=1e-5)
    given = [x, temb, *ours.parameters()]
    grads = (torch.autograd.grad(v.sum(), given, retain_graph=True) for v in (z, plain))
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_block_keeps_for_backward_what_it_must():
    """x, h, the shortcut's input and the small ones; neither activated maps nor sums."""
    _, ours = blocks(64, 64)
    x, temb = block_inputs(64)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    parameters = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ours(x, temb)
    kept = sum(n for at, n in saved.items() if at not in parameters)
    maps = (x.numel() + 2 * x.numel()) * 4  # x and h
    assert maps <= kept <= 1.05 * maps


def test_block_compiles():
    _, ours = blocks(64, 32)
    given = block_inputs(64)
    compiled = torch.compile(ours, fullgraph=True)
    for got, want in zip(results(compiled, *given), results(ours, *given), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


# --- In one kernel --------------------------------------------------------------------------------

of_triton = pytest.mark.skipif(
    not INTERPRET and len(DEVICES) == 1, reason="of Triton's kernels: interpreted, or on a GPU"
)


def calls_of(kernels, monkeypatch):
    """A list that grows with every launch of the one kernel."""
    calls, run = [], kernels._one_kernel
    monkeypatch.setattr(kernels, "_one_kernel", lambda *a: calls.append(0) or run(*a))
    return calls


@of_triton
@pytest.mark.parametrize("way", ["norm", "no norm", "columns"])
def test_one_kernel_is_the_definition(way, monkeypatch):
    """Several tiles and samples; steps and columns with a rest; its statistics; 64-bit offsets."""
    kernels = pytest.importorskip("dfm_fast.kernels.separables")
    device, calls = DEVICES[-1], calls_of(kernels, monkeypatch)
    monkeypatch.setattr(kernels, "ONE_KERNEL", "1")
    if way == "columns":
        whole = kernels.Whole(4, 2, 8, 16, 32, 4, 1)
        monkeypatch.setattr(kernels, "WHOLE", (whole, whole))
        monkeypatch.setattr(kernels, "_candidates", kernels._candidates.__wrapped__)
    groups = None if way == "no norm" else GROUPS
    shape = (2, 72, 8, 32) if way == "norm" else (1, 40, 4, 16)
    for dtype in dtypes(device):
        given = inputs(device, dtype, "channels_last", shape, 40)
        given[3:] = [v if i % 2 == (way == "norm") else None for i, v in enumerate(given[3:])]
        given[6:] = [None, None] if groups is None else given[6:]
        y, found = dfm_fast.separable_conv2d(*given, num_groups=groups, with_statistics=True)
        plain = [None if v is None else v.contiguous() for v in given]
        wide = [None if v is None else v.double().cpu() for v in plain]
        ref, exact = (separable_conv2d_ref(*v, num_groups=groups) for v in (plain, wide))
        assert_within_budget(y, ref, exact, cap=64, what=f"{way} {dtype}", inputs=dtype)
        want = channel_statistics_ref(y)
        torch.testing.assert_close(found.mean, want.mean, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(found.m2, want.m2, atol=0, rtol=1e-5)
    served = [d for d in dtypes(device) if INTERPRET or d.itemsize == 2]
    assert len(calls) == len(served)


@of_triton
def test_one_kernel_only_where_it_can(monkeypatch):
    kernels = pytest.importorskip("dfm_fast.kernels.separables")
    device, calls = DEVICES[-1], calls_of(kernels, monkeypatch)

    def call(shape=(1, 8, 4, 16), layout="channels_last", side=3):
        given = inputs(device, torch.float16, layout, shape, 8)
        given[1] = torch.zeros(shape[1], 1, side, side, device=device, dtype=torch.float16)
        return dfm_fast.separable_conv2d(*given, num_groups=GROUPS)

    call()  # nothing is measured: two kernels
    monkeypatch.setattr(kernels, "ONE_KERNEL", "1")
    for options in ({"layout": "contiguous"}, {"shape": (1, 8, 5, 16)}, {"side": 5}):
        call(**options)
    call(shape=(1, 8, 4, 12))
    assert not calls
    call()
    assert len(calls) == 1
    monkeypatch.setattr(kernels, "ONE_KERNEL", "0")
    call()
    assert len(calls) == 1
