"""Activation bytes of SnapGen's 17 residual blocks, by two counts."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # `benchmarks` is not installed

from benchmarks import activation_bytes as counting
from dfm_fast._library import INTERPRET
from dfm_fast.profiling.clocks import allocations

BF16 = torch.bfloat16


def pixels_times(numbers):
    return 2 * sum(size.side**2 * numbers(size.inputs, size.outputs) for size in counting.blocks())


def test_least_bytes_are_those_of_the_unet():
    sizes = list(counting.blocks())
    assert len(sizes) == 17
    assert sizes[:3] == [(256, 256, 128), (256, 256, 128), (256, 512, 64)]
    assert [s.inputs for s in sizes[8:]] == [1792, 1792, 1408, 1408, 1024, 768, 768, 512, 512]
    assert pixels_times(lambda i, o: 2 * i + 5 * o) == pytest.approx(628e6, rel=1e-3)
    assert pixels_times(lambda i, o: i + 2 * o) == pytest.approx(276e6, rel=2e-3)
    eager = pixels_times(lambda i, o: 7 * i + 24 * o + (i != o) * (i + o))
    assert eager == pytest.approx(2839e6, rel=1e-3)


@pytest.mark.parametrize("given", [False, True], ids=["taken", "given"])
def test_the_blocks_at_full_size(given):
    """Kept: x and h alone. Moved: 16 % over the least where statistics are handed on, all of it
    the map of a convolved shortcut, written and read; where not, x is read once more."""
    found = counting.total(counting.ours, BF16, given)
    assert found.least_kept <= found.kept <= 1.005 * found.least_kept
    reads = 2 if given else 3
    moved = pixels_times(lambda i, o: reads * i + 5 * o + (i != o) * 2 * o)
    assert moved <= found.moved <= 1.005 * moved
    assert found.moved <= (1.165 if given else 1.36) * found.least_moved


def test_diffusers_blocks_keep_four_times_as_much():
    pytest.importorskip("diffusers.models.unets.unet_dreamlite")
    theirs = counting.total(counting.of_diffusers, BF16)
    assert theirs.kept > 4 * theirs.least_kept
    assert theirs.moved > 4.5 * theirs.least_moved


@pytest.mark.skipif(INTERPRET, reason="its tensors are numpy's")
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_what_is_computed_keeps_no_more(dtype):
    """The same blocks on small maps: the hooks' count to the byte, and the allocator's."""
    torch.manual_seed(0)
    for size in {s._replace(side=s.side // 16) for s in counting.blocks()}:
        call, parameters = counting.forward(counting.ours, size, dtype)
        x, h = (size.side**2 * c for c in (size.inputs, 2 * size.outputs))
        vectors = 2 * 4 * (size.inputs + 2 * size.outputs)  # mean and M2, in float32
        small = vectors + 2 * counting.TIME * dtype.itemsize  # temb, and silu of it
        assert counting.kept_bytes(call, parameters) == (x + h) * dtype.itemsize + small
        # x and temb were there before; y, and the statistics that are not kept, are new.
        y = size.side**2 * size.outputs * dtype.itemsize
        new = h * dtype.itemsize + y + vectors + counting.TIME * dtype.itemsize
        assert new <= sum(allocations(call)) <= new + 1024


def test_a_map_too_many_is_noticed():
    size = counting.Size(64, 64, 8)
    call, parameters = counting.forward(counting.ours, size, torch.float32)
    kept = counting.kept_bytes(call, parameters)
    more = counting.kept_bytes(lambda: torch.nn.functional.silu(call()), parameters)
    assert more - kept == 4 * 64 * 64


def test_views_move_nothing():
    x = torch.randn(4, 6)
    weight = torch.randn(3, 6)
    assert counting.moved_bytes(lambda: x.view(24).view(6, 4).t(), []) == 0
    assert counting.moved_bytes(lambda: x.t().contiguous(), []) == 2 * 96
    assert counting.moved_bytes(lambda: x.add_(1), []) == 2 * 96
    assert counting.moved_bytes(lambda: torch.mm(x, weight.t()), [weight]) == 96 + 4 * 12
