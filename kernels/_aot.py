"""Compile kernels ahead of time, without a GPU, and read what the machine code says.

Every kernel module lists what it launches in `specialisations()`; `dfm-fast check` and the tests
compile each for every target and gate it: shared memory within the target's limit, no spills,
global loads as wide as promised, and matrix instructions where there must be some.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import dfm_fast.kernels

# Target -> (Triton's target, shared memory per block in KiB).
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "sm_120": (GPUTarget("cuda", 120, 32), 99),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
# Of a multiprocessor: (warps, registers, KiB of shared memory). Each of its at most 32 blocks takes
# 1 KiB more than it asks for.
MULTIPROCESSORS = {
    "sm_80": (64, 65536, 164),
    "sm_90": (64, 65536, 228),
    "sm_100": (64, 65536, 228),
    "sm_120": (48, 65536, 100),
}
# Target -> pattern of the instruction that multiplies matrices there.
MATRIX = {
    "sm_80": "HMMA",
    "sm_90": "HGMMA",  # wgmma
    "sm_100": "UTC.MMA",  # tcgen05: UTCHMMA, UTCQMMA
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}


@dataclass(frozen=True)
class Specialisation:
    """One way a kernel is launched."""

    name: str
    kernel: triton.JITFunction
    dtype: str  # bf16, fp16, fp32 or fp64: what "*" stands for in `arguments`
    arguments: dict[str, str | None]  # "*", "*fp32", "i32"; None where no tensor is passed
    constants: dict[str, Any]
    warps: int = 4  # of 32 threads: half as many where a warp has 64
    targets: tuple[str, ...] = tuple(TARGETS)
    load_bits: int = 0  # the widest global load must have at least so many
    options: dict[str, Any] = field(default_factory=dict)
    matrix: bool = False  # its machine code must multiply matrices
    normals: int = 0  # that a lane draws, where its code has no branch and no loop
    reason: str = ""  # why it is not as wide, full or large as `_predictions` asks for, where so


@dataclass(frozen=True)
class Report:
    kernel: str
    dtype: str
    target: str
    registers: int
    shared: int  # bytes
    spills: int  # bytes of stack (NVIDIA), spilled registers (AMD)
    load_bits: int  # widest global load
    instructions: int
    failures: tuple[str, ...]
    per_normal: float = 0.0  # instructions of a lane per normal it draws
    occupancy: float = 0.0  # warps that fit on a multiprocessor, of those it can have (NVIDIA)


def specialisations() -> Iterator[Specialisation]:
    """Those of every kernel module, in alphabetical order."""
    for module in pkgutil.iter_modules(dfm_fast.kernels.__path__):
        loaded = importlib.import_module(f"dfm_fast.kernels.{module.name}")
        if not module.name.startswith("_") and hasattr(loaded, "specialisations"):
            yield from loaded.specialisations()


def check(spec: Specialisation, target: str) -> Report:
    """Compile and gate; a compiler's error is a failure, not an exception."""
    gpu, limit = TARGETS[target]
    try:
        compiled = _compile(spec, gpu)
        found = _read_amd(compiled) if gpu.backend == "hip" else _read_nvidia(compiled)
    except Exception as error:
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
        return Report(spec.name, spec.dtype, target, 0, 0, 0, 0, 0, (failure,))
    registers, spills, load_bits, code = found
    shared = compiled.metadata.shared
    failures = []
    if shared > limit * 1024:
        failures.append(f"shared memory: expected at most {limit * 1024} bytes, got {shared}")
    if spills:
        failures.append(f"spills: expected 0, got {spills}")
    if load_bits < spec.load_bits:
        failures.append(f"widest load: expected {spec.load_bits} bits, got {load_bits}")
    if spec.matrix and not any(re.match(MATRIX[target], op) for op in code):
        failures.append(f"instructions: expected {MATRIX[target]}, got none")
    return Report(
        spec.name, spec.dtype, target, registers, shared, spills, load_bits, len(code),
        tuple(failures), len(code) / spec.normals if spec.normals else 0.0,
        occupancy(target, registers, shared, spec.warps),
    )  # fmt: skip


def occupancy(target: str, registers: int, shared: int, warps: int) -> float:
    """Of a launch with enough blocks. Registers come in 256 a warp, shared memory in 128 bytes."""
    if target not in MULTIPROCESSORS:
        return 0.0
    most, file, memory = MULTIPROCESSORS[target]
    each = -(-registers * 32 // 256) * 256 * warps
    space = -(-shared // 128) * 128 + 1024
    blocks = min(32, most // warps, file // max(each, 1), memory * 1024 // space)
    return blocks * warps / most


def _compile(spec: Specialisation, gpu: GPUTarget) -> Any:
    """As a launch would: pointers 16-byte aligned, None and constants folded in."""
    signature, constants, attrs = {}, dict(spec.constants), {}
    for i, name in enumerate(spec.kernel.arg_names):
        kind = spec.arguments.get(name)
        if name in constants or kind is None:
            constants.setdefault(name, None)
            signature[name] = "constexpr"
        else:
            signature[name] = f"*{spec.dtype}" if kind == "*" else kind
            if kind.startswith("*"):
                attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(spec.kernel, signature, constants, attrs)
    options = {"num_warps": max(1, spec.warps * 32 // gpu.warp_size), **spec.options}
    if gpu.backend == "hip":
        options.pop("maxnreg", None)  # ptxas's
    return triton.compile(source, target=gpu, options=options)


# --- Reading machine code ------------------------------------------------------------------------


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_nvidia(compiled: Any) -> tuple[int, int, int, list[str]]:
    """(registers, bytes of stack, widest global load in bits, instructions)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(_tool("cuobjdump"), "-res-usage", file.name)
        sass = _run(_tool("nvdisasm"), "-c", "-ndf", file.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\S+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.M)
    code = code[: len(code) - next(i for i, op in enumerate(code[::-1]) if op != "NOP")]
    local = sum(op.startswith(("LDL", "STL")) for op in code)
    loads = [op for op in code if op.startswith(("LDG", "LDGSTS", "UBLKCP"))]
    bits = [int(m[1]) if (m := re.search(r"\.(64|128|256)\b", op)) else 32 for op in loads]
    return registers, stack or 4 * local, max(bits, default=0), code


def _read_amd(compiled: Any) -> tuple[int, int, int, list[str]]:
    """The same of gfx9 assembly; spills are counted in registers."""
    text = compiled.asm["amdgcn"]
    count = {
        key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1])
        for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    widths = re.findall(r"(?:global|buffer)_load_(?:dwordx(\d)|\w+)", text)
    code = re.findall(r"^\s+([sv]_\w+|global_\w+|buffer_\w+|ds_\w+)", text, re.M)
    spills = count["vgpr_spill_count"] + count["sgpr_spill_count"]
    bits = max((32 * int(width or 1) for width in widths), default=0)
    return count["vgpr_count"], spills, bits, code


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
