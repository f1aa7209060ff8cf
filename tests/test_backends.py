"""Every implementation of the CPU key, each in a process of its own: who serves is decided at
import, and Triton reads TRITON_INTERPRET then too."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, run_python

import dfm_fast
from dfm_fast._library import INTERPRET, OPERATORS, RAW, load_extension

pytestmark = pytest.mark.skipif(
    INTERPRET or os.environ.get("DFM_FAST_NO_EXT") == "1",
    reason="this is one of the processes it starts",
)

CAPABILITIES = ["default", "avx2", "avx512"]
IMPLEMENTATION = {"default": "C++ (baseline)", "avx2": "C++ (avx2)", "avx512": "C++ (avx512)"}
VALUES = "(parity or written or layout or deterministic or pyramids) and not 2_31"
# The properties that depend on values and memory; the rest is the same in every backend.
SUITE = (
    "-m",
    "pytest",
    "-q",
    "-x",
    "tests/test_library.py",
    "tests/test_matrices.py",
    "tests/test_pyramids.py",
    "-k",
)


def info(env):
    result = run_python("-m", "dfm_fast.cli", "info", "--json", env=env)
    assert result.returncode == 0, result.stderr
    return {r["operator"]: r for r in json.loads(result.stdout)["backends"] if r["device"] == "cpu"}


def run_suite(env, select=VALUES):
    """One worker per core, each with one thread: most of it is Python."""
    workers = str(min(os.cpu_count() or 1, 8))
    env = {**env, "OMP_NUM_THREADS": "1"}
    result = run_python(*SUITE, select, "-n", workers, env=env, timeout=1800)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


@pytest.mark.skipif(load_extension().module is None, reason="built without the extension")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_build_of_the_extension(capability):
    order = {"DEFAULT": 0, "AVX2": 1, "AVX512": 2}
    here = order.get(torch.backends.cpu.get_cpu_capability(), 0)
    if CAPABILITIES.index(capability) > here:
        pytest.skip(f"this CPU has no {capability}")
    env = {"ATEN_CPU_CAPABILITY": capability}
    served = {row["implementation"] for row in info(env).values()}
    assert served == {IMPLEMENTATION[capability]}
    if CAPABILITIES.index(capability) < here:  # the best is what all other tests run
        run_suite(env)


def test_without_the_extension_the_reference_serves():
    env = {"DFM_FAST_NO_EXT": "1"}
    for row in info(env).values():
        assert row["implementation"] == "reference"
        assert "DFM_FAST_NO_EXT=1" in row["reason"]
    run_suite(env, "parity or layout")


def test_triton_by_value_in_its_interpreter():
    pytest.importorskip("triton")
    env = {"TRITON_INTERPRET": "1"}
    for row in info(env).values():
        assert "interpreter" in row["implementation"]
    run_suite(env, "parity or 16_bit or (compose and linear)")


def test_backends_names_every_operator_on_every_device():
    rows = dfm_fast.backends()
    assert [(r.operator, r.device) for r in rows] == [
        (o, d) for o in OPERATORS for d in ("cpu", "cuda")
    ]
    assert all(row.reason for row in rows)
    if not torch.cuda.is_available():
        assert {r.implementation for r in rows if r.device == "cuda"} == {"none"}


def test_import_needs_neither_triton_nor_a_gpu():
    code = """
import sys
sys.modules["triton"] = None  # any import of it raises ImportError
import torch, dfm_fast, dfm_fast.nn
dfm_fast.laplacian_build(torch.zeros(1, 1, 4, 4))
try:
    import dfm_fast._library as library
    library._on_first_call("laplacian_build", "pyramids:laplacian_build")()
except RuntimeError as error:
    assert "expected Triton for a CUDA tensor, got an ImportError" in str(error), error
else:
    raise AssertionError("no error without Triton")
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_every_launcher_exists():
    """The lazily imported names are there (signatures are tested by running them)."""
    pytest.importorskip("triton")
    from dfm_fast import kernels

    for kernel in RAW.values():
        family, launcher = kernel.split(":")
        module = __import__(f"{kernels.__name__}.{family}", fromlist=[launcher])
        assert callable(getattr(module, launcher))


def test_info_prints_a_table():
    result = run_python("-m", "dfm_fast.cli", "info")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.split(" ")[0] in OPERATORS]
    assert len(lines) == 2 * len(OPERATORS)
    columns = {line.index(" cpu " if " cpu " in line else " cuda ") for line in lines}
    assert len(columns) == 1, "devices are one column"


def test_a_closed_pipe_is_no_error():
    shell = f"{sys.executable} -m dfm_fast.cli info | head -n 1"
    result = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("dfm_fast")
    assert not result.stderr


def test_unknown_command_is_one_clear_error():
    result = run_python("-m", "dfm_fast.cli", "inform")
    assert result.returncode == 2
    assert "invalid choice: 'inform'" in result.stderr
    assert "Traceback" not in result.stderr


def test_only_kernels_import_triton():
    for path in ROOT.glob("dfm_fast/**/*.py"):
        lines = [line.strip() for line in path.read_text().splitlines()]
        assert not [line for line in lines if line.startswith(("import triton", "from triton"))], (
            path
        )
