"""Predict, with no GPU, how long a launch takes on one, and what bounds it.

`recording()` runs the library's own launchers on tensors without memory (device "meta"): every
kernel is recorded as it is launched, and compiled as the launch would have it. A prediction is

    launch + max(memory, instructions, special, products, latency)

    memory        least bytes (each tensor read or written once) at a copy's rate, and its ramp
    instructions  of all warps, four a clock on each multiprocessor
    special       MUFU and conversions, 16 lanes a clock on each multiprocessor
    products      FLOPs of matrix instructions at the measured rate of large products
    latency       waves, each as long as one warp takes alone: `PACE` clocks an instruction, and
                  what it waits for its loads

`_code` counts the instructions, of both sides of a branch and of masked lanes too.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from dfm_fast.kernels import _aot, pyramids
from dfm_fast.kernels._code import Code, disassembled, read_code, read_loops
from dfm_fast.profiling import costs

TARGET = "sm_90"


@dataclass(frozen=True)
class Machine:
    """Measured on an H200 where docs/performance/log.md says so, else from NVIDIA's datasheets."""

    name: str = "NVIDIA H200"
    multiprocessors: int = 132
    clock: float = 1.98e9  # Hz
    bandwidth: float = 4.15e12  # of a copy of 0.9 GB, read and written
    ramp: float = 1.5e-6  # s, which a copy of any size takes beside `launch`
    launch: float = 2.5e-6  # s, replayed in a graph
    latency: float = 0.6e-6  # s, of a load from memory
    products: float = 788e12  # FLOP/s in 16 bits; half in TF32


H200 = Machine()
BUSY = 0.8  # of the slots for instructions, where warps abound


@dataclass(frozen=True)
class Launch:
    """One kernel launch, or a call of an operator of torch's (which compiles nothing)."""

    name: str
    tensors: tuple[Tensor, ...]
    grid: int = 1
    integers: dict[str, int] = field(default_factory=dict)
    compiled: Callable[[], Any] | None = None  # in `recording` alone
    reason: str = ""  # stated in the kernel's `Specialisation`
    flops: int = 0
    moved: int = 0


@dataclass(frozen=True)
class Prediction:
    kernel: str
    dtype: str
    grid: int
    waves: float
    registers: int
    shared: int
    spills: int
    occupancy: float
    load_bits: int
    per_element: float  # instructions of a lane
    least: int  # bytes
    asked: int  # bytes of all loads and stores, those of masked lanes too; `least` at least
    flops: float  # of matrix instructions
    microseconds: float
    floor: float  # of memory and products alone
    bound: str
    exact: bool
    reason: str = ""


# --- Recording -----------------------------------------------------------------------------------


class _Driver:
    """What Triton asks before it compiles; nothing is loaded or launched."""

    def get_current_target(self) -> Any:
        return _aot.TARGETS[TARGET][0]

    def get_current_device(self) -> int:
        return -1  # what is compiled here is not for any that is there

    def get_current_stream(self, device: Any = None) -> int:
        return 0


class _Launching(TorchDispatchMode):
    """The library's operators by their CUDA launchers, torch's by their shapes."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "dfm_fast":
            with self:
                return func._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)
        out = func(*args, **kwargs)
        if func._overloadpacket in _CONVOLUTIONS:  # cuDNN's keep it, those of "meta" do not
            last = torch.channels_last
            if any(x.ndim == 4 and x.is_contiguous(memory_format=last) for x in args[:2]):
                out = pytree.tree_map_only(Tensor, lambda x: _laid_out(x, last), out)
        if moved := costs.moved_bytes(func, tuple(args), kwargs, out):
            flops = costs.call_flops(func, tuple(args), kwargs, out)
            found = tuple(costs.tensors((args, kwargs, out)))
            self.launches.append(Launch(str(func), found, flops=flops, moved=moved))
        return out


_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


def _laid_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format) if x.ndim == 4 else x


class _Binomial:
    """Of the CUDA C++ extension: one launch, by its bytes."""

    def __init__(self, launches: list[Launch]) -> None:
        self.launches = launches

    def _add(self, name: str, found: Sequence[Tensor]) -> None:
        moved = sum(map(costs.held_bytes, found))
        self.launches.append(Launch(f"{name} (CUDA C++)", tuple(found), moved=moved))

    def binomial_build(self, x: Tensor, num_levels: int) -> list[Tensor]:
        sizes = [x.shape[-2:]]
        for _ in range(num_levels - 1):
            sizes.insert(0, torch.Size([(n + 1) // 2 for n in sizes[0]]))
        levels = [x.new_empty(*x.shape[:2], *size) for size in sizes]
        self._add("binomial_build", [x, *levels])
        return levels

    def binomial_collapse(self, levels: Sequence[Tensor]) -> Tensor:
        x = torch.empty_like(levels[-1])
        self._add("binomial_collapse", [x, *levels])
        return x

    def binomial_build_backward(self, grads: Sequence[Tensor]) -> Tensor:
        dx = torch.empty_like(grads[-1])
        self._add("binomial_build_backward", [dx, *grads])
        return dx

    def binomial_collapse_backward(self, dy: Tensor, num_levels: int) -> list[Tensor]:
        grads = self.binomial_build(dy, num_levels)
        self.launches.pop()
        self._add("binomial_collapse_backward", [dy, *grads[:-1]])
        return grads


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """What is launched inside, on tensors of device "meta", which pass for those of an H200."""
    launches: list[Launch] = []
    compile_ = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = functools.partial(compile_, self, *args, grid=grid, warmup=True, **options)
        given = {**dict(zip(self.arg_names, args, strict=False)), **options}
        integers = {n: v for n, v in given.items() if isinstance(v, int) and n in self.arg_names}
        found = tuple(costs.tensors(given))
        name = f"{self.__module__.rpartition('.')[2]}.{self.__name__}"
        launches.append(
            Launch(name, found, math.prod(grid), integers, compiled, _reasons().get(self, ""))
        )

    gpu = types.SimpleNamespace(multi_processor_count=H200.multiprocessors, major=9, minor=0)
    gpu.name, gpu.total_memory = H200.name, 141 << 30
    cuda, sdpa, is_meta = torch.cuda, torch.backends.cuda, lambda x: x.device.type == "meta"
    changes: list[tuple[Any, str, Any]] = [
        (JITFunction, "run", run),
        (Tensor, "is_cuda", property(is_meta)),
        (
            Tensor,
            "data_ptr",
            lambda x: _address(x.untyped_storage()) + x.element_size() * x.storage_offset(),
        ),
        (torch.UntypedStorage, "data_ptr", lambda s: _address(s)),
        (cuda, "current_device", lambda: None),
        (cuda, "get_device_capability", lambda device=None: (9, 0)),
        (cuda, "get_device_properties", lambda device=None: gpu),
        (sdpa, "can_use_cudnn_attention", lambda p, debug=False: p.query.element_size() == 2),
        (sdpa, "can_use_flash_attention", lambda p, debug=False: p.query.element_size() == 2),
        (sdpa, "can_use_efficient_attention", lambda p, debug=False: p.query.element_size() < 8),
        (torch, "is_autocast_enabled", lambda device=None: False),
        (torch.nn.functional, "scaled_dot_product_attention", _fused_attention),
        (pyramids, "_binomial", lambda: binomial),
        (triton.runtime.driver, "_active", _Driver()),
    ]
    binomial = _Binomial(launches)
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(torch.device("meta"))
        stack.enter_context(_Launching(launches))
        yield launches


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **options: Any
) -> Tensor:
    """Without memory torch would write every score."""
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention
    return attention(query, key, value, attn_mask, True, scale=options.get("scale"))[0]


def _address(storage: torch.UntypedStorage) -> int:
    return storage._cdata & ~15


def _pointer(x: Tensor) -> int:
    return _address(x.untyped_storage()) + x.element_size() * x.storage_offset()


@functools.cache
def _reasons() -> dict[JITFunction, str]:
    return {spec.kernel: spec.reason for spec in _aot.specialisations() if spec.reason}


# --- Predicting ----------------------------------------------------------------------------------


def predict(launch: Launch, machine: Machine = H200) -> Prediction:
    """Of one launch; of torch's operators, by bytes and FLOPs alone."""
    least = launch.moved or sum({_key(t): costs.held_bytes(t) for t in launch.tensors}.values())
    largest = max(launch.tensors, key=Tensor.numel)
    dtype = str(largest.dtype).removeprefix("torch.")
    memory = machine.ramp + least / machine.bandwidth
    if launch.compiled is None:
        rate = machine.products / (1 if largest.element_size() < 4 else 2)
        times = {"memory": memory, "products": launch.flops / rate}
        bound, seconds = _bound(times, machine)
        return Prediction(
            launch.name, dtype, 1, 0.0, 0, 0, 0, 0.0, 0, 0.0, least, least, launch.flops,
            1e6 * seconds, 1e6 * seconds, bound, False, launch.reason,
        )  # fmt: skip
    compiled = launch.compiled()
    metadata = compiled.metadata
    sass, registers, stack = disassembled(compiled.asm["cubin"])
    loops, asked = read_loops(compiled.asm["ttgir"], launch.integers, launch.grid)
    code = read_code(sass, loops, machine.latency * machine.clock)
    occupancy = _aot.occupancy(TARGET, registers, metadata.shared, metadata.num_warps)
    resident = max(1, round(occupancy * 64 / metadata.num_warps))
    waves = launch.grid / (machine.multiprocessors * resident)
    warps = launch.grid * metadata.num_warps
    times = {"memory": memory, **_work(code, warps, launch.grid, waves, machine)}
    bound, seconds = _bound(times, machine)
    floor = machine.launch + max(memory, code.products * warps / machine.products)
    return Prediction(
        launch.name, dtype, launch.grid, waves, registers, metadata.shared, stack, occupancy,
        code.load_bits, 32 * warps * code.instructions / max(1, largest.numel()), least,
        max(least, round(asked * launch.grid)), code.products * warps, 1e6 * seconds,
        1e6 * floor, bound, code.exact, launch.reason,
    )  # fmt: skip


def _work(code: Code, warps: int, grid: int, waves: float, machine: Machine) -> dict[str, float]:
    """Seconds by bound, of all but memory. A grid smaller than the GPU leaves some of it idle."""
    share = min(grid, machine.multiprocessors) * machine.clock
    return {
        "instructions": code.instructions * warps / (4 * BUSY * share),
        "special": code.special * 32 * warps / (16 * share),
        "products": code.products * warps / machine.products
        * (machine.multiprocessors * machine.clock / share),
        "latency": math.ceil(waves) * code.alone / machine.clock,
    }  # fmt: skip


def _bound(times: dict[str, float], machine: Machine) -> tuple[str, float]:
    """The longest, and all of the launch; "launch" where that is most of it."""
    bound = max(times, key=times.__getitem__)
    seconds = machine.launch + times[bound]
    return ("launch" if times[bound] < machine.launch else bound), seconds


def _key(t: Tensor) -> tuple[Any, ...]:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()
