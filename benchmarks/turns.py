"""Many rows of a GPU in little time, side by side: `python -m benchmarks.turns ROW ... [options]`.

A ROW is what `-k` of pytest takes, and picks rows of those that --full has; after " -- " it may
have options of its own. Each has a process of its own. They compile and pass the gate side by side,
and who is to be timed stops all others meanwhile, also what --beside names, such as tests: so many
that each still has a processor. Other options go to the benchmarks. Results are merged into
--results, a file for each family, also when it is interrupted.

    python -m benchmarks.turns "dfm_xl_512 and training" "test_norms and bfloat16" \
        --compile-mode default --results OUT --beside "pytest tests -k cuda"
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import records

FOLDER = "DFM_FAST_TURNS"  # has a lock, and a file named after each process group
SETTLED = 0.1  # seconds until the GPU has done what those that are stopped had asked of it


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Around the timing of a row: of the processes of `main` all others are stopped meanwhile."""
    if FOLDER not in os.environ:
        yield
        return
    folder = Path(os.environ[FOLDER])
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        others = [group for group in groups(folder) if group != os.getpgrp()]
        send(signal.SIGSTOP, others)
        time.sleep(SETTLED)
        try:
            yield
        finally:
            send(signal.SIGCONT, others)


def groups(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def send(number: int, to: list[int]) -> None:
    for group in to:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """In a process group of its own, which takes part in the turns."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    (Path(os.environ[FOLDER]) / str(process.pid)).touch()
    return process


def release(folder: Path) -> None:
    """Let all go on, if whoever stopped them has died."""
    with (folder / "lock").open("w") as lock, contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        send(signal.SIGCONT, groups(folder))


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
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--beside", action="append", default=[], metavar="COMMAND")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ[FOLDER] = scratch
        parts = [folder / f"results-{k}" for k in range(len(args.rows))]
        bench = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "--full"]
        bench += ["-p", "no:cacheprovider", "--tb=short", *options]
        commands = {}
        for row, part in zip(args.rows, parts, strict=True):
            names, _, own = row.partition(" -- ")
            commands[row] = [*bench, "-k", names, "--results", str(part), *shlex.split(own)]
        commands |= {command: shlex.split(command) for command in args.beside}
        running = {
            name: (start(command, folder / f"log-{k}"), folder / f"log-{k}")
            for k, (name, command) in enumerate(commands.items())
        }
        failed = len(running)
        try:
            while running:
                for name in [
                    n for n, (process, _) in running.items() if process.poll() is not None
                ]:
                    process, log = running.pop(name)
                    failed -= not process.returncode
                    print(f"----- {name}\n{log.read_text()}", flush=True)
                    (folder / str(process.pid)).unlink()
                    release(folder)
                    merged(parts, args.results)
                time.sleep(0.1)
        finally:
            send(signal.SIGKILL, [process.pid for process, _ in running.values()])
            for name, (process, log) in running.items():
                process.wait()
                print(f"----- {name}: interrupted\n{log.read_text()}", flush=True)
            merged(parts, args.results)
    return failed


if __name__ == "__main__":
    sys.exit(main())
