"""The page of `dfm-fast report`: one HTML file that needs nothing beside it, nor a network."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfm_fast.cli._glossary import FAMILIES, OPERATORS, TERMS
from dfm_fast.cli._results import (
    TIMES,
    cases,
    cells,
    columns,
    dtype,
    facts,
    goals,
    is_gpu,
    label,
    remarks,
    stem,
)
from dfm_fast.cli._summary import (
    KINDS,
    by_machine,
    counts,
    losses,
    plural,
    rows_of,
    sentences,
    speedup_sentence,
    spreads,
    verdict,
    verdict_of,
)

STYLE = (Path(__file__).parent / "page.css").read_text()
SIGNS = {"faster": "▲ faster", "level": "≈ level", "slower": "▼ slower", "": ""}
INTRODUCTION = (
    "dfm_fast computes pieces of image generators in less time than plain PyTorch, with the same "
    "results. This page says how much less. Every row computed the right result before it was "
    "timed, and all competitors took turns in one loop on one machine."
)
COMMANDS = (
    "make bench                                  # quick rows of your machine, and this page\n"
    "make bench-full                             # all rows\n"
    "dfm-fast report benchmarks/results/local    # this page again"
)


@dataclass(frozen=True)
class Extras:
    """What the page shows after the rows."""

    photographs: Sequence[Path] = ()
    errors: Sequence[Sequence[str]] = ()  # a table's lines, the head first
    curves: Sequence[Path] = ()
    cold: Sequence[Sequence[str]] = ()


def page(
    records: Sequence[dict[str, Any]],
    plots: dict[str, list[Path]],
    extras: Extras,
) -> str:
    body = "".join(machine_section(group, plots) for group in by_machine(records))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'><title>dfm_fast: how fast</title>"
        f"<style>{STYLE}</style></head><body><main><h1>dfm_fast: how fast</h1>"
        f"<p>{INTRODUCTION}</p>{body}{extra_sections(extras)}"
        f"<h2>Reproduce</h2><pre>{html.escape(COMMANDS)}</pre></main></body></html>\n"
    )


# --- A machine ------------------------------------------------------------------------------------


def machine_section(records: Sequence[dict[str, Any]], plots: dict[str, list[Path]]) -> str:
    name = html.escape(records[0]["machine"]["name"])
    lines = items(sentences(records))
    return (
        f"<h2>In short: {name}</h2>{tiles(records)}<ul>{lines}</ul>{lost(records)}"
        f"{contents(records)}{glossary()}"
        + "".join(family_section(record, plots.get(stem(record), [])) for record in records)
    )


def tiles(records: Sequence[dict[str, Any]]) -> str:
    """The counts, large."""
    found = counts(rows_of(records))
    words = {
        "faster": "faster than everybody else",
        "level": "level with the fastest other",
        "slower": "slower than somebody",
    }
    return (
        "<div class='tiles'>"
        + "".join(
            f"<div class='{kind}'><b>{found[kind]}</b> {SIGNS[kind].split()[0]} {text}</div>"
            for kind, text in words.items()
        )
        + "</div>"
    )


def lost(records: Sequence[dict[str, Any]]) -> str:
    """Losses by name; a long list is folded, its number is not."""
    found = losses(rows_of(records))
    if not found:
        return "<p>No row in which somebody else is faster.</p>"
    shown, sign = " open" if len(found) <= 12 else "", SIGNS["slower"].split()[0]
    return (
        f"<details class='lost'{shown}><summary>{sign} Where somebody else is faster: "
        f"{plural(found)}, the worst first</summary><ul>{items(found)}</ul></details>"
    )


def contents(records: Sequence[dict[str, Any]]) -> str:
    """One line a family: where to look."""
    rows = []
    for record in records:
        found, own = counts(record["rows"]), record["rows"]
        link = f"<a href='#{stem(record)}'>{html.escape(title(record))}</a>"
        middle = [middle_of(own, kind) for kind in KINDS]
        numbers = [str(len(own)), *(str(found[k]) for k in ("faster", "level", "slower")), *middle]
        rows.append([link, *map(html.escape, numbers)])
    head = ["family", "rows", *(SIGNS[k] for k in ("faster", "level", "slower"))]
    head += [f"{TIMES} {name}, median" for name in ("eager", "compiled", "library")]
    return "<h3>Families</h3>" + raw_table(head, rows)


def middle_of(rows: Sequence[dict[str, Any]], kind: str) -> str:
    """The median speed-up, as a cell."""
    values = [spreads(row)[kind]["median"] for row in rows if kind in spreads(row)]
    return f"{statistics.median(values):.3g}" if values else ""


def glossary() -> str:
    terms = "".join(
        f"<dt>{name.format(times=TIMES)}</dt><dd>{html.escape(text)}</dd>"
        for name, text in TERMS.items()
    )
    return f"<h3>How to read the tables</h3><dl>{terms}</dl>"


# --- A family -------------------------------------------------------------------------------------


def title(record: dict[str, Any]) -> str:
    return FAMILIES.get(record["family"], (record["family"], ""))[0]


def family_section(record: dict[str, Any], images: Sequence[Path]) -> str:
    about = FAMILIES.get(record["family"], ("", ""))[1]
    named = dict.fromkeys(row["op"] for row in record["rows"])
    told = [f"<code>{op}</code>: {OPERATORS[op]}" for op in named if op in OPERATORS]
    roofline, speedups = images[0] if images else None, images[1:]
    pictures = "".join(figure(path, *described(record, "speedups")) for path in speedups)
    more = figure(roofline, *described(record, "roofline")) if roofline else ""
    return (
        f"<section id='{stem(record)}'><h2>{html.escape(title(record))}</h2>"
        f"<p>{about} {'; '.join(told)}.</p>{pictures}{rows_table(record)}{goals_list(record)}"
        f"<p class='facts'>Shapes: {html.escape(cases(record))}.</p>"
        f"<details><summary>Nearness to the limit, memory, machine, remarks</summary>{more}"
        f"{launches(record)}<p class='facts'>{html.escape(facts(record))}</p>"
        f"<ul class='facts'>{items(remarks(record))}</ul></details></section>"
    )


def described(record: dict[str, Any], kind: str) -> tuple[str, str]:
    """(alternative text, caption) of a plot."""
    if kind == "roofline":
        caption = f"{title(record)}: how near every row is to a copy of as many bytes"
        return f"Bars. {caption}. The table's column 'of copy' has the numbers.", caption
    caption = f"{title(record)}: how many times faster; bars to the left of 1 are losses"
    told = " ".join(filter(None, (speedup_sentence(record["rows"], kind) for kind in KINDS)))
    return f"Bars. {caption}. {told}", caption


def rows_table(record: dict[str, Any]) -> str:
    """The rows, each with its verdict in words, speed-ups marked as wins and losses."""
    head = columns(record)
    speedups = {f"{TIMES} {'best library' if k == 'library' else k}": k for k in KINDS}
    lines = []
    for row in record["rows"]:
        found, own = verdict(row), spreads(row)
        line = [cell(SIGNS[found] + ("" if row["steady"] else " (busy)"), found)]
        for name, text in zip(head, cells(row, head), strict=True):
            kind = verdict_of(own.get(speedups.get(name, "")))
            line.append(cell(text, kind))
        lines.append(line[1:3] + line[:1] + line[3:])
    return marked_table([*head[:2], "verdict", *head[2:]], lines)


def goals_list(record: dict[str, Any]) -> str:
    marks = {True: ("faster", "met"), False: ("slower", "missed"), None: ("level", "open")}
    held = list(goals(record))
    lines = "".join(
        f"<li class='{marks[met][0]}'>{marks[met][1]}: {html.escape(text)}</li>"
        for met, text in held
    )
    met = sum(met is True for met, _ in held)
    summary = f"Goals: {met} of {len(held)} met"
    return f"<details><summary>{summary}</summary><ul>{lines}</ul></details>" if held else ""


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


def extra_sections(extras: Extras) -> str:
    """Each with a sentence on what it shows; nothing of what was not made."""
    body = ""
    if extras.curves:
        body += (
            "<h2>How cost grows</h2><p>Whole models, ours and the same in plain PyTorch. Both axes "
            "are logarithmic: a line of slope 1 doubles where its axis does.</p>"
        ) + "".join(map(curve, extras.curves))
    if extras.cold:
        body += (
            "<h2>Cold start</h2><p>Seconds that a fresh process waits. Importing dfm_fast is to "
            "take 0.3 s at most over torch itself.</p>"
        ) + table(extras.cold[0], extras.cold[1:])
    if extras.photographs:
        body += (
            "<h2>Photographs</h2><p>A picture as a pyramid: its small version, the details that "
            "each larger size adds, and what putting them together again gives.</p>"
        ) + "".join(map(photograph, extras.photographs))
    if extras.errors:
        body += (
            "<h2>Reconstruction</h2><p>The largest difference between a picture and what its "
            "pyramid collapses to, beside the rounding that is allowed.</p>"
        ) + table(extras.errors[0], extras.errors[1:])
    return body


def curve(path: Path) -> str:
    caption = "Time, throughput and peak memory of whole models as the work or the machine grows"
    return figure(path, f"Curves. {caption}, ours and plain PyTorch", caption)


def photograph(path: Path) -> str:
    name = path.stem.replace("_", " ")
    told = "coarse level, details, and the picture put together again"
    return figure(path, f"A pyramid of the photograph {name}: {told}", name)


# --- HTML -----------------------------------------------------------------------------------------


def items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{html.escape(line)}</li>" for line in lines)


def cell(text: str, kind: str = "") -> str:
    mark = f" class='{kind}'" if kind else ""
    return f"<td{mark}>{html.escape(text)}</td>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return marked_table(head, [[cell(text) for text in row] for row in rows])


def raw_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return marked_table(head, [[f"<td>{text}</td>" for text in row] for row in rows])


def marked_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of finished cells. It scrolls by itself, so that its head and first column stay."""
    names = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        "<div class='table' tabindex='0'><table>"
        f"<thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(path: Path, alt: str, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    alt = html.escape(alt, quote=True)
    return (
        f"<figure><img loading='lazy' src='data:image/png;base64,{data}' alt='{alt}'>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
