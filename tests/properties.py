"""What holds for every operator of the library: each function is one property.

`tests/test_library.py` puts every registered operator through all of them, and
`tests/test_suite_bites.py` shows that each one fails for an operator broken in its own way.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import (
    LAYOUTS,
    Bad,
    Case,
    assert_within_budget,
    cotangents_for,
    detached,
    double,
    dtypes,
    grads,
    map_variables,
    relayout,
    tensors,
    variables,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dfm_fast._library import INTERPRET, Operator

Property = Callable[[Operator, Case, str], None]
PROPERTIES: dict[str, Property] = {}
OF_TENSORS: set[str] = set()  # those that say something only of a function of tensors
ON_CPU: set[str] = set()  # those that have no kernel to look at, or processes that have no GPU


def prop(function: Property) -> Property:
    PROPERTIES[function.__name__] = function
    return function


def of_tensors(function: Property) -> Property:
    OF_TENSORS.add(function.__name__)
    return prop(function)


def on_cpu(function: Property) -> Property:
    ON_CPU.add(function.__name__)
    return function


def call(op: Operator, case: Case, args: Any) -> list[torch.Tensor]:
    return tensors(op.public(*args, **case.kwargs))


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor], what: str) -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), f"{what}: output {i} differs by {(x - y).abs().max():.3e}"


def served_by(op: Operator, device: str) -> Callable[..., torch.Tensor] | None:
    """torch's own function where that computes an operator: its error in a dtype is allowed too."""
    return torchs_attention if device == "cuda" and op.name == "multi_query_attention" else None


def torchs_attention(q, k, v, mask=None, *, scale=None):
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    if mask is not None:  # a sample without any key gets 0
        some = mask.any(1)[:, None, None, None]
        mask, v = mask[:, None, None] | ~some, v.where(some, 0)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def worse(a: list, b: list, exact: list) -> list:
    """Of two results, tensor for tensor, the one that is further from exact."""
    pairs = zip(a, b, exact, strict=True)
    far = [[(x.detach().cpu().double() - e).abs().amax() for x in (x, y)] for x, y, e in pairs]
    return [x if p >= q else y for x, y, (p, q) in zip(a, b, far, strict=True)]


@contextlib.contextmanager
def reproducible(op: Operator, device: str) -> Iterator[None]:
    """torch's attention sums gradients in any order unless asked not to; ours never do."""
    asked = served_by(op, device) is not None
    before = torch.are_deterministic_algorithms_enabled()
    if asked:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if asked:
            torch.use_deterministic_algorithms(before)


# --- Values ------------------------------------------------------------------------------------


@prop
def forward_parity(op: Operator, case: Case, device: str) -> None:
    """Every dtype and layout within the error budget of the reference. What gets no tensor is told
    the dtype."""
    for dtype in dtypes(device):
        exact, ref = expected(op, case, device, dtype)
        for layout in LAYOUTS:
            got = tensors(op.public(*case.args(dtype, device, layout), **case.options(dtype)))
            assert len(got) == len(exact), f"{len(got)} outputs, expected {len(exact)}"
            assert_all_within_budget(
                got, (exact, ref), lambda other, dtype=dtype: expected(op, other, device, dtype),
                case=case, cap=case.cap, what=f"{case.id} {dtype} {layout} output", inputs=dtype,
            )  # fmt: skip


# So few numbers that the reference's error of them may be small by chance; and how often it is
# asked for that of other values before they are called wrong.
FEW, DRAWS = 64, 16


def assert_all_within_budget(
    got: list,
    found: tuple[list, list],
    of: Callable[[Case], tuple[list, list]],
    *,
    case: Case,
    what: str,
    **options: Any,
) -> None:
    """`of` other values: (exact, the reference's), as `found` of these."""
    for i, (exact, ref) in enumerate(zip(*found, strict=True)):
        triple, name = (got[i], ref, exact), f"{what} {i}"
        try:
            assert_within_budget(*triple, what=name, **options)
        except AssertionError:
            if exact.numel() > FEW:
                raise
            others = (of(replace(case, id=f"{case.id}{'!' * k}")) for k in range(1, DRAWS))
            errors = [(r[i].detach().cpu().double() - e[i]).abs().max().item() for e, r in others]
            assert_within_budget(*triple, what=name, usual=max(errors), **options)


def expected(op: Operator, case: Case, device: str, dtype: torch.dtype) -> tuple[list, list]:
    """(exact outputs, those of the reference in that dtype)"""
    base, narrow = case.args(dtype, device), case.options(dtype)
    exact = tensors(op.reference(*double(base), **case.options(torch.float64)))
    ref = tensors(op.reference(*base, **narrow))
    if theirs := served_by(op, device):
        ref = worse(ref, tensors(theirs(*base, **narrow)), exact)
    return exact, ref


@of_tensors
def backward_parity(op: Operator, case: Case, device: str) -> None:
    """Gradients in every dtype and layout within the error budget of the reference's autograd."""
    for dtype in dtypes(device):
        cotangents, exact, ref = expected_grads(op, case, device, dtype)
        for layout in LAYOUTS:
            dy = [relayout(c, layout) for c in cotangents]
            got = grads(op.public, case.args(dtype, device, layout), case.kwargs, dy)
            assert len(got) == len(exact), f"{len(got)} gradients, expected {len(exact)}"
            assert_all_within_budget(
                got, (exact, ref),
                lambda other, dtype=dtype: expected_grads(op, other, device, dtype)[1:],
                case=case, cap=4 * case.cap, what=f"{case.id} {dtype} {layout} gradient",
                inputs=dtype,
            )  # fmt: skip


def expected_grads(
    op: Operator, case: Case, device: str, dtype: torch.dtype, draw=cotangents_for
) -> tuple[list, list, list]:
    """(cotangents, exact gradients, those of the reference's autograd in that dtype)"""
    base = case.args(dtype, device)
    cotangents = draw(tensors(op.reference(*base, **case.kwargs)))
    exact = grads(op.reference, double(base), case.kwargs, double(cotangents))
    ref = grads(op.reference, base, case.kwargs, cotangents)
    if theirs := served_by(op, device):
        ref = worse(ref, grads(theirs, base, case.kwargs, cotangents), exact)
    return cotangents, exact, ref


@on_cpu
@of_tensors
def reference_gradcheck(op: Operator, case: Case, device: str) -> None:
    """The reference's own gradient, in float64, against finite differences."""
    flat, spec = pytree.tree_flatten(detached(case.args(torch.float64, device)))
    where = [i for i, leaf in enumerate(flat) if variables(leaf)]

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = list(flat)
        for i, value in zip(where, values, strict=True):
            leaves[i] = value
        return tuple(tensors(op.reference(*pytree.tree_unflatten(leaves, spec), **case.kwargs)))

    torch.autograd.gradcheck(function, [flat[i] for i in where], fast_mode=True)


@prop
def fully_written(op: Operator, case: Case, device: str) -> None:
    """No output keeps what was in its memory: torch.empty is filled with NaN."""
    with poisoned_memory():
        for layout in ("contiguous", "channels_last"):
            args = case.args(torch.float32, device, layout)
            for i, out in enumerate(call(op, case, args)):
                assert not out.isnan().any(), f"{case.id} {layout} output {i} not fully written"
            for i, grad in enumerate(grads(op.public, args, case.kwargs)):
                assert not grad.isnan().any(), f"{case.id} {layout} gradient {i} not fully written"


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(False)


# --- Layout, ownership, edges ------------------------------------------------------------------


@prop
def layout_kept(op: Operator, case: Case, device: str) -> None:
    """channels_last in, channels_last out; outputs and gradients too; else contiguous. What has no
    such layout is contiguous."""
    for layout in ("contiguous", "channels_last"):
        args = case.args(torch.float32, device, layout)
        for i, out in enumerate([*call(op, case, args), *grads(op.public, args, case.kwargs)]):
            keeps = case.keeps_layout and out.ndim > 1
            expected = relayout(torch.empty(out.shape), layout if keeps else "contiguous")
            # Strides of sides of one element carry no meaning.
            got, want = (
                [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]
                for t in (out, expected)
            )
            assert got == want, f"{case.id} {layout} output {i}: strides {got}, expected {want}"


@of_tensors
def inputs_untouched(op: Operator, case: Case, device: str) -> None:
    """Arguments and gradients handed in keep their values, and outputs are fresh memory."""
    args = case.args(torch.float32, device)
    before = [t.clone() for t in tensors(args)]
    out = call(op, case, args)
    inside = {t.untyped_storage().data_ptr() for t in tensors(args)}
    assert not any(o.untyped_storage().data_ptr() in inside for o in out if o.numel()), "aliases"
    dy = cotangents_for(out)
    dy_before = [c.clone() for c in dy]
    grads(op.public, args, case.kwargs, dy)
    assert_same(tensors(args), before, "argument changed")
    assert_same(dy, dy_before, "incoming gradient changed")


@of_tensors
def empty_batch(op: Operator, case: Case, device: str) -> None:
    """A batch of none gives outputs and gradients of none."""
    args = case.args(torch.float32, device, batch=0)
    full = call(op, case, case.args(torch.float32, device))
    for out, like in zip(call(op, case, args), full, strict=True):
        assert out.shape == (0, *like.shape[1:]), f"{tuple(out.shape)}"
    for grad, arg in zip(grads(op.public, args, case.kwargs), variables(args), strict=True):
        assert grad.shape == arg.shape


@prop
def deterministic(op: Operator, case: Case, device: str) -> None:
    """Two runs, and runs with one thread and with all, give the same bits."""
    args, threads = case.args(torch.float32, device), torch.get_num_threads()

    def run() -> list[torch.Tensor]:
        return [*call(op, case, args), *grads(op.public, args, case.kwargs)]

    with reproducible(op, device):
        first = run()
        assert_same(first, run(), f"{case.id}: second run")
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            assert_same(first, run(), f"{case.id}: other number of threads")
        finally:
            torch.set_num_threads(threads)


# --- Autograd ----------------------------------------------------------------------------------


@of_tensors
def partial_gradients(op: Operator, case: Case, device: str) -> None:
    """Any one tensor alone may require a gradient; it gets the one it gets among all."""
    args = case.args(torch.float32, device)
    with reproducible(op, device):
        together = grads(op.public, args, case.kwargs)
        for i, expected in enumerate(together):
            alone = detached(args, requires_grad=False)
            variables(alone)[i].requires_grad_()
            out = call(op, case, alone)
            pairs = zip(out, cotangents_for(out), strict=True)
            outs, dy = zip(*((o, c) for o, c in pairs if o.requires_grad), strict=True)
            (got,) = torch.autograd.grad(outs, variables(alone)[i], dy)
            assert_same([got], [expected], f"{case.id} gradient {i} alone")


@of_tensors
def second_backward(op: Operator, case: Case, device: str) -> None:
    """A kept graph gives the same gradients again; differentiating twice is an error, not zeros."""
    args = detached(case.args(torch.float32, device))
    out = call(op, case, args)
    dy = [c.requires_grad_() for c in cotangents_for(out)]
    with reproducible(op, device):
        first = torch.autograd.grad(out, variables(args), dy, retain_graph=True)
        again = torch.autograd.grad(out, variables(args), dy, retain_graph=True)
    assert_same(list(first), list(again), f"{case.id}: second backward")
    twice = torch.autograd.grad(out, variables(args), dy, create_graph=True)
    loss = sum((t * t).sum() for t in twice)
    # Where the first gradient is linear in dy only dy has a second derivative; loss.backward()
    # walks every path.
    with pytest.raises(RuntimeError, match="differentiate twice"):
        loss.backward()


@of_tensors
def forward_mode_refused(op: Operator, case: Case, device: str) -> None:
    """Forward-mode derivatives are an error, not silently lost."""
    args = case.args(torch.float32, device)
    with torch.autograd.forward_ad.dual_level():
        dual = map_variables(
            lambda t: torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)), args
        )
        with pytest.raises(RuntimeError, match="forward mode AD"):
            call(op, case, dual)


# --- Compiler, dispatcher, subclasses ----------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """The calls of an operator's raw operators, with their arguments."""

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        self.names, self.calls = names, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in self.names:
            self.calls.setdefault(func, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@of_tensors
def opcheck(op: Operator, case: Case, device: str) -> None:
    """Every raw operator: schema, fake tensors (shapes, strides), AOT dispatch."""
    for layout, batch in itertools.product(("contiguous", "channels_last"), (None, 0)):
        args = detached(case.args(torch.float32, device, layout, batch))
        # backward() runs where the mode is active too; grads of all inputs reach every raw operator
        with _Recorder(op.raw) as recorder:
            out = call(op, case, args)
            torch.autograd.grad(out, variables(args), cotangents_for(out))
        missing = set(op.raw) - {func.name() for func in recorder.calls}
        assert not missing, f"{case.id}: never reached {missing}"
        for func, (raw_args, raw_kwargs) in recorder.calls.items():
            torch.library.opcheck(func, detached(raw_args, requires_grad=False), raw_kwargs)
            _check_fake_strides(func, raw_args, raw_kwargs, f"{case.id} {layout} {func}")


def _check_fake_strides(func: Any, args: Any, kwargs: Any, what: str) -> None:
    """opcheck forgives strides where it should not: compare every one of them."""
    real = tensors(func(*args, **kwargs))
    mode = torch._subclasses.FakeTensorMode()
    fake_args, fake_kwargs = pytree.tree_map_only(
        torch.Tensor, mode.from_tensor, detached((args, kwargs), requires_grad=False)
    )
    with mode:
        fake = tensors(func(*fake_args, **fake_kwargs))
    for r, f in zip(real, fake, strict=True):
        assert r.stride() == f.stride(), f"{what}: fake {f.stride()}, real {r.stride()}"


def compiles(op: Operator, case: Case, device: str) -> None:
    """One graph without breaks, forward and backward, with dynamic shapes and layouts. Slow, so
    for the cases that say so."""

    def function(*args: Any) -> list[torch.Tensor]:
        # Neighbouring element-wise code makes the compiler choose layouts around the operator.
        args = map_variables(lambda t: t / 2 + 0.25, args)
        return [out.sin() for out in call(op, case, args)]

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=case.compiled)
    for layout, batch in (("contiguous", 2), ("channels_last", 3), ("permuted", 5)):
        args = case.args(torch.float32, device, layout, batch)
        for what, run in (
            ("forward", lambda f, args: f(*args)),
            ("backward", lambda f, args: grads(f, args, {})),
        ):
            for got, want in zip(run(compiled, args), run(function, args), strict=True):
                torch.testing.assert_close(got, want, msg=lambda m, w=what: f"{case.id} {w}: {m}")


@prop
def autocast(op: Operator, case: Case, device: str) -> None:
    """Under autocast the operator computes as it does outside: output dtype = input dtype."""
    for dtype in (torch.float32, torch.float16 if INTERPRET else torch.bfloat16):
        args = case.args(dtype, device)
        plain = call(op, case, args)
        with torch.autocast(device, torch.bfloat16):
            assert_same(call(op, case, args), plain, f"{case.id} {dtype} under autocast")


@on_cpu
@of_tensors
def dtensor_batch_sharding(op: Operator, case: Case, device: str) -> None:
    """Sharded along the batch, every rank computes its own part and the result stays sharded."""
    with fake_mesh() as mesh:
        _shard_batch(op, case, mesh)


def _shard_batch(op: Operator, case: Case, mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    shapes = case.shapes()
    # An uneven batch: the other rank has one sample less.
    mine = next(shape.sizes[0] for shape in shapes if shape.batched)
    args = case.args(torch.float32, "cpu", batch=2 * mine - 1)

    def local(t: torch.Tensor, batched: bool = True) -> torch.Tensor:
        return t[:mine] if batched else t

    def distributed(t: torch.Tensor, batched: bool = True) -> DTensor:
        placement = Shard(0) if batched else Replicate()
        size = {"shape": t.shape, "stride": t.stride()}
        return DTensor.from_local(local(t, batched), mesh, [placement], run_check=False, **size)

    given = iter(shapes)
    sharded = detached(
        pytree.tree_map_only(torch.Tensor, lambda t: distributed(t, next(given).batched), args)
    )
    out, whole = call(op, case, sharded), call(op, case, args)
    for got, want in zip(out, whole, strict=True):
        assert isinstance(got, DTensor), f"{case.id}: {type(got).__name__} out"
        assert got.placements == (Shard(0),), f"{case.id}: {got.placements}"
        assert got.shape == want.shape, f"{case.id}: global shape {got.shape}"
        assert_same([got.to_local()], [local(want)], f"{case.id}: local shard")
    # Of the other rank's samples nothing comes: what is left of a weight's gradient is ours.
    dy = cotangents_for(whole)
    for c in dy:
        c[mine:] = 0
    got = torch.autograd.grad(out, variables(sharded), [distributed(c) for c in dy])
    shapes = [shape for shape in shapes if not shape.mask]
    want = [
        local(g, shape.batched)
        for g, shape in zip(grads(op.public, args, case.kwargs, dy), shapes, strict=True)
    ]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.to_local(), w, msg=lambda m: f"{case.id}: gradient: {m}")


@contextlib.contextmanager
def fake_mesh() -> Iterator[Any]:
    """Two ranks of which this process is the first; nothing is communicated."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


# --- Formulas ----------------------------------------------------------------------------------


@of_tensors
def flop_formula(op: Operator, case: Case, device: str) -> None:
    """torch's FLOP counter sees every raw operator, and twice the batch is twice the work."""
    counts = []
    for batch in (2, 4):
        args = detached(case.args(torch.float32, device, batch=batch))
        with FlopCounterMode(display=False) as counter:
            out = call(op, case, args)
            torch.autograd.grad(out, variables(args), cotangents_for(out))
        flops = {str(k): v for k, v in counter.get_flop_counts().get("Global", {}).items()}
        counts.append({name: flops.get(name.replace("::", "."), 0) for name in op.raw})
    for name in op.raw:
        one, two = (count[name] for count in counts)
        assert one > 0, f"{case.id}: no FLOPs counted for {name}"
        assert abs(two - 2 * one) <= 2, f"{case.id}: {name} {one} FLOPs, {two} at twice the batch"


@prop
def byte_formula(op: Operator, case: Case, device: str) -> None:
    """The roofline's bytes are those of all inputs and outputs, each once."""
    for dtype in (torch.float32, torch.float16):
        args = case.args(dtype, device)
        moved = [*tensors(args), *call(op, case, args)]
        want = sum(t.numel() * t.element_size() for t in moved)
        got = op.cost(*args, **case.kwargs)
        assert got == want, f"{case.id}: formula says {got} bytes, inputs and outputs are {want}"


# --- Errors ------------------------------------------------------------------------------------


def clear_error(op: Operator, bad: Bad) -> None:
    """Bad input raises the stated type, naming operator, argument, expected and got."""
    try:
        bad.call(op.public)
    except bad.error as error:
        message = str(error)
        for part in (f"{op.name}: {bad.argument}: expected ", ", got "):
            assert part in message, f"{bad.id}: no {part!r} in {message!r}"
    except Exception as error:
        raise AssertionError(f"{bad.id}: {type(error).__name__} instead of {bad.error}") from error
    else:
        raise AssertionError(f"{bad.id}: no error")
