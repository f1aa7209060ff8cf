"""The commands: configurations, presets, logs, pictures of trained and exported models."""

import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import run_python
from test_training import MODEL, tiny

from dfm_fast import cli
from dfm_fast._library import INTERPRET
from dfm_fast.flow import Haar, flows
from dfm_fast.models import DFMTransformer
from dfm_fast.training import loop, pictures, recipes, saved
from dfm_fast.training.config import (
    PRESETS,
    DataConfig,
    FlowConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    check,
    from_json,
    preset,
    to_json,
)

tyro = pytest.importorskip("tyro")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.skipif(INTERPRET, reason="nothing of it is a kernel")

TINY = [
    "--preset", "digits", "--model.width", "32", "--model.depth", "1", "--model.heads", "2",
    "--batch", "8", "--steps", "2", "--log-every", "1", "--sample-count", "10",
    "--flow.sample-steps", "2", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that `dfm-fast train` filled."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    result = run_python("-m", "dfm_fast.cli", "train", *TINY, "--out", str(folder))
    assert result.returncode == 0, result.stderr
    assert f"trained 2 steps; the model: {folder / loop.EXPORT}" in result.stdout
    return folder


def dataset(shape, classes=1000):
    return SimpleNamespace(shape=shape, num_classes=classes)


# --- Configurations ---


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_survive_json_and_make_a_model(name):
    config = preset(name, "somewhere", seed=3)
    assert from_json(TrainConfig, to_json(config)) == config
    check(config, 8)
    latent = (4, 3, 64, 64) if name.startswith("kinetics") else (4, 128, 128)
    latent = (4, 64, 64) if name.startswith("imagenet-512") else latent
    shape = {
        "digits": (1, 16, 16), "photos": (3, 64, 64), "images": (3, 256, 256),
        "webdataset": (3, 256, 256), "videos": (3, 17, 256, 256),
    }.get(name, latent)  # fmt: skip
    recipe = recipes.recipe_of(config, dataset(shape), [0.5] * len(config.model.patch_sizes))
    assert from_json(recipes.Recipe, to_json(recipe)) == recipe
    with torch.device("meta"):
        recipe.build_model()
        levels = [torch.empty(s) for s in recipe.build_flow().decomposition.shapes((1, *shape))]
    assert len(recipe.steps) == len(levels)


PAPERS = ["imagenet-512-b", "imagenet-512-l", "imagenet-512-xl", "imagenet-1024-b",
          "imagenet-1024-xl", "imagenet-1024-b-3", "kinetics-512-xl"]  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_presets_have_its_network(name):
    model = preset(name, "x").model
    assert (model.positions, model.qk_norm, model.block_conditioning) == ("rope", True, True)
    assert model.stage_embedding
    assert model.precondition


def test_the_largest_preset_has_the_papers_parameters():
    """As test_dfm has them for 16 channels, and an embedding of the two stages."""
    with torch.device("meta"):
        config = preset("imagenet-512-xl", "x")
        own = recipes.recipe_of(config, dataset((16, 64, 64)), [0.9, 0.5]).build_model()
    assert own.data_std == [0.9, 0.5]
    assert sum(p.numel() for p in own.parameters()) == 716_440_976 + 2 * 1152


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("batch", {"batch": 9, "accumulate": 2}),
        ("steps", {"steps": -1}),
        ("keep", {"keep": 0}),
        ("flow.sample_steps", {"flow": FlowConfig(sample_steps=(3,))}),
        ("model.patch_sizes", {"model": ModelConfig(width=32, heads=2, patch_sizes=(1, 4))}),
        ("model.patch_sizes", {"model": ModelConfig(width=32, heads=2, patch_sizes=(3, 6))}),
        ("hidden_size", {"model": ModelConfig(width=33, heads=2, patch_sizes=(2, 4))}),
        ("stage_probs", {"flow": FlowConfig(stage_probs=(0.5, 0.6))}),
        ("flow.threshold", {"flow": FlowConfig(threshold=3.0)}),
        ("flow.threshold", {"flow": FlowConfig(threshold=math.nan)}),
        ("flow.sample_steps", {"flow": FlowConfig(sample_steps=(0, 1))}),
        ("flow.scale", {"flow": FlowConfig(scale=-1.0)}),
        ("flow.cfg", {"flow": FlowConfig(cfg=math.nan)}),
        ("flow.earlier_location", {"flow": FlowConfig(earlier_location=-math.inf)}),
        ("model.class_dropout", {"model": replace(MODEL, class_dropout=5.0)}),
        ("optimizer.lr", {"optimizer": OptimizerConfig(lr=math.inf)}),
        ("optimizer.betas", {"optimizer": OptimizerConfig(betas=(0.9, 1.0))}),
        ("name", {"data": DataConfig(name="nothing")}),
    ],
)
def test_bad_configurations_name_the_field(tmp_path, name, changes):
    with pytest.raises((ValueError, TypeError)) as caught:
        loop.train(tiny(tmp_path, **changes))
    assert f"{name}: expected " in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "digits"], "--out"),
        (["--preset", "digits", "--out", "x", "--optimizer.lr", "high"], "could not convert"),
        (["--preset", "nothing", "--out", "x"], "invalid choice: 'nothing'"),
        (["--preset", "digits", "--out", "x", "--no-such-field", "3"], "no-such-field"),
        (["--out", "x", "--steps", "0", "--batch", "0"], "train: batch: expected at least 1"),
    ],
)
def test_bad_command_lines(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["train", *arguments])
    except SystemExit as leaving:
        status = leaving.code
    assert status == 2
    out, err = capfd.readouterr()
    assert message in out + err
    assert "Traceback" not in out + err


def test_a_process_in_somebody_elses_group_lives_on(monkeypatch):
    """Only torchrun's processes end at once."""
    from properties import fake_mesh

    from dfm_fast.training import distributed

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail(f"left with {status}"))
    with fake_mesh():
        assert distributed.leave(2) == 2


def test_other_commands_take_no_unknown_options(capsys):
    with pytest.raises(SystemExit):
        cli.main(["info", "--preset", "digits"])
    assert "unrecognized arguments: --preset digits" in capsys.readouterr().err


# --- What a run leaves ---


def test_scalars_and_grids_are_logged(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "logs")).Reload()
    scalars = events.Tags()["scalars"]
    assert {"loss", "loss/level_0", "lr", "grad_norm", "images_per_second"} <= set(scalars)
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert events.Scalars("lr")[1].value > events.Scalars("lr")[0].value > 0
    assert "samples" in events.Tags()["images"]
    assert Image.open(trained / "samples" / "step-00000002.png").size == (64, 10 * 66 - 2)


def test_resume_takes_the_folders_configuration(trained):
    from dfm_fast.cli.train import parse

    config = parse(None, True, ["--out", str(trained), "--steps", "3"])
    assert config.steps == 3
    assert config.model.width == 32
    assert config.batch == 8
    # In a new folder it begins, with the preset's.
    assert parse("photos", True, ["--out", str(trained / "new")]).data.name == "photos"


@pytest.mark.parametrize("name", ["images", "videos", "webdataset", "latents", "photos"])
@pytest.mark.parametrize("given", [None, "digits"])
def test_other_data_inherit_nothing_of_the_digits(name, given):
    from dfm_fast.cli.train import parse

    config = parse(given, False, ["--out", "x", f"--data.name={name}", "--data.root", "r"])
    own = preset(name, "x")
    assert config.data == replace(own.data, root=Path("r"))
    assert config.data.size == (64 if name == "photos" else 0)
    assert config.model.patch_sizes == own.model.patch_sizes != (2, 4)
    assert config.flow.factor == own.flow.factor
    # The recipe is the preset's that was asked for, or the data's.
    assert config.steps == (own.steps if given is None else preset("digits", "x").steps)
    assert config.model.width == (own if given is None else preset("digits", "x")).model.width


def test_sampling_needs_only_the_folder(trained, tmp_path, monkeypatch, capsys):
    """From the training folder, a checkpoint and the exported model: the same pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn", None)  # no dataset
    files = []
    places = trained, trained / "checkpoints" / "step-00000002", trained / "model"
    for i, path in enumerate(places):
        options = ["--steps", "2", "2", "--classes", "7", "2", "--count", "3", "--cfg", "2"]
        out = tmp_path / f"{i}" / "grid.png"
        assert cli.main(["sample", str(path), *options, "--out", str(out), "--previews"]) == 0
        assert sorted(p.name for p in out.parent.iterdir()) == ["grid-stage1.png", "grid.png"]
        files.append(out.read_bytes())
    assert files[0] == files[1] == files[2]
    image = Image.open(tmp_path / "0" / "grid.png")
    assert image.size == (3 * 66 - 2, 2 * 66 - 2)
    capsys.readouterr()
    assert cli.main(["sample", str(trained), "--seed", "1", "--count", "1"]) == 0
    assert Image.open("grid.png").size == (64, 10 * 66 - 2)  # one of each class


def test_an_exported_folder_is_a_model(trained):
    recipe, model = saved.open_model(trained / "model")
    assert isinstance(model, DFMTransformer)
    assert not model.training
    assert recipe.class_names == tuple("0123456789")
    _, other = saved.open_model(trained)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--classes", "10"],
            "--classes: expected names of classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), got 10",
        ),
        (["--classes", "cat"], "--classes: expected names of classes"),
        (["--count", "0"], "--count: expected at least 1"),
        (["--steps", "3"], "steps: expected 2 numbers"),
        (["--threshold", "2"], "threshold: expected noise levels"),
        (["--cfg", "nan"], "--cfg: expected a finite number, got nan"),
        (["--cfg", "inf"], "--cfg: expected a finite number, got inf"),
        (["--batch", "0"], "--batch: expected at least 1"),
        (["--seed", "-1"], "--seed: expected at least 0"),
        (["--out", "grid.xyz"], "--out: expected an ending such as .png"),
        (["--out", "grid.mpg"], "--out: expected an ending such as .png"),
        (["--out", "grid.mp4"], "--out: expected an ending such as .png"),  # not a video
        (["--out", "/dev/null/grid.png"], "--out: expected a folder, got /dev/null: /dev/null is"),
        (["--shape", "1", "15", "16"], "expected multiples of 2"),
    ],
)
def test_bad_sampling(trained, tmp_path, monkeypatch, capsys, options, message):
    """In one line, and before anything is sampled."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flows.sampler.Sampler, "__call__", None)
    assert cli.main(["sample", str(trained), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("dfm-fast sample: ")
    assert "sample: sample: " not in err
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train = ["train", *TINY, "--out", str(tmp_path / "x")]
    for command in (["sample", str(trained)], train):
        assert cli.main([*command, "--device", "cuda"]) == 2
        line = f"dfm-fast {command[0]}: device: expected cuda on this machine, got none\n"
        assert capsys.readouterr().err == line


def test_a_decoder_of_other_channels_is_told_before_sampling(trained, tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    blocks = {f"{k}_block_out_channels": (8, 8) for k in ("encoder", "decoder")}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    diffusers.AutoencoderTiny(**blocks, **counts).save_pretrained(tmp_path / "vae")
    out = tmp_path / "x" / "grid.png"
    command = ["sample", str(trained), "--decoder", str(tmp_path / "vae"), "--out", str(out)]
    assert cli.main(command) == 2
    assert "--decoder: expected an autoencoder of 1 channels, got 4" in capsys.readouterr().err
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "config.json: expected JSON, got a damaged file"),
        ("recipe.json", b"[1]", "recipe.json: content: expected a JSON object, got list"),
        ("model.safetensors", b"\x99" * 40, "model.safetensors: damaged file"),
    ],
)
def test_damaged_files_are_named(trained, tmp_path, capsys, name, content, message):
    folder = shutil.copytree(trained / "model", tmp_path / "model")
    (folder / name).write_bytes(content)
    assert cli.main(["sample", str(folder)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_the_weights_instead_of_their_folder(trained, capsys):
    assert cli.main(["sample", str(trained / "model" / "model.safetensors")]) == 2
    meant = f"got a file (its folder, {trained / 'model'}, may be meant)"
    assert meant in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_training_into_what_is_no_folder(tmp_path, capfd, out):
    (tmp_path / "file").touch()
    assert cli.main(["train", *TINY, "--out", str(tmp_path / out)]) == 2
    err = capfd.readouterr().err
    got = f"{tmp_path / out}: {tmp_path / 'file'} is none"
    assert err == f"dfm-fast train: out: expected a folder, got {got}\n"


def test_a_damaged_configuration_is_named(trained, tmp_path, capfd):
    (tmp_path / "config.json").write_text('{"steps": ')
    assert cli.main(["train", "--resume", "--out", str(tmp_path)]) == 2
    line = f"dfm-fast train: {tmp_path / 'config.json'}: expected JSON, got a damaged file: "
    assert capfd.readouterr().err.startswith(line)


def test_strict_data_in_a_loader_process_is_one_line(tmp_path, capfd):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (i, 9, 99)).save(data / f"{i}.png")
        (data / f"{i}.png").write_bytes((data / f"{i}.png").read_bytes()[:-30])
    options = ["--data.name", "images", "--data.root", str(data), "--data.size", "16"]
    options += ["--data.strict", "--workers", "1", "--out", str(tmp_path / "run")]
    options += ["--device", "cpu", "--precision", "fp32", "--sample-every", "0"]
    assert cli.main(["train", *TINY[2:], *options]) == 2
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line and "training:" not in line]
    assert len(lines) == 1
    assert "open_dataset: root: expected a file that can be read, got " in lines[0]
    assert lines[0].startswith("dfm-fast train: open_dataset: ")


def test_skipped_files_are_told_once(tmp_path, capfd):
    for i in range(3):
        Image.new("RGB", (16, 16), (i, 9, 99)).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").touch()
    config = tiny(tmp_path / "run", data=DataConfig("images", root=tmp_path, size=16), steps=1)
    with pytest.warns(UserWarning, match="1 of 4 files skipped: .*bad.png"):
        loop.train(config)
    out, err = capfd.readouterr()
    assert "skipped" not in out + err


@pytest.mark.parametrize(
    ("names", "asked", "labels"),
    [
        (("1", "10", "2"), ["1", "2", "10"], [0, 2, 1]),  # names, though they are numbers too
        (("cat", "dog"), ["dog", "0", "1"], [1, 0, 1]),
        ((), ["2", "0"], [2, 0]),
        (("1", "10", "2"), None, [0, 1, 2]),
    ],
)
def test_classes_are_names_before_they_are_numbers(names, asked, labels):
    from dfm_fast.cli.sample import chosen

    recipe = SimpleNamespace(num_classes=len(names) or 3, class_names=names)
    assert chosen(recipe, asked, 1)[0].tolist() == labels
    if names[:1] == ("1",):
        with pytest.raises(ValueError, match=r"expected names of classes \(1, 10, 2\), got 0"):
            chosen(recipe, ["0"], 1)


def test_sampling_from_nothing(tmp_path, capsys):
    assert cli.main(["sample", str(tmp_path)]) == 2
    assert (
        "expected a training folder, a checkpoint or an exported model" in capsys.readouterr().err
    )


# --- Options of a run ---


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"flow": FlowConfig(standardise=True, per_sample=True)},
        {
            "flow": FlowConfig(decomposition="haar"),
            "model": replace(MODEL, patch_sizes=(2, 2)),
        },
        {"model": replace(MODEL, precondition=True, stage_embedding=True)},
        {"model": replace(MODEL, patch_sizes=(4,), checkpointing=True), "flow": FlowConfig()},
        {"data": DataConfig(name="digits", labels=False, flip=True)},
    ],
    ids=lambda c: "-".join(map(str, c)),
)
def test_options_train_and_resume(tmp_path, changes):
    """Two steps and a third after resuming, which measures nothing again."""
    losses = []
    for steps in (2, 3):
        config = tiny(tmp_path, steps=steps, sample_every=3, sample_count=4, **changes)
        loop.train(config, resume=steps == 3, on_step=lambda r: losses.append(r))
    assert [r.step for r in losses] == [1, 2, 3]
    assert all(math.isfinite(r.loss) and r.loss > 0 for r in losses)
    recipe, model = saved.open_model(tmp_path / "model")
    levels = len(config.model.patch_sizes)
    if config.flow.standardise:
        assert all(s > 0 for s in recipe.std)
        assert recipe.std != [1.0] * levels
    if config.model.precondition:
        assert all(0 < s < 1 for s in model.data_std)
    if config.flow.decomposition == "haar":
        assert isinstance(recipe.build_flow().decomposition, Haar)
    assert (tmp_path / "samples" / "step-00000003.png").exists()


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of one step on a folder of classes; (configuration, its pictures)."""
    folder = tmp_path_factory.mktemp("begun")
    for name in ("ant", "bee", "cow"):
        (folder / "data" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (16, 16), (i, 9, 9)).save(folder / "data" / name / f"{i}.png")
    data = DataConfig(name="images", root=folder / "data", size=16)
    config = tiny(folder / "run", steps=1, data=data)
    loop.train(config)
    return config


def refusal(config, message):
    with pytest.raises(ValueError, match=message):
        loop.train(config, resume=True)


def test_resuming_with_renamed_classes_is_refused(begun):
    root = begun.data.root
    (root / "bee").rename(root / "zebra")
    try:
        refusal(begun, r'class_names: class 1 of 3: saved "bee", now "cow"$')
    finally:
        (root / "zebra").rename(root / "bee")


def test_resuming_with_preconditioning_that_was_not_there_is_refused(begun):
    model = replace(begun.model, precondition=True)
    refusal(replace(begun, model=model), r"model.precondition: saved false, now true$")
    flow = replace(begun.flow, standardise=True)
    refusal(replace(begun, flow=flow), r"flow.standardise: saved false, now true$")
    model = replace(begun.model, block_conditioning=True)
    refusal(replace(begun, model=model), r"model.block_conditioning: saved false, now true$")


def test_resuming_may_change_what_changes_no_number(begun, tmp_path):
    shutil.copytree(begun.out, tmp_path, dirs_exist_ok=True)
    model = replace(begun.model, checkpointing=True)
    config = replace(begun, out=tmp_path, model=model, steps=2, accumulate=2)
    assert loop.train(config, resume=True).step == 2


# --- Pictures ---


def test_grids():
    x = torch.full((3, 1, 8, 8), -1.0)
    x[1], x[2] = 1.0, math.nan
    image = pictures.grid(x, 2)
    assert image.shape == (64 * 2 + 2, 64 * 2 + 2, 3)
    assert (image[:64, :64] == 0).all()
    assert (image[:64, 66:] == 255).all()
    assert (image[66:, :64] == 0).all()  # nan is black
    assert (image[66:, 66:] == 255).all()  # nothing there
    assert pictures.grid(torch.randn(2, 16, 64, 64)).shape == (64, 130, 3)
    assert pictures.grid(torch.randn(2, 3, 5, 64, 64)).shape == (5, 64, 130, 3)


def test_videos_move(tmp_path):
    clip = pictures.grid(torch.rand(1, 3, 4, 64, 64) * 2 - 1)
    assert Image.open(pictures.write(tmp_path / "clip.gif", clip)).n_frames == 4
    assert Image.open(pictures.write(tmp_path / "clip.png", clip)).size == (256, 64)
