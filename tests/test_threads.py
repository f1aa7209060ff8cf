"""Several Python threads at once, and other numbers of torch's threads meanwhile."""

import threading

import pytest
import torch
from cases import CASES
from helpers import grads, tensors

from dfm_fast._library import INTERPRET, OPERATORS

pytestmark = pytest.mark.skipif(INTERPRET, reason="Triton's interpreter is not made for threads")

FIRST = {case.operator: case for case in reversed(CASES) if case.shapes()}


def results(case):
    op, args = OPERATORS[case.operator], case.args(torch.float32, "cpu")
    return [
        *tensors(op.public(*args, **case.kwargs)),
        *grads(op.public, args, case.kwargs),
    ]


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restored_threads")
def test_operators_in_threads():
    """Every operator, forward and backward, in four threads that start anywhere in the list: the
    bits that one thread gets."""
    cases = list(FIRST.values())
    want = [results(case) for case in cases]
    wrong, done = [], []
    start = threading.Barrier(5)

    def work(first):
        start.wait()
        for step in range(2 * len(cases)):
            k = (first + step) % len(cases)
            try:
                for i, (a, b) in enumerate(zip(results(cases[k]), want[k], strict=True)):
                    if not torch.equal(a, b):
                        wrong.append(f"{cases[k].id} output {i}")
            except Exception as error:
                wrong.append(f"{cases[k].id}: {error!r}")
        done.append(first)

    threads = [threading.Thread(target=work, args=(7 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    start.wait()
    count = 0
    while any(thread.is_alive() for thread in threads):
        torch.set_num_threads(1 + count % 3)  # of those that this thread starts
        results(cases[count % len(cases)])
        count += 1
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(done) == 4
    assert count > 0
