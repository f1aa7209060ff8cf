"""Every row once, in many processes at once: `python -m benchmarks.rehearsal [--jobs 8] [--full]`.

A row's compilers take longer than its timing, and what they make is kept on disk: after a rehearsal
the benchmarks only measure. It also passes every row through its gate in a fraction of the time.
Times taken here mean nothing, and are thrown away: so are the choices between block sizes that
Inductor measured for pointwise kernels while others used the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HEAVY = ("bench_models", "bench_snapgen", "bench_acceleration", "bench_blocks", "bench_layers")
PYTEST = [sys.executable, "-m", "pytest", "--benchmark-only", "-p", "no:cacheprovider"]


def collect(arguments: list[str]) -> list[str]:
    """The rows' node ids, those that compile longest first."""
    command = [*PYTEST, "--collect-only", "-q", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"benchmarks.rehearsal: cannot collect:\n{result.stdout}{result.stderr}")
    rows = [line for line in result.stdout.splitlines() if "::" in line]
    return sorted(rows, key=lambda row: not any(name in row for name in HEAVY))


def finish(processes: list[subprocess.Popen], limit: float) -> None:
    """Wait for all; from the limit on they are interrupted, so that they still report."""
    end = time.monotonic() + limit
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(end - time.monotonic(), 0))
    left = [process for process in processes if process.poll() is None]
    for process in left:
        process.send_signal(signal.SIGINT)
    end = time.monotonic() + 10
    for process in left:
        try:
            process.wait(max(end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()


def verdict(log: str) -> str:
    """What a process has to say of its failures: pytest's summary of them, and its last line."""
    lines = log.splitlines()
    start = next((i for i, line in enumerate(lines) if "= FAILURES =" in line), len(lines) - 1)
    return "\n".join(lines[start:]) if lines else "(no output)"


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.rehearsal", description=__doc__)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) * 2 // 3))
    parser.add_argument("--limit", type=float, default=600, help="seconds")
    parser.add_argument("--log", type=Path, help="folder for what each process prints")
    args, others = parser.parse_known_args()
    rows = collect(others or ["benchmarks/"])
    options = [word for word in others if word.startswith("-") or not Path(word).exists()]
    shards = [shard for k in range(args.jobs) if (shard := rows[k :: args.jobs])]
    # Inductor's own processes come on top: two for each, or starting them is all that happens.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.log or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        processes, logs = [], []
        for k, shard in enumerate(shards):
            logs.append(folder / f"{k}.log")
            results = ["--seconds", "0", "--results", f"{scratch}/{k}", "--tb=short"]
            with logs[-1].open("w") as log:
                command = [*PYTEST, *options, *results, *shard]
                processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        finish(processes, args.limit)
        failed = 0
        for process, log in zip(processes, logs, strict=True):
            if process.returncode:
                failed += 1
                print(verdict(log.read_text()))
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    for choice in Path(cache).rglob("*.best_config") if cache else ():
        choice.unlink()
    print(f"{len(rows)} rows in {len(shards)} processes, {failed} of which had failures")
    return failed


if __name__ == "__main__":
    sys.exit(main())
