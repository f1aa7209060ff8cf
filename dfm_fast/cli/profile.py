"""`dfm-fast profile`: a model with and without this library's kernels, operator by operator.

TARGET is a preset, `package.module:callable` (it returns a module, or (module, inputs)), or a
script. A table for each form: calls, time and share of every operator, the bytes it must move and
how fast it moves them, the fraction of the limit that binds it (a copy of as many bytes, or a
matrix product of as many FLOPs, both measured), and the time above that floor; then sentences. With
--out also the traces, a picture and the figures as JSON. Exit status 1 where the two forms do not
compute the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shlex
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dfm_fast import _checks
from dfm_fast._version import __version__
from dfm_fast.cli import _configs
from dfm_fast.profiling.tables import counted

if TYPE_CHECKING:
    from dfm_fast.profiling.comparisons import Comparison, Side

OP = "profile"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
LIMIT = 12  # operators shown of each form


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="preset, package.module:callable, file.py")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of parameters and inputs")
    parser.add_argument("--batch", type=int, help="samples (default: 1)")
    parser.add_argument("--size", type=int, help="sides of latents or pictures, or rows")
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--no-before", action="store_true", help="only with our kernels")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of before, too")
    parser.add_argument("--args", help="of a script, in one string")
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"operators shown ({LIMIT})")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write traces, picture, figures")


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its lines about starting and stopping
    return _configs.reported("dfm-fast profile", lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from dfm_fast.profiling import targets, words
    from dfm_fast.training.outputs import RunError

    _check(args)
    try:
        headline, comparison = _compared(args)
    except targets.UsersError as error:
        if not isinstance(error.__cause__, SystemExit):
            _print_traceback(error.__cause__ or error)
        raise RunError(f"{args.target} failed: {error}") from None
    text = f"{headline}\n\n{words.report(comparison, args.limit)}"
    print(text)
    if args.out is not None:
        _write(args.out, text, headline, comparison)
    same = comparison.parity
    if same is not None and not same.holds:
        raise RunError(words.parity_sentence(same))


def _print_traceback(error: BaseException) -> None:
    """Of the user's own frames: those above are of this library and of runpy."""
    trace = error.__traceback__
    own = "dfm_fast.", "runpy", "importlib"
    while trace is not None and trace.tb_next is not None:
        if not trace.tb_frame.f_globals.get("__name__", "").startswith(own):
            break
        trace = trace.tb_next
    traceback.print_exception(error.with_traceback(trace))


def _check(args: argparse.Namespace) -> None:
    """What can be wrong before any work."""
    from dfm_fast.training.outputs import check_folder

    _checks.integer(OP, "--limit", args.limit, 1)
    if args.compile and args.no_before:
        _checks.fail(OP, "--compile", "the form before, which it compiles", "--no-before")
    if args.out is not None:
        check_folder(OP, args.out, "--out")
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("--out: expected matplotlib for its picture, got none")


def _compared(args: argparse.Namespace) -> tuple[str, Comparison]:
    from dfm_fast.profiling import comparisons, scripts, targets

    path = targets.script(args.target)
    if path is not None:
        _check_script(args)
        arguments = shlex.split(args.args or "")
        found = scripts.compare_script(path, arguments, before=not args.no_before)
        return f"{path}, {_threads()}", found
    if args.args is not None:
        _checks.fail(OP, "--args", "none but for a script", repr(args.args))
    device, dtype = _device(args.device), DTYPES.get(args.dtype)
    batch = 1 if args.batch is None else args.batch
    target = targets.load(args.target, batch, args.size, device, dtype)
    headline = ", ".join(filter(None, (target.name, str(device), _dtype(target), _threads())))
    headline += f"; inputs {target.given()}"
    headline += f" ({target.note})" if target.note else ""
    options = {"train": args.train, "before": not args.no_before, "compiled": args.compile}
    return headline, comparisons.compare(target, **options)


def _check_script(args: argparse.Namespace) -> None:
    """It makes its model and inputs itself."""
    for name in ("device", "dtype", "batch", "size", "train", "compile"):
        if value := getattr(args, name):
            _checks.fail(OP, f"--{name}", "none for a script, which decides itself", value)


def _device(name: str | None) -> torch.device:
    here = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name is None:
        name = "cuda" if here[1:] else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        _checks.fail(OP, "--device", f"one of {', '.join(here)}", repr(name))
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not here[1:]):
        _checks.fail(OP, "--device", f"a device that is here ({', '.join(here)})", repr(name))
    if device.type == "cuda" and (device.index or 0) >= len(here) - 1:
        _checks.fail(OP, "--device", f"a device that is here ({', '.join(here)})", repr(name))
    return device


def _dtype(target: Any) -> str:
    found = next((p.dtype for p in target.module.parameters()), torch.float32)
    return str(found).removeprefix("torch.")


def _threads() -> str:
    return counted(torch.get_num_threads(), "thread")


# --- Files ----------------------------------------------------------------------------------------


def _write(out: Path, text: str, headline: str, comparison: Comparison) -> None:
    """Everything is made before the first file is; each is written whole."""
    from dfm_fast.models._pretrained import write_bytes
    from dfm_fast.profiling.pictures import bars

    both = {"before": comparison.before, "after": comparison.after}
    sides = {name: side for name, side in both.items() if side is not None}
    picture = bars({side.title: side.profile for side in sides.values()}, LIMIT)
    figures = json.dumps(_figures(headline, comparison, sides), indent=1)
    out.mkdir(parents=True, exist_ok=True)
    for name, side in sides.items():
        side.profile.trace(out / f"trace-{name}.json")
    write_bytes(out / "operators.png", picture)
    write_bytes(out / "profile.json", f"{figures}\n".encode())
    write_bytes(out / "report.txt", f"{text}\n".encode())
    print(f"\nwritten to {out}: report.txt, operators.png, profile.json, and traces, which")
    print("ui.perfetto.dev and chrome://tracing show")


def _figures(headline: str, comparison: Comparison, sides: Mapping[str, Side]) -> dict[str, Any]:
    same = comparison.parity
    return {
        "target": headline,
        "versions": {"dfm_fast": __version__, "torch": torch.__version__},
        "parity": None if same is None else dataclasses.asdict(same),
        "compiled_seconds": comparison.compiled,
        **{name: _side(side) for name, side in sides.items()},
    }


def _side(side: Side) -> dict[str, Any]:
    p = side.profile
    return {
        "title": side.title,
        "seconds": side.seconds,
        "peak_mib": side.peak_mib,
        "operator_seconds": p.operator_seconds,
        "outside_seconds": p.outside_seconds,
        "operators": [{**dataclasses.asdict(row), "bound": row.bound} for row in p.rows()],
    }
