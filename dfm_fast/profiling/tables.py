"""A profile as a table, of text or of HTML."""

from __future__ import annotations

import html as escaping
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dfm_fast.profiling.profiles import Profile, Row

HEAD = ["operator", "calls", "ms", "share", "MB", "GB/s", "of limit", "above floor"]
NAME = 50  # widest name, with its shapes


def table(profile: Profile, by: str, limit: int) -> tuple[list[str], list[list[str]]]:
    """(heads of the columns, rows of cells): the longest first, then the others as one, then the
    time outside of operators."""
    rows = profile.rows(by)
    whole = profile.operator_seconds + profile.outside_seconds
    gpu = profile.device == "cuda"
    cells = [_cells(row, whole, gpu) for row in rows[:limit]]
    if rest := rows[limit:]:
        cells.append(_others(rest, whole, gpu))
    outside = profile.outside_seconds
    cells.append(["outside operators", "", *_time(outside, whole), *[""] * (4 + gpu)])
    return HEAD + ["launches"] * gpu, cells


def _cells(row: Row, whole: float, gpu: bool) -> list[str]:
    name = f"{row.name} {row.shapes}".rstrip()
    return [
        name if len(name) <= NAME else f"{name[: NAME - 3]}...",
        str(row.calls),
        *_time(row.seconds, whole),
        number(row.bytes / 1e6),
        number(row.bytes / row.seconds / 1e9) if row.seconds and row.bytes else "",
        of_limit(row),
        number(1e3 * row.above_floor),
        *([str(row.launches)] if gpu else []),
    ]


def _others(rows: Sequence[Row], whole: float, gpu: bool) -> list[str]:
    """Their limits are not one's."""
    seconds = sum(row.seconds for row in rows)
    return [
        counted(len(rows), "other"),
        str(sum(row.calls for row in rows)),
        *_time(seconds, whole),
        number(sum(row.bytes for row in rows) / 1e6),
        "",
        "",
        number(1e3 * sum(row.above_floor for row in rows)),
        *([str(sum(row.launches for row in rows))] if gpu else []),
    ]


def _time(seconds: float, whole: float) -> list[str]:
    return [number(1e3 * seconds), f"{seconds / whole:.1%}" if whole else ""]


def of_limit(row: Row) -> str:
    """ "71% copy": of the speed that binds it."""
    return f"{row.floor / row.seconds:.0%} {row.bound}" if row.bound and row.seconds else ""


def number(value: float) -> str:
    """Three digits, with no exponent."""
    if value >= 100 or not value:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else "<0.001"


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def text(profile: Profile, by: str, limit: int) -> str:
    head, rows = table(profile, by, limit)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        first, *others = (cell.rjust(w) for cell, w in zip(row, widths, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *others]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def html(profile: Profile, by: str, limit: int) -> str:
    """Table and sentences, as notebooks show them."""
    from dfm_fast.cli._page import table as html_table

    sentences = "".join(
        f"<p>{escaping.escape(line)}</p>" for line in profile.summary().splitlines()
    )
    return html_table(*table(profile, by, limit)) + sentences
