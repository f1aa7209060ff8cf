"""Training of a small decoder: its losses, its data, stopping and going on, the command."""

import dataclasses
import json
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from test_datasets import pixels, save

from dfm_fast._library import INTERPRET
from dfm_fast.cli import main
from dfm_fast.models import SnapGenDecoder
from dfm_fast.training import decoders
from dfm_fast.training.checkpoints import CheckpointError, Checkpoints
from dfm_fast.training.config import AdamWConfig
from dfm_fast.training.datasets import DataConfig, open_dataset
from dfm_fast.training.decoders import (
    DecoderConfig,
    DecoderModelConfig,
    balance,
    train_decoder,
)
from dfm_fast.training.discriminators import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
)
from dfm_fast.training.encoders import Autoencoder, EncodeConfig, encode
from dfm_fast.training.monitors import NotFinite
from dfm_fast.training.recipes import ModelRecipe

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(INTERPRET, reason="no kernels in it")

MODEL = DecoderModelConfig(block_out_channels=(8, 12, 16), layers_per_block=(1, 1, 1))


def kl(**config):
    down, up = ["DownEncoderBlock2D"] * 3, ["UpDecoderBlock2D"] * 3
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8), norm_num_groups=4, down_block_types=down,
        up_block_types=up, latent_channels=4, **config,
    )  # fmt: skip


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl")
    kl(scaling_factor=0.5, shift_factor=0.25).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve smooth pictures of 16 x 16."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        small = torch.tensor(pixels(4, 4, seed=i)).permute(2, 0, 1)[None].float()
        large = F.interpolate(small, (16, 16), mode="bicubic").clamp(0, 255)
        save(folder / f"{i:02}.png", large[0].permute(1, 2, 0).byte().numpy())
    return DataConfig("images", root=folder, size=16)


def config_for(out, autoencoder, data, lr=3e-3, **changes):
    return DecoderConfig(
        out=out, autoencoder=autoencoder, data=data, model=MODEL, device="cpu",
        **{
            "batch": 4, "steps": 6, "workers": 0, "precision": "fp32",
            "optimizer": AdamWConfig(lr=lr, weight_decay=0.0, warmup=0),
            "lpips_weight": 0.0, "adversarial_start": 2, "discriminator_width": 4,
            "save_every": 3, **changes,
        },
    )  # fmt: skip


def distance(y, x):
    """With LPIPS's interface."""
    return (F.avg_pool2d(y, 4) - F.avg_pool2d(x, 4)).abs().mean((1, 2, 3), keepdim=True)


def trained(config, **options):
    reports = []
    outcome = train_decoder(config, on_step=reports.append, **options)
    return outcome, reports


# --- Discriminator --------------------------------------------------------------------------------


def test_logits_of_patches():
    torch.manual_seed(0)
    model = PatchDiscriminator(3, 4, 3)
    x = torch.randn(2, 3, 96, 96, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, 1, 12, 12)
    (seen,) = torch.autograd.grad(logits[0, 0, 6, 6], x)
    rows = seen[0].abs().sum((0, 2)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 54
    assert not seen[1].any()  # no statistics over the batch
    with pytest.raises(ValueError, match="PatchDiscriminator: layers: expected at least 1, got 0"):
        PatchDiscriminator(layers=0)


def test_spectral_norm_is_one():
    torch.manual_seed(0)
    model = PatchDiscriminator(3, 4, 2)
    for p in model.parameters():  # of the weights before they are divided
        p.data *= 5
    for _ in range(50):
        model(torch.zeros(1, 3, 16, 16))
    for layer in (m for m in model if isinstance(m, torch.nn.Conv2d)):
        top = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
        assert top.item() == pytest.approx(1, abs=0.02)


def test_hinge_losses():
    real, decoded = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert discriminator_loss(real, decoded) == pytest.approx(0.5 * (0.25 + 1.0))
    assert discriminator_loss(torch.ones(3), -torch.ones(3)) == 0
    assert generator_loss(decoded) == pytest.approx(1.0)


# --- Losses ---------------------------------------------------------------------------------------


def test_gradient_of_a_picture_is_that_of_the_formula(tmp_path, autoencoder, data):
    weights = {"mse_weight": 2.0, "lpips_weight": 3.0, "adversarial_weight": 0.7}
    config = config_for(tmp_path, autoencoder, data, **weights)
    run = decoders.Run(config, Checkpoints(tmp_path / "c"), distance)
    run.step = 3  # the discriminator is in
    run.discriminator.eval()  # whose norm is renewed at every call otherwise
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    y = (x + 0.3 * torch.randn_like(x)).requires_grad_()
    got, numbers = run._gradient(y, x)
    both = 2 * F.mse_loss(y, x) + 3 * distance(y, x).mean()
    (first,) = torch.autograd.grad(both, y)
    (second,) = torch.autograd.grad(-run.discriminator(y).mean(), y)
    torch.testing.assert_close(got, first + 0.7 * first.norm() / second.norm() * second)
    assert (got - first).norm() == pytest.approx(0.7 * first.norm().item(), rel=1e-4)
    assert numbers["lpips"].item() == pytest.approx(distance(y, x).mean().item())
    assert numbers["mse"].item() == pytest.approx(F.mse_loss(y, x).item())
    run.step = 2  # not yet
    torch.testing.assert_close(run._gradient(y, x)[0], first)


def test_balance_has_a_limit():
    g = torch.ones(4)
    assert balance(g, 0.5 * g) == pytest.approx(2.0)
    assert balance(g, 0 * g) == decoders.LARGEST


def test_no_lpips(tmp_path, autoencoder, data, monkeypatch):
    monkeypatch.setitem(decoders.__dict__["__builtins__"], "__import__", _without("lpips"))
    with pytest.raises(
        ImportError, match="train_decoder: lpips_weight: expected the package lpips"
    ):
        train_decoder(config_for(tmp_path, autoencoder, data, lpips_weight=1.0))


def _without(name):
    original = __import__

    def find(module, *args, **kwargs):
        if module == name:
            raise ImportError(f"no {name}")
        return original(module, *args, **kwargs)

    return find


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_lowers_all_losses(tmp_path, autoencoder, data, precision):
    config = config_for(
        tmp_path, autoencoder, data, steps=120, adversarial_start=20, lpips_weight=0.5, lr=1e-2,
        posterior="mean", precision=precision,
    )  # fmt: skip
    outcome, reports = trained(config, perceptual=distance)
    assert (outcome.step, outcome.stopped_by) == (120, None)
    assert [r.step for r in reports] == list(range(1, 121))
    for name in ("mse", "lpips"):
        values = [getattr(r, name) for r in reports]
        assert sum(values[-10:]) / 10 < 0.5 * values[0], name
    assert {(r.discriminator, r.adversarial, r.balance) for r in reports[:20]} == {(0.0,) * 3}
    assert all(r.discriminator > 0 and r.balance > 0 for r in reports[20:])
    model = SnapGenDecoder.from_pretrained(tmp_path / "model")
    assert (model.config.scaling_factor, model.config.shift_factor) == (0.5, 0.25)
    # It decodes what the autoencoder encodes, as well as the last steps' losses say.
    x = torch.stack([open_dataset(data)[i][0] for i in range(12)])
    with torch.no_grad():
        z = Autoencoder.load(autoencoder).encode(x)
        error = F.mse_loss(model.decode(z, scaled=True).sample, x)
    assert error < 0.5 * reports[0].mse


def test_samples_of_the_posterior(tmp_path, autoencoder, data):
    """Other ones in every step, the same in every run."""
    config = config_for(tmp_path, autoencoder, data)
    run = decoders.Run(config, Checkpoints(tmp_path / "c"), None)
    x, z = torch.rand(2, 3, 16, 16), []
    for run.step in (1, 1, 2):
        z.append(run._latents(x, x))
    assert torch.equal(z[0], z[1])
    assert not torch.equal(z[0], z[2])
    posterior = run.autoencoder.module.encode(x).latent_dist
    assert ((z[0] - posterior.mean) / posterior.std).std().item() == pytest.approx(1, abs=0.3)


def test_the_discriminator_learns(tmp_path, autoencoder, data):
    config = config_for(
        tmp_path, autoencoder, data, steps=40, adversarial_start=0, lr=1e-6, discriminator_lr=1e-2
    )
    losses = [r.discriminator for r in trained(config)[1]]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_resumed_run_repeats_the_losses(tmp_path, autoencoder, data):
    """Before the discriminator comes in, and after: bit for bit."""
    whole = config_for(tmp_path / "whole", autoencoder, data)
    outcome, want = trained(whole)
    assert outcome.checkpoint.name == "step-00000006"
    for first in (2, 4):
        part = dataclasses.replace(whole, out=tmp_path / f"part{first}", save_every=100)
        got = trained(dataclasses.replace(part, steps=first))[1]
        with pytest.raises(ValueError, match="train_decoder: out: expected a new folder, or --res"):
            train_decoder(part)
        got += trained(part, resume=True)[1]
        assert got == want
        weights = [(c.out / "model" / "model.safetensors").read_bytes() for c in (whole, part)]
        assert weights[0] == weights[1]


def test_a_signal_saves_and_stops(tmp_path, autoencoder, data):
    config = config_for(tmp_path, autoencoder, data, save_every=100)

    def stop(report):
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = train_decoder(config, on_step=stop)
    assert (outcome.step, outcome.stopped_by) == (2, "SIGTERM")
    assert outcome.checkpoint.name == "step-00000002"
    assert not (tmp_path / "model").exists()
    assert train_decoder(config, resume=True).step == 6


def test_a_checkpoint_is_whole_or_not_there(tmp_path, autoencoder, data, monkeypatch):
    config = config_for(tmp_path, autoencoder, data, save_every=2)
    write = ModelRecipe.write

    def full(self, folder):
        if "step-00000004" in str(folder):
            raise OSError("disk full")
        write(self, folder)

    monkeypatch.setattr(ModelRecipe, "write", full)
    with pytest.raises(CheckpointError, match=r"disk full.*last good checkpoint: .*step-00000002"):
        train_decoder(config)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    train_decoder(config, resume=True)
    assert [p.name for p in Checkpoints(tmp_path / "checkpoints").all()] == [
        "step-00000004", "step-00000006",
    ]  # fmt: skip


def test_what_is_not_finite_is_not_saved(tmp_path, autoencoder, data):
    config = config_for(tmp_path, autoencoder, data, save_every=1)
    broken = []

    def nan_from_the_third(y, x):
        broken.append(1)
        return distance(y, x) * (float("nan") if len(broken) > 2 else 1)

    config = dataclasses.replace(config, lpips_weight=1.0)
    with pytest.raises(NotFinite, match=r"step 3: .*lpips nan.*last good .*step-00000002"):
        train_decoder(config, perceptual=nan_from_the_third)
    assert Checkpoints(tmp_path / "checkpoints").latest().name == "step-00000002"


def test_a_checkpoint_of_another_decoder(tmp_path, autoencoder, data):
    config = config_for(tmp_path, autoencoder, data, steps=1)
    train_decoder(config)
    other = dataclasses.replace(MODEL, expansion=3)
    with pytest.raises(ValueError, match="does not fit this run: expansion: saved 2, now 3"):
        train_decoder(dataclasses.replace(config, model=other), resume=True)


# --- Latents that were encoded before -------------------------------------------------------------


@pytest.fixture
def latents(tmp_path, autoencoder, data):
    folder = tmp_path / "latents"
    encode(EncodeConfig(folder, autoencoder, data, dtype="fp32", device="cpu"))
    return folder


def test_encoded_latents_train_alike(tmp_path, autoencoder, data, latents):
    """Those of a batch of one or of four pictures differ by rounding."""
    config = config_for(tmp_path / "a", autoencoder, data, posterior="mean")
    want = trained(config)[1]
    config = dataclasses.replace(config, out=tmp_path / "b", autoencoder=None, latents=latents)
    for g, w in zip(trained(config)[1], want, strict=True):
        assert g.mse == pytest.approx(w.mse, rel=1e-3)
    model = SnapGenDecoder.from_pretrained(tmp_path / "b" / "model")
    assert (model.config.scaling_factor, model.config.shift_factor) == (0.5, 0.25)


def test_latents_of_other_data(tmp_path, autoencoder, data, latents):
    config = config_for(tmp_path / "a", autoencoder, DataConfig("latents", root=latents))
    with pytest.raises(
        ValueError, match=r"data: expected pictures \[1 or 3, H, W\], got \[4, 4, 4"
    ):
        train_decoder(config)
    config = config_for(tmp_path / "a", None, data, latents=latents)
    with pytest.raises(ValueError, match=r"data\.flip: expected False with latents"):
        train_decoder(dataclasses.replace(config, data=dataclasses.replace(data, flip=True)))
    for i in range(12):
        save(tmp_path / "larger" / f"{i:02}.png", pixels(32, 32, seed=i))
    larger = DataConfig("images", root=tmp_path / "larger", size=32)
    with pytest.raises(ValueError, match=r"block_out_channels: expected .* a factor of 8, got 3"):
        train_decoder(dataclasses.replace(config, data=larger))
    save(data.root / "extra.png", pixels(16, 16))
    try:
        with pytest.raises(ValueError, match=r"latents: .* data, 13 samples, got 12 of 12 samples"):
            train_decoder(config)
    finally:
        (data.root / "extra.png").unlink()


# --- Bad configurations ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoencoder": None}, "autoencoder: expected it or latents, got none"),
        ({"latents": "z"}, "autoencoder: expected it or latents, got both"),
        ({"optimizer": AdamWConfig(lr=0.0)}, "optimizer.lr: expected a positive number, got 0.0"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"adversarial_weight": -1.0}, "adversarial_weight: expected at least 0, got -1.0"),
        ({"mse_weight": 0.0}, "mse_weight: expected a positive number without lpips_weight"),
        ({"model": DecoderModelConfig()}, "block_out_channels: expected .* factor of 4, got 4"),
    ],
)
def test_bad_configurations(tmp_path, autoencoder, data, changes, message):
    config = config_for(tmp_path, autoencoder, data)
    with pytest.raises(ValueError, match=f"train_decoder: (model\\.)?{message}"):
        train_decoder(dataclasses.replace(config, **changes))
    assert not any(tmp_path.iterdir())


def test_latents_scaled_by_channel(tmp_path, data):
    kl(latents_mean=[0.0, 1, 2, 3], latents_std=[1.0] * 4).save_pretrained(tmp_path / "vae")
    config = config_for(tmp_path / "out", tmp_path / "vae", data)
    with pytest.raises(ValueError, match="shift_factor: expected one number for all channels"):
        train_decoder(config)


# --- Command --------------------------------------------------------------------------------------


def test_command(tmp_path, autoencoder, data, capsys):
    pytest.importorskip("tyro")
    out = tmp_path / "run"
    command = ["decoder", "--out", str(out)]
    full = ["--autoencoder", str(autoencoder), "--data.name", "images", "--data.size", "16"]
    full += ["--data.root", str(data.root), "--lpips-weight", "0", "--adversarial-start", "1"]
    full += ["--model.block-out-channels", "8", "8", "8", "--model.layers-per-block", "1", "1", "1"]
    full += ["--steps", "2", "--batch", "2", "--workers", "0", "--device", "cpu"]
    assert main([*command, *full]) == 0
    text = capsys.readouterr().out
    assert f"trained 2 steps; the decoder: {out / 'model'}" in text
    assert "step 1  mse " in text
    assert main([*command, "--resume", "--steps", "3"]) == 0  # the rest is the folder's
    assert "trained 3 steps" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["steps"] == 3
    assert SnapGenDecoder.from_pretrained(out / "model").factor == 4
    assert main([*command, *full]) == 2
    assert "expected a new folder, or --resume" in capsys.readouterr().err
