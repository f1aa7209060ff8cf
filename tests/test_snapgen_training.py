"""`dfm-fast snapgen`: from digits to a pipeline, against a teacher, to a few steps; bad input."""

import pytest
import torch

from dfm_fast._library import INTERPRET
from dfm_fast.cli import main
from dfm_fast.models import SnapGenPipeline
from dfm_fast.training import evaluation, loop
from dfm_fast.training.datasets import DataConfig, open_dataset
from dfm_fast.training.snapgen import SnapGenConfig, preset, train_snapgen

pytest.importorskip("sklearn")
pytest.importorskip("tensorboard")
pytestmark = pytest.mark.skipif(INTERPRET, reason="no kernels in it")


def small(out, name="digits", **changes):
    return preset(
        name, out, **{"steps": 2, "batch": 4, "device": "cpu", "sample_every": 0, **changes}
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    train_snapgen(small(folder))
    return folder


def weights(folder):
    pipeline = SnapGenPipeline.from_pretrained(folder / "model")
    return {**pipeline.unet.state_dict(), "tokens": pipeline.conditions.weight}


def test_a_run_ends_in_a_pipeline(teacher, tmp_path):
    pipeline = SnapGenPipeline.from_pretrained(teacher / "model")
    assert (pipeline.shift, pipeline.sample_size, pipeline.factor) == (1.0, 16, 1)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "seed": 3}
    pictures = pipeline(class_labels=[3, 7], **options, output_type="pt").images
    latents = pipeline(class_labels=[3, 7], **options, output_type="latent").images
    assert pictures.shape == (2, 1, 16, 16)
    torch.testing.assert_close(pictures, (latents / 2 + 0.5).clamp(0, 1))
    (image,) = pipeline(class_labels=7, **options).images
    assert (image.size, image.mode) == ((16, 16), "L")
    pipeline.save_pretrained(tmp_path)
    assert not (tmp_path / "decoder").exists()
    again = SnapGenPipeline.from_pretrained(tmp_path)(class_labels=[3, 7], **options)
    assert [p.size for p in again.images] == [(16, 16)] * 2


def test_few_steps_begin_with_the_teacher(teacher, tmp_path):
    reports = []
    train_snapgen(
        small(tmp_path / "a", "digits-4", steps=1, teacher=teacher), on_step=reports.append
    )
    (report,) = reports
    assert report.terms["adversarial"] != 0
    assert 0 < report.terms["discriminator"] < 2
    assert report.terms["kd"] < 1e-9  # it is its teacher
    for got, want in zip(weights(tmp_path / "a").values(), weights(teacher).values(), strict=True):
        assert (got - want).abs().max() < 1e-4


def test_the_command_trains_goes_on_and_samples(teacher, tmp_path, capsys):
    out, small = tmp_path / "b", ["--batch", "4", "--device", "cpu"]
    options = ["--preset", "digits-4", "--out", str(out), "--teacher", str(teacher), *small]
    assert main(["snapgen", *options, "--steps", "1"]) == 0
    assert f"trained 1 steps; the pipeline: {out / 'model'}" in capsys.readouterr().out
    assert main(["snapgen", "--resume", "--out", str(out), "--steps", "2"]) == 0
    assert "trained 2 steps" in capsys.readouterr().out
    picture = tmp_path / "grid.png"
    sampling = ["--classes", "3", "--count", "2", "--steps", "4", "--cfg", "1"]
    assert main(["sample", str(out), *sampling, "--device", "cpu", "--out", str(picture)]) == 0
    assert picture.stat().st_size > 100


def test_bad_input(teacher, tmp_path, capsys):
    def fails(message, *changes, out="c"):
        assert main(["snapgen", "--out", str(tmp_path / out), "--device", "cpu", *changes]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / out).exists()

    fails("few_steps: expected 0 without a teacher, got 4", "--few-steps", "4")
    fails(
        "data: expected pictures with classes or --data.captions, got photos",
        "--data.name",
        "photos",
    )
    fails("teacher: ", "--teacher", str(tmp_path / "none"))
    fails("decoder: expected none, as there are no latents", "--decoder", str(tmp_path))
    fails("init: expected a folder with model_index.json", "--init", str(tmp_path))
    fails("tokens = 2 like the student's ClassTokens", "--init", str(teacher), "--tokens", "2")
    fails("optimizer.lr: expected a positive number", "--optimizer.lr", "-1")


def test_a_teacher_of_other_classes(tmp_path, monkeypatch):
    class Fewer:
        num_classes = 3

        def __getitem__(self, i):
            return torch.zeros(1, 16, 16), i % 3

        def __len__(self):
            return 6

    folder = tmp_path / "three"
    monkeypatch.setattr(loop, "open_dataset", lambda *_: Fewer())
    train_snapgen(small(folder, steps=1))
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match="snapgen: teacher: expected 10 classes like the data, got 3"
    ):
        train_snapgen(small(tmp_path / "d", teacher=folder))


def test_it_learns_classes(tmp_path):
    """A short run of the preset: what is asked for comes more often than by chance."""
    config = small(tmp_path / "e", steps=120, batch=32, save_every=120)
    losses = []
    train_snapgen(config, on_step=lambda report: losses.append(report.loss))
    assert sum(losses[-50:]) < 0.35 * sum(losses[:50])
    pipeline = SnapGenPipeline.from_pretrained(config.out / "model")
    labels = torch.arange(10).repeat_interleave(8)
    options = {"num_inference_steps": 8, "guidance_scale": 2.0, "seed": 0}
    x = 2 * pipeline(class_labels=labels, **options, output_type="pt").images - 1
    data = evaluation.gather(open_dataset(DataConfig(name="digits", size=16)))
    agreement = evaluation.classifier_agreement(x, labels, evaluation.fit_classifier(*data))
    assert agreement > 0.3
    assert isinstance(config, SnapGenConfig)
