r"""The rows of a GPU, predicted with no GPU: `dfm-fast check --predict`.

Each row's own call is run on tensors without memory, twice, as what it keeps from its first call is
no part of a row; the second is recorded, and every launch predicted. `predictions.json` beside this
file and docs/performance/predictions.md are what is kept, written by

    dfm-fast check --predict --json benchmarks/predictions.json \
        --page docs/performance/predictions.md
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, lay_out, tensors
from dfm_fast.kernels import _predictions
from dfm_fast.kernels._predictions import H200, Launch, Prediction

ROOT = Path(__file__).resolve().parent
MEASURED = ROOT / "results" / "h200"
FAMILIES = sorted(path.stem.removeprefix("bench_") for path in ROOT.glob("bench_*.py"))
FAMILIES.remove("acceleration")  # tries its layers on real values
MOST = 8  # kernels of a row that are shown; models have hundreds
SMALL = 1 << 20  # bytes: narrow loads of less matter little
COLUMNS = ("kernel", "dtype", "grid", "waves", "registers", "shared", "occupancy", "load bits")
COLUMNS += ("instructions", "least MB", "asked MB", "GFLOP", "µs", "bound")


def gpu_rows(pattern: str = "*", full: bool = False) -> Iterator[Row]:
    """Those that a benchmark run on a GPU has."""
    for family in FAMILIES:
        for name, row in importlib.import_module(f"benchmarks.bench_{family}").ROWS.items():
            if row.device != "cpu" and fnmatch(name, pattern) and (full or row.quick):
                yield row


def record(row: Row, launches: list[Launch]) -> list[Launch]:
    """What the row's direction launches; inside of `recording`, which fills `launches`."""
    inputs = row.adapt([torch.empty(shape) for shape in row.shapes])
    inputs = [lay_out(x.to("meta", row.dtype), row.layout) for x in inputs]
    if row.direction != "forward":
        inputs = [x if i in row.frozen else x.requires_grad_() for i, x in enumerate(inputs)]
    for _ in range(2):
        launches.clear()
        outputs = tensors(row.ours(*inputs))
        if row.direction == "backward":
            launches.clear()
        if row.direction != "forward":
            grads = [torch.empty_like(y) for y in outputs]
            leaves = [x for x in inputs if x.requires_grad]
            torch.autograd.grad(outputs, leaves, grads)
    return list(launches)


def predict_rows(rows: Iterable[Row], kernel: str = "") -> Iterator[dict[str, Any]]:
    """A row's time is the sum of its launches', as in a graph. With `kernel`: only launches of
    kernels whose name contains it, and rows that have one."""
    with _predictions.recording() as launches:
        for row in rows:
            try:
                found = [launch for launch in record(row, launches) if kernel in launch.name]
            except (ValueError, RuntimeError) as error:
                yield {"row": row.id, "error": str(error).splitlines()[0]}
                continue
            if found:
                yield summed(row.id, [_predictions.predict(launch) for launch in found])


def summed(name: str, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Equal launches once, with their number; of torch's operators the sum alone."""
    counts = collections.Counter(p for p in predictions if p.registers or "C++" in p.kernel)
    theirs = [p.microseconds for p in predictions if p not in counts]
    kernels = [{"launches": n, **dataclasses.asdict(p)} for p, n in counts.items()]
    return {
        "row": name,
        "microseconds": sum(p.microseconds for p in predictions),
        "launches": len(predictions),
        "kernels": sorted(kernels, key=lambda k: -k["launches"] * k["microseconds"]),
        "torch": {"calls": len(theirs), "microseconds": sum(theirs)},
    }


def faults(p: dict[str, Any], multiprocessors: int = H200.multiprocessors) -> list[str]:
    """What leaves some of the GPU unused, in words."""
    if not p["registers"]:
        return []
    tail, found = p["waves"] % 1, []
    if 0 < p["load_bits"] < 128 and p["least"] >= SMALL:
        found.append(f"loads of {p['load_bits']} bits")
    if p["spills"]:
        found.append(f"{p['spills']} bytes spilled")
    if p["occupancy"] < 0.25:
        found.append(f"occupancy {p['occupancy']:.0%}")
    if p["grid"] < multiprocessors:
        found.append(f"{p['grid']} programs for {multiprocessors} multiprocessors")
    if 1 < p["waves"] < 8 and 0 < tail < 0.5:
        found.append(f"a last wave of {tail:.0%}")
    return found


def to_mend(rows: Iterable[dict[str, Any]]) -> list[tuple[float, str]]:
    """(µs lost against memory and matrix products alone, line) of kernels with faults and no stated
    reason, the worst shape of each first."""
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    for row in rows:
        for p in row.get("kernels", ()):
            if (found := faults(p)) and not p["reason"]:
                lost = p["microseconds"] - p["floor"]
                text = (
                    f"{p['kernel']} {p['dtype']}: {', '.join(found)} ({p['bound']}; {row['row']})"
                )
                key = p["kernel"], p["dtype"]
                worst[key] = max(worst.get(key, (-1.0, "")), (lost, text))
    return sorted(worst.values(), reverse=True)


def cells(p: dict[str, Any]) -> list[str]:
    about = "" if p["exact"] else "about "
    return [
        (f"{p['launches']} x " if p["launches"] > 1 else "") + p["kernel"], p["dtype"],
        str(p["grid"]), f"{p['waves']:.2f}", str(p["registers"]), str(p["shared"]),
        f"{p['occupancy']:.0%}", str(p["load_bits"]), f"{about}{p['per_element']:.1f}",
        f"{p['least'] / 1e6:.2f}", f"{p['asked'] / 1e6:.2f}", f"{p['flops'] / 1e9:.2f}",
        f"{p['microseconds']:.1f}", f"{p['bound']}{'; ' if p['reason'] else ''}{p['reason']}",
    ]  # fmt: skip


def lines(row: dict[str, Any]) -> Iterator[str]:
    """For a terminal."""
    if "error" in row:
        yield f"{row['row']}: not predicted: {row['error']}"
        return
    yield f"{row['row']}: {row['microseconds']:.1f} µs, {row['launches']} launches"
    for p in row["kernels"][:MOST]:
        shown = (f"{name} {text}" for name, text in zip(COLUMNS[2:], cells(p)[2:], strict=True))
        yield f"    {' '.join(cells(p)[:2])}: {', '.join(shown)}"
        yield from (f"        {fault}" for fault in faults(p))


def measured() -> dict[str, float]:
    """Microseconds of ours, by row."""
    files = (json.loads(path.read_text()) for path in sorted(MEASURED.glob("*.json")))
    rows = (row for file in files for row in file["rows"])
    return {row["id"]: 1e3 * row["providers"]["ours"]["ms"]["median"] for row in rows}


def page(rows: Sequence[dict[str, Any]]) -> str:
    known, done = measured(), [row for row in rows if "error" not in row]
    against = [
        [row["row"], f"{ours:.1f}", f"{known[row['row']]:.1f}", f"{ours / known[row['row']]:.2f}"]
        for row, ours in ((row, row["microseconds"]) for row in done)
        if row["row"] in known
    ]
    totals = [
        [row["row"], str(row["launches"]), f"{row['microseconds']:.1f}",
         f"{row['torch']['microseconds']:.1f}", shared_out(row)]
        for row in done
    ]  # fmt: skip
    kernels = [[row["row"], *cells(p)] for row in done for p in row["kernels"][:MOST]]
    parts = [
        INTRODUCTION,
        "## Against what was measured",
        markdown(("row", "predicted µs", "measured µs", "ratio"), against),
        "## Rows",
        markdown(("row", "launches", "µs", "µs of torch's own", "bounds"), totals),
        *(f"Not predicted: `{row['row']}`: {row['error']}" for row in rows if "error" in row),
        "## Kernels",
        markdown(("row", *COLUMNS), kernels),
        "## To mend",
        "By the µs above what memory and matrix products alone take, the worst shape of each.",
        "\n".join(f"- {lost:.1f} µs: {text}" for lost, text in to_mend(rows)),
    ]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = f"""# Predictions

What the launches of the quick benchmark rows should take on an {H200.name}, from machine code and
shapes, with no GPU: **not measurements**. `dfm-fast check --predict` writes this page;
`kernels/_predictions.py` says how. A launch takes {1e6 * H200.launch:.1f} µs, memory moves
{H200.bandwidth / 1e12:.2f} TB/s after {1e6 * H200.ramp:.1f} µs, a load takes
{1e9 * H200.latency:.0f} ns; {H200.products / 1e12:.0f} TFLOP/s in 16 bits.
Instructions are a lane's per element of the largest tensor; MB asked are those of all loads and
stores, masked lanes and what caches serve included."""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shared_out(row: dict[str, Any]) -> str:
    """Of the kernels' time, what is bound by what."""
    parts: collections.Counter[str] = collections.Counter()
    for p in row["kernels"]:
        parts[p["bound"]] += p["launches"] * p["microseconds"]
    whole = sum(parts.values())
    return ", ".join(f"{name} {part / whole:.0%}" for name, part in parts.most_common())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """JSON, a row a line."""
    machine = json.dumps({"target": _predictions.TARGET, **dataclasses.asdict(H200)})
    lines = ",\n".join(json.dumps(rounded(row)) for row in rows)
    return f'{{"machine": {machine}, "rows": [\n{lines}\n]}}\n'


def rounded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: rounded(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(v) for v in tree]
    return float(f"{tree:.4g}") if isinstance(tree, float) else tree
