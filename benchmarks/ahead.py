"""Kernels of a visit to a GPU, compiled before it: `python -m benchmarks.ahead OUT.tar.xz ROW ...`.

A visit has minutes, and compiling would take most of them. This runs the GPU's launchers on tensors
without memory and compiles for sm_90 what they launch: for rows whose id matches a ROW, such as
"geglu-*" (all rows of a GPU: "*"), and with --suite for the test suite's cases of all operators,
or of those that match its value. OUT holds Triton's cache, of each kernel what a launch reads;
unpacked at --folder it serves the same versions of Python, Triton and this library, which
`gpu_visit.sh` does with .whl/kernels.tar.xz.

    python -m benchmarks.ahead .whl/kernels.tar.xz "*" --suite --jobs 2
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.predictions import gpu_rows, record

FOLDER = "/tmp/triton_cache"
KEPT = (".json", ".cubin")  # of what Triton keeps of a kernel; the rest is read by nobody
# What Triton's launchers link to, where there is no driver: names alone.
DRIVER = "cuCtxGetCurrent cuCtxSetCurrent cuDeviceGet cuDevicePrimaryCtxRetain cuFuncSetAttribute"
DRIVER += " cuGetErrorString cuPointerGetAttribute cuLaunchKernelEx"


def suite(pattern: str) -> Iterator[Callable[[], Any]]:
    """Cases of the shared tests, forward and backward, as they have them on a GPU."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from cases import CASES
    from helpers import LAYOUTS, detached, grads, tensors, variables

    from dfm_fast._library import OPERATORS

    def run(case: Any, dtype: Any, layout: str, alone: int | None = None) -> None:
        with torch.device("cpu"):  # values, which are dropped
            args = case.args(dtype, "meta", layout)
            public, options = OPERATORS[case.operator].public, case.options(dtype)
            if not args:
                public(**{**options, "device": "meta"})
            elif alone is None:
                public(*args, **options)
                grads(public, args, case.kwargs)
            else:
                args = detached(args, requires_grad=False)
                variables(args)[alone].requires_grad_()
                out = [y for y in tensors(public(*args, **case.kwargs)) if y.requires_grad]
                torch.autograd.grad(out, variables(args)[alone], [torch.empty_like(y) for y in out])

    cases = [case for case in CASES if fnmatch(case.operator, pattern)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for case, layout in itertools.product(cases, LAYOUTS):
            yield lambda c=case, d=dtype, at=layout: run(c, d, at)
    for case in cases:
        for i in range(sum(not shape.mask for shape in case.shapes())):
            yield lambda c=case, i=i: run(c, torch.float32, "contiguous", i)


def rows(launches: list[Any], patterns: list[str]) -> Iterator[Callable[[], Any]]:
    for row in gpu_rows("*", full=True):
        if any(fnmatch(row.id, pattern) for pattern in patterns):
            yield lambda r=row: record(r, launches)
            if row.dtype.itemsize == 2 and not row.whole:  # who also takes part in float32
                wide = dataclasses.replace(row, dtype=torch.float32)
                yield lambda r=wide: record(r, launches)


def compile_part(part: int, parts: int, patterns: list[str], operators: str) -> int:
    """How many launches were compiled of this process's part of the work."""
    from triton.backends.nvidia import driver

    from dfm_fast.kernels._predictions import recording

    done = 0
    with recording() as launches:
        work = [*rows(launches, patterns), *suite(operators)]
        for i, run in enumerate(work):
            if i % parts != part:
                continue
            launches.clear()
            try:
                run()
            except (NotImplementedError, RuntimeError, ValueError) as error:
                print(f"left out: {str(error).splitlines()[0][:100]}", flush=True)
            for launch in [x for x in launches if x.compiled]:
                kernel = launch.compiled()
                if hasattr(driver, "make_launcher"):  # Triton 3.6's are compiled, too
                    driver.CudaLauncher(kernel.src, kernel.metadata)
                done += 1
    return done


def stub(folder: Path) -> None:
    """A library with the names of CUDA's driver, for the linker."""
    source = "".join(f"int {name}(void) {{ return 1; }}\n" for name in DRIVER.split())
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / "libcuda.so.1")]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], input=source, text=True, check=True)


def pack(cache: Path, out: Path, folder: str) -> int:
    """How many kernels."""
    from triton.runtime.cache import triton_key

    count = 0
    with tarfile.open(out, "w:xz", preset=3) as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))

        add("triton_key", triton_key().encode())
        for path in sorted(cache.glob("*/*")):
            name = f"{path.parent.name}/{path.name}"
            if path.name.startswith("__grp__"):
                files = json.loads(path.read_text())["child_paths"]
                kept = {f: f"{folder}/{path.parent.name}/{f}" for f in files if f.endswith(KEPT)}
                add(name, json.dumps({"child_paths": kept}).encode())
                count += 1
            elif path.name.endswith((*KEPT, ".so")):
                add(name, path.read_bytes())
    return count


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.ahead", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument(
        "--suite", nargs="?", const="*", default="", metavar="OPERATOR", help="its test cases, too"
    )
    parser.add_argument("--folder", default=FOLDER, help="where it will be unpacked")
    parser.add_argument("--cache", type=Path, help="a folder to keep between runs")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    for pattern in args.rows:
        if not any(fnmatch(row.id, pattern) for row in gpu_rows("*", full=True)):
            print(f"ahead: ROW: expected the id of a row, or a pattern of them, got {pattern!r}")
            return 1
    with tempfile.TemporaryDirectory() as scratch:
        cache = args.cache or Path(scratch) / "cache"
        stub(Path(scratch))
        libraries = os.environ.get("LD_LIBRARY_PATH", "")
        if scratch not in libraries:  # the loader reads it when a process starts
            os.environ["LD_LIBRARY_PATH"] = f"{scratch}:{libraries}"
        os.environ |= {"TRITON_LIBCUDA_PATH": scratch, "TRITON_CACHE_DIR": str(cache)}
        os.environ["DFM_FAST_NO_EXT"] = "1"
        work = [(part, args.jobs, args.rows, args.suite) for part in range(args.jobs)]
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            launches = sum(pool.starmap(compile_part, work))
        print(f"{launches} launches, {pack(cache, args.out, args.folder)} kernels in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
