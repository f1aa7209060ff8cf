"""How one benchmark row is measured, for every family.

A family's file declares rows (what is computed, on what shapes, by whom, in how many bytes); this
file does the rest, in this order:

1. Gate. Ours against the reference in float64, within the library's error budget; every rival
   against the same, loosely: it must compute the same function. A failure stops the row.
2. Timing. Everybody takes turns in one loop, in a new order every round, so that a slow minute of
   the machine slows all alike. Figures are medians; speed-ups are medians of the ratios within a
   round, with quartiles.
3. `copy` takes its turn too: `y.copy_(x)` of the row's largest tensor. The fraction of copy is
   (least bytes / time of ours) over (bytes copied / time of copy), both from this very loop. Rows
   with matrix products (convolutions and attention are such) have a second ceiling: `product`, of
   large square matrices; its fraction is that of floating-point operations, as eager does them.

CPU: wall clock. GPU: CUDA events around the replay of a captured graph, L2 overwritten before each;
the plain call, host time included, is measured as well. A backward row times the backward alone, on
a graph that is kept, for everybody; a training row both.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks import ceilings
from benchmarks.shapes import GOALS
from benchmarks.turns import turn
from dfm_fast.profiling.clocks import (
    Sampler,
    clock_of,
    count_launches,
    cpu_seconds,
    crowd,
    interleave,
    peak_mib,
    plain_call_ms,
    settled,
)
from dfm_fast.profiling.comparisons import LOOSE

# Compiled graphs may be walked backward more than once only where Inductor does not reuse buffers.
torch._functorch.config.donated_buffer = False

Say = Callable[..., None]  # say(text, end=): progress, as print takes it
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NOT_RIVALS = ("ours", "copy", "product", "eager", "compiled", "float32")


class GateError(AssertionError):
    """A provider does not compute what it is timed for."""


@dataclass(frozen=True)
class Rival:
    """Somebody else's code for a row."""

    prepare: Callable[..., Callable[[], Any]]  # the row's inputs -> what is timed
    gather: Callable[[Any], Any] = lambda result: result  # its result -> tensors like ours
    package: str = ""  # must be installed
    device: str = ""  # "cpu" where it runs nowhere else, with threads of its own
    differs: str = ""  # how its function differs, where it does: then timed, not compared


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    op: str
    variant: str  # what else tells it from others: the filter
    case: str  # a name from shapes.py
    shapes: tuple[tuple[int, ...], ...]  # of the inputs
    ours: Callable[..., Any]  # of the inputs
    reference: Callable[..., Any]  # the same, differentiable, in float64 too
    least_bytes: int  # of the direction measured
    eager: Callable[..., Any]
    compiled: dict[str, Callable[..., Any]]  # form -> function for torch.compile
    rivals: dict[str, Rival | str] = field(default_factory=dict)  # or why there is none
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    direction: str = "forward"
    quick: bool = False
    device: str = ""  # "cuda" where only a GPU is worth it
    frozen: tuple[int, ...] = ()  # inputs that get no gradient
    adapt: Callable[[list[Tensor]], list[Tensor]] = lambda inputs: inputs  # of normal inputs
    whole: bool = False  # a network: its many gradients are judged as one, by their norm
    own_noise: bool = False  # everybody else draws other random numbers: timed, not compared

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        parts = self.op, self.variant, self.case, self.dtype_name, self.layout, self.direction
        return "-".join(filter(None, parts))


@dataclass
class Provider:
    """Who takes part in the timing loop, ready to be called."""

    call: Callable[[], Any]
    gather: Callable[[Any], Any] = lambda result: result
    compare: bool = True
    note: str = ""
    foreign: bool = False  # has threads of its own


# --- Inputs, and what is called -------------------------------------------------------------------


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values, contiguous or channels_last (2-D and 3-D)."""
    if layout == "contiguous" or x.ndim not in (4, 5):
        return x.contiguous()
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=last)


def make_inputs(row: Row, device: str) -> list[Tensor]:
    """Random, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    values = row.adapt([torch.randn(shape, generator=generator) for shape in row.shapes])
    return [lay_out(v.to(device, row.dtype), row.layout) for v in values]


def bind(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    direction: str,
    frozen: Sequence[int] = (),
) -> Callable:
    """The zero-argument call that a row times."""
    if direction == "forward":
        return lambda: function(*inputs)
    given = [x if i in frozen else x.detach().requires_grad_() for i, x in enumerate(inputs)]
    leaves = [x for x in given if x.requires_grad]
    outputs = tensors(function(*given))
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(y.shape, generator=generator) for y in outputs)
    grads = [torch.empty_like(y).copy_(v) for y, v in zip(outputs, values, strict=True)]
    if direction == "training":  # forward and backward
        return lambda: torch.autograd.grad(tensors(function(*given)), leaves, grads)
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def bind_row(row: Row, function: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable:
    return bind(function, inputs, row.direction, row.frozen)


def compile_(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """As rivals are: on a GPU with max-autotune (we capture the graphs ourselves) unless the run
    asked for another mode."""
    mode = MODE or ("max-autotune-no-cudagraphs" if device == "cuda" else "default")
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


MODE = ""  # --compile-mode


def compile_forms(
    row: Row, inputs: Sequence[Tensor], say: Say, missing: dict[str, str]
) -> Iterator[tuple[str, Provider]]:
    """One provider per form that compiles; the fastest becomes `compiled`."""
    torch._dynamo.reset()
    for form, function in row.compiled.items():
        start = time.monotonic()
        say(f"    compiling {form} ... ", end="")
        bind_row(row, function, inputs)()  # makes its weights outside the compiled graph
        try:
            compiled = compile_(function, inputs[0].device.type)
            call = bind_row(row, compiled, inputs)
            call()
        except Exception as error:
            missing[f"compiled {form}"] = f"does not compile: {reason(error)}"
        else:
            yield f"compiled {form}", Provider(call, compare=not row.own_noise)
        say(f"{time.monotonic() - start:.1f} s")


def reason(error: Exception) -> str:
    """The line of a compiler's message that says why."""
    lines = [line for line in str(error).splitlines() if line and not line.endswith("raised:")]
    return lines[0][:100] if lines else type(error).__name__


def rival_provider(rival: Rival | str, inputs: Sequence[Tensor]) -> Provider | str:
    """Ready to be called, or why not."""
    if isinstance(rival, str):
        return rival
    if rival.package and importlib.util.find_spec(rival.package) is None:
        return f"{rival.package} is not installed"
    if rival.device and rival.device != inputs[0].device.type:
        return f"runs on {rival.device} only"
    call = rival.prepare(*inputs)
    foreign = rival.device == "cpu"
    return Provider(call, rival.gather, not rival.differs, rival.differs, foreign)


def copy_provider(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Provider, int]:
    """A copy of the row's largest tensor, and the bytes it moves."""
    x = max((*inputs, *outputs), key=Tensor.numel).detach()
    y = torch.empty_like(x)
    return Provider(lambda: y.copy_(x), compare=False), 2 * x.numel() * x.element_size()


def assemble(
    row: Row, inputs: Sequence[Tensor], say: Say, compiling: bool = True
) -> tuple[dict[str, Provider], dict[str, str]]:
    """Everybody who takes part but copy, and why the others do not."""
    missing: dict[str, str] = {}
    providers = {
        "ours": Provider(bind_row(row, row.ours, inputs)),
        "eager": Provider(bind_row(row, row.eager, inputs), compare=not row.own_noise),
    }
    if row.dtype in (torch.bfloat16, torch.float16):
        wide = [x.float() for x in inputs]
        call = bind_row(row, row.ours, wide)
        compare = not row.own_noise  # normals are rounded to the dtype too
        providers["float32"] = Provider(call, compare=compare, note="ours in float32")
    for name, rival in row.rivals.items():
        provider = rival_provider(rival, inputs)
        if isinstance(provider, str):
            missing[name] = provider
        else:
            providers[name] = provider
    if compiling:
        providers |= dict(compile_forms(row, inputs, say, missing))
    else:
        missing |= {f"compiled {form}": "left out, as asked" for form in row.compiled}
    for name, provider in providers.items():
        if MODE and name.startswith("compiled "):
            provider.note = f"torch.compile's mode {MODE}"
    return providers, missing


# --- The gate -------------------------------------------------------------------------------------


def reference_results(row: Row, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(in the row's dtype, in float64), both on contiguous inputs of the same values."""
    low = bind_row(row, row.reference, [x.contiguous() for x in inputs])()
    exact = bind_row(row, row.reference, [x.double().contiguous() for x in inputs])()
    return tensors(low), tensors(exact)


def check_budget(what: str, got: Tensor, low: Tensor, exact: Tensor) -> None:
    """Error at most twice the same-dtype reference's, plus one rounding of the output."""
    if got.shape != exact.shape or got.dtype != low.dtype:
        expected = f"{tuple(exact.shape)} {low.dtype}"
        raise GateError(f"{what}: expected {expected}, got {tuple(got.shape)} {got.dtype}")
    error, allowed = (got.double() - exact).abs(), 2 * (low.double() - exact).abs().max()
    excess = (error - allowed - torch.finfo(got.dtype).eps / 2 * exact.abs()).max().item()
    if not excess <= 0:  # NaN is not
        raise GateError(f"{what}: error {error.max().item():.3e}, {excess:.3e} over the budget")


def check_together(what: str, got: list[Tensor], low: list[Tensor], exact: list[Tensor]) -> None:
    """`check_budget` by the norm of all tensors: of hundreds, one is over it by chance."""
    far, allowed, size = (
        math.sqrt(sum(((a.double() - b.double()) ** 2).sum().item() for a, b in pairs))
        for pairs in (
            zip(got, exact, strict=True),
            zip(low, exact, strict=True),
            ((e, torch.zeros_like(e)) for e in exact),
        )
    )
    limit = 2 * allowed + torch.finfo(got[0].dtype).eps / 2 * size
    if not far <= limit:  # NaN is not
        raise GateError(f"{what}: distance {far:.3e}, allowed {limit:.3e}")


def check_loosely(what: str, got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    if got.shape != exact.shape:
        raise GateError(f"{what}: expected {tuple(exact.shape)}, got {tuple(got.shape)}")
    distance = ((got.to(exact) - exact).norm() / exact.norm()).item()
    if not distance <= LOOSE[dtype]:
        raise GateError(f"{what}: relative distance {distance:.3e}, over {LOOSE[dtype]:.0e}")


def gate(row: Row, inputs: Sequence[Tensor], providers: dict[str, Provider]) -> None:
    """Raise GateError unless all compute the row's function."""
    low, exact = reference_results(row, inputs)
    for name, provider in providers.items():
        result = provider.call()  # those not compared are still called: it warms them up
        if not provider.compare:
            continue
        got = tensors(provider.gather(result))
        if len(got) != len(exact):
            raise GateError(f"{row.id}, {name}: expected {len(exact)} tensors, got {len(got)}")
        if row.whole and name == "ours":
            check_together(f"{row.id}, ours", got, low, exact)
            continue
        for i, (g, lo, ex) in enumerate(zip(got, low, exact, strict=True)):
            what = f"{row.id}, {name}, tensor {i}"
            if name == "ours":
                check_budget(what, g, lo, ex)
            else:
                check_loosely(what, g, ex, row.dtype)


# --- Figures --------------------------------------------------------------------------------------


def spread(samples: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "q1": low, "q3": high, "min": min(samples)}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios within each round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def steady(samples: Sequence[float], others: float) -> bool:
    """Whether the machine was ours: else a row's figures are worth little. The copy's quartiles
    lie close together, and others took no part of a machine that had none to spare."""
    copied = spread(samples)
    return copied["q3"] <= 1.5 * copied["q1"] and others <= 0.1


def keep_fastest_form(times: dict[str, list[float]]) -> str | None:
    """Leave only the fastest compiled form, as `compiled`; returns its name."""
    forms = [name for name in times if name.startswith("compiled ")]
    if not forms:
        return None
    best = min(forms, key=lambda name: statistics.median(times[name]))
    samples = times[best]
    for name in forms:
        del times[name]
    times["compiled"] = samples
    return best.removeprefix("compiled ")


def judge(row_id: str, device: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal of the row, with what was measured."""
    goals = []
    for goal in GOALS:
        if fnmatch(device, goal.device) and fnmatch(row_id, goal.row):
            if goal.against == "copy":
                measured = record["copy_fraction"]["median"]
            elif goal.against == "memory":
                ours, eager = (record["providers"][n]["peak_mib"] for n in ("ours", "eager"))
                measured = 1 - ours / eager if eager else None
            else:
                measured = record["speedup"].get(goal.against, {}).get("median")
            met = None if measured is None else measured >= goal.at_least
            goals.append({**goal._asdict(), "measured": measured, "met": met})
    return goals


def figures(
    row: Row,
    times: dict[str, list[float]],
    copied: int,
    missing: dict[str, str],
    others: float = 0.0,
    operations: int = 0,
    multiplied: int = 0,
) -> dict[str, Any]:
    """The row's record, from the samples of all. operations: of the row's matrix products;
    multiplied: of `product`, which takes part where the row has any."""
    forms = {n: spread(t)["median"] for n, t in times.items() if n.startswith("compiled ")}
    form = keep_fastest_form(times)
    moved = {name: copied if name == "copy" else row.least_bytes for name in times}
    providers = {
        name: {"ms": spread(t), "gb_s": moved[name] / statistics.median(t) / 1e6}
        for name, t in times.items()
        if name != "product"
    }
    if operations:
        rate = multiplied / statistics.median(times["product"]) / 1e9
        providers["product"] = {"ms": spread(times["product"]), "tflop_s": rate}
    if form:
        providers["compiled"] |= {"form": form, "forms_ms": forms}
    rivals = [name for name in times if name not in NOT_RIVALS]
    limits = {"copy": row.least_bytes / copied}
    if operations:
        limits["product"] = operations / multiplied
    fractions = {
        f"{name}_fraction": {k: v * scale for k, v in ratios(times[name], times["ours"]).items()}
        for name, scale in limits.items()
    }
    return {
        "id": row.id,
        **{k: getattr(row, k) for k in ("op", "variant", "case", "layout", "direction", "quick")},
        "dtype": row.dtype_name,
        "shape": max(row.shapes, key=lambda s: torch.Size(s).numel()),
        "bytes": row.least_bytes,
        "rounds": len(times["ours"]),
        "steady": steady(times["copy"], others),
        "others": others,
        "operations": operations,
        **fractions,
        "speedup": {
            n: ratios(t, times["ours"])
            for n, t in times.items()
            if n not in ("ours", "copy", "product")
        },
        "strongest": min(rivals, key=lambda n: providers[n]["ms"]["median"], default=None),
        "missing": missing,
        "providers": providers,
    }


def memory(record: dict[str, Any], providers: dict[str, Provider], device: str) -> None:
    """Add everybody's peak memory; rivals with allocators of their own are not seen."""
    for name, entry in record["providers"].items():
        provider = providers[f"compiled {entry['form']}" if name == "compiled" else name]
        if not provider.foreign:
            entry["peak_mib"] = peak_mib(provider.call, device)


def on_gpu(
    record: dict[str, Any],
    providers: dict[str, Provider],
    samplers: dict[str, Sampler],
    calls: dict[str, float],
) -> None:
    """Add what only a GPU shows; calls: milliseconds of a plain call of each."""
    for name, entry in record["providers"].items():
        source = f"compiled {entry['form']}" if name == "compiled" else name
        entry["call_ms"] = calls[source]
        entry["launches"] = count_launches(providers[source].call)
        if getattr(samplers[source], "is_plain_call", False):
            plain = "timed as a plain call: it cannot be captured as a CUDA graph"
            entry["note"] = "; ".join(filter(None, (entry.get("note"), plain)))


def keep_freed_memory() -> None:
    """glibc gives large blocks back to the system, to be zeroed page by page when they are wanted
    again: rows would differ by what ran before them, and who writes more maps would pay for it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def measure(
    row: Row, device: str, seconds: float, say: Say, compiling: bool = True
) -> tuple[dict, Callable[[], Any]]:
    """(record, our call): everything for one row. Raises GateError."""
    keep_freed_memory()
    with clock_of(device) as clock:
        inputs = make_inputs(row, device)
        providers, missing = assemble(row, inputs, say, compiling)
        gate(row, inputs, providers)
        outputs = tensors(providers["ours"].call())
        providers["copy"], copied = copy_provider(inputs, outputs)
        operations, multiplied = ceilings.product_operations(providers["eager"].call), 0
        if operations:
            call, multiplied = ceilings.product(device, row.dtype)
            providers["product"] = Provider(call, compare=False)
        samplers = {name: clock(provider.call) for name, provider in providers.items()}
        samplers |= {
            n: settled(samplers[n]) for n, provider in providers.items() if provider.foreign
        }
        calls: dict[str, float] = {}
        with turn():
            before = cpu_seconds()
            times = interleave(samplers, seconds)
            others = crowd(before, cpu_seconds())
            if device != "cpu":
                calls = {name: plain_call_ms(provider.call) for name, provider in providers.items()}
        record = figures(row, times, copied, missing, others, operations, multiplied)
        for name, entry in record["providers"].items():
            source = f"compiled {entry['form']}" if name == "compiled" else name
            if note := providers[source].note:
                entry["note"] = note
        memory(record, providers, device)
        if device != "cpu":
            on_gpu(record, providers, samplers, calls)
    record["goals"] = judge(row.id, torch.device(device).type, record)
    return record, providers["ours"].call
