"""What the C++ of the noises divides its work into: slices, tiles, vectors. None of it may show."""

import pytest
import torch
from helpers import relayout

import dfm_fast
from dfm_fast.ops._philox import normals_ref
from dfm_fast.ops._scales import level_offsets

SEED = 77


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def levels_of(x, filter):
    if filter == "haar":
        return dfm_fast.haar_build(x, 3)
    return dfm_fast.laplacian_build(x, 3, filter=filter)


@pytest.mark.parametrize("offset", [(1 << 34) - 640, (1 << 34) - 90, (1 << 63) + 3])
def test_counters_carry_into_the_high_word(offset):
    """32-bit words of the counter overflow inside a vector, at its end, and not at all."""
    signed = offset - (1 << 64) if offset >= 1 << 63 else offset
    ref = normals_ref((1000,), None, SEED, signed, torch.empty(()))
    got = dfm_fast.philox_normal((1000,), torch.tensor([SEED, signed]))
    assert (got - ref).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 70, 11, 13), (2, 5, 67, 64), (2, 130, 2, 9, 8), (1000, 3)])
def test_tiles_do_not_show(shape, dtype, threads):
    x, t = torch.randn(shape).to(dtype), torch.rand(shape[0])
    wide = torch.promote_types(dtype, torch.float32)
    eps = dfm_fast.philox_normal(shape, SEED, offset=2, dtype=wide)
    for layout in ("contiguous", "channels_last"):
        x_t, v = dfm_fast.add_noise(relayout(x, layout), t, SEED, offset=2)
        assert torch.equal(v, (eps - x.to(wide)).to(dtype))
        s = t.to(wide).view(-1, *[1] * (x.ndim - 1))
        want = ((1 - s) * x.to(wide) + s * eps).to(dtype)
        torch.testing.assert_close(x_t, want, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("filter", ["bilinear", "binomial", "haar"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(7, 8, 64, 48), (2, 24, 64, 64), (1, 3, 256, 128)])
def test_slices_do_not_show(shape, layout, filter, threads):
    """A sample larger than what is built at a time, or a batch of many such."""
    torch.manual_seed(0)
    x, t = relayout(torch.randn(shape), layout), torch.rand(shape[0], 3)
    active = torch.rand(shape[0], 3) > 0.3
    options = {"filter": filter, "active": active, "offset": 5}
    x_t, v = dfm_fast.pyramid_add_noise(x, t, SEED, num_levels=3, **options)
    levels = levels_of(x, filter)
    offsets = level_offsets([level.shape for level in levels], 5)
    for s, (level, offset) in enumerate(zip(levels, offsets, strict=True)):
        mask = active[:, s].view(-1, 1, 1, 1)
        both = dfm_fast.add_noise(level, t[:, s], SEED, offset=offset)
        for got, want in zip((x_t[s], v[s]), both, strict=True):
            assert torch.equal(got, want * mask)
    predictions = [torch.randn_like(level, requires_grad=True) for level in levels]
    loss = dfm_fast.velocity_loss(predictions, x, SEED, **options)
    weights = torch.rand_like(loss)
    grads = torch.autograd.grad((loss * weights).sum(), predictions)
    for s, (g, dg) in enumerate(zip(predictions, grads, strict=True)):
        r = (g - v[s]).detach().double() * active[:, s].view(-1, 1, 1, 1)
        want = r.square().flatten(1).mean(1)
        torch.testing.assert_close(loss[:, s].detach().double(), want, rtol=2e-6, atol=0)
        want = r * (2 / r[0].numel() * weights[:, s].double()).view(-1, 1, 1, 1)
        torch.testing.assert_close(dg.double(), want, rtol=1e-6, atol=1e-12)


def test_the_loss_is_the_same_for_every_number_of_threads():
    x, results = torch.randn(3, 24, 64, 64), []
    levels = [torch.randn_like(level) for level in levels_of(x, "bilinear")]
    before = torch.get_num_threads()
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(dfm_fast.velocity_loss(levels, x, SEED))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_predictions_and_outputs_of_other_dtypes():
    """Those that the C++ reads and writes directly, and those that it converts."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x, t = torch.randn(2, 3, 8, 32).to(dtype), torch.rand(2, 2)
        wide = torch.promote_types(dtype, torch.float32)
        x_t, v = dfm_fast.pyramid_add_noise(x, t, SEED, dtype=wide)
        for other in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            outs = dfm_fast.pyramid_add_noise(x, t, SEED, dtype=other)
            for got, want in zip([*outs[0], *outs[1]], [*x_t, *v], strict=True):
                assert torch.equal(got, want.to(other)), (dtype, other)
            g = [torch.randn_like(level).to(other).requires_grad_() for level in v]
            loss = dfm_fast.velocity_loss(g, x, SEED)
            grads = torch.autograd.grad(loss.sum(), g)
            for s, level in enumerate(v):
                r = g[s].detach().to(wide) - level
                want = r.double().square().flatten(1).mean(1).to(wide)
                torch.testing.assert_close(loss[:, s], want, rtol=1e-5, atol=0)
                assert torch.equal(grads[s], (r * (2 / r[0].numel())).to(other)), (dtype, other)
