"""Autoencoders of diffusers from a local folder: data to latents on disk, latents to pictures."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.models._pretrained import config_of
from dfm_fast.training.datasets import DataConfig, Dataset, Item, open_dataset, require
from dfm_fast.training.distributed import device_named
from dfm_fast.training.images import Substituting, Unusable
from dfm_fast.training.latents import LatentInfo, shard_path, write_shard
from dfm_fast.training.outputs import check_folder, read_json

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderKLCogVideoX")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


# --- Autoencoders ---------------------------------------------------------------------------------


class Autoencoder:
    """One of diffusers' autoencoders; latents are (z - shift) scale.

    Attributes:
        module: the autoencoder itself.
        scale, shift: [1 or C].
        is_video: whether it takes videos as a whole; others take them frame by frame.
    """

    module: Any  # diffusers has no types

    def __init__(self, module: nn.Module) -> None:
        _checks.choice("Autoencoder", "module", type(module).__name__, CLASSES)
        self.module, config = module, config_of(module)
        self.is_video = type(module).__name__ == "AutoencoderKLCogVideoX"
        mean, std = (getattr(config, f"latents_{k}", None) for k in ("mean", "std"))
        shift = mean if mean is not None else [getattr(config, "shift_factor", None) or 0.0]
        self.shift = torch.tensor(shift, dtype=torch.float32)
        self.scale = config.scaling_factor / torch.tensor(std if std is not None else [1.0])

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> Autoencoder:
        """From a folder with config.json and weights, in eval mode.

        Raises:
            FileNotFoundError: no config.json. ValueError: of another class. ImportError: no
                diffusers.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            expected = "a folder with an autoencoder's config.json"
            raise FileNotFoundError(f"Autoencoder.load: folder: expected {expected}, got {folder}")
        name = read_json(folder / "config.json").get("_class_name")
        name = _checks.choice("Autoencoder.load", f"_class_name in {folder}", name, CLASSES)
        require("diffusers", "diffusers", "Autoencoder.load")
        kind = getattr(importlib.import_module("diffusers"), name)
        options = {"local_files_only": True, "low_cpu_mem_usage": False}
        module = kind.from_pretrained(folder, torch_dtype=torch.float32, **options)
        return cls(module.to(device).eval())

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        config = self.module.config
        blocks = getattr(config, "encoder_block_out_channels", None) or config.block_out_channels
        return 2 ** (len(blocks) - 1)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[N, C, (T,) H, W] in [-1, 1] -> latents: the mean of the posterior; with a generator, a
        sample of it."""
        x, frames = self._folded(self._checked(x))
        posterior = self._posterior(x)
        if isinstance(posterior, Tensor):
            return self._scaled(posterior, frames)
        z = posterior.mode() if generator is None else posterior.sample(generator)
        return self._scaled(z, frames)

    def encode_sampled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(latents, divergence): a sample by the default generator, and the mean over samples of
        the posterior's divergence from the normal distribution; for training."""
        x, frames = self._folded(self._checked(x))
        posterior = self._posterior(x)
        if isinstance(posterior, Tensor):
            return self._scaled(posterior, frames), posterior.new_zeros(())
        mean, variance = posterior.mean.float(), posterior.var.float()
        divergence = 0.5 * (mean.square() + variance - 1 - posterior.logvar.float())
        return self._scaled(posterior.sample(), frames), divergence.flatten(1).sum(1).mean()

    def _posterior(self, x: Tensor) -> Any:
        """A distribution, or the latents of an autoencoder that has none."""
        out = self.module.encode(x)
        return out.latents if hasattr(out, "latents") else out.latent_dist

    def _scaled(self, z: Tensor, frames: int) -> Tensor:
        shift, scale = self._affine(z)
        return _unfolded((z - shift) * scale, frames)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> [N, C, (T,) H, W], about [-1, 1]."""
        z, frames = self._folded(latents)
        shift, scale = self._affine(z)
        return _unfolded(self.module.decode(z / scale + shift).sample, frames)

    def _checked(self, x: Tensor) -> Tensor:
        channels, factor = self.module.config.in_channels, self.factor
        if self.is_video and x.ndim != 5:
            _checks.fail("Autoencoder.encode", "x", "[N, C, T, H, W]", list(x.shape))
        if x.shape[-1] % factor or x.shape[-2] % factor:
            _checks.fail("Autoencoder.encode", "x", f"sides that {factor} divides", list(x.shape))
        if x.shape[1] not in (1, channels):
            _checks.fail("Autoencoder.encode", "x", f"{channels} channels", list(x.shape))
        return x.expand(-1, channels, *x.shape[2:])

    def _folded(self, x: Tensor) -> tuple[Tensor, int]:
        """Frames as further samples, where the autoencoder takes images."""
        if x.ndim == 4 or self.is_video:
            return x, 0
        return x.transpose(1, 2).flatten(0, 1), x.shape[2]

    def _affine(self, z: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, *[1] * (z.ndim - 2))
        return self.shift.to(z.device).view(shape), self.scale.to(z.device).view(shape)


def _unfolded(x: Tensor, frames: int) -> Tensor:
    return x if not frames else x.unflatten(0, (-1, frames)).transpose(1, 2)


# --- Encoding -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodeConfig:
    """Write the latents of a dataset as safetensors shards, to train on with `dfm-fast train
    --data.name latents --data.root OUT`."""

    out: Path
    """Folder of the shards. Those that are there already are kept, so a run can be repeated."""

    autoencoder: Path
    """Folder of diffusers' AutoencoderKL, AutoencoderTiny or AutoencoderKLCogVideoX."""

    data: DataConfig = field(default_factory=DataConfig)
    split: Literal["train", "test"] = "train"

    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Of the latents on disk."""

    posterior: Literal["mean", "sample"] = "mean"
    """Mean of the autoencoder's posterior, or one sample of it per picture."""

    batch: int = 16
    shard: int = 1024
    """Samples per file."""

    seed: int = 0
    """Of the samples of the posterior."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the autoencoder under autocast."""

    workers: int = 0
    """Processes that load data."""


@torch.no_grad()
def encode(config: EncodeConfig, *, progress: bool = False) -> LatentInfo:
    """Encode a dataset. Unreadable files are left out (an error with `config.data.strict`).

    Raises:
        ValueError: the folder holds latents of something else (named).
    """
    for name in ("batch", "shard"):
        _checks.integer("encode", name, getattr(config, name), 1)
    check_folder("encode", config.out)
    device = device_named("encode", config.device)
    autoencoder = Autoencoder.load(config.autoencoder, device)
    dataset = open_dataset(config.data, config.split)
    info = _info(config, autoencoder, dataset)
    _check_same(config.out, info)
    config.out.mkdir(parents=True, exist_ok=True)
    info.write(config.out)
    left = [s for s in range(info.shards) if not shard_path(config.out, s).is_file()]
    for shard in _progress(left, progress):
        _encode_shard(config, autoencoder, dataset, info, shard)
    return info


def _info(config: EncodeConfig, autoencoder: Autoencoder, dataset: Dataset) -> LatentInfo:
    x, _ = dataset[0]
    latent = _latents(config, autoencoder, x[None], None)
    return LatentInfo(
        tuple(latent.shape[1:]),
        len(dataset),
        config.shard,
        config.dtype,
        dataset.class_names,
        type(autoencoder.module).__name__,
        # Of all that the latents depend on.
        fingerprint(
            [autoencoder.module],
            config.data,
            config.split,
            config.posterior,
            config.seed,
            config.precision,
        ),
        tuple(autoencoder.scale.tolist()),
        tuple(autoencoder.shift.tolist()),
    )


def _check_same(folder: Path, info: LatentInfo) -> None:
    try:
        saved = LatentInfo.read(folder)
    except FileNotFoundError:
        return
    wrong = [
        f"{name}: saved {value}, now {getattr(info, name)}"
        for name, value in vars(saved).items()
        if value != getattr(info, name)
    ]
    if wrong:
        got = f"{folder} with latents of something else: " + "; ".join(wrong)
        _checks.fail("encode", "out", "a new folder, or one of the same run", got)


def _encode_shard(
    config: EncodeConfig, autoencoder: Autoencoder, dataset: Dataset, info: LatentInfo, shard: int
) -> None:
    first = shard * info.shard_size
    indices = range(first, min(first + info.shard_size, info.samples))
    generator = None
    if config.posterior == "sample":  # of the shard's own: the same whatever was done before it
        generator = torch.Generator(autoencoder.device).manual_seed(config.seed + (shard << 32))
    latents, items = [torch.empty(0, *info.shape)], []
    for batch in filter(None, _loader(config, dataset, indices)):
        x = torch.stack([x for x, _ in batch])
        latents.append(_latents(config, autoencoder, x, generator).float().cpu())
        items += batch
    write_shard(shard_path(config.out, shard), items, torch.cat(latents).to(DTYPES[config.dtype]))


def _latents(
    config: EncodeConfig, autoencoder: Autoencoder, x: Tensor, generator: torch.Generator | None
) -> Tensor:
    device = autoencoder.device
    with torch.autocast(device.type, torch.bfloat16, config.precision == "bf16"):
        return autoencoder.encode(x.to(device), generator)


class _Readable(torch.utils.data.Dataset[Item | None]):
    """A sample; None where it turns out unreadable: another in its place would be there twice."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Item | None:
        if not isinstance(self.dataset, Substituting) or self.dataset.strict:
            return self.dataset[index]
        try:
            return self.dataset.read(index)
        except Unusable as error:
            self.dataset.leave_out(index, str(error))
            return None


def _readable(items: list[Item | None]) -> list[Item]:  # of the module: workers are sent its name
    return [item for item in items if item is not None]


def _loader(
    config: EncodeConfig, dataset: Dataset, indices: range
) -> torch.utils.data.DataLoader[Any]:
    """Batches of the samples that can be read: some may be empty."""
    return torch.utils.data.DataLoader(
        _Readable(dataset),
        config.batch,
        sampler=indices,
        num_workers=config.workers,
        collate_fn=_readable,
    )


def fingerprint(modules: Iterable[nn.Module], *parts: Any) -> str:
    """Of weights, and of what else there is, by its repr."""
    digest = hashlib.sha256()
    for name, value in (item for module in modules for item in module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(repr(parts).encode())
    return digest.hexdigest()[:16]


def _progress(shards: list[int], show: bool) -> Any:
    if not show:
        return shards
    from tqdm.auto import tqdm

    return tqdm(shards, "encoding", unit="shard")
