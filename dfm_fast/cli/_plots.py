"""Plots of `dfm-fast report`. Importing this needs matplotlib, and Pillow, which comes with it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter
from PIL import Image

from dfm_fast.cli._results import NOT_RIVALS, TIMES, dtype, heading, label, stem

LIMIT = 200_000  # bytes of one PNG
# Okabe & Ito's palette: told apart by colour-blind readers, and in grey.
FORWARD, BACKWARD, GOAL, INK = "#0072B2", "#56B4E9", "#D55E00", "#1c1c1c"
RIVALS = {"eager": "#999999", "compiled": "#0072B2", "library": "#009E73"}


def write(record: dict[str, Any], out: Path) -> list[Path]:
    """Two plots of one machine and family."""
    plots = {"roofline": roofline(record), "speedups": speedups(record)}
    paths = []
    for name, figure in plots.items():
        paths.append(out / f"{stem(record)}-{name}.png")
        save(figure, paths[-1])
    return paths


def save(figure: Figure, path: Path) -> None:
    path.write_bytes(png(figure))


def png(figure: Figure) -> bytes:
    """At the best resolution that keeps the file under the limit; 64 colours are enough."""
    for dpi in (140, 110, 80, 60):
        data, small = io.BytesIO(), io.BytesIO()
        figure.savefig(data, dpi=dpi, bbox_inches="tight")
        image = Image.open(data).convert("RGB").quantize(64, dither=Image.Dither.NONE)
        image.save(small, "PNG", optimize=True)
        if small.tell() <= LIMIT:
            break
    return small.getvalue()


def canvas(record: dict[str, Any], title: str, inches_per_row: float) -> tuple[Figure, Axes]:
    """Axes with one line per row, the first on top."""
    rows = record["rows"]
    figure = Figure(figsize=(10, 1.6 + inches_per_row * len(rows)))
    axes = figure.subplots()
    axes.set_yticks(range(len(rows)), [f"{label(row)}  {dtype(row)}" for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(f"{title}\n{heading(record)}", loc="left", fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def goal_tick(axes: Axes, x: float, y: float, height: float, first: bool) -> None:
    name = "goal" if first else None
    axes.plot([x, x], [y - height, y + height], color=GOAL, linewidth=2, label=name, zorder=4)


def goal_of(row: dict[str, Any], against: str) -> float | None:
    found = (goal["at_least"] for goal in row["goals"] if goal["against"] == against)
    return next(found, None)


def roofline(record: dict[str, Any]) -> Figure:
    """Fraction of the copy bandwidth of the same run, with quartiles; figures in the margin."""
    figure, axes = canvas(record, "Least bytes per second, as a fraction of a copy's", 0.3)
    named: set[str] = set()
    for y, row in enumerate(record["rows"]):
        fraction, backward = row["copy_fraction"], row["direction"] == "backward"
        colour = BACKWARD if backward else FORWARD
        name = first_time(named, row["direction"])
        axes.barh(y, fraction["median"], 0.62, color=colour, label=name)
        axes.plot([fraction["q1"], fraction["q3"]], [y, y], color=INK, linewidth=1.2, zorder=3)
        goal = goal_of(row, "copy")
        if goal is not None:
            goal_tick(axes, goal, y, 0.42, first_time(named, "goal") is not None)
        text = f"{fraction['median']:.0%}   {row['providers']['ours']['gb_s']:,.0f} GB/s"
        missed = goal is not None and fraction["median"] < goal
        axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), **value_style(missed))
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    widest = max(row["copy_fraction"]["q3"] for row in record["rows"])
    axes.set_xlim(0, max(1.05, widest * 1.03))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    copy = record["copy_gb_s"]
    axes.set_xlabel(f"dashed: the copy itself, {copy:,.0f} GB/s at most · thin line: quartiles")
    legend(axes)
    return figure


def value_style(missed: bool) -> dict[str, Any]:
    return {"va": "center", "fontsize": 8, "color": GOAL if missed else INK}


def first_time(seen: set[str], name: str) -> str | None:
    """The name for the legend, once."""
    if name in seen:
        return None
    seen.add(name)
    return name


def legend(axes: Axes) -> None:
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, fontsize=9, borderpad=0
    )


def rivals_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(kind, provider) of the row's bars; the strongest library first among libraries."""
    libraries = [name for name in row["speedup"] if name not in NOT_RIVALS]
    libraries.sort(key=lambda name: row["speedup"][name]["median"])
    found = [("eager", "eager"), ("compiled", "compiled"), *(("library", n) for n in libraries)]
    return [(kind, name) for kind, name in found if name in row["speedup"]]


def speedups(record: dict[str, Any]) -> Figure:
    """Bars from 1x, on a log axis: to the right ours is faster, to the left slower."""
    figure, axes = canvas(record, "How many times faster than ...", 0.5)
    named: set[str] = set()
    for y, row in enumerate(record["rows"]):
        bars = rivals_of(row)
        for slot, (kind, name) in enumerate(bars):
            at = y + 0.23 * (slot - (len(bars) - 1) / 2)
            speedup_bar(axes, at, row["speedup"][name], goal_of(row, name), kind, name, named)
    axes.set_xscale("log")
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlim(*limits(record["rows"]))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}{TIMES}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("log scale · thin line: quartiles · torch.compile: its fastest form")
    legend(axes)
    return figure


def speedup_bar(
    axes: Axes,
    y: float,
    speedup: dict[str, float],
    goal: float | None,
    kind: str,
    name: str,
    named: set[str],
) -> None:
    median, text = speedup["median"], {"eager": "eager PyTorch", "compiled": "torch.compile"}
    shown = first_time(named, text.get(kind, "other libraries"))
    axes.barh(y, median - 1, 0.2, left=1, color=RIVALS[kind], label=shown)
    axes.plot([speedup["q1"], speedup["q3"]], [y, y], color=INK, linewidth=1)
    end, missed = max(speedup["q3"], 1), goal is not None and median < goal
    written = f"{median:.3g}{TIMES}" + (f" {name}" if kind == "library" else "")
    if goal is not None:
        goal_tick(axes, goal, y, 0.115, first_time(named, "goal") is not None)
        end = max(end, goal)  # the text past the tick, not across it
    if missed:
        written += f", goal {goal:g}{TIMES}"
    axes.text(end * 1.04, y, written, **value_style(missed))


def limits(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    shown = [s for row in rows for n, s in row["speedup"].items() if n != "float32"]
    goals = [
        g["at_least"]
        for row in rows
        for g in row["goals"]
        if g["against"] not in ("copy", "float32")
    ]
    low = min([s["q1"] for s in shown], default=1.0)
    high = max([s["q3"] for s in shown] + goals, default=10.0)
    return min(low * 0.8, 0.8), max(high * 1.6, 12)
