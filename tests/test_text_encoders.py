"""Text encoders: what transformers' models give, joined; batches, caches, folders, bad input. The
models are tiny and random, of the same classes and in the same folders as the real ones."""

import json
import string
import sys
import warnings

import pytest
import torch
from helpers import run_python

from dfm_fast._library import INTERPRET
from dfm_fast.models import TextEncoder, TextEncoders, TextLayout, TextTable
from dfm_fast.models.text_layouts import join_states

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.skipif(INTERPRET, reason="no kernels in it")

LAYOUT = TextLayout(16, 24, 48, clip_length=14, max_tokens=9)
PROMPT = TextLayout(16, 24, 48, clip_length=14, max_tokens=9, clip_tokens="prompt")
TEXTS = ["a red fox", "snow", "", "the fox in red"]
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "the", "fox", "in", "snow", "red", "very"]
WORDS += ["photo", "of"]


# --- Folders --------------------------------------------------------------------------------------


def clip_tokenizer(pad):
    """Of letters: no merges."""
    words = ["!", *(c + end for c in string.ascii_lowercase + "{}" for end in ("", "</w>"))]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad)


def clip_config(tokenizer, width):
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    sizes = {"hidden_size": width, "intermediate_size": 32, "projection_dim": width}
    layers = {"num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 14}
    return transformers.CLIPTextConfig(vocab_size=len(tokenizer), **sizes, **layers, **ids)


def gemma_tokenizer():
    """Of words, padded on the left, as Gemma's is."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    special = {f"{k}_token": f"<{k}>" for k in ("pad", "eos", "bos", "unk")}
    kind = transformers.PreTrainedTokenizerFast
    return kind(tokenizer_object=backend, padding_side="left", **special)


def gemma_config():
    sizes = {"hidden_size": 48, "intermediate_size": 64, "head_dim": 16, "sliding_window": 4}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 2}
    return transformers.Gemma2Config(vocab_size=len(WORDS), **sizes, **heads)


def write(folder, model, tokenizer):
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def randomise(model):
    """Large enough that what is wrong shows: a new model's states hardly depend on the text."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def write_encoders(root):
    """Folders of the three."""
    small, big = clip_tokenizer("<|endoftext|>"), clip_tokenizer("!")
    clip_l = randomise(transformers.CLIPTextModel(clip_config(small, 16)))
    clip_g = randomise(transformers.CLIPTextModelWithProjection(clip_config(big, 24)))
    gemma = randomise(transformers.Gemma2ForCausalLM(gemma_config()))
    return {
        "clip_l": write(root / "clip_l", clip_l, small),
        "clip_g": write(root / "clip_g", clip_g, big),
        "gemma": write(root / "gemma", gemma, gemma_tokenizer()),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture
def encoders(folders):
    return TextEncoders.from_pretrained(LAYOUT, **folders)


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-6 * want.abs().max().item(), rtol=2e-5)


# --- Values ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip_l", "clip_g"])
def test_states_of_clip_are_those_before_the_last_layer(folders, name):
    encoder = TextEncoder.load(name, folders[name])
    kinds = {"clip_l": "CLIPTextModel", "clip_g": "CLIPTextModelWithProjection"}
    model = getattr(transformers, kinds[name]).from_pretrained(folders[name]).double()
    inner = getattr(model, "text_model", model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name])
    for text, s in zip(TEXTS, encoder(TEXTS, LAYOUT), strict=True):
        ids = tokenizer(text, padding="max_length", max_length=14, return_tensors="pt").input_ids
        out = model(input_ids=ids)
        # What is left to do is the last layer, causal, and the final norm.
        layer = inner.encoder.layers[-1]
        mask = torch.full((1, 1, 14, 14), -torch.inf, dtype=torch.float64).triu(1)
        last = layer(s.hidden[None].double(), attention_mask=mask)
        last = last[0] if isinstance(last, tuple) else last
        close(inner.final_layer_norm(last), out.last_hidden_state)
        end = tokenizer(text).input_ids.index(tokenizer.eos_token_id)
        pooled = out.last_hidden_state[0, end]
        pooled = model.text_projection(pooled) if name == "clip_g" else pooled
        close(s.pooled.double(), pooled)
    assert tokenizer.pad_token_id == encoder.tokenizer.pad_token_id


@torch.no_grad()
def test_states_of_gemma_are_the_last(folders):
    encoder = TextEncoder.load("gemma", folders["gemma"])
    model = transformers.Gemma2ForCausalLM.from_pretrained(folders["gemma"]).double()
    model.set_attn_implementation("eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["gemma"])
    assert tokenizer.padding_side == "left"
    for text, s in zip(TEXTS, encoder(TEXTS, LAYOUT), strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids  # no padding at all
        close(s.hidden.double(), model.model(input_ids=ids).last_hidden_state[0])
        assert s.pooled is None


@pytest.mark.parametrize("layout", [LAYOUT, PROMPT], ids=["all", "prompt"])
def test_texts_of_a_batch_are_what_each_is_alone(folders, layout):
    encoders = TextEncoders.from_pretrained(layout, **folders, cache=0)
    whole = encoders.encode(TEXTS)
    for i, text in enumerate(TEXTS):
        alone = encoders.encode(text)
        assert whole.mask[i].sum() == alone.mask[0].sum()
        close(whole.text[i][whole.mask[i]], alone.text[0][alone.mask[0]])
        close(whole.pooled[i], alone.pooled[0])
    assert (whole.text[0] - whole.text[1]).abs().max() > 0.1


def test_tokens_of_the_prompt_alone(folders):
    every, prompt = (
        TextEncoders.from_pretrained(layout, **folders).states(TEXTS) for layout in (LAYOUT, PROMPT)
    )
    lengths = [2 + len(text.replace(" ", "")) for text in TEXTS]
    for name in ("clip_l", "clip_g"):
        assert [len(s.hidden) for s in every[name]] == [14] * 4
        assert [len(s.hidden) for s in prompt[name]] == lengths
        for a, b in zip(every[name], prompt[name], strict=True):
            close(b.hidden, a.hidden[: len(b.hidden)])
            close(b.pooled, a.pooled)
    assert [len(s.hidden) for s in prompt["gemma"]] == [1 + len(text.split()) for text in TEXTS]


def test_joined_as_stable_diffusion_3(encoders):
    states = encoders.states(TEXTS)
    text, mask, pooled = encoders.encode(TEXTS)
    assert text.shape == (4, 14 + 5, 48)
    pairs = zip(states["clip_l"], states["clip_g"], strict=True)
    clip = torch.stack([torch.cat((a.hidden, b.hidden), -1) for a, b in pairs])
    assert torch.equal(text[:, :14], torch.nn.functional.pad(clip, (0, 8)))
    assert torch.equal(text[3, 14:], states["gemma"][3].hidden)
    assert mask[:, 14:].int().tolist() == [[1] * 4 + [0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1] * 5]
    assert torch.equal(pooled[1], torch.cat([states[n][1].pooled for n in ("clip_l", "clip_g")]))


@pytest.mark.parametrize("names", [("clip_l",), ("clip_g",), ("gemma",), ("clip_g", "gemma"), ()])
def test_any_subset(folders, encoders, names):
    """Not loaded, not used, or dropped: the same."""
    used = encoders.encode(TEXTS, only=names)
    states = {name: s for name, s in encoders.states(TEXTS).items() if name in names}
    for a, b in zip(used, join_states(LAYOUT, states, batch=4), strict=True):
        assert torch.equal(a, b)
    assert all(v.isfinite().all() for v in used)
    keep = torch.tensor([[name in names for name in LAYOUT.names]] * 4)
    for a, b in zip(used, encoders.encode(TEXTS, keep=keep), strict=True):
        assert torch.equal(a, b)
    if names:
        loaded = TextEncoders.from_pretrained(LAYOUT, **{name: folders[name] for name in names})
        for a, b in zip(used, loaded.encode(TEXTS), strict=True):
            assert torch.equal(a, b)


def test_a_template(folders):
    layout = TextLayout(0, 0, 48, max_tokens=9, template="a photo of {}")
    framed = TextEncoders.from_pretrained(layout, gemma=folders["gemma"]).encode("snow {fox}")
    plain = TextLayout(0, 0, 48, max_tokens=9)
    want = TextEncoders.from_pretrained(plain, gemma=folders["gemma"]).encode(
        "a photo of snow {fox}"
    )
    assert torch.equal(framed.text, want.text)


def test_a_table_of_encoded_names(encoders):
    table = TextTable.encode(encoders, TEXTS)
    for a, b in zip(table([3, 1]), encoders.encode([TEXTS[3], TEXTS[1]]), strict=True):
        assert torch.equal(a, b)


# --- Texts that are too long ----------------------------------------------------------------------


def test_what_is_cut_is_named(encoders):
    text = "the very red fox in the snow of the very red fox"
    with pytest.warns(UserWarning, match="tokens") as caught:
        got = encoders.encode(text)
    messages = [str(w.message) for w in caught if "TextEncoder" in str(w.message)]
    start = "TextEncoder: {} takes 14 tokens of 39; cut: 'xinthesnow"
    assert messages[0].replace(" ", "").startswith(start.format("clip_l").replace(" ", ""))
    assert messages[1].replace(" ", "").startswith(start.format("clip_g").replace(" ", ""))
    assert messages[2:] == ["TextEncoder: gemma takes 9 tokens of 13; cut: 'the very red fox'"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = encoders.encode(text)  # encoded once: told once
        want = encoders.encode("the very red fox in the snow of", only=["gemma"])
        short = encoders.encode("thevery redfo", only=["clip_l", "clip_g"])
    assert torch.equal(again.text, got.text)
    close(got.text[:, 14:], want.text)
    close(got.text[:, 0], short.text[:, 0])


def test_a_cut_text_keeps_its_end(folders):
    encoder = TextEncoder.load("clip_l", folders["clip_l"])
    with pytest.warns(UserWarning, match="cut: 'm n'"):
        (long,) = encoder(["a b c d e f g h i j k l m n"], LAYOUT)
    (fits,) = encoder(["a b c d e f g h i j k l"], LAYOUT)
    assert torch.equal(long.hidden, fits.hidden)
    assert torch.equal(long.pooled, fits.pooled)


# --- Caches, devices, dtypes ----------------------------------------------------------------------


def count(encoders, name="clip_l"):
    """The texts that the model is given, as they come."""
    seen = []
    module = encoders.encoders[name].module
    note = lambda m, args, given: seen.append(len(given["input_ids"]))  # noqa: E731
    module.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def test_a_text_is_encoded_once(folders):
    encoders = TextEncoders.from_pretrained(LAYOUT, clip_l=folders["clip_l"], cache=3)
    seen = count(encoders)
    first = encoders.encode(["fox", "snow", "fox"])
    assert seen == [2]
    assert torch.equal(first.text[0], first.text[2])
    first.text.zero_()  # what is kept is not what was given
    assert encoders.encode(["snow"]).text.any()
    assert seen == [2]
    encoders.encode("fox")
    encoders.encode(["a", "b"])  # of snow, fox, a, b the one that was used longest ago goes: snow
    encoders.encode(["fox", "a", "b"])
    assert seen == [2, 2]
    encoders.encode("snow")
    assert seen == [2, 2, 1]
    encoders.to("cpu")
    encoders.encode("snow")
    assert seen == [2, 2, 1]
    low = encoders.to(dtype=torch.bfloat16).encode("fox")
    assert seen == [2, 2, 1, 1]
    assert low.text.dtype == torch.bfloat16
    encoders.clear()
    encoders.encode("fox")
    assert seen == [2, 2, 1, 1, 1]


def test_many_texts_go_in_parts(folders, monkeypatch):
    monkeypatch.setattr("dfm_fast.models.text_encoders.BATCH", 3)
    encoders = TextEncoders.from_pretrained(LAYOUT, **folders, cache=2)
    seen = count(encoders)
    texts = list("abcdefg")
    got = encoders.encode(texts)
    assert seen == [3, 3, 1]
    close(got.text, torch.cat([encoders.encode(text).text for text in texts]))


def test_encoders_are_frozen(encoders):
    with torch.enable_grad():
        got = encoders.encode(TEXTS)
    assert not got.text.requires_grad
    for encoder in encoders.encoders.values():
        assert not encoder.module.training
        assert not any(p.requires_grad for p in encoder.module.parameters())
    # Conditions may go into a graph all the same.
    layer = torch.nn.Linear(48, 1)
    layer(got.text).sum().backward()
    assert layer.weight.grad.any()


def test_autocast_changes_nothing(encoders):
    with torch.autocast("cpu", torch.bfloat16):
        got = encoders.encode(TEXTS)
    encoders.clear()
    assert torch.equal(got.text, encoders.encode(TEXTS).text)


def test_bfloat16(folders):
    exact = TextEncoders.from_pretrained(LAYOUT, **folders).to(dtype=torch.float64).encode(TEXTS)
    low = TextEncoders.from_pretrained(LAYOUT, **folders, dtype=torch.bfloat16).encode(TEXTS)
    assert (exact.text.dtype, low.text.dtype) == (torch.float64, torch.bfloat16)
    assert (low.text - exact.text).norm() < 0.05 * exact.text.norm()
    assert torch.equal(low.mask, exact.mask)
    wide = TextEncoders.from_pretrained(LAYOUT, **folders).encode(TEXTS, dtype=torch.float16)
    assert wide.text.dtype == wide.pooled.dtype == torch.float16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu(folders):
    want = TextEncoders.from_pretrained(LAYOUT, **folders).encode(TEXTS)
    encoders = TextEncoders.from_pretrained(LAYOUT, **folders, device="cuda")
    got = encoders.encode(TEXTS)
    assert {v.device.type for v in got} == {"cuda"}
    assert (got.text.cpu() - want.text).norm() < 1e-3 * want.text.norm()
    seen = count(encoders)
    again = encoders.to("cpu").encode(TEXTS, device="cuda")
    assert not seen
    assert torch.equal(again.text, got.text)


def test_states_that_are_not_finite_are_an_error(encoders):
    with torch.no_grad():
        next(encoders.encoders["gemma"].module.layers[0].parameters()).fill_(torch.inf)
    with pytest.raises(ValueError, match=r"TextEncoder: gemma: expected finite .*float32"):
        encoders.encode("fox")


# --- Folders of others ----------------------------------------------------------------------------


def test_model_and_tokenizer_in_two_folders(folders, tmp_path):
    """As pipelines of diffusers keep them."""
    clip = folders["clip_g"]
    for file in clip.iterdir():
        part = tmp_path / ("tokenizer_2" if "token" in file.name else "text_encoder_2")
        part.mkdir(exist_ok=True)
        (part / file.name).write_bytes(file.read_bytes())
    parts = tmp_path / "text_encoder_2", tmp_path / "tokenizer_2"
    got = TextEncoders.from_pretrained(LAYOUT, clip_g=parts).encode(TEXTS)
    assert torch.equal(
        got.text, TextEncoders.from_pretrained(LAYOUT, clip_g=clip).encode(TEXTS).text
    )


def copied(folder, to):
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_weights_with_the_names_of_older_releases(folders, tmp_path):
    """Published folders of CLIPTextModel have them."""
    old = copied(folders["clip_l"], tmp_path / "old")
    state = safetensors.load_file(old / "model.safetensors")
    state = {f"text_model.{name.removeprefix('text_model.')}": v for name, v in state.items()}
    safetensors.save_file(state, old / "model.safetensors", {"format": "pt"})
    got = TextEncoder.load("clip_l", old)(TEXTS, LAYOUT)
    for a, b in zip(got, TextEncoder.load("clip_l", folders["clip_l"])(TEXTS, LAYOUT), strict=True):
        assert torch.equal(a.hidden, b.hidden)


@torch.no_grad()
def test_the_text_part_of_a_whole_clip(tmp_path):
    tokenizer = clip_tokenizer("<|endoftext|>")
    vision = {"hidden_size": 16, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    text = clip_config(tokenizer, 16).to_dict()
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = randomise(transformers.CLIPModel(config))
    encoder = TextEncoder.load("clip_l", write(tmp_path, model, tokenizer))
    assert type(encoder.module).__name__ == "CLIPTextModelWithProjection"
    ids = tokenizer("fox", padding="max_length", max_length=14, return_tensors="pt").input_ids
    pooled = model.text_model(input_ids=ids).pooler_output
    close(encoder(["fox"], LAYOUT)[0].pooled, model.text_projection(pooled)[0])


def test_weights_that_are_missing_are_an_error(folders, tmp_path):
    """transformers would draw them at random."""
    broken = copied(folders["clip_g"], tmp_path / "broken")
    state = safetensors.load_file(broken / "model.safetensors")
    del state["text_projection.weight"]
    safetensors.save_file(state, broken / "model.safetensors", {"format": "pt"})
    message = r"clip_g: expected all weights.* without text_projection.weight"
    with pytest.raises(ValueError, match=message):
        TextEncoder.load("clip_g", broken)


def test_missing_folders_are_one_error_that_names_them(folders, tmp_path):
    half = copied(folders["clip_g"], tmp_path / "half")
    (half / "model.safetensors").unlink()
    for file in half.glob("token*"):
        file.unlink()
    with pytest.raises(FileNotFoundError) as error:
        TextEncoders.from_pretrained(LAYOUT, clip_l=tmp_path / "none", clip_g=half)
    message = str(error.value)
    assert "clip_l: expected a local folder with config.json, *.safetensors and a t" in message
    assert f"got {tmp_path / 'none'} without {tmp_path / 'none'}" in message
    assert "clip_g: expected a local folder" in message
    assert f"got {half} without *.safetensors, a tokenizer" in message


def test_folders_of_other_models(folders, tmp_path):
    with pytest.raises(
        ValueError, match=r"load: clip_l: expected architectures of CLIP.*, got Gem"
    ):
        TextEncoder.load("clip_l", folders["gemma"])
    other = copied(folders["gemma"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": None}))
    with pytest.raises(ValueError, match=r"load: gemma: expected architectures of Gem.*, got none"):
        TextEncoder.load("gemma", other)


def test_without_transformers(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"expected transformers, got none \(pip install 'dfm_"):
        TextEncoders.from_pretrained(LAYOUT, **folders)


def test_transformers_is_imported_when_it_is_used():
    code = (
        "import sys, dfm_fast.models as m; m.TextLayout(); assert 'transformers' not in sys.modules"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


# --- Bad input ------------------------------------------------------------------------------------


def foreign(encoders):
    """A model and another's tokenizer."""
    return encoders.encoders["gemma"].module, encoders.encoders["clip_l"].tokenizer


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda e: e.encode(3), "prompts"),
        (lambda e: e.encode(["a", 3]), "prompts"),
        (lambda e: e.encode([]), "prompts"),
        (lambda e: e.encode("a", only=["t5"]), "only"),
        (lambda e: e.encode("a", keep=torch.ones(1, 2, dtype=torch.bool)), "keep"),
        (lambda e: TextEncoders(LAYOUT, {}), "encoders"),
        (lambda e: TextEncoders(LAYOUT, {"clip_l": e.encoders["clip_g"]}), "clip_l"),
        (lambda e: TextEncoders(LAYOUT, e.encoders, cache=-1), "cache"),
        (lambda e: TextEncoders(TextLayout(16, 0, 48, clip_length=14), e.encoders), "clip_g"),
        (lambda e: TextEncoders(TextLayout(16, 24, 32, clip_length=14), e.encoders), "gemma"),
        (lambda e: TextEncoders(TextLayout(16, 24, 48, clip_length=15), e.encoders), "clip_l"),
        (lambda e: TextEncoders.from_pretrained(LAYOUT), "encoders"),
        (lambda e: TextEncoder.load("t5", "folder"), "name"),
        (lambda e: TextEncoder("gemma", e.encoders["clip_l"].module, None), "gemma"),
        (lambda e: TextEncoder("t5", e.encoders["clip_l"].module, None), "name"),
        (lambda e: TextEncoder("gemma", *foreign(e)), "tokenizer of gemma"),
    ],
)  # fmt: skip
def test_bad_calls_are_clear_errors(encoders, call, argument):
    with pytest.raises((TypeError, ValueError), match=f": {argument}: expected .*, got "):
        call(encoders)
