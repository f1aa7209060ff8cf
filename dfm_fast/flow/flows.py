"""Decomposable Flow Matching: the training loss and the sampler for any model.

Model protocol: `model(levels, t, active, **cond) -> velocities`. levels and velocities are lists of
L tensors, coarse to fine; a level that is inactive for the whole batch is None both ways and counts
as zeros. t [N, L] float32 is the noise level (1 is pure noise), active [N, L] bool.

A model may offer `modulation_table(t, active, **cond)`, t [K, N, L]: what depends on noise levels
and conditions alone, for K steps ahead, as a tensor [K, ...], or None. The sampler then gives row k
to step k as `modulations`.
"""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast._library import Shard
from dfm_fast.flow import sampler
from dfm_fast.flow.decompositions import Decomposition
from dfm_fast.flow.schedules import StageSchedule
from dfm_fast.ops import philox_normal
from dfm_fast.ops._philox import Seed, fold, seed_of

Model = Callable[..., Sequence[Tensor | None]]


class DecomposableFlow(nn.Module):
    """Flow matching on the levels of a decomposition (DFM, arXiv 2506.19839). No parameters.

    Every sample has a stage q, drawn with probability p_q. Level q gets t ~ LogitNormal(location,
    scale), each coarser level its own t ~ LogitNormal(earlier_location, scale), and finer ones are
    not active. The loss is the sum over active levels of the mean squared error of the velocity.

    Args:
        decomposition: e.g. `Laplacian(2)`; with one level this is plain flow matching.
        stage_probs: p_q, L numbers that sum to 1; default 0.9, 0.09, ..., the last taking the rest
            (the paper's 0.9, 0.1 for two levels).
        per_sample: draw q per sample, not per batch. Per batch whole levels are skipped.
        location, earlier_location, scale: of the logit-normals.
        seed: of the stages, which are drawn on the host from (seed, number of calls): the same on
            all ranks, with no synchronisation.
        check: raise where a velocity is not finite, naming level and step; synchronises.

    Under torch.distributed every rank draws other noise and other t, and the same stage; with
    `shard` the ranks have their parts of one batch's noise.
    """

    def __init__(
        self,
        decomposition: Decomposition,
        *,
        stage_probs: Sequence[float] | None = None,
        per_sample: bool = False,
        location: float = 0.0,
        earlier_location: float = -1.5,
        scale: float = 1.0,
        seed: int = 0,
        check: bool = False,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        if not isinstance(decomposition, Decomposition):
            got = type(decomposition).__name__
            _checks.fail(op, "decomposition", "a Decomposition", got, TypeError)
        self.decomposition = decomposition
        self.stage_probs = _probabilities(op, stage_probs, decomposition.num_levels)
        self.per_sample = per_sample
        self.location, self.earlier_location, self.scale = location, earlier_location, scale
        self.seed = _checks.integer(op, "seed", seed, 0)
        self.check = check
        self.calls = 0  # of loss, saved: a resumed run draws the stages it would have drawn

    def get_extra_state(self) -> dict[str, int]:
        return {"seed": self.seed, "calls": self.calls}

    def set_extra_state(self, state: Mapping[str, int]) -> None:
        self.seed, self.calls = state["seed"], state["calls"]

    @property
    def num_levels(self) -> int:
        return self.decomposition.num_levels

    # --- Training ---

    def stages(self, batch: int, seed: Seed = None) -> list[int]:
        """Stage of every sample, 0 to L - 1: from `seed` where it is an int, else from the module's
        own seed and the number of calls."""
        # random.Random is the same everywhere for an int, and costs microseconds.
        key = (self.seed << 64) | self.calls if not isinstance(seed, int) else seed
        generator, levels = random.Random(key), range(self.num_levels)
        count = batch if self.per_sample else 1
        drawn = generator.choices(levels, self.stage_probs, k=count)
        return drawn if self.per_sample else drawn * batch

    def _active(self, stages: Sequence[int], device: torch.device) -> Tensor:
        """[N, L]: levels up to a sample's stage."""
        if not self.per_sample:  # by fills: a copy from the host could wait
            active = torch.zeros(len(stages), self.num_levels, dtype=torch.bool, device=device)
            if stages:
                active[:, : stages[0] + 1] = True
            return active
        rows = torch.tensor(stages).unsqueeze(1) >= torch.arange(self.num_levels)
        if device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(device, non_blocking=True)

    def _noise_levels(self, active: Tensor, seed: Tensor | int, start: int) -> Tensor:
        """t [N, L]: 1 where a level is not active."""
        offset = start * self.num_levels
        t = philox_normal(active.shape, seed, offset=offset, device=active.device) * self.scale
        levels = torch.arange(self.num_levels, device=active.device)
        own = active.sum(1, keepdim=True) - 1 == levels
        t = (t + torch.where(own, self.location, self.earlier_location)).sigmoid()
        return torch.where(active, t, 1.0)

    def loss(
        self,
        model: Model,
        x: Tensor,
        *,
        seed: Seed = None,
        shard: tuple[int, int] | None = None,
        per_level: bool = False,
        **cond: Any,
    ) -> Tensor:
        """One training loss per sample.

        Args:
            model: see the module's docstring.
            x: data [N, C, H, W] or [N, C, T, H, W], in data space.
            seed: of noise and t: 64 bits (they also draw the stage), an int64 tensor [2] of seed
                and offset, or None for the device's default generator.
            shard: (start, batch) where x is rows start to start + N of a batch: noise, t and stages
                are what these rows get when the batch comes at once, on whatever ranks. The seed
                must be given, and be the same for all parts.
            per_level: give the L terms of the sum apart, 0 where a level is not active.
            cond: handed to the model.

        Returns:
            [N], float32, or [N, L]. Parameters that this stage skips get zero gradients.

        Raises:
            TypeError, ValueError: arguments; velocities of wrong count or shape; with `check`,
                velocities that are not finite.
        """
        op = "DecomposableFlow.loss"
        _checks.tensor(op, "x", x, (4, 5))
        whole = _shard(op, shard, x.shape[0], seed)
        start, batch = whole or (0, x.shape[0])
        key = self._keys(op, seed, x.device, folded=whole is None)
        stages = self.stages(batch, seed)[start : start + x.shape[0]]
        self.calls += 1
        active = self._active(stages, x.device)
        t = self._noise_levels(active, fold(key, _T_STREAM), start)
        on: Any = active
        if not self.per_sample:
            stage = stages[0] if stages else self.num_levels - 1
            on = [s <= stage for s in range(self.num_levels)]
        part: dict[str, Any] = {} if whole is None else {"shard": whole}
        levels, _ = self.decomposition.add_noise(x, t, key, active=on, targets=False, **part)
        velocities = model(levels, t, active, **cond)
        sampler.check_velocities(op, velocities, levels, step=None, finite=self.check)
        velocities = [v if g is not None else None for v, g in zip(velocities, levels, strict=True)]
        loss = self.decomposition.loss(velocities, x, key, active=on, **part)
        return self._touch(model, loss if per_level else loss.sum(1), levels)

    def forward(self, model: Model, x: Tensor, *, seed: Seed = None, **cond: Any) -> Tensor:
        return self.loss(model, x, seed=seed, **cond)

    def _keys(self, op: str, seed: Seed, device: torch.device, folded: bool) -> Tensor | int:
        """The seed of the noise, `folded`: this rank's."""
        state, number, _ = seed_of(op, seed, 0, device)
        return fold(number if state is None else state, _rank() if folded else 0)

    def _touch(self, model: Model, loss: Tensor, levels: Sequence[Tensor | None]) -> Tensor:
        """The loss, from which parameters that it does not depend on get zero gradients, as DDP
        needs. Which these are depends on the levels given alone: the graph is walked once each."""
        if not isinstance(model, nn.Module) or not loss.requires_grad:
            return loss
        given = tuple(level is not None for level in levels)
        skipped = _SKIPPED.setdefault(model, {})
        if given not in skipped:
            reached = _leaves(loss)
            # Sharded parameters are not the ones in the graph; FSDP2 does without their gradients.
            skipped[given] = [
                name
                for name, p in model.named_parameters()
                if type(p) is nn.Parameter and p not in reached
            ]
        parameters = [model.get_parameter(name) for name in skipped[given]]
        parameters = [p for p in parameters if p.requires_grad]
        return _ZeroGradients.apply(loss, *parameters) if parameters else loss

    # --- Sampling ---

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        steps: Sequence[int] | int = (30, 10),
        threshold: float | Sequence[float] = 0.1,
        shift: float = 1.0,
        solver: str = "euler",
        cfg_scale: float = 1.0,
        uncond: Mapping[str, Any] | None = None,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        preview: Callable[[int, Tensor], None] | None = None,
        on_step: Callable[[int, list[Tensor]], None] | None = None,
        noise: Sequence[Tensor] | None = None,
        seed: Seed = None,
        progress: bool = False,
        cuda_graph: bool | sampler.Graphs | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **cond: Any,
    ) -> Tensor:
        """Samples in data space, coarse levels first.

        Args:
            model: see the module's docstring; called once per step (twice with "heun"), on
                conditional and unconditional inputs in one batch where both can be stacked.
            shape: of the result, [N, C, H, W] or [N, C, T, H, W].
            steps, threshold, shift: see `StageSchedule`; one number of steps per level.
            solver: "euler" or "heun".
            cfg_scale: w in u + w (c - u); the same for every level.
            uncond: conditions that replace those of `cond` of the same name for u.
            cfg_interval: noise levels (low, high) between which a level is guided.
            preview: called with (stage, picture) after each stage: the collapse of the levels that
                have been active, at the size of the last of them.
            on_step: called with (step, levels) after each step; what it writes into the levels that
                are active is what the next step starts from. They may be written over later.
            noise: L tensors that the levels start from, in place of the seed's.
            seed: as `philox_normal`; level s starts where `pyramid_add_noise` starts it.
            progress: show a bar (needs tqdm).
            cuda_graph: replay one CUDA graph per stage: None where x is on a GPU, False never; a
                `Graphs` keeps them for calls that follow. The model must then run without
                synchronisation, and conditions are read at capture.
            device: of the noise; the model's first parameter's by default, else the CPU.
            dtype: of states and result.

        Returns:
            A tensor of `shape`.

        Raises:
            TypeError, ValueError: arguments; a cfg_scale other than 1 without `uncond`; velocities
                of wrong count or shape; with `check`, velocities that are not finite.
        """
        op = "DecomposableFlow.sample"
        schedule = StageSchedule(steps, threshold, shift)
        if schedule.num_levels != self.num_levels:
            _checks.fail(op, "steps", f"{self.num_levels} numbers, one per level", steps)
        guidance = sampler.Guidance(op, cfg_scale, uncond, cfg_interval)
        _checks.choice(op, "solver", solver, ("euler", "heun"))
        if dtype not in _checks.FLOATING:
            _checks.fail(op, "dtype", "float32, bfloat16, float16 or float64", dtype, TypeError)
        shapes = self.decomposition.shapes(shape)
        if noise is not None:
            _check_noise(op, noise, shapes)
        device = _device(model, device)
        if not isinstance(cuda_graph, bool | sampler.Graphs | None):
            got = repr(cuda_graph)
            _checks.fail(op, "cuda_graph", "True, False, None or Graphs", got, TypeError)
        if cuda_graph and device.type != "cuda":
            _checks.fail(op, "cuda_graph", "a CUDA device", device)
        what = op, model, self.decomposition, schedule, guidance, solver, cond
        run = sampler.Sampler(*what, self.check, preview, on_step, noise)
        if isinstance(cuda_graph, sampler.Graphs):
            run = cuda_graph.keep(run, tuple(map(tuple, shapes)), device, dtype)
        captured = device.type == "cuda" if cuda_graph is None else bool(cuda_graph)
        # Nothing is drawn from the device's generator that is not used.
        key = 0 if noise is not None else _start(seed, device)
        return run(shapes, key, device, dtype, progress, captured)


# Seeds of t, apart from those of the noise: far from any rank's.
_T_STREAM = 1 << 62


# Names of the parameters that a loss does not reach, by model and by which levels it is given.
_SKIPPED: weakref.WeakKeyDictionary[nn.Module, dict[tuple[bool, ...], list[str]]]
_SKIPPED = weakref.WeakKeyDictionary()


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _shard(op: str, shard: Any, rows: int, seed: Seed) -> Shard | None:
    if shard is None:
        return None
    if not isinstance(shard, Sequence) or len(shard) != 2:
        _checks.fail(op, "shard", "(start, batch)", repr(shard), TypeError)
    start, batch = (_checks.integer(op, "shard", n, 0) for n in shard)
    if start + rows > batch:
        _checks.fail(op, "shard", f"{rows} rows from {start} in the batch", f"a batch of {batch}")
    if seed is None:
        _checks.fail(op, "seed", "a seed, the same for all parts of the batch", None)
    return Shard(start, batch)


def _check_noise(op: str, noise: Any, shapes: Sequence[tuple[int, ...]]) -> None:
    if not isinstance(noise, list | tuple) or len(noise) != len(shapes):
        got = len(noise) if isinstance(noise, list | tuple) else type(noise).__name__
        _checks.fail(op, "noise", f"a list of {len(shapes)} tensors", got, TypeError)
    for s, (level, shape) in enumerate(zip(noise, shapes, strict=True)):
        _checks.tensor(op, f"noise[{s}]", level, (4, 5))
        if tuple(level.shape) != tuple(shape):
            _checks.fail(op, f"noise[{s}]", f"shape {list(shape)}", list(level.shape))


def _start(seed: Seed, device: torch.device) -> Tensor | int:
    state, number, _ = seed_of("DecomposableFlow.sample", seed, 0, device)
    return number if state is None else state


def _device(model: Model, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.empty(0, device=device).device  # with its index
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def _probabilities(op: str, probs: Sequence[float] | None, num_levels: int) -> tuple[float, ...]:
    if probs is None:
        first = [0.9 * 0.1**q for q in range(num_levels - 1)]
        return (*first, 1 - sum(first))
    if not isinstance(probs, Sequence) or not all(isinstance(p, int | float) for p in probs):
        _checks.fail(op, "stage_probs", "a sequence of numbers", repr(probs), TypeError)
    if len(probs) != num_levels:
        _checks.fail(op, "stage_probs", f"{num_levels} numbers, one per level", list(probs))
    if not all(0 <= p <= 1 for p in probs) or not math.isclose(sum(probs), 1, abs_tol=1e-6):
        _checks.fail(op, "stage_probs", "probabilities that sum to 1", list(probs))
    return tuple(float(p) for p in probs)


def _leaves(loss: Tensor) -> set[Tensor]:
    """Leaf tensors that a loss depends on."""
    seen, stack, leaves = set(), [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return leaves


class _ZeroGradients(torch.autograd.Function):
    """The first argument; the others get zero gradients."""

    @staticmethod
    def forward(ctx, loss, *others):
        ctx.others = [(p.shape, p.dtype, p.device) for p in others]
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad):
        zeros = (torch.zeros(s, dtype=d, device=at) for s, d, at in ctx.others)
        return grad, *zeros
