"""The CUDA C++ sources without a GPU: their logic on emulated threads, their code as nvcc sees it.

The emulation (cuda_emulation.cpp) runs the kernels themselves, thread by thread, with the plans
that the launchers choose, so what it leaves to a GPU is the memory model and the speed.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfm_fast.ops import pyramids

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
CUDA_HEADERS = ("cuda_runtime.h", "cuda_runtime_api.h", "cuda_bf16.h", "cuda_fp16.h")
NVCC = shutil.which("nvcc")
# As torch.utils.cpp_extension calls nvcc.
NVCC_FLAGS = [
    *("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler", "-Wall", "-Xptxas", "-v"),
    *(f"-D__CUDA_NO_{what}__" for what in ("HALF_OPERATORS", "HALF_CONVERSIONS")),
    *(f"-D__CUDA_NO_{what}__" for what in ("BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")),
]

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (FLOAT32, BFLOAT16, FLOAT16, FLOAT64)  # in the order of pyramids.h
FACTOR = (2, 2)
# Sides: the smallest, odd, one tile, more tiles than one in either direction, aligned rows or not.
SIZES = [
    *((2, 2, 2), (3, 2, 2), (2, 9, 2), (3, 3, 3), (5, 4, 3), (6, 17, 3), (33, 32, 4)),
    *(
        (37, 300, 3),
        (97, 264, 3),
        (70, 45, 5),
        (64, 520, 2),
        (140, 24, 4),
        (45, 531, 4),
        (20, 490, 4),
    ),
]
# Multiprocessors, shared memory of a block, lanes run backwards.
H200, SMALL, ONE = (132, 227 * 1024, False), (132, 64 * 1024, True), (1, 227 * 1024, True)


class Pyramid(ctypes.Structure):
    _fields_ = [
        ("planes", ctypes.c_int64),
        ("num_levels", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("height", ctypes.c_int * 16),
        ("width", ctypes.c_int * 16),
        ("data", ctypes.c_void_p * 16),
    ]


class Emulation:
    """The four operations on CPU tensors; each returns its outputs and counts its launches."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.launches = 0

    def configure(self, multiprocessors: int, shared: int, backwards: bool) -> None:
        self.library.configure(multiprocessors, shared, backwards)

    def _run(self, op: int, levels: list[Tensor], fine: Tensor) -> None:
        """levels: coarse to fine."""
        finest = levels[-1]
        pyramid = Pyramid(finest.shape[0] * finest.shape[1], len(levels), DTYPES.index(fine.dtype))
        for s, level in enumerate(reversed(levels)):
            pyramid.height[s], pyramid.width[s] = level.shape[2:]
            pyramid.data[s] = level.data_ptr()
        fine_ptr = ctypes.c_void_p(fine.data_ptr())
        self.launches = self.library.run(op, ctypes.byref(pyramid), fine_ptr)
        assert self.launches >= 0

    def build(self, x: Tensor, num_levels: int) -> list[Tensor]:
        levels = unwritten_levels(x, num_levels)
        self._run(0, levels, x)
        return levels

    def collapse(self, levels: list[Tensor]) -> Tensor:
        x = torch.full_like(levels[-1], float("nan"))
        self._run(1, levels, x)
        return x

    def build_backward(self, grads: list[Tensor]) -> Tensor:
        dx = torch.full_like(grads[-1], float("nan"))
        self._run(2, grads, dx)
        return dx

    def collapse_backward(self, grad: Tensor, num_levels: int) -> list[Tensor]:
        levels = unwritten_levels(grad, num_levels)
        self._run(3, levels, grad)
        return levels[:-1]


def unwritten_levels(x: Tensor, num_levels: int) -> list[Tensor]:
    sizes = pyramids.level_sizes(x.shape[2:], num_levels, FACTOR)
    return [x.new_full((*x.shape[:2], *size), float("nan")) for size in sizes]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """References this small lose more to torch's threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    folder = tmp_path_factory.mktemp("cuda_emulation")
    for header in CUDA_HEADERS:
        (folder / header).touch()
    library = folder / "emulation.so"
    source = ROOT / "tests" / "cuda_emulation.cpp"
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    # Jumping between stacks is what fibers do.
    flags += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
    flags += ["-U_FORTIFY_SOURCE", *os.environ.get("DFM_FAST_EMULATION_FLAGS", "").split()]
    command = [compiler, *flags, f"-I{folder}", str(source), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Emulation(library)


def references(x: Tensor, grads: list[Tensor]) -> list[list[Tensor]]:
    """build, collapse, build backward and collapse backward; `grads` also serve as levels."""
    n = len(grads)
    return [
        pyramids.laplacian_build_ref(x, n, "binomial", FACTOR),
        [pyramids.laplacian_collapse_ref(grads, "binomial", FACTOR)],
        [pyramids.laplacian_build_backward_ref(grads, "binomial", FACTOR)],
        pyramids.laplacian_collapse_backward_ref(x, n, "binomial", FACTOR),
    ]


def emulated(emulation: Emulation, x: Tensor, grads: list[Tensor]) -> list[list[Tensor]]:
    return [
        emulation.build(x, len(grads)),
        [emulation.collapse(grads)],
        [emulation.build_backward(grads)],
        emulation.collapse_backward(x, len(grads)),
    ]


def inputs(
    height: int, width: int, num_levels: int, dtype: torch.dtype, planes: tuple[int, int] = (2, 1)
) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(height * width)
    x = torch.randn(*planes, height, width, generator=generator).to(dtype)
    sizes = pyramids.level_sizes((height, width), num_levels, FACTOR)
    grads = [torch.randn(*planes, *size, generator=generator).to(dtype) for size in sizes]
    return x, grads


def check(emulation: Emulation, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, grads = inputs(*size, dtype)
    exact = references(x.double(), [g.double() for g in grads])
    expected, got = references(x, grads), emulated(emulation, x, grads)
    for op, (want, ours, truth) in enumerate(zip(expected, got, exact, strict=True)):
        for s, (a, b, t) in enumerate(zip(want, ours, truth, strict=True)):
            where = (op, size, s)
            assert b.isfinite().all(), where
            scale = max(1.0, t.abs().max().item())  # sums that cancel: of the inputs' size
            budget = 2 * (a.double() - t).abs().max() + torch.finfo(dtype).eps * scale
            assert (b.double() - t).abs().max() <= budget, where
            if op < 2 and dtype in (BFLOAT16, FLOAT16):  # the same roundings, nearly always
                assert (a != b).float().mean() < 0.01 or (a != b).sum() <= 1, where


@pytest.mark.parametrize("device", [H200, SMALL, ONE], ids=["h200", "small", "one"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(emulation: Emulation, dtype: torch.dtype, device: tuple[int, int, bool]) -> None:
    emulation.configure(*device)
    for size in SIZES:
        check(emulation, size, dtype)


def test_every_small_size(emulation: Emulation) -> None:
    emulation.configure(*H200)
    for height, width in itertools.product(range(2, 15), range(2, 15)):
        most = ((min(height, width) + 1) // 2).bit_length() + 1
        check(emulation, (height, width, most), FLOAT32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_are_aligned(emulation: Emulation, dtype: torch.dtype) -> None:
    """Tiles of many widths over wide planes, rows that are aligned for vectors or not, data that
    is: the emulation aborts at an access that is not aligned, as a GPU does."""
    for multiprocessors, width in itertools.product(
        (1, 5, 30), (264, 400, 504, 508, 510, 511, 512)
    ):
        emulation.configure(multiprocessors, 227 * 1024, False)
        for num_levels in (2, 3, 4, 6):
            x, grads = inputs(96, width, num_levels, dtype, (1, 1))
            emulated(emulation, x, grads)
            emulated(emulation, *(shifted(x, grads)))


def shifted(x: Tensor, grads: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same values one element on: data that is not aligned for vectors."""
    off = [F.pad(v.flatten(), (1, 0))[1:].view(v.shape) for v in (x, *grads)]
    return off[0], off[1:]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_every_tile_and_order_gives_the_same(emulation: Emulation, dtype: torch.dtype) -> None:
    """Forwards, backwards, tiles, whole planes: bit-equal where no launch is split differently."""
    x, grads = inputs(75, 280, 3, dtype)
    results = []
    for device in ((132, 227 * 1024, False), (132, 227 * 1024, True), (1, 100 * 1024, False)):
        emulation.configure(*device)
        results.append(list(itertools.chain(*emulated(emulation, x, grads))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_matrices(emulation: Emulation) -> None:
    """The folded borders are those of `axis_taps`."""
    out = (ctypes.c_double * 5)()
    for kind, n in itertools.product((0, 1), range(2, 24)):
        m = (n + 1) // 2
        got = torch.zeros(m, n, dtype=torch.float64)
        for k in range(m):
            emulation.library.weights(kind, k, n, out)
            for i, j, value in zip(
                (k - 1, k, k + 1, k, k + 1), (0, 0, 0, 1, 1), list(out), strict=True
            ):
                if 0 <= i < m and 2 * k + j < n:
                    got[i, 2 * k + j] = value
                else:
                    assert value == 0 or 2 * k + j == n
        taps = pyramids.axis_taps("binomial", ("down", "up_adjoint")[kind], n)
        rows = torch.arange(m)[:, None].expand_as(taps.index)
        want = torch.zeros(m, n, dtype=torch.float64)
        want.index_put_((rows, taps.index), taps.weight, accumulate=True)
        assert torch.equal(got, want), (kind, n)


def test_launches(emulation: Emulation) -> None:
    """One for collapse and build's backward; one per two steps of build, or where planes fit."""
    emulation.configure(*H200)
    x, grads = inputs(48, 160, 4, FLOAT32)
    counts = []
    for run in (
        lambda: emulation.build(x, 4),
        lambda: emulation.collapse(grads),
        lambda: emulation.build_backward(grads),
        lambda: emulation.collapse_backward(x, 4),
    ):
        run()
        counts.append(emulation.launches)
    assert counts == [2, 1, 1, 2]
    emulation.build(inputs(33, 40, 4, FLOAT32, (66, 1))[0], 4)
    assert emulation.launches == 1
    emulation.build(x[:0], 4)
    assert emulation.launches == 0


def test_infinities_stay_where_they_belong(emulation: Emulation) -> None:
    """A weight of zero must not multiply a value: an infinity reaches what depends on it alone."""
    emulation.configure(*H200)
    x, grads = inputs(41, 270, 3, FLOAT32)
    for y, column in ((0, 0), (40, 269), (17, 128), (20, 251)):
        y_x, y_grads = x.clone(), [g.clone() for g in grads]
        y_x[0, 0, y, column] = float("inf")
        y_grads[-1][0, 0, y, column] = float("inf")
        pairs = zip(references(y_x, y_grads), emulated(emulation, y_x, y_grads), strict=True)
        for op, (want, ours) in enumerate(pairs):
            for a, b in zip(want, ours, strict=True):
                assert (a.isfinite() <= b.isfinite()).all(), (op, y, column)


# --- nvcc ----------------------------------------------------------------------------------------

LIMITS = {80: 163, 90: 227}  # shared memory of a block, KB


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("arch", LIMITS)
def test_compiles_without_spills(tmp_path: Path, arch: int) -> None:
    target = f"arch=compute_{arch},code=sm_{arch}"
    cubin = str(tmp_path / "pyramids.cubin")
    command = [NVCC, *NVCC_FLAGS, "-gencode", target, "-cubin", str(SOURCES / "pyramids.cu")]
    result = subprocess.run([*command, "-o", cubin], capture_output=True, text=True)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert "warning" not in report
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(kernels) == len(registers) == 4 * len(DTYPES)
    assert set(spills) == {("0", "0")}, report
    assert max(registers) <= 128
    static = [int(n) for n in re.findall(r"(\d+) bytes smem", report)]
    assert max(static, default=0) <= LIMITS[arch] * 1024


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH: no CUDA headers")
def test_binding_syntax(tmp_path: Path) -> None:
    """Compiles against this torch's headers; what a CPU build of torch lacks is an empty file."""
    from torch.utils.cpp_extension import include_paths

    dryrun = subprocess.run(
        [NVCC, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    folder = re.search(r'INCLUDES="-I([^"]+)"', dryrun.stderr)
    if folder is None or not Path(folder[1], "cuda_runtime_api.h").exists():
        pytest.skip("nvcc has no CUDA headers")
    macros = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True)
    macros.touch()
    folders = [*include_paths(), sysconfig.get_path("include"), folder[1], str(tmp_path)]
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-fsyntax-only", "-Wall"]
    command += ["-DTORCH_EXTENSION_NAME=_C_cuda", *(f"-I{folder}" for folder in folders)]
    for source in sorted(SOURCES.glob("*.cpp")):
        result = subprocess.run([*command, str(source)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
