"""Every registered operator through every property; see `properties.py`."""

import pytest
import torch
from cases import BAD, CASES
from helpers import DEVICES, tensors
from properties import OF_TENSORS, ON_CPU, PROPERTIES, assert_same, clear_error, compiles

from dfm_fast._library import INTERPRET, OPERATORS


@pytest.mark.parametrize(
    ("name", "case", "device"),
    [
        pytest.param(name, case, device, id=f"{name}-{case.id}-{device}")
        for name in PROPERTIES
        for case in CASES
        if case.shapes() or name not in OF_TENSORS
        for device in DEVICES
        if device == "cpu" or name not in ON_CPU
    ],
)
def test_property(name, case, device):
    PROPERTIES[name](OPERATORS[case.operator], case, device)


@pytest.mark.skipif(INTERPRET, reason="compiled code calls the same opaque operator either way")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [c for c in CASES if c.compiled], ids=lambda c: c.id)
def test_compiles(case, device):
    compiles(OPERATORS[case.operator], case, device)


@pytest.mark.parametrize("bad", BAD, ids=lambda b: b.id)
def test_clear_error(bad):
    clear_error(OPERATORS[bad.operator], bad)


def test_every_operator_has_cases_and_errors():
    assert {case.operator for case in CASES} == set(OPERATORS)
    assert {case.operator for case in CASES if case.compiled} == set(OPERATORS)
    assert {bad.operator for bad in BAD} == set(OPERATORS)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_a_cuda_graph_takes_it(case):
    """Nothing in a call waits for the GPU or copies from the host; a replay gives the same bits."""
    op, args = OPERATORS[case.operator], case.args(torch.float32, "cuda")
    kwargs = {**case.kwargs, **({"device": "cuda"} if "device" in case.kwargs else {})}
    want = tensors(op.public(*args, **kwargs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = tensors(op.public(*args, **kwargs))
    graph.replay()
    torch.cuda.synchronize()
    assert_same(got, want, f"{case.id} replayed")
