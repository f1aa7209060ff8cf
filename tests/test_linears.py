"""Linear layers by oneDNN: those of torch, up to rounding, where they serve and where not."""

import pytest
import torch
import torch.nn.functional as F

from dfm_fast.nn import _linears
from dfm_fast.nn._linears import linear, serves


@pytest.fixture(params=[25, 26], ids=["Zen 4", "Zen 5"])
def leading(monkeypatch, request):
    """As on a processor where oneDNN is faster."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(_linears, "amd_family", lambda: request.param)


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
    assert not serves(x[:, :10], weight)  # few rows
    assert not serves(x.to("meta"), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    torch.testing.assert_close(linear(x[:, :10], weight), F.linear(x[:, :10], weight))
    compiled = torch.compile(lambda *v: linear(*v), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, weight), F.linear(x, weight))


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
