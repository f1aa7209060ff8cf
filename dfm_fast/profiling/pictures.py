"""A profile as bars. Importing this needs matplotlib, and Pillow, which comes with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dfm_fast.cli._plots import BACKWARD, FORWARD, GOAL, INK, png
from dfm_fast.profiling.tables import counted, number, of_limit

if TYPE_CHECKING:
    from dfm_fast.profiling.profiles import Profile, Row

OURS, TORCHS, OUTSIDE = FORWARD, BACKWARD, "#bbbbbb"


def bars(profiles: Mapping[str, Profile], limit: int) -> bytes:
    """A PNG with a panel for each profile, under its title and on one scale: the time of the
    longest operators, ours in a colour of their own, the floor of each marked."""
    shown = {title: _shown(profile, limit) for title, profile in profiles.items()}
    heights = [len(rows) + 2 for rows in shown.values()]
    figure = Figure(figsize=(9, 0.9 * len(heights) + 0.27 * sum(heights)), layout="constrained")
    panels = list(
        figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights).flat
    )
    for axes, (title, profile) in zip(panels, profiles.items(), strict=True):
        _panel(axes, title, profile, shown[title])
    panels[-1].set_xlabel("ms")
    _legend(panels[0])
    return png(figure)


def _shown(profile: Profile, limit: int) -> list[Row]:
    """Bars that can be seen."""
    least = 0.001 * (profile.operator_seconds + profile.outside_seconds)
    return [row for row in profile.rows()[:limit] if row.seconds > least]


def _panel(axes: Axes, title: str, profile: Profile, rows: list[Row]) -> None:
    outside, others = profile.outside_seconds, len(profile.rows()) - len(rows)
    rest = max(0.0, profile.operator_seconds - sum(row.seconds for row in rows))
    whole = profile.operator_seconds + outside
    lines = [(row.name, row.seconds, of_limit(row)) for row in rows]
    lines += [(counted(others, "other"), rest, "")] if others else []
    lines += [("outside operators", outside, "")]
    for y, (name, seconds, note) in enumerate(lines):
        axes.barh(y, 1e3 * seconds, 0.66, color=_colour(name))
        share = f"{seconds / whole:.1%}" if whole else ""
        written = f"  {share}   {note}".rstrip()
        axes.text(1e3 * seconds, y, written, va="center", fontsize=8, color=INK)
    for y, row in enumerate(rows):
        if row.floor:
            axes.plot([1e3 * row.floor] * 2, [y - 0.4, y + 0.4], color=GOAL, linewidth=2)
    axes.set_yticks(range(len(lines)), [name for name, _, _ in lines], fontsize=8)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_title(f"{title}: {number(1e3 * whole)} ms", loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.16)  # room for what is written behind the longest


def _colour(name: str) -> str:
    if name.startswith("dfm_fast::"):
        return OURS
    return TORCHS if "::" in name else OUTSIDE


def _legend(axes: Axes) -> None:
    for colour, name in ((OURS, "dfm_fast"), (TORCHS, "torch")):
        axes.barh(0, 0, color=colour, label=name)
    axes.plot([], [], color=GOAL, linewidth=2, label="floor: least bytes, or FLOPs")
    axes.legend(loc="lower right", frameon=False, fontsize=8)
