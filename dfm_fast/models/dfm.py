r"""DFM: a diffusion transformer over all levels of a decomposition at once (arXiv 2506.19839).

Every level s is cut into patches of p_s x p_s, chosen so that all levels have the same tokens. The
levels' embeddings are added; so are those of their noise levels t_s. Between that and the levels'
own heads everything is shared:

    x = sum_s (patches_s W_s + b_s) + positions
    c = sum_s mlp_s(t_s) + label
    x = x + gate attention(modulated norm of x);  x = x + gate mlp(modulated norm of x)      [depth]
    v_s = (norm(x) (1 + scale_s) + shift_s) H_s + h_s

(adaLN-Zero: Peebles & Xie, arXiv 2212.09748; with one level this is SiT, arXiv 2401.08740.) A level
that is not active is None, counts as zeros, and still adds b_s and mlp_s(1). Its head is skipped.

One matrix product embeds the patches of all levels, one makes the modulations of all blocks and
heads, one computes all heads: (norm(x) (1 + scale)) H = norm(x) (H (1 + scale)), and H is small.
Modulations depend on noise levels and labels alone: where a schedule is known, `modulation_table`
makes those of all its steps at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfm_fast import _checks
from dfm_fast.models._functions import (
    FREQUENCIES,
    Levels,
    patchify,
    precondition,
    sincos_2d,
    timestep_embedding,
    token_grid,
    unpatchify,
)
from dfm_fast.models._pretrained import Pretrained
from dfm_fast.nn._linears import called, plain_weights, whole_weight
from dfm_fast.nn._lists import ModuleList
from dfm_fast.nn._packs import by_layers, stacked
from dfm_fast.nn.activations import FeedForward
from dfm_fast.ops import (
    ada_layer_norm,
    gated_residual_ada_layer_norm,
    qk_norm_rope,
    rope_2d,
    rope_3d,
)

EPS = 1e-6

# --- Layers ---------------------------------------------------------------------------------------


class TimestepEmbedder(nn.Module):
    """A noise level [N] -> [N, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        first: Any = self.mlp[0]
        return self.mlp(timestep_embedding(t).to(first.weight.dtype))


class Attention(nn.Module):
    """Self-attention from one packed projection; QK norm and rotary embedding read it in place."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.RMSNorm(dim // num_heads, EPS) if qk_norm else None
        self.k_norm = nn.RMSNorm(dim // num_heads, EPS) if qk_norm else None

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """x [B, T, D]; rotary (cos, sin) [T, d/2] or None."""
        qkv = called(self.qkv, x)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, T, H, d]
        if self.q_norm is not None or rotary is not None:
            of_q = None if self.q_norm is None else self.q_norm.weight
            of_k = None if self.k_norm is None else self.k_norm.weight
            q, k = qk_norm_rope(q, k, of_q, of_k, *(rotary or (None, None)), eps=EPS)
        heads = (a.transpose(1, 2) for a in (q, k, v))
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return called(self.proj, y)


class Block(nn.Module):
    """Takes x and its modulated norm, gives the next x and its modulated norm: a gate, a sum and
    the norm that follows are one pass over memory."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, qk_norm)
        self.mlp = FeedForward(dim, mult=mlp_ratio, activation_fn="gelu-approximate")

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        normed: Tensor,  # [B, T, D]
        own: Sequence[Tensor],  # shift, scale, gate, shift, scale, gate [B, D]
        following: Sequence[Tensor],  # shift and scale of the next norm [B, D]
        rotary: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        _, _, gate, shift, scale, gate_mlp = own
        y = self.attn(normed, rotary)
        x, normed = gated_residual_ada_layer_norm(x, y, gate, shift, scale, eps=EPS)
        return gated_residual_ada_layer_norm(x, self.mlp(normed), gate_mlp, *following, eps=EPS)


# --- The model ------------------------------------------------------------------------------------


class DFMTransformer(Pretrained):
    """A velocity for every level of a decomposition; the protocol of `flow.DecomposableFlow`.

    Args:
        in_channels: of every level, or one number per level (Haar's differ).
        patch_sizes: p_s per level, coarse to fine; as many levels as there are numbers.
        hidden_size, depth, num_heads, mlp_ratio: of the transformer.
        num_classes: class labels are 0 to num_classes - 1, `num_classes` is the null label; 0 for a
            model without labels.
        class_dropout: chance that a label becomes the null label in training.
        input_size: tokens (h, w) whose positions are kept as a buffer; others are computed.
        positions: "sincos" (fixed, added to the tokens; images) or "rope" (rotary, 2-D or 3-D).
        qk_norm: RMSNorm of queries and keys.
        block_conditioning: block i sees A_i c + a_i for c (D x D, starting as the identity): the
            layer that the paper's parameter count holds and the released code does not.
        stage_embedding: add a learned embedding of a sample's stage (its number of active levels).
        data_std: deviation of each level's data, for EDM preconditioning; None is without.
        flip_time: embed 1 - t, as models whose time runs from noise to data were trained.
        checkpointing: recompute blocks in backward.

    Defaults are the options of the released code. Parameters at 1000 classes, C = 4:
    B 132,279,572, L 461,245,460, XL/2 679,107,476. The paper's network has `qk_norm` and
    `block_conditioning`: 712,122,112 for one level of C = 16, as printed there (712.122 M).

    Of `patch_embedding`, `heads`, the norms of queries and keys, and of `modulation` beside block
    conditioning, only the weights are read: hooks on them are not called.

    Raises:
        TypeError, ValueError: arguments; in forward, levels of other shapes.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int] = 4,
        patch_sizes: Sequence[int] = (1, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout: float = 0.1,
        *,
        input_size: tuple[int, int] = (32, 32),
        positions: str = "sincos",
        qk_norm: bool = False,
        block_conditioning: bool = False,
        stage_embedding: bool = False,
        data_std: Sequence[float] | None = None,
        flip_time: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.channels = _check(self.config)
        self.patch_sizes, self.num_levels = tuple(patch_sizes), len(patch_sizes)
        self.hidden_size, self.depth, self.num_heads = hidden_size, depth, num_heads
        self.num_classes, self.class_dropout = num_classes, class_dropout
        self.positions, self.data_std, self.flip_time = positions, data_std, flip_time
        self.input_size, self.checkpointing = tuple(input_size), checkpointing
        # Elements of a token's patches by level: columns of the embedding, rows of the heads.
        self.sizes = [c * p * p for c, p in zip(self.channels, patch_sizes, strict=True)]
        self.patch_embedding = nn.Linear(sum(self.sizes), hidden_size, bias=False)
        self.patch_bias = nn.Parameter(torch.zeros(self.num_levels, hidden_size))
        self.t_embedders = ModuleList(TimestepEmbedder(hidden_size) for _ in patch_sizes)
        # The last label is the null label.
        self.y_embedder = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        stages = self.num_levels if stage_embedding else 0
        self.stage_embedder = nn.Embedding(stages, hidden_size) if stages else None
        self.blocks = ModuleList(
            Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth)
        )
        self.block_conditioning = (
            nn.Linear(hidden_size, depth * hidden_size) if block_conditioning else None
        )
        # Six vectors for each block, then shift and scale for each level's head.
        self.modulation = nn.Linear(hidden_size, (6 * depth + 2 * self.num_levels) * hidden_size)
        self.heads = nn.Linear(hidden_size, sum(self.sizes))
        self.register_buffer("position_table", torch.empty(0), persistent=False)
        self.reset_parameters()
        self.reset_buffers()

    def reset_parameters(self) -> None:
        """As DiT: Xavier, small normal embeddings; modulations and heads 0, so that every block is
        the identity and every velocity 0. Every block's conditioning is c at first."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedder in self.t_embedders:
            for layer in embedder.mlp:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
        for embedding in (self.y_embedder, self.stage_embedder):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)
        # Each level's patches are a layer of their own.
        for weight in self.patch_embedding.weight.split(self.sizes, 1):
            nn.init.xavier_uniform_(weight)
        for layer in (self.modulation, self.heads):
            nn.init.zeros_(layer.weight)
        if self.block_conditioning is not None:
            for weight in self.block_conditioning.weight.chunk(self.depth):
                nn.init.eye_(weight)

    def reset_buffers(self) -> None:
        device = self.patch_bias.device
        if self.positions == "sincos":
            height, width = self.input_size
            self.position_table = sincos_2d(height, width, self.hidden_size, device)

    @property
    def null_class(self) -> int:
        """The label of no class: `uncond={"y": torch.full_like(y, model.null_class)}`."""
        return self.num_classes

    def forward(
        self,
        levels: Levels,
        t: Tensor,
        active: Tensor | None = None,
        *,
        y: Tensor | None = None,
        modulations: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Velocities of the levels that are given.

        Args:
            levels: L tensors [N, C, H, W] (or [N, C, T, H, W]), coarse to fine, zeros where a
                sample's level is not active; None where that is so in the whole batch.
            t: [N, L], noise level of each: 1 is pure noise, and what inactive levels have.
            active: [N, L] bool; only `stage_embedding` asks for it.
            y: [N] int64 labels; None is the null label.
            modulations: those of t, active and y where they are known: a step's of
                `modulation_table`.

        Returns:
            Like levels.
        """
        grid = self._grid(levels)
        c_in, outer = self._preconditioned(levels, t)
        x = self.embed_patches(c_in)
        rotary = self._rotary(grid, x.device) if self.positions == "rope" else None
        if rotary is None:
            x = x + self._position_table(grid)
        # Under autocast products are narrow: the sum of all blocks is not.
        x = x.to(self.patch_bias.dtype)
        if modulations is None:
            modulations = self.modulations(self.conditioning(t, active, y))
        vectors = self._vectors(modulations)
        x = self._run_blocks(x, vectors, rotary)
        velocities = self._velocities(x, vectors, levels)
        return [
            v if v is None or o is None else o(v) for v, o in zip(velocities, outer, strict=True)
        ]

    # --- Parts ---

    def embed_patches(self, levels: Levels) -> Tensor:
        """[N, tokens, D]: one product for all levels that are given, and the biases of all."""
        given = [(s, level) for s, level in enumerate(levels) if level is not None]
        patches = torch.cat([patchify(level, self.patch_sizes[s]) for s, level in given], -1)
        weight = whole_weight(self.patch_embedding.weight)
        if len(given) < self.num_levels:
            columns = weight.split(self.sizes, 1)
            weight = torch.cat([columns[s] for s, _ in given], 1)
        return F.linear(patches.to(weight.dtype), weight, self.patch_bias.sum(0))

    def conditioning(self, t: Tensor, active: Tensor | None, y: Tensor | None) -> Tensor:
        """c [N, D]"""
        t = 1 - t if self.flip_time else t
        c = sum(f(level) for f, level in zip(self.t_embedders, t.unbind(1), strict=True))
        if self.y_embedder is not None:
            c = c + self.y_embedder(self._labels(y, t.shape[0], t.device))
        if self.stage_embedder is not None:
            if active is None:
                _checks.fail(type(self).__name__, "active", "[N, L] for stage_embedding", None)
            c = c + self.stage_embedder(active.sum(1) - 1)
        return c

    def modulations(self, c: Tensor) -> Tensor:
        """[N, (6 depth + 2 L) D]: six vectors for each block, then two for each level's head."""
        of_blocks, of_heads = 6 * self.depth, 2 * self.num_levels
        if self.block_conditioning is None:
            vectors = stacked(self.modulation, F.silu(c), of_blocks + of_heads)
        else:
            own = F.silu(stacked(self.block_conditioning, c, self.depth)).repeat_interleave(6, 0)
            seen = torch.cat((own, F.silu(c).expand(of_heads, -1, -1)))
            vectors = by_layers(seen, whole_weight(self.modulation.weight), self.modulation.bias)
        return vectors.transpose(0, 1).flatten(1).contiguous()  # one copy, not one of each vector

    def modulation_table(
        self, t: Tensor, active: Tensor | None = None, *, y: Tensor | None = None
    ) -> Tensor | None:
        """The modulations of K steps ahead: their weights, a third of the model, are read once.

        Args:
            t: [K, N, L].
            active, y: as in forward, the same in all steps.

        Returns:
            [K, N, (6 depth + 2 L) D], of which row k is `forward`'s `modulations` in step k; None
            where it would be larger than the weights, or these are sharded.
        """
        steps, batch = t.shape[:2]
        # FSDP2's and other subclasses are whole in forward only.
        sharded = not plain_weights(self.modulation.weight)
        if sharded or steps * batch > self.hidden_size:
            return None
        self._check_labels(y, batch)
        active = None if active is None else active.repeat(steps, 1)
        y = None if y is None else y.repeat(steps)
        c = self.conditioning(t.flatten(0, 1), active, y)
        return self.modulations(c).unflatten(0, (steps, batch))

    def _vectors(self, modulations: Tensor) -> list[tuple[Tensor, ...]]:
        """For each block six [N, D], for each level's head two; views."""
        vectors = modulations.chunk(6 * self.depth + 2 * self.num_levels, -1)
        heads = vectors[6 * self.depth :]
        blocks = [vectors[6 * i : 6 * i + 6] for i in range(self.depth)]
        return [*blocks, *(heads[2 * s : 2 * s + 2] for s in range(self.num_levels))]

    def _run_blocks(self, x: Tensor, vectors: Sequence[Sequence[Tensor]], rotary: Any) -> Tensor:
        """The plain norm of what the last block gives."""
        none = [torch.zeros_like(v) for v in vectors[0][:2]]  # two: Dynamo wants no tensor twice
        shifts = [*(m[:2] for m in vectors[: self.depth]), none]
        normed = ada_layer_norm(x, *shifts[0], eps=EPS)
        for i, block in enumerate(self.blocks):
            given = (x, normed, vectors[i], shifts[i + 1], rotary)
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x, normed = checkpoint(block, *given, use_reentrant=False)
            else:
                x, normed = block(*given)
        return normed

    def _velocities(
        self, normed: Tensor, vectors: Sequence[Sequence[Tensor]], levels: Levels
    ) -> list[Tensor | None]:
        """(normed (1 + scale) + shift) H + h of all levels that are given, in one product."""
        given = [(s, level) for s, level in enumerate(levels) if level is not None]
        rows = whole_weight(self.heads.weight).split(self.sizes)
        biases = self.heads.bias.split(self.sizes)
        weights, constants = [], []
        for s, _ in given:
            shift, scale = vectors[self.depth + s]
            weights.append(rows[s] * (1 + scale).unsqueeze(1))  # [N, K, D]
            constants.append(F.linear(shift, rows[s], biases[s]))  # [N, K]
        weight, constant = torch.cat(weights, 1), torch.cat(constants, 1)
        tokens = normed.to(weight.dtype) @ weight.transpose(1, 2) + constant.unsqueeze(1)
        found: list[Tensor | None] = [None] * self.num_levels
        parts = tokens.split([self.sizes[s] for s, _ in given], -1)
        for (s, level), part in zip(given, parts, strict=True):
            found[s] = unpatchify(part, level, self.patch_sizes[s]).to(level.dtype)
        return found

    def _labels(self, y: Tensor | None, batch: int, device: torch.device) -> Tensor:
        if y is None:
            return torch.full((batch,), self.num_classes, device=device)
        self._check_labels(y, batch)
        if self.training and self.class_dropout:
            dropped = torch.rand(batch, device=device) < self.class_dropout
            y = torch.where(dropped, self.num_classes, y)
        return y

    def _check_labels(self, y: Tensor | None, batch: int) -> None:
        if y is not None and (y.shape != (batch,) or y.dtype != torch.int64):
            got = f"{y.dtype} {list(y.shape)}"
            _checks.fail(type(self).__name__, "y", f"int64 labels [{batch}]", got)

    def _preconditioned(self, levels: Levels, t: Tensor) -> tuple[list[Tensor | None], list[Any]]:
        """(what the network sees, what is done to each of its outputs)."""
        if self.data_std is None:
            return list(levels), [None] * self.num_levels
        seen: list[Tensor | None] = [None] * self.num_levels
        outer: list[Any] = [None] * self.num_levels
        for s, level in enumerate(levels):
            if level is None:
                continue
            shape = (-1, *[1] * (level.ndim - 1))
            c_in, c_skip, c_out = (c.view(shape) for c in precondition(self.data_std[s], t[:, s]))
            seen[s] = (c_in * level).to(level.dtype)
            outer[s] = lambda v, x=level, a=c_skip, b=c_out: (a * x + b * v).to(x.dtype)
        return seen, outer

    # --- Positions ---

    def _grid(self, levels: Levels) -> tuple[int, ...]:
        """Tokens (T, h, w)."""
        return token_grid(type(self).__name__, levels, self.channels, self.patch_sizes)

    def _position_table(self, grid: tuple[int, ...]) -> Tensor:
        if grid[0] != 1:
            op = type(self).__name__
            _checks.fail(op, "levels", "images, as positions are 'sincos'", f"{grid[0]} frames")
        # An exported graph's sizes may be symbols, which a comparison would fix.
        if all(isinstance(n, int) for n in grid) and grid[1:] == self.input_size:
            return self.position_table
        _, height, width = grid
        return sincos_2d(height, width, self.hidden_size, self.patch_bias.device)

    def _rotary(self, grid: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        dim = self.hidden_size // self.num_heads
        frames, height, width = grid
        if frames == 1:
            return rope_2d(height, width, dim, device=device)
        return rope_3d(frames, height, width, dim, device=device)


def _check(config: dict[str, Any]) -> tuple[int, ...]:
    """Channels of each level, when the arguments make sense."""
    op, patches = "DFMTransformer", config["patch_sizes"]
    if not isinstance(patches, Sequence) or not patches:
        _checks.fail(op, "patch_sizes", "one number per level", repr(patches), TypeError)
    for name in ("hidden_size", "depth", "num_heads"):
        _checks.integer(op, name, config[name], 1)
    _checks.integer(op, "num_classes", config["num_classes"], 0)
    for p in patches:
        _checks.integer(op, "patch_sizes", p, 1)
    multiple = 4 * config["num_heads"]
    if config["hidden_size"] % multiple:
        _checks.fail(
            op, "hidden_size", f"a multiple of 4 num_heads, {multiple}", config["hidden_size"]
        )
    _checks.choice(op, "positions", config["positions"], ("sincos", "rope"))
    if not 0 <= config["class_dropout"] <= 1:
        _checks.fail(op, "class_dropout", "from 0 to 1", config["class_dropout"])
    channels, std = config["in_channels"], config["data_std"]
    channels = (channels,) * len(patches) if isinstance(channels, int) else tuple(channels)
    for c in channels:
        _checks.integer(op, "in_channels", c, 1)
    for name, values in (("in_channels", channels), ("data_std", std)):
        if values is not None and len(values) != len(patches):
            _checks.fail(op, name, f"{len(patches)} numbers, one per level", values)
    if std is not None and not all(s > 0 for s in std):
        _checks.fail(op, "data_std", "positive numbers", std)
    return channels


# --- Sizes ----------------------------------------------------------------------------------------


def DFM_S(
    in_channels: int | Sequence[int] = 4, patch_sizes: Sequence[int] = (1, 2), **options: Any
) -> DFMTransformer:
    """384 wide, 12 layers, 6 heads; arguments as `DFMTransformer`."""
    return DFMTransformer(in_channels, patch_sizes, 384, 12, 6, **options)


def DFM_B(
    in_channels: int | Sequence[int] = 4, patch_sizes: Sequence[int] = (1, 2), **options: Any
) -> DFMTransformer:
    """768 wide, 12 layers, 12 heads."""
    return DFMTransformer(in_channels, patch_sizes, 768, 12, 12, **options)


def DFM_L(
    in_channels: int | Sequence[int] = 4, patch_sizes: Sequence[int] = (1, 2), **options: Any
) -> DFMTransformer:
    """1024 wide, 24 layers, 16 heads."""
    return DFMTransformer(in_channels, patch_sizes, 1024, 24, 16, **options)


def DFM_XL(
    in_channels: int | Sequence[int] = 4, patch_sizes: Sequence[int] = (1, 2), **options: Any
) -> DFMTransformer:
    """1152 wide, 28 layers, 16 heads."""
    return DFMTransformer(in_channels, patch_sizes, 1152, 28, 16, **options)
