"""The random stream and what is made of it, beyond the shared suite."""

import math

import pytest
import torch
from helpers import DEVICES, relayout
from torch.utils.checkpoint import checkpoint

import dfm_fast
from dfm_fast import nn as fast_nn
from dfm_fast._library import INTERPRET, Shard
from dfm_fast.ops._philox import LARGEST, box_muller, fold, normals_ref, philox
from dfm_fast.ops._scales import level_offsets, level_shapes

MASK = (1 << 64) - 1
slow_here = pytest.mark.skipif(INTERPRET, reason="ten million draws, one program at a time")


def signed(n: int) -> int:
    return n - (1 << 64) if n >= 1 << 63 else n


# --- The stream ---


@pytest.mark.parametrize(
    ("counter", "subsequence", "key", "words"),
    [  # Random123's known answers
        (0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (MASK, MASK, MASK, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x85A308D3243F6A88,
            0x0370734413198A2E,
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, subsequence, key, words):
    got = philox(torch.tensor(signed(counter)), signed(key), subsequence)
    assert " ".join(f"{w:08x}" for w in got.tolist()) == words


def test_box_muller_order_and_extremes():
    words = torch.tensor([0, 1 << 30, 1 << 31, 0])
    z = box_muller(words, torch.float64).tolist()
    u = [w * 2.0**-32 + 2.0**-33 for w in words.tolist()]
    r = [math.sqrt(-2 * math.log(u[0])), math.sqrt(-2 * math.log(u[2]))]
    pairs = [(r[0], u[1]), (r[1], u[3])]
    expected = [f(2 * math.pi * a) * r for r, a in pairs for f in (math.sin, math.cos)]
    assert z == pytest.approx(expected, abs=1e-12)
    assert math.sqrt(-2 * math.log(2.0**-33)) == pytest.approx(LARGEST)
    # The largest word rounds to u = 1: a radius of zero, not of a logarithm over 1.
    assert box_muller(torch.full((4,), (1 << 32) - 1), torch.float32).tolist() == [0.0] * 4


@pytest.mark.parametrize("device", DEVICES)
def test_normals_equal_the_reference_draw_by_draw(device):
    """All implementations: integers equal (in float64 a wrong bit would show), normals to 1e-5."""
    n = 4099 if INTERPRET else 2_000_003
    for seed, offset in ((1, 0), (-7, 13), ((1 << 64) - 1, (1 << 62) + 2)):
        ref = normals_ref((n,), None, signed(seed & MASK), offset, torch.empty(()))
        got = dfm_fast.philox_normal((n,), seed, offset=offset, device=device).cpu()
        assert (got - ref).abs().max() <= 1e-5
        if device == "cpu" and not INTERPRET:
            exact = normals_ref((n,), None, signed(seed & MASK), offset, torch.empty(()).double())
            got = dfm_fast.philox_normal((n,), seed, offset=offset, dtype=torch.float64)
            assert (got - exact).abs().max() <= 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_the_rounding_of_float32(device, dtype):
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates bfloat16")
    wide = dfm_fast.philox_normal((4001,), 5, device=device)
    assert_rounded(dfm_fast.philox_normal((4001,), 5, dtype=dtype, device=device), wide)


def assert_rounded(low, wide):
    """On a CPU low is wide, rounded; on a GPU what is rounded is another normal within 1e-5."""
    assert torch.equal(low, wide.to(low.dtype)) or low.is_cuda
    assert (low >= (wide - 1e-5).to(low.dtype)).all()
    assert (low <= (wide + 1e-5).to(low.dtype)).all()


@slow_here
@pytest.mark.parametrize("device", DEVICES)
def test_distribution_at_ten_million_draws(device):
    stats = pytest.importorskip("scipy.stats")
    z = dfm_fast.philox_normal((10_000_000,), 11, device=device).cpu()
    n = z.numel()
    # Kolmogorov: P(sqrt(n) D > 1.95) = 0.001; the seed is fixed.
    ordered = z.double().sort().values
    cdf = torch.special.ndtr(ordered)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max((steps[1:] - cdf).max().item(), (cdf - steps[:-1]).max().item())
    assert distance * math.sqrt(n) < 1.95
    # Moments 1 to 4 within 4 standard errors.
    for k, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], 1):
        got = ordered.pow(k).mean().item()
        assert abs(got - mean) < 4 * math.sqrt(variance / n), f"moment {k}: {got}"
    for edge in (3.0, 4.0, 5.0):
        for count in ((z > edge).sum().item(), (z < -edge).sum().item()):
            expected = n * stats.norm.sf(edge)
            assert abs(count - expected) < 4 * math.sqrt(expected) + 1, f"tail {edge}: {count}"
    assert z.abs().max() <= LARGEST + 1e-5


@slow_here
def test_independent_along_the_stream_across_seeds_and_levels():
    n = 1_000_000
    z = dfm_fast.philox_normal((n + 8,), 3).double()
    others = [z[lag : n + lag] for lag in range(1, 9)]
    others += [dfm_fast.philox_normal((n,), seed).double() for seed in (2, 4, 3 + (1 << 32))]
    others += [dfm_fast.philox_normal((n,), 3, offset=n + 8).double()]
    for i, other in enumerate(others):
        for a, b in ((z[:n], other), (z[:n].square() - 1, other.square() - 1)):
            correlation = (a * b).mean() / (a.std() * b.std())
            assert abs(correlation) < 5 / math.sqrt(n), f"{i}: {correlation}"


def test_two_to_the_32_elements_do_not_repeat():
    """The counter has 64 bits: what lies 2^32 and 2^34 elements on is other noise."""
    here = dfm_fast.philox_normal((64,), 9)
    for far in (1 << 32, 1 << 34, 1 << 40):
        there = dfm_fast.philox_normal((64,), 9, offset=far)
        assert not torch.isclose(here, there).any()
        ref = normals_ref((64,), None, 9, far, torch.empty(()))
        torch.testing.assert_close(there, ref, atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_the_stream_wraps_at_two_to_the_64(device):
    state = torch.tensor([9, -8], device=device)  # eight before the end
    got = dfm_fast.philox_normal((16,), state, device=device).cpu()
    torch.testing.assert_close(got[8:], dfm_fast.philox_normal((8,), 9), atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_part_of_a_tensor_is_a_part_of_the_stream(device):
    whole = dfm_fast.philox_normal((1000,), 21, device=device)
    for start in (0, 1, 2, 3, 4, 64, 513):
        part = dfm_fast.philox_normal((1000 - start,), 21, offset=start, device=device)
        assert torch.equal(part, whole[start:]), start


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 16, 8, 8), (2, 3, 2, 4, 6)])
def test_noise_follows_the_logical_index_in_any_layout(device, shape):
    x, t = torch.zeros(shape, device=device), torch.ones(shape[0], device=device)
    eps = dfm_fast.philox_normal(shape, 2, device=device)
    for layout in ("contiguous", "channels_last", "permuted"):
        x_t, v = dfm_fast.add_noise(relayout(x, layout), t, 2)
        torch.testing.assert_close(x_t, eps, atol=0, rtol=0)
        torch.testing.assert_close(v, eps, atol=0, rtol=0)


# --- Seeds ---


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_tensor_is_the_same_seed(device):
    state = torch.tensor([123, 10], device=device)
    x, t = torch.randn(3, 2, 4, 4, device=device), torch.rand(3, device=device)
    pairs = [
        (dfm_fast.add_noise(x, t, state), dfm_fast.add_noise(x, t, 123, offset=10)),
        (dfm_fast.add_noise(x, t, state, offset=6), dfm_fast.add_noise(x, t, 123, offset=16)),
    ]
    for got, want in pairs:
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
    assert state.tolist() == [123, 10]


def test_none_draws_from_the_default_generator():
    torch.manual_seed(1)
    a, b = dfm_fast.philox_normal((100,)), dfm_fast.philox_normal((100,))
    torch.manual_seed(1)
    assert torch.equal(a, dfm_fast.philox_normal((100,)))
    assert not torch.isclose(a, b).any()


def test_activation_checkpointing_makes_the_same_noise_again():
    x, t = torch.randn(2, 3, 8, 8, requires_grad=True), torch.rand(2)
    seen = []

    def noisy(x):
        x_t, v = dfm_fast.add_noise(x, t)
        seen.append(v.detach())
        return (x_t * v.detach()).sum()

    checkpoint(noisy, x, use_reentrant=False).backward()
    assert len(seen) == 2
    assert torch.equal(*seen)


def test_folded_seeds_are_other_streams():
    streams = [dfm_fast.philox_normal((1000,), fold(5, rank)) for rank in range(4)]
    states = [
        dfm_fast.philox_normal((1000,), fold(torch.tensor([5, 0]), rank)) for rank in range(4)
    ]
    for a, b in zip(streams, states, strict=True):
        assert torch.equal(a, b)
    for i in range(4):
        for j in range(i):
            assert not torch.isclose(streams[i], streams[j], atol=1e-6).any()


# --- Noise per scale ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("filter", ["bilinear", "haar"])
def test_levels_are_add_noise_of_the_levels(device, filter):
    x, t = torch.randn(3, 2, 8, 12, device=device), torch.rand(3, 3, device=device)
    options = {"num_levels": 3, "filter": filter}
    levels = (
        dfm_fast.haar_build(x, 3)
        if filter == "haar"
        else dfm_fast.laplacian_build(x, 3, filter=filter)
    )
    x_t, v = dfm_fast.pyramid_add_noise(x, t, 4, offset=8, **options)
    # Each level starts at a multiple of 4 after the one before.
    starts, offset = [], 8
    for level in levels:
        starts.append(offset)
        offset += (level.numel() + 3) // 4 * 4
    for s, level in enumerate(levels):
        want = dfm_fast.add_noise(level, t[:, s], 4, offset=starts[s])
        torch.testing.assert_close((x_t[s], v[s]), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_inactive_levels_keep_the_noise_of_the_others(device):
    x, t = torch.randn(2, 3, 8, 8, device=device), torch.rand(2, 2, device=device)
    all_x, all_v = dfm_fast.pyramid_add_noise(x, t, 4)
    for active in ([True, False], [False, True], [False, False]):
        x_t, v = dfm_fast.pyramid_add_noise(x, t, 4, active=active)
        for s, on in enumerate(active):
            if not on:
                assert x_t[s] is None
                assert v[s] is None
            else:
                assert torch.equal(x_t[s], all_x[s])
                assert torch.equal(v[s], all_v[s])
    mask = torch.tensor([[True, True], [False, True]], device=device).T  # strided
    x_t, v = dfm_fast.pyramid_add_noise(x, t.T.contiguous().T, 4, active=mask)
    for got, want in zip((*x_t, *v), (*all_x, *all_v), strict=True):
        s = 0 if got.shape[-1] == 4 else 1
        on = mask[:, s].view(-1, 1, 1, 1)
        assert torch.equal(got, want * on)


@pytest.mark.parametrize("device", DEVICES)
def test_loss_is_the_masked_mean_square_and_so_is_its_gradient(device):
    x, t = torch.randn(3, 2, 8, 8, device=device), torch.rand(3, 2, device=device)
    _, v = dfm_fast.pyramid_add_noise(x, t, 4)
    mask = torch.tensor([[True, False], [True, True], [False, True]], device=device)
    guesses = [torch.randn_like(level).requires_grad_() for level in v]
    loss = dfm_fast.velocity_loss(guesses, x, 4, active=mask)
    mine = [(g - w).square().flatten(1).mean(1) for g, w in zip(guesses, v, strict=True)]
    want = torch.stack(mine, 1) * mask
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    weight = torch.rand_like(loss)
    got = torch.autograd.grad((loss * weight).sum(), guesses)
    want = torch.autograd.grad((want * weight).sum(), guesses)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_keeps_what_its_gradient_is_of_and_nothing_else(device):
    """So the targets' noise is made once, and predictions may be written over."""
    x = torch.randn(2, 3, 8, 8, device=device)
    _, v = dfm_fast.pyramid_add_noise(x, torch.rand(2, 2, device=device), 4)
    guesses = [torch.randn_like(level).requires_grad_() for level in v]
    mask, saved = torch.tensor([[True, False], [True, True]], device=device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = dfm_fast.velocity_loss(guesses, x, 4, active=mask)
    kept = [t for t in saved if t.is_floating_point()]
    for s, (r, g, w) in enumerate(zip(kept, guesses, v, strict=True)):
        on = mask[:, s].view(-1, 1, 1, 1)
        torch.testing.assert_close(r, (g.detach() - w) * on, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        want = [2 * r / r[0].numel() for r in kept]
        for g in guesses:
            g.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), guesses), tuple(want))


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_dtypes_of_training(device):
    """float32 data, bfloat16 inputs of the model, bfloat16 predictions."""
    low = torch.float16 if INTERPRET else torch.bfloat16
    x, t = torch.randn(2, 3, 8, 8, device=device), torch.rand(2, 2, device=device)
    wide, _ = dfm_fast.pyramid_add_noise(x, t, 4)
    x_t, v = dfm_fast.pyramid_add_noise(x, t, 4, dtype=low, targets=False)
    assert v is None
    for a, b in zip(x_t, wide, strict=True):
        assert_rounded(a, b)
    guesses = [g.detach().requires_grad_() for g in x_t]
    loss = dfm_fast.velocity_loss(guesses, x, 4)
    same = dfm_fast.velocity_loss([g.float() for g in guesses], x, 4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, same, atol=1e-6, rtol=1e-6)
    for grad, g in zip(torch.autograd.grad(loss.sum(), guesses), guesses, strict=True):
        assert grad.dtype == g.dtype


def test_offsets_of_a_shard_are_those_of_its_samples():
    whole = level_shapes((5, 3, 6, 10), 2, "bilinear", (2, 2))
    for start in range(5):
        offsets = level_offsets([(1, *s[1:]) for s in whole], 7, Shard(start, 5))
        base = level_offsets(whole, 7)
        sizes = [math.prod(s[1:]) for s in whole]
        assert offsets == [b + start * n for b, n in zip(base, sizes, strict=True)]


def test_dtensors_need_a_seed_and_shards_see_their_part():
    from properties import fake_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as Split

    with fake_mesh() as mesh:
        x = DTensor.from_local(torch.zeros(2, 3), mesh, [Split(0)], run_check=False)
        t = DTensor.from_local(torch.ones(2), mesh, [Split(0)], run_check=False)
        with pytest.raises(ValueError, match=r"add_noise: seed: expected .* got None"):
            dfm_fast.add_noise(x, t)
        got, _ = dfm_fast.add_noise(x, t, 3)
    assert torch.equal(got.to_local(), dfm_fast.philox_normal((4, 3), 3)[:2])


def test_module_is_the_function_and_refuses_bad_arguments():
    module = fast_nn.PerScaleNoise(3, "binomial")
    x, t = torch.randn(2, 1, 9, 9), torch.rand(2, 3)
    got = module(x, t, 4)
    want = dfm_fast.pyramid_add_noise(x, t, 4, num_levels=3, filter="binomial")
    for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
        assert torch.equal(a, b)
    assert list(module.state_dict()) == []
    for bad in ({"filter": "box"}, {"num_levels": 0}, {"factor": 3}, {"std": [1.0]}):
        with pytest.raises(ValueError, match=r"PerScaleNoise: .*: expected .*, got "):
            fast_nn.PerScaleNoise(**bad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_and_graphs_replay_with_fresh_noise():
    x, t = torch.randn(4, 3, 32, 32, device="cuda"), torch.rand(4, 2, device="cuda")
    state = torch.tensor([5, 0], device="cuda")

    def run():
        x_t, v = dfm_fast.pyramid_add_noise(x, t, state)
        return dfm_fast.velocity_loss(x_t, x, state), v

    run()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dfm_fast.add_noise(x, t[:, 0])
        run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, v = run()
    graph.replay()
    first = v[1].clone()
    state[1] += 1 << 20
    graph.replay()
    assert not torch.isclose(first, v[1]).all()
    want = dfm_fast.pyramid_add_noise(x, t, 5, offset=1 << 20)[1]
    torch.testing.assert_close(v[1], want[1], atol=1e-5, rtol=0)
