"""Results of benchmarks: reading them, and the words that tables, plots and pages share."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
TIMES = "\N{MULTIPLICATION SIGN}"
NOT_RIVALS = ("ours", "copy", "product", "eager", "compiled", "float32")


class ReportError(Exception):
    """Something about the results, said in one line."""


# --- Reading --------------------------------------------------------------------------------------


def load(folder: Path) -> list[dict[str, Any]]:
    """All results in a folder of machines, or in one machine's folder."""
    if not folder.is_dir():
        raise ReportError(
            f"expected a folder of results, got {str(folder)!r}; "
            "`pytest benchmarks/ --benchmark-only` makes one"
        )
    files = sorted({*folder.glob("*.json"), *folder.glob("*/*.json")})
    if not files:
        raise ReportError(f"expected <machine>/<family>.json in {str(folder)!r}, found none")
    return [load_file(path) for path in files]


def load_file(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ReportError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise ReportError(f"{path}: expected results of schema {SCHEMA}, got {found!r}")
    try:
        _touch(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(
            f"{path}: expected the keys of schema {SCHEMA}, missing {error}"
        ) from None
    return record


def _touch(record: dict[str, Any]) -> None:
    """Use everything the report uses, so that a damaged file is an error at once."""
    heading(record), facts(record), remarks(record), stem(record)
    for row in record["rows"]:
        cells(row, columns(record))
        for goal in row["goals"]:
            goal_text(row, goal)


def read_csv(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines())) if path.is_file() else []


# --- Text -----------------------------------------------------------------------------------------


def heading(record: dict[str, Any]) -> str:
    return f"{record['family']} on {record['machine']['name']}"


def stem(record: dict[str, Any]) -> str:
    """Of file names; no two results share it."""
    return f"{record['machine']['slug']}-{record['family']}"


def facts(record: dict[str, Any]) -> str:
    """One line: what was measured, with what, on what."""
    machine, versions = record["machine"], record["versions"]
    if machine["device"] == "cuda":
        where = [f"CUDA {machine['cuda']}", f"{machine['memory_gib']} GiB"]
    else:
        where = [f"{record['threads']} threads", machine["capability"]]
    dirty = " with changes" if record["dirty"] else ""
    copy = record["copy_gb_s"]
    parts = [
        *where,
        f"fastest copy {copy:.0f} GB/s" if copy else "nothing measured",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"commit {record['commit'][:12]}{dirty}",
        record["date"][:10],
        "all rows" if record["full"] else "quick rows",
    ]
    return " · ".join(parts)


def label(row: dict[str, Any]) -> str:
    """laplacian_build bilinear dfm_latents, with what is not the default."""
    extra = [row["layout"]] if row["layout"] != "contiguous" else []
    extra += [row["direction"]] if row["direction"] != "forward" else []
    variant = [] if row["op"].startswith(row["variant"]) else [row["variant"]]
    return " ".join([row["op"], *variant, row["case"], *extra])


def dtype(row: dict[str, Any]) -> str:
    return DTYPES.get(row["dtype"], row["dtype"])


def times(speedup: dict[str, float] | None) -> str:
    return "" if speedup is None else f"{speedup['median']:.3g}"


def cells(row: dict[str, Any], shown: Sequence[str]) -> list[str]:
    """The row as the table shows it, in the columns named."""
    speedup, strongest = row["speedup"], row["strongest"]
    product = row.get("product_fraction")
    values = {
        "row": label(row),
        "dtype": dtype(row),
        "ms": f"{row['providers']['ours']['ms']['median']:.3g}",
        "of copy": f"{row['copy_fraction']['median']:.0%}",
        "of peak": f"{product['median']:.0%}" if product else "",
        f"{TIMES} eager": times(speedup.get("eager")),
        f"{TIMES} compiled": times(speedup.get("compiled")),
        f"{TIMES} best library": f"{times(speedup[strongest])} {strongest}" if strongest else "",
    }
    return [values[name] for name in shown]


def columns(record: dict[str, Any]) -> list[str]:
    """Milliseconds are a GPU's: a shared CPU's say little. Peaks where there are products."""
    ms = ["ms"] if is_gpu(record) else []
    peak = ["of peak"] if any(row.get("product_fraction") for row in record["rows"]) else []
    speedups = [f"{TIMES} {name}" for name in ("eager", "compiled", "best library")]
    return ["row", "dtype", *ms, "of copy", *peak, *speedups]


def goal_text(row: dict[str, Any], goal: dict[str, Any]) -> str:
    """laplacian_build ... fp32: 0.71 of copy, goal 0.6 of copy"""
    rival = DTYPES.get(goal["against"], goal["against"])
    kinds = {"copy": "of copy", "memory": "of eager's peak memory less"}
    kind = kinds.get(rival, f"{TIMES} {rival}")
    measured = "not measured" if goal["met"] is None else f"{goal['measured']:.3g} {kind}"
    return f"{label(row)} {dtype(row)}: {measured}, goal {goal['at_least']:g} {kind}"


def goals(record: dict[str, Any]) -> Iterator[tuple[bool | None, str]]:
    for row in record["rows"]:
        for goal in row["goals"]:
            yield goal["met"], goal_text(row, goal)


def is_gpu(record: dict[str, Any]) -> bool:
    return record["machine"]["device"] == "cuda"


def cases(record: dict[str, Any]) -> str:
    """Shapes behind the names; the build's input is the finest tensor."""
    shapes: dict[str, Sequence[int]] = {}
    for row in record["rows"]:
        shapes.setdefault(row["case"], row["shape"])
    return ", ".join(f"{name} {TIMES.join(map(str, s))}" for name, s in shapes.items())


def remarks(record: dict[str, Any]) -> list[str]:
    """Rivals that differ or did not run, rows measured on a busy machine, or before the others."""
    found: dict[str, None] = {}
    for row in record["rows"]:
        for name, entry in row["providers"].items():
            if "note" in entry and name not in NOT_RIVALS:
                found[f"{name}: {entry['note']}"] = None
        for name, why in row["missing"].items():
            found[f"no {name}: {why}"] = None
    earlier: dict[str, list[str]] = {}
    for row in record["rows"]:
        if "commit" in row:
            when = f"measured on {row['date'][:10]} at commit {row['commit'][:12]}"
            earlier.setdefault(when, []).append(f"{label(row)} {dtype(row)}")
    shaky = [f"{label(row)} {dtype(row)}" for row in record["rows"] if not row["steady"]]
    busy = [f"measured on a busy machine, repeat: {', '.join(shaky)}"] if shaky else []
    return [*busy, *(f"{when}: {', '.join(rows)}" for when, rows in earlier.items()), *found]
