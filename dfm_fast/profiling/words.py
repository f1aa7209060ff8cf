"""What a profile comes to, in sentences that need no table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dfm_fast.profiling.tables import counted, number, of_limit

if TYPE_CHECKING:
    from dfm_fast.profiling.comparisons import Comparison, Parity, Side
    from dfm_fast.profiling.profiles import Profile, Row

BOUNDS = {"copy": "by memory", "FLOPs": "by arithmetic"}
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
    if farthest.above_floor > 0.01 * whole and farthest is not rows[0]:
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
    calls = counted(row.calls, "call")
    return f"The largest cost is {row.name}: {_cost(row, whole)} in {calls}{_limits(row, whole)}."


def _farthest(row: Row, whole: float) -> str:
    return f"Farthest above its floor is {row.name}: {_cost(row, whole)}{_limits(row, whole)}."


def _cost(row: Row, whole: float) -> str:
    return f"{row.seconds / whole:.0%} of the time"


def _limits(row: Row, whole: float) -> str:
    """What binds it, and how far it is from that."""
    if not row.bound:
        return f", though it moves and computes nothing; {_left(row, whole)}"
    reached = of_limit(row).partition(" ")[0]
    bound = f", bound {BOUNDS[row.bound]}, at {reached} of the speed of {SPEEDS[row.bound]}"
    return f"{bound}; {_left(row, whole)}"


def _left(row: Row, whole: float) -> str:
    if not row.above_floor:
        return "nothing is left to save in it"
    return f"at most {row.above_floor / whole:.0%} of the whole could be saved there"


def _floor(profile: Profile, rows: list[Row], whole: float) -> str:
    floor = sum(row.floor for row in rows)
    return (
        f"With every operator at its floor it would take {ms(floor)}, {floor / whole:.0%} of "
        "the time; less only with fewer operators, fused ones."
    )


def ms(seconds: float) -> str:
    return f"{number(1e3 * seconds)} ms"


# --- Before and after -----------------------------------------------------------------------------


def report(comparison: Comparison, limit: int) -> str:
    """Tables, what was swapped, and sentences."""
    sides = [side for side in (comparison.before, comparison.after) if side is not None]
    parts = [f"{side.title}\n\n{side.profile.table(limit=limit)}" for side in sides]
    if comparison.report is not None:
        parts.append(str(comparison.report))
    return "\n\n".join([*parts, "\n".join(sentences(comparison))])


def sentences(comparison: Comparison) -> list[str]:
    """How much faster, by what, and whether it is the same function; then `summary` of what runs
    now."""
    lines = []
    before, after = comparison.before, comparison.after
    if before is not None:
        lines += [_faster(comparison, before), _moved(before.profile, after.profile)]
    if comparison.compiled is not None:
        lines.append(_against("torch.compile of the form before", comparison, comparison.compiled))
    if comparison.parity is not None:
        lines.append(parity_sentence(comparison.parity))
    lines += [comparison.note] if comparison.note else []
    if after.peak_mib is not None:
        against = ""
        if before is not None and before.peak_mib is not None:
            against = f", before {number(before.peak_mib)} MiB"
        needs = number(after.peak_mib)
        lines.append(f"A call needs {needs} MiB beside what there is before it{against}.")
    return [line for line in (*lines, *summary(after.profile).splitlines()) if line]


def _faster(comparison: Comparison, form: Side) -> str:
    before, after = form.seconds, comparison.after.seconds
    said = f"A call takes {ms(statistics.median(after))}, before {ms(statistics.median(before))}. "
    if not after[1:]:
        said = f"It takes {ms(after[0])}, before {ms(before[0])}, in one run each, with all that "
        said += "first calls cost. "
    return said + _against("before", comparison, before)


def _against(what: str, comparison: Comparison, seconds: Sequence[float]) -> str:
    first, median, third = comparison.speedups(seconds)
    spread = f" ({first:.2f} to {third:.2f} in half of {len(seconds)} rounds)"
    spread = spread if seconds[1:] else ""
    if first <= 1 <= third:
        return f"Against {what} there is no difference that shows: {median:.2f} times{spread}."
    faster = "faster" if median > 1 else "slower"
    by = median if median > 1 else 1 / median
    return f"Against {what} it is {by:.2f} times {faster}{spread}."


def _moved(before: Profile, after: Profile) -> str:
    """The operators whose time fell most, and those that took their place."""
    one, other = ({row.name: row.seconds for row in p.rows()} for p in (before, after))
    change = {name: other.get(name, 0.0) - one.get(name, 0.0) for name in one | other}
    ordered = sorted(change, key=change.__getitem__)
    limit = 0.02 * before.operator_seconds
    less = [f"{n} by {ms(-change[n])}" for n in ordered[:3] if change[n] < -limit]
    more = [f"{n} by {ms(change[n])}" for n in reversed(ordered[-3:]) if change[n] > limit]
    parts = [f"Less time went into {', '.join(less)}"] if less else []
    parts += [f"more into {', '.join(more)}"] if more else []
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def parity_sentence(same: Parity) -> str:
    if same.zero:
        return "Before and after both give zeros alone: whether they compute the same is not shown."
    said = f"relative distance {same.distance:.1e}, allowed {same.allowed:.0e}"
    if same.holds:
        return f"Before and after give the same up to rounding: {said}."
    return f"Before and after do NOT give the same: {said}."
