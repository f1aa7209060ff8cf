"""The sampling loop: all levels, coarse to fine, guidance, previews, one CUDA graph per stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from dfm_fast import _checks
from dfm_fast.flow.decompositions import Decomposition
from dfm_fast.flow.schedules import StageSchedule
from dfm_fast.ops import cfg_euler_step, heun_step, philox_normal
from dfm_fast.ops._scales import level_offsets

Levels = list[Tensor | None]


class Guidance:
    """Classifier-free guidance: its scale, the conditions of u, and when it is on."""

    def __init__(
        self,
        op: str,
        scale: float,
        uncond: Mapping[str, Any] | None,
        interval: tuple[float, float],
    ) -> None:
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            _checks.fail(op, "cfg_scale", "a number", repr(scale), TypeError)
        if uncond is not None and not isinstance(uncond, Mapping):
            got = type(uncond).__name__
            _checks.fail(op, "uncond", "a mapping of conditions", got, TypeError)
        if scale != 1 and uncond is None:
            _checks.fail(op, "uncond", f"conditions, as cfg_scale is {scale:g}", None)
        if not isinstance(interval, Sequence) or len(interval) != 2:
            _checks.fail(op, "cfg_interval", "(low, high)", repr(interval))
        low, high = interval
        if not 0 <= low <= high <= 1:
            _checks.fail(op, "cfg_interval", "0 <= low <= high <= 1", tuple(interval))
        self.scale, self.uncond, self.interval = float(scale), uncond, (low, high)

    def table(self, t: Tensor) -> Tensor:
        """w [K, L] for noise levels t [K, L]."""
        low, high = self.interval
        inside = (t >= low) & (t <= high)
        return torch.where(inside, torch.full_like(t, self.scale), torch.ones_like(t))


def check_velocities(
    op: str,
    velocities: Any,
    levels: Levels,
    step: int | None,
    finite: bool,
) -> None:
    """One tensor like each level that was given; with `finite` also the values (synchronises)."""
    at = "" if step is None else f" in step {step}"
    if not isinstance(velocities, list | tuple):
        got = type(velocities).__name__
        _checks.fail(op, "model", f"a list of velocities{at}", got, TypeError)
    if len(velocities) != len(levels):
        _checks.fail(op, "model", f"{len(levels)} velocities{at}", len(velocities))
    for s, (v, level) in enumerate(zip(velocities, levels, strict=True)):
        if level is None:
            continue
        if not isinstance(v, Tensor):
            got = type(v).__name__
            _checks.fail(
                op, "model", f"a tensor for level {s}, which is active{at}", got, TypeError
            )
        if v.shape != level.shape:
            _checks.fail(op, "model", f"shape {list(level.shape)} for level {s}{at}", list(v.shape))
        if finite and not v.isfinite().all():
            _checks.fail(op, "model", f"finite velocities of level {s}{at}", "inf or nan")


class Sampler:
    """One run of the loop. Tables of t, dt and guidance lie on the device, and a step counter
    chooses their row, so that a step is the same work every time: a graph of it can be replayed."""

    def __init__(
        self,
        op: str,
        model: Callable[..., Sequence[Tensor | None]],
        decomposition: Decomposition,
        schedule: StageSchedule,
        guidance: Guidance,
        solver: str,
        cond: Mapping[str, Any],
        check: bool,
        preview: Callable[[int, Tensor], None] | None,
        on_step: Callable[[int, list[Tensor]], None] | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> None:
        self.op, self.model, self.decomposition = op, model, decomposition
        self.schedule, self.guidance, self.heun = schedule, guidance, solver == "heun"
        self.check, self.preview, self.on_step, self.noise = check, preview, on_step, noise
        # Conditions of c, of u, and (where they can be stacked) of both in one batch.
        self.conditions: dict[str, dict[str, Any]] = {"cond": dict(cond)}
        self.static = self.conditions  # where they lie
        self.kept: dict[int, _Stage] | None = None  # by `Graphs`

    def __call__(
        self,
        shapes: Sequence[tuple[int, ...]],
        seed: Tensor | int,
        device: torch.device,
        dtype: torch.dtype,
        progress: bool,
        graphs: bool,
    ) -> Tensor:
        self._prepare(shapes[0][0], device)
        x = [v.to(device, dtype, copy=True) for v in self.noise or ()]
        x = x or _noise(shapes, seed, device=device, dtype=dtype)
        bar = _bar(sum(self.schedule.steps)) if progress else None
        for stage, steps in enumerate(self.schedule.stages):
            x = self._stage(stage, steps, x, graphs, bar)
            if self.preview is not None:
                self.preview(stage, self.decomposition.collapse(_own(x[: stage + 1], graphs)))
        if bar is not None:
            bar.close()
        return self.decomposition.collapse(_own(x, self.kept is not None))

    def _prepare(self, batch: int, device: torch.device) -> None:
        """Tables and conditions. Differences and guidance in float64, from the exact table."""
        exact = self.schedule.table()
        self.scales = self.guidance.table(exact)
        self.guided = ((self.scales != 1) & self._active_or_done(exact)).any(1).tolist()
        if any(self.guided):
            cond = self.conditions["cond"]
            other = self.conditions["uncond"] = {**cond, **(self.guidance.uncond or {})}
            if (both := _stacked(cond, other, batch)) is not None:
                self.conditions["both"] = both
        if self.kept:  # where their graphs read, which has the tables
            self.conditions = _written(self.static, self.conditions)
            return
        self.dt = exact.diff(dim=0).float().to(device)
        self.w, self.t = self.scales.float().to(device), exact.float().to(device)
        if self.kept is not None:
            self.static = self.conditions = tree_map_only(Tensor, torch.clone, self.conditions)

    def _active_or_done(self, t: Tensor) -> Tensor:
        """[N + 1, L]: levels whose velocity counts at a row of the table."""
        active = self.schedule.active()
        return torch.cat((active, active[-1:]))

    def _stage(
        self, stage: int, steps: range, x: list[Tensor], graphs: bool, bar: Any
    ) -> list[Tensor]:
        step = torch.full((1,), steps.start, dtype=torch.int64, device=x[0].device)
        # Before any graph is captured: replays only read it.
        self.ahead, self.start = self._ahead(stage, steps, len(x[0])), steps.start
        if graphs:
            return self._replayed(stage, steps, x, step, bar)
        for k in steps:
            x = self._step(stage, k, x, step)
            step += 1
            self._after(k, x, bar)
        return x

    def _after(self, k: int, x: list[Tensor], bar: Any) -> None:
        if self.on_step is not None:
            self.on_step(k, x)
        if bar is not None:
            bar.update()

    def _step(self, stage: int, k: int, x: list[Tensor], step: Tensor) -> list[Tensor]:
        on = [s <= stage for s in range(len(x))]
        options: dict[str, Any] = {"cfg_scale": self.w[:-1], "active": on, "step": step}
        cond, uncond = self._velocities(stage, k, x, step)
        if uncond is None:
            options["cfg_scale"] = 1.0
        y = cfg_euler_step(x, cond, uncond, self.dt, **options)
        if not self.heun:
            return y
        # At the end of the step, guided with its own row's scale.
        cond, uncond = self._velocities(stage, k + 1, y, step + 1)
        options = {"cfg_scale": 1.0, "active": on, "step": step}
        if uncond is not None:
            options["cfg_scale"] = self.w[1:]
        return heun_step(x, y, cond, uncond, self.dt, **options)

    def _velocities(
        self, stage: int, row: int, x: list[Tensor], step: Tensor
    ) -> tuple[Levels, Levels | None]:
        """(conditional, unconditional or None) at a row of the table."""
        levels: Levels = [v if s <= stage else None for s, v in enumerate(x)]
        t = self.t.index_select(0, step)
        if not self.guided[row]:
            return self._call(levels, t, "cond", row, step), None
        if "both" not in self.conditions:
            cond = self._call(levels, t, "cond", row, step)
            return cond, self._call(levels, t, "uncond", row, step)
        twice = [None if v is None else torch.cat((v, v)) for v in levels]
        out = self._call(twice, t, "both", row, step)
        halves = [(None, None) if v is None else v.chunk(2) for v in out]
        return [c for c, _ in halves], [u for _, u in halves]

    def _call(self, levels: Levels, t: Tensor, which: str, row: int, step: Tensor) -> Levels:
        """The model's velocities at noise levels t [1, L], under the conditions of that name."""
        n = next(len(v) for v in levels if v is not None)
        count, cond = len(levels), self.conditions[which]
        active = _active(n, [v is not None for v in levels], t.device)
        if which in self.ahead:
            chosen = self.ahead[which].index_select(0, step - self.start).squeeze(0)
            cond = {**cond, "modulations": chosen}
        out = self.model(levels, t.expand(n, count), active, **cond)
        check_velocities(self.op, out, levels, row, self.check)
        return [v if g is not None else None for v, g in zip(out, levels, strict=True)]

    def _ahead(self, stage: int, steps: range, n: int) -> dict[str, Tensor]:
        """What the model offers to compute for all steps of a stage at once, by conditions."""
        make = getattr(self.model, "modulation_table", None)
        if make is None:
            return {}
        rows = slice(steps.start, steps.stop + self.heun)
        guided = set(self.guided[rows])
        names = {"cond"} if False in guided or "both" not in self.conditions else set()
        if True in guided:
            names.add("both" if "both" in self.conditions else "uncond")
        tables = {}
        for name in names:
            count = 2 * n if name == "both" else n
            t = self.t[rows].unsqueeze(1).expand(-1, count, -1)
            active = _active(count, [s <= stage for s in range(t.shape[-1])], t.device)
            tables[name] = make(t, active, **self.conditions[name])
        return {name: table for name, table in tables.items() if table is not None}

    def _replayed(
        self, stage: int, steps: range, x: list[Tensor], step: Tensor, bar: Any
    ) -> list[Tensor]:
        """The stage as replays of one graph per kind of step (guided or not)."""
        own = self._stage_of(stage, x, step)
        x, replays, self.ahead = own.x, own.replays, own.ahead

        def advance(k: int) -> None:
            for old, new in zip(x, self._step(stage, k, x, own.step), strict=True):
                if new is not old:
                    old.copy_(new)
            own.step.add_(1)

        for k in steps:
            kind = self.guided[k], self.heun and self.guided[k + 1]
            if kind not in replays:
                replays[kind] = capture(partial(advance, k), [*x, own.step])
            replays[kind]()
            self._after(k, x, bar)
        return x

    def _stage_of(self, stage: int, x: list[Tensor], step: Tensor) -> _Stage:
        """A new one, or that of an earlier call with this one's states."""
        if self.kept and stage in self.kept:
            own = self.kept[stage]
            _written([own.x, own.step, own.ahead], [x, step, self.ahead])
            return own
        own = _Stage([v.clone() for v in x], step, self.ahead, {})
        if self.kept is not None:
            own = own._replace(ahead={name: table.clone() for name, table in own.ahead.items()})
            self.kept[stage] = own
        return own


class _Stage(NamedTuple):
    """What the graphs of a stage read and write."""

    x: list[Tensor]
    step: Tensor
    ahead: dict[str, Tensor]
    replays: dict[tuple[bool, bool], Callable[[], None]]


class Graphs:
    """CUDA graphs that outlive a call: `DecomposableFlow.sample(..., cuda_graph=graphs)`.

    A call that captures its graphs takes three more steps, launched from Python, for each stage;
    the next ones of the same kind only replay. The same kind: model and memory of its parameters,
    shapes, dtypes, schedule, guidance, solver, and conditions that are no tensors. What a call
    brings (noise, conditions) is copied to where the graphs read. A call of another kind replaces
    them.

    What a model computes may change in other ways (hooks, adapters that are switched on): then
    `clear()`, which also frees the memory.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._run: Sampler | None = None

    def keep(self, run: Sampler, *kind: Any) -> Sampler:
        """`run`, or the one that has the graphs of its kind, which takes over what is its own."""
        model, schedule, guidance = run.model, run.schedule, run.guidance
        inside = getattr(model, "__dict__", {}).values()
        modules = [m for m in (model, *inside) if isinstance(m, nn.Module)]
        memory = [v for m in modules for v in (*m.parameters(), *m.buffers())]
        where = tuple((v.data_ptr(), v.dtype) for v in memory)
        kind = (
            *(kind, model, where, tuple(m.training for m in modules)),
            *(schedule.steps, schedule.threshold, schedule.shift, guidance.scale),
            *(guidance.interval, run.heun, run.check, repr(run.decomposition)),
            *map(_kind_of, (run.conditions["cond"], guidance.uncond)),
        )
        if self._key == kind and self._run is not None:
            kept = self._run
            kept.conditions, kept.guidance = run.conditions, guidance
            kept.preview, kept.on_step, kept.noise = run.preview, run.on_step, run.noise
            return kept
        self.clear()  # before others take memory
        run.kept = {}
        self._key, self._run = kind, run
        return run


def _kind_of(conditions: Any) -> tuple[Any, ...]:
    """Structure, shapes and dtypes; what is no tensor by what it is."""
    leaves, spec = tree_flatten(conditions)
    parts = [
        (v.shape, v.stride(), v.dtype, v.device) if isinstance(v, Tensor) else v for v in leaves
    ]
    return spec, *parts


def _written(old: Any, new: Any) -> Any:
    """`old`, with the values of `new` in its tensors."""
    for a, b in zip(tree_leaves(old), tree_leaves(new), strict=True):
        if isinstance(a, Tensor):
            a.copy_(b)
    return old


def _own(x: list[Tensor], copied: bool) -> list[Tensor]:
    """For a result, which may be one of these: not to be written over by the next replay."""
    return [v.clone() for v in x] if copied else x


def capture(call: Callable[[], None], state: Iterable[Tensor]) -> Callable[[], None]:
    """A CUDA graph's replay of a call that changes `state` in place; state is left as it was."""
    state = list(state)
    before = [v.clone() for v in state]

    def restore() -> None:
        for v, old in zip(state, before, strict=True):
            v.copy_(old)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # autotuning and lazy initialisation happen outside the graph
            call()
            restore()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _stacked(a: Mapping[str, Any], b: Mapping[str, Any], n: int) -> dict[str, Any] | None:
    """Conditions for a batch of both, None where some cannot be stacked. What is the same object
    and no tensor serves both as it is; of other lists, tuples and dicts every tensor is stacked."""
    if a.keys() != b.keys():
        return None
    both = {}
    for name, left in a.items():
        right = b[name]
        if left is right and not isinstance(left, Tensor):
            both[name] = left
            continue
        (lefts, spec), (rights, other) = tree_flatten(left), tree_flatten(right)
        if spec != other or not all(
            _stackable(x, y, n) for x, y in zip(lefts, rights, strict=True)
        ):
            return None
        pairs = zip(lefts, rights, strict=True)
        stacked = [torch.cat(p) if isinstance(p[0], Tensor) else p[0] for p in pairs]
        both[name] = tree_unflatten(stacked, spec)
    return both


def _stackable(x: Any, y: Any, n: int) -> bool:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return x is y
    return x.shape == y.shape and x.shape[:1] == (n,) and x.dtype == y.dtype


def _noise(shapes: Sequence[tuple[int, ...]], seed: Tensor | int, **options: Any) -> list[Tensor]:
    starts = level_offsets(shapes, 0)
    pairs = zip(shapes, starts, strict=True)
    return [philox_normal(shape, seed, offset=start, **options) for shape, start in pairs]


def _active(n: int, on: Sequence[bool], device: torch.device) -> Tensor:
    """[n, L]; by fills: a copy from the host could wait."""
    active = torch.zeros(n, len(on), dtype=torch.bool, device=device)
    active[:, : sum(on)] = True
    return active


def _bar(total: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("DecomposableFlow.sample: progress: expected tqdm, got none") from error
    return tqdm(total=total, desc="sampling", unit="step")
