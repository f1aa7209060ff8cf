"""Activations and feed-forward layers, beyond the shared suite."""

import contextlib
import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES, assert_within_budget, dtypes, grads
from torch.utils.flop_counter import FlopCounterMode

import dfm_fast
from dfm_fast._library import INTERPRET
from dfm_fast.nn import GEGLU, FeedForward
from dfm_fast.nn import _linears as linears
from dfm_fast.nn import activations as layers
from dfm_fast.ops import activations

OPS = {
    "geglu": (dfm_fast.geglu, activations.geglu_ref, {}),
    "geglu-tanh": (dfm_fast.geglu, activations.geglu_ref, {"approximate": "tanh"}),
    "swiglu": (dfm_fast.swiglu, activations.swiglu_ref, {}),
    "gelu_tanh": (dfm_fast.gelu_tanh, activations.gelu_tanh_ref, {}),
}
each_op = pytest.mark.parametrize("name", OPS)
on_devices = pytest.mark.parametrize("device", DEVICES)


@on_devices
def test_the_second_half_is_the_gate(device):
    x = torch.randn(3, 8, device=device)
    a, b = x.chunk(2, -1)
    torch.testing.assert_close(dfm_fast.geglu(x), a * F.gelu(b))
    torch.testing.assert_close(
        dfm_fast.geglu(x, approximate="tanh"), a * F.gelu(b, approximate="tanh")
    )
    torch.testing.assert_close(dfm_fast.swiglu(x), a * F.silu(b))


@on_devices
@each_op
def test_every_magnitude(name, device):
    """From denormal to the largest: the tails of the gate, and what becomes 0, b and infinite."""
    op, reference, kwargs = OPS[name]
    for dtype in dtypes(device):
        limit = torch.finfo(dtype).max ** 0.25
        sizes = torch.logspace(-20, math.log10(limit), 80, dtype=torch.float64)
        near = torch.linspace(0, 16, 176, dtype=torch.float64)
        b = torch.cat((sizes, near, -sizes, -near)).to(device, dtype)
        x = torch.stack((torch.ones_like(b), b), -1) if kwargs or "glu" in name else b[:, None]
        got, ref, exact = op(x, **kwargs), reference(x, **kwargs), reference(x.double(), **kwargs)
        for low, high in ((0, 1), (1, 20), (20, math.inf)):  # a budget for each
            part = (b.abs() >= low) & (b.abs() < high)
            what = f"{name} {dtype} from {low}"
            exact_ = exact[part].cpu()
            assert_within_budget(got[part], ref[part], exact_, cap=4.0, what=what)


@each_op
def test_gradients_where_the_gate_is_saturated(name):
    """g is 0 or the identity there, its slope 0 or 1, and nothing is NaN."""
    op, _, kwargs = OPS[name]
    b = torch.tensor([-1e4, -200.0, 200.0, 1e4])
    x = torch.stack((torch.full_like(b, 3.0), b), -1) if "glu" in name else b[:, None]
    (dx,) = grads(op, (x,), kwargs, [torch.ones(4, 1)])
    a = 3.0 if "glu" in name else 1.0
    assert dx[:, -1].tolist() == [0, 0, a, a]
    if "glu" in name:
        assert dx[:, 0].tolist() == [0, 0, 200, 1e4]


@each_op
def test_not_a_number_stays_one(name):
    op, _, kwargs = OPS[name]
    x = torch.zeros(2, 34)
    x[0, 20] = math.nan
    out = op(x, **kwargs)
    assert out.isnan().sum() == 1
    assert out[0].isnan().any()


@on_devices
@each_op
def test_a_slice_of_a_wider_projection_is_read_in_place(name, device):
    """Rows at a stride, x's and dy's, equal their copies; the raw operator gets no copy."""
    op, _, kwargs = OPS[name]
    wide = torch.randn(2, 5, 100, device=device)
    for start, width in ((0, 48), (16, 64), (7, 34)):
        x = wide[..., start : start + width]
        assert activations._rows(x) is x
        assert torch.equal(op(x, **kwargs), op(x.contiguous(), **kwargs))
        n = op(x, **kwargs).shape[-1]
        dy = wide[..., 3 : 3 + n]
        (got,) = grads(op, (x,), kwargs, [dy])
        leaf = x.contiguous().requires_grad_()
        (want,) = torch.autograd.grad(op(leaf, **kwargs), leaf, dy.contiguous())
        assert torch.equal(got, want)


def test_rows_with_two_strides_are_copied():
    x = torch.randn(4, 6, 10)[:, ::2].requires_grad_()  # [4, 3, 10]: even strides
    y = torch.randn(4, 6, 10)[:, :3]  # batches further apart than rows say
    assert activations._rows(x) is x
    assert activations._rows(y).is_contiguous()
    torch.testing.assert_close(dfm_fast.swiglu(y), activations.swiglu_ref(y))
    expanded = torch.randn(10).expand(3, 10)
    torch.testing.assert_close(dfm_fast.swiglu(expanded), activations.swiglu_ref(expanded))


@pytest.mark.skipif(not INTERPRET, reason="a path of the Triton kernels, here without the memory")
@each_op
def test_64_bit_offsets(name, monkeypatch):
    """The kernels for 2^31 elements and more give what the others give."""
    kernels = pytest.importorskip("dfm_fast.kernels.activations")
    op, _, kwargs = OPS[name]
    args = torch.randn(5, 66), *([torch.randn(66)] if name == "gelu_tanh" else [])
    want = [op(*args, **kwargs), *grads(op, args, kwargs)]
    monkeypatch.setattr(kernels, "_wide", lambda *_: True)
    got = [op(*args, **kwargs), *grads(op, args, kwargs)]
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.skipif(INTERPRET, reason="its programs are too slow for so many rows")
@on_devices
def test_dbias_of_many_rows_is_rounded_once(device):
    """Its error is a rounding of the result, however many rows are added."""
    x = torch.randn(10_000, 37, device=device) + 1
    bias, dy = torch.randn(37, device=device), torch.rand(10_000, 37, device=device)
    _, got = grads(dfm_fast.gelu_tanh, (x, bias), {}, [dy])
    exact = grads(activations.gelu_tanh_ref, (x.double(), bias.double()), {}, [dy.double()])[1]
    assert (got - exact).abs().max() <= 4e-7 * exact.abs().max()


def test_a_frozen_bias_gets_no_gradient():
    x, bias = torch.randn(3, 8, requires_grad=True), torch.randn(8)
    dfm_fast.gelu_tanh(x, bias).sum().backward()
    frozen, x.grad = x.grad, None
    bias.requires_grad_()
    dfm_fast.gelu_tanh(x, bias).sum().backward()
    assert torch.equal(x.grad, frozen)
    torch.testing.assert_close(bias.grad, frozen.sum(0))


def test_only_inputs_are_saved():
    x, bias = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    for out, count in ((dfm_fast.geglu(x), 1), (dfm_fast.gelu_tanh(x, bias), 2)):
        saved = out.grad_fn.saved_tensors
        assert [t.data_ptr() for t in saved] == [x.data_ptr(), bias.data_ptr()][:count]


# --- A gated linear layer in one kernel -----------------------------------------------------------

LINEAR_GLUS = {  # (M, K, D)
    "small": (37, 24, 7),
    "odd": (70, 17, 33),
    "several tiles": (130, 136, 100),
    "groups of tiles": (600, 8, 130),
    "one row": (1, 64, 64),
}


@contextlib.contextmanager
def allow_tf32(allowed):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def as_tf32(x):
    """What tensor cores read of float32: they leave out the last 13 bits."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


@on_devices
@pytest.mark.parametrize("size", LINEAR_GLUS)
def test_linear_glu_is_the_layers(size, device, monkeypatch):
    """x as a slice of wider rows, too; every tile of the table; 64-bit offsets."""
    M, K, D = LINEAR_GLUS[size]
    torch.manual_seed(0)
    ways = ["", "slice", "no bias"]
    if INTERPRET or device == "cuda":
        kernels = pytest.importorskip("dfm_fast.kernels.gated_linears")
        ways += ["large tiles", "64-bit"]
    for dtype, way in itertools.product(dtypes(device), ways):
        x, w = torch.randn(M, K + 8), torch.randn(2 * D, K) / K**0.5
        x = x.to(device, dtype)[:, :K]
        x = x if way == "slice" else x.contiguous()
        w, bias = w.to(device, dtype), torch.randn(2 * D).to(device, dtype)
        bias = None if way == "no bias" else bias
        activation = {"slice": "silu", "no bias": "gelu_tanh"}.get(way, "gelu")
        with monkeypatch.context() as patch, allow_tf32(True):
            if way == "large tiles":
                patch.setattr(kernels, "MANY", 1)
            if way == "64-bit":
                patch.setattr(kernels, "_wide", lambda *_: True)
            got = torch.ops.dfm_fast.linear_glu(x, w, bias, activation)
        ref = activations._linear_glu(x, w, bias, activation)
        wide = (None if t is None else t.double() for t in (x, w, bias))
        exact = activations._linear_glu(*wide, activation)
        unit = dtype
        if device == "cuda" and dtype == torch.float32:
            ref = activations._linear_glu(as_tf32(x), as_tf32(w), bias, activation)
            unit = torch.float16  # of as many digits
        assert_within_budget(got, ref, exact.cpu(), cap=8.0, what=f"{dtype} {way}", inputs=unit)


@on_devices
def test_linear_glu_is_an_operator(device):
    for rows in (0, 5):
        x, w, b = (torch.randn(s, device=device).half() for s in ((rows, 16), (14, 16), (14,)))
        torch.library.opcheck(torch.ops.dfm_fast.linear_glu, (x, w, b, "silu"))
    with FlopCounterMode(display=False) as counter:
        torch.ops.dfm_fast.linear_glu(x, w, b, "silu")
    assert counter.get_total_flops() == 5 * 14 * (2 * 16 + 7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only there it is refused")
def test_linear_glu_takes_float32_where_tf32_is_allowed():
    x = torch.randn(4, 8, device="cuda")
    with (
        allow_tf32(False),
        pytest.raises(TypeError, match="linear_glu: x: expected bfloat16, float16, or float32 "),
    ):
        torch.ops.dfm_fast.linear_glu(x, x, None, "gelu")


@pytest.mark.skipif(not INTERPRET and len(DEVICES) == 1, reason="of Triton's kernels")
@pytest.mark.parametrize("activation", ["geglu", "swiglu"])
def test_feed_forward_in_one_kernel_only_where_it_can(activation, monkeypatch):
    calls, run = [], activations._ops.linear_glu
    monkeypatch.setattr(layers._ops, "linear_glu", lambda *a: calls.append(0) or run(*a))
    device = DEVICES[-1]
    layer = FeedForward(16, activation_fn=activation).eval().to(device, torch.float16)
    x = torch.randn(2, 9, 16, device=device, dtype=torch.float16)
    want = layer(x).detach()
    with torch.no_grad():
        layer(x)  # nothing is measured: cuBLAS
        monkeypatch.setattr(layers, "ONE_KERNEL", "1")
        assert not calls
        for given in (x, x.mT.contiguous().mT):
            got = layer(given)
            torch.testing.assert_close(got, want, atol=4e-3, rtol=4e-3)
        assert len(calls) == 2
        with torch.autocast(device, torch.bfloat16):
            layer(x)
        narrow = FeedForward(12, activation_fn=activation).to(device, torch.float16)
        narrow(x[..., :12])
        hook = layer.net[0].proj.register_forward_hook(lambda *_: None)
        layer(x)
        hook.remove()
    layer(x)
    FeedForward(16, activation_fn="gelu").to(device, torch.float16)(x)
    assert len(calls) == 2


# --- Modules --------------------------------------------------------------------------------------

DIFFUSERS = [
    "geglu",
    "swiglu",
    "gelu",
    "gelu-approximate",
    "geglu-approximate",
    "linear-silu",
]


def pair(activation="geglu", **kwargs):
    """diffusers' layer and ours with its weights."""
    attention = pytest.importorskip("diffusers.models.attention")
    theirs = attention.FeedForward(24, mult=3, activation_fn=activation, **kwargs)
    ours = FeedForward(24, mult=3, activation_fn=activation, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    return theirs, ours


@pytest.mark.parametrize("activation", DIFFUSERS)
@pytest.mark.parametrize("kwargs", [{}, {"dim_out": 10, "bias": False, "final_dropout": True}])
def test_feed_forward_is_diffusers(activation, kwargs):
    theirs, ours = pair(activation, **kwargs)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x))
    got, want = (
        torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (ours, theirs)
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_geglu_layer_is_diffusers(approximate):
    theirs = pytest.importorskip("diffusers.models.activations").GEGLU(12, 20)
    ours = GEGLU(12, 20, approximate=approximate)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 12)
    a, b = theirs.proj(x).chunk(2, -1)
    torch.testing.assert_close(ours(x), a * F.gelu(b, approximate=approximate))
    if approximate == "none":
        torch.testing.assert_close(ours(x), theirs(x))


def test_dropout_is_between_the_layers_and_only_in_training():
    torch.manual_seed(0)
    layer, x = FeedForward(8, dropout=0.5, final_dropout=True), torch.randn(400, 8)
    with torch.no_grad():
        assert (layer(x) == 0).float().mean() > 0.4
        assert torch.equal(layer.eval()(x), layer.eval()(x))
        assert not (layer(x) == 0).any()


@pytest.fixture(params=[False, True], ids=["oneDNN or MKL", "own products"])
def own(request, monkeypatch):
    """As on a processor where our product leads, for small ones too; the terms it was given."""
    if request.param and INTERPRET:
        pytest.skip("Triton serves")
    given = []
    monkeypatch.setattr(linears, "own_leads", lambda: request.param)
    monkeypatch.setattr(layers, "own_leads", lambda: request.param)
    monkeypatch.setattr(linears, "LEAST_OWN", 0)
    monkeypatch.setattr(linears, "LEAST_TRAINED", 0)
    run = linears.matrix_product
    monkeypatch.setattr(linears, "matrix_product", lambda *a: given.append(a) or run(*a))
    return given if request.param else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [n for n in DIFFUSERS if n != "geglu-approximate"])
@pytest.mark.parametrize("bias", [True, False])
def test_inference_on_a_cpu_equals_the_layers(activation, bias, dtype, own, monkeypatch):
    """In blocks of the hidden tensor; against float64, no worse than layer by layer."""
    monkeypatch.setattr(layers, "LONGEST_SUM", 32)  # 3 blocks
    layer = FeedForward(24, 10, 3, activation_fn=activation, bias=bias).to(dtype).eval()
    x = torch.randn(2, 140, 24).to(dtype)
    by_layers = layer(x).detach()  # autograd's path
    calls = _count_calls(monkeypatch)
    if own is not None:
        own.clear()
    with torch.no_grad():
        got = layer(x)
        if own is not None and dtype == torch.float32:
            ((hidden, _, added),) = own
            assert hidden.shape == (280, 72)
            assert (added is not None) == bias
        exact = layer.double()(x.double())
    if dtype == torch.float32 or layers._bf16_serves():
        assert len(calls) == 1
    assert_within_budget(got, by_layers, exact, cap=16.0, what=activation, inputs=dtype)


def _count_calls(monkeypatch):
    calls, run = [], layers._inference
    monkeypatch.setattr(layers, "_inference", lambda *a: calls.append(0) or run(*a))
    return calls


def test_inference_goes_layer_by_layer_where_someone_else_looks_on(monkeypatch):
    """Hooks, replaced layers, autograd, autocast, few rows."""
    calls = _count_calls(monkeypatch)
    layer, x = FeedForward(8).eval(), torch.randn(300, 8)
    layer(x)
    with torch.no_grad():
        layer(x[:3])
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        seen = []
        hook = layer.net[0].proj.register_forward_hook(lambda *_: seen.append(0))
        layer(x)
        hook.remove()
        assert seen == [0]
        replaced = FeedForward(8).eval()
        replaced.net[2] = torch.nn.Sequential(replaced.net[2])
        replaced(x)
        assert calls == []
        layer(x)
        assert len(calls) == 1


def test_training_keeps_the_hidden_once():
    """What backward holds on to: x, the projection's result, the weights; with dropout more."""
    rows, dim, inner = 64, 16, 48

    def saved(layer, x):
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        return sum(kept.values())

    x = torch.randn(rows, dim, requires_grad=True)
    layer, weights = FeedForward(dim, mult=3, bias=False), 3 * dim * inner
    assert saved(layer, x) == rows * dim + rows * 2 * inner + weights
    layer.net[1].p = 0.5
    assert saved(layer, x) > rows * dim + rows * 3 * inner + weights


@pytest.mark.parametrize("activation", [n for n in DIFFUSERS if n != "geglu-approximate"])
def test_gradients_of_the_recomputed_activation(activation, own, monkeypatch):
    """As those of the layers one by one, frozen ones and autocast's too; in blocks of rows."""
    monkeypatch.setattr(layers, "_BLOCK", 1)
    monkeypatch.setattr(layers, "FEWEST_ROWS", 64)
    layer, x = FeedForward(16, 12, 3, activation_fn=activation), torch.randn(2, 75, 16)
    x.requires_grad_()

    def gradients(recompute, frozen=None):
        layer.net[1].p = 0.0 if recompute else 1e-12  # dropout: layer by layer
        layer.requires_grad_(True)
        if frozen is not None:
            frozen.requires_grad_(False)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return torch.autograd.grad(layer(x).float().square().sum(), leaves)

    for frozen in (None, layer.net[2].weight, layer.net[2].bias, layer.net[0].proj.weight):
        for got, want in zip(gradients(True, frozen), gradients(False, frozen), strict=True):
            torch.testing.assert_close(got, want)
    if own is not None:
        own.clear()
        gradients(True)
        of_weight = [given for given in own if given[0].shape in ((12, 64), (12, 22))]
        assert [len(given[0].t()) for given in of_weight] == [64, 64, 22]
        assert [given[2] is None for given in of_weight] == [True, False, False]
    with torch.autocast("cpu", torch.bfloat16):
        for got, want in zip(gradients(True), gradients(False), strict=True):
            torch.testing.assert_close(got, want, atol=0.02 * want.abs().max().item(), rtol=0)


@on_devices
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", ""])
def test_gradient_and_value_of_one_read(activation, device):
    """What backward computes of a hidden tensor that it has once: as one by one."""
    ops = torch.ops.dfm_fast
    for dtype in dtypes(device):
        x = torch.randn(5, 3, 48).to(device, dtype)
        dy = torch.randn(5, 3, 48 // (2 if activation else 1)).to(device, dtype)
        if activation:
            got = ops.glu_again(dy, x, activation)
            want = ops.glu_backward(dy, x, activation), ops.glu(x, activation)
        else:
            dx, dbias = ops.gelu_tanh_backward(dy, x, x.new_zeros(48), True)
            want = dx, ops.gelu_tanh(x, None), dbias
            alone = dy.clone()
            y, nothing = ops.gelu_tanh_again(alone, x, False)
            assert nothing.numel() == 0
            got = dy, *ops.gelu_tanh_again(dy, x, True)
            torch.testing.assert_close((alone, y), got[:2])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
            if INTERPRET or device != "cpu":
                assert torch.equal(a, b)


@pytest.mark.skipif(not INTERPRET and not torch.cuda.is_available(), reason="where Triton serves")
@pytest.mark.parametrize("activation", ["gelu-approximate", "geglu"])
def test_biases_of_many_rows(activation):
    """Their gradients are sums of ours, the first layer's of the pass that has its terms."""
    device = "cpu" if INTERPRET else "cuda"
    torch.manual_seed(0)
    layer = FeedForward(16, inner_dim=24, activation_fn=activation).to(device)
    x, dy = (torch.randn(2, 517, 16, device=device) for _ in range(2))
    given = [x.requires_grad_(), *layer.parameters()]
    with torch.profiler.profile() as profile:
        got = torch.autograd.grad(layer(x), given, dy)
    sums = [e.name for e in profile.events() if e.name == "dfm_fast::bias_backward"]
    assert len(sums) == (1 if activation == "gelu-approximate" else 2)

    def layer_by_layer(layer, x, dy):
        h = F.linear(x, layer.net[0].proj.weight, layer.net[0].proj.bias)
        y = F.linear(layer.net[0].activation.function(h), layer.net[2].weight, layer.net[2].bias)
        return torch.autograd.grad(y, [x, *layer.parameters()], dy)

    plain = layer_by_layer(layer, x, dy)
    wide = copy.deepcopy(layer).double().cpu(), x.detach().cpu().double(), dy.cpu().double()
    exact = layer_by_layer(wide[0], wide[1].requires_grad_(), wide[2])
    for g, r, w in zip(got, plain, exact, strict=True):
        assert_within_budget(g, r, w, cap=64.0, what=activation)


@pytest.mark.skipif(not INTERPRET and not torch.cuda.is_available(), reason="where Triton serves")
@pytest.mark.parametrize("shape", [(1024, 96), (3, 700, 24), (1100, 77), (2049, 520)], ids=str)
def test_sum_of_rows(shape):
    device = "cpu" if INTERPRET else "cuda"
    torch.manual_seed(0)
    for dtype in dtypes(device):
        x = torch.randn(shape, device=device).to(dtype)
        for rows in (x, torch.randn(*shape[:-1], 64 + shape[-1]).to(x)[..., : shape[-1]]):
            got = torch.ops.dfm_fast.bias_backward(rows)
            exact, theirs = (r.flatten(0, -2).sum(0) for r in (rows.cpu().double(), rows))
            assert_within_budget(got, theirs, exact, cap=64.0, what=f"{shape} {dtype}")


def test_activated_linear_says_what_is_wrong():
    for activation in ("relu", "geglu-approximate"):
        with pytest.raises(ValueError, match="activated_linear: activation: expected one "):
            layers.activated_linear(torch.zeros(2, 4), torch.zeros(3, 4), activation=activation)


def test_feed_forward_compiles_whole():
    layer, x = FeedForward(16).eval(), torch.randn(2, 140, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("activation", DIFFUSERS)
def test_layers_are_pickled(activation):
    """As torch.save of a whole model, or a process pool, does."""
    layer, x = FeedForward(8, activation_fn=activation), torch.randn(3, 8)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x), layer(x))


def test_modules_say_what_is_wrong():
    with pytest.raises(ValueError, match="FeedForward: activation_fn: expected one of geglu, "):
        FeedForward(8, activation_fn="relu")
    with pytest.raises(ValueError, match="GEGLU: approximate: expected one of none, tanh, got "):
        GEGLU(8, 8, approximate="sigmoid")
