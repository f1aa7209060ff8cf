"""SnapGen's UNet: against itself written out, against DreamLite's, and what it promises."""

import copy
import math
from functools import partial

import pytest
import torch
from helpers import DEVICES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dfm_fast.models import SnapGenUNet, snapgen_from_dreamlite, snapgen_imagenet, snapgen_t2i
from dfm_fast.models import snapgen_blocks as blocks
from dfm_fast.models.snapgen_plain import plain_forward
from dfm_fast.nn._packs import packed

SMALL = {
    "in_channels": 4,
    "channels": (32, 64, 96),
    "depths": (1, 1, 2),
    "heads": (1, 2, 3),
    "cross_dim": 40,
    "time_channels": 48,
}


def randomise(module, seed=0):
    """Random where a new model is zero; magnitudes are kept, and every weight shows."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        value = torch.randn(p.shape, generator=generator)
        value = 1 + 0.1 * value if p.ndim == 1 else value / math.sqrt(p[0].numel())
        p.data.copy_(value.to(p.dtype))
    return module


def small(seed=0, **options):
    return randomise(SnapGenUNet(**{**SMALL, **options}), seed).eval()


def inputs(model, n=2, size=(16, 24), tokens=7, device="cpu"):
    """x, t, text, {mask, ids}"""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device)

    width = model.config["text_dim"] or model.config["cross_dim"]
    mask = torch.ones(n, tokens, dtype=torch.bool, device=device)
    mask[0, 4:] = False
    ids = 100 * randn(n, model.num_ids) if model.num_ids else None
    given = randn(n, model.in_channels, *size), randn(n).sigmoid(), randn(n, tokens, width)
    return *given, {"mask": mask, "ids": ids}


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


# --- Sizes ----------------------------------------------------------------------------------------

SDXL = {"depths": (0, 2, 4), "ff_mult": 4, "kv_heads": None, "qk_norm": False}
THIN = {**SDXL, "convolutions": "dense"}
LADDER = {  # the paper's, in millions of parameters and GMAC at 128² latents and 77 tokens
    "thin SDXL": ({**THIN, "self_attention": (False, True, True)}, 634.1, 1266.8),
    "no self-attention at high resolution": (THIN, 623.6, 1052.8),
    "separable": ({**SDXL, "convolutions": "separable"}, 486.0, 717.0),
    "expanded": (SDXL, 513.7, 759.4),
    "FFN 3": ({**SDXL, "ff_mult": 3}, 448.0, 668.0),
    "MQA": ({"depths": (0, 2, 4), "qk_norm": False}, 374.7, 628.4),
    "cross-attention from stage 1": ({"qk_norm": False}, 376.6, 657.7),
    "QK norm and RoPE": ({"rope": True}, 376.6, 657.7),
}


@pytest.mark.parametrize("row", LADDER)
def test_rows_of_the_papers_ladder(row):
    options, parameters, gmac = LADDER[row]
    with torch.device("meta"):
        model = snapgen_imagenet(**{"rope": False, **options})
        given = torch.empty(1, 16, 128, 128), torch.empty(1), torch.empty(1, 77, 768)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            plain_forward(model, *given)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.1)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=2e-3)


@pytest.mark.parametrize(
    ("make", "parameters", "paper"),
    # 1.3 % more than the paper prints, whose 7.08 M between the two is what the text's width makes.
    [(snapgen_imagenet, 376_647_696, 372e6), (snapgen_t2i, 383_725_584, 379e6)],
)
def test_parameter_counts(make, parameters, paper):
    with torch.device("meta"):
        count = sum(p.numel() for p in make().parameters())
    assert count == parameters == pytest.approx(paper, rel=0.013)


# --- Values ---------------------------------------------------------------------------------------

VARIANTS = {
    "default": {},
    "rope": {"rope": True, "self_attention": (True, True, True), "mid_depth": 1},
    "heads": {"kv_heads": None, "qk_norm": False, "rope": True},
    "dense": {"convolutions": "dense", "norm_replaces_self_attention": False},
    "separable": {"convolutions": "separable", "samplers": "separable", "layers": 1},
    "last-transformer": {"last_transformer": True, "depths": (1, 0, 1)},
    "ids-and-projected-text": {"num_ids": 3, "text_dim": 24},
    "two-stages": {
        "channels": (32, 64),
        "depths": (0, 1),
        "heads": (1, 2),
        "self_attention": (False, True),
    },
}


def results(module, forward, dtype, x, t, text, options):
    """Velocity and all gradients."""
    x, text = (a.detach().to(dtype).requires_grad_() for a in (x, text))
    ids = None if options["ids"] is None else options["ids"].to(dtype)
    y = forward(x, t.to(dtype), text, mask=options["mask"], ids=ids)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    module.zero_grad()
    (y * weights).sum().backward()
    return {"y": y, "dx": x.grad, "dtext": text.grad} | {
        n: p.grad for n, p in module.named_parameters()
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_itself_written_out(name, device):
    """Errors against float64 are at most twice those of the written-out form: over three draws of
    weights, as one gradient alone may be more exact there by chance."""
    errors = {}
    for seed in range(3):
        model = small(seed, **VARIANTS[name]).to(device)
        given, wide = inputs(model, device=device), copy.deepcopy(model).double()
        ours = results(model, model, torch.float32, *given)
        plain = results(model, partial(plain_forward, model), torch.float32, *given)
        exact = results(wide, partial(plain_forward, wide), torch.float64, *given)
        for key, want in exact.items():
            assert ours[key] is not None, key
            assert want.norm() > 0, key
            found = relative(ours[key], want), relative(plain[key], want)
            errors.setdefault(key, []).append(found)
    for key, found in errors.items():
        of_ours, of_plain = (math.hypot(*e) / 3**0.5 for e in zip(*found, strict=True))
        assert of_ours <= 2 * of_plain + 2e-6, key


def dreamlite(**options):
    unets = pytest.importorskip("diffusers.models.unets.unet_dreamlite")
    torch.manual_seed(0)
    return unets.DreamLiteUNetModel(in_channels=16, out_channels=16, ff_mult=3, **options).eval()


THIN_DREAMLITE = {
    "block_out_channels": (32, 64, 96),
    "attention_head_dim": (1, 2, 3),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 40,
    "time_embedding_dim": 48,
}
DREAMLITE = {
    "convolutions in transformers": THIN_DREAMLITE,
    "ids and projected text": {
        **THIN_DREAMLITE,
        "use_linear_projection": True,
        "encoder_hid_dim": 24,
        "encoder_hid_dim_type": "text_proj_rms",
        "addition_embed_type": "time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256,
    },
    "dense, many heads": {**THIN_DREAMLITE, "use_sep_conv": False, "num_kv_heads": None},
    "384 M": {
        "block_out_channels": (256, 512, 896),
        "attention_head_dim": (4, 8, 14),
        "transformer_layers_per_block": (1, 2, 4),
        "cross_attention_dim": 2304,
        "time_embedding_dim": 1024,
        "use_linear_projection": True,
    },
}


@pytest.mark.parametrize("name", DREAMLITE)
def test_equal_to_dreamlite(name):
    theirs = dreamlite(**DREAMLITE[name])
    ours = snapgen_from_dreamlite(theirs)
    x, _, text, options = inputs(ours, 2 if "M" not in name else 1, (32, 32), 77)
    ids = torch.arange(6.0).expand(len(x), 6) * 100
    for step in (999, 501) if "M" not in name else (501,):
        with torch.no_grad():
            given = {"encoder_attention_mask": options["mask"]}
            want = theirs(x, step, text, added_cond_kwargs={"time_ids": ids}, **given).sample
            t = torch.full((len(x),), step / 1000)
            mask = options["mask"]
            got = ours(x, t, text, mask=mask, ids=ids if ours.num_ids else None)
        assert relative(got, want) <= 5e-6  # the goal is 1e-4


def test_a_configuration_without_a_form_is_an_error():
    theirs = dreamlite(**THIN_DREAMLITE, norm_eps=1e-4)
    with pytest.raises(ValueError, match=r"unet\.config\.norm_eps: expected 1e-05, got 0\.0001"):
        snapgen_from_dreamlite(theirs)


# --- Once for all steps ---------------------------------------------------------------------------


def test_cached_text_and_shifts_change_nothing():
    model = small(num_ids=2)
    x, t, text, options = inputs(model)
    with torch.no_grad():
        want = model(x, t, text, **options)
        texts = model.key_values(text, options["mask"])
        table = model.time_shifts(torch.stack((t.flip(0), t)), options["ids"].expand(2, 2, 2))
        assert relative(model(x, text=texts, shifts=table[1]), want) <= 1e-6
        assert relative(model(x, t, texts, ids=options["ids"]), want) <= 1e-6
        # A cache of one sample serves the whole batch.
        one = model.key_values(text[:1])
        both = model(x, t, text[:1].expand_as(text), ids=options["ids"])
        assert relative(model(x, t, one, ids=options["ids"]), both) <= 1e-6


def test_texts_and_noise_levels_are_one_product_each():
    model = small()
    kept = model.state_dict()
    for module in (model, copy.deepcopy(model), small().to(torch.float64).float()):
        text, time = packed(*module._text_layers()), packed(*module._time_layers())
        assert text.shape == (2 * 64 * len(module._cross_attentions()) // 2, 40)
        assert time.shape == (sum(m.out_features for m in module._time_layers()), 48)
        for layer in module._cross_attentions():  # beside each other as to_k and to_v, too
            assert packed(layer.to_k, layer.to_v) is not None
        for name, v in module.state_dict().items():
            assert torch.equal(v, kept[name]), name
    x, t, text, _ = inputs(model)
    with torch.no_grad():
        before = model(x, t, text)
        model._time_layers()[3].weight.data.mul_(1.5)
        model._cross_attentions()[2].to_v.weight.data.mul_(1.5)
        after = model(x, t, text)
        assert relative(after, plain_forward(model, x, t, text)) <= 2e-6
    assert relative(after, before) > 1e-3


def test_statistics_are_read_once_for_each_map(monkeypatch):
    """Residual blocks hand on their output's; others are asked for once, also where the way up
    reads the map again, and what is upsampled not at all."""
    model, seen = small(), []

    def counted(x):
        seen.append(x.shape)
        return original(x)

    original = blocks.channel_statistics
    monkeypatch.setattr(blocks, "channel_statistics", counted)
    x, t, text, _ = inputs(model)
    with torch.no_grad():
        model(x, t, text)
    transformers = sum(isinstance(m, blocks.Transformer) for m in model.modules())
    assert len(seen) == 1 + transformers + len(model.down_blocks) - 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_and_norms_are_one_pass_in_inference(device, dtype, monkeypatch):
    """As near to float64 as one by one, which is how they are with gradients and hooks."""
    passes = []
    fused = blocks.gated_residual_ada_layer_norm
    count = lambda *args, **options: passes.append(1) or fused(*args, **options)  # noqa: E731
    monkeypatch.setattr(blocks, "gated_residual_ada_layer_norm", count)
    model = small(rope=True).to(device, dtype)
    x, t, text, _ = (a.to(dtype) if torch.is_tensor(a) else a for a in inputs(model, device=device))
    exact = copy.deepcopy(model).double()(x.double(), t.double(), text.double())
    with torch.no_grad():
        got = model(x, t, text)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    transformers = [m for m in model.modules() if isinstance(m, blocks.Transformer)]
    assert len(passes) == len(norms) - sum(  # each but a stream's first, and those after a stream
        1 + sum(b.attn1 is None for b in t.transformer_blocks) for t in transformers
    )
    passes.clear()
    one_by_one = model(x, t, text)
    assert not passes
    assert one_by_one.requires_grad
    assert relative(got, exact) <= 1.1 * relative(one_by_one, exact)
    calls, block = [], transformers[0].transformer_blocks[0]
    for module in (block, block.norm3):
        hook = module.register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            model(x, t, text)
        hook.remove()
    assert len(calls) == 2
    assert not passes


# --- Training -------------------------------------------------------------------------------------


def test_a_new_network_gives_zero_and_learns():
    torch.manual_seed(0)
    model = SnapGenUNet(**SMALL)
    x, t, text, _ = inputs(model)
    assert (model(x, t, text) == 0).all()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    target = x.roll(1, -1)
    losses = []
    for _ in range(12):
        loss = (model(x, t, text) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


def test_checkpointing_changes_nothing():
    model = small()
    x, t, text, options = inputs(model)
    grads = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model(x, t, text, **options).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_compiles_whole():
    torch._dynamo.reset()
    model = small(channels=(32, 64), depths=(0, 1), heads=(1, 2), self_attention=(False, True))
    x, t, text, options = inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want, got = (f(x, t, text, **options) for f in (model, compiled))
    assert relative(got, want) <= 1e-6


# --- Folders, devices, bad input ------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    model = small(rope=True, num_ids=1)
    model.save_pretrained(tmp_path)
    loaded = SnapGenUNet.from_pretrained(tmp_path)
    assert not loaded.training
    assert packed(*loaded._text_layers()) is not None
    x, t, text, options = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(x, t, text, **options), loaded(x, t, text, **options))


def test_hooks_and_replaced_layers_count():
    model = small()
    x, t, text, _ = inputs(model)
    calls = []
    layers = [model.mid_block.resnets[0].time_emb_proj, model._cross_attentions()[0].to_k]
    layers += [model.mid_block.attentions[0].proj_in]
    hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in layers]
    with torch.no_grad():
        hooked = model(x, t, text)
        for hook in hooks:
            hook.remove()
        assert len(calls) == 3
        assert relative(hooked, model(x, t, text)) <= 1e-6
        old = model.mid_block.attentions[0].proj_in
        model.mid_block.attentions[0].proj_in = nn.Sequential(old, nn.Tanh())
        assert relative(model(x, t, text), plain_forward(model, x, t, text)) <= 2e-6


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"depths": (1, 2)}, r"SnapGenUNet: depths: expected 3 values, one per stage"),
        ({"channels": (32, 64, 100)}, "channels: expected multiples of 32 groups and of the heads"),
        ({"convolutions": "grouped"}, "convolutions: expected"),
        ({"samplers": "bilinear"}, "samplers: expected"),
        ({"layers": 0}, "layers: expected"),
    ],
)
def test_bad_arguments(change, error):
    with pytest.raises(ValueError, match=error):
        SnapGenUNet(**{**SMALL, **change})


def test_bad_inputs():
    model = small(num_ids=2)
    x, t, text, options = inputs(model)
    wrong = [
        ((x[:, :3], t, text), options, r"x: expected \[N, 4, H, W\] with sides that 4 divides"),
        ((x[..., :22], t, text), options, "sides that 4 divides"),
        ((x, t[:1], text), options, r"t: expected shape \[2\], got \[1\]"),
        ((x, None, text), options, "t: expected noise levels"),
        ((x, t, text[..., :9]), options, r"text: expected \[B, S, 40\]"),
        ((x, t), {"ids": options["ids"]}, "text: expected key_values of a text"),
        ((x, t, model.key_values(text)), options, "mask: expected None beside key_values"),
        (
            (x, t, model.key_values(text)[1:]),
            {"ids": options["ids"]},
            "expected 19 key_values",
        ),
        ((x, t, text), {"ids": None}, r"ids: expected \[\.\.\., 2\], got None"),
    ]
    for given, keywords, error in wrong:
        with pytest.raises(ValueError, match=error):
            model(*given, **keywords)
