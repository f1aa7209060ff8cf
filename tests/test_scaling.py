"""`python -m benchmarks.scaling`: its points, its gate, its ranks, and that the report shows it."""

import argparse
import csv
import json
import re
import sys

import pytest
import torch
import torch.distributed as dist

from benchmarks import harness, scaling
from dfm_fast._library import INTERPRET
from dfm_fast.cli import report

pytestmark = pytest.mark.skipif(INTERPRET, reason="nothing of it is Triton's")
ARGS = argparse.Namespace(quick=True, device="cpu", seconds=0.0)


def test_a_quick_run_has_every_point_and_the_report_shows_it(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    out = tmp_path / scaling.OUT.relative_to(scaling.records.ROOT / report.DEFAULT)
    monkeypatch.setattr(scaling, "ranks", lambda args: [])  # a test of their own
    assert scaling.main(["--quick", "--seconds", "0", "--out", str(out)]) == 0
    found = json.loads((out / "scaling.json").read_text())
    kept = {(p["work"], p["axis"], p["value"]): p for p in found["points"]}
    assert len(kept) == len(found["points"]) == len(scaling.WORKS) * 5
    for work in scaling.WORKS:
        for axis, (low, high) in {"batch": (1, 2), "side": (8, 16)}.items():
            small, large = (kept[work, axis, v]["providers"]["ours"] for v in (low, high))
            assert 0 < small["peak_mib"] < large["peak_mib"], (work, axis)
        two = kept[work, "batch", 2]["providers"]["eager"]
        assert two["per_s"] == pytest.approx(2e3 / two["ms"]["median"], rel=1e-3)
    cold = dict(csv.reader((out / "cold_start.csv").read_text().splitlines()))
    assert 0 < float(cold["import dfm_fast, over it"]) < float(cold["import torch"]) < 100
    assert 1_000 < (out / "scaling.png").stat().st_size <= 200_000
    extras = report.extras(tmp_path)
    page = report._page.page([], {}, extras)
    assert re.search("<h2>How cost grows</h2><p>[^<]*</p><figure>", page)
    assert "<td>import dfm_fast, over it</td>" in page


def test_threads_are_set_for_a_point_and_then_as_before():
    before, seen = torch.get_num_threads(), []
    with scaling.threads(before + 1):
        seen.append(torch.get_num_threads())
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_what_computes_something_else_is_not_timed(monkeypatch):
    decoder = scaling.SnapGenDecoder
    plain = scaling.PLAIN[decoder]
    monkeypatch.setitem(scaling.PLAIN, decoder, lambda *given: 1.01 * plain(*given))
    point = next(p for p in scaling.points(True, "cpu") if p["work"] == "SnapGen decoder")
    with pytest.raises(harness.GateError, match="SnapGen decoder, batch 1"):
        scaling.measured(point, ARGS)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
def test_two_ranks_train_by_turns():
    (point,) = scaling.ranks(ARGS)
    assert (point["axis"], point["value"]) == ("ranks", 2)
    ours = point["providers"]["ours"]
    assert "peak_mib" not in ours  # profiling a rank may abort it
    assert "MiB" not in scaling.line(point)
    assert ours["per_s"] == pytest.approx(2e3 * point["batch"] / ours["ms"]["median"], rel=1e-3)


def test_a_process_that_fails_says_why():
    code = "import sys; print('no reason', file=sys.stderr); sys.exit(3)"
    with pytest.raises(RuntimeError, match="ended with 3:\nno reason"):
        scaling.run_process([sys.executable, "-c", code])
    with pytest.raises(RuntimeError, match=r"ended with -6:\n(.*\n)*.*in <module>"):
        scaling.run_process([sys.executable, "-c", "import os; os.abort()"])
