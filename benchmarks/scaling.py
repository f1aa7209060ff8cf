"""How cost grows: `python -m benchmarks.scaling [--out DIR] [--device cuda] [--quick]`.

Time, throughput and peak memory (of ranks the first two) of whole models as the batch, the
resolution, the threads and the ranks grow, ours and the same network in plain torch by turns; and
the cold start: what a new process waits for. Writes scaling.json, cold_start.csv and scaling.png,
which `dfm-fast report` includes. Each rank has a batch of its own, and all share the machine's
cores: on one machine they show what DDP costs, not what a second machine gives.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness, records
from dfm_fast.flow import DecomposableFlow, Graphs, Laplacian
from dfm_fast.models import (
    DFM_S,
    DFMTransformer,
    SnapGenDecoder,
    snapgen_t2i,
    snapgen_tiny,
)
from dfm_fast.profiling.clocks import clock_of, cpu_seconds, crowd, interleave, peak_mib
from dfm_fast.profiling.comparisons import PLAIN
from dfm_fast.training import distributed

OUT = records.ROOT / "benchmarks" / "results" / "local" / "comparisons" / "scaling"
Calls = dict[str, Callable[[], Any]]  # ours and eager
# axis: (values, those of --quick); a point varies one, the others stay at BASE
AXES = {"batch": ((1, 2, 4, 8), (1, 2)), "side": ((16, 32, 64), (8, 16))}
BASE = {"batch": 1, "side": 32}, {"batch": 1, "side": 8}
STEPS = (1, 1)  # of a sample: a model call is what grows, not their number
ROUNDS = (5, 30)
COLD = """
import json, sys, time
start = time.perf_counter()
def lap():
    global start
    now = time.perf_counter(); took, start = now - start, now
    return took
import torch; seconds = {"import torch": lap()}
import dfm_fast; seconds["import dfm_fast, over it"] = lap()
from dfm_fast.models import DFM_S
from dfm_fast.models.dfm_plain import plain_forward
model = DFM_S().eval()
levels, t = [torch.randn(1, 4, s, s) for s in (16, 32)], torch.rand(1, 2)
call = {"ours": model, "eager": lambda *given: plain_forward(model, *given)}[sys.argv[1]]
lap()
for name in ("first", "second"):
    with torch.no_grad():
        call(levels, t)
    seconds[f"{name} call of DFM_S"] = lap()
print(json.dumps(seconds))
"""


# --- What is measured -----------------------------------------------------------------------------


def prepared(model: nn.Module, device: str) -> nn.Module:
    """Weights that keep the magnitude; none is zero, as some of a new model's are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, p[0].numel() ** -0.5, generator=generator)
    return model.to(device)


class Plain(nn.Module):
    """The same parameters, in plain torch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: Any) -> Any:
        return PLAIN[type(self.model)](self.model, *given)


def normal(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)


def dfm(quick: bool, side: int) -> DFMTransformer:
    """DFM_S for latents of that side; of --quick a small one."""
    grid = (side // 2, side // 2)
    return DFMTransformer(4, (1, 2), 64, 2, 2, input_size=grid) if quick else DFM_S(input_size=grid)


def no_grad(call: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(call)


def networks(model: DFMTransformer) -> dict[str, nn.Module]:
    """Each with parameters of its own, as DDP wants them."""
    return {"ours": model, "eager": Plain(copy.deepcopy(model))}


def training_call(network: nn.Module, batch: int, side: int, device: str) -> Callable[[], Any]:
    """Loss and gradients of both levels."""
    flow = DecomposableFlow(Laplacian(2), stage_probs=[0.0, 1.0])
    x = normal(batch, 4, side, side, device=device)
    parameters = [p for p in network.parameters() if p.requires_grad]

    def run() -> list[Tensor]:
        flow.loss(network, x, seed=0).mean().backward()
        grads = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        return grads

    return run


def dfm_train(quick: bool, batch: int, side: int, device: str) -> Calls:
    both = networks(prepared(dfm(quick, side), device))
    return {name: training_call(f, batch, side, device) for name, f in both.items()}


def dfm_sample(quick: bool, batch: int, side: int, device: str) -> Calls:
    flow, both = DecomposableFlow(Laplacian(2)), networks(prepared(dfm(quick, side), device).eval())

    def of(network: nn.Module) -> Callable[[], Any]:
        options: dict[str, Any] = {"steps": STEPS, "seed": 0, "device": device}
        options["cuda_graph"] = Graphs() if device == "cuda" else None
        return no_grad(lambda: flow.sample(network, (batch, 4, side, side), **options))

    return {name: of(network) for name, network in both.items()}


def unet(quick: bool, batch: int, side: int, device: str) -> Calls:
    """SnapGen's on a GPU, on a CPU that of digits."""
    model = snapgen_t2i() if device == "cuda" else snapgen_tiny(4)
    model = prepared(model, device).eval().to(memory_format=torch.channels_last)
    width = model.config["text_dim"] or model.config["cross_dim"]
    x = normal(batch, model.in_channels, side, side, device=device)
    text = normal(batch, 77, width, device=device)
    t = torch.full((batch,), 0.5, device=device)
    return {
        "ours": no_grad(lambda: model(x, t, text)),
        "eager": no_grad(lambda: Plain(model)(x, t, text)),
    }


def decoder(quick: bool, batch: int, side: int, device: str) -> Calls:
    sizes = {"block_out_channels": (16, 32), "layers_per_block": (1, 1)} if quick else {}
    model = prepared(SnapGenDecoder(**sizes), device).eval()
    model = model.to(memory_format=torch.channels_last)
    z = normal(batch, 16, side, side, device=device)
    z = z.contiguous(memory_format=torch.channels_last)
    return {
        "ours": no_grad(lambda: model(z)),
        "eager": no_grad(lambda: Plain(model)(z)),
    }


WORKS = {
    "DFM_S training step": dfm_train,
    "DFM_S sampling": dfm_sample,
    "SnapGen UNet": unet,
    "SnapGen decoder": decoder,
}


# --- Measuring ------------------------------------------------------------------------------------


def gate(what: str, calls: Calls) -> None:
    """Raise GateError unless both compute the same."""
    ours, eager = (harness.tensors(calls[name]()) for name in ("ours", "eager"))
    for a, b in zip(ours, eager, strict=True):
        harness.check_loosely(what, a, b.double(), a.dtype)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(calls: Calls, device: str, seconds: float, rounds: tuple[int, int]) -> dict[str, Any]:
    """Times of both, by turns, and what others did to the machine meanwhile."""
    with clock_of(device) as clock:
        samplers = {name: clock(call) for name, call in calls.items()}
        before = cpu_seconds()
        times = interleave(samplers, seconds, rounds)
        others = crowd(before, cpu_seconds())
    return {
        "providers": {name: {"ms": harness.spread(samples)} for name, samples in times.items()},
        "speedup": harness.ratios(times["eager"], times["ours"]),
        "others": others,
        "steady": others <= 0.1,
    }


def completed(point: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """With samples per second, of all ranks together."""
    samples = point["batch"] * point["ranks"]
    for entry in found["providers"].values():
        entry["per_s"] = 1e3 * samples / entry["ms"]["median"]
    return {**point, **found}


def points(quick: bool, device: str) -> Iterator[dict[str, Any]]:
    """Everything but the ranks."""
    cores = 1 if quick or device == "cuda" else torch.get_num_threads()
    counts = sorted({min(2**k, cores) for k in range(cores.bit_length() + 1)})
    axes = {axis: values[quick] for axis, values in AXES.items()}
    axes |= {"threads": counts} if device == "cpu" else {}
    for work in WORKS:
        for axis, values in axes.items():
            for value in values:
                yield {
                    **{"work": work, "axis": axis, "value": value, "ranks": 1, "threads": cores},
                    **BASE[quick],
                    axis: value,
                }


def measured(point: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    calls = WORKS[point["work"]](args.quick, point["batch"], point["side"], args.device)
    with threads(point["threads"]):
        gate(f"{point['work']}, {point['axis']} {point['value']}", calls)
        rounds = (2, 2) if args.quick else ROUNDS
        found = timed(calls, args.device, args.seconds, rounds)
        for name, call in calls.items():
            found["providers"][name]["peak_mib"] = peak_mib(call, args.device)
        return completed(point, found)


# --- Ranks ----------------------------------------------------------------------------------------


def as_rank(args: argparse.Namespace) -> int:
    """What each of torchrun's processes does: DFM_S training under DDP. All take the same turns.
    No peaks of memory, which are torch's profiler's: a thread of gloo completes an operation before
    it notes its end in the profile, which may be gone by then."""
    world = distributed.start("cpu")
    torch.set_num_threads(args.threads)
    batch, side = BASE[args.quick]["batch"], BASE[args.quick]["side"]
    calls = {}
    for name, network in networks(prepared(dfm(args.quick, side), "cpu")).items():
        wrapped = distributed.wrap(network, "ddp", world, ())
        calls[name] = training_call(wrapped, batch, side, "cpu")
    rounds = (2, 2) if args.quick else (8, 8)  # counted: a clock would part the ranks
    found = timed(calls, "cpu", 0.0, rounds)
    if world.main:
        records.write_json(args.as_rank, found)
    return distributed.leave(0)


def ranks(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    cores = torch.get_num_threads()
    for size in (2,) if args.quick else (1, 2):
        own = max(cores // size, 1)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "rank.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={size}", "-m", "benchmarks.scaling"]
            command += ["--as-rank", str(path), "--threads", str(own)]
            run_process([*command, *(["--quick"] if args.quick else [])])
            found = json.loads(path.read_text())
        point = {"work": "DFM_S training step", "axis": "ranks", "value": size, "ranks": size}
        yield completed({**point, "threads": own, **BASE[args.quick]}, found)


# --- Cold start -----------------------------------------------------------------------------------


def run_process(command: Sequence[str]) -> str:
    """Its output; what it complained of, where it failed (also where an abort came from)."""
    env = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=records.ROOT, env=env)
    if done.returncode:  # torchrun's own report comes after what a rank said
        raise RuntimeError(f"{command[1:4]} ended with {done.returncode}:\n{done.stderr[-20000:]}")
    return done.stdout


def cold_start(quick: bool) -> list[list[str]]:
    """Median seconds of fresh processes. The first, which brings the files into memory, is not
    counted."""
    table = [["what", "seconds"]]
    for name in ("ours",) if quick else ("ours", "eager"):
        command = [sys.executable, "-c", COLD, name]
        runs = [json.loads(run_process(command)) for _ in range(1 if quick else 4)]
        for what in runs[0]:
            if "call" in what or name == "ours":
                seconds = statistics.median(run[what] for run in runs[-3:])
                suffix = f", {name}" if "call" in what else ""
                table.append([what + suffix, f"{seconds:.3f}"])
    return table


# --- The picture ----------------------------------------------------------------------------------

# (axis, figure, what the panel shows)
PANELS = (
    ("batch", "per_s", "samples per second"),
    ("batch", "peak_mib", "peak MiB"),
    ("side", "ms", "ms"),
    ("side", "peak_mib", "peak MiB"),
    ("threads", "ms", "ms"),
    ("ranks", "per_s", "samples per second"),
)
AXIS_NAMES = {
    "batch": "batch",
    "side": "side of the latents",
    "threads": "threads",
    "ranks": "ranks (gloo)",
}
COLOURS = {"ours": "#0072B2", "eager": "#999999"}


def value_of(entry: dict[str, Any], figure: str) -> float:
    return entry["ms"]["median"] if figure == "ms" else entry[figure]


def panel(axes: Any, found: Sequence[dict[str, Any]], figure: str) -> None:
    """Curves of both; logarithmic, so that equal factors are equal lengths."""
    from matplotlib.ticker import LogLocator, NullLocator

    values, low, high = [p["value"] for p in found], [], []
    for name, colour in COLOURS.items():
        heights = [value_of(p["providers"][name], figure) for p in found]
        axes.plot(values, heights, "o-", color=colour, markersize=3, linewidth=1.3, label=name)
        low, high = [*low, min(heights)], [*high, max(heights)]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, map(str, values))
    axes.set_ylim(min(low) / 1.6, max(high) * 1.6)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=7)
    axes.grid(color="#e5e5e5", linewidth=0.6)


def picture(found: Sequence[dict[str, Any]], path: Path) -> None:
    """A line of panels per model."""
    from matplotlib.figure import Figure

    from dfm_fast.cli import _plots

    figure = Figure(figsize=(15, 9), layout="constrained")
    grid = figure.subplots(len(WORKS), len(PANELS))
    for i, work in enumerate(WORKS):
        for axes, (axis, what, name) in zip(grid[i], PANELS, strict=True):
            own = [p for p in found if p["work"] == work and p["axis"] == axis]
            axes.set_visible(bool(own))
            if own:
                panel(axes, own, what)
                axes.set_title(f"{work}\n{name}", fontsize=8)
                axes.set_xlabel(AXIS_NAMES[axis], fontsize=7)
    lines, names = grid[0, 0].get_legend_handles_labels()
    names = [{"eager": "plain PyTorch"}.get(name, name) for name in names]
    figure.legend(lines, names, loc="lower right", ncols=2)
    _plots.save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.scaling", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per point, at least")
    parser.add_argument("--quick", action="store_true", help="small models, few points: a check")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.as_rank:
        return as_rank(args)
    found = []
    for point in points(args.quick, args.device):
        found.append(measured(point, args))
        print(line(found[-1]), flush=True)
    for point in ranks(args):
        found.append(point)
        print(line(point), flush=True)
    cold = cold_start(args.quick)
    header = records.header(args.device, "scaling", not args.quick)
    header |= {"command": "python -m benchmarks.scaling", "cold_start": dict(cold[1:])}
    records.write_json(args.out / "scaling.json", {**header, "points": found})
    with (args.out / "cold_start.csv").open("w", newline="") as file:
        csv.writer(file).writerows(cold)
    picture(found, args.out / "scaling.png")
    print("\n".join(f"{what}: {seconds} s" for what, seconds in cold[1:]))
    return 0


def line(point: dict[str, Any]) -> str:
    ours, speedup = point["providers"]["ours"], point["speedup"]["median"]
    parts = [f"{point['work']}, {point['axis']} {point['value']}: {ours['ms']['median']:.3g} ms"]
    parts += [f"{ours['per_s']:.3g} per second"]
    parts += [f"{ours['peak_mib']:.3g} MiB"] if "peak_mib" in ours else []
    parts += [f"{speedup:.3g}x eager", *([] if point["steady"] else ["UNSTEADY: repeat"])]
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
