"""Linear layers, one or several as one: those of torch, up to rounding, where they serve and where
not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfm_fast.nn import _linears
from dfm_fast.nn._linears import linear, serves
from dfm_fast.nn._packs import linears, pack, packed, stacked


@pytest.fixture(params=[25, 26], ids=["Zen 4", "Zen 5"])
def leading(monkeypatch, request):
    """As on a processor where oneDNN is faster, or our own product, for small ones too."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(_linears, "amd_family", lambda: request.param)
    monkeypatch.setattr(_linears, "LEAST_OWN", 0)
    monkeypatch.setattr(_linears, "LEAST_TRAINED", 0)


def given(shape=(3, 100, 96), outputs=40, bias=True):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(outputs, shape[-1])
    values = [x, weight, torch.randn(outputs)] if bias else [x, weight]
    return [v.requires_grad_() for v in values]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 100, 96), (300, 2500), (2, 3, 50, 8)], ids=str)
def test_values_and_gradients(leading, shape, bias):
    values = given(shape, bias=bias)
    assert serves(*values[:2])
    y = linear(*values)
    exact = F.linear(*(v.double() for v in values))
    theirs = F.linear(*values)
    dy = torch.randn(y.shape)
    wide = torch.autograd.grad(exact, values, dy.double())
    ours, plain = (torch.autograd.grad(v, values, dy) for v in (y, theirs))
    for got, ref, want in ((y, theirs, exact), *zip(ours, plain, wide, strict=True)):
        bound = 2 * (ref - want).abs().max() + torch.finfo(torch.float32).eps / 2 * want.abs()
        assert ((got - want).abs() <= bound).all()


def test_one_gradient_alone_and_twice(leading):
    x, weight, bias = given()
    dy = torch.randn(3, 100, 40)
    every = torch.autograd.grad(linear(x, weight, bias), (x, weight, bias), dy)
    for i in range(3):
        some = [v.detach().requires_grad_(j == i) for j, v in enumerate((x, weight, bias))]
        (alone,) = torch.autograd.grad(linear(*some), some[i], dy)
        assert torch.equal(alone, every[i])
    (dx,) = torch.autograd.grad(linear(x, weight), x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_where_it_does_not_serve(leading):
    x, weight, _ = given()
    assert not serves(x.double(), weight.double())
    assert not serves(x[:, :2], weight)  # few rows
    assert serves(x[:, :10], weight) == _linears.own_leads()
    assert not serves(x.to("meta"), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    torch.testing.assert_close(linear(x[:, :2], weight), F.linear(x[:, :2], weight))
    compiled = torch.compile(lambda *v: linear(*v), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, weight), F.linear(x, weight))


def test_small_products_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(_linears, "own_leads", lambda: True)
    calls = []
    monkeypatch.setattr(_linears, "matrix_product", lambda a, b, *_: calls.append(1) or a @ b)
    x, weight = torch.randn(250, 1000), torch.randn(40, 1000)
    for rows, grad, expected in ((100, False, 0), (110, False, 1), (250, True, 0), (250, False, 1)):
        calls.clear()
        linear(x[:rows], weight.requires_grad_(grad))
        assert len(calls) == expected
    calls.clear()
    linear(torch.cat([x, x]), weight.requires_grad_()).sum().backward()
    assert len(calls) == 2  # forward, the weight's gradient


def test_turned_off_with_onednn():
    with torch.backends.mkldnn.flags(enabled=False):
        assert not _linears.onednn_leads()


INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\n"


@pytest.mark.parametrize(
    ("text", "family"),
    [(INTEL, 0), (INTEL.replace("Intel", "").replace("Genuine", "AuthenticAMD"), 6), ("", 0)],
)
def test_families_of_processors(monkeypatch, text, family):
    monkeypatch.setattr(_linears.Path, "read_text", lambda *_, **__: text)
    monkeypatch.setattr(_linears.Path, "exists", lambda _: True)
    assert _linears.amd_family.__wrapped__() == family


def test_weights_are_transposed_where_that_repays(leading, request, monkeypatch):
    calls, product = [], _linears.product
    monkeypatch.setattr(_linears, "product", lambda *given: calls.append(1) or product(*given))
    x, weight, _ = given()
    linear(x, weight).sum().backward()
    assert len(calls) == (2 if "Zen 5" in request.node.name else 1)


# --- Several as one -------------------------------------------------------------------------------


def gradients(y, *given):
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.autograd.grad(y, given, dy.to(y.dtype))


def assert_as_exact(ours, plain, exact):
    """Twice the error of plain torch, and the rounding of the result."""
    for got, ref, want in zip(ours, plain, exact, strict=True):
        rounding = torch.finfo(torch.float32).eps / 2 * want.norm()
        assert (got - want).norm() <= 2 * (ref - want).norm() + rounding


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 17, 80])
@pytest.mark.parametrize("widths", [[512] * 8 + [1792] * 8, [300] * 61], ids=["even", "odd"])
def test_packed_layers_of_many_outputs(rows, widths):
    """18,000 products in each element of the gradient of x: one chain of them is four times off."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(64, width) for width in widths)
    x, exact = torch.randn(rows, 64, requires_grad=True), copy.deepcopy(layers).double()
    wide = x.detach().double().requires_grad_()
    want = gradients(torch.cat([f(wide) for f in exact], -1), wide, *exact.parameters())
    plain = gradients(torch.cat([f(x) for f in layers], -1), x, *layers.parameters())
    pack(*layers)
    assert packed(*layers) is not None
    ours = gradients(torch.cat(linears(x, *layers), -1), x, *layers.parameters())
    assert_as_exact(ours, plain, want)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 80])
def test_stacked_layers(rows, compiled):
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 200 * 96), torch.randn(rows, 96, requires_grad=True)
    exact, wide = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    split = layer.weight.split(96), layer.bias.split(96)
    plain = torch.stack([F.linear(x, w, b) for w, b in zip(*split, strict=True)])
    values = exact(wide).unflatten(-1, (200, 96)).transpose(0, 1)
    run = torch.compile(stacked, fullgraph=True, backend="aot_eager") if compiled else stacked
    got = run(layer, x, 200)
    assert_as_exact([got], [plain], [values])
    want = gradients(values, wide, *exact.parameters())
    plain = gradients(plain, x, *layer.parameters())
    assert_as_exact(gradients(got, x, *layer.parameters()), plain, want)
    with torch.no_grad():
        assert torch.equal(run(layer, x, 200), got)
    if compiled:
        return
    for i, given in enumerate((x, *layer.parameters())):
        for v in (x, *layer.parameters()):
            v.requires_grad_(v is given)
        (alone,) = gradients(stacked(layer, x, 200), given)
        assert_as_exact([alone], [plain[i]], [want[i]])


def test_stacked_layers_of_other_kinds():
    """What is no plain layer in float32 on a CPU is called as it is."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 48), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert stacked(layer, x, 6).dtype == torch.bfloat16
    half = copy.deepcopy(layer).bfloat16()
    narrow = half(x.bfloat16()).view(3, 6, 8).transpose(0, 1)
    assert torch.equal(stacked(half, x.bfloat16(), 6), narrow)
    without = nn.Linear(8, 48, bias=False)
    assert torch.equal(stacked(without, x, 6), without(x).view(3, 6, 8).transpose(0, 1))
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    hooked = stacked(layer, x, 6)
    assert calls == [1]
    torch.testing.assert_close(hooked, layer(x).view(3, 6, 8).transpose(0, 1))
    more = nn.Sequential(layer, nn.Tanh())
    assert torch.equal(stacked(more, x, 6), more(x).view(3, 6, 8).transpose(0, 1))
