"""SnapGen's pipeline: against a loop in plain torch, and what it promises of seeds, batches and
texts. Models are tiny and random; text encoders are those of their own test."""

import copy

import numpy as np
import pytest
import torch
from helpers import recorded
from test_snapgen import SMALL, randomise

from dfm_fast import philox_normal
from dfm_fast._library import INTERPRET
from dfm_fast.flow import DecomposableFlow, Laplacian, sampler
from dfm_fast.models import (
    ClassTokens,
    SnapGenDecoder,
    SnapGenPipeline,
    SnapGenUNet,
    TextEncoders,
    UNetVelocity,
    snapgen_decoder_plain,
    snapgen_plain,
)

pytest.importorskip("safetensors")
pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.skipif(INTERPRET, reason="no kernels in it")

SHIFT = 3.0
DECODER = {"latent_channels": 4, "block_out_channels": (8, 8), "layers_per_block": (1, 1)}
PROMPTS = ["a fox", "the red snow"]  # of other lengths


def unet(cross_dim):
    return randomise(SnapGenUNet(**{**SMALL, "cross_dim": cross_dim, "rope": True}), 1)


def decoder(**options):
    model = randomise(SnapGenDecoder(**{**DECODER, **options}), 2)
    model.conv_out.pointwise.weight.data *= 0.2  # not all black and white
    return model


def class_pipeline():
    """Of five classes, and 16 x 16 pixels."""
    torch.manual_seed(0)
    return SnapGenPipeline(unet(40), decoder(), ClassTokens(5, 3, 40), sample_size=8)


def text_pipeline(folder):
    """Of three text encoders, which are written to a folder."""
    from test_text_encoders import LAYOUT, write_encoders

    encoders = TextEncoders.from_pretrained(LAYOUT, **write_encoders(folder))
    return SnapGenPipeline(unet(LAYOUT.dim), decoder(), encoders, sample_size=8)


@pytest.fixture
def classes():
    return class_pipeline()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return text_pipeline(tmp_path_factory.mktemp("encoders"))


def noise_of(seeds, size=(8, 8)):
    return torch.cat([philox_normal((1, 4, *size), seed) for seed in seeds])


@torch.no_grad()
def plain_loop(pipeline, noise, conditions, steps, scale, dtype=torch.float64):
    """Euler with guidance, on the models written out in plain torch; conditions: (text, mask) of
    c and, where there is guidance, of u."""
    model, x = copy.deepcopy(pipeline.unet).to(dtype), noise.to(dtype)
    t = [SHIFT * a / (1 + (SHIFT - 1) * a) for a in (1 - k / steps for k in range(steps + 1))]
    for k in range(steps):
        at = torch.full((len(x),), t[k], dtype=dtype)
        v = [snapgen_plain.plain_forward(model, x, at, c.to(dtype), mask=m) for c, m in conditions]
        guided = v[0] if len(v) == 1 else v[1] + scale * (v[0] - v[1])
        x = x + (t[k + 1] - t[k]) * guided
    return x


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def check_against_the_loop(pipeline, got, *given):
    """At most twice the error that float32 makes in the plain loop, and one rounding."""
    exact = plain_loop(pipeline, *given)
    plain = plain_loop(pipeline, *given, dtype=torch.float32)
    assert relative(got, exact) <= 2 * relative(plain, exact) + 2**-24
    assert relative(plain, exact) < 1e-4  # or nothing would have been tested


def none_of(found):
    return torch.zeros_like(found[0]), torch.zeros_like(found[1])


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2.5])
@pytest.mark.parametrize("steps", [1, 4])
def test_equals_a_loop_in_plain_torch(classes, steps, scale):
    options = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "latent"}
    got = classes(class_labels=[1, 4], seed=7, height=16, width=32, **options).images
    with torch.no_grad():
        found = classes.conditions(torch.tensor([1, 4]))[:2]
    conditions = [found, none_of(found)][: 1 + (scale != 1)]
    given = noise_of([7, 8], (8, 16)), conditions, steps, scale
    check_against_the_loop(classes, got, *given)


@pytest.mark.parametrize(
    "names",
    [("clip_l",), ("clip_g",), ("gemma",), ("clip_l", "gemma"), ("clip_l", "clip_g", "gemma")],
    ids="-".join,
)
@pytest.mark.parametrize("negative", [None, "snow"])
def test_any_text_encoders(texts, names, negative):
    some = {name: texts.conditions.encoders[name] for name in names}
    encoders = TextEncoders(texts.conditions.layout, some)
    pipeline = SnapGenPipeline(texts.unet, texts.decoder, encoders, sample_size=8)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    got = pipeline(PROMPTS, negative, seed=0, **options).images
    found = texts.conditions.encode(PROMPTS, only=names)[:2]
    other = none_of(found)
    if negative is not None:
        other = texts.conditions.encode([negative] * 2, only=names)[:2]
    check_against_the_loop(pipeline, got, noise_of([0, 1]), [found, other], 2, 3.0)
    if len(names) < 3:
        assert relative(texts(PROMPTS, negative, seed=0, **options).images, got) > 1e-2


def test_pictures_are_those_of_the_decoder(classes):
    options = {"class_labels": [0, 2], "num_inference_steps": 2, "seed": 3}
    x = classes(**options, output_type="latent").images
    assert x.dtype == torch.float32
    z = x / 1.5305 + 0.0609
    with torch.no_grad():
        plain = snapgen_decoder_plain.plain_forward(classes.decoder, z)
    want = ((plain + 1) / 2).clamp(0, 1)
    assert ((want > 0) & (want < 1)).float().mean() > 0.3
    pictures = classes(**options, output_type="pt").images
    torch.testing.assert_close(pictures, want, atol=1e-5, rtol=0)
    array = classes(**options, output_type="np").images
    assert array.dtype == np.float32
    assert (array == pictures.permute(0, 2, 3, 1).numpy()).all()
    shown = classes(**options).images
    assert [picture.size for picture in shown] == [(16, 16)] * 2
    for picture, values in zip(shown, array, strict=True):
        assert (np.asarray(picture) == np.rint(255 * values)).all()


def test_grey_pictures_and_other_latent_scales(classes):
    """Saved with the pipeline, whatever the decoder's config says."""
    grey = decoder(out_channels=1)
    factors = {"scaling_factor": 0.5, "shift_factor": -1.0}
    pipeline = SnapGenPipeline(classes.unet, grey, classes.conditions, sample_size=8, **factors)
    options = {"class_labels": 0, "num_inference_steps": 1, "seed": 3}
    (picture,) = pipeline(**options).images
    assert (picture.mode, picture.size) == ("L", (16, 16))
    x = pipeline(**options, output_type="latent").images
    with torch.no_grad():
        want = (grey(2 * x - 1) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipeline(**options, output_type="pt").images, want)


def test_a_narrow_network_has_wide_states(classes):
    options = {"num_inference_steps": 4, "seed": 0, "output_type": "latent"}
    want = classes(class_labels=[1, 4], **options).images
    narrow = classes.to(dtype=torch.bfloat16)
    assert narrow is classes
    assert classes.dtype == classes.conditions.weight.dtype == torch.bfloat16
    got = classes(class_labels=[1, 4], **options).images
    assert got.dtype == torch.float32
    assert 1e-4 < relative(got, want) < 0.1
    assert not torch.equal(got, got.bfloat16().float())
    assert len(classes(class_labels=[1], num_inference_steps=1).images) == 1


def test_a_unet_is_trained_by_the_flow(classes):
    """The text itself in place of its keys and values; gradients reach the UNet and the tokens."""
    flow, model = DecomposableFlow(Laplacian(1)), UNetVelocity(classes.unet.requires_grad_(True))
    found = classes.conditions(torch.tensor([1, 4]))
    x = torch.randn(2, 4, 8, 8)
    loss = flow.loss(model, x, seed=0, text=found.text, mask=found.mask)
    same = flow.loss(model, x, seed=0, text=classes.unet.key_values(found.text, found.mask))
    torch.testing.assert_close(loss, same)
    loss.sum().backward()
    assert classes.conditions.weight.grad[[1, 4]].abs().min(1).values.gt(0).all()
    assert classes.unet.conv_in.weight.grad.abs().max() > 0


# --- Seeds and batches ----------------------------------------------------------------------------


def test_pictures_of_a_batch_are_what_each_is_alone(texts):
    options = {"num_inference_steps": 3, "output_type": "latent"}
    whole = texts(PROMPTS, ["snow", "photo of a fox"], seed=5, **options).images
    for i, negative in enumerate(["snow", "photo of a fox"]):
        alone = texts(PROMPTS[i], negative, seed=5 + i, **options).images
        assert relative(whole[i : i + 1], alone) < 1e-5
    each = texts(PROMPTS, num_images_per_prompt=2, seed=[3, 1, 4, 2**64 - 1], **options).images
    assert len(each) == 4
    for i, seed in enumerate([3, 1, 4, 2**64 - 1]):
        alone = texts(PROMPTS[i // 2], seed=seed, **options).images
        assert relative(each[i : i + 1], alone) < 1e-5


def test_seeds(classes):
    options = {"class_labels": [1, 1], "num_inference_steps": 2, "output_type": "latent"}

    def made(**given):
        return classes(**options, **given).images

    first = made(seed=11)
    assert torch.equal(first, made(seed=11))
    assert torch.equal(first, made(seed=[11, 12]))
    assert torch.equal(first, made(latents=noise_of([11, 12])))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, made(seed=12))
    drawn = made(generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn, made(generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(drawn, made(generator=torch.Generator().manual_seed(2)))
    generators = [torch.Generator().manual_seed(i) for i in (1, 2)]
    apart = made(generator=generators)
    assert torch.equal(apart[0], drawn[0])
    assert not torch.equal(apart[1], drawn[1])
    torch.manual_seed(1)
    assert torch.equal(made(), drawn)
    assert not torch.equal(made(), drawn)  # the generator has gone on


# --- What is computed -----------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Batches of the UNet, and how often what is computed ahead is computed."""
    seen = {"forward": [], "key_values": [], "time_shifts": []}

    def watch(name, size):
        own = getattr(SnapGenUNet, name)

        def call(self, x, *args, **options):
            seen[name].append(size(x))
            return own(self, x, *args, **options)

        monkeypatch.setattr(SnapGenUNet, name, call)

    watch("forward", len)
    watch("key_values", len)
    watch("time_shifts", lambda t: t.numel())
    return seen


def test_without_guidance_there_is_no_other_half(texts, calls):
    options = {"num_inference_steps": 3, "seed": 0, "output_type": "latent"}
    texts.conditions.clear()
    got = texts(PROMPTS, "snow", guidance_scale=1, **options).images
    assert calls == {"forward": [2] * 3, "key_values": [2], "time_shifts": [3]}
    kept = texts.conditions._kept["clip_l"]
    assert list(kept) == PROMPTS  # the negative one is not even encoded
    assert torch.equal(got, texts(PROMPTS, guidance_scale=1.0, **options).images)


def test_both_halves_are_one_batch_and_what_is_known_ahead_is_computed_once(texts, calls):
    options = {"num_inference_steps": 3, "seed": 0, "output_type": "latent"}
    texts(PROMPTS, num_images_per_prompt=2, **options)
    assert calls == {"forward": [8] * 3, "key_values": [4], "time_shifts": [3]}


def test_guidance_within_an_interval(classes, calls):
    # t is 1, 0.9, 0.75, 0.5
    options = {"class_labels": 1, "num_inference_steps": 4, "seed": 0, "output_type": "latent"}
    inner = classes(**options, guidance_interval=(0.6, 0.95)).images
    assert calls["forward"] == [1, 2, 2, 1]
    whole = classes(**options, guidance_interval=[0, 1]).images
    assert calls["forward"][4:] == [2] * 4
    assert relative(inner, whole) > 1e-3


def test_replays_of_a_step_are_the_plain_loop(classes, monkeypatch):
    """Capture is replaced by the call: states are written over by each step, as a graph does."""
    monkeypatch.setattr(sampler, "capture", lambda call, state: call)
    run, seen = sampler.Sampler.__call__, []

    def keep(pipeline, step, t, given):
        seen.append(given["latents"])
        return {"latents": given["latents"] / 2} if step == 1 else None

    options = {"class_labels": [1, 2], "num_inference_steps": 3, "seed": 0}
    options |= {"output_type": "latent", "callback_on_step_end": keep}
    plain = classes(**options).images
    monkeypatch.setattr(sampler.Sampler, "__call__", lambda self, *a: run(self, *a[:-1], True))
    replayed = classes(**options).images
    torch.testing.assert_close(replayed, plain)
    assert len(seen) == 6
    for a, b in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["classes", "texts"])
def test_graphs_serve_the_next_picture(name, request, monkeypatch):
    """Recordings of the calls, of other seeds, labels and lengths of texts."""
    pipeline, captures = request.getfixturevalue(name), []
    options = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 2.0}
    given = [{"class_labels": 1}, {"class_labels": 2}]
    if name == "texts":
        given = [{"prompt": "a fox"}, {"prompt": "a fox runs"}]
    plain = [pipeline(**options, **g, seed=i).images for i, g in enumerate(given)]
    count = lambda call, state: captures.append(1) or recorded(call, state)  # noqa: E731
    monkeypatch.setattr(sampler, "capture", count)
    # As on a GPU.
    run = sampler.Sampler.__call__
    monkeypatch.setattr(sampler.Sampler, "__call__", lambda self, *a: run(self, *a[:-1], True))
    monkeypatch.setattr(sampler.Graphs, "__bool__", lambda self: False, raising=False)
    monkeypatch.setattr(SnapGenPipeline, "_check_loop", lambda *_: None)
    options["cuda_graph"] = True
    kept = [pipeline(**options, **g, seed=i).images for i, g in enumerate(given)]
    for got, want in zip(kept, plain, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert len(captures) == 1
    pipeline.graphs.clear()


def test_a_callback_after_each_step(classes):
    options = {"class_labels": [1, 2], "seed": 0, "output_type": "latent"}
    seen = []

    def callback(pipeline, step, t, given):
        seen.append((pipeline, step, t, given["latents"]))
        return {} if step else None

    got = classes(**options, num_inference_steps=4, callback_on_step_end=callback).images
    assert all(pipeline is classes for pipeline, *_ in seen)
    assert [step for _, step, *_ in seen] == [0, 1, 2, 3]
    assert [t for _, _, t, _ in seen] == pytest.approx([1, 0.9, 0.75, 0.5])
    assert torch.equal(seen[-1][-1], got)
    assert not torch.equal(seen[0][-1], seen[1][-1])
    # What it returns goes on.
    last = {3: torch.ones_like(got)}
    changed = classes(
        **options,
        num_inference_steps=4,
        callback_on_step_end=lambda p, k, t, given: {"latents": last.get(k, given["latents"])},
    ).images
    assert (changed == 1).all()
    with pytest.raises(ValueError, match=r"callback_on_step_end: expected latents \[2, 4, 8, 8\]"):
        classes(
            **options,
            num_inference_steps=1,
            callback_on_step_end=lambda *_: {"latents": got[:1]},
        )


# --- Bad input ------------------------------------------------------------------------------------

LABEL = {"class_labels": 1}
BAD_CALLS = [
    ({}, "prompt: expected prompts, or class_labels in their place, got neither"),
    ({**LABEL, "prompt": "a fox"}, "prompt: expected .* in their place, got both"),
    ({"prompt": "a fox"}, "prompt: expected class_labels, as there is no text encoder"),
    ({**LABEL, "negative_prompt": "a fox"}, "negative_prompt: expected None beside class_labels"),
    ({"class_labels": [1, 6]}, "class_labels: expected 0 to 4, or 5 for none, got 6"),
    ({"class_labels": []}, "class_labels: expected at least one label, got none"),
    ({"class_labels": "1"}, "class_labels: expected an int, or a sequence of ints, got '1'"),
    ({"class_labels": [1.0]}, "class_labels: expected an int, got float"),
    ({"class_labels": torch.ones(2)}, r"class_labels: expected an int64 tensor \[B\]"),
    ({**LABEL, "height": 20}, "height: expected a multiple of 8, got 20"),
    ({**LABEL, "width": 20}, "width: expected a multiple of 8, got 20"),
    ({**LABEL, "width": 0}, "width: expected at least 1, got 0"),
    ({**LABEL, "height": 16.0}, "height: expected an int, got float"),
    ({**LABEL, "num_inference_steps": 0}, "num_inference_steps: expected at least 1, got 0"),
    ({**LABEL, "num_inference_steps": 2.0}, "num_inference_steps: expected an int, got float"),
    ({**LABEL, "guidance_scale": float("nan")}, "guidance_scale: expected a finite number"),
    ({**LABEL, "guidance_scale": "4"}, "guidance_scale: expected a number, got '4'"),
    ({**LABEL, "guidance_interval": (0.5, 0.1)}, "guidance_interval: expected 0 <= low <= high"),
    ({**LABEL, "guidance_interval": 0.5}, r"guidance_interval: expected \(low, high\), got 0.5"),
    ({**LABEL, "num_images_per_prompt": 0}, "num_images_per_prompt: expected at least 1, got 0"),
    ({**LABEL, "output_type": "jpeg"}, "output_type: expected one of pil, np, pt, latent"),
    ({**LABEL, "latents": torch.ones(1, 4, 8, 4)}, r"latents: expected shape \[1, 4, 8, 8\]"),
    ({**LABEL, "latents": torch.ones(4, 8, 8)}, "latents: expected 4 dimensions"),
    ({**LABEL, "latents": "noise"}, "latents: expected a tensor, got str"),
    ({**LABEL, "seed": 1.5}, "seed: expected an int, or one for each picture, got 1.5"),
    ({**LABEL, "seed": -1}, "seed: expected at least 0, got -1"),
    ({**LABEL, "seed": 1 << 64}, "seed: expected 0 to 2"),
    ({**LABEL, "seed": [1, 2]}, "seed: expected one, or 1, one for each picture, got 2"),
    ({**LABEL, "seed": 0, "generator": torch.Generator()}, "seed: .* or a generator, got both"),
    ({**LABEL, "generator": 3}, r"generator: expected torch.Generator, got \['int'\]"),
    ({**LABEL, "generator": [None]}, r"generator: expected torch.Generator, got \['NoneType'\]"),
    ({**LABEL, "generator": [torch.Generator()] * 2}, "generator: expected one, or 1"),
    ({**LABEL, "callback_on_step_end": 3}, "callback_on_step_end: expected a function, got int"),
    ({**LABEL, "cuda_graph": True}, "cuda_graph: expected a CUDA device, got cpu"),
]


@pytest.mark.parametrize(("given", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls_do_no_work(classes, monkeypatch, given, message):
    def work(*_, **__):
        raise AssertionError("work was done")

    for kind in (SnapGenUNet, SnapGenDecoder, ClassTokens):
        monkeypatch.setattr(kind, "forward", work)
    monkeypatch.setattr(SnapGenUNet, "key_values", work)
    with pytest.raises((TypeError, ValueError), match=f"SnapGenPipeline: {message}"):
        classes(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": []}, "prompt: expected at least one text, got none"),
        ({"prompt": [1]}, "prompt: expected a text or a sequence of texts"),
        ({"prompt": PROMPTS, "negative_prompt": ["snow"]}, "one text, or 2 like prompt, got 1"),
        ({"class_labels": 1}, "class_labels: expected a prompt, as there are no class tokens"),
    ],
)
def test_bad_prompts_do_no_work(texts, monkeypatch, given, message):
    monkeypatch.setattr(TextEncoders, "encode", None)
    with pytest.raises((TypeError, ValueError), match=message):
        texts(**given)


def test_parts_that_do_not_fit(classes):
    parts = {"unet": classes.unet, "decoder": classes.decoder, "conditions": classes.conditions}
    for change, message in (
        ({"unet": torch.nn.Identity()}, "unet: expected a SnapGenUNet, got Identity"),
        ({"unet": SnapGenUNet(**SMALL, num_ids=2)}, "unet: expected num_ids = 0, got 2"),
        ({"decoder": torch.nn.Identity()}, "decoder: expected a SnapGenDecoder or an autoencoder"),
        ({"decoder": decoder(latent_channels=8)}, "decoder: expected 4 latent channels .*, got 8"),
        ({"conditions": None}, "conditions: expected TextEncoders or ClassTokens, got NoneType"),
        ({"conditions": ClassTokens(5, 3, 41)}, "expected tokens of width 40 .*, got 41"),
        ({"shift": 0}, "shift: expected a positive number, got 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor: expected a finite number"),
        ({"shift_factor": "0"}, "shift_factor: expected a number, got '0'"),
        ({"sample_size": 0}, "sample_size: expected at least 1, got 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"SnapGenPipeline: .*{message}"):
            SnapGenPipeline(**{**parts, **change})
