"""One place where operators are registered.

`define` puts a raw operator into the dispatcher: schema, reference (every device), Triton or CUDA
(imported on the first CUDA call), fake, FLOP formula; the C++ extension adds its own for the CPU.
`operator` marks a public function, links it to its reference and raw operators, and gives it the
DTensor rule. What is marked is in `OPERATORS`, and `tests/test_library.py` tests all of it.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import register_flop_formula

P = ParamSpec("P")
R = TypeVar("R")
_LIBRARY = torch.library.Library("dfm_fast", "DEF")
# The fake kernels promise exact strides; Inductor must then hand over the strides it traced with.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

# An operator's own torch calls are not for autocast, which sees the operator alone.
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA).add(
    torch._C.DispatchKey.AutocastCPU
)

# Triton reads this variable at import. With it set the Triton kernels also serve CPU tensors,
# so that the whole test suite can run them without a GPU.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Operator:
    """A public function and what stands behind it."""

    name: str
    family: str
    public: Callable[..., Any]
    reference: Callable[..., Any]
    raw: tuple[str, ...]  # dispatcher names, forward first: "dfm_fast::laplacian_build"
    cost: Callable[..., int]  # least bytes moved by the forward: each input and output once


class Shard(NamedTuple):
    """Where a local batch lies in the whole one: for operators whose result depends on it."""

    start: int
    batch: int


OPERATORS: dict[str, Operator] = {}
RAW: dict[str, str] = {}  # raw operator -> "family:launcher"


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernel: str | None,
    flops: Callable[..., int],
) -> None:
    """Register `dfm_fast::<schema>`; `kernel` is "<family>:<launcher>" in `dfm_fast.kernels`, None
    where a GPU has the reference."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if kernel is not None:
        launch = _on_first_call(name, kernel)
        _LIBRARY.impl(name, launch, "CUDA")
        if INTERPRET:
            _LIBRARY.impl(name, launch, "CPU")
        RAW[name] = kernel
    torch.library.register_fake(f"dfm_fast::{name}", fake, lib=_LIBRARY)
    register_flop_formula(getattr(torch.ops.dfm_fast, name))(_without_out(flops))


def operator(
    *,
    reference: Callable[..., Any],
    raw: tuple[str, ...],
    cost: Callable[..., int],
    on_shard: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a public function as an operator of the library (see `Operator`). `on_shard` is the
    function with a keyword `shard` more, for DTensors, where a sample's result depends on its place
    in the batch: noise."""

    def decorate(public: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(public)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if _has_dtensor(args, kwargs):
                return _on_local_shards(public, args, kwargs, on_shard)
            return public(*args, **kwargs)

        name, family = public.__name__, RAW[raw[0]].split(":")[0]
        qualified = tuple(f"dfm_fast::{op}" for op in raw)
        OPERATORS[name] = Operator(name, family, call, reference, qualified, cost)
        return call

    return decorate


def differentiable(*tensors: torch.Tensor) -> bool:
    """Whether a call must go through autograd.Function. Where not, the raw operator alone saves a
    third of the host time; forward mode has to reach the Function, which refuses it."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _on_first_call(name: str, kernel: str) -> Callable[..., Any]:
    family, launcher = kernel.split(":")

    @functools.cache
    def load() -> Callable[..., Any]:
        try:
            module = importlib.import_module(f"dfm_fast.kernels.{family}")
        except ImportError as error:
            raise RuntimeError(
                f"{name}: expected Triton for a CUDA tensor, got an ImportError: {error}. Install "
                "triton >= 3.6, or move the tensor to the CPU."
            ) from error
        return getattr(module, launcher)

    def launch(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return load()(*args, **kwargs)

    return launch


def _without_out(flops: Callable[..., int]) -> Callable[..., int]:
    def formula(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return flops(*args, **kwargs)

    return formula


# --- DTensor: batch sharding -------------------------------------------------------------------


def _has_dtensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Among the arguments or in a list of tensors; cheap, as it is asked at every call."""
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is None:
        return False
    for value in (*args, *kwargs.values()):
        if isinstance(value, tensor.DTensor):
            return True
        if isinstance(value, list | tuple) and any(isinstance(v, tensor.DTensor) for v in value):
            return True
    return False


def _on_local_shards(
    public: Callable[..., Any],
    args: Any,
    kwargs: Any,
    on_shard: Callable[..., Any] | None = None,
) -> Any:
    """Run on the local shards. Every operator is independent along the batch, so Shard(0) stays
    Shard(0) and Replicate stays Replicate; other placements are first replicated."""
    from torch.distributed.tensor import DTensor, Partial, Replicate
    from torch.distributed.tensor import Shard as Split
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    leaves, spec = pytree.tree_flatten((args, kwargs))
    shards = [leaf for leaf in leaves if isinstance(leaf, DTensor)]
    mesh = shards[0].device_mesh
    batch = Split(0)
    # A mesh dimension stays sharded if some tensor is sharded along the batch there.
    placements = [
        batch if any(shard.placements[i] == batch for shard in shards) else Replicate()
        for i in range(mesh.ndim)
    ]

    def local(leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        keep = [p if leaf.placements[i] == p else Replicate() for i, p in enumerate(placements)]
        # A replicated tensor used by sharded ones gets a partial gradient from every shard.
        grads = [
            Partial() if p == batch and k == Replicate() else k
            for p, k in zip(placements, keep, strict=True)
        ]
        return leaf.redistribute(mesh, keep).to_local(grad_placements=grads)

    args, kwargs = pytree.tree_unflatten([local(leaf) for leaf in leaves], spec)
    sharded = [s for s in shards if batch in s.placements] or shards
    n = sharded[0].shape[0]  # shards may be uneven: the global batch is not to be had from one
    if on_shard is None:
        out = public(*args, **kwargs)
    else:
        _, start = compute_local_shape_and_global_offset(sharded[0].shape, mesh, placements)
        out = on_shard(*args, shard=Shard(start[0], n), **kwargs)

    def whole(t: torch.Tensor) -> DTensor:
        shape = torch.Size((n, *t.shape[1:]))
        return DTensor.from_local(
            t, mesh, placements, run_check=False, shape=shape, stride=t.stride()
        )

    return pytree.tree_map_only(torch.Tensor, whole, out)


# --- The C++ extension --------------------------------------------------------------------------

# Best first; torch's own capability (and its override ATEN_CPU_CAPABILITY) decides.
_BUILDS = {"AVX512": ("_C_avx512", "_C_avx2", "_C"), "AVX2": ("_C_avx2", "_C")}


@dataclass(frozen=True)
class Extension:
    """The loaded C++ extension: module name, or None and the reason."""

    module: str | None
    reason: str


@functools.cache
def load_extension() -> Extension:
    """Load the best build this CPU runs. Never raises: without it the reference serves the CPU."""
    if INTERPRET:
        return Extension(None, "TRITON_INTERPRET=1: Triton's interpreter serves CPU tensors")
    if os.environ.get("DFM_FAST_NO_EXT") == "1":
        return Extension(None, "DFM_FAST_NO_EXT=1")
    capability = torch.backends.cpu.get_cpu_capability()
    reasons = []
    for module in _BUILDS.get(capability, ("_C",)):
        try:
            importlib.import_module(f"dfm_fast.{module}")
        except ImportError as error:
            reasons.append(f"{module}: {error}")
        else:
            return Extension(module, f"CPU capability {capability}")
    return Extension(None, "; ".join(reasons))
