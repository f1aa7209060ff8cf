"""`dfm-fast check`: compile every Triton kernel for every target, with no GPU, and gate the result.

One row per kernel, dtype and target: registers, shared memory, occupancy (warps that fit on a
multiprocessor, of those it can have), spills, widest global load and instructions in the machine
code; then how many passed on each target. Exit status 1 when a gate fails. All of them take minutes
the first time, seconds again from Triton's cache.

With --predict: what the launches of a GPU's benchmark rows should take on an H200, and which
kernels leave some of it unused. It needs `benchmarks/`, in whose folder's parent it is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

HEADER = ("kernel", "dtype", "target", "registers", "shared", "occupancy", "spills", "load bits")
HEADER += ("instructions", "a normal")  # type: ignore[assignment]  # a longer tuple


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", action="append", help="such as sm_90; repeat for several")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--dtype", action="append", help="such as bf16; repeat for several")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--predict", action="store_true", help="times of the benchmarks' rows")
    parser.add_argument("--rows", metavar="PATTERN", help="of --predict, such as 'geglu-*'")
    parser.add_argument("--full", action="store_true", help="of --predict: not only quick rows")
    parser.add_argument("--page", type=Path, metavar="PATH", help="of --predict: Markdown, there")


def run(args: argparse.Namespace) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("check: expected Triton's compiler, got its interpreter: unset TRITON_INTERPRET")
        return 1
    try:
        from dfm_fast.kernels import _aot
    except ImportError as error:
        print(f"check: expected triton >= 3.6, got an ImportError: {error}")
        return 1
    targets = args.target or list(_aot.TARGETS)
    if args.predict:
        return _predict(args)
    if given := [name for name in ("rows", "full", "page") if getattr(args, name)]:
        print(f"check: expected --predict with --{given[0]}, got none")
        return 1
    if unknown := set(targets) - set(_aot.TARGETS):
        print(f"check: expected a target of {', '.join(_aot.TARGETS)}, got {', '.join(unknown)}")
        return 1
    work = [
        (i, target)
        for target in targets
        for i, spec in enumerate(_aot.specialisations())
        if args.kernel in spec.name
        and target in spec.targets
        and (not args.dtype or spec.dtype in args.dtype)
    ]
    if not work:
        print(f"check: expected a kernel like {args.kernel!r}, got none")
        return 1
    start = time.perf_counter()
    print("{:>7} {:<44} {:<5} {:<7} {:>9} {:>7} {:>9} {:>6} {:>9} {:>12} {:>8}".format("", *HEADER))
    # Processes, as Triton's compiler holds the interpreter lock; fresh ones, as it has threads.
    with multiprocessing.get_context("spawn").Pool(min(args.jobs, len(work))) as pool:
        done = enumerate(pool.imap(_check, work), start=1)
        rows = [_print(row, f"{i}/{len(work)}") for i, row in done]
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    for target in targets:
        here = [row for row in rows if row.target == target]
        print(f"{target}: {sum(not row.failures for row in here)} of {len(here)} passed")
    failed = sum(bool(row.failures) for row in rows)
    seconds = time.perf_counter() - start
    print(f"{len(rows)} compiled in {seconds:.0f} s, {failed} failed")
    return 1 if failed else 0


def _predict(args: argparse.Namespace) -> int:
    if args.target not in (None, ["sm_90"]) or args.dtype:
        print("check: expected no --dtype and at most --target sm_90 with --predict, got others")
        return 1
    if (here := os.getcwd()) not in sys.path:  # an installed command's path is without it
        sys.path.insert(0, here)
    try:
        from benchmarks import predictions
    except ImportError as error:
        print(f"check: expected benchmarks/ in the current folder, got an ImportError: {error}")
        return 1
    rows = []
    wanted = predictions.gpu_rows(args.rows or "*", args.full or bool(args.rows))
    for row in predictions.predict_rows(wanted, args.kernel):
        print("\n".join(predictions.lines(row)), flush=True)
        rows.append(row)
    if not rows:
        print(
            f"check: expected rows like {args.rows or '*'!r} that launch a kernel like "
            f"{args.kernel!r}, got none"
        )
        return 1
    print("\nTo mend, by the µs above what memory and matrix products alone take:")
    print(
        "\n".join(f"  {lost:.1f}: {text}" for lost, text in predictions.to_mend(rows)) or "  none"
    )
    if args.json:
        args.json.write_text(predictions.table(rows))
    if args.page:
        args.page.write_text(predictions.page(rows))
    return 0


def _check(item: tuple[int, str]) -> Any:
    from dfm_fast.kernels import _aot

    index, target = item
    return _aot.check(list(_aot.specialisations())[index], target)


def _print(row: Any, progress: str) -> Any:
    print(
        f"{progress:>7} {row.kernel:<44} {row.dtype:<5} {row.target:<7} {row.registers:>9} "
        f"{row.shared:>7} {f'{row.occupancy:.0%}' if row.occupancy else '':>9} {row.spills:>6} "
        f"{row.load_bits:>9} {row.instructions:>12}"
        + (f" {row.per_normal:>8.1f}" if row.per_normal else ""),
        *(f"\n    FAILED {failure}" for failure in row.failures),
        flush=True,
    )
    return row
