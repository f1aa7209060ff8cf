"""The suite tested: a toy operator passes every property, and each defect fails its own.

The toy multiplies x [N, C, H, W] by a weight [C]; a defect is one mistake real operators make.
"""

import pytest
import torch
from helpers import Bad, Case, Shape
from properties import FEW, PROPERTIES, assert_all_within_budget, clear_error, compiles
from torch.autograd.function import once_differentiable
from torch.testing._internal.optests import OpCheckError
from torch.utils.flop_counter import flop_registry, register_flop_formula

from dfm_fast import _checks
from dfm_fast._library import Operator, _has_dtensor, _on_local_shards
from dfm_fast.ops.pyramids import memory_format

CASE = Case("toy", "toy", (Shape((4, 3, 5, 6)), Shape((3,), batched=False)), compiled="inductor")

# defect: the property that must catch it
DEFECTS = {
    "forward off by 1 %": "forward_parity",
    "accumulates in low precision": "forward_parity",
    "weight gradient misses the last row": "backward_parity",
    "gradient ignores the strides of dy": "backward_parity",
    "reference detaches x": "reference_gradcheck",
    "last element not written": "fully_written",
    "channels_last dropped": "layout_kept",
    "writes into x": "inputs_untouched",
    "returns its argument": "inputs_untouched",
    "fails on an empty batch": "empty_batch",
    "noise in the last bit": "deterministic",
    "sums depend on the threads": "deterministic",
    "frozen weight drops the gradient of x": "partial_gradients",
    "frees what backward needs": "second_backward",
    "double backward gives zeros": "second_backward",
    "loses forward-mode derivatives": "forward_mode_refused",
    "fake has contiguous strides": "opcheck",
    "fake has the wrong shape": "opcheck",
    "schema hides a mutation": "opcheck",
    "reads a value on the host": "compiles",
    "follows autocast": "autocast",
    "ignores DTensor": "dtensor_batch_sharding",
    "mixes the batch": "dtensor_batch_sharding",
    "no FLOP formula": "flop_formula",
    "FLOPs without the batch": "flop_formula",
    "bytes counted twice": "byte_formula",
    "error without expected and got": "clear_error",
    "bad input accepted": "clear_error",
}
FAILURES = (AssertionError, pytest.fail.Exception, RuntimeError, ZeroDivisionError, OpCheckError)
BAD = Bad("toy", "x", ValueError, lambda f: f(torch.zeros(2), torch.zeros(2)))
CHECKS = {**PROPERTIES, "compiles": compiles, "clear_error": lambda op, *_: clear_error(op, BAD)}


def _scale(x, weight):
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * weight.to(wide).view(-1, 1, 1)).to(x.dtype)


def _reference(x, weight):
    return _scale(x, weight).contiguous(memory_format=memory_format(x))


def _forward(defect):
    def forward(x, weight):
        if defect == "fails on an empty batch" and not x.shape[0]:
            raise ZeroDivisionError
        if defect in ("writes into x", "schema hides a mutation"):
            x.mul_(1.0001)
        y = torch.empty_like(x, memory_format=memory_format(x))
        y.copy_(_scale(x, weight))
        if defect == "forward off by 1 %":
            y.mul_(1.01)
        if defect == "accumulates in low precision":
            low = torch.bfloat16 if x.dtype == torch.float32 else torch.float16
            y.copy_(_scale(x.to(low), weight.to(low)))
        if defect == "last element not written":
            y = torch.empty_like(y)
            y[:, :, :-1].copy_(_scale(x, weight)[:, :, :-1])
        if defect == "channels_last dropped":
            y = y.contiguous()
        if defect == "noise in the last bit":
            y.mul_(1 + 1e-6 * torch.rand(()))
        if defect == "sums depend on the threads":
            y.mul_(1 + 1e-6 * torch.get_num_threads())
        return y

    return forward


def _backward(defect):
    def backward(dy, x, weight):
        dx = torch.empty_like(dy)
        if defect == "gradient ignores the strides of dy":
            dy = dy.as_strided(dy.shape, torch.empty(dy.shape).stride())
        dx.copy_(_scale(dy, weight))
        product = (dy.double() * x.double())[:, :, : -1 if "last row" in defect else None]
        return dx, product.sum((0, 2, 3)).to(weight.dtype)

    return backward


def _fake(defect):
    def fake(x, weight):
        if defect == "fake has the wrong shape":
            return x.new_empty(x.shape[:-1])
        if defect == "fake has contiguous strides":
            return x.new_empty(x.shape)
        if "channels_last" in defect:
            return _forward(defect)(x, weight)
        return torch.empty_like(x, memory_format=memory_format(x))

    return fake


def _function(defect, raw):
    once = (lambda f: f) if defect == "double backward gives zeros" else once_differentiable

    class Toy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return raw(x, weight)

        @staticmethod
        @once
        def backward(ctx, dy):
            x, weight = ctx.saved_tensors
            if defect != "gradient ignores the strides of dy":
                dy = dy.contiguous(memory_format=memory_format(x))
            if defect == "double backward gives zeros":
                dy = dy.detach()
            dx, dweight = torch.ops.dfm_fast_toy.backward(dy, x.detach(), weight.detach())
            if defect == "frees what backward needs":
                x.data = x.data * 0
            if "frozen weight" in defect and not ctx.needs_input_grad[1]:
                dx = dx * 0
            return dx, dweight

    return Toy


def _public(defect, function):
    def toy(x, weight):
        if defect != "ignores DTensor" and _has_dtensor((x, weight), {}):
            out = _on_local_shards(toy, (x, weight), {})
            return out.redistribute(placements=[_replicate()]) if "mixes" in defect else out
        if defect != "bad input accepted" and x.ndim != 4:
            if defect == "error without expected and got":
                raise ValueError("toy: x is bad")
            _checks.fail("toy", "x", "4 dimensions", list(x.shape))
        if defect == "bad input accepted" and x.ndim != 4:
            return x
        if defect == "reads a value on the host" and x.sum().item() > 1e9:
            return x.clone()
        if defect == "follows autocast" and torch.is_autocast_enabled(x.device.type):
            return function.apply(x, weight).to(torch.get_autocast_dtype(x.device.type))
        x = x.contiguous(memory_format=memory_format(x))
        if defect == "loses forward-mode derivatives":
            return torch.ops.dfm_fast_toy.forward(x, weight)
        return x if defect == "returns its argument" else function.apply(x, weight)

    return toy


def _replicate():
    from torch.distributed.tensor import Replicate

    return Replicate()


@pytest.fixture
def toy(request):
    """The toy operator with one defect (or none), registered for the time of the test."""
    defect = request.param
    library = torch.library.Library("dfm_fast_toy", "DEF")
    library.define("forward(Tensor x, Tensor weight) -> Tensor")
    library.define("backward(Tensor dy, Tensor x, Tensor weight) -> (Tensor, Tensor)")
    library.impl("forward", _forward(defect), "CompositeExplicitAutograd")
    library.impl("backward", _backward(defect), "CompositeExplicitAutograd")
    torch.library.register_fake("dfm_fast_toy::forward", _fake(defect), lib=library)
    torch.library.register_fake(
        "dfm_fast_toy::backward",
        lambda dy, x, weight: (torch.empty_like(dy), torch.empty_like(weight)),
        lib=library,
    )
    raw = torch.ops.dfm_fast_toy
    per_sample = 0 if defect == "FLOPs without the batch" else 90
    for op in (raw.forward, raw.backward) if defect != "no FLOP formula" else ():
        register_flop_formula(op)(lambda x, *_, out_shape=None: 90 + per_sample * (x[0] - 1))

    def cost(x, weight):
        moved = 2 * x.numel() * x.element_size() + weight.numel() * weight.element_size()
        return 2 * moved if defect == "bytes counted twice" else moved

    def reference(x, weight):
        return _reference(x.detach() if defect == "reference detaches x" else x, weight)

    names = ("dfm_fast_toy::forward", "dfm_fast_toy::backward")
    public = _public(defect, _function(defect, raw.forward))
    yield defect, Operator("toy", "toys", public, reference, names, cost)
    _forget(library, raw)


def _forget(library, raw):
    for op in (raw.forward, raw.backward):
        flop_registry.pop(op, None)
    library._destroy()
    del torch.ops.dfm_fast_toy


@pytest.mark.parametrize("toy", ["none"], indirect=True)
@pytest.mark.parametrize("name", CHECKS)
def test_sound_operator_passes(toy, name):
    CHECKS[name](toy[1], CASE, "cpu")


@pytest.mark.parametrize("toy", DEFECTS, indirect=True)
def test_defect_is_caught(toy):
    defect, op = toy
    with pytest.raises(FAILURES):
        CHECKS[DEFECTS[defect]](op, CASE, "cpu")


def test_every_property_has_a_defect():
    assert set(DEFECTS.values()) == set(CHECKS)


@pytest.mark.parametrize(
    ("count", "times", "holds"), [(4, 1.9, True), (4, 2.1, False), (FEW + 1, 1.9, False)]
)
def test_few_numbers_may_be_as_far_off_as_the_reference_is_of_others(count, times, holds):
    exact, error = torch.zeros(count, dtype=torch.float64), 1e-3
    given = {"case": CASE, "cap": 1e9, "what": "output"}

    def of(other):
        """Exact by chance of the values that were asked for."""
        found = exact.float() + (0 if other.id == CASE.id else error)
        return [exact], [found]

    got = [exact.float() + times * error]
    if holds:
        assert_all_within_budget(got, of(CASE), of, **given)
    else:
        with pytest.raises(AssertionError, match="over the budget"):
            assert_all_within_budget(got, of(CASE), of, **given)
