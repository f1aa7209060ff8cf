"""The benchmark harness: who is timed, in what order, and what it refuses to time."""

import dataclasses
import getpass
import importlib
import itertools
import json
import math
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT

sys.path.append(str(Path(__file__).resolve().parent.parent))  # `benchmarks` is not installed

from benchmarks import bench_pyramids, ceilings, harness, photographs, records, shapes, turns
from dfm_fast._library import OPERATORS
from dfm_fast.profiling.clocks import crowd, interleave


def halve(x):
    return x / 2


def tiny_row(**changes):
    row = harness.Row(
        op="halve",
        variant="plain",
        case="tiny",
        shapes=((4, 8),),
        ours=halve,
        reference=halve,
        least_bytes=2 * 4 * 8 * 4,
        eager=halve,
        compiled={},
    )
    return dataclasses.replace(row, **changes)


def measure(row):
    return harness.measure(row, "cpu", 0.0, lambda text, end=None: None)


def test_everybody_takes_a_turn_in_every_round_in_changing_order():
    turns = []
    samplers = {name: lambda name=name: turns.append(name) or 1.0 for name in "abcd"}
    times = interleave(samplers, seconds=0.0, rounds=(12, 12))
    rounds = [tuple(turns[i : i + 4]) for i in range(4, len(turns), 4)]  # after the warm-up
    assert len(rounds) == 12
    assert all(sorted(r) == list("abcd") for r in rounds)
    assert len(set(rounds)) > 4
    assert {r[0] for r in rounds} == set("abcd")
    assert all(len(samples) == 12 for samples in times.values())


def test_rounds_stop_with_the_time_but_not_before_the_least():
    assert len(interleave({"a": lambda: 1.0}, 0.0, rounds=(3, 10**9))["a"]) == 3
    assert len(interleave({"a": lambda: 1.0}, 60.0, rounds=(3, 7))["a"]) == 7


def test_a_row_records_what_it_measured():
    record, call = measure(tiny_row())
    assert set(record["providers"]) == {"ours", "eager", "copy"}
    assert record["rounds"] >= 11
    assert record["speedup"]["eager"]["median"] > 0
    assert record["copy_fraction"]["q1"] <= record["copy_fraction"]["q3"]
    assert call().shape == (4, 8)


def test_fraction_of_copy_is_in_bytes_per_second():
    times = {"ours": [2.0] * 5, "copy": [1.0] * 5, "eager": [8.0] * 5}
    record = harness.figures(tiny_row(least_bytes=300), times, copied=200, missing={})
    assert record["copy_fraction"]["median"] == pytest.approx(0.75)
    assert record["speedup"]["eager"]["median"] == pytest.approx(4.0)


def test_a_row_of_products_is_held_to_their_peak():
    times = {"ours": [2.0] * 5, "copy": [1.0] * 5, "eager": [8.0] * 5, "product": [4.0] * 5}
    record = harness.figures(tiny_row(), times, 1, {}, operations=300, multiplied=1000)
    assert record["product_fraction"]["median"] == pytest.approx(0.6)
    assert record["providers"]["product"]["tflop_s"] == pytest.approx(2.5e-7)
    assert set(record["speedup"]) == {"eager"}
    assert record["strongest"] is None
    matrices = tiny_row(
        shapes=((4, 8), (8, 4)), ours=torch.matmul, reference=torch.matmul, eager=torch.matmul
    )
    assert measure(matrices)[0]["operations"] == 2 * 4 * 8 * 4
    assert "product" not in measure(tiny_row())[0]["providers"]


def test_operations_are_those_of_groups_and_of_shared_heads():
    x, w = torch.ones(2, 8, 4, 4).requires_grad_(), torch.ones(8, 1, 3, 3).requires_grad_()
    one = 2 * 2 * 8 * 16 * 9
    y = torch.nn.functional.conv2d(x, w, padding=1, groups=8)
    grads = [y, [x, w], torch.ones_like(y)]
    assert ceilings.product_operations(lambda: torch.autograd.grad(*grads)) == 2 * one
    q, kv = torch.ones(1, 4, 16, 8), torch.ones(1, 1, 16, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    count = ceilings.product_operations(lambda: attention(q, kv, kv, enable_gqa=True))
    assert count == 2 * 2 * 4 * 16 * 16 * 8


def test_speedups_compare_within_a_round():
    """A minute in which everything is ten times slower changes no ratio."""
    slow = [1.0, 1.0, 10.0, 10.0, 10.0]
    times = {"ours": slow, "copy": slow, "eager": [3 * t for t in slow]}
    speedup = harness.figures(tiny_row(), times, 1, {})["speedup"]["eager"]
    assert speedup == pytest.approx({"median": 3.0, "q1": 3.0, "q3": 3.0, "min": 3.0})


def test_a_busy_machine_is_noticed():
    quiet = [1.0, 1.1, 1.0, 1.2, 1.1]
    assert harness.steady(quiet, others=0.02)
    assert not harness.steady(quiet, others=0.4)
    assert not harness.steady([1.0, 8.0, 1.0, 9.0, 1.1], others=0.0)


def test_others_count_where_the_machine_has_none_to_spare():
    start = (0.0, 0.0, 0.0)
    assert crowd(start, (10.0, 0.0, 6.0)) == pytest.approx(0.4)  # everybody's, idle, ours
    assert crowd(start, (10.0, 90.0, 6.0)) == 0.0
    assert crowd(None, None) == 0.0


def test_the_fastest_compiled_form_is_the_rival():
    times = {n: [t] * 3 for n, t in {"ours": 1.0, "copy": 1.0, "eager": 9.0}.items()}
    times |= {"compiled slow": [5.0] * 3, "compiled fast": [4.0] * 3}
    record = harness.figures(tiny_row(), times, 1, {})
    assert record["providers"]["compiled"]["form"] == "fast"
    assert record["speedup"]["compiled"]["median"] == pytest.approx(4.0)
    assert record["strongest"] is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x / 2 + 1e-3,
        lambda x: x / 2 * float("nan"),
        lambda x: x[:, :4] / 2,
        lambda x: (x / 2).double(),
        lambda x: (x / 2, x / 2),
    ],
    ids=["values", "nan", "shape", "dtype", "count"],
)
def test_the_gate_stops_ours_when_wrong(wrong):
    with pytest.raises(harness.GateError, match="ours"):
        measure(tiny_row(ours=wrong))


def test_the_gate_judges_a_network_as_a_whole():
    def pair(x):
        return x / 2, x / 3

    measure(tiny_row(ours=pair, reference=pair, eager=pair, whole=True))
    wrong = tiny_row(ours=lambda x: (x / 2, x / 3.001), reference=pair, eager=pair, whole=True)
    with pytest.raises(harness.GateError, match="ours: distance"):
        measure(wrong)


def test_the_gate_stops_a_rival_that_computes_something_else():
    other = harness.Rival(lambda x: lambda: x / 3)
    with pytest.raises(harness.GateError, match="other"):
        measure(tiny_row(rivals={"other": other}))
    with pytest.raises(harness.GateError, match="eager"):
        measure(tiny_row(eager=lambda x: x / 3))


def test_the_gate_stops_a_wrong_backward():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x / 2

        @staticmethod
        def backward(ctx, dy):
            return dy / 3

    with pytest.raises(harness.GateError, match="ours"):
        measure(tiny_row(ours=Wrong.apply, direction="backward"))


def test_a_rival_known_to_differ_is_timed_and_says_so():
    other = harness.Rival(lambda x: lambda: x / 3, differs="a third, not a half")
    record, _ = measure(tiny_row(rivals={"other": other}))
    assert record["providers"]["other"]["note"] == "a third, not a half"
    assert record["strongest"] == "other"


def test_missing_rivals_are_reported():
    rivals = {
        "absent": harness.Rival(lambda x: lambda: x / 2, package="no_such_package"),
        "elsewhere": harness.Rival(lambda x: lambda: x / 2, device="cuda"),
        "never": "has no backward",
    }
    record, _ = measure(tiny_row(rivals=rivals))
    assert record["missing"] == {
        "absent": "no_such_package is not installed",
        "elsewhere": "runs on cuda only",
        "never": "has no backward",
    }
    assert not set(rivals) & set(record["providers"])


def test_a_form_that_does_not_compile_is_reported(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("backend raised:\nno compiler found")

    monkeypatch.setattr(torch, "compile", fail)
    record, _ = measure(tiny_row(compiled={"plain": halve}))
    assert record["missing"] == {"compiled plain": "does not compile: no compiler found"}


def test_compiled_forms_are_left_out_where_asked():
    row = tiny_row(compiled={"plain": halve})
    record, _ = harness.measure(row, "cpu", 0.0, lambda text, end=None: None, compiling=False)
    assert "compiled" not in record["providers"]
    assert record["missing"]["compiled plain"] == "left out, as asked"


def test_a_backward_row_times_the_backward_alone():
    forwards = []

    def ours(x):
        forwards.append(1)
        return x / 2

    call = harness.bind(ours, [torch.randn(4, 8)], "backward")
    first, second = call(), call()
    assert len(forwards) == 1
    assert torch.equal(first[0], second[0])


def test_low_precision_is_held_against_float32():
    record, _ = measure(tiny_row(dtype=torch.bfloat16))
    assert record["providers"]["float32"]["note"] == "ours in float32"
    assert "float32" in record["speedup"]


def test_goals_are_judged_and_misses_are_kept(monkeypatch):
    goals = (
        shapes.Goal("cpu", "halve-*", "copy", 0.5),
        shapes.Goal("*", "halve-*", "eager", 5.0),
        shapes.Goal("*", "halve-*", "absent", 2.0),
        shapes.Goal("cuda", "halve-*", "copy", 0.9),
    )
    monkeypatch.setattr(harness, "GOALS", goals)
    record = {"copy_fraction": {"median": 0.7}, "speedup": {"eager": {"median": 4.0}}}
    judged = harness.judge("halve-plain", "cpu", record)
    assert [(g["against"], g["measured"], g["met"]) for g in judged] == [
        ("copy", 0.7, True),
        ("eager", 4.0, False),
        ("absent", None, None),
    ]


def test_memory_is_everybodys_own_peak(monkeypatch):
    """Eager has five tensors at once, x / 2 one."""

    def wasteful(x):
        kept = [x + 1, x + 2]
        return x / 2 + 0 * kept[0]

    monkeypatch.setattr(harness, "GOALS", (shapes.Goal("*", "halve-*", "memory", 0.25),))
    record, _ = measure(tiny_row(shapes=((512, 512),), eager=wasteful))
    entries = record["providers"]
    assert entries["ours"]["peak_mib"] == pytest.approx(1, rel=0.01)
    assert entries["eager"]["peak_mib"] == pytest.approx(5, rel=0.01)
    (goal,) = record["goals"]
    assert goal["measured"] == pytest.approx(0.8, rel=0.01)
    assert goal["met"] is True


def all_rows():
    files = Path(shapes.__file__).parent.glob("bench_*.py")
    families = [importlib.import_module(f"benchmarks.{file.stem}") for file in files]
    return [row for family in families for row in family.ROWS.values()]


def test_every_goal_is_some_rows():
    rows = all_rows()
    for goal in shapes.GOALS:
        assert any(harness.fnmatch(row.id, goal.row) for row in rows), goal


def test_goals_name_rivals_of_their_rows():
    """Else a goal stays open for ever."""
    for row in all_rows():
        known = {"copy", "memory", "eager", *row.rivals}
        forms = any(name.startswith("compiled ") for name in row.rivals)  # the fastest is kept
        known |= {"compiled"} if row.compiled or forms else set()
        known |= {"float32"} if row.dtype in (torch.bfloat16, torch.float16) else set()
        for goal in shapes.GOALS:
            here = "*" in (goal.device, row.device or "*") or goal.device == row.device
            if here and harness.fnmatch(row.id, goal.row):
                assert goal.against in known, f"{row.id}: {goal}"


def test_results_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "machine" / "family.json"
    records.write_json(path, {"rows": [1.23456789]})
    with pytest.raises(TypeError):
        records.write_json(path, {"rows": object()})
    assert json.loads(path.read_text()) == {"rows": [1.2346]}
    assert [p.name for p in path.parent.iterdir()] == ["family.json"]


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"model": 17, "model name": "AMD EPYC"}, "AMD EPYC (family 25, model 17)"),
        ({"model": 1, "model name": "AMD EPYC 7763"}, "AMD EPYC 7763"),
        ({"model name": "Some processor"}, "Some processor"),
    ],
)
def test_processors_that_do_not_say_their_name_are_told_apart(monkeypatch, facts, name):
    text = "".join(f"{key}\t: {value}\n" for key, value in {"cpu family": 25, **facts}.items())
    monkeypatch.setattr(records.Path, "read_text", lambda _: text)
    assert records.cpu_name() == name


def test_results_name_no_host_user_or_folder():
    text = json.dumps(records.header("cpu", "pyramids", full=False))
    assert str(records.ROOT) not in text
    assert str(Path.home()) not in text
    words = text.replace('"', " ").replace("/", " ").split()
    assert socket.gethostname() not in words
    assert getpass.getuser() not in words


def _cost(row):
    case = shapes.CASES[row.case]
    inputs = [torch.empty(s, dtype=row.dtype, device="meta") for s in row.shapes]
    options = {} if row.variant == "haar" else {"factor": case.factor}
    if row.op.endswith("_build"):
        return OPERATORS[row.op].cost(*inputs, case.num_levels, **options)
    return OPERATORS[row.op].cost(inputs, **options)


def test_rows_count_the_bytes_of_the_operators_own_formula():
    for row in bench_pyramids.ROWS.values():
        expected = _cost(row)
        if row.op == "laplacian_collapse" and row.direction == "backward":
            # The finest level's gradient is that of the output, not written again.
            expected -= math.prod(shapes.CASES[row.case].shape) * row.dtype.itemsize
        assert row.least_bytes == expected, row.id


@pytest.fixture
def small_photographs(monkeypatch):
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    small = photographs.latent((1, 2, 64, 64))
    monkeypatch.setattr(photographs, "photographs", lambda: {"garden": image})
    monkeypatch.setattr(photographs, "latent", lambda: small)


def test_photographs_come_back_within_one_rounding_per_level(small_photographs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert photographs.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    assert "20 of 20 within" in capsys.readouterr().out
    assert 0 < (tmp_path / "garden.png").stat().st_size <= 200_000
    assert len((tmp_path / "reconstruction.csv").read_text().splitlines()) == 21


def test_a_photograph_that_does_not_come_back_fails_the_job(
    small_photographs, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(photographs, "picture", lambda *args: None)
    monkeypatch.setattr(
        photographs, "transforms", lambda: {"lossy": (lambda x: x, lambda x: x + 1)}
    )
    assert photographs.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "OVER" in capsys.readouterr().out


def test_details_are_shown_around_grey():
    shown = photographs.centred(torch.tensor([[-1.0, 0.0, 1.0]]))
    assert shown.flatten().tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_who_was_compiled_says_in_which_mode(monkeypatch):
    """Forms, and rivals that compile a part of their own."""
    monkeypatch.setattr(harness, "MODE", "default")
    rival = harness.Rival(lambda x: lambda: x / 2)
    row = tiny_row(compiled={"plain": halve}, rivals={"compiled model": rival, "other": rival})
    providers, _ = harness.assemble(row, harness.make_inputs(row, "cpu"), lambda *_, **__: None)
    noted = {name for name, provider in providers.items() if "mode default" in provider.note}
    assert noted == {"compiled plain", "compiled model"}


# --- Turns ----------------------------------------------------------------------------------------

TIMED = """
import os, sys, time
from pathlib import Path
from benchmarks.turns import turn
kind, out = sys.argv[1:]
if kind == "busy":
    while True:
        with Path(out).open("a") as file:
            file.write(f"{time.time()} {time.time()}\\n")
        time.sleep(0.01)
time.sleep(0.5)
for _ in range(2):
    with turn():
        start = time.time()
        if kind == "dies":
            os._exit(3)
        time.sleep(0.4)
        with Path(out).open("a") as file:
            file.write(f"{start} {time.time()}\\n")
"""


def test_who_is_timed_stops_all_others(tmp_path, monkeypatch):
    """Also when one dies whose turn it is."""
    (tmp_path / "turns").mkdir()
    monkeypatch.setenv(turns.FOLDER, str(tmp_path / "turns"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    times = [tmp_path / kind for kind in ("dies", "busy", "a", "b")]
    processes = [
        turns.start([sys.executable, "-c", TIMED, path.name, str(path)], tmp_path / "log")
        for path in times
    ]
    try:
        assert processes[0].wait(60) == 3
        turns.release(tmp_path / "turns")
        assert [p.wait(60) for p in processes[2:]] == [0, 0]
        last = time.time()
        while float(times[1].read_text().split()[-2]) < last:  # those that were stopped go on
            time.sleep(0.05)
    finally:
        turns.send(signal.SIGKILL, [p.pid for p in processes])
    busy, a, b = ([float(t) for t in path.read_text().split()] for path in times[1:])
    spans = sorted((*pair,) for t in (a, b) for pair in zip(t[::2], t[1::2], strict=True))
    assert len(spans) == 4
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert not [t for t in busy for start, end in spans if start < t < end]
    assert [t for t in busy if t > spans[-1][1]]


def test_rows_of_turns_are_merged_by_family(tmp_path):
    for part, family, row in (("a", "norms", 1), ("b", "norms", 2), ("b", "models", 3)):
        rows = [{"id": row, "providers": {"copy": {"gb_s": 10 * row}}}]
        path = tmp_path / part / "h200" / f"{family}.json"
        records.write_json(path, {"family": family, "rows": rows})
    turns.merged([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    found = {
        path.stem: json.loads(path.read_text()) for path in (tmp_path / "out" / "h200").iterdir()
    }
    assert [row["id"] for row in found["norms"]["rows"]] == [1, 2]
    assert found["norms"]["copy_gb_s"] == 20
    assert [row["id"] for row in found["models"]["rows"]] == [3]


def test_rows_of_an_earlier_visit_stay_until_they_are_measured_again(tmp_path):
    def results(commit, **copies):
        rows = [{"id": k, "providers": {"copy": {"gb_s": v}}} for k, v in copies.items()]
        return {"commit": commit, "date": f"day of {commit}", "rows": rows}

    for commit, copies in (("a", {"x": 1, "y": 2}), ("b", {"y": 3, "z": 4}), ("c", {"z": 5})):
        records.write_json(tmp_path / commit / "norms.json", results(commit, **copies))
        records.main(tmp_path / commit, tmp_path)
    found = json.loads((tmp_path / "norms.json").read_text())
    copies = {row["id"]: row["providers"]["copy"]["gb_s"] for row in found["rows"]}
    assert copies == {"z": 5, "y": 3, "x": 1}
    commits = {row["id"]: row.get("commit", found["commit"]) for row in found["rows"]}
    assert commits == {"z": "c", "y": "b", "x": "a"}
    assert found["copy_gb_s"] == 5
