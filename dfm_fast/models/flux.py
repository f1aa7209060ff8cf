"""FLUX over several levels: diffusers' `FluxTransformer2DModel` fine-tuned as a DFM (arXiv
2506.19839, §5).

The transformer is the library's own, unchanged: its patch embedding, its embedding of time and its
head are those of the coarsest level. A finer level s adds parts of its own,

    x = x_embedder(patches_1) + sum_s (patches_s W_s + b_s)
    c = time_text_embed(t_1, guidance, pooled text) + sum_s mlp_s(t_s)
    v_s = (norm(x) (1 + scale_s) + shift_s) H_s + h_s

which start at zero where they meet the rest: W_s, b_s, mlp_s's last layer, shift_s, scale_s, H_s
and h_s. Then v_1 is what the transformer gave, bit for bit, whatever the finer levels hold, and
v_s = 0. Gradients reach W_s and mlp_s through v_1, H_s through v_s, in the first step; scale_s and
shift_s in the second.

Time is FLUX's: t from 0, data, to 1, noise, and velocities are eps - x. Pictures are latents;
patches of the coarsest level are 2 x 2, as FLUX packs them, with the positions (0, row, column).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfm_fast import _checks
from dfm_fast.models._functions import FREQUENCIES, Levels, patchify, token_grid, unpatchify
from dfm_fast.models._pretrained import Pretrained
from dfm_fast.nn._lists import ModuleList

PATCH = 2  # of FLUX's latents
EPS = 1e-6


class FluxHead(nn.Module):
    """A finer level's head: its own modulation of the norm, and its own projection."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [N, T, D], c [N, D] -> [N, T, size]"""
        shift, scale = self.modulation(F.silu(c)).unsqueeze(1).chunk(2, -1)
        normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
        return self.proj(normed * (1 + scale) + shift)


class FluxDFM(Pretrained):
    """A velocity for every level; the protocol of `flow.DecomposableFlow`.

    Args:
        transformer: arguments of `diffusers.FluxTransformer2DModel`, whose in_channels count a
            packed patch: 4 C.
        patch_sizes: p_s per level, coarse to fine; the first is 2. (2, 4) are the levels of
            `Laplacian(2)`; (2, 2) those of a decomposition whose levels are of one size.
        in_channels: of every level, or one number per level; None is C for all.
        checkpointing: recompute blocks in backward.

    `transformer` is the attribute that holds diffusers' model: its own methods work on it.

    Raises:
        ImportError: without diffusers. TypeError, ValueError: arguments; in forward, levels of
            other shapes, conditions that are missing.
    """

    def __init__(
        self,
        transformer: Mapping[str, Any],
        patch_sizes: Sequence[int] = (PATCH, 2 * PATCH),
        in_channels: int | Sequence[int] | None = None,
        *,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        # Not `from diffusers import`: type checkers would read diffusers and transformers.
        diffusers = importlib.import_module("diffusers")
        self.channels = _check(transformer, patch_sizes, in_channels)
        self.config = {
            "transformer": dict(transformer),
            "patch_sizes": tuple(patch_sizes),
            "in_channels": self.channels,
            "checkpointing": checkpointing,
        }
        self.patch_sizes, self.num_levels = tuple(patch_sizes), len(patch_sizes)
        self.checkpointing = checkpointing
        self.transformer = diffusers.FluxTransformer2DModel(**transformer)
        dim = self.transformer.inner_dim
        sizes = [c * p * p for c, p in zip(self.channels, patch_sizes, strict=True)][1:]
        # Of the finer levels.
        self.patch_embedders = ModuleList(nn.Linear(size, dim) for size in sizes)
        self.t_embedders = ModuleList(
            nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
            for _ in sizes
        )
        self.heads = ModuleList(FluxHead(dim, size) for size in sizes)
        self.reset_finer_levels()

    def reset_finer_levels(self) -> None:
        """Zeros wherever a finer level meets the rest. The first layers of its embedding of time
        keep a random start: the last ones get their gradient from it."""
        for embedder in self.t_embedders:
            first: Any = embedder[0]
            nn.init.normal_(first.weight, std=0.02)
            nn.init.zeros_(first.bias)
        last = (embedder[2] for embedder in self.t_embedders)
        for module in (*self.patch_embedders, *last, *self.heads):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self,
        levels: Levels,
        t: Tensor,
        active: Tensor | None = None,
        *,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | float | None = None,
        txt_ids: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Velocities of the levels that are given.

        Args:
            levels: L tensors [N, C, H, W], coarse to fine; None where a level is not active in the
                whole batch.
            t: [N, L], noise level of each: 1 is pure noise, and what inactive levels have.
            active: not used.
            encoder_hidden_states: [N, S, joint_attention_dim], of the text.
            pooled_projections: [N, pooled_projection_dim], of the text.
            guidance: a number or [N], for models with guidance_embeds, and only for these.
            txt_ids: [S, 3], positions of the text; None is zeros, as FLUX has them.

        Returns:
            Like levels.
        """
        grid = self._grid(levels)
        guidance = self._guidance(guidance, len(t), t.device)
        x = self._embed(levels)
        c = self._conditioning(t, guidance, pooled_projections)
        text = self.transformer.context_embedder(encoder_hidden_states)
        x = self._run_blocks(x, text, c, self._rotary(grid, text.shape[1], txt_ids, x.device))
        return self._velocities(x, c, levels)

    # --- Parts ---

    def _embed(self, levels: Levels) -> Tensor:
        """[N, tokens, D]; a level that is None counts as zeros."""
        x: Any = 0.0  # until the first level is added
        layers = (self.transformer.x_embedder, *self.patch_embedders)
        for level, patch, layer in zip(levels, self.patch_sizes, layers, strict=True):
            if level is None:
                x = x + layer.bias
            else:
                x = x + layer(patchify(level, patch).to(layer.weight.dtype))
        return x

    def _conditioning(self, t: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """c [N, D]. FLUX takes times in the dtype of its weights, a thousandfold."""
        embedder, t = self.transformer.time_text_embed, t.to(self.transformer.dtype)
        given: tuple[Tensor, ...] = (1000 * t[:, 0],)
        if guidance is not None:
            given = (*given, 1000 * guidance.to(t.dtype))
        c = embedder(*given, pooled)
        for s, layers in enumerate(self.t_embedders, 1):
            c = c + layers(embedder.time_proj(1000 * t[:, s]).to(layers[0].weight.dtype))
        return c

    def _run_blocks(
        self, x: Tensor, text: Tensor, c: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        transformer = self.transformer
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            # By name: older versions of diffusers have other orders.
            given: dict[str, Any] = {
                "hidden_states": x,
                "encoder_hidden_states": text,
                "temb": c,
                "image_rotary_emb": rotary,
            }
            if self.checkpointing and self.training and torch.is_grad_enabled():
                text, x = checkpoint(block, **given, use_reentrant=False)
            else:
                text, x = block(**given)
        return x

    def _velocities(self, x: Tensor, c: Tensor, levels: Levels) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for s, (level, patch) in enumerate(zip(levels, self.patch_sizes, strict=True)):
            if level is None:
                found.append(None)
                continue
            if s == 0:
                tokens = self.transformer.proj_out(self.transformer.norm_out(x, c))
            else:
                tokens = self.heads[s - 1](x, c)
            found.append(unpatchify(tokens, level, patch).to(level.dtype))
        return found

    def _rotary(
        self, grid: tuple[int, int], length: int, txt_ids: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        rows, columns = (torch.arange(n, device=device) for n in grid)
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
        ids = F.pad(places, (1, 0))  # [h w, 3]
        if txt_ids is None:
            txt_ids = ids.new_zeros(length, 3)
        return self.transformer.pos_embed(torch.cat((txt_ids, ids)))

    def _grid(self, levels: Levels) -> tuple[int, int]:
        op = type(self).__name__
        _, height, width = token_grid(op, levels, self.channels, self.patch_sizes)
        for s, level in enumerate(levels):
            if level is not None and level.ndim != 4:
                _checks.fail(op, f"levels[{s}]", "images [N, C, H, W]", list(level.shape))
        return height, width

    def _guidance(
        self, guidance: Tensor | float | None, batch: int, device: torch.device
    ) -> Tensor | None:
        op, embeds = type(self).__name__, self.transformer.config.guidance_embeds
        if (guidance is not None) != embeds:
            expected = "a number or [N]" if embeds else "None, as guidance_embeds is False"
            _checks.fail(op, "guidance", expected, guidance)
        if isinstance(guidance, int | float):
            return torch.full((batch,), float(guidance), device=device)
        return guidance


def _check(
    transformer: Mapping[str, Any], patches: Sequence[int], channels: int | Sequence[int] | None
) -> tuple[int, ...]:
    """Channels of each level, when the arguments make sense."""
    op = "FluxDFM"
    packed = transformer.get("in_channels", 64)
    if packed % PATCH**2 or (transformer.get("out_channels") or packed) != packed:
        expected = f"in_channels that are out_channels and a multiple of {PATCH**2}"
        got = f"{packed} and {transformer.get('out_channels')}"
        _checks.fail(op, "transformer", expected, got)
    if not isinstance(patches, Sequence) or not patches or patches[0] != PATCH:
        _checks.fail(op, "patch_sizes", f"numbers of which the first is {PATCH}", repr(patches))
    for p in patches:
        _checks.integer(op, "patch_sizes", p, 1)
    own = packed // PATCH**2
    if channels is None:
        channels = own
    channels = (channels,) * len(patches) if isinstance(channels, int) else tuple(channels)
    if len(channels) != len(patches) or channels[0] != own:
        expected = f"{len(patches)} numbers, one per level, the first {own}"
        _checks.fail(op, "in_channels", expected, channels)
    for c in channels:
        _checks.integer(op, "in_channels", c, 1)
    return channels
