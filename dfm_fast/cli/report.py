"""`dfm-fast report`: benchmark results (JSON) to Markdown, PNG plots and one HTML page.

Reads what `pytest benchmarks/ --benchmark-only` wrote, and, where they are, the `photographs`
folder and the scaling curves beside it. Needs matplotlib for the plots only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfm_fast.cli import _page
from dfm_fast.cli._results import (
    ReportError,
    cases,
    cells,
    columns,
    facts,
    goals,
    heading,
    load,
    read_csv,
    remarks,
    stem,
)
from dfm_fast.cli._summary import by_machine, losses, rows_of, sentences

DEFAULT = Path("benchmarks/results/local")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", nargs="?", type=Path, default=DEFAULT, help=f"folder (default: {DEFAULT})"
    )
    parser.add_argument("--out", type=Path, help="where to write (default: RESULTS/report)")


def run(args: argparse.Namespace) -> int:
    """Write report.md, index.html and the plots; print the Markdown. 2 where that is impossible."""
    try:
        records = load(args.results)
        out = args.out or args.results / "report"
        out.mkdir(parents=True, exist_ok=True)
        text = markdown(records)
        plots = draw(records, out)
        (out / "report.md").write_text(text)
        (out / "index.html").write_text(_page.page(records, plots, extras(args.results)))
    except (ReportError, OSError) as error:
        print(f"dfm-fast report: {error}", file=sys.stderr)
        return 2
    print(text)
    print(
        f"written: {out / 'report.md'}, {out / 'index.html'}, {sum(map(len, plots.values()))} plots"
    )
    return 0


def extras(results: Path) -> _page.Extras:
    """What lies beside the rows, where it was made."""
    photographs, scaling = results / "photographs", results / "comparisons" / "scaling"
    return _page.Extras(
        photographs=sorted(photographs.glob("*.png")),
        errors=read_csv(photographs / "reconstruction.csv"),
        curves=sorted(scaling.glob("*.png")),
        cold=read_csv(scaling / "cold_start.csv"),
    )


def markdown(records: Sequence[dict[str, Any]]) -> str:
    parts = []
    for machine in by_machine(records):
        parts += [summary(machine), *map(section, machine)]
    return "\n".join(parts)


def summary(records: Sequence[dict[str, Any]]) -> str:
    lines = [f"### In short: {records[0]['machine']['name']}", ""]
    lines += [f"- {sentence}" for sentence in sentences(records)]
    lost = losses(rows_of(records))
    lines += ["", "Where somebody else is faster:", "", *(f"- {text}" for text in lost)] * bool(
        lost
    )
    return "\n".join(lines) + "\n"


def section(record: dict[str, Any]) -> str:
    head = columns(record)
    lines = [f"### {heading(record)}", "", facts(record), ""]
    lines += ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    lines += ["| " + " | ".join(cells(row, head)) + " |" for row in record["rows"]]
    lines += ["", f"Shapes: {cases(record)}.", ""]
    lines += [f"Remarks: {'; '.join(remarks(record))}.", ""] if remarks(record) else []
    held = list(goals(record))
    lines += (
        [f"Goals met: {sum(met is True for met, _ in held)} of {len(held)}.", ""] if held else []
    )
    lines += [f"- missed: {text}" for met, text in held if met is False]
    lines += [f"- open: {text}" for met, text in held if met is None]
    return "\n".join(lines).rstrip() + "\n"


def draw(records: Sequence[dict[str, Any]], out: Path) -> dict[str, list[Path]]:
    """PNG files by machine and family; none where matplotlib is missing, which is said."""
    try:
        from dfm_fast.cli import _plots
    except ImportError as error:
        print(f"dfm-fast report: no plots, they need matplotlib ({error})", file=sys.stderr)
        return {}
    drawn: dict[str, list[Path]] = {}
    for record in records:
        if record["rows"]:
            drawn[stem(record)] = _plots.write(record, out)
    return drawn
