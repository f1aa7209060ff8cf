"""Rows that take minutes to compile, side by side: `python -m benchmarks.turns ROW ... [options]`.

A ROW is what `-k` of pytest takes and picks one row of those that --full has. Each has a process of
its own, which compiles, passes the gate, and waits; when all are ready, or --until seconds have
passed, they are timed one after the other. Other options go to the benchmarks. Results are merged
into --results, a file for each family.

    python -m benchmarks.turns "dfm_xl_512 and training" "snapgen_1024 and cached" --until 150 \
        --compile-mode default --results OUT
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import records

FOLDER, COUNT, UNTIL = "DFM_FAST_TURNS", "DFM_FAST_TURNS_COUNT", "DFM_FAST_TURNS_UNTIL"


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Around the timing of a row: nothing, or this process's turn among those of `main`, which it
    keeps until it ends. Who comes after --until times while others still compile."""
    if FOLDER not in os.environ or KEPT:
        yield
        return
    folder = Path(os.environ[FOLDER])
    (folder / f"ready-{os.getpid()}").touch()
    while time.time() < float(os.environ[UNTIL]):
        if len(list(folder.glob("ready-*"))) >= int(os.environ[COUNT]):
            break
        time.sleep(0.1)
    lock = (folder / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    KEPT.append(lock)
    yield


KEPT: list[Any] = []


def merged(parts: list[Path], results: Path) -> None:
    """Rows of every process, by family."""
    families: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(path for part in parts for path in part.rglob("*.json")):
        found = json.loads(path.read_text())
        whole = families.setdefault((path.parent.name, path.name), {**found, "rows": []})
        whole["rows"] += found["rows"]
    for (machine, name), whole in families.items():
        records.write_json(results / machine / name, records.finish(whole))


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.turns", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", metavar="ROW")
    parser.add_argument("--until", type=float, default=300, help="seconds")
    parser.add_argument("--results", type=Path, required=True)
    args, options = parser.parse_known_args()
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {
            FOLDER: scratch,
            COUNT: str(len(args.rows)),
            UNTIL: str(time.time() + args.until),
        }
        processes, logs, parts = [], [], []
        for k, row in enumerate(args.rows):
            parts.append(Path(scratch) / f"results-{k}")
            logs.append(Path(scratch) / f"{k}.log")
            command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "--full"]
            command += ["-p", "no:cacheprovider", "--tb=short", "-k", row, *options]
            with logs[-1].open("w") as log:
                command += ["--results", str(parts[-1])]
                processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        waiting = set(range(len(processes)))
        while waiting:
            for k in [k for k in waiting if processes[k].poll() is not None]:
                waiting.remove(k)
                (Path(scratch) / f"ready-row-{k}").touch()  # nobody waits for it
                failed += bool(processes[k].returncode)
                print(f"----- {args.rows[k]}\n{logs[k].read_text()}", flush=True)
                merged(parts, args.results)
            time.sleep(0.1)
    return failed


if __name__ == "__main__":
    sys.exit(main())
