"""`dfm-fast snapgen` on captions: texts kept, encoders dropped, the pipeline; bad input."""

import warnings
from pathlib import Path

import pytest
import torch
from test_datasets import pixels, save
from test_text_encoders import write_encoders

from dfm_fast._library import INTERPRET
from dfm_fast.cli import main
from dfm_fast.models import SnapGenPipeline, TextTable, draw_kept
from dfm_fast.models.text_layouts import dropout_probability
from dfm_fast.training import orders, snapgen, texts
from dfm_fast.training.config import OptimizerConfig
from dfm_fast.training.datasets import DataConfig, open_dataset
from dfm_fast.training.distillation import flow_matching_loss
from dfm_fast.training.distributed import World
from dfm_fast.training.snapgen import SnapGenConfig, train_snapgen
from dfm_fast.training.texts import TextConfig

pytest.importorskip("transformers")
pytest.importorskip("tensorboard")
pytestmark = pytest.mark.skipif(INTERPRET, reason="no kernels in it")

WORLD = World(0, 1, torch.device("cpu"))
CAPTIONS = ["a red fox", "snow", "the fox in snow", "a red fox", "very red"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders by name, as a configuration has them."""
    folders = write_encoders(tmp_path_factory.mktemp("encoders"))
    return {name: (folder,) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, caption in enumerate(CAPTIONS):
        save(folder / f"{i}.png", pixels(16, 16, seed=i))
        (folder / f"{i}.txt").write_text(caption)
    return DataConfig("images", root=folder, size=16, captions=True)


def config(out, data, encoders, **changes):
    values = {"steps": 2, "batch": 4, "workers": 0, "device": "cpu", "precision": "fp32"}
    values |= {"sample_every": 0, "save_every": 100, "class_dropout": 0.3}
    text = TextConfig(**encoders, dtype="fp32", max_tokens=9)
    optimizer = OptimizerConfig(lr=1e-2, warmup=0)
    return SnapGenConfig(
        out, **{"data": data, "text": text, "optimizer": optimizer, **values, **changes}
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data, encoders):
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    reports = []
    train_snapgen(config(folder, data, encoders), on_step=reports.append)
    return folder, reports


def test_a_step_is_the_loss_of_its_texts(teacher, data):
    """Captions in the order of the data, each without the encoders that its position drops."""
    folder, (first, _) = teacher
    pipeline = SnapGenPipeline.from_pretrained(folder / "model")
    layout = pipeline.conditions.layout
    assert (layout.names, layout.clip_length, layout.max_tokens) == (
        ("clip_l", "clip_g", "gemma"),
        14,
        9,
    )
    opened = open_dataset(data)
    ordered = orders.Ordered(opened, 0, False, 0.0, 0)
    x, labels = zip(*(ordered[i] for i in range(4)), strict=True)
    keep = draw_kept(layout, 0, range(4), dropout_probability(layout, 0.3))
    assert keep.any()
    assert not keep.all()
    captions = [opened.class_names[label] for label in labels]
    assert captions == [CAPTIONS[orders.draw(0, i, 5).index] for i in range(4)]
    text, mask, _ = pipeline.conditions.encode(captions, keep=keep)
    torch.manual_seed(0)
    student = snapgen._student("tiny", 3, layout)
    want = flow_matching_loss(student, torch.stack(x), seed=0, cond={"text": text, "mask": mask})
    assert first.loss == pytest.approx(want.mean().item(), rel=1e-4)


def test_texts_are_encoded_once(teacher, data, encoders, tmp_path, monkeypatch):
    """A run that goes on reads them, in as many files as they take."""
    monkeypatch.setattr(texts, "SHARD", 3)
    settings = config(tmp_path / "a", data, encoders, steps=1)
    reports = []
    train_snapgen(settings, on_step=reports.append)
    kept = sorted((settings.out / "texts").iterdir())
    assert len(kept) == 2
    with monkeypatch.context() as patched:
        patched.setattr(TextTable, "encode", None)
        again = config(tmp_path / "a", data, encoders)
        train_snapgen(again, resume=True, on_step=reports.append)
    assert reports == teacher[1]


def test_other_texts_take_the_place_of_those_that_were(encoders, tmp_path):
    given = texts.load("snapgen", TextConfig(gemma=encoders["gemma"]), WORLD)
    kept = []
    for captions in (CAPTIONS, CAPTIONS, CAPTIONS[1:]):
        assert texts.encoded(given, captions, tmp_path, WORLD).texts == tuple(captions)
        kept.append([(path.name, path.stat().st_ino) for path in tmp_path.iterdir()])
    assert kept[0] == kept[1]
    assert len(kept[2]) == 1
    assert kept[2] != kept[1]


def test_parts_of_a_batch_drop_what_the_batch_drops(teacher, data, encoders, tmp_path):
    reports = []
    settings = config(tmp_path, data, encoders, steps=1, accumulate=2)
    train_snapgen(settings, on_step=reports.append)
    assert reports[0].loss == pytest.approx(teacher[1][0].loss, rel=1e-5)
    assert reports[0].grad_norm == pytest.approx(teacher[1][0].grad_norm, rel=1e-4)


def test_few_steps_from_a_teacher_of_texts(teacher, data, encoders, tmp_path):
    reports = []
    options = {"few_steps": 2, "teacher": teacher[0], "steps": 1}
    train_snapgen(config(tmp_path / "a", data, encoders, **options), on_step=reports.append)
    assert reports[0].terms["kd"] < 1e-9  # it is its teacher


def test_the_command_trains_and_samples(data, encoders, tmp_path, capsys):
    """In part of the encoders, with grids."""
    out, picture = tmp_path / "run", tmp_path / "grid.png"
    options = ["--preset", "captions", "--model", "tiny", "--data.root", str(data.root)]
    options += ["--data.size", "16", "--text.clip-l", str(encoders["clip_l"][0])]
    options += ["--batch", "4", "--steps", "1", "--sample-count", "4", "--workers", "0"]
    assert main(["snapgen", "--out", str(out), "--device", "cpu", *options]) == 0
    assert "trained 1 steps; the pipeline" in capsys.readouterr().out
    assert (out / "samples" / "step-00000001.png").exists()
    sampling = ["--prompt", "a red fox", "--steps", "2", "--device", "cpu", "--out", str(picture)]
    assert main(["sample", str(out), *sampling]) == 0
    assert picture.stat().st_size > 100


def test_bad_input(teacher, data, encoders, tmp_path, capsys):
    pictures = ["--data.name", "images", "--data.root", str(data.root), "--data.size", "16"]
    clip_l = ["--text.clip-l", str(encoders["clip_l"][0])]

    def fails(message, *changes):
        out = tmp_path / "out"
        assert main(["snapgen", "--out", str(out), "--device", "cpu", *changes]) == 2
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1]  # after transformers' bar
        assert not out.exists()

    captions = [*pictures, "--data.captions"]
    fails("text: expected an encoder, as the data has captions, got none", *captions)
    fails("data: expected pictures with classes or --data.captions", *pictures, *clip_l)
    fails("tokens: expected None beside text encoders, got 2", *captions, *clip_l, "--tokens", "2")
    fails("clip_g: expected a local folder", *captions, "--text.clip-g", str(tmp_path / "none"))
    fails("text.gemma: expected one folder", *captions, "--text.gemma", "a", "b", "c")
    other = ["--teacher", str(teacher[0])]
    fails("teacher: expected clip_g = 0 like the student's text layout", *captions, *clip_l, *other)
    fails("teacher: expected a pipeline with class tokens, got", *other)
    Path(tmp_path / "bare").mkdir()
    save(tmp_path / "bare" / "a.png", pixels(16, 16))
    captions[3] = str(tmp_path / "bare")
    fails("a.png: no caption: a.txt cannot be read", *captions, *clip_l)
    assert main(["train", "--data.captions", *pictures, "--out", str(tmp_path / "c")]) == 2
    assert "data.captions: expected False" in capsys.readouterr().err


def test_warnings_of_many_texts_are_counted(encoders, tmp_path):
    words = TextConfig(gemma=encoders["gemma"], max_tokens=3)
    captions = ["the fox in red snow", "the red fox in", "a red fox in snow", "in the snow a fox"]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        table = texts.encoded(texts.load("snapgen", words, WORLD), captions, tmp_path, WORLD)
    told = [str(w.message) for w in found if "Text" in str(w.message) or "more" in str(w.message)]
    assert len(told) == 4
    assert "cut: 'in red snow'" in told[0]
    assert told[3] == "and 1 more such warnings of texts"
    assert [len(s.hidden) for s in table.states["gemma"]] == [3] * 4


def test_tables_are_joined(encoders):
    words = TextConfig(gemma=encoders["gemma"], clip_l=encoders["clip_l"])
    by = texts.load("snapgen", words, WORLD).encoders
    whole = TextTable.encode(by, CAPTIONS)
    parts = [TextTable.encode(by, CAPTIONS[:2]), TextTable.encode(by, CAPTIONS[2:])]
    joined = TextTable.joined(parts)
    assert joined.texts == whole.texts
    labels = torch.tensor([4, 0, 2, 5, 1])
    for got, want in zip(joined(labels), whole(labels), strict=True):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    with pytest.raises(IndexError):
        joined.states["gemma"][5]
    with pytest.raises(
        ValueError, match=r"TextTable\.joined: tables: expected at least one, got none"
    ):
        TextTable.joined([])
    only = TextConfig(gemma=encoders["gemma"])
    other = TextTable.encode(texts.load("snapgen", only, WORLD).encoders, CAPTIONS)
    with pytest.raises(ValueError, match=r"TextTable\.joined: tables: expected one layout"):
        TextTable.joined([whole, other])
