"""Predict, with no GPU, how long a launch takes on one, and what bounds it.

`recording()` runs the library's own launchers on tensors without memory (device "meta"): every
kernel is compiled as the launch would have it and recorded, so that what is predicted is what is
launched. A prediction is

    launch + max(memory, issue, special, products, latency)

    memory    least bytes (each tensor read or written once) at a copy's rate, and its ramp
    issue     instructions of all warps, four a clock on each multiprocessor
    special   MUFU and conversions, 16 lanes a clock on each multiprocessor
    products  FLOPs of matrix instructions at the measured rate of large products
    latency   waves, each as long as one warp takes alone: its rounds of loads that somebody waits
              for, and its instructions at `PACE` clocks each

Instructions are those of the machine code, loops weighed by the trips that TTGIR's bounds and the
launch's arguments give; both sides of a branch count, and so do lanes that are masked off. Where
loops of the two cannot be matched, or a bound is read from memory, a row says "about".
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from dfm_fast.kernels import _aot, pyramids
from dfm_fast.profiling import costs

TARGET = "sm_90"


@dataclass(frozen=True)
class Machine:
    """Measured on an H200 where docs/performance/log.md says so, else from NVIDIA's datasheets."""

    name: str = "NVIDIA H200"
    multiprocessors: int = 132
    clock: float = 1.98e9  # Hz
    bandwidth: float = 4.15e12  # of a copy of 0.9 GB, read and written
    ramp: float = 1.5e-6  # s: copies of 8 to 67 MB take so much, and `launch`, longer than bytes say
    launch: float = 2.5e-6  # s, replayed in a graph
    latency: float = 0.8e-6  # s: a load from memory while others load
    products: float = 788e12  # FLOP/s in 16 bits; half in TF32


H200 = Machine()
PACE = 2.0  # clocks from one instruction of a warp to its next, where nothing else is in the way
BUSY = 0.8  # of issue slots, where warps abound


@dataclass(frozen=True)
class Launch:
    """One kernel launch, or a call of an operator of torch's (then `compiled` is None)."""

    name: str
    tensors: tuple[Tensor, ...]
    grid: int = 1
    integers: dict[str, int] = field(default_factory=dict)
    compiled: Any = None
    reason: str = ""  # stated in the kernel's `Specialisation`
    flops: int = 0
    moved: int = 0


class Code(NamedTuple):
    """Of one warp, loops weighed; bytes of a whole block."""

    instructions: float
    special: float
    products: float  # FLOPs at the rate of 16 bits
    waits: float
    asked: float  # bytes that a block's loads and stores ask for, masked ones too
    load_bits: int
    exact: bool


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
    moved: int  # bytes asked for, at least `least`
    flops: float  # of matrix instructions
    microseconds: float
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
        if moved := costs.moved_bytes(func, tuple(args), kwargs, out):
            flops = costs.call_flops(func, tuple(args), kwargs, out)
            found = tuple(costs.tensors((args, kwargs, out)))
            self.launches.append(Launch(str(func), found, flops=flops, moved=moved))
        return out


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

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = compile_(self, *args, grid=grid, warmup=True, **options)
        given = {**dict(zip(self.arg_names, args, strict=False)), **options}
        integers = {n: v for n, v in given.items() if isinstance(v, int) and n in self.arg_names}
        found = tuple(costs.tensors(given))
        name = f"{self.__module__.rpartition('.')[2]}.{self.__name__}"
        launches.append(
            Launch(name, found, math.prod(grid), integers, compiled, _reasons().get(self, ""))
        )
        return compiled

    gpu = types.SimpleNamespace(multi_processor_count=H200.multiprocessors, major=9, minor=0)
    gpu.name, gpu.total_memory = H200.name, 141 << 30
    cuda, sdpa, is_meta = torch.cuda, torch.backends.cuda, lambda x: x.device.type == "meta"
    changes: list[tuple[Any, str, Any]] = [
        (JITFunction, "run", run),
        (Tensor, "is_cuda", property(is_meta)),
        (Tensor, "data_ptr", lambda x: _address(x.untyped_storage()) + 16 * x.storage_offset()),
        (torch.UntypedStorage, "data_ptr", lambda s: _address(s)),
        (cuda, "current_device", lambda: None),
        (cuda, "get_device_capability", lambda device=None: (9, 0)),
        (cuda, "get_device_properties", lambda device=None: gpu),
        (sdpa, "can_use_cudnn_attention", lambda p, debug=False: p.query.element_size() == 2),
        (sdpa, "can_use_flash_attention", lambda p, debug=False: p.query.element_size() == 2),
        (sdpa, "can_use_efficient_attention", lambda p, debug=False: p.query.element_size() < 8),
        (torch, "is_autocast_enabled", lambda device=None: False),
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


def _address(storage: torch.UntypedStorage) -> int:
    return storage._cdata & ~15


@functools.cache
def _reasons() -> dict[JITFunction, str]:
    return {spec.kernel: spec.reason for spec in _aot.specialisations() if spec.reason}


# --- Reading TTGIR and machine code --------------------------------------------------------------


class Loop(NamedTuple):
    trips: int | None  # None where a bound is not known from the arguments
    outer: int  # index of the loop around it, -1 for none


def read_loops(ttgir: str, integers: dict[str, int], grid: int = 1) -> tuple[list[Loop], float]:
    """(loops, bytes that a block's loads and stores ask for), from constants and arguments. Of a
    bound that depends on the program, that of the first."""
    values: dict[str, int] = {f"%{name}": int(v) for name, v in integers.items()}
    loops: list[Loop] = []
    around: list[tuple[int, int]] = []  # (loop, its depth of braces)
    depth, asked = 0, 0.0
    for line in ttgir.splitlines():
        line = line.split(" loc(")[0]
        if found := _FOR.match(line):
            bounds = [values.get(name) for name in found.groups()]
            trips = None
            if None not in bounds and bounds[2]:
                trips = max(0, -(-(bounds[1] - bounds[0]) // bounds[2]))
            loops.append(Loop(trips, around[-1][0] if around else -1))
            around.append((len(loops) - 1, depth))
        elif " scf.while" in line:
            loops.append(Loop(None, around[-1][0] if around else -1))
            around.append((len(loops) - 1, depth))
        elif found := _ASSIGN.match(line):
            _evaluate(values, *found.groups(), grid)
        if found := _ACCESS.search(line):
            lanes = math.prod(int(n) for n in found[1].split("x"))
            times = math.prod(loops[i].trips or 1 for i, _ in around)
            asked += lanes * _BITS[found[2]] / 8 * times
        depth += line.count("{") - line.count("}")
        while around and depth <= around[-1][1]:
            around.pop()
    return loops, asked


_FOR = re.compile(r"\s*(?:%\S+ = )?scf\.for %\S+ = (%\S+) to (%\S+) step (%\S+)")
_ASSIGN = re.compile(r"\s*(%\S+) = (arith|tt)\.(\w+) (.*?)(?: : i(?:32|64|1)\b.*)?$")
_ACCESS = re.compile(
    r"(?:tt\.load|tt\.store|async_copy_global_to_local) .*?tensor<([0-9x]+)x!tt\.ptr<(\w+)>"
)
_BITS = {"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "i1": 8, "i8": 8, "i16": 16, "i32": 32}
_BITS |= {"i64": 64}
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "addi": lambda a, b: a + b,
    "subi": lambda a, b: a - b,
    "muli": lambda a, b: a * b,
    "divsi": lambda a, b: int(a / b),
    "remsi": lambda a, b: int(math.fmod(a, b)),
    "ceildivsi": lambda a, b: -(-a // b),
    "minsi": min,
    "maxsi": max,
    "shli": lambda a, b: a << b,
    "shrsi": lambda a, b: a >> b,
    "andi": lambda a, b: a & b,
}


def _evaluate(values: dict[str, int], name: str, dialect: str, op: str, rest: str, grid: int):
    """An integer that follows from others is one more."""
    words = [word.strip(",") for word in rest.split()]
    if op == "constant" and re.fullmatch(r"-?\d+", words[0]):
        values[name] = int(words[0])
    elif op == "constant" and words[0] in ("true", "false"):
        values[name] = int(words[0] == "true")
    elif dialect == "tt" and op == "get_program_id":
        values[name] = 0
    elif dialect == "tt" and op == "get_num_programs":
        values[name] = grid
    elif op in ("extsi", "extui", "trunci", "index_cast") and words[0] in values:
        values[name] = values[words[0]]
    elif op in _ARITHMETIC and len(words) >= 2 and {words[0], words[1]} <= values.keys():
        a, b = values[words[0]], values[words[1]]
        if b or op not in ("divsi", "remsi", "ceildivsi"):
            values[name] = _ARITHMETIC[op](a, b)


_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\S+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);", re.M)
_REGISTER = re.compile(r"\bR(\d+)\b")


def read_code(sass: str, loops: Sequence[Loop], stages: int = 1) -> Code:
    """What nvdisasm prints, of one warp; `asked` is left 0."""
    ops: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    back: list[tuple[int, int]] = []  # (first, last) of each loop
    for line in sass.splitlines():
        if found := re.match(r"\s*(\.L_x_\d+):", line):
            labels[found[1]] = len(ops)
        elif found := _LINE.match(line):
            target = re.search(r"`\((\.L_x_\d+)\)", found[3])
            if found[2] == "BRA" and target and (first := labels.get(target[1])) is not None:
                if first == len(ops):  # the trap after the end: what follows is not the kernel's
                    break
                back.append((first, len(ops)))
            ops.append((found[2], found[3]))
    times, exact = _weigh(back, loops)
    weights = [math.prod(t for (a, b), t in times.items() if a <= i <= b) for i in range(len(ops))]
    special = products = waits = 0.0
    widths = [32]
    pending: set[int] = set()
    copies = False
    for (op, rest), weight in zip(ops, weights, strict=True):
        used = {int(n) for n in _REGISTER.findall(rest)}
        if pending & used or (copies and op.startswith("LDGDEPBAR")):
            waits += weight / (max(1, stages - 1) if copies else 1)
            pending, copies = set(), False
        if op.startswith(("LDG.", "LDGSTS", "UBLKCP")):
            width = int(m[1]) if (m := re.search(r"\.(64|128|256)\b", op)) else 32
            widths.append(width)
            copies |= op.startswith(("LDGSTS", "UBLKCP"))
            if op.startswith("LDG.") and (to := _REGISTER.match(rest)):
                pending |= set(range(int(to[1]), int(to[1]) + width // 32))
        special += weight * op.startswith(("MUFU", "F2F.", "F2I", "I2F"))
        products += weight * _flops(op)
    return Code(sum(weights), special, products, max(1.0, waits), 0.0, max(widths), exact)


def _weigh(
    back: Sequence[tuple[int, int]], loops: Sequence[Loop]
) -> tuple[dict[tuple[int, int], float], bool]:
    """Trips of the machine code's loops, in order of their beginnings, and whether that is sure.
    Compilers unroll the shortest of constant trips and drop those of one."""
    found = sorted(dict.fromkeys(back), key=lambda loop: (loop[0], -loop[1]))
    trips = [loop.trips for loop in loops if loop.trips is None or loop.trips > 1]
    exact = None not in trips
    while len(trips) > len(found):
        shortest = min(range(len(trips)), key=lambda i: math.inf if trips[i] is None else trips[i])
        exact &= trips[shortest] is not None and trips[shortest] <= 8
        del trips[shortest]
    exact &= len(trips) == len(found)
    trips += [1] * (len(found) - len(trips))
    return {loop: t or 1 for loop, t in zip(found, trips, strict=True)}, exact


def _flops(op: str) -> float:
    """Of one warp, at the rate of 16 bits: TF32 has half."""
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", op):
        m, n, k = map(int, found.groups())
        flops = 2 * m * n * k / 4  # four warps issue it together
    elif found := re.match(r"HMMA\.16(8)(\d+)\b", op):
        flops = 2 * 16 * 8 * int(found[2])
    else:
        return 0.0
    return flops * (2 if "TF32" in op else 1)


@functools.cache
def _disassembled(cubin: bytes) -> tuple[str, int, int]:
    """(machine code, registers, bytes of stack)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _aot._run(_aot._tool("cuobjdump"), "-res-usage", file.name)
        sass = _aot._run(_aot._tool("nvdisasm"), "-c", "-ndf", file.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return sass, registers, stack


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
            1e6 * seconds, bound, False, launch.reason,
        )  # fmt: skip
    sass, registers, stack = _disassembled(launch.compiled.asm["cubin"])
    metadata = launch.compiled.metadata
    loops, asked = read_loops(launch.compiled.asm["ttgir"], launch.integers, launch.grid)
    code = read_code(sass, loops, metadata.num_stages)._replace(asked=asked)
    occupancy = _aot.occupancy(TARGET, registers, metadata.shared, metadata.num_warps)
    resident = max(1, round(occupancy * 64 / metadata.num_warps))
    waves = launch.grid / (machine.multiprocessors * resident)
    warps = launch.grid * metadata.num_warps
    times = {"memory": memory, **_work(code, warps, launch.grid, waves, machine)}
    bound, seconds = _bound(times, machine)
    return Prediction(
        launch.name, dtype, launch.grid, waves, registers, metadata.shared, stack, occupancy,
        code.load_bits, 32 * warps * code.instructions / max(1, largest.numel()), least,
        max(least, round(code.asked * launch.grid)), code.products * warps, 1e6 * seconds, bound,
        code.exact, launch.reason,
    )  # fmt: skip


def _work(code: Code, warps: int, grid: int, waves: float, machine: Machine) -> dict[str, float]:
    """Seconds by bound, of all but memory. A grid smaller than the GPU leaves some of it idle."""
    share = min(grid, machine.multiprocessors) * machine.clock
    alone = code.waits * machine.latency + code.instructions * PACE / machine.clock
    return {
        "issue": code.instructions * warps / (4 * BUSY * share),
        "special": code.special * 32 * warps / (16 * share),
        "products": code.products * warps / machine.products
        * (machine.multiprocessors * machine.clock / share),
        "latency": math.ceil(waves) * alone,
    }  # fmt: skip


def _bound(times: dict[str, float], machine: Machine) -> tuple[str, float]:
    """The longest, and all of the launch; "launch" where that is most of it."""
    bound = max(times, key=times.__getitem__)
    seconds = machine.launch + times[bound]
    return ("launch" if times[bound] < machine.launch else bound), seconds


def _key(t: Tensor) -> tuple[Any, ...]:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()
