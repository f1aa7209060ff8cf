"""Which of its candidates a kernel is launched with: as a table says, or as timed on the device.

A decision is one for a bucket: a kernel, what is exact (dtype, layout, channels), and a number of
rows or pixels, rounded up to a power of two. It is taken by the first of these that knows it:

    1. the table shipped for this GPU, tables/<name>.json, by its name and then its architecture;
    2. the user's table, in the cache folder: what was timed here before;
    3. with DFM_FAST_AUTOTUNE=1, a clock; its decision goes into 2;
    4. the default, which is the first candidate.

A table has text of candidates and names nothing else, so that all that may be launched is known,
compiled by `dfm-fast check` and tested.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from dfm_fast import _checks
from dfm_fast._version import __version__
from dfm_fast.kernels.launching import next_power_of_2

T = TypeVar("T")
FOLDER = Path(__file__).parent / "tables"
GAIN = 0.97  # of the default's time: who does not go below may have been lucky
MOST = 4096  # decisions kept by exact sizes; many shapes at once are rare

_chosen: dict[tuple[Any, ...], Any] = {}
_one_at_a_time = threading.RLock()  # a candidate may itself contain kernels that are to be timed
# (device, bucket) -> "shipped", "cache", "timed" or "default", as first met in this process.
sources: dict[tuple[str, str], str] = {}


@functools.cache
def autotune() -> bool:
    """Whether a bucket that no table knows is timed: DFM_FAST_AUTOTUNE, as of the first call.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get("DFM_FAST_AUTOTUNE") or "0"
    return _checks.choice("dfm_fast", "DFM_FAST_AUTOTUNE", value, ("0", "1")) == "1"


def choose(
    kernel: str,
    device: torch.device,
    rows: int,
    exact: tuple[Any, ...],
    candidates: Sequence[T],
    run: Callable[[T], Any],
) -> T:
    """The candidate for this launch. It is asked before every one: from the second call of the same
    sizes on this is one look into a dict.

    Args:
        kernel: the name in tables.
        device: of the tensors; off a GPU the default serves.
        rows: rows or pixels; buckets round them up to powers of two.
        exact: all else that a decision depends on. It determines the candidates.
        candidates: the default first. Each has a text of its own.
        run: launches one, with no effect that stays, and returns what Triton compiled, if anything.
    """
    key = kernel, device, rows, exact
    value = _chosen.get(key)
    return _decide(key, candidates, run) if value is None else value


def may_choose(kernel: str, device: torch.device) -> bool:
    """Whether anything but the default can serve: for who has much to look at before it asks."""
    return autotune() or _in_a_table(kernel, device)


@functools.cache
def _in_a_table(kernel: str, device: torch.device) -> bool:
    return any(b.startswith(f"{kernel} ") for table in tables(device).values() for b in table)


def _decide(key: tuple[Any, ...], candidates: Sequence[T], run: Callable[[T], Any]) -> T:
    kernel, device, rows, exact = key
    if len(candidates) == 1 or not names(device):
        return candidates[0]
    bucket = bucket_of(kernel, rows, exact)
    with _one_at_a_time:
        source, value = _from_tables(device, bucket, candidates)
        if source == "default" and autotune():
            if _traced():
                return candidates[0]  # this time: a later call may be timed
            source, value = "timed", _timed(device, bucket, candidates, run)
        sources.setdefault((names(device)[0], bucket), source)
    if len(_chosen) >= MOST:
        _chosen.clear()
    _chosen[key] = value
    return value


def _traced() -> bool:
    """Whether calls are recorded, not made: then nothing can be timed."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return capturing or torch.compiler.is_compiling()


def bucket_of(kernel: str, rows: int, exact: tuple[Any, ...]) -> str:
    """Its name in tables, such as "linear_glu bfloat16 896 2688 4096"."""
    words = kernel, *exact, next_power_of_2(rows)
    return " ".join(str(word).removeprefix("torch.") for word in words)


def _from_tables(device: torch.device, bucket: str, candidates: Sequence[T]) -> tuple[str, T]:
    for source, table in tables(device).items():
        for candidate in candidates:
            if table.get(bucket) == str(candidate):
                return source, candidate
    return "default", candidates[0]


# --- Tables ---------------------------------------------------------------------------------------


@functools.cache
def names(device: torch.device) -> tuple[str, ...]:
    """A GPU's, the most telling first, such as "NVIDIA H200" and "sm_90"; of all else none."""
    if device.type != "cuda":
        return ()
    gpu = torch.cuda.get_device_properties(device)
    arch = gpu.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{gpu.major}{gpu.minor}"
    return gpu.name, arch


@functools.cache
def tables(device: torch.device) -> dict[str, dict[str, str]]:
    """Source -> bucket -> candidate, the source that is asked first first."""
    own = names(device)
    if not own:
        return {}
    shipped: dict[str, str] = {}
    for name in reversed(own):
        shipped |= _known(FOLDER / f"{_slug(name)}.json", {"device": name})
    return {"shipped": shipped, "cache": _known(cache_file(own[0]), _header(own[0]))}


def cache_file(device: str) -> Path:
    """The user's table for a device, this version and Triton's."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dfm_fast"
    return folder / f"{'-'.join(map(_slug, _header(device).values()))}.json"


def _header(device: str) -> dict[str, str]:
    versions = {"dfm_fast": __version__, "triton": importlib.metadata.version("triton")}
    return {"device": device, **versions}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_.]+", "-", name.lower())


def _known(path: Path, header: dict[str, str]) -> dict[str, str]:
    """What the file decides: nothing, and a warning, where it is no such table."""
    try:
        return read_table(path, header)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path}: ignored as a table of tiles: {error}", stacklevel=2)
        return {}


def read_table(path: Path, header: dict[str, str]) -> dict[str, str]:
    """Bucket -> candidate.

    Raises:
        FileNotFoundError: no such file. ValueError: not JSON, not a table, or not with this header.
    """
    table = json.loads(path.read_text())
    tiles = table.get("tiles") if isinstance(table, dict) else None
    if not isinstance(tiles, dict) or not all(isinstance(v, str) for v in tiles.values()):
        raise ValueError('expected {"device": ..., "tiles": {bucket: candidate}}')
    if wrong := {name: table.get(name) for name, v in header.items() if table.get(name) != v}:
        raise ValueError(f"expected {header}, got {wrong}")
    return tiles


def write_table(path: Path, device: str, tiles: dict[str, str]) -> None:
    """The file that `read_table` reads, never half of it; its folder must be there."""
    from dfm_fast.models._pretrained import write_bytes  # not where tables are only read

    table = {**_header(device), "tiles": dict(sorted(tiles.items()))}
    write_bytes(path, (json.dumps(table, indent=1) + "\n").encode())


# --- Timing ---------------------------------------------------------------------------------------


def _timed(
    device: torch.device, bucket: str, candidates: Sequence[T], run: Callable[[T], Any]
) -> T:
    """The fastest, from now on in the user's table. Errors of the default are the caller's."""
    times = [_time(device, candidates[0], run)]
    for candidate in candidates[1:]:
        try:
            times.append(_time(device, candidate, run))
        except Exception:  # it does not compile for this GPU, or takes more than the GPU has
            times.append(math.inf)
    best = candidates[times.index(min(times))] if min(times) < GAIN * times[0] else candidates[0]
    texts = {str(candidate): candidate for candidate in candidates}
    kept = _keep(names(device)[0], bucket, str(best), texts)
    tables(device)["cache"][bucket] = kept
    return texts[kept]


def _time(device: torch.device, candidate: T, run: Callable[[T], Any]) -> float:
    """Milliseconds; infinite for what spills."""
    if getattr(run(candidate), "n_spills", 0):
        return math.inf
    return clock(lambda: run(candidate), device)


def clock(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call: the median of many, by CUDA events, L2 flushed before each."""
    from triton.testing import do_bench

    with torch.cuda.device(device):
        return do_bench(call, warmup=5, rep=50, return_mode="median")


def _keep(device: str, bucket: str, best: str, texts: dict[str, Any]) -> str:
    """What the user's table says of the bucket: another process may have been first."""
    path = cache_file(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            tiles: dict[str, str] = {}
            with contextlib.suppress(FileNotFoundError, ValueError):
                tiles = read_table(path, _header(device))
            if tiles.get(bucket) not in texts:
                write_table(path, device, {**tiles, bucket: best})
                return best
            return tiles[bucket]
    except OSError as error:
        warnings.warn(f"{path}: what was timed cannot be kept: {error}", stacklevel=2)
        return best


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """No other process reads and then writes the file meanwhile."""
    with open(f"{path}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
