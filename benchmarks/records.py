"""What results carry along: machine, versions, commit. Nothing that names a host or a person.

python -m benchmarks.records NEW OLD    the rows of NEW into the results in OLD
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
# Distribution -> name in the results. Several distributions carry OpenCV.
PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "numpy": "numpy",
    "opencv-python-headless": "opencv",
    "opencv-python": "opencv",
    "kornia": "kornia",
    "PyWavelets": "pywavelets",
}


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name", platform.machine() or "cpu")
    if "model" in facts and not re.search(r"\d", name):  # as virtual machines call it
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name


def _nvidia_smi(fields: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def machine(device: str) -> dict[str, Any]:
    """The device that results are filed under, e.g. amd-epyc-7763-avx2-8c or h200."""
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        facts = {
            "device": "cuda",
            "memory_gib": round(properties.total_memory / 2**30),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _nvidia_smi("driver_version"),
            "clocks_mhz": _nvidia_smi("clocks.sm,clocks.mem"),
        }
        return {"slug": slug(name.removeprefix("NVIDIA ")), "name": name, **facts}
    capability, cores = torch.backends.cpu.get_cpu_capability(), os.cpu_count()
    return {
        "slug": slug(f"{cpu_name()}-{capability}-{cores}c"),
        "name": cpu_name(),
        "device": "cpu",
        "capability": capability,
        "cores": cores,
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for distribution, name in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*args: str) -> str | None:
    command = ["git", "-C", str(ROOT), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> dict[str, Any]:
    """Commit and whether the tree had changes. DFM_FAST_COMMIT says it of a copy of the tree, whose
    repository is none or another."""
    if named := os.environ.get("DFM_FAST_COMMIT"):
        return {"commit": named, "dirty": None}
    head = _git("rev-parse", "HEAD")
    if head is None:
        return {"commit": "unknown", "dirty": None}
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": head, "dirty": bool(changes)}


def header(device: str, family: str, full: bool) -> dict[str, Any]:
    """Everything but the rows."""
    from dfm_fast._library import load_extension

    return {
        "schema": SCHEMA,
        "family": family,
        "machine": machine(device),
        "versions": versions(),
        "extension": load_extension().module,
        **commit(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "full": full,
        "command": "pytest benchmarks/ --benchmark-only" + (" --full" if full else ""),
    }


def finish(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the best copy bandwidth of its rows."""
    copies = [row["providers"]["copy"]["gb_s"] for row in record["rows"]]
    return {**record, "copy_gb_s": max(copies, default=None)}


def joined(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """New rows, and those of the old results that were not measured again: these say of which
    commit and day they are."""
    ids = {row["id"] for row in new["rows"]}
    when = {name: old[name] for name in ("commit", "date")}
    kept = [{**when, **row} for row in old["rows"] if row["id"] not in ids]
    return finish({**new, "rows": [*new["rows"], *kept]})


def main(new: Path, old: Path) -> None:
    for path in sorted(new.glob("*.json")):
        record, at = json.loads(path.read_text()), old / path.name
        write_json(at, joined(record, json.loads(at.read_text())) if at.exists() else record)


def rounded(value: Any) -> Any:
    """Floats with 5 significant digits: more is noise, and makes differences hard to read."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """All or nothing: a run that dies while writing leaves the file of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(rounded(value), indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
