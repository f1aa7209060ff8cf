"""Folders of SnapGen's pipeline, and the command that samples from them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_snapgen_pipeline import PROMPTS, class_pipeline, decoder, text_pipeline

from dfm_fast import cli
from dfm_fast._library import INTERPRET
from dfm_fast.models import SnapGenPipeline

safetensors = pytest.importorskip("safetensors.torch")
Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.skipif(INTERPRET, reason="no kernels in it")


@pytest.fixture
def classes():
    return class_pipeline()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return text_pipeline(tmp_path_factory.mktemp("encoders"))


# --- Folders --------------------------------------------------------------------------------------


def test_saved_and_loaded(classes, tmp_path):
    classes.shift = 2.0
    options = {"class_labels": [0, 3], "num_inference_steps": 2, "seed": 1, "output_type": "np"}
    want = classes(**options).images
    classes.save_pretrained(tmp_path / "new" / "pipeline")
    again = SnapGenPipeline.from_pretrained(tmp_path / "new" / "pipeline")
    assert (again(**options).images == want).all()
    assert (again.shift, again.sample_size) == (2.0, 8)
    narrow = SnapGenPipeline.from_pretrained(tmp_path / "new" / "pipeline", dtype=torch.bfloat16)
    parts = narrow.unet, narrow.decoder, narrow.conditions
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}


def test_saved_and_loaded_with_text_encoders(texts, tmp_path):
    options = {"num_inference_steps": 2, "seed": 1, "output_type": "np"}
    texts.save_pretrained(tmp_path)
    texts.save_pretrained(tmp_path)  # over itself
    names = {"unet", "decoder", "model_index.json"}
    names |= {f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    assert {path.name for path in tmp_path.iterdir()} == names  # and no temporary ones
    again = SnapGenPipeline.from_pretrained(tmp_path)
    assert again.conditions.layout == texts.conditions.layout
    assert (again(PROMPTS, **options).images == texts(PROMPTS, **options).images).all()
    some = SnapGenPipeline.from_pretrained(tmp_path, encoders=["clip_g"])
    assert list(some.conditions.encoders) == ["clip_g"]
    with pytest.raises(ValueError, match="encoders: expected some of clip_l, clip_g, gemma, got"):
        SnapGenPipeline.from_pretrained(tmp_path, encoders=["t5"])
    for file in (tmp_path / "tokenizer_3").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"gemma: expected .* without a tokenizer"):
        SnapGenPipeline.from_pretrained(tmp_path)


def test_a_folder_that_was_whole_stays_so(texts, tmp_path, monkeypatch):
    texts.save_pretrained(tmp_path)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    module = texts.conditions.encoders["gemma"].module

    def half(folder):
        (Path(folder) / "model.safetensors").write_bytes(b"half of it")
        raise OSError("the disk is full")

    monkeypatch.setattr(module, "save_pretrained", half)
    with pytest.raises(OSError, match="the disk is full"):
        texts.save_pretrained(tmp_path)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    assert not list(tmp_path.glob(".*"))


def autoencoder(diffusers, name):
    """Of two stages, and four channels."""
    torch.manual_seed(0)
    if name == "AutoencoderTiny":
        widths = {f"{way}_block_out_channels": (8, 8) for way in ("encoder", "decoder")}
        counts = {f"num_{way}_blocks": (1, 1) for way in ("encoder", "decoder")}
        return diffusers.AutoencoderTiny(**widths, **counts, scaling_factor=0.5, shift_factor=0.25)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    blocks["up_block_types"] = ("UpDecoderBlock2D",) * 2
    widths = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    return diffusers.AutoencoderKL(**blocks, **widths, scaling_factor=0.5, shift_factor=0.25)


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny"])
def test_an_autoencoder_of_diffusers(classes, tmp_path, name):
    vae = autoencoder(pytest.importorskip("diffusers"), name).eval()
    pipeline = SnapGenPipeline(classes.unet, vae, classes.conditions, sample_size=8)
    assert (pipeline.factor, pipeline.multiple) == (2, 8)
    options = {"class_labels": [0, 3], "num_inference_steps": 1, "seed": 1}
    x = pipeline(**options, output_type="latent").images
    with torch.no_grad():
        want = (vae.decode(x / 0.5 + 0.25).sample / 2 + 0.5).clamp(0, 1)
    got = pipeline(**options, output_type="pt").images
    assert got.shape == (2, 3, 16, 16)
    torch.testing.assert_close(got, want)
    pipeline.save_pretrained(tmp_path)
    assert not (tmp_path / "decoder").exists()
    again = SnapGenPipeline.from_pretrained(tmp_path)
    assert torch.equal(again(**options, output_type="pt").images, got)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = safetensors.load_file(weights)
    del state["decoder.layers.0.weight" if "Tiny" in name else "decoder.conv_in.weight"]
    safetensors.save_file(state, weights)
    with pytest.raises(ValueError, match=r"vae: expected all weights of the model, got .*\.weight"):
        SnapGenPipeline.from_pretrained(tmp_path)


def test_an_autoencoder_without_a_shift(classes):
    """AutoencoderKL of older models has None for it."""
    old = decoder()
    old.config["shift_factor"] = None
    pipeline = SnapGenPipeline(classes.unet, old, classes.conditions)
    assert (pipeline.shift_factor, pipeline.scaling_factor) == (0, 1.5305)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "StableDiffusion3Pipeline"}, "a SnapGenPipeline's, got .*Diffusion3"),
        ({"components": {}}, "unet, and decoder, vae or .* neither, got none"),
        ({"components": {"unet": "SnapGenUNet"}}, "class_tokens, or .*, got unet"),
        ({"scheduler": "Euler"}, "some of .*, got scheduler"),
        (
            {"vae": "AutoencoderKL"},
            "unet, and decoder, vae or .* neither, got unet, decoder, class_tokens, vae",
        ),
        ({"text_encoder": "CLIPTextModel"}, "class_tokens, or text encoders and a text_layout"),
    ],
)
def test_bad_indices(classes, tmp_path, change, message):
    classes.save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text())
    if change.keys() <= {"_class_name", "components"}:
        index |= change
    else:
        index["components"] |= change
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"SnapGenPipeline.from_pretrained: .*expected {message}"):
        SnapGenPipeline.from_pretrained(tmp_path)


def test_bad_folders(classes, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder: expected model_index\.json"):
        SnapGenPipeline.from_pretrained(tmp_path)
    classes.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoders: expected None, as .* has class tokens"):
        SnapGenPipeline.from_pretrained(tmp_path, encoders=["clip_l"])
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["components"]["decoder"]
    index["components"]["vae"] = "Anything"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"class of .*vae: expected one of AutoencoderKL"):
        SnapGenPipeline.from_pretrained(tmp_path)


# --- The command ----------------------------------------------------------------------------------


def test_the_command_writes_pictures_of_prompts(texts, tmp_path, capsys):
    texts.save_pretrained(tmp_path / "pipeline")
    out = tmp_path / "grid.png"
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    options = ["--steps", "2", "--cfg", "3", "--seed", "5", "--device", "cpu", "--count", "2"]
    command = ["sample", str(tmp_path / "pipeline"), *prompts, *options, "--out", str(out)]
    assert cli.main([*command, "--negative-prompt", "snow"]) == 0
    assert str(out) in capsys.readouterr().out
    shown = np.asarray(Image.open(out))
    want = texts(
        PROMPTS,
        "snow",
        num_inference_steps=2,
        guidance_scale=3.0,
        seed=5,
        num_images_per_prompt=2,
        output_type="np",
    ).images
    # 16 pixels are shown as 64, with lines of 2 between pictures; a row for each prompt.
    assert shown.shape == (130, 130, 3)
    for i in range(4):
        top, left = 66 * (i // 2), 66 * (i % 2)
        part = shown[top : top + 64 : 4, left : left + 64 : 4]
        assert np.abs(part - 255 * want[i]).max() <= 0.51


def test_the_command_writes_pictures_of_classes(classes, tmp_path, capsys):
    classes.save_pretrained(tmp_path / "pipeline")
    out = tmp_path / "grid.png"
    command = ["sample", str(tmp_path / "pipeline"), "--device", "cpu", "--out", str(out)]
    assert cli.main([*command, "--steps", "1", "--classes", "1", "4", "--size", "16", "32"]) == 0
    assert Image.open(out).size == (128, 64 + 2 + 64)
    assert cli.main([*command, "--steps", "1"]) == 0  # all five
    capsys.readouterr()
    for wrong, message in (
        (["--classes", "5"], "--classes: expected numbers below 5, got 5"),
        (["--prompt", "a fox"], "prompt: expected class_labels, as there is no text encoder"),
        (["--steps", "2", "2"], "--steps: expected one number"),
        (["--size", "16", "17"], "width: expected a multiple of 8, got 17"),
        (["--previews"], "--previews: expected none"),
    ):
        assert cli.main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_prompts_are_for_pipelines(tmp_path, capsys):
    assert cli.main(["sample", str(tmp_path), "--prompt", "a fox"]) == 2
    assert "--prompt: expected a folder with model_index.json" in capsys.readouterr().err
