"""Results in a few sentences: what was faster, by how much, what was not, how near the limit."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from dfm_fast.cli._glossary import PRODUCTS
from dfm_fast.cli._results import NOT_RIVALS, TIMES, dtype, label

KINDS = {
    "eager": "eager PyTorch",
    "compiled": "torch.compile",
    "library": "the best other library",
}


def by_machine(records: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Records of one machine after the other."""
    ordered = sorted(records, key=lambda record: record["machine"]["slug"])
    for _, group in groupby(ordered, key=lambda record: record["machine"]["slug"]):
        yield list(group)


def rows_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for record in records for row in record["rows"]]


def plural(rows: Sequence[Any]) -> str:
    return f"{len(rows)} row{'s' * (len(rows) != 1)}"


def spreads(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Speed-ups by kind: eager, compiled, and the strongest library."""
    names = {"eager": "eager", "compiled": "compiled", "library": row["strongest"]}
    return {kind: row["speedup"][n] for kind, n in names.items() if n in row["speedup"]}


def toughest(row: dict[str, Any]) -> tuple[str, dict[str, float]] | None:
    """(name, speed-up) of the fastest of all others."""
    rivals = {n: s for n, s in row["speedup"].items() if n not in NOT_RIVALS}
    rivals |= {n: row["speedup"][n] for n in ("eager", "compiled") if n in row["speedup"]}
    return min(rivals.items(), key=lambda item: item[1]["median"], default=None)


def verdict_of(speedup: dict[str, float] | None) -> str:
    """faster, level or slower: the quartiles of the ratio decide."""
    if speedup is None:
        return ""
    if speedup["q1"] > 1:
        return "faster"
    return "slower" if speedup["q3"] < 1 else "level"


def verdict(row: dict[str, Any]) -> str:
    found = toughest(row)
    return verdict_of(found[1]) if found else ""


def name_of(rival: str) -> str:
    return KINDS.get(rival, rival)


def losses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows in which somebody else is faster, the worst first."""
    found = ((toughest(row), row) for row in rows if verdict(row) == "slower")
    lost = [(pair, row) for pair, row in found if pair is not None]
    lost.sort(key=lambda item: item[0][1]["median"])
    return [
        f"{label(row)} {dtype(row)}: {name_of(name)} is {1 / speedup['median']:.2f}{TIMES} as fast"
        for (name, speedup), row in lost
    ]


def limit(row: dict[str, Any]) -> tuple[str, float]:
    """(copy or product, fraction): the ceiling that the row is nearest to; ("unknown", 0) for
    results with no peak of products beside products."""
    if "product_fraction" not in row and row["op"] in PRODUCTS:
        return "unknown", 0.0
    found = {name: row.get(f"{name}_fraction") for name in ("copy", "product")}
    fractions = {name: spread["median"] for name, spread in found.items() if spread}
    return max(fractions.items(), key=lambda item: item[1])


def counts(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    found = [verdict(row) for row in rows]
    return {kind: found.count(kind) for kind in ("faster", "level", "slower")}


def speedup_sentence(rows: Sequence[dict[str, Any]], kind: str) -> str:
    own = [
        (spreads(row)[kind]["median"], f"{label(row)} {dtype(row)}")
        for row in rows
        if kind in spreads(row)
    ]
    if not own:
        return ""
    middle, (low, slow), (high, fast) = statistics.median(v for v, _ in own), min(own), max(own)
    return (
        f"Against {KINDS[kind]} ({plural(own)}): {middle:.3g}{TIMES} as fast in the median, from "
        f"{low:.3g}{TIMES} ({slow}) to {high:.3g}{TIMES} ({fast})."
    )


LIMITS = {
    "copy": "bound by memory, whose limit is a plain copy of as many bytes: ",
    "product": "bound by arithmetic, whose limit is a large matrix product: ",
    "unknown": "bound by matrix products, whose limit was not measured with them",
}


def limit_sentence(rows: Sequence[dict[str, Any]], name: str) -> str:
    own = [row for row in rows if limit(row)[0] == name]
    if not own:
        return ""
    fractions, nearest = [limit(row)[1] for row in own], max(own, key=lambda row: limit(row)[1])
    reached = (
        f"{statistics.median(fractions):.0%} of it in the median, "
        f"{max(fractions):.0%} at best ({label(nearest)} {dtype(nearest)})"
    )
    are = "is" if len(own) == 1 else "are"
    return f"{plural(own)} {are} {LIMITS[name]}{'' if name == 'unknown' else reached}."


def sentences(records: Sequence[dict[str, Any]]) -> list[str]:
    """The summary of one machine."""
    rows = rows_of(records)
    found, busy = counts(rows), [row for row in rows if not row["steady"]]
    held = [goal["met"] for row in rows for goal in row["goals"]]
    return [
        f"{plural(rows)} measured. Ours is the fastest in {found['faster']}, level with the "
        f"fastest other in {found['level']}, slower than somebody in {found['slower']}.",
        *filter(None, (speedup_sentence(rows, kind) for kind in KINDS)),
        *filter(None, (limit_sentence(rows, name) for name in LIMITS)),
        *([f"Goals met: {held.count(True)} of {len(held)}."] if held else []),
        *([f"{plural(busy)} measured on a busy machine: to be repeated."] if busy else []),
    ]
