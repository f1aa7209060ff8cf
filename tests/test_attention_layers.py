"""MultiQueryAttention, CrossAttention and SeparableConvAttention."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES, INTERPRET
from torch.utils._python_dispatch import TorchDispatchMode

import dfm_fast
from dfm_fast import nn
from dfm_fast.nn import attentions
from dfm_fast.ops.attentions import multi_query_attention_ref
from dfm_fast.ops.rotaries import qk_norm_rope_ref

LOW = torch.float16 if INTERPRET else torch.bfloat16


def randn(*shape, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def fill(module, seed=0):
    """Weights that show in every product; of norms about 1."""
    for i, (name, p) in enumerate(module.named_parameters()):
        value = randn(*p.shape, seed=seed + i) * (0.2 if p.ndim == 1 else p[0].numel() ** -0.5)
        p.data.copy_(1 + value if "norm" in name else value)
    return module


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


# --- diffusers' DreamLite -------------------------------------------------------------------------


def dreamlite(dim, heads, kv_heads, cross_dim=None):
    """An attention layer of its transformer blocks, as the UNet sets it up."""
    pytest.importorskip("diffusers.models.unets.unet_dreamlite")
    from diffusers.models.transformers.transformer_2d_dreamlite import (
        BasicTransformerBlockDreamLite,
    )
    from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0

    block = BasicTransformerBlockDreamLite(
        dim,
        heads,
        dim // heads,
        cross_attention_dim=cross_dim or dim,
        use_self_attention=True,
        qk_norm="rms_norm",
        num_kv_heads=kv_heads,
        ff_mult=3,
    )
    attention = block.attn2 if cross_dim else block.attn1
    attention.set_processor(DreamLiteAttnProcessor2_0())
    return fill(attention)


DREAMLITE = [(896, 14, 1, 48), (512, 8, 1, 33), (48, 6, 2, 20)]


def both(dim, heads, kv_heads, cross_dim, device, dtype):
    """(theirs, ours), with the same weights, loaded as they are."""
    theirs = dreamlite(dim, heads, kv_heads, cross_dim)
    layer = nn.CrossAttention if cross_dim else nn.MultiQueryAttention
    sizes = (dim, cross_dim) if cross_dim else (dim,)
    ours = layer(*sizes, heads, kv_heads)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(device, dtype), ours.to(device, dtype)


def run(layer, x, text, dtype=None):
    """Output and all gradients."""
    given = [v.to(dtype).requires_grad_() for v in (x, text) if v is not None]
    y = layer(*given)
    parameters = dict(sorted(layer.named_parameters()))
    dy = randn(*y.shape, seed=9).to(y)
    return [y, *torch.autograd.grad(y, [*given, *parameters.values()], dy)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cross_dim", [None, 96])
@pytest.mark.parametrize(("dim", "heads", "kv_heads", "T"), DREAMLITE)
def test_equal_to_dreamlite(dim, heads, kv_heads, T, cross_dim, device):
    theirs, ours = both(dim, heads, kv_heads, cross_dim, device, torch.float32)
    x = randn(2, T, dim, device=device, seed=7)
    text = randn(2, 21, cross_dim, device=device, seed=8) if cross_dim else None
    want = run(theirs, x, text, torch.float32)
    for got, w in zip(run(ours, x, text, torch.float32), want, strict=True):
        assert relative(got, w) <= 1e-5
    with torch.no_grad():
        assert relative(ours(x, *([] if text is None else [text])), want[0]) <= 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cross_dim", [None, 96])
@pytest.mark.parametrize(("dim", "heads", "kv_heads", "T"), DREAMLITE)
def test_as_exact_as_dreamlite_in_low_precision(dim, heads, kv_heads, T, cross_dim, device):
    """Of the same rounded weights and inputs, against float64: at most twice their error."""
    theirs, ours = both(dim, heads, kv_heads, cross_dim, device, LOW)
    x = randn(2, T, dim, device=device, seed=7, dtype=LOW)
    text = randn(2, 21, cross_dim, device=device, seed=8, dtype=LOW) if cross_dim else None
    got, low = (run(layer, x, text, LOW) for layer in (ours, theirs))
    exact = run(copy.deepcopy(ours).double(), x, text, torch.float64)
    for g, lo, ex in zip(got, low, exact, strict=True):
        assert relative(g, ex) <= 2 * relative(lo, ex) + torch.finfo(LOW).eps / 2


# --- Rotary embedding, masks, caches --------------------------------------------------------------


def written_out(layer, x, tables=(None, None), mask=None, text=None):
    """The layer by its references and plain products."""
    text = x if text is None else text
    d = layer.head_dim
    q, k, v = (
        F.linear(t, m.weight).unflatten(-1, (-1, d))
        for t, m in ((x, layer.to_q), (text, layer.to_k), (text, layer.to_v))
    )
    weights = layer.norm_q.weight, layer.norm_k.weight
    q, k = qk_norm_rope_ref(q, k, *weights, *tables, eps=layer.eps)
    y = multi_query_attention_ref(q, k, v, mask).flatten(2)
    return F.linear(y, layer.to_out[0].weight, layer.to_out[0].bias)


@pytest.mark.parametrize("device", DEVICES)
def test_rotary_embedding_and_mask(device):
    layer = fill(nn.MultiQueryAttention(32, 4, 2)).to(device)
    x = randn(2, 6, 32, device=device)
    mask = randn(2, 6, device=device, seed=1) < 0.5
    tables = [t.to(device) for t in dfm_fast.rope_2d(2, 3, 8)]
    torch.testing.assert_close(layer(x, *tables, mask=mask), written_out(layer, x, tables, mask))


@pytest.mark.parametrize("device", DEVICES)
def test_without_norm(device):
    layer = fill(nn.MultiQueryAttention(32, 4, qk_norm=False, head_dim=12)).to(device)
    assert sorted(layer.state_dict()) == [
        "to_k.weight", "to_out.0.bias", "to_out.0.weight", "to_q.weight", "to_v.weight",
    ]  # fmt: skip
    x = randn(2, 6, 32, device=device)
    q, k, v = (m(x).unflatten(-1, (-1, 12)) for m in (layer.to_q, layer.to_k, layer.to_v))
    want = layer.to_out[0](multi_query_attention_ref(q, k, v).flatten(2))
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("device", DEVICES)
def test_a_texts_keys_are_computed_once(device):
    layer = fill(nn.CrossAttention(32, 20, 4)).to(device)
    x, text = randn(2, 6, 32, device=device), randn(2, 5, 20, device=device, seed=1)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2], device=device)
    cache = layer.key_values(text, mask)
    assert cache.k.shape == cache.v.shape == (2, 5, 1, 8)
    seen = []
    for m in (layer.to_k, layer.to_v):
        m.register_forward_pre_hook(lambda *_: seen.append(1))
    got = layer(x, cache)
    assert not seen
    want = written_out(layer, x, mask=mask, text=text)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(layer(x, text, mask), want)
    one = layer.key_values(text[1:], mask[1:])  # of one sample, for all
    got = layer(x, one)
    torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close(got[0], written_out(layer, x[:1], mask=mask[1:], text=text[1:])[0])


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_passes_gradients_on(device):
    layer = fill(nn.CrossAttention(32, 20, 4)).to(device)
    x, text = randn(2, 6, 32, device=device), randn(2, 5, 20, device=device, seed=1)
    cache = layer.key_values(text)
    (layer(x, cache) + layer(2 * x, cache)).sum().backward()  # two steps, one cache
    got = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    (layer(x, text) + layer(2 * x, text)).sum().backward()
    for g, p in zip(got, layer.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad)


# --- Three products as one ------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """How many matrix products run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear")
        return func(*args, **(kwargs or {}))


def products(layer, x):
    with Products() as mode:
        layer(x)
    return mode.count


def ema(layer):
    for p in layer.parameters():
        p.data.mul_(0.9)  # which no version counter sees


def step(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
    layer(randn(2, 3, 32)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def load(layer):
    layer.load_state_dict(fill(nn.MultiQueryAttention(32, 4), seed=5).state_dict())


def assign(layer):
    layer.load_state_dict(fill(nn.MultiQueryAttention(32, 4), seed=5).state_dict(), assign=True)


def replace_weight(layer):
    layer.to_k.weight = torch.nn.Parameter(randn(*layer.to_k.weight.shape, seed=5))


def replace_data(layer):
    layer.to_v.weight.data = randn(*layer.to_v.weight.shape, seed=5)


def hook(layer):
    layer.to_v.register_forward_hook(lambda module, args, y: y / 2)


def replace_layer(layer):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.to_v = fill(Doubled(32, 8, bias=False))


# change: products of a forward pass after it (with to_out)
CHANGES = {ema: 2, step: 2, load: 2, assign: 2, replace_weight: 4, replace_data: 4}
CHANGES |= {hook: 4, replace_layer: 4}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_weights_may_change(change, grad):
    """What the layer computes is always what its three projections say."""
    layer, x = fill(nn.MultiQueryAttention(32, 4)), randn(2, 3, 32)
    assert products(layer, x) == 2
    before = layer(x)
    change(layer)
    with torch.set_grad_enabled(grad):
        got = layer(x)
        assert products(layer, x) == CHANGES[change]
    assert relative(got, before) > 1e-3
    q, k, v = (m(x).unflatten(-1, (-1, 8)) for m in (layer.to_q, layer.to_k, layer.to_v))
    q, k = qk_norm_rope_ref(q, k, layer.norm_q.weight, layer.norm_k.weight, eps=layer.eps)
    want = layer.to_out[0](multi_query_attention_ref(q, k, v).flatten(2))
    torch.testing.assert_close(got, want)


def test_packing_survives_what_moves_weights():
    layer = nn.MultiQueryAttention(32, 4)
    x = randn(2, 3, 32)
    moved = {
        "double": (copy.deepcopy(layer).double(), x.double()),
        "copy": (copy.deepcopy(layer), x),
        "sequential": (
            torch.nn.Sequential(copy.deepcopy(layer)).to(torch.bfloat16)[0],
            x.bfloat16(),
        ),
        "meta": (nn.MultiQueryAttention(32, 4, device="meta").to_empty(device="cpu"), x),
    }
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    moved["pickle"] = torch.load(file, weights_only=False), x
    for name, (other, given) in moved.items():
        assert products(other, given) == 2, name
    copied = moved["copy"][0]
    copied.to_q.weight.data.zero_()
    assert layer.to_q.weight.any()


def test_weights_are_saved_one_by_one(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = fill(nn.MultiQueryAttention(32, 4))
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    loaded = safetensors.load_file(tmp_path / "layer.safetensors")
    assert all(torch.equal(loaded[name], v) for name, v in layer.state_dict().items())
    file = io.BytesIO()
    torch.save({"to_k.weight": layer.to_k.weight.detach().clone()}, file)
    assert file.tell() < 4 * layer.to_q.weight.numel()


def test_frozen_projections_and_a_changed_weight_between():
    layer, x = fill(nn.MultiQueryAttention(32, 4)), randn(2, 3, 32)
    layer.to_q.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.to_q.weight.grad is None
    assert layer.to_k.weight.grad.any()
    y = layer(x.requires_grad_())
    with torch.no_grad():
        layer.to_k.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast():
    layer, x = fill(nn.MultiQueryAttention(64, 4)), randn(2, 5, 64)
    want = run(layer, x, None, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        got = run(layer, x, None, torch.float32)
    for g, w in zip(got, want, strict=True):
        assert relative(g, w) < 3e-2


# --- The separable form ---------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_separable_conv_attention(kernel_size, layout, device):
    layer = fill(nn.SeparableConvAttention(32, 4, 2, kernel_size)).to(device)
    x = randn(2, 32, 3, 5, device=device).contiguous(memory_format=layout).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=layout)
    h = x
    if kernel_size > 1:
        h = F.conv2d(x, layer.depthwise.weight, padding=kernel_size // 2, groups=32)
    tables = [t.to(device) for t in dfm_fast.rope_2d(3, 5, 8)]
    tokens = h.permute(0, 2, 3, 1).flatten(1, 2)
    want = written_out(layer, tokens, tables).unflatten(1, (3, 5)).permute(0, 3, 1, 2)
    torch.testing.assert_close(y, want)
    given = [x, *layer.parameters()]
    grads = [torch.autograd.grad(v, given, randn(*y.shape, seed=3).to(y)) for v in (y, want)]
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(g, w, atol=2e-5, rtol=2e-5)


def test_kernel_size_1_is_multi_query_attention():
    plain = fill(nn.MultiQueryAttention(32, 4))
    layer = nn.SeparableConvAttention(32, 4, kernel_size=1)
    layer.load_state_dict(plain.state_dict())
    x = randn(2, 32, 3, 5).contiguous(memory_format=torch.channels_last)
    want = plain(x.flatten(2).transpose(1, 2), *dfm_fast.rope_2d(3, 5, 8))
    assert torch.equal(layer(x).flatten(2).transpose(1, 2), want)


def test_tables_of_inference_mode_serve_training():
    attentions._kept_tables.cache_clear()
    layer, x = nn.SeparableConvAttention(32, 4), randn(1, 32, 2, 2)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert attentions._kept_tables.cache_info().misses == 1


@pytest.mark.skipif(INTERPRET, reason="compiled code calls the same opaque operators either way")
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_layers_compile(backend):
    torch._dynamo.reset()
    layers = nn.MultiQueryAttention(32, 4), nn.SeparableConvAttention(32, 4)
    text, cross = randn(2, 5, 20, seed=1), nn.CrossAttention(32, 20, 4)
    for layer, x in zip(layers, (randn(2, 6, 32), randn(2, 32, 2, 3)), strict=True):
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), layer(x))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))
    x, cache = randn(2, 6, 32), cross.key_values(text)
    compiled = torch.compile(cross, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, cache), cross(x, cache))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: nn.MultiQueryAttention(32, 3), "heads"),
        (lambda: nn.MultiQueryAttention(32, 4, 3), "kv_heads"),
        (lambda: nn.CrossAttention(32, 20, 0), "heads"),
        (lambda: nn.CrossAttention(32, 20, 4)(randn(1, 2, 32), 3), "text"),
        (
            lambda: nn.CrossAttention(32, 20, 4)(
                randn(1, 2, 32),
                nn.KeyValues(randn(1, 2, 1, 8), randn(1, 2, 1, 8)),
                torch.ones(1, 2, dtype=torch.bool),
            ),
            "mask",
        ),
        (lambda: nn.SeparableConvAttention(32, 4, kernel_size=2), "kernel_size"),
        (lambda: nn.SeparableConvAttention(24, 4), "rope"),
        (lambda: nn.SeparableConvAttention(32, 3), "num_heads"),
        (lambda: nn.SeparableConvAttention(32, 4, 3), "num_kv_heads"),
        (lambda: nn.SeparableConvAttention(32, 4)(randn(1, 16, 2, 2)), "x"),
        (lambda: nn.SeparableConvAttention(32, 4)(randn(1, 32, 2)), "x"),
    ],
)
def test_bad_calls_are_clear_errors(call, argument):
    with pytest.raises((TypeError, ValueError), match=f": {argument}: expected .*, got "):
        call()
