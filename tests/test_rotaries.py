"""QK-RMSNorm and rotary embedding, beyond the shared suite."""

import pytest
import torch
from helpers import DEVICES, INTERPRET
from torch.utils._python_dispatch import TorchDispatchMode

import dfm_fast
from dfm_fast import nn
from dfm_fast.ops.rotaries import qk_norm_rope_ref

LOW = torch.float16 if INTERPRET else torch.bfloat16


def randn(*shape, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


class Recorder(TorchDispatchMode):
    """Names of the operators that run, and the arguments of ours."""

    def __init__(self):
        super().__init__()
        self.names, self.arguments = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        if func.name() == "dfm_fast::qk_norm_rope":
            self.arguments = args
        return func(*args, **(kwargs or {}))


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("H", "kv", "d"), [(14, 1, 64), (3, 3, 72), (2, 1, 6)])
def test_a_packed_projection_is_read_in_place(H, kv, d, device):
    qkv = randn(2, 3, (H + 2 * kv) * d, device=device)
    q, k, _ = qkv.view(2, 3, -1, d).split((H, kv, kv), 2)
    assert not q.is_contiguous()
    weights = randn(d, seed=1).to(device), randn(d, seed=2).to(device)
    cos, sin = randn(3, d // 2, seed=3).to(device), randn(3, d // 2, seed=4).to(device)
    with Recorder() as recorder:
        got = dfm_fast.qk_norm_rope(q, k, *weights, cos, sin)
    assert recorder.names == ["dfm_fast::qk_norm_rope"]
    assert [v.data_ptr() for v in recorder.arguments[:2]] == [q.data_ptr(), k.data_ptr()]
    want = dfm_fast.qk_norm_rope(q.contiguous(), k.contiguous(), *weights, cos, sin)
    for g, w in zip(got, want, strict=True):
        assert g.is_contiguous()
        assert torch.equal(g, w)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interleaved", [True, False])
def test_gradients_through_views_and_from_views(interleaved, device):
    """q and k views of one projection, and what attention hands back: [B, H, T, d] transposed."""
    qkv = randn(2, 5, 5, 8, device=device).requires_grad_()
    weights = [randn(8, seed=s).to(device).requires_grad_() for s in (1, 2)]
    cos, sin = (v.to(device) for v in dfm_fast.rope_2d(1, 5, 8))
    dq, dk = (randn(2, h, 5, 8, seed=h).to(device).transpose(1, 2) for h in (3, 1))
    results = []
    for function in (dfm_fast.qk_norm_rope, qk_norm_rope_ref):
        q, k, _ = qkv.split((3, 1, 1), 2)
        out = function(q, k, *weights, cos, sin, interleaved=interleaved)
        results.append(torch.autograd.grad(out, [qkv, *weights], (dq, dk)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_keys_shared_by_all_samples(device):
    """An expanded tensor has strides of 0."""
    q, k = randn(3, 2, 2, 8, device=device), randn(1, 4, 1, 8, device=device)
    weight = randn(8, seed=1).to(device)
    _, got = dfm_fast.qk_norm_rope(q, k.expand(3, -1, -1, -1), weight, weight)
    _, want = dfm_fast.qk_norm_rope(q[:1], k, weight, weight)
    assert torch.equal(got, want.expand(3, -1, -1, -1))


def test_what_is_only_rotated_is_not_kept_for_backward():
    q, k = randn(1, 2, 3, 8).requires_grad_(), randn(1, 2, 1, 8, seed=1).requires_grad_()
    weight, tables = torch.ones(8), dfm_fast.rope_2d(1, 2, 8)
    for weights, kept in (((None, None), []), ((None, weight), [k, weight])):
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        )
        with hooks:
            out = dfm_fast.qk_norm_rope(q, k, *weights, *tables)
        want = [*kept, *tables]
        assert [v.data_ptr() for v in saved] == [v.data_ptr() for v in want]
        got = torch.autograd.grad(out, (q, k), out)
        want = qk_norm_rope_ref(q, k, *weights, *tables)
        torch.testing.assert_close(got, torch.autograd.grad(want, (q, k), want))


@pytest.mark.skipif(INTERPRET, reason="there torch.empty is filled, which takes minutes")
@pytest.mark.parametrize("device", DEVICES)
def test_offsets_past_2_31(device):
    """Samples 2^31 elements apart, of memory that is never touched in between."""
    apart, shape = 2**31 + 64, (2, 3, 2, 8)
    memory = torch.empty(apart + 256, dtype=torch.float16, device=device)
    x = memory.as_strided(shape, (apart, 16, 8, 1))
    x.copy_(randn(*shape))
    weight = randn(8, seed=1).to(device)
    cos, sin = (v.to(device) for v in dfm_fast.rope_2d(1, 3, 8))
    outputs = []
    for v in (x, x.clone(memory_format=torch.contiguous_format)):
        v = v.detach().requires_grad_()
        out = dfm_fast.qk_norm_rope(v, v, weight, weight, cos, sin)
        outputs.append([*out, *torch.autograd.grad(out, v, (x, x))])
    for got, want in zip(*outputs, strict=True):
        assert torch.equal(got, want)


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_float32_weights_beside_low_precision_heads(device):
    q, k = (randn(2, 3, h, 64, device=device, dtype=LOW, seed=h) for h in (3, 1))
    weights = [(1 + randn(64, seed=s) / 1000).to(device).requires_grad_() for s in (1, 2)]
    cos, sin = (v.to(device) for v in dfm_fast.rope_2d(1, 3, 64))
    got = dfm_fast.qk_norm_rope(q, k, *weights, cos, sin)
    wide = dfm_fast.qk_norm_rope(q.float(), k.float(), *weights, cos, sin)
    for g, w in zip(got, wide, strict=True):
        assert g.dtype == LOW
        assert torch.equal(g, w.to(LOW))  # the weights were not rounded
    grads = torch.autograd.grad(got, weights, [torch.ones_like(v) for v in got])
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_relative_positions(interleaved, device):
    """q at (y, x) times k at (y', x') is the same wherever the two are, y - y' and x - x' given."""
    size, d = 6, 16
    cos, sin = (v.to(device) for v in dfm_fast.rope_2d(size, size, d))
    q = randn(1, 1, 1, d, device=device).expand(1, size * size, 1, d)
    k = randn(1, 1, 1, d, device=device, seed=1).expand(1, size * size, 1, d)
    q, k = dfm_fast.qk_norm_rope(q, k, None, None, cos, sin, interleaved=interleaved)
    scores = (q[0, :, 0] @ k[0, :, 0].mT).view(size, size, size, size)
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1])
    assert (scores[0, 0] - scores[0, 0, 0, 0]).abs().max() > 0.1  # and they do depend on it
    assert not torch.allclose(scores[0, 0], scores[0, 0].mT, atol=0.1)  # y is not x


@pytest.mark.parametrize("device", DEVICES)
def test_rotation_keeps_lengths_and_the_norm_ignores_scale(device):
    x = randn(2, 4, 3, 64, device=device)
    cos, sin = (v.to(device) for v in dfm_fast.rope_2d(2, 2, 64))
    turned, _ = dfm_fast.qk_norm_rope(x, x, None, None, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    ones = torch.ones(64, device=device)
    one = dfm_fast.qk_norm_rope(x, x, ones, ones, cos, sin, eps=0.0)
    large = dfm_fast.qk_norm_rope(1e4 * x, 1e-4 * x, ones, ones, cos, sin, eps=0.0)
    for a, b in zip(one, large, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_what_needs_no_gradient_gets_none(device):
    q, k = randn(1, 2, 2, 8, device=device).requires_grad_(), randn(1, 2, 1, 8, device=device)
    cos, sin = (v.to(device) for v in dfm_fast.rope_2d(1, 2, 8))
    weight = torch.ones(8, device=device, requires_grad=True)
    out = dfm_fast.qk_norm_rope(q, k, None, weight, cos, sin)
    out[0].sum().backward()  # of k nothing is used
    assert q.grad is not None
    assert not weight.grad.any()
    assert k.grad is cos.grad is sin.grad is None


@pytest.mark.skipif(
    not INTERPRET and not torch.cuda.is_available(), reason="how Triton divides its work"
)
def test_sums_over_few_programs_are_those_over_many(monkeypatch):
    from dfm_fast.kernels import rotaries

    device = "cpu" if INTERPRET else "cuda"
    q, k = randn(2, 7, 3, 8, device=device), randn(2, 7, 2, 8, device=device, seed=1)
    weights = [randn(8, seed=s).to(device).requires_grad_() for s in (2, 3)]
    grads = []
    for tile, programs in ((rotaries.TILE, rotaries.SUMS), (64, 3), (64, 1)):
        monkeypatch.setattr(rotaries, "TILE", tile)  # 64: a token each
        monkeypatch.setattr(rotaries, "SUMS", programs)
        out = dfm_fast.qk_norm_rope(q, k, *weights)
        grads.append(torch.autograd.grad(out, weights, (q, k)))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0])


# --- Tables ---------------------------------------------------------------------------------------


def test_tables_are_those_of_flux():
    """diffusers' get_1d_rotary_pos_embed per axis, over the positions of a grid."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    T, H, W, axes = 2, 3, 5, (16, 56, 56)
    t, y, x = (v.flatten() for v in torch.meshgrid(*map(torch.arange, (T, H, W)), indexing="ij"))
    want = [
        embeddings.get_1d_rotary_pos_embed(d, p, use_real=True, freqs_dtype=torch.float64)
        for d, p in zip(axes, (t, y, x), strict=True)
    ]
    got = dfm_fast.rope_3d(T, H, W, 128, axes=axes)
    for table, parts in zip(got, zip(*want, strict=True), strict=True):
        whole = torch.cat(parts, -1)  # every angle twice
        torch.testing.assert_close(table, whole[:, ::2], atol=1e-7, rtol=0)
    flat = dfm_fast.rope_2d(H, W, 112)
    for table, whole in zip(flat, got, strict=True):
        assert torch.equal(table, whole[: H * W, 8:])  # the first frame


def test_tables_in_float64_and_by_default():
    cos, sin = dfm_fast.rope_3d(3, 2, 2, 128, base=100.0, dtype=torch.float64)
    assert cos.dtype == torch.float64
    angle = torch.atan2(sin, cos)
    frame = angle.view(3, 2, 2, 64)[2, 0, 0]
    assert frame[22:].count_nonzero() == 0  # 44 dimensions for t
    torch.testing.assert_close(frame[1], torch.tensor(2 * 100.0 ** (-2 / 44)).double())
    for table, wide in zip(dfm_fast.rope_3d(3, 2, 2, 128, base=100.0), (cos, sin), strict=True):
        assert torch.equal(table, wide.float())


def test_a_coarse_grid_lies_where_the_fine_one_does():
    """Angles of a grid twice coarser are the means of those it covers."""
    fine, coarse = (
        torch.atan2(sin, cos)
        for cos, sin in (
            dfm_fast.rope_2d(1, 4, 4, dtype=torch.float64),
            dfm_fast.rope_2d(1, 2, 4, spacing=(1, 2), dtype=torch.float64),
        )
    )
    torch.testing.assert_close(coarse, fine.view(2, 2, 2).mean(1))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: dfm_fast.rope_2d(0, 4, 8), "height"),
        (lambda: dfm_fast.rope_2d(4, 1.5, 8), "width"),
        (lambda: dfm_fast.rope_2d(4, 4, 6), "head_dim"),
        (lambda: dfm_fast.rope_2d(4, 4, 8, base=0), "base"),
        (lambda: dfm_fast.rope_2d(4, 4, 8, spacing=(1, 2, 3)), "spacing"),
        (lambda: dfm_fast.rope_3d(1, 4, 4, 7), "head_dim"),
        (lambda: dfm_fast.rope_3d(1, 4, 4, 8, axes=(2, 2, 2)), "axes"),
        (lambda: dfm_fast.rope_3d(1, 4, 4, 8, axes=(1, 3, 4)), "axes"),
        (lambda: dfm_fast.rope_3d(1, 4, 4, 8, axes=(4, 4)), "axes"),
        (lambda: nn.QKNormRotary(7), "head_dim"),
    ],
)
def test_bad_sizes_are_clear_errors(call, argument):
    with pytest.raises((TypeError, ValueError), match=f": {argument}: expected .*, got "):
        call()


# --- Module ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_module_is_the_norms_and_rotation_of_diffusers(device):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    from diffusers.models.normalization import RMSNorm

    theirs = torch.nn.ModuleDict({f"norm_{x}": RMSNorm(64, eps=1e-5) for x in "qk"}).to(device)
    for i, p in enumerate(theirs.parameters()):
        p.data = randn(64, device=device, seed=i)
    for interleaved, unbind in ((True, -1), (False, -2)):
        ours = nn.QKNormRotary(64, eps=1e-5, interleaved=interleaved, device=device)
        ours.load_state_dict(theirs.state_dict())
        q, k = randn(2, 6, 3, 64, device=device), randn(2, 6, 1, 64, device=device, seed=9)
        cos, sin = (v.to(device) for v in dfm_fast.rope_2d(2, 3, 64))
        both = [v.repeat_interleave(2, -1) if interleaved else v.repeat(1, 2) for v in (cos, sin)]
        got = ours(q, k, cos, sin)
        for y, x, norm in zip(got, (q, k), theirs.values(), strict=True):
            turn = {"use_real_unbind_dim": unbind, "sequence_dim": 1}
            want = embeddings.apply_rotary_emb(norm(x), both, **turn)
            torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_module_without_weights_or_tables(device):
    module = nn.QKNormRotary(8, elementwise_affine=False, device=device)
    assert not module.state_dict()
    q, k = randn(2, 3, 2, 8, device=device), randn(2, 5, 1, 8, device=device, seed=1)
    for y, x in zip(module(q, k), (q, k), strict=True):
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,), eps=1e-6))


def test_module_learns():
    module = nn.QKNormRotary(8)
    q = randn(1, 2, 1, 8)
    sum(y.sum() for y in module(q, q)).backward()
    assert module.norm_q.weight.grad.abs().min() > 0
    assert module.norm_k.weight.grad.abs().min() > 0
