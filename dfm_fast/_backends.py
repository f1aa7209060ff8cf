"""Who serves which operator on this machine, and why not something better."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass

import torch

from dfm_fast._library import INTERPRET, OPERATORS, load_extension


@dataclass(frozen=True)
class Backend:
    """One operator on one kind of device."""

    operator: str
    device: str  # "cpu" or "cuda"
    implementation: str  # "C++ (avx512)", "Triton 3.7.1", "reference" or "none"
    reason: str


def backends() -> list[Backend]:
    """One `Backend` per operator and device kind, in the order of the operators.

    "reference" means plain torch: right, slow. "none" means that a call raises: on a GPU nothing
    falls back in silence. Neither a GPU, nor Triton, nor the extension is needed to ask.
    """
    return [backend(name) for name in OPERATORS for backend in (_cpu, _cuda)]


def _cpu(name: str) -> Backend:
    extension = load_extension()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if INTERPRET:
        return Backend(name, "cpu", f"Triton {_triton()} (interpreter)", extension.reason)
    if extension.module is None:
        return Backend(name, "cpu", "reference", f"no extension: {extension.reason}")
    if not all(has_kernel(raw, "CPU") for raw in OPERATORS[name].raw):
        return Backend(name, "cpu", "reference", f"not in the extension {extension.module}")
    isa = importlib.import_module(f"dfm_fast.{extension.module}").isa
    return Backend(name, "cpu", f"C++ ({isa})", extension.reason)


def _cuda(name: str) -> Backend:
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__} is built " + (
            f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        )
        return Backend(name, "cuda", "none", f"no CUDA device; {built}")
    if _triton() is None:
        return Backend(name, "cuda", "none", "Triton is not installed")
    return Backend(name, "cuda", f"Triton {_triton()}", torch.cuda.get_device_name())


@functools.cache
def _triton() -> str | None:
    """Version, without importing it (that takes a second)."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.metadata.version("triton")
