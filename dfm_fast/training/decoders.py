"""A small decoder for the latents of an autoencoder, which is frozen (SnapGen, arXiv 2412.09619).

    loss = mse_weight MSE(y, x) + lpips_weight LPIPS(y, x) + weight lambda G(y),   y = decode(z)

x are pictures, z their latents, G the generator's hinge loss. lambda is VQGAN's (arXiv 2012.09841),
|gradient of the first two| / |gradient of G|, but of y and not of the last layer: there the losses
meet, so that each network is walked back once, and `adversarial_weight` is what G adds to the
gradient of y, as a share of the others' norm.

One process. As in `loop`, what is drawn is a function of the seed and of the step: a run that was
resumed repeats the losses of one that was not stopped.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from dfm_fast import _checks
from dfm_fast.models import SnapGenDecoder
from dfm_fast.models._pretrained import write_bytes
from dfm_fast.ops._philox import fold
from dfm_fast.training import orders
from dfm_fast.training.checkpoints import Checkpoints, load, step_of
from dfm_fast.training.config import AdamWConfig, check_optimizer, to_json
from dfm_fast.training.datasets import DataConfig, Dataset, open_dataset
from dfm_fast.training.discriminators import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
)
from dfm_fast.training.distributed import World
from dfm_fast.training.encoders import Autoencoder
from dfm_fast.training.latents import Latents
from dfm_fast.training.loop import CHECKPOINTS, CONFIG, EXPORT, Outcome, learning_rate
from dfm_fast.training.monitors import NotFinite, caught_signals
from dfm_fast.training.recipes import ModelRecipe

Perceptual = Callable[[Tensor, Tensor], Tensor]  # pictures in [-1, 1] -> distances
LARGEST = 1e4  # lambda, as VQGAN's


@dataclass(frozen=True)
class DecoderModelConfig:
    """`SnapGenDecoder`; channels and scale are those of the latents."""

    block_out_channels: tuple[int, ...] = (32, 64, 128, 240)
    """Widths, the largest maps first; as many as the autoencoder has resolutions."""

    layers_per_block: tuple[int, ...] = (1, 2, 3, 4)
    expansion: int = 2


@dataclass(frozen=True)
class DecoderConfig:
    """Train a small decoder for the latents of a frozen autoencoder."""

    out: Path
    """Folder of checkpoints and of the exported decoder."""

    autoencoder: Path | None = None
    """Folder of diffusers' autoencoder, which encodes the pictures of every batch. Or:"""

    latents: Path | None = None
    """Folder that `dfm-fast encode` wrote of the same data."""

    data: DataConfig = field(default_factory=DataConfig)
    model: DecoderModelConfig = field(default_factory=DecoderModelConfig)

    posterior: Literal["mean", "sample"] = "sample"
    """Of the autoencoder: the latents of a batch are its mean, or a sample."""

    mse_weight: float = 1.0

    lpips_weight: float = 1.0
    """Of LPIPS by the package lpips, which has to be installed; 0 is without."""

    adversarial_weight: float = 0.5
    """Norm of the adversarial gradient of a picture, as a share of the others'; 0 is without."""

    adversarial_start: int = 20_000
    """Steps before the discriminator comes in."""

    discriminator_width: int = 64

    steps: int = 200_000
    batch: int = 16
    optimizer: AdamWConfig = field(
        default_factory=lambda: AdamWConfig(lr=2e-4, weight_decay=0.0, warmup=1_000)
    )

    discriminator_lr: float = 2e-4
    """Its warm-up and schedule are the optimizer's."""

    seed: int = 0
    save_every: int = 5_000
    keep: int = 2
    """Checkpoints that are kept, the newest."""

    workers: int = 4
    """Processes that load data."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: all networks compute in it; weights, optimizers and losses stay in float32."""


@dataclass(frozen=True)
class DecoderReport:
    """Of a step; 0 for what it had no part in."""

    step: int  # of the first: 1
    mse: float
    lpips: float
    adversarial: float  # G, without a weight
    discriminator: float
    balance: float  # lambda
    grad_norm: float  # of the decoder, before it was clipped


# --- Losses ---------------------------------------------------------------------------------------


def lpips(device: torch.device) -> Perceptual:
    """LPIPS with VGG's features, frozen.

    Raises:
        ImportError: no package lpips.
    """
    try:
        import lpips as library
    except ImportError as error:
        raise ImportError(
            f"train_decoder: lpips_weight: expected the package lpips, got none ({error}): install "
            "it with torchvision, give a `perceptual` of your own, or 0 to do without"
        ) from error
    return library.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)


def balance(gradient: Tensor, adversarial: Tensor) -> Tensor:
    """lambda: what the second is multiplied by to have the norm of the first."""
    return (gradient.norm() / adversarial.norm().clamp_min(1e-12)).clamp_max(LARGEST)


# --- Data -----------------------------------------------------------------------------------------


class Pairs(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """(picture, latents), by the index that both have.

    Raises:
        ValueError: latents of other data, as far as numbers and sizes tell.
    """

    def __init__(self, pictures: Dataset, latents: Latents) -> None:
        op, count, info = "train_decoder", len(pictures), latents.info
        if (info.samples, len(latents)) != (count, count):
            got = f"{len(latents)} of {info.samples} samples"
            _checks.fail(op, "latents", f"those of the data, {count} samples", got)
        self.pictures, self.latents = pictures, latents

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pictures[index][0], self.latents[index][0]


def single(op: str, name: str, values: Any) -> float:
    """A number that all channels share."""
    values = set(map(float, values))
    if len(values) != 1:
        _checks.fail(op, name, "one number for all channels of the latents", sorted(values))
    return values.pop()


# --- Training -------------------------------------------------------------------------------------


def train_decoder(
    config: DecoderConfig,
    *,
    resume: bool = False,
    perceptual: Perceptual | None = None,
    on_step: Callable[[DecoderReport], None] | None = None,
) -> Outcome:
    """Train to `config.steps`, in one process, and export to `config.out / "model"`.

    Args:
        config: see `DecoderConfig`.
        resume: go on from the last checkpoint in `config.out`, if there is one; without it such a
            folder is an error.
        perceptual: a distance of pictures in [-1, 1], differentiable in the first, in place of the
            package lpips; a module of it is used as it is.
        on_step: called with every step's report.

    Raises:
        ValueError: configuration; a checkpoint of another decoder (named).
        ImportError: no lpips. FileNotFoundError: no autoencoder or latents.
        NotFinite: an inf or nan, with the step and the last good checkpoint.
        CheckpointError: one that could not be written.
    """
    check(config)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    world = World(0, 1, torch.device(device))
    checkpoints = Checkpoints(config.out / CHECKPOINTS, config.keep, world)
    if not resume and (last := checkpoints.latest()) is not None:
        _checks.fail("train_decoder", "out", "a new folder, or --resume", f"one with {last.name}")
    if config.lpips_weight and perceptual is None:
        perceptual = lpips(world.device)
    run = Run(config, checkpoints, perceptual)
    with caught_signals() as signals:
        return run.train(signals, on_step)


def check(config: DecoderConfig) -> None:
    """Raise ValueError where numbers make no sense; those of the decoder are its own."""
    op = "train_decoder"
    for name, least in (
        ("steps", 0), ("batch", 1), ("adversarial_start", 0), ("save_every", 1),
        ("keep", 1), ("workers", 0), ("seed", 0),
    ):  # fmt: skip
        _checks.integer(op, name, getattr(config, name), least)
    check_optimizer(op, config.optimizer)
    for name in ("mse_weight", "lpips_weight", "adversarial_weight", "discriminator_lr"):
        if not getattr(config, name) >= 0:
            _checks.fail(op, name, "at least 0", getattr(config, name))
    if not config.mse_weight + config.lpips_weight > 0:
        _checks.fail(op, "mse_weight", "a positive number without lpips_weight", config.mse_weight)
    if (config.autoencoder is None) == (config.latents is None):
        got = "none" if config.latents is None else "both"
        _checks.fail(op, "autoencoder", "it or latents", got)
    if config.latents is not None and config.data.flip:
        expected = "False with latents: those of a mirrored picture are others"
        _checks.fail(op, "data.flip", expected, True)


class Run:
    """A run's decoder, discriminator, optimizers and place."""

    def __init__(
        self, config: DecoderConfig, checkpoints: Checkpoints, perceptual: Perceptual | None
    ) -> None:
        self.config, self.checkpoints, self.perceptual = config, checkpoints, perceptual
        self.device = checkpoints.world.device
        self.autoencoder: Autoencoder | None = None
        self.dataset, arguments = self._source()
        torch.manual_seed(config.seed)
        self.decoder = SnapGenDecoder(**arguments).to(self.device).train()
        self.recipe = ModelRecipe("train_decoder", dict(self.decoder.config))
        self.discriminator = PatchDiscriminator(width=config.discriminator_width).to(self.device)
        self.optimizer = torch.optim.AdamW([config.optimizer.group(self.decoder.parameters())])
        # Little momentum, as VQGAN's: what it learns from changes.
        self.opponent = torch.optim.AdamW(
            self.discriminator.parameters(), config.discriminator_lr, (0.5, 0.9), weight_decay=0.0
        )
        self.step = 0
        if (last := checkpoints.latest()) is not None:
            self.recipe.check_same(last)
            self._load(last)
        config.out.mkdir(parents=True, exist_ok=True)
        write_bytes(config.out / CONFIG, (json.dumps(to_json(config), indent=2) + "\n").encode())

    def _source(self) -> tuple[orders.Items, dict[str, Any]]:
        """The data, and the arguments of a decoder of its latents."""
        op, config = "train_decoder", self.config
        pictures = open_dataset(config.data)
        if len(pictures.shape) != 3 or pictures.shape[0] not in (1, 3):
            _checks.fail(op, "data", "pictures [1 or 3, H, W]", list(pictures.shape))
        dataset: orders.Items = pictures
        scale: Any  # a number of every channel, or of all
        shift: Any
        if config.latents is not None:
            dataset = pairs = Pairs(pictures, Latents(config.latents))
            info = pairs.latents.info
            channels, factor = info.shape[0], pictures.shape[-1] / info.shape[-1]
            scale, shift = info.scale, info.shift
        else:
            assert config.autoencoder is not None  # as `check` has it
            self.autoencoder = own = Autoencoder.load(config.autoencoder, self.device)
            own.module.requires_grad_(False)
            channels, factor = own.module.config.latent_channels, own.factor
            scale, shift = own.scale, own.shift
        stages = len(config.model.block_out_channels)
        if factor != 2 ** (stages - 1):
            expected = f"as many widths as make a factor of {factor:g}"
            _checks.fail(op, "model.block_out_channels", expected, stages)
        given = {"scaling_factor": scale, "shift_factor": shift}
        numbers = {name: single(op, name, values) for name, values in given.items()}
        model = dataclasses.asdict(config.model)
        return dataset, {"latent_channels": channels, **model, **numbers}

    @property
    def has_opponent(self) -> bool:
        """Whether the discriminator has come in."""
        return self._opposed(self.step)

    def _opposed(self, step: int) -> bool:
        return self.config.adversarial_weight > 0 and step > self.config.adversarial_start

    # --- Steps ---

    def train(self, signals: list[str], on_step: Callable[[DecoderReport], None] | None) -> Outcome:
        config, saved = self.config, self.checkpoints.latest()
        for x, given in self._batches():
            report = self._step(x, given)
            if on_step is not None:
                on_step(report)
            stop, done = bool(signals), self.step == config.steps
            if stop or done or self.step % config.save_every == 0:
                saved = self.save()
            if stop and not done:
                return Outcome(self.step, saved, signals[0])
        self.decoder.save_pretrained(config.out / EXPORT)
        return Outcome(self.step, saved)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures, and their latents or labels."""
        config = self.config
        ordered = orders.Ordered(self.dataset, config.seed, config.data.flip, 0.0, 0)
        first, left = self.step * config.batch, config.steps - self.step
        slices = orders.Slices(first, left, config.batch, 1, 0, 1)
        loader = orders.loader(ordered, slices, config.workers, self.device.type == "cuda")
        for x, given in loader:
            x = x.to(self.device, non_blocking=True).expand(-1, 3, -1, -1)
            yield x, given.to(self.device, non_blocking=True)

    def _step(self, x: Tensor, given: Tensor) -> DecoderReport:
        config = self.config
        self.step += 1
        y = self._decode(self._latents(x, given))
        gradient, numbers = self._gradient(y.detach().requires_grad_(), x)
        y.backward(gradient)
        norm = nn.utils.clip_grad_norm_(
            self.decoder.parameters(), config.optimizer.clip or math.inf
        )
        if self.has_opponent:
            numbers["discriminator"] = self._oppose(x, y.detach())
        values = torch.stack([v.detach().float() for v in (*numbers.values(), norm)]).tolist()
        if not all(map(math.isfinite, values)):
            self._fail(dict(zip((*numbers, "grad_norm"), values, strict=True)))
        lr = learning_rate(config.optimizer, self.step - 1, config.steps)
        for optimizer, share in self._optimizers():
            optimizer.param_groups[0]["lr"] = lr * share
            optimizer.step()
            optimizer.zero_grad()
        return DecoderReport(self.step, *values)

    def _optimizers(self) -> list[tuple[torch.optim.Optimizer, float]]:
        """Those that take part in a step, and their learning rates over the decoder's."""
        share = self.config.discriminator_lr / self.config.optimizer.lr
        both: list[tuple[torch.optim.Optimizer, float]]
        both = [(self.optimizer, 1.0), (self.opponent, share)]
        return both[: 1 + self.has_opponent]

    def _gradient(self, y: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """That of y, a leaf, and the losses."""
        config, zero = self.config, y.new_zeros(())
        numbers = {"mse": F.mse_loss(y, x), "lpips": zero, "adversarial": zero}
        numbers |= {"discriminator": zero, "balance": zero}
        loss = config.mse_weight * numbers["mse"]
        if config.lpips_weight:
            assert self.perceptual is not None  # see `train_decoder`
            with self._narrow():
                numbers["lpips"] = self.perceptual(y, x).float().mean()
            loss = loss + config.lpips_weight * numbers["lpips"]
        (gradient,) = torch.autograd.grad(loss, y)
        if self.has_opponent:
            with self._narrow():
                logits = self.discriminator(y)
            numbers["adversarial"] = generator_loss(logits.float())
            (adversarial,) = torch.autograd.grad(numbers["adversarial"], y)
            numbers["balance"] = balance(gradient, adversarial)
            gradient = gradient + config.adversarial_weight * numbers["balance"] * adversarial
        return gradient, numbers

    def _oppose(self, x: Tensor, y: Tensor) -> Tensor:
        """The discriminator's loss; its gradients are there."""
        with self._narrow():
            logits = self.discriminator(torch.cat((x, y)))
        loss = discriminator_loss(*logits.float().chunk(2))
        loss.backward()
        return loss

    @torch.no_grad()
    def _latents(self, x: Tensor, given: Tensor) -> Tensor:
        """z, as the decoder takes it."""
        if self.autoencoder is None:
            return self.decoder.unscale(given)
        generator = None
        if self.config.posterior == "sample":
            seed = fold(self.config.seed, self.step) % (1 << 63)
            generator = torch.Generator(self.device).manual_seed(seed)
        with self._narrow():
            latents = self.autoencoder.encode(x, generator)
        return self.decoder.unscale(latents.float())

    def _decode(self, z: Tensor) -> Tensor:
        """float32; autocast does not reach into the library's operators, which keep the dtype of
        what they are given."""
        if self.config.precision == "fp32":
            return self.decoder(z)
        weights = {name: p.bfloat16() for name, p in self.decoder.named_parameters()}
        return torch.func.functional_call(self.decoder, weights, z.bfloat16()).float()

    @contextmanager
    def _narrow(self) -> Iterator[None]:
        with torch.autocast(self.device.type, torch.bfloat16, self.config.precision == "bf16"):
            yield

    def _fail(self, numbers: dict[str, float]) -> None:
        shown = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
        last = self.checkpoints.latest() or "none"
        raise NotFinite(f"step {self.step}: {shown}; the last good checkpoint: {last}")

    # --- Saving ---

    def _parts(self, step: int) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
        """The discriminator's part is saved once it has come in: before, it is what the seed
        makes it, and its optimizer has no state."""
        parts: dict[str, tuple[nn.Module, torch.optim.Optimizer]]
        parts = {"decoder": (self.decoder, self.optimizer)}
        if self._opposed(step):
            parts["discriminator"] = (self.discriminator, self.opponent)
        return parts

    def _state(self, step: int) -> dict[str, Any]:
        state: dict[str, Any] = {"progress": {"step": step}}
        for name, (module, optimizer) in self._parts(step).items():
            moments = get_optimizer_state_dict(module, optimizer)["state"]
            state[name] = {"model": module.state_dict(), "optimizer": moments}
        return state

    def save(self) -> Path:
        return self.checkpoints.save(self.step, self._state(self.step), self.recipe)

    def _load(self, path: Path) -> None:
        self.step = step_of(path)
        state = load(path, self._state(self.step))
        for name, (module, optimizer) in self._parts(self.step).items():
            module.load_state_dict(state[name]["model"])
            whole = get_optimizer_state_dict(module, optimizer)
            whole["state"] = state[name]["optimizer"]
            set_optimizer_state_dict(module, optimizer, whole)
