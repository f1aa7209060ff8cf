"""The product of matrices behind linear layers on a CPU: in all layouts, against float64."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dfm_fast._library import load_extension
from dfm_fast.ops.matrices import matrix_product

OPCHECKS = ("test_schema", "test_faketensor")
# M, K, N: one, a tile, less and more than one, of chains and panels too, and of the tasks' rows.
SIZES = [(1, 1, 1), (6, 128, 64), (5, 127, 63), (7, 129, 65), (1, 300, 200), (401, 257, 130)]
SIZES += [(1000, 64, 32), (33, 1000, 17)]


def matrix(rows, columns, layout="rows", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    if layout == "columns":
        return randn(columns, rows).t()
    if layout == "part":
        return randn(rows + 3, columns + 5)[2:-1, 3:-2]
    if layout == "part of columns":
        return randn(columns + 5, rows + 3)[3:-2, 2:-1].t()
    if layout == "every other":
        return randn(2 * rows, 2 * columns)[::2, ::2]
    if layout == "one row":
        return randn(columns).expand(rows, columns)
    return randn(rows, columns)


def assert_as_exact(got, a, b, other=None):
    """Twice the error of torch's product, and the rounding of the result."""
    exact, plain = a.double() @ b.double(), a @ b
    if other is not None:
        exact, plain = exact + other.double(), plain + other
    if a.dtype == torch.float64:  # nothing is more exact
        return torch.testing.assert_close(got, plain)
    rounding = torch.finfo(a.dtype).eps / 2 * exact.norm()
    assert (got - exact).norm() <= 2 * (plain - exact).norm() + rounding


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parity(size, dtype):
    M, K, N = size
    a, b = matrix(M, K, dtype=dtype), matrix(K, N, dtype=dtype, seed=1)
    others = [None, matrix(1, N, dtype=dtype)[0], matrix(M, N, dtype=dtype)]
    for other in others:
        got = matrix_product(a, b, other)
        assert got.shape == (M, N)
        assert got.dtype == dtype
        assert_as_exact(got, a, b, other)


LAYOUTS = ["rows", "columns", "part", "part of columns", "every other", "one row"]


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_layouts(left, right):
    a, b = matrix(37, 150, left), matrix(150, 70, right, seed=1)
    assert_as_exact(matrix_product(a, b), a, b)
    other = matrix(37, 70, right, seed=2)
    assert_as_exact(matrix_product(a, b, other), a, b, other)


@pytest.mark.parametrize("size", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_parity_of_nothing(size):
    M, K, N = size
    a, b, other = matrix(M, K), matrix(K, N), matrix(M, N)
    assert torch.equal(matrix_product(a, b), a @ b)
    assert torch.equal(matrix_product(a, b, other), a @ b + other)


def test_longer_sums_are_as_exact():
    """Chains of 128: the error of 8192 products does not grow as one chain's, which is 8 times."""
    a, b = matrix(64, 8192), matrix(8192, 64, seed=1)
    exact = a.double() @ b.double()
    error = (matrix_product(a, b) - exact).norm() / exact.norm()
    assert error <= 4e-7


@pytest.mark.skipif(load_extension().module is None, reason="torch's own product serves")
def test_threads_change_no_bit():
    a, b = matrix(401, 257, "columns"), matrix(257, 130, seed=1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(matrix_product(a, b))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.skipif(load_extension().module is None, reason="torch's own messages")
def test_bad_input():
    a, b = matrix(3, 4), matrix(4, 5)
    for given, error in (
        ((a.half(), b.half()), r"expected a and b of float32 or float64, got Half, Half"),
        ((a, b.double()), r"expected a and b of float32 or float64, got Float, Double"),
        ((a, a), r"expected a \[M, K\] and b \[K, N\], got \[3, 4\], \[3, 4\]"),
        ((a, b[0]), r"expected a \[M, K\] and b \[K, N\], got \[3, 4\], \[5\]"),
        ((a, b, a), r"expected other \[N\] or \[M, N\] like a, got Float \[3, 4\]"),
        ((a, b, b[0].double()), r"expected other \[N\] or \[M, N\] like a, got Double \[5\]"),
    ):
        with pytest.raises(RuntimeError, match="matrix_product: " + error):
            matrix_product(*given)


def test_registration():
    a, b = matrix(3, 4), matrix(4, 5)
    for other in (None, matrix(1, 5)[0], matrix(3, 5)):
        args = (a, b, other)
        torch.library.opcheck(torch.ops.dfm_fast.matrix_product, args, test_utils=OPCHECKS)
    with FlopCounterMode(display=False) as counter:
        matrix_product(a, b)
    assert counter.get_total_flops() == 2 * 3 * 4 * 5
