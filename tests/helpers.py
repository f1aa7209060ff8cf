"""Inputs, casts and the error budget that all tests share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dfm_fast._library import INTERPRET

ROOT = Path(__file__).resolve().parent.parent
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and not INTERPRET else [])]


def dtypes(device: str) -> list[torch.dtype]:
    """All dtypes an operator takes there. Triton's interpreter computes bfloat16 wrongly (it
    truncates), so under it bfloat16 is left to the compiled kernels."""
    if INTERPRET and device == "cpu":
        return [torch.float32, torch.float16]
    low = [torch.float32, torch.bfloat16, torch.float16]
    return low if device == "cuda" else [*low, torch.float64]


@dataclass(frozen=True)
class Case:
    """One call of a public operator: shapes of the tensors it gets and its other arguments.

    `inputs` is a tree like the positional arguments, with a `Shape` where a tensor goes.
    """

    operator: str
    id: str
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    # Absolute cap on the error, in units of eps times the largest magnitude involved.
    cap: float = 4.0
    compiled: str = ""  # also through torch.compile with this backend, which takes seconds
    keeps_layout: bool = True  # False: what comes out is contiguous (tokens, which have no image)

    def args(
        self, dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous", batch=None
    ) -> tuple[Any, ...]:
        """Positional arguments: equal values for every dtype, device and layout, up to rounding.
        The layout "own" is each tensor's own."""
        generator = torch.Generator().manual_seed(sum(map(ord, self.id)))

        def make(shape: Any) -> Any:
            if not isinstance(shape, Shape):
                return shape
            new_batch = batch is not None and shape.batched
            sizes = (batch, *shape.sizes[1:]) if new_batch else shape.sizes
            stored = [min(n, 1) if i in shape.equal else n for i, n in enumerate(sizes)]
            draw = torch.rand if shape.uniform else torch.randn
            value = draw(stored, generator=generator, dtype=torch.float64)
            value = value < 0.7 if shape.mask else value.to(shape.beside(dtype))
            own = shape.layout if layout == "own" else layout
            value = relayout(value.to(device), own).expand(sizes)
            return value if layout == "own" else relayout(value, layout)

        return pytree.tree_map(make, self.inputs)

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """The other arguments. What gets no tensor is told the dtype."""
        return self.kwargs if self.shapes() else {**self.kwargs, "dtype": dtype}

    def shapes(self) -> list[Shape]:
        return [leaf for leaf in pytree.tree_leaves(self.inputs) if isinstance(leaf, Shape)]


@dataclass(frozen=True)
class Shape:
    """A tensor of random values, normal, uniform in [0, 1) (a noise level), or bool (a mask, true
    for most); without a batch (a weight) its sizes are fixed."""

    sizes: tuple[int, ...]
    batched: bool = True
    uniform: bool = False
    mask: bool = False
    wide: bool = False  # float32 also where the others are narrower
    layout: str = "contiguous"  # where each has its own
    equal: tuple[int, ...] = ()  # axes along which its values repeat: expanded in its own layout

    def beside(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32) if self.wide else dtype


@dataclass(frozen=True)
class Bad:
    """A call that must raise `error` with a message naming the operator and `argument`."""

    operator: str
    argument: str
    error: type[Exception]
    call: Callable[[Any], Any]  # called with the public function

    @property
    def id(self) -> str:
        return f"{self.operator}-{self.argument}"


# The last two are copied before any kernel sees them: the interpreter is too slow for them.
LAYOUTS = ("contiguous", "channels_last", *(() if INTERPRET else ("permuted", "strided")))


def relayout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout. Vectors beside maps in channels_last are every
    second element of others."""
    if layout == "channels_last" and x.ndim == 1:
        layout = "strided"
    if layout == "channels_last" and x.ndim in (4, 5):
        last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        return x.contiguous(memory_format=last)
    if layout == "permuted" and x.ndim >= 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), _HOLE[x.is_floating_point()])
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "cropped":
        return _inside(x)
    if layout == "unaligned":
        flat = x.new_full((x.numel() + 1,), _HOLE[x.is_floating_point()])
        return flat[1:].view(x.shape).copy_(x)
    return x.contiguous()


_HOLE = {True: float("nan"), False: True}  # what lies beside the values of a view


def _inside(x: torch.Tensor) -> torch.Tensor:
    """Of a larger tensor, channels_last where x has channels: an element away from each end."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
    around = torch.empty([n + 2 for n in x.shape], dtype=x.dtype, memory_format=last)
    around.fill_(_HOLE[x.is_floating_point()])
    inner = around[tuple(slice(1, n + 1) for n in x.shape)]
    return inner.copy_(x)


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def variables(tree: Any) -> list[torch.Tensor]:
    """What may have a gradient: a mask has none."""
    return [t for t in tensors(tree) if t.is_floating_point()]


def map_variables(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    return pytree.tree_map_only(
        torch.Tensor, lambda t: function(t) if t.is_floating_point() else t, tree
    )


def double(tree: Any) -> Any:
    """The same tree with float64 tensors on the CPU."""
    tree = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().cpu(), tree)
    return map_variables(torch.Tensor.double, tree)


def detached(tree: Any, requires_grad: bool = True) -> Any:
    """Leaves of autograd with the same values and layout."""
    return map_variables(lambda t: t.detach().requires_grad_(requires_grad), tree)


def grads(function: Callable[..., Any], args: Any, kwargs: Any, cotangents: Any = None) -> list:
    """Gradients of all tensors in args for the given (or fixed random) cotangents."""
    if not variables(args):
        return []
    args = detached(args)
    out = tensors(function(*args, **kwargs))
    if cotangents is None:
        cotangents = cotangents_for(out)
    cotangents = [c.to(o) for c, o in zip(cotangents, out, strict=True)]
    return list(torch.autograd.grad(out, variables(args), cotangents))


def cotangents_for(out: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fixed random gradients, laid out in memory like the outputs."""
    generator = torch.Generator().manual_seed(7)
    values = (torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in out)
    return [torch.empty_like(o).copy_(v) for o, v in zip(out, values, strict=True)]


def constants_for(out: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients that a sum sends: one number, expanded."""
    return [o.new_tensor(0.75).expand(o.shape) for o in out]


def assert_within_budget(
    got: torch.Tensor,
    ref: torch.Tensor,
    exact: torch.Tensor,
    *,
    cap: float,
    what: str,
    inputs: torch.dtype | None = None,
    usual: float = 0.0,
) -> None:
    """|got - exact| <= 2 max|ref - exact| + one rounding of the output, and under the cap.

    got: the implementation; ref: the reference in the same dtype on contiguous input; exact: the
    reference in float64 on the same (already rounded) values; inputs: their dtype, the cap's unit
    where it is coarser than the output's (a float32 loss of bfloat16 levels, which are rounded);
    usual: the reference's largest error for other values, where these are so few that its own may
    be small by chance.
    """
    assert got.dtype == ref.dtype, f"{what}: dtype {got.dtype}, expected {ref.dtype}"
    assert got.shape == exact.shape, f"{what}: shape {got.shape}, expected {exact.shape}"
    if got.numel() == 0:
        return
    eps = torch.finfo(got.dtype).eps
    got, ref = got.detach().cpu().double(), ref.detach().cpu().double()
    error, scale = (got - exact).abs(), exact.abs().max().clamp_min(1.0)
    # In float64 the reference is the yardstick itself: a few roundings of its own sums.
    slack = 16 * eps * scale if got.dtype is ref.dtype and eps < 1e-15 else 0.0
    budget = 2 * max((ref - exact).abs().max().item(), usual) + eps / 2 * exact.abs() + slack
    worst = (error - budget).max().item()
    assert worst <= 0, f"{what}: {error.max():.3e} against fp64, {worst:.3e} over the budget"
    unit = max(eps, torch.finfo(inputs).eps if inputs else 0.0) * scale
    assert error.max() <= cap * unit, f"{what}: {error.max():.3e}, cap {cap} x {unit:.2g}"
    assert not torch.isnan(error).any(), f"{what}: NaN"


def run_python(*args: str, env: dict[str, str] | None = None, timeout: float = 600):
    """A Python process of its own, from the root of the repository."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def torchrun(script: str, *args: str, ranks: int = 2) -> None:
    """A script as so many processes, one thread each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}")
    result = run_python(*launcher, script, *args, env={"OMP_NUM_THREADS": "1"}, timeout=180)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "is deprecated" not in result.stderr


class Recording(TorchDispatchMode):
    """A CUDA graph on a CPU: `replay` calls again what was called inside, on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            inside = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in inside:  # a view, or in place
                    old.copy_(new)


def recorded(call: Callable[[], None], state: Iterable[torch.Tensor]) -> Callable[[], None]:
    """`sampler.capture`: states are left as they were."""
    before, graph = [v.clone() for v in state], Recording()
    with graph:
        call()
    for v, old in zip(state, before, strict=True):
        v.copy_(old)
    return graph.replay
