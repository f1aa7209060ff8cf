"""`dfm_fast.profile()`: what it counts, against numbers known by hand."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from helpers import run_python, tensors
from torch.autograd import DeviceType
from torch.testing._internal.two_tensor import TwoTensor

import dfm_fast
from dfm_fast._library import INTERPRET, OPERATORS
from dfm_fast.profiling import Profile, ceilings, tables
from dfm_fast.profiling.ceilings import Ceilings
from dfm_fast.profiling.recorder import LABEL, Call, Recorder, with_kernels

pytestmark = pytest.mark.skipif(INTERPRET, reason="the same code whatever the kernels")
# A GB/s of copies, and a GFLOP/s of products: bytes and FLOPs are nanoseconds.
SLOW = Ceilings("cpu", [(1, 1e-9), (1 << 40, 1e-9 * (1 << 40))], {torch.float32: 1e9})


def recorded(call, inference=False):
    """Of the operators that a call runs: [(name, bytes, flops)]."""
    recorder = Recorder(labels=False)
    with torch.inference_mode(inference), recorder:
        call()
    return [(c.name, c.bytes, c.flops) for c in recorder.calls]


def known(calls, seconds=1.0):
    """A profile of these calls."""
    p = Profile()
    p.calls, p.seconds, p._trace = list(calls), seconds, object()
    p.ceilings = SLOW
    return p


def call(name="aten::add", seconds=0.1, moved=0, flops=0, dtype=torch.float32, shapes=""):
    return Call(name, shapes, seconds, moved, flops, dtype, 0)


# --- Bytes ----------------------------------------------------------------------------------------

X = torch.randn(16, 32)  # 2048 bytes
Y = torch.randn(16, 32)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: X + Y, 3 * 2048),
        (lambda: X + X, 2 * 2048),
        (lambda: X + 1, 2 * 2048),
        (lambda: X.bfloat16(), 2048 + 1024),
        (lambda: X.clone().add_(Y), 2 * 2048 + 3 * 2048),
        (lambda: X.clone().copy_(Y), 2 * 2048 + 2 * 2048),
        (lambda: X.clone().zero_(), 2 * 2048 + 2048),
        (lambda: torch.add(X, Y, out=torch.empty(16, 32)), 3 * 2048),
        (lambda: X.t()[3:].unsqueeze(0), 0),
        (lambda: X.view(-1), 0),
        (lambda: X.contiguous(), 0),
        (lambda: torch.empty(1000), 0),
        (lambda: torch.zeros_like(X), 2048),
        (lambda: X[:, ::2] + 1, 1024 + 1024),
        (lambda: torch.randn(32).expand(16, 32) + X, 128 + 128 + 2 * 2048),
        (lambda: F.embedding(torch.tensor([1, 1]), X), 16 + 256 + 256),
        (lambda: torch.cat((X, Y)), 4 * 2048),
        (lambda: X.sum(), 2048 + 4),
    ],
)
def test_bytes_of_calls_known_by_hand(run, expected):
    assert sum(moved for _, moved, _ in recorded(run)) == expected


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.operator}-{c.id}")
def test_bytes_of_our_operators_are_their_own_cost(case):
    """And what they also write: statistics that are kept for backward."""
    operator, args = OPERATORS[case.operator], case.args(torch.float32)
    seen = []

    class Seeing(Recorder):
        def _call(self, func, args, kwargs, out, seconds):
            seen.append((func, sum(t.numel() * t.element_size() for t in tensors(out))))
            return super()._call(func, args, kwargs, out, seconds)

    recorder = Seeing(labels=False)
    with torch.no_grad(), recorder:
        result = operator.public(*args, **case.kwargs)
    own = [(c, out) for c, (f, out) in zip(recorder.calls, seen, strict=True) if "dfm_" in f.name()]
    if len(own) > 1:  # statistics first, which the least bytes of the whole do not have
        return
    ((made, written),) = own
    returned = sum(t.numel() * t.element_size() for t in tensors(result))
    assert made.bytes - (written - returned) == operator.cost(*args, **case.kwargs)


# --- FLOPs ----------------------------------------------------------------------------------------

MAP = torch.randn(2, 8, 10, 10)
DEPTHWISE, DENSE = torch.randn(8, 1, 3, 3), torch.randn(4, 8, 3, 3)
HEADS = torch.randn(2, 3, 16, 8)  # [B, H, T, d]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: X @ Y.t(), 2 * 16 * 32 * 16),
        (lambda: F.linear(X, torch.randn(5, 32), torch.randn(5)), 2 * 16 * 32 * 5),
        (lambda: F.conv2d(MAP, DENSE, padding=1), 2 * 2 * 100 * 4 * 8 * 9),
        (lambda: F.conv2d(MAP, DEPTHWISE, padding=1, groups=8), 2 * 2 * 100 * 8 * 9),
        (lambda: F.scaled_dot_product_attention(HEADS, HEADS, HEADS), 4 * 6 * 16 * 16 * 8),
        (lambda: X + Y, 0),
    ],
)
def test_flops_of_calls_known_by_hand(run, expected, inference):
    """In inference mode operators come whole, to be taken apart."""
    assert sum(flops for _, _, flops in recorded(run, inference)) == expected


@pytest.mark.parametrize("weight", [DENSE, DEPTHWISE], ids=["dense", "depthwise"])
def test_gradients_of_a_convolution_are_twice_its_flops(weight):
    x, w = MAP.clone().requires_grad_(), weight.clone().requires_grad_()
    recorder = Recorder(labels=False)
    with recorder:
        F.conv2d(x, w, padding=1, groups=8 // w.shape[1]).sum().backward()
    flops = {c.name: c.flops for c in recorder.calls}
    assert flops["aten::convolution_backward"] == 2 * flops["aten::convolution"] > 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN's own operator")
def test_products_by_onednn_are_counted():
    """With a term to be added, of the shape of a weight, too."""
    w = torch.randn(32, 32)
    linear = torch.ops.mkldnn._linear_pointwise

    def run():
        y = linear(X, w, None, "none", [], "")
        linear.binary(X, y, w, None, "add")

    assert [flops for _, _, flops in recorded(run)] == [2 * 16 * 32 * 32] * 2


# --- Calls and time -------------------------------------------------------------------------------


def test_calls_are_counted_and_their_time_is_within_the_whole():
    with dfm_fast.profile() as p:
        for _ in range(3):
            y = X + Y
        y @ y.t()
        dfm_fast.rms_norm(X, torch.ones(32))
    p.ceilings = SLOW
    rows = {row.name: row for row in p.rows()}
    assert rows["aten::add"].calls == 3
    assert rows["aten::mm"].calls == 1
    assert rows["dfm_fast::rms_norm"].calls == 1  # and nothing that it calls itself
    assert rows["aten::add"].bytes == 3 * 3 * 2048
    assert 0 < sum(row.seconds for row in rows.values()) == pytest.approx(p.operator_seconds)
    assert p.operator_seconds + p.outside_seconds == pytest.approx(p.seconds)


def test_time_lies_where_it_was_spent():
    """In an operator, outside of all, and in what is left out."""
    library = torch.library.Library("profiled", "DEF")
    library.define("slow(Tensor x) -> Tensor")
    library.impl("slow", lambda x: time.sleep(0.05) or x.clone(), "CompositeExplicitAutograd")
    with dfm_fast.profile() as p:
        torch.ops.profiled.slow(X)
        time.sleep(0.1)
        with p.paused():
            time.sleep(0.2)
            X + Y
    p.ceilings = SLOW
    (row,) = p.rows()
    assert (row.name, row.calls) == ("profiled::slow", 1)
    assert row.seconds >= 0.05
    assert p.outside_seconds >= 0.1
    assert p.seconds < 0.3


def test_backward_is_seen_as_our_operators_and_torchs():
    x = X.clone().requires_grad_()
    with dfm_fast.profile() as p:
        (dfm_fast.rms_norm(x, torch.ones(32)) @ Y.t()).sum().backward()
    names = {c.name for c in p.calls}
    assert {"dfm_fast::rms_norm_backward", "aten::mm"} <= names


def test_subclasses_are_seen_as_the_tensors_inside_of_them():
    two = TwoTensor(X, Y)
    assert [name for name, _, _ in recorded(lambda: two + 1)] == ["aten::add"] * 2


def test_shapes_are_told_apart_where_asked_for():
    calls = [call(shapes="2x3"), call(shapes="4"), call(shapes="2x3")]
    assert [(r.shapes, r.calls) for r in known(calls).rows("shape")] == [("2x3", 2), ("4", 1)]
    assert [(r.shapes, r.calls) for r in known(calls).rows()] == [("", 3)]


def test_kernels_are_given_to_the_operator_whose_range_they_lie_in():
    """Events as torch's profiler has them on a GPU: kernels at the innermost operator, and the
    range itself as an annotation."""

    def event(name, kernels=(), children=(), device=DeviceType.CPU):
        made = [SimpleNamespace(name=n, duration=t) for n, t in kernels]
        return SimpleNamespace(name=name, kernels=made, cpu_children=children, device_type=device)

    first, second = f"{LABEL}0 aten::add.Tensor", f"{LABEL}1 dfm_fast::rms_norm"
    inner = event("aten::add", [("elementwise", 5.0)])
    events = [
        event(first, [(first, 9.0)], [inner]),
        inner,
        event(second, [("Memset", 1.0)], [event("dfm_fast::rms_norm", [("norm", 2.0)])]),
        event(second, device=DeviceType.CUDA),
        event("cudaDeviceSynchronize"),
    ]
    calls = with_kernels([call(), call("dfm_fast::rms_norm"), call("aten::view")], events)
    assert [(c.seconds, c.launches) for c in calls] == [(5e-6, 1), (3e-6, 2), (0.0, 0)]


# --- Floors ---------------------------------------------------------------------------------------


def test_a_floor_is_the_longer_of_copy_and_product():
    copy, product = call("a", 1.0, moved=10**8), call("b", 1.0, moved=10**8, flops=4 * 10**8)
    by_name = {row.name: row for row in known([copy, product, call("c", 1.0)]).rows()}
    floors = {name: (row.bound, row.floor, row.above_floor) for name, row in by_name.items()}
    assert floors["a"] == ("copy", pytest.approx(0.1), pytest.approx(0.9))
    assert floors["b"] == ("FLOPs", pytest.approx(0.4), pytest.approx(0.6))
    assert floors["c"] == ("", 0.0, 1.0)
    assert tables.of_limit(by_name["b"]) == "40% FLOPs"


def test_copies_between_those_measured():
    limits = Ceilings("cpu", [(100, 1.0), (10_000, 10.0)])
    seconds = [limits.copy_seconds(n) for n in (0, 1, 100, 1000, 10_000, 50_000)]
    assert seconds == pytest.approx([0, 1, 1, 10**0.5, 10, 50])


def test_integers_have_no_products_and_other_dtypes_are_measured(monkeypatch):
    limits = Ceilings("cpu", [(1, 1.0)])
    monkeypatch.setitem(ceilings.SIDE, "cpu", 16)
    assert limits.product_seconds(100, torch.int8) == limits.product_seconds(100, None) == 0
    assert limits.product_seconds(100, torch.bfloat16) > 0
    assert list(limits.products) == [torch.bfloat16]


def test_what_moves_less_takes_no_longer(monkeypatch):
    """A busy machine shows in a small copy, too."""
    seconds = {1 << 16: 5.0, 1 << 18: 1.0, 1 << 20: 2.0}
    monkeypatch.setitem(ceilings.SIZES, "cpu", list(seconds))
    monkeypatch.setattr(ceilings, "copy_seconds", lambda device, nbytes: seconds[nbytes])
    limits = ceilings._measured.__wrapped__("cpu", 1)
    assert limits.copies == [(1 << 16, 1.0), (1 << 18, 1.0), (1 << 20, 2.0)]


def test_ceilings_of_this_machine(monkeypatch):
    monkeypatch.setitem(ceilings.SIZES, "cpu", [1 << 16, 1 << 22])
    small, large = ceilings._measured.__wrapped__("cpu", 1).copies
    assert 0 < small[1] < large[1] < 1


# --- What is shown --------------------------------------------------------------------------------

CALLS = [
    call("aten::addmm", 0.5, moved=10**6, flops=3 * 10**8),
    call("dfm_fast::rms_norm", 0.2, moved=10**8),
    call("dfm_fast::rms_norm", 0.1, moved=10**8),
    call("aten::view", 0.05),
]


def test_the_table_sums_up_to_the_whole():
    lines = known(CALLS).table(limit=2).splitlines()
    assert lines[0].split()[:5] == ["operator", "calls", "ms", "share", "MB"]
    assert lines[2].split() == [
        "aten::addmm",
        "1",
        "500",
        "50.0%",
        "1",
        "0.002",
        "60%",
        "FLOPs",
        "200",
    ]
    assert lines[3].split() == [
        "dfm_fast::rms_norm",
        "2",
        "300",
        "30.0%",
        "200",
        "0.667",
        "67%",
        "copy",
        "100",
    ]
    assert lines[4].split() == ["1", "other", "1", "50", "5.0%", "0", "50"]
    assert lines[5].split() == ["outside", "operators", "150", "15.0%"]


def test_the_summary_names_the_largest_cost_and_what_binds_it():
    taken, largest, floor, limits = known(CALLS).summary().splitlines()
    assert taken.startswith("4 calls of 3 operators take 850 ms of 1,000 ms; the rest, 15%,")
    assert largest.startswith("The largest cost is aten::addmm: 50% of the time in 1 call, bound ")
    assert "by arithmetic, at 60% of the speed of a matrix product" in largest
    assert largest.endswith("at most 20% of the whole could be saved there.")
    assert "it would take 500 ms, 50% of the time" in floor
    assert "copies 1 GB/s" in limits


def test_the_summary_names_what_is_farthest_above_its_floor():
    near, far = call("near", 0.5, moved=5 * 10**8), call("far", 0.4, moved=10**8)
    summary = known([near, far]).summary()
    assert "nothing is left to save in it" in summary
    assert "Farthest above its floor is far: 40% of the time, bound by memory, at 25%" in summary


def test_nothing_ran():
    with dfm_fast.profile() as p:
        pass
    p.ceilings = SLOW
    assert "No operator ran." in str(p)


def test_a_notebook_shows_table_and_sentences():
    html = known(CALLS)._repr_html_()
    assert html.count("<tr>") == 1 + 3 + 1
    assert "<p>The largest cost is aten::addmm" in html


def test_the_trace_is_chromes_and_the_picture_is_small(tmp_path):
    pytest.importorskip("matplotlib")
    with dfm_fast.profile() as p:
        dfm_fast.rms_norm(X, torch.ones(32))
    p.ceilings = SLOW
    events = json.loads(p.trace(tmp_path / "new" / "trace.json").read_text())["traceEvents"]
    assert any(event["name"] == "dfm_fast::rms_norm" for event in events)
    data = p.picture(tmp_path / "picture.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) <= 200_000
    assert sorted(f.name for f in tmp_path.iterdir()) == ["new", "picture.png"]


# --- Errors ---------------------------------------------------------------------------------------


def test_results_before_the_end_are_an_error():
    with dfm_fast.profile() as p:
        X + Y
        with pytest.raises(ValueError, match="profile: block: expected its end before results"):
            p.rows()
    with pytest.raises(ValueError, match="expected its end before results are asked for"):
        dfm_fast.profile().table()
    with pytest.raises(ValueError, match="block: expected a block that has begun, got none"):
        dfm_fast.profile().paused()


def test_a_profile_has_one_block():
    with dfm_fast.profile() as p:
        X + Y
        with pytest.raises(ValueError, match="no other profiler of torch to be running"):
            dfm_fast.profile().__enter__()
    with pytest.raises(ValueError, match="one block for each profile, got a second one"):
        p.__enter__()


def test_an_error_in_the_block_ends_the_recording():
    def fails(p):
        with p:
            _ = X + Y
            raise KeyError

    p = dfm_fast.profile()
    with pytest.raises(KeyError):
        fails(p)
    X @ Y.t()
    assert [c.name for c in p.calls] == ["aten::add"]
    with dfm_fast.profile():  # nothing of it is left running
        pass


@pytest.mark.parametrize("what", ["trace", "picture"])
def test_a_path_that_cannot_be_written_is_an_error(what, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"profile.{what}: path: expected a folder"):
        getattr(known(CALLS), what)(tmp_path / "file" / "x.png")
    with pytest.raises(ValueError, match=f"profile.{what}: path: expected a file"):
        getattr(known(CALLS), what)(tmp_path)


def test_rows_by_something_else_are_an_error():
    with pytest.raises(ValueError, match="profile: by: expected one of operator, shape, got 'x'"):
        known(CALLS).rows("x")


def test_importing_the_library_loads_nothing_of_it_that_takes_time():
    code = """
import sys, dfm_fast
assert callable(dfm_fast.profile)
for name in ("matplotlib", "PIL", "dfm_fast.models", "dfm_fast.profiling.recorder"):
    assert name not in sys.modules, name
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
