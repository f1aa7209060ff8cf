"""Read how much a launch executes: TTGIR for the trips of its loops and the bytes it asks for,
machine code for all else.

Loops of the two are matched by their order. Where that cannot be done, or a bound is read from
memory, the result says that it is not exact.
"""

from __future__ import annotations

import functools
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dfm_fast.kernels import _aot

PACE = 2.0  # clocks from one instruction of a warp to its next, where nothing else is in the way
FLOPS_A_CLOCK = 4096  # of a multiprocessor's matrix instructions in 16 bits


class Code(NamedTuple):
    """Of one warp, loops weighed."""

    instructions: float
    special: float
    products: float  # FLOPs at the rate of 16 bits
    alone: float  # clocks, were there no other warp
    load_bits: int
    exact: bool


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


_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\S+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?);")
_REGISTER = re.compile(r"\bR(\d+)\b")


def read_code(sass: str, loops: Sequence[Loop], latency: float) -> Code:
    """What nvdisasm prints, of one warp; a load takes `latency` clocks."""
    ops: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    back: list[tuple[int, int]] = []  # (first, last) of each loop
    for line in sass.splitlines():
        if found := re.match(r"\s*(\.L_x_\d+):", line):
            labels[found[1]] = len(ops)
        elif found := _LINE.match(line):
            target = re.search(r"`\((\.L_x_\d+)\)", found[2])
            if found[1] == "BRA" and target and (first := labels.get(target[1])) is not None:
                if first == len(ops):  # the trap after the end: what follows is not the kernel's
                    break
                back.append((first, len(ops)))
            ops.append((found[1], found[2]))
    trips, exact = _weigh(back, loops)
    weights = [math.prod(t for (a, b), t in trips.items() if a <= i <= b) for i in range(len(ops))]
    special = products = 0.0
    for (op, _), weight in zip(ops, weights, strict=True):
        special += weight * op.startswith(("MUFU", "F2F.", "F2I", "I2F"))
        products += weight * _flops(op)
    widths = [_width(op) for op, _ in ops if op.startswith(("LDG.", "LDGSTS", "UBLKCP"))]
    alone = _Warp(ops, trips, latency).run(0, len(ops))
    return Code(sum(weights), special, products, alone, max(widths, default=0), exact)


def _width(op: str) -> int:
    return int(found[1]) if (found := re.search(r"\.(64|128|256)\b", op)) else 32


class _Warp:
    """One warp in order: it waits for what it reads, and for groups of asynchronous copies."""

    def __init__(
        self, ops: Sequence[tuple[str, str]], trips: dict[tuple[int, int], int], latency: float
    ) -> None:
        self.ops, self.trips, self.latency = ops, trips, latency
        self.now = 0.0  # clocks
        self.ready: dict[int, float] = {}  # registers that are being loaded
        self.groups: list[float] = []

    def run(self, first: int, end: int) -> float:
        """Clocks after it. Of a loop two passes are made: the second is like all that follow."""
        i = first
        while i < end:
            ends = [b for a, b in self.trips if a == i and b < end and (a, b + 1) != (first, end)]
            if not ends:
                self.step(*self.ops[i])
                i += 1
                continue
            last = max(ends)
            self.run(i, last + 1)
            before = self.now
            if (trips := self.trips[i, last]) > 1:
                self.run(i, last + 1)
                self.skip((self.now - before) * (trips - 2))
            i = last + 1
        return self.now

    def step(self, op: str, rest: str) -> None:
        self.now += PACE + 4 * _flops(op) / FLOPS_A_CLOCK
        used = [int(n) for n in _REGISTER.findall(rest)]
        self.now = max([self.now, *(self.ready.pop(register, 0.0) for register in used)])
        if op.startswith("LDG.") and used:
            to = range(used[0], used[0] + _width(op) // 32)
            self.ready |= dict.fromkeys(to, self.now + self.latency)
        elif op.startswith("LDGDEPBAR"):
            self.groups.append(self.now + self.latency)
        elif op.startswith("DEPBAR") and (found := re.search(r"0x([0-9a-f]+)", rest)):
            landed = self.groups[: max(0, len(self.groups) - int(found[1], 16))]
            self.now = max([self.now, *landed])

    def skip(self, clocks: float) -> None:
        self.now += clocks
        self.ready = {register: t + clocks for register, t in self.ready.items()}
        self.groups = [t + clocks for t in self.groups]


def _weigh(
    back: Sequence[tuple[int, int]], loops: Sequence[Loop]
) -> tuple[dict[tuple[int, int], int], bool]:
    """Trips of the machine code's loops, in order of their beginnings, and whether that is sure.
    Compilers unroll the shortest of constant trips and drop those of one."""
    found = sorted(dict.fromkeys(back), key=lambda loop: (loop[0], -loop[1]))
    trips = [loop.trips for loop in loops]
    if len(trips) > len(found):
        trips = [n for n in trips if n is None or n > 1]
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
def disassembled(cubin: bytes) -> tuple[str, int, int]:
    """(machine code, registers, bytes of stack)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _aot._run(_aot._tool("cuobjdump"), "-res-usage", file.name)
        sass = _aot._run(_aot._tool("nvdisasm"), "-c", "-ndf", file.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return sass, registers, stack
