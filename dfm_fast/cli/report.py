"""`dfm-fast report`: benchmark results (JSON) to Markdown, PNG plots and one HTML page.

Reads what `pytest benchmarks/ --benchmark-only` wrote, and, where there is one, the `photographs`
folder beside it. Needs matplotlib for the plots only.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1
DEFAULT = Path("benchmarks/results/local")
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
TIMES = "\N{MULTIPLICATION SIGN}"
NOT_RIVALS = ("ours", "copy", "eager", "compiled", "float32")


class ReportError(Exception):
    """Something about the results, said in one line."""


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
        photographs = sorted((args.results / "photographs").glob("*.png"))
        errors = read_csv(args.results / "photographs" / "reconstruction.csv")
        (out / "report.md").write_text(text)
        (out / "index.html").write_text(page(records, plots, photographs, errors))
    except (ReportError, OSError) as error:
        print(f"dfm-fast report: {error}", file=sys.stderr)
        return 2
    print(text)
    print(
        f"written: {out / 'report.md'}, {out / 'index.html'}, {sum(map(len, plots.values()))} plots"
    )
    return 0


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
        cells(row, with_ms=True)
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


def cells(row: dict[str, Any], with_ms: bool) -> list[str]:
    """The row as the table shows it."""
    speedup, strongest = row["speedup"], row["strongest"]
    ms = [f"{row['providers']['ours']['ms']['median']:.3g}"] if with_ms else []
    best = f"{times(speedup[strongest])} {strongest}" if strongest else ""
    return [
        label(row),
        dtype(row),
        *ms,
        f"{row['copy_fraction']['median']:.0%}",
        times(speedup.get("eager")),
        times(speedup.get("compiled")),
        best,
    ]


def columns(with_ms: bool) -> list[str]:
    ms = ["ms"] if with_ms else []
    return [
        "row",
        "dtype",
        *ms,
        "of copy",
        f"{TIMES} eager",
        f"{TIMES} compiled",
        f"{TIMES} best library",
    ]


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
    """Rivals that differ or did not run, and rows measured on a busy machine."""
    found: dict[str, None] = {}
    for row in record["rows"]:
        for name, entry in row["providers"].items():
            if "note" in entry and name not in NOT_RIVALS:
                found[f"{name}: {entry['note']}"] = None
        for name, why in row["missing"].items():
            found[f"no {name}: {why}"] = None
    shaky = [f"{label(row)} {dtype(row)}" for row in record["rows"] if not row["steady"]]
    busy = [f"measured on a busy machine, repeat: {', '.join(shaky)}"] if shaky else []
    return [*busy, *found]


def markdown(records: Sequence[dict[str, Any]]) -> str:
    return "\n".join(section(record) for record in records)


def section(record: dict[str, Any]) -> str:
    head = columns(is_gpu(record))
    lines = [f"### {heading(record)}", "", facts(record), ""]
    lines += ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    lines += ["| " + " | ".join(cells(row, is_gpu(record))) + " |" for row in record["rows"]]
    lines += ["", f"Shapes: {cases(record)}.", ""]
    lines += [f"Remarks: {'; '.join(remarks(record))}.", ""] if remarks(record) else []
    held = list(goals(record))
    lines += (
        [f"Goals met: {sum(met is True for met, _ in held)} of {len(held)}.", ""] if held else []
    )
    lines += [f"- missed: {text}" for met, text in held if met is False]
    lines += [f"- open: {text}" for met, text in held if met is None]
    return "\n".join(lines).rstrip() + "\n"


# --- Plots and page -------------------------------------------------------------------------------


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


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c1c1c; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
tbody tr:hover { background: #f3f6fa }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0 }
.facts, figcaption { color: #555 } .missed { color: #a3330b } .met { color: #1d6b3c }
figure { margin: 1.5rem 0 }
"""


def page(
    records: Sequence[dict[str, Any]],
    plots: dict[str, list[Path]],
    photographs: Sequence[Path],
    errors: Sequence[Sequence[str]],
) -> str:
    """One page that needs nothing beside it."""
    body = "".join(html_section(record, plots.get(stem(record), [])) for record in records)
    if photographs:
        body += "<h2>Photographs</h2>" + "".join(map(figure, photographs))
    if errors:
        body += "<h2>Reconstruction</h2>" + table(errors[0], errors[1:])
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'><title>dfm_fast benchmarks</title>"
        f"<style>{STYLE}</style></head><body><h1>dfm_fast benchmarks</h1>{body}</body></html>\n"
    )


def html_section(record: dict[str, Any], images: Sequence[Path]) -> str:
    rows = [cells(row, is_gpu(record)) for row in record["rows"]]
    marks = {True: "met", False: "missed", None: "open"}
    held = "".join(
        f"<li class='{marks[met]}'>{marks[met]}: {html.escape(text)}</li>"
        for met, text in goals(record)
    )
    return (
        f"<h2>{html.escape(heading(record))}</h2><p class='facts'>{html.escape(facts(record))}</p>"
        + "".join(map(figure, images))
        + table(columns(is_gpu(record)), rows)
        + f"<p class='facts'>Shapes: {html.escape(cases(record))}.</p>"
        + f"<p class='facts'>{html.escape('; '.join(remarks(record)))}</p>"
        + launches(record)
        + (f"<h3>Goals</h3><ul>{held}</ul>" if held else "")
    )


def launches(record: dict[str, Any]) -> str:
    """The peak memory of each; on a GPU the plain call and the launches too."""
    who, facts = ("ours", "eager", "compiled"), {"peak_mib": "peak MiB"}
    title = "Peak memory"
    if is_gpu(record):
        title = "Plain calls, launches, memory"
        facts = {"call_ms": "call ms", "launches": "launches", **facts}
    head = ["row", "dtype", *(f"{what}, {name}" for what in facts.values() for name in who)]
    rows = []
    for row in record["rows"]:
        entries = [row["providers"].get(name, {}) for name in who]
        figures = [e.get(key) for key in facts for e in entries]
        rows.append([label(row), dtype(row), *("" if f is None else f"{f:.3g}" for f in figures)])
    return f"<h3>{title}</h3>" + table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table>"


def figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(path.stem.replace("_", " "))
    source = f"data:image/png;base64,{data}"
    return (
        f"<figure><img src='{source}' alt='{caption}'><figcaption>{caption}</figcaption></figure>"
    )
