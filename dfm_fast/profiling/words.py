"""What a profile comes to, in sentences that need no table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfm_fast.profiling.tables import number, of_limit

if TYPE_CHECKING:
    from dfm_fast.profiling.profiles import Profile, Row

BOUNDS = {
    "copy": "by memory",
    "FLOPs": "by arithmetic",
    "": "by neither memory nor arithmetic: it moves nothing",
}
SPEEDS = {
    "copy": "a copy of as many bytes",
    "FLOPs": "a matrix product of as many FLOPs",
}


def summary(profile: Profile) -> str:
    """A line for each: what takes part, the largest cost and its bound, the most that is left to
    save, and the ceilings that this is held against."""
    rows = profile.rows()
    if not rows:
        return "No operator ran."
    whole = profile.operator_seconds + profile.outside_seconds
    lines = [_taken(profile, rows, whole), _largest(rows[0], whole)]
    farthest = max(rows, key=lambda row: row.above_floor)
    if farthest.above_floor and farthest is not rows[0]:
        lines.append(_farthest(farthest, whole))
    lines += [_floor(profile, rows, whole), str(profile.ceilings)]
    return "\n".join(lines)


def _taken(profile: Profile, rows: list[Row], whole: float) -> str:
    outside = "the GPU waits" if profile.device == "cuda" else "Python and dispatch"
    return (
        f"{counted(len(profile.calls), 'call')} of {counted(len(rows), 'operator')} take "
        f"{ms(profile.operator_seconds)} of {ms(whole)}; the rest, "
        f"{profile.outside_seconds / whole:.0%}, is outside of them ({outside})."
    )


def _largest(row: Row, whole: float) -> str:
    said = f"The largest cost is {row.name}: {row.seconds / whole:.0%} of the time in "
    said += f"{counted(row.calls, 'call')}, bound {BOUNDS[row.bound]}"
    if not row.bound:
        return f"{said}."
    return f"{said}, at {_fraction(row)} of the speed of {SPEEDS[row.bound]}; {_left(row, whole)}."


def _farthest(row: Row, whole: float) -> str:
    return (
        f"Farthest above its floor is {row.name}: {row.seconds / whole:.0%} of the time, bound "
        f"{BOUNDS[row.bound]}, at {_fraction(row) if row.bound else 'none'}; {_left(row, whole)}."
    )


def _left(row: Row, whole: float) -> str:
    if not row.above_floor:
        return "nothing is left to save in it"
    return f"at most {row.above_floor / whole:.0%} of the whole could be saved there"


def _fraction(row: Row) -> str:
    return of_limit(row).partition(" ")[0]


def _floor(profile: Profile, rows: list[Row], whole: float) -> str:
    floor = sum(row.floor for row in rows)
    return (
        f"With every operator at its floor it would take {ms(floor)}, {floor / whole:.0%} of "
        "the time; less only with fewer or larger operators."
    )


def ms(seconds: float) -> str:
    return f"{number(1e3 * seconds)} ms"


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"
