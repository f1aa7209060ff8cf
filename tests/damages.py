"""Damaged files, for Hypothesis: bytes that are cut, flipped or moved; JSON with other values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

ODD = (
    None, True, -1, 0, 0.5, 1e308, float("nan"), 10**9, 10**18, 10**30, "", "x", "../../secret",
    "/etc/passwd", [], {}, [1, 2], [10**9], {"a": 1}, [[]],
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` after one to three accidents."""
    for _ in range(draw(st.integers(1, 3))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        length = draw(st.sampled_from((1, 1, 4, 8, 64)))
        kind = draw(st.sampled_from(("cut", "flip", "write", "lose", "repeat")))
        data = _accident(draw, kind, data, at, length)
    return data


def _accident(draw: st.DrawFn, kind: str, data: bytes, at: int, length: int) -> bytes:
    head, tail = data[:at], data[at + length :]
    if kind == "cut":
        return head
    if kind == "flip":
        return head + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    if kind == "write":  # the largest numbers among them
        new = draw(st.sampled_from((b"\xff", b"\x00", b"\x7f")) | st.binary(min_size=1, max_size=1))
        return head + new * min(length, len(data) - at) + tail
    return head + tail if kind == "lose" else head + data[at : at + length] * 2 + tail


@st.composite
def other_json(draw: st.DrawFn, text: bytes) -> bytes:
    """The same document with one value, or key, changed."""
    document = json.loads(text)
    places = list(_places(document))
    parent, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(("value", "value", "value", "gone", "renamed")))
    if kind == "value":
        parent[key] = draw(st.sampled_from(ODD))
    elif kind == "gone":
        del parent[key]
    elif isinstance(parent, dict):
        parent[draw(st.sampled_from(("unknown", "../x", "/x", "")))] = parent.pop(key)
    else:
        parent.append(parent[key])
    return json.dumps(document).encode()


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(pairs):
        yield node, key
        if isinstance(value, dict | list):
            yield from _places(value)


@st.composite
def damage_of(draw: st.DrawFn, folder: Path) -> tuple[Path, bytes | None]:
    """(a file of the folder, what it holds now; None where it is gone)"""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    path = draw(st.sampled_from(files))
    data = path.read_bytes()
    if draw(st.integers(0, 15)) == 0:
        return path.relative_to(folder), draw(st.sampled_from((None, b"")))
    changed = damaged(data)
    if path.suffix == ".json":
        changed = other_json(data) | changed
    return path.relative_to(folder), draw(changed)


def copied(folder: Path, place: Path, damage: tuple[Path, bytes | None]) -> Path:
    """The folder with the damage, at `place`, which is emptied first."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    path, data = damage
    if data is None:
        (place / path).unlink()
    else:
        (place / path).write_bytes(data)
    return place
