"""Autoencoders: what is written is what they give, resumed or not; scaling of latents."""

import dataclasses
import json
import os
import pickle
import signal

import pytest
import torch
from PIL import Image
from test_datasets import pixels, ramp, save

from dfm_fast._library import INTERPRET
from dfm_fast.cli import main
from dfm_fast.training import encoders, latents, videos
from dfm_fast.training.datasets import DataConfig, open_dataset
from dfm_fast.training.encoders import Autoencoder, EncodeConfig, encode
from dfm_fast.training.equivariance import (
    EquivarianceConfig,
    finetune,
    halved,
    scale_equivariance_loss,
)

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(INTERPRET, reason="no kernels in it")

BLOCKS = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4}


def kl(**config):
    down, up = ["DownEncoderBlock2D"] * 3, ["UpDecoderBlock2D"] * 3
    return diffusers.AutoencoderKL(
        **BLOCKS, down_block_types=down, up_block_types=up, latent_channels=4, **config
    )


def tiny():
    blocks = {f"{k}_block_out_channels": (8, 8) for k in ("encoder", "decoder")}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return diffusers.AutoencoderTiny(**blocks, **counts)


def cogvideo():
    down, up = ["CogVideoXDownBlock3D"] * 3, ["CogVideoXUpBlock3D"] * 3
    return diffusers.AutoencoderKLCogVideoX(
        **BLOCKS, down_block_types=down, up_block_types=up, layers_per_block=1, latent_channels=4
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Name -> a saved autoencoder."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp(name)
            {"kl": kl, "tiny": tiny, "cogvideo": cogvideo}[name]().save_pretrained(made[name])
        return made[name]

    return get


# --- Autoencoders ---------------------------------------------------------------------------------


@torch.no_grad()
def test_latents_are_scaled_as_the_configuration_says(folder):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    autoencoder = Autoencoder.load(folder("kl"))
    z = autoencoder.module.encode(x).latent_dist.mode()
    assert torch.allclose(autoencoder.encode(x), z * 0.18215)
    assert torch.allclose(
        autoencoder.decode(z * 0.18215), autoencoder.module.decode(z).sample, atol=1e-5
    )
    flux = Autoencoder(kl(scaling_factor=0.5, shift_factor=0.25))
    z = flux.module.encode(x).latent_dist.mode()
    assert torch.allclose(flux.encode(x), (z - 0.25) * 0.5)
    own = Autoencoder(kl(latents_mean=[1.0, 2, 3, 4], latents_std=[2.0, 2, 4, 4], scaling_factor=1))
    z = own.module.encode(x).latent_dist.mode()
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in ((1, 2, 3, 4), (2, 2, 4, 4)))
    assert torch.allclose(own.encode(x), (z - mean) / std)


@torch.no_grad()
@pytest.mark.parametrize("name", ["kl", "tiny"])
def test_videos_go_through_image_autoencoders_frame_by_frame(folder, name):
    autoencoder = Autoencoder.load(folder(name))
    x = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    z = autoencoder.encode(x)
    assert z.shape == (2, 4, 3, 16 // autoencoder.factor, 16 // autoencoder.factor)
    assert torch.allclose(z[:, :, 1], autoencoder.encode(x[:, :, 1]), atol=1e-6)
    assert autoencoder.decode(z).shape == x.shape


@torch.no_grad()
def test_grey_becomes_three_channels(folder):
    autoencoder = Autoencoder.load(folder("kl"))
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(autoencoder.encode(x), autoencoder.encode(x.expand(-1, 3, -1, -1)))


def test_bad_autoencoders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder with an autoencoder's config"):
        Autoencoder.load(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match=r"_class_name in .*: expected one of AutoencoderKL, "):
        Autoencoder.load(tmp_path)
    with pytest.raises(ValueError, match="x: expected sides that 4 divides"):
        Autoencoder.load(folder("kl")).encode(torch.zeros(1, 3, 16, 18))
    with pytest.raises(ValueError, match=r"x: expected \[N, C, T, H, W\]"):
        Autoencoder.load(folder("cogvideo")).encode(torch.zeros(1, 3, 16, 16))


# --- Encoding -------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    for i in range(7):
        save(tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png", pixels(16, 16, seed=i))
    return DataConfig("images", root=tmp_path / "pictures", size=16)


def config_for(folder, tmp_path, data, **changes):
    return EncodeConfig(
        out=tmp_path / "latents", autoencoder=folder, data=data, device="cpu",
        **{"batch": 2, "shard": 3, "dtype": "fp32", **changes},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_latents_on_disk_are_the_autoencoders(folder, tmp_path, pictures, dtype):
    config = config_for(folder("kl"), tmp_path, pictures, dtype=dtype)
    info = encode(config)
    assert (info.samples, info.shards, info.shape) == (7, 3, (4, 4, 4))
    data = open_dataset(DataConfig("latents", root=config.out))
    source, autoencoder = open_dataset(pictures), Autoencoder.load(folder("kl"))
    assert (len(data), data.class_names, data.shape) == (7, ("a", "b"), (4, 4, 4))
    for i in (6, 0, 3):
        x, label = source[i]
        with torch.no_grad():
            z = autoencoder.encode(x[None])[0]
        got, got_label = data[i]
        assert got.dtype == torch.float32
        assert got_label == label
        stored = encoders.DTYPES[dtype]
        # One rounding of what is stored; batches of other sizes may sum in another order.
        assert (got - z).abs().max() <= torch.finfo(stored).eps * z.abs().max() + 1e-6
    with pytest.raises(IndexError):
        data[7]


def test_finished_shards_are_kept_and_the_rest_is_made(folder, tmp_path, pictures):
    config = config_for(folder("kl"), tmp_path, pictures, posterior="sample")
    encode(config)
    whole = [p.read_bytes() for p in sorted(config.out.glob("*.safetensors"))]
    latents.shard_path(config.out, 1).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected 3 shards, got .* without shard-00001"):
        open_dataset(DataConfig("latents", root=config.out))
    kept = latents.shard_path(config.out, 0)
    before = kept.stat().st_mtime_ns
    encode(config)
    assert kept.stat().st_mtime_ns == before
    assert [p.read_bytes() for p in sorted(config.out.glob("*.safetensors"))] == whole
    assert len(list(config.out.iterdir())) == 4  # nothing temporary is left


def test_latents_of_something_else_are_not_mixed(folder, tmp_path, pictures):
    config = config_for(folder("kl"), tmp_path, pictures)
    encode(config)
    for change in ({"shard": 4}, {"dtype": "fp16"}, {"seed": 1}, {"autoencoder": folder("tiny")}):
        with pytest.raises(ValueError, match="encode: out: expected a new folder"):
            encode(dataclasses.replace(config, **change))


def test_unreadable_pictures_are_left_out(folder, tmp_path, pictures):
    path = pictures.root / "a" / "2.png"
    path.write_bytes(path.read_bytes()[:200])
    config = config_for(folder("tiny"), tmp_path, pictures)
    with pytest.warns(UserWarning, match=r"2.png: unreadable"):
        encode(config)
    data = open_dataset(DataConfig("latents", root=config.out))
    assert len(data) == 6
    assert [data[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert data.num_classes == 2


def test_videos_through_cogvideo(folder, tmp_path):
    (tmp_path / "clips").mkdir()
    videos.write_clip(tmp_path / "clips" / "a.mp4", ramp(10))
    data = DataConfig("videos", root=tmp_path / "clips", size=16, frames=9)
    config = config_for(folder("cogvideo"), tmp_path, data)
    assert encode(config).shape == (4, 3, 4, 4)
    x, _ = open_dataset(DataConfig("latents", root=config.out))[0]
    decoded = Autoencoder.load(folder("cogvideo")).decode(x[None])
    assert decoded.shape == (1, 3, 9, 16, 16)


def test_command(folder, tmp_path, pictures, capsys):
    command = ["encode", "--autoencoder", str(folder("tiny")), "--out", str(tmp_path / "z")]
    command += ["--data.name", "images", "--data.root", str(pictures.root), "--data.size", "16"]
    assert main(command) == 0
    assert "7 latents [4, 8, 8] in 1 shards" in capsys.readouterr().out
    assert json.loads((tmp_path / "z" / "latents.json").read_text())["scale"] == [1.0]
    command[2] = str(tmp_path)
    assert main(command) == 2
    assert "dfm-fast encode: Autoencoder.load: folder: expected" in capsys.readouterr().err


def test_what_loader_processes_are_sent_can_be_pickled(folder, tmp_path, pictures):
    """As all ways to start them but fork do."""
    config = config_for(folder("kl"), tmp_path, pictures, workers=1)
    loader = encoders._loader(config, open_dataset(pictures), range(3))
    data, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    assert len(collate([data[0], None, data[1]])) == 2


@pytest.mark.parametrize("command", ["encode", "equivariance"])
def test_a_place_that_cannot_be_written_to_is_told_before_any_work(tmp_path, capsys, command):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        # There is no such autoencoder: it was not looked for yet.
        assert main([command, "--autoencoder", str(tmp_path / "vae"), "--out", str(out)]) == 2
        line = f"dfm-fast {command}: out: expected a folder, got {out}: {tmp_path / 'file'} is none"
        assert capsys.readouterr().err == line + "\n"


def test_a_gpu_that_is_not_there(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["--autoencoder", str(folder("tiny")), "--out", str(tmp_path / "z")]
    for command in ("encode", "equivariance"):
        assert main([command, *options, "--device", "cuda"]) == 2
        line = f"dfm-fast {command}: device: expected cuda on this machine, got none\n"
        assert capsys.readouterr().err == line


def test_damaged_latents_are_named(folder, tmp_path, pictures):
    config = config_for(folder("tiny"), tmp_path, pictures)
    encode(config)
    shard = latents.shard_path(config.out, 1)
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"expected safetensors, got .*shard-00001.*, damaged"):
        open_dataset(DataConfig("latents", root=config.out))
    (config.out / "latents.json").write_text("{")
    with pytest.raises(ValueError, match=r"latents.json: expected JSON, got a damaged file"):
        open_dataset(DataConfig("latents", root=config.out))


def test_no_latents(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder written by dfm-fast encode"):
        open_dataset(DataConfig("latents", root=tmp_path))


# --- Scale equivariance ---------------------------------------------------------------------------


def test_halved_is_the_mean_of_two_by_two():
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(halved(x), torch.nn.functional.avg_pool2d(x, 2), atol=1e-6)
    clip = torch.randn(2, 3, 5, 8, 8)
    assert torch.allclose(halved(clip)[:, :, 2], halved(clip[:, :, 2]), atol=1e-6)


def test_loss_is_what_the_formula_says(folder):
    autoencoder = Autoencoder.load(folder("tiny"))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    losses = scale_equivariance_loss(autoencoder, x, levels=3)
    pool = torch.nn.functional.avg_pool2d
    z = autoencoder.encode(x)
    assert torch.allclose(losses.reconstruction, (autoencoder.decode(z) - x).abs().mean())
    each = [(autoencoder.decode(pool(z, n)) - pool(x, n)).abs().mean() for n in (2, 4)]
    assert torch.allclose(losses.equivariance, (each[0] + each[1]) / 2)
    assert losses.divergence == 0
    total = losses.total(0.5, 1.0)
    assert torch.allclose(total, losses.reconstruction + 0.5 * losses.equivariance)
    with pytest.raises(ValueError, match="x: expected sides that 8 divides"):
        scale_equivariance_loss(autoencoder, x[..., :12], levels=3)


def test_divergence_is_that_of_two_normals(folder):
    autoencoder = Autoencoder.load(folder("kl"))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = autoencoder.module.encode(x).latent_dist
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior.mean, posterior.std), torch.distributions.Normal(0, 1)
    )
    losses = scale_equivariance_loss(autoencoder, x)
    assert torch.allclose(losses.divergence, expected.sum((1, 2, 3)).mean(), rtol=1e-4)


def finetuned(folder, out, **changes):
    data = DataConfig("photos", size=16)
    config = EquivarianceConfig(
        folder, out, data,
        **{"steps": 30, "batch": 4, "lr": 3e-3, "warmup": 2, "precision": "fp32", **changes},
    )  # fmt: skip
    return Autoencoder.load(finetune(config).folder)


@torch.no_grad()
def losses_of(autoencoder):
    data = open_dataset(DataConfig("photos", size=16), "test")
    return scale_equivariance_loss(autoencoder, torch.stack([data[i][0] for i in range(0, 64, 4)]))


def test_finetuning_lowers_the_loss(folder, tmp_path):
    before = losses_of(Autoencoder.load(folder("tiny")))
    without = losses_of(finetuned(folder("tiny"), tmp_path / "a", weight=0.0))
    tuned = losses_of(finetuned(folder("tiny"), tmp_path / "b", weight=1.0))
    assert tuned.reconstruction < 0.7 * before.reconstruction
    assert tuned.equivariance < 0.7 * before.equivariance
    assert tuned.equivariance < without.equivariance


def test_finetuning_of_an_autoencoder_with_a_posterior(folder, tmp_path):
    before = Autoencoder.load(folder("kl"))
    tuned = finetuned(folder("kl"), tmp_path / "a", steps=2, precision="bf16", levels=3)
    assert type(tuned.module) is type(before.module)
    pairs = zip(tuned.module.parameters(), before.module.parameters(), strict=True)
    assert all((a != b).any() for a, b in pairs)  # the loss reaches every parameter


def test_finetuning_stops_at_a_loss_that_is_not_finite(folder, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    data = DataConfig("images", root=tmp_path, size=16)
    config = EquivarianceConfig(
        folder("tiny"), tmp_path / "out", data, steps=5, batch=2, lr=float("inf"), device="cpu"
    )
    with pytest.raises(ValueError, match="finetune: step 1: expected a finite loss"):
        finetune(config)


def test_finetuning_saves_where_a_signal_stops_it(folder, tmp_path):
    """And goes no further; what it saved is the trained autoencoder."""
    data, steps = DataConfig("photos", size=16), []
    config = EquivarianceConfig(
        folder("tiny"), tmp_path, data, steps=500, batch=2, lr=1e-3, warmup=0, device="cpu"
    )

    def interrupt(step, losses):
        steps.append(step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    done = finetune(config, on_step=interrupt)
    assert (done.folder, done.steps, done.stopped_by, steps) == (tmp_path, 2, "SIGTERM", [0, 1])
    before, after = (Autoencoder.load(f).module for f in (folder("tiny"), tmp_path))
    assert any((a != b).any() for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert not list(tmp_path.glob(".tmp-*"))


def test_finetuning_saves_every_so_many_steps(folder, tmp_path):
    data = DataConfig("photos", size=16)
    config = EquivarianceConfig(
        folder("tiny"), tmp_path, data, steps=5, batch=2, save_every=2, device="cpu"
    )

    def broken(step, losses):
        assert (tmp_path / "config.json").exists() == (step >= 2)
        if step == 3:
            raise KeyError("the machine fails")

    with pytest.raises(KeyError):
        finetune(config, on_step=broken)
    Autoencoder.load(tmp_path)


def test_no_clipping_trains_all_the_same(folder, tmp_path):
    tuned = finetuned(folder("tiny"), tmp_path, steps=1, clip=0.0)
    before = Autoencoder.load(folder("tiny"))
    pairs = zip(tuned.module.parameters(), before.module.parameters(), strict=True)
    assert all((a != b).any() for a, b in pairs)
    with pytest.raises(ValueError, match="equivariance: clip: expected at least 0"):
        finetuned(folder("tiny"), tmp_path, clip=-1.0)
