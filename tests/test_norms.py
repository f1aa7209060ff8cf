"""Norms, beyond the shared suite."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES, assert_within_budget, cotangents_for, double, dtypes, grads
from properties import _Recorder

import dfm_fast
from dfm_fast import nn
from dfm_fast._library import INTERPRET
from dfm_fast.ops import norms


def tensors(*shapes, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def low(device):
    """The low-precision dtype that is computed rightly there."""
    return next(d for d in dtypes(device) if d.itemsize == 2)


def assert_like_reference(public, reference, args, **kwargs):
    """Outputs and gradients within the budget of the reference."""
    got, ref = public(*args, **kwargs), reference(*args, **kwargs)
    exact = reference(*double(args), **kwargs)
    got, ref, exact = (v if isinstance(v, tuple) else (v,) for v in (got, ref, exact))
    dy = cotangents_for(ref)
    coarsest = max((v.dtype for v in args), key=lambda d: torch.finfo(d).eps)
    unit = {"cap": 64, "inputs": coarsest}
    for i, triple in enumerate(zip(got, ref, exact, strict=True)):
        assert_within_budget(*triple, what=f"output {i}", **unit)
    found = grads(public, args, kwargs, dy)
    narrow = grads(reference, args, kwargs, dy)
    wide = grads(reference, double(args), kwargs, double(dy))
    for i, triple in enumerate(zip(found, narrow, wide, strict=True)):
        assert_within_budget(*triple, what=f"gradient {i}", **unit)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1152, 20_000])
def test_a_large_mean_costs_no_accuracy(device, width):
    """At mean 1e4 its rounding alone is 5e-4 of a standard deviation; squares would lose all."""
    x, shift, scale = tensors((2, 3, width), (2, width), (2, width), device=device)
    args = x + 1e4, shift, scale
    got = dfm_fast.ada_layer_norm(*args)
    want = norms.ada_layer_norm_ref(*double(args))
    torch.testing.assert_close(got.cpu().double(), want, atol=1e-5, rtol=1e-5)
    dy = cotangents_for([got])
    for g, w in zip(
        grads(dfm_fast.ada_layer_norm, args, {}, dy),
        grads(norms.ada_layer_norm_ref, double(args), {}, double(dy)),
        strict=True,
    ):
        torch.testing.assert_close(g.cpu().double(), w, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [40, 20_000])
def test_constant_rows_are_shift(device, width):
    x = torch.full((1, 3, width), 1e4, device=device)
    shift, scale = tensors((1, width), (1, width), device=device)
    got = dfm_fast.ada_layer_norm(x, shift, scale)
    torch.testing.assert_close(got, shift[:, None].expand_as(x))


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_and_slices_are_read_where_they_lie(device):
    """The six chunks of one projection, and a branch that is a part of a longer sequence."""
    x, y, m = tensors((2, 3, 24), (2, 7, 24), (2, 144), device=device)
    gate, shift, scale = m.chunk(6, -1)[1:4]
    args = x, y[:, 4:], gate, shift, scale
    name = "dfm_fast::gated_residual_ada_layer_norm"
    with _Recorder((name,)) as recorder:
        got = dfm_fast.gated_residual_ada_layer_norm(*args)
    ((given, _),) = recorder.calls.values()
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(args, given, strict=False))
    dense = tuple(v.contiguous() for v in args)
    for g, w in zip(got, dfm_fast.gated_residual_ada_layer_norm(*dense), strict=True):
        assert torch.equal(g, w)
    dy = cotangents_for(got)
    strided = grads(dfm_fast.gated_residual_ada_layer_norm, args, {}, dy)
    for g, w in zip(
        strided, grads(dfm_fast.gated_residual_ada_layer_norm, dense, {}, dy), strict=True
    ):
        assert torch.equal(g, w)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
def test_modulation_and_branch_of_other_dtypes(device, per_token):
    """float32 modulation beside a low precision x; a float32 residual under autocast."""
    shape = (2, 5, 72) if per_token else (2, 72)
    for x_dtype, y_dtype, dtype in (
        (low(device), low(device), torch.float32),
        (torch.float32, low(device), low(device)),
    ):
        (x,) = tensors((2, 5, 72), device=device, dtype=x_dtype)
        (y,) = tensors((2, 5, 72), device=device, dtype=y_dtype, seed=1)
        gate, shift, scale = tensors(*[shape] * 3, device=device, dtype=dtype, seed=2)
        assert_like_reference(dfm_fast.ada_layer_norm, norms.ada_layer_norm_ref, (x, shift, scale))
        assert_like_reference(dfm_fast.gated_residual, norms.gated_residual_ref, (x, y, gate))
        both = dfm_fast.gated_residual_ada_layer_norm, norms.gated_residual_ada_layer_norm_ref
        assert_like_reference(*both, (x, y, gate, shift, scale))


@pytest.mark.parametrize("device", DEVICES)
def test_rms_weight_of_another_dtype(device):
    (x,), (weight,) = tensors((5, 72), device=device, dtype=low(device)), tensors((72,), seed=1)
    assert_like_reference(dfm_fast.rms_norm, norms.rms_norm_ref, (x, weight.to(device)))


@pytest.mark.parametrize("device", DEVICES)
def test_both_at_once_are_the_two_one_by_one(device):
    for dtype in dtypes(device):
        x, y, gate, shift, scale = tensors(
            (2, 5, 72), (2, 5, 72), *[(2, 72)] * 3, device=device, dtype=dtype
        )
        residual, normed = dfm_fast.gated_residual_ada_layer_norm(x, y, gate, shift, scale)
        assert torch.equal(residual, dfm_fast.gated_residual(x, y, gate))
        assert torch.equal(normed, dfm_fast.ada_layer_norm(residual, shift, scale))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("used", [0, 1], ids=["residual", "normed"])
def test_an_output_that_is_not_used_has_no_gradient(device, used):
    args = tensors((2, 5, 72), (2, 5, 72), *[(2, 72)] * 3, device=device)
    args = [v.requires_grad_() for v in args]
    got = dfm_fast.gated_residual_ada_layer_norm(*args)[used]
    want = norms.gated_residual_ada_layer_norm_ref(*args)[used]
    (dy,) = cotangents_for([got])
    found = torch.autograd.grad(got, args, dy, allow_unused=True)
    for g, w in zip(found, torch.autograd.grad(want, args, dy, allow_unused=True), strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, atol=2e-5, rtol=1e-5)


@pytest.mark.skipif(INTERPRET, reason="Triton's interpreter would take minutes")
@pytest.mark.parametrize("device", DEVICES)
def test_very_many_rows(device):
    x, y, weight = tensors((2, 50_000, 24), (2, 50_000, 24), (24,), device=device)
    gate, shift, scale = tensors(*[(2, 24)] * 3, device=device, seed=1)
    assert_like_reference(dfm_fast.rms_norm, norms.rms_norm_ref, (x, weight))
    args = x, y, gate, shift, scale
    both = dfm_fast.gated_residual_ada_layer_norm, norms.gated_residual_ada_layer_norm_ref
    assert_like_reference(*both, args, eps=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_a_long_row_far_from_each_other(device):
    """The moments of a row's first part say nothing about the rest."""
    x, shift, scale = tensors((1, 2, 20_000), (1, 20_000), (1, 20_000), device=device)
    x[..., 5000:] += 1e4
    assert_like_reference(dfm_fast.ada_layer_norm, norms.ada_layer_norm_ref, (x, shift, scale))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [8200, 16_385])
def test_very_long_rows(device, width):
    """More than a program of the Triton kernels holds, backward and then forward too."""
    shape = (1, 2, width)
    for dtype in (torch.float32, low(device)):
        x, y, weight = tensors(shape, shape, (width,), device=device, dtype=dtype)
        gate, shift, scale = tensors(*[(1, width)] * 3, device=device, dtype=dtype, seed=1)
        assert_like_reference(dfm_fast.rms_norm, norms.rms_norm_ref, (x, weight))
        both = dfm_fast.gated_residual_ada_layer_norm, norms.gated_residual_ada_layer_norm_ref
        assert_like_reference(*both, (x, y, gate, shift, scale))


@pytest.mark.skipif(not INTERPRET, reason="kernels for long rows, given short ones")
@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
def test_rows_in_chunks(per_token, monkeypatch):
    """In chunks of 32 elements, backward of several rows, the last ones not full."""
    kernels = pytest.importorskip("dfm_fast.kernels.norms")
    run, used = kernels._Tiles, []
    monkeypatch.setattr(kernels, "_Tiles", lambda *a: used.append(a) or run(*a))
    for name, bytes_ in (("", 0), ("LONG_", 128)):
        monkeypatch.setattr(kernels, f"{name}FORWARD", bytes_)
        monkeypatch.setattr(kernels, f"{name}BACKWARD", bytes_)
    for dtype in (torch.float32, torch.float16):
        shape = (2, 5, 75) if per_token else (2, 11, 75)
        x, y, weight = tensors(shape, shape, (75,), dtype=dtype)
        modulation = shape if per_token else (2, 75)
        gate, shift, scale = tensors(*[modulation] * 3, dtype=dtype, seed=1)
        if not per_token:
            assert_like_reference(dfm_fast.rms_norm, norms.rms_norm_ref, (x, weight))
        assert_like_reference(dfm_fast.ada_layer_norm, norms.ada_layer_norm_ref, (x, shift, scale))
        assert_like_reference(dfm_fast.gated_residual, norms.gated_residual_ref, (x, y, gate))
        both = dfm_fast.gated_residual_ada_layer_norm, norms.gated_residual_ada_layer_norm_ref
        assert_like_reference(*both, (x, y, gate, shift, scale))
    assert {t[0] for t in used} == {kernels._long_forward_kernel, kernels._long_backward_kernel}
    assert {t[1] for t in used} == ({1} if per_token else {1, 8})


@pytest.mark.parametrize("device", DEVICES)
def test_pictures_of_tokens(device):
    """[B, H, W, D], whose memory may be that of channels_last: rows are what is normed."""
    x, shift, scale = tensors((2, 3, 4, 24), (2, 24), (2, 24), device=device)
    want = dfm_fast.ada_layer_norm(x.flatten(1, 2), shift, scale).view_as(x)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        got = dfm_fast.ada_layer_norm(given, shift, scale)
        assert got.is_contiguous()
        assert torch.equal(got, want)
        each = (v[:, None, None].expand_as(x) for v in (shift, scale))
        assert torch.equal(dfm_fast.ada_layer_norm(given, *each), want)
    assert torch.equal(
        dfm_fast.ada_layer_norm(x[:, 0, 0], shift, scale), want[:, 0, 0]
    )  # one token a sample, without its dimension


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_give_zero_gradients(device):
    x, weight, shift, scale = tensors((2, 0, 8), (8,), (2, 8), (2, 8), device=device)
    _, dweight = grads(dfm_fast.rms_norm, (x, weight), {})
    _, dshift, dscale = grads(dfm_fast.ada_layer_norm, (x, shift, scale), {})
    for gradient, like in ((dweight, weight), (dshift, shift), (dscale, scale)):
        assert torch.equal(gradient, torch.zeros_like(like))


@pytest.mark.parametrize("device", DEVICES)
def test_rms_norm_keeps_the_dtype_of_x(device):
    """As torch.nn.functional.rms_norm does, whatever the weight's."""
    (x,), (weight,) = tensors((3, 24), device=device, dtype=low(device)), tensors((24,), seed=1)
    got = dfm_fast.rms_norm(x, weight.to(device))
    want = F.rms_norm(x.float(), (24,), weight.to(device), 1e-6)
    assert got.dtype == x.dtype
    torch.testing.assert_close(got, want.to(x.dtype))


# --- Modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [{"normalized_shape": 24}, {"normalized_shape": (4, 6), "eps": 1e-5},
     {"normalized_shape": [24], "elementwise_affine": False}],
    ids=["default", "two dimensions", "no weight"],
)  # fmt: skip
def test_rms_norm_module_is_torchs(device, options):
    theirs, ours = (cls(**options, device=device) for cls in (torch.nn.RMSNorm, nn.RMSNorm))
    if theirs.weight is not None:
        torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, torch.nn.RMSNorm)
    shape = (3, 5, *theirs.normalized_shape)
    for dtype in (torch.float32, low(device)):
        (x,) = tensors(shape, device=device, dtype=dtype)
        x = x * 1e-3  # where eps counts
        a, b = theirs.to(dtype)(x), ours.to(dtype)(x)
        assert a.dtype == b.dtype
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(b, a, atol=tolerance, rtol=tolerance)
    with pytest.raises(ValueError, match="RMSNorm: x: expected"):
        ours(torch.zeros(2, 3, device=device, dtype=dtype))


def diffusers_layer(chunks):
    module = pytest.importorskip("diffusers.models.normalization")
    if chunks == 2:
        return module.AdaLayerNormContinuous(24, 16, elementwise_affine=False, eps=1e-6)
    return module.AdaLayerNormZero(24) if chunks == 6 else module.AdaLayerNormZeroSingle(24)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunks", [2, 3, 6])
def test_ada_layer_norm_loads_diffusers(device, chunks):
    theirs = diffusers_layer(chunks).to(device)
    ours = nn.AdaLayerNorm(24, 16 if chunks == 2 else None, chunks=chunks).to(device)
    ours.load_state_dict(theirs.state_dict())
    x, emb = tensors((2, 5, 24), (2, 16 if chunks == 2 else 24), device=device)
    want, got = theirs(x, emb) if chunks == 2 else theirs(x, emb=emb), ours(x, emb)
    want, got = (v if isinstance(v, tuple) else (v,) for v in (want, got))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-5)
    parameters = list(theirs.parameters())
    a = torch.autograd.grad(sum(v.square().sum() for v in want), parameters)
    b = torch.autograd.grad(sum(v.square().sum() for v in got), list(ours.parameters()))
    torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)


def test_ada_layer_norm_module_arguments():
    with pytest.raises(ValueError, match="AdaLayerNorm: chunks: expected 2, 3 or 6, got 4"):
        nn.AdaLayerNorm(8, chunks=4)
    with pytest.raises(ValueError, match="AdaLayerNorm: embedding_dim: expected at least 1, got 0"):
        nn.AdaLayerNorm(0)
    assert "8, chunks=6, eps=1e-06" in repr(nn.AdaLayerNorm(8, chunks=6))


@pytest.mark.parametrize("modulation", [(2, 0, 8), (2, 8)], ids=["each-token", "shared"])
def test_gradients_of_no_tokens(modulation):
    """A modulation like x has no rows to write a sum to."""
    x, y = (torch.zeros(2, 0, 8, requires_grad=True) for _ in range(2))
    gate, shift, scale = (torch.ones(modulation, requires_grad=True) for _ in range(3))
    out = dfm_fast.gated_residual_ada_layer_norm(x, y, gate, shift, scale)
    for grad in torch.autograd.grad(out[0].sum() + out[1].sum(), (x, y, gate, shift, scale)):
        assert not grad.any()
