"""Every operator on random calls: shapes, layouts, dtypes and options that nobody wrote down.

`make fuzz` draws many more, and others every time.
"""

from dataclasses import replace

import pytest
import torch
from helpers import (
    assert_within_budget,
    constants_for,
    cotangents_for,
    grads,
    relayout,
    tensors,
)
from hypothesis import given
from hypothesis import strategies as st
from properties import assert_same, expected, expected_grads, poisoned_memory
from strategies import DRAWN, LAYOUTS, cases, profile

from dfm_fast._library import INTERPRET, OPERATORS

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter is too slow for so many calls")

DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64))


@pytest.mark.parametrize("name", OPERATORS)
@profile(20)
@given(data=st.data())
def test_drawn_call(name, data):
    case, dtype = data.draw(cases(name)), data.draw(DTYPES)
    layout = data.draw(st.sampled_from((*LAYOUTS, "expanded")), "layout of the gradients")
    with poisoned_memory():
        within_budget(case, dtype)
        gradients_within_budget(case, dtype, layout)


def within_budget(case, dtype):
    """Outputs, of arguments that are left as they were."""
    op, args = OPERATORS[case.operator], case.args(dtype, layout="own")
    before = [t.clone() for t in tensors(args)]
    got = tensors(op.public(*args, **case.options(dtype)))
    assert_same(
        [t.nan_to_num() for t in tensors(args)],
        [t.nan_to_num() for t in before],
        "argument changed",
    )
    compare(case, dtype, got, lambda c: expected(op, c, "cpu", dtype), case.cap, "output")


def gradients_within_budget(case, dtype, layout):
    op, sum_of = OPERATORS[case.operator], layout == "expanded"
    if not case.shapes():
        return
    make = constants_for if sum_of else cotangents_for

    def of(case):
        return expected_grads(op, case, "cpu", dtype, make)

    dy = [c if sum_of else relayout(c, layout) for c in of(case)[0]]
    got = grads(op.public, case.args(dtype, layout="own"), case.kwargs, dy)
    compare(case, dtype, got, lambda case: of(case)[1:], 4 * case.cap, "gradient")


def compare(case, dtype, got, of, cap, kind):
    """Within the budget. Of few numbers the reference's own error may be small by chance: other
    values are drawn. A few roundings of sums are allowed as in float64, whose reference is the
    exact result itself: there all that the cap allows."""
    exact, ref = of(case)
    assert len(got) == len(exact), f"{len(got)} {kind}s, expected {len(exact)}"
    draws = min(16, max(3, 256 // max(1, min((e.numel() for e in exact), default=1))))
    others = [of(replace(case, id=f"{case.id}{'!' * i}")) for i in range(1, draws)]
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for i, triple in enumerate(zip(got, ref, exact, strict=True)):
        errors = [largest(r[i].double() - e[i]) for e, r in others]
        roundings = cap if dtype == torch.float64 else 8
        usual = max(*errors, roundings * unit * max(1.0, largest(exact[i])))
        assert_within_budget(*triple, cap=cap, what=f"{kind} {i}", inputs=dtype, usual=usual)


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def test_every_operator_is_drawn():
    assert DRAWN.keys() == OPERATORS.keys()
