r"""From a prompt or a label to a picture: text encoders or class tokens, SnapGen's UNet, a decoder.

The flow is one of a single level (`flow.DecomposableFlow(Laplacian(1))`): x_t = (1 - t) x + t eps,
Euler's steps from t = 1 to 0, N of them, at Stable Diffusion 3's shifted noise levels
(`flow.StageSchedule`). What does not change from step to step is computed before the first one:
keys and values of all texts, conditional and unconditional, by one product, and the time shifts of
all steps by another. Guidance is one call of the UNet on both halves; where its scale is 1 there is
no other half.

States are float32 whatever the UNet's dtype: rounding 28 sums to bfloat16 would show.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.flow import DecomposableFlow, Graphs, Laplacian, StageSchedule
from dfm_fast.models import snapgen_folders, snapgen_requests
from dfm_fast.models._files import arguments_of
from dfm_fast.models.snapgen import SnapGenUNet
from dfm_fast.models.snapgen_requests import Request, finite_number
from dfm_fast.models.text_encoders import TextEncoders
from dfm_fast.models.text_layouts import TextConditions
from dfm_fast.models.text_tables import ClassTokens
from dfm_fast.nn.attentions import KeyValues
from dfm_fast.ops import philox_normal

Callback = Callable[["SnapGenPipeline", int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]


class UNetVelocity:
    """A `SnapGenUNet` as the model of a flow of one level, for its loss and its sampler.

    Args:
        unet: whose parameters may be narrower than the states.

    Conditions: `text`, `key_values` of a text or the text itself with its `mask`; `ids`.
    """

    def __init__(self, unet: SnapGenUNet) -> None:
        self.unet = unet

    def __call__(
        self,
        levels: Sequence[Tensor],
        t: Tensor,
        active: Tensor | None = None,
        *,
        text: Sequence[KeyValues] | Tensor | None = None,
        mask: Tensor | None = None,
        ids: Tensor | None = None,
        modulations: Tensor | None = None,
    ) -> list[Tensor]:
        """levels: one [N, C, H, W]; t [N, 1]; modulations: a row of `modulation_table`."""
        (x,) = levels
        x = x.to(self.unet.conv_in.weight.dtype)
        noise_levels = t[:, 0] if modulations is None else None
        return [self.unet(x, noise_levels, text, mask=mask, ids=ids, shifts=modulations)]

    def modulation_table(
        self,
        t: Tensor,
        active: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """t [K, N, 1], equal for all samples -> time shifts [K, N, ...] of K steps."""
        steps, batch = t.shape[:2]
        if ids is None:
            return self.unet.time_shifts(t[:, :1, 0]).expand(-1, batch, -1)
        return self.unet.time_shifts(t[..., 0], ids.expand(steps, batch, -1))


class Pictures(NamedTuple):
    """What a pipeline returns: `.images` or `[0]`."""

    images: Any  # N of PIL, an array [N, H, W, C], or a tensor [N, C, H, W]


class SnapGenPipeline:
    """Pictures of prompts or of classes.

        pipeline = SnapGenPipeline.from_pretrained("snapgen/", device="cuda", dtype=torch.bfloat16)
        pictures = pipeline("a fox in the snow", num_inference_steps=8, seed=0).images

    Args:
        unet: without `num_ids`.
        decoder: a `SnapGenDecoder`, or diffusers' AutoencoderKL or AutoencoderTiny; None: what the
            UNet makes are pictures, from -1 to 1.
        conditions: `TextEncoders` for prompts (any of the encoders that the UNet was trained with),
            or `ClassTokens` for labels.
        shift: of the noise levels, see `flow.StageSchedule`; Stable Diffusion 3's 3 is for 1024 px.
        sample_size: latents along a side of a picture whose size is not given.
        scaling_factor, shift_factor: the UNet's latents are (z - shift_factor) scaling_factor of
            the decoder's z; None: as the decoder's config has them.

    Raises:
        TypeError, ValueError: parts that are of another class, or do not fit together.
    """

    def __init__(
        self,
        unet: SnapGenUNet,
        decoder: nn.Module | None,
        conditions: TextEncoders | ClassTokens,
        *,
        shift: float = 3.0,
        sample_size: int = 128,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
    ) -> None:
        op = type(self).__name__
        if decoder is None and isinstance(unet, SnapGenUNet):
            decoder = snapgen_folders.Pixels(unet.in_channels)
        self.decoder = _check_parts(op, unet, decoder, conditions).eval()
        self.unet, self.conditions = unet.eval(), conditions
        if isinstance(conditions, nn.Module):
            conditions.eval()
        self.shift = _positive(op, "shift", shift)
        self.sample_size = _checks.integer(op, "sample_size", sample_size, 1)
        config = self.decoder.config
        scale = config.scaling_factor if scaling_factor is None else scaling_factor
        self.scaling_factor = _positive(op, "scaling_factor", scale)
        offset = config.shift_factor if shift_factor is None else shift_factor
        # None in configs of older autoencoders.
        self.shift_factor = finite_number(op, "shift_factor", 0 if offset is None else offset)
        self.flow = DecomposableFlow(Laplacian(1))
        self.velocity, self.graphs = UNetVelocity(self.unet), Graphs()

    # --- Folders ---

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        encoders: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """From a local folder, as `save_pretrained` writes it; nothing is downloaded.

        Args:
            folder: with model_index.json, unet/, decoder/ or vae/, and class_tokens/ or any of
                text_encoder/ and tokenizer/ (CLIP-L), text_encoder_2/ and tokenizer_2/ (CLIP-G),
                text_encoder_3/ and tokenizer_3/ (Gemma).
            encoders: which of its text encoders to load, of "clip_l", "clip_g" and "gemma"; the
                others count as dropped.
            device, dtype: of all parameters; dtype None keeps those that were saved.

        Raises:
            FileNotFoundError: what is missing. ValueError: another pipeline's folder, classes that
                are not known, parts that do not fit. ImportError: vae/ without diffusers, a text
                encoder without transformers.
        """
        op = f"{cls.__name__}.from_pretrained"
        parts = snapgen_folders.load(op, folder, encoders, device, dtype)
        with arguments_of(Path(folder) / snapgen_folders.INDEX):
            return cls(**parts)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write what `from_pretrained` reads. Every file is written under a temporary name and
        renamed, model_index.json last."""
        numbers = {name: getattr(self, name) for name in snapgen_folders.NUMBERS}
        snapgen_folders.save(folder, self.unet, self.decoder, self.conditions, numbers)

    # --- Where it is ---

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move all parts, in place."""
        given: dict[str, Any] = {"device": device, "dtype": dtype}
        given = {name: value for name, value in given.items() if value is not None}
        for part in (self.unet, self.decoder, self.conditions) if given else ():
            part.to(**given)
        return self

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's."""
        return self.unet.conv_in.weight.dtype

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.decoder.config.block_out_channels) - 1)

    @property
    def multiple(self) -> int:
        """What divides the sides of pictures."""
        return self.factor * 2 ** (len(self.unet.channels) - 1)

    # --- Pictures ---

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 4.5,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        progress: bool = False,
        cuda_graph: bool = False,
    ) -> Pictures:
        """Pictures of B prompts or labels: N, `num_images_per_prompt` of each, one after the other.

        Args:
            prompt: one, or B.
            negative_prompt: one for all, or B: what guidance leads away from, in place of no text.
            class_labels: one, or B, in place of prompts; the number of classes is none.
            height, width: in pixels, which `multiple` divides; by default sample_size latents.
            num_inference_steps: at least 1. Distilled models take 4 or 8.
            guidance_scale: w in u + w (c - u); where it is 1, u is not computed.
            guidance_interval: noise levels (low, high) between which there is guidance.
            seed: of the first picture, the next ones have the next numbers; or N. A picture depends
                on its own seed, not on what else is in the batch.
            generator: draws the seeds; or N, each of which draws one. Neither this nor a seed:
                torch's default generator of the CPU does.
            latents: noise [N, C, h, w] to start from, in place of a seed's.
            output_type: "pil"; "np", float32 [N, H, W, C]; "pt", float32 [N, C, H, W], both from 0
                to 1; "latent", [N, C, h, w] of the UNet, float32 (float64 for float64).
            callback_on_step_end: called after each step, as by diffusers, with the pipeline, the
                number of the step, the noise level before it and {"latents": a copy}; "latents" in
                what it returns go on in their place.
            progress: show a bar (needs tqdm).
            cuda_graph: replay a CUDA graph of the step. The first call captures it, at the cost of
                three steps and more; it is kept for calls of the same sizes, steps and guidance.
                Texts are then as long as they can be. `graphs.clear()` frees its memory.

        Raises:
            TypeError, ValueError: arguments, before any work. ImportError: "pil" without Pillow.
        """
        op, given = type(self).__name__, (prompt, negative_prompt, class_labels)
        sizes = num_images_per_prompt, height, width
        request = snapgen_requests.make_request(op, self, *given, *sizes)
        sampling = num_inference_steps, guidance_scale, guidance_interval
        snapgen_requests.check_sampling(op, *sampling)
        snapgen_requests.check_output(op, output_type)
        self._check_loop(callback_on_step_end, cuda_graph)
        noise = self._noise(request, latents, seed, generator)
        options = {"progress": progress, "cuda_graph": self.graphs if cuda_graph else False}
        x = self._sample(request, noise, *sampling, callback_on_step_end, options)
        if output_type == "latent":
            return Pictures(x)
        return Pictures(snapgen_requests.converted(self.decode(x), output_type))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents of the UNet [N, C, h, w] -> pictures [N, 3, H, W], float32, from 0 to 1 (without
        a decoder [N, C, h, w])."""
        z = latents / self.scaling_factor + self.shift_factor
        z = z.to(next((p.dtype for p in self.decoder.parameters()), z.dtype))
        return (self.decoder.decode(z)[0].float() / 2 + 0.5).clamp(0, 1)

    def _noise(self, request: Request, latents: Tensor | None, seed: Any, generator: Any) -> Tensor:
        """[N, C, h, w]"""
        op, shape = type(self).__name__, request.shape
        snapgen_requests.check_latents(op, latents, shape)
        dtype = torch.promote_types(self.dtype, torch.float32)
        if latents is not None:
            return latents.to(self.device, dtype)
        seeds = snapgen_requests.draw_seeds(op, seed, generator, shape[0])
        size, device = (1, *shape[1:]), self.device
        return torch.cat([philox_normal(size, s, dtype=dtype, device=device) for s in seeds])

    # --- Sampling ---

    def _check_loop(self, callback: Any, cuda_graph: bool) -> None:
        op = type(self).__name__
        if callback is not None and not callable(callback):
            got = type(callback).__name__
            _checks.fail(op, "callback_on_step_end", "a function", got, TypeError)
        if cuda_graph and self.device.type != "cuda":
            _checks.fail(op, "cuda_graph", "a CUDA device", self.device)

    def _sample(
        self,
        request: Request,
        noise: Tensor,
        steps: int,
        scale: float,
        interval: tuple[float, float],
        callback: Callback | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Latents like the noise."""
        padded = options["cuda_graph"] is not False
        texts = self._key_values(request, guided=scale != 1, padded=padded)
        if self.velocity.unet is not self.unet:
            self.velocity = UNetVelocity(self.unet)
        return self.flow.sample(
            self.velocity,
            noise.shape,
            steps=steps,
            shift=self.shift,
            cfg_scale=float(scale),
            uncond=texts[1] if len(texts) > 1 else None,
            cfg_interval=(interval[0], interval[1]),
            on_step=None if callback is None else self._on_step(callback, steps),
            noise=[noise],
            device=self.device,
            dtype=noise.dtype,
            **options,
            text=texts[0]["text"],
        )

    @torch.no_grad()
    def _key_values(
        self, request: Request, guided: bool, padded: bool = False
    ) -> list[dict[str, list[KeyValues]]]:
        """Conditions of all N pictures, and (guided) what guidance leads away from: all texts go
        through one product."""
        texts = self._texts(request, guided, padded)
        made = self.unet.key_values(
            torch.cat([part.text for part in texts]), torch.cat([part.mask for part in texts])
        )

        def half(i: int) -> list[KeyValues]:
            rows = slice(i * request.rows, (i + 1) * request.rows)
            return [
                layer.map(lambda v: v[rows].repeat_interleave(request.each, 0)) for layer in made
            ]

        return [{"text": half(i)} for i in range(len(texts))]

    def _texts(self, request: Request, guided: bool, padded: bool) -> list[TextConditions]:
        """Of B rows: the conditions, and (guided) what guidance leads away from. padded: always of
        one length."""
        where: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        if isinstance(self.conditions, ClassTokens):
            labels = torch.tensor(request.labels, device=self.conditions.weight.device)
            found = self.conditions(labels).to(**where)
        elif guided and request.negatives is not None:
            # Together, so that they are of one length.
            texts = [*request.prompts, *request.negatives]
            both = self.conditions.encode(texts, padded=padded, **where)
            halves = zip(both.text.chunk(2), both.mask.chunk(2), strict=True)
            return [TextConditions(*half) for half in halves]
        else:
            found = self.conditions.encode(request.prompts, padded=padded, **where)
        return [found, found.unconditional()] if guided else [found]

    def _on_step(self, callback: Callback, steps: int) -> Callable[[int, list[Tensor]], None]:
        """diffusers' callback as the sampler's."""
        op, t = type(self).__name__, StageSchedule(steps, shift=self.shift).table()[:, 0].tolist()

        def on_step(k: int, levels: list[Tensor]) -> None:
            (x,) = levels
            changed = (callback(self, k, t[k], {"latents": x.clone()}) or {}).get("latents")
            if changed is None:
                return
            if not isinstance(changed, Tensor) or changed.shape != x.shape:
                got = list(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
                _checks.fail(op, "callback_on_step_end", f"latents {list(x.shape)}", got)
            x.copy_(changed)

        return on_step


# --- Parts ----------------------------------------------------------------------------------------


def _check_parts(op: str, unet: Any, decoder: Any, conditions: Any) -> Any:
    """The decoder, ours or diffusers', whose class does not tell a type checker what it has."""
    if not isinstance(unet, SnapGenUNet):
        _checks.fail(op, "unet", "a SnapGenUNet", type(unet).__name__, TypeError)
    if unet.num_ids:
        _checks.fail(op, "unet", "num_ids = 0", unet.num_ids)
    if not hasattr(decoder, "decode") or not hasattr(decoder, "config"):
        expected = "a SnapGenDecoder or an autoencoder of diffusers"
        _checks.fail(op, "decoder", expected, type(decoder).__name__, TypeError)
    if (channels := decoder.config.latent_channels) != unet.in_channels:
        _checks.fail(op, "decoder", f"{unet.in_channels} latent channels like unet", channels)
    if not isinstance(conditions, TextEncoders | ClassTokens):
        got = type(conditions).__name__
        _checks.fail(op, "conditions", "TextEncoders or ClassTokens", got, TypeError)
    dim = conditions.dim if isinstance(conditions, ClassTokens) else conditions.layout.dim
    width = unet.config["text_dim"] or unet.config["cross_dim"]
    if dim != width:
        _checks.fail(op, "conditions", f"tokens of width {width} as unet takes them", dim)
    return decoder


def _positive(op: str, name: str, value: Any) -> float:
    if finite_number(op, name, value) <= 0:
        _checks.fail(op, name, "a positive number", value)
    return float(value)
