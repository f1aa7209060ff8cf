"""Multi-query attention, beyond the shared suite."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES, INTERPRET, assert_within_budget, grads
from torch.utils._python_dispatch import TorchDispatchMode

import dfm_fast
from dfm_fast.ops import _sdpa
from dfm_fast.ops.attentions import multi_query_attention_ref

LOW = torch.float16 if INTERPRET else torch.bfloat16


def randn(*shape, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def heads(B, T, S, H, kv, d, device="cpu", dtype=torch.float32):
    """q, k, v."""
    q = randn(B, T, H, d, device=device, dtype=dtype)
    k, v = (randn(B, S, kv, d, device=device, dtype=dtype, seed=s) for s in (1, 2))
    return q, k, v


def assert_gradients_within_budget(args, dy, cap=64.0):
    """Of q, k and v, as the shared suite does."""
    wide = [x.double() if x.is_floating_point() else x for x in args]
    functions = dfm_fast.multi_query_attention, multi_query_attention_ref, multi_query_attention_ref
    given = args, args, wide
    results = [grads(f, x, {}, [dy.to(x[0])]) for f, x in zip(functions, given, strict=True)]
    for i, triple in enumerate(zip(*results, strict=True)):
        assert_within_budget(*triple, cap=cap, what=f"gradient {i}")


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRET, reason="the shared suite's sizes are what the interpreter can do")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "T", "S", "H", "kv", "d", "masked"),
    [
        (1, 300, 300, 14, 1, 64, False),  # several parts, and two chunks of keys
        (2, 65, 77, 8, 1, 64, True),
        (1, 70, 1030, 4, 2, 72, True),
        (1, 9, 256, 3, 3, 16, False),  # a chunk, exactly
        (1, 64, 257, 1, 1, 300, False),
    ],
)
def test_blocks_and_chunks(B, T, S, H, kv, d, masked, dtype, device):
    q, k, v = heads(B, T, S, H, kv, d, device, dtype)
    args = (q, k, v, *([randn(B, S, device=device, seed=3) < 0.5] if masked else []))
    wide = [x.double() if x.is_floating_point() else x for x in args]
    ref, exact = multi_query_attention_ref(*args), multi_query_attention_ref(*wide)
    got = dfm_fast.multi_query_attention(*args)
    assert_within_budget(got, ref, exact.cpu(), cap=16.0, what="y")
    if device == "cpu":
        assert_gradients_within_budget(args, randn(*q.shape, seed=4))


@pytest.mark.parametrize("device", DEVICES)
def test_heads_are_those_of_torch(device):
    """Head h attends to key head h Hkv // H, as with enable_gqa."""
    q, k, v = heads(2, 5, 7, 6, 2, 8, device)
    mask = torch.tensor([[True] * 5 + [False] * 2, [False] + [True] * 6], device=device)
    got = dfm_fast.multi_query_attention(q, k, v, mask, scale=0.3)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"attn_mask": mask[:, None, None], "scale": 0.3, "enable_gqa": True}
    want = F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_without_keys_gets_zeros(device):
    q, k, v = (x.requires_grad_() for x in heads(3, 4, 6, 4, 1, 8, device))
    mask = torch.ones(3, 6, dtype=torch.bool, device=device)
    mask[1] = False
    y = dfm_fast.multi_query_attention(q, k, v, mask)
    assert not y[1].any()
    alone = dfm_fast.multi_query_attention(q[2:], k[2:], v[2:])
    torch.testing.assert_close(y[2:], alone)
    for dx in torch.autograd.grad(y, (q, k, v), randn(*y.shape, device=device, seed=3)):
        assert not dx[1].any()
        assert dx.isfinite().all()
        assert dx[2].any()


@pytest.mark.parametrize("device", DEVICES)
def test_masked_keys_are_as_if_not_there(device):
    q, k, v = (x.requires_grad_() for x in heads(2, 5, 9, 4, 1, 8, device))
    keep = torch.tensor([0, 2, 3, 7], device=device)
    mask = torch.zeros(2, 9, dtype=torch.bool, device=device)
    mask[:, keep] = True
    far = [torch.where(mask[:, :, None, None], x, 1e4) for x in (k, v)]
    dy = randn(*q.shape, device=device, seed=3)
    results = []
    for args in ((q, *far, mask), (q, k[:, keep], v[:, keep])):
        y = dfm_fast.multi_query_attention(*args)
        results.append([y, *torch.autograd.grad(y, (q, k, v), dy)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert not results[0][2][~mask].any()


@pytest.mark.parametrize("device", DEVICES)
def test_one_key_is_its_value(device):
    q, k, v = (x.requires_grad_() for x in heads(2, 3, 1, 4, 1, 8, device))
    y = dfm_fast.multi_query_attention(q, k, v)
    # On a GPU torch multiplies float32 in three products of TF32.
    rtol = 2**-21 if device == "cuda" else 0.0
    torch.testing.assert_close(y, v.expand(-1, 3, 4, -1), atol=0.0, rtol=rtol)
    dq, dk, _ = torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
    for dx in (dq, dk):  # 0 but for the rounding of dy . v
        assert dx.abs().max() <= 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_no_keys_and_no_queries(device):
    q, k, v = (x.requires_grad_() for x in heads(2, 3, 0, 4, 1, 8, device))
    y = dfm_fast.multi_query_attention(q, k, v)
    assert y.shape == q.shape
    assert not y.any()
    dq, dk, _ = torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
    assert not dq.any()
    assert dk.shape == k.shape
    q, k, v = (x.requires_grad_() for x in heads(2, 0, 3, 4, 1, 8, device))
    y = dfm_fast.multi_query_attention(q, k, v)
    assert y.shape == (2, 0, 4, 8)
    for dx in torch.autograd.grad(y, (q, k, v), y):
        assert not dx.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-4, 300.0])
def test_scores_far_from_zero(size, device):
    """Scores of up to 1e5, whose exponentials are no floats."""
    q, k, v = heads(1, 6, 300, 2, 1, 16, device)
    got = dfm_fast.multi_query_attention(q * size, k * size, v)
    want = multi_query_attention_ref((q * size).double(), (k * size).double(), v.double())
    # One rounding of scores of that size is an error of their exponentials.
    error = 2e-6 + 4 * torch.finfo(torch.float32).eps * 16 * size**2 / 4
    assert (got.double() - want).abs().max() <= min(error, 2.0)
    assert got.isfinite().all()


# --- Memory ---------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Names of the operators that run, and the arguments of ours."""

    def __init__(self):
        super().__init__()
        self.names, self.arguments = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        if func.name() == "dfm_fast::multi_query_attention":
            self.arguments = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
def test_a_packed_projection_is_read_in_place(device):
    qkv = randn(2, 5, 7, 16, device=device)
    parts = qkv.split((5, 1, 1), 2)
    with Recorder() as recorder:
        got = dfm_fast.multi_query_attention(*parts)
    assert recorder.names == ["dfm_fast::multi_query_attention"]
    assert [x.data_ptr() for x in recorder.arguments[:3]] == [x.data_ptr() for x in parts]
    want = dfm_fast.multi_query_attention(*(x.contiguous() for x in parts))
    assert torch.equal(got, want)


@pytest.mark.skipif(INTERPRET, reason="there torch.empty is filled, which takes minutes")
@pytest.mark.parametrize("device", DEVICES)
def test_offsets_past_2_31(device):
    """Samples 2^31 elements apart, of memory that is never touched in between."""
    apart, shape = 2**31 + 64, (2, 3, 2, 8)
    memory = torch.empty(apart + 256, dtype=torch.float16, device=device)
    x = memory.as_strided(shape, (apart, 16, 8, 1))
    x.copy_(randn(*shape))
    outputs = []
    for v in (x, x.clone(memory_format=torch.contiguous_format)):
        v = v.detach().requires_grad_()
        y = dfm_fast.multi_query_attention(v, v, v)
        outputs.append([y, *torch.autograd.grad(y, v, x)])
    for got, want in zip(*outputs, strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(INTERPRET, reason="what the C++ kernel and torch keep")
def test_no_scores_are_kept_for_backward():
    q, k, v = (x.requires_grad_() for x in heads(1, 64, 64, 4, 1, 8))
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        y = dfm_fast.multi_query_attention(q, k, v)
    assert sum(t.numel() for t in saved) == q.numel() + k.numel() + v.numel() + y.numel() + 64 * 4


# --- torch's SDPA, as a GPU is served -------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("view", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_backends_by_shape(backend, view, masked):
    """Without a GPU: the calls fit torch's schemas, and give our shapes and strides."""
    if masked and backend == "flash":
        pytest.skip("flash takes no mask")
    q = torch.empty(2, 33, 6, 20, device="meta", dtype=torch.float16)
    k = torch.empty(2, 7, 1 if view else 3, 20, device="meta", dtype=torch.float16)
    mask = torch.empty(2, 7, device="meta", dtype=torch.bool) if masked else None
    assert _sdpa.forward(backend, q, k, k, mask, 0.5, view, False)[1].shape == (0,)
    y, lse = _sdpa.forward(backend, q, k, k, mask, 0.5, view, True)
    assert (y.shape, lse.shape) == (q.shape, q.shape[:3])
    assert lse.dtype == torch.float32
    grads = _sdpa.backward(backend, y, q, k, k, mask, y, lse, 0.5, view)
    for x, like in zip((y, *grads), (q, q, k, k), strict=True):
        assert x.shape == like.shape
        assert x.stride() == like.stride()


@pytest.mark.parametrize("view", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_forms_by_value(view, masked):
    """The same forms, by torch's kernel for the CPU."""
    q, k, v = heads(2, 5, 7, 6, 1 if view else 3, 8)
    mask = None
    if masked:
        mask = randn(2, 7, seed=3) < 0.5
        mask[0] = False
    dy = randn(*q.shape, seed=4)
    y, lse = _sdpa.forward("cpu", q, k, v, mask, 0.5, view, True)
    args = (q, k, v) if mask is None else (q, k, v, mask)
    torch.testing.assert_close(y, multi_query_attention_ref(*args, scale=0.5))
    scores = torch.einsum("bthd,bshd->bths", q, k.repeat_interleave(6 // k.shape[2], 2)) / 2
    if masked:  # a sample without any key attends to all
        scores.masked_fill_(~(mask | ~mask.any(1, keepdim=True))[:, None, None], -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))  # to base e, as it came
    got = _sdpa.backward("cpu", dy, q, k, v, mask, y, lse, 0.5, view)
    want = grads(multi_query_attention_ref, args, {"scale": 0.5}, [dy])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("device", DEVICES)
def test_what_only_a_gradient_needs_is_not_computed_without_one(device):
    q, k, v = (torch.randn(2, n, h, 16, device=device) for n, h in ((9, 4), (7, 1), (7, 1)))
    raw = torch.ops.dfm_fast.multi_query_attention
    y, lse = raw(q, k, v, None, 0.25, True)
    alone, nothing = raw(q, k, v, None, 0.25, False)
    assert lse.shape == (2, 9, 4)
    assert nothing.numel() == 0
    assert torch.equal(alone, y)
    for needed in (False, True):
        with Recorder() as recorder:
            dfm_fast.multi_query_attention(q.requires_grad_(needed), k, v)
        assert recorder.arguments[-1] is needed
