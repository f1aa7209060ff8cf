"""`dfm-fast report`: what it makes of results, and of what are none."""

import argparse
import builtins
import copy
import json
import re

import pytest
from helpers import ROOT

from dfm_fast.cli import _glossary, _page, _results, _summary, report

SPREAD = {"median": 1.0, "q1": 0.9, "q3": 1.2}


def spread(median):
    return {k: median * v for k, v in SPREAD.items()}


def provider(ms, **more):
    return {"ms": spread(ms), "gb_s": 20.0 / ms, **more}


def goal(against, at_least, measured):
    met = None if measured is None else measured >= at_least
    return {"against": against, "at_least": at_least, "measured": measured, "met": met}


ROW = {
    "id": "laplacian_build-binomial-photos_512-float32-contiguous-forward",
    "op": "laplacian_build",
    "variant": "binomial",
    "case": "photos_512",
    "shape": [8, 3, 512, 512],
    "dtype": "float32",
    "layout": "contiguous",
    "direction": "forward",
    "copy_fraction": spread(0.71),
    "speedup": {
        "eager": spread(12.0),
        "compiled": spread(5.5),
        "opencv": spread(3.1),
        "kornia": spread(140.0),
    },
    "strongest": "opencv",
    "steady": True,
    "missing": {"pywavelets": "pywt is not installed"},
    "providers": {
        "ours": provider(1.25),
        "copy": provider(0.5),
        "eager": provider(15.0),
        "compiled": provider(7.0, form="slices"),
        "opencv": provider(4.0),
        "kornia": provider(170.0, note="half a pixel off"),
    },
    "goals": [goal("copy", 0.6, 0.71), goal("opencv", 4.0, 3.1), goal("absent", 2.0, None)],
}
SECOND = {
    **ROW,
    "direction": "backward",
    "layout": "channels_last",
    "dtype": "bfloat16",
    "speedup": {"eager": spread(0.4), "float32": spread(1.5)},
    "strongest": None,
    "steady": False,
    "goals": [],
}
RECORD = {
    "schema": 1,
    "family": "pyramids",
    "machine": {"slug": "some-cpu", "name": "Some CPU", "device": "cpu", "capability": "AVX512"},
    "versions": {"python": "3.12.1", "torch": "2.13.0"},
    "commit": "0123456789abcdef",
    "dirty": False,
    "threads": 2,
    "date": "2026-01-02T03:04:05+00:00",
    "full": False,
    "copy_gb_s": 58.0,
    "rows": [ROW, SECOND],
}
GPU = {"slug": "h200", "name": "NVIDIA H200", "device": "cuda", "cuda": "13.0", "memory_gib": 140}


def write(folder, record=RECORD):
    path = folder / record["machine"]["slug"] / f"{record['family']}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    return path


def run(*argv):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([str(a) for a in argv]))


def test_report_writes_markdown_plots_and_one_page(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write(tmp_path)
    assert run(tmp_path, "--out", tmp_path / "out") == 0
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert markdown in capsys.readouterr().out
    plots = sorted((tmp_path / "out").glob("*.png"))
    assert [p.name for p in plots] == [
        "some-cpu-pyramids-roofline.png",
        "some-cpu-pyramids-speedups.png",
    ]
    assert all(1_000 < p.stat().st_size <= 200_000 for p in plots)
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search("<(script|link)|(src|href)='http|url\\(|@import", page)
    assert all(len(alt) > 20 for alt in re.findall("<img [^>]*alt='([^']*)'", page))
    assert "prefers-color-scheme: dark" in page
    assert "position: sticky" in page
    assert "width=device-width" in page


def test_a_row_is_compact_and_the_strongest_library_is_named():
    lines = report.markdown([RECORD]).splitlines()
    cells = "71% | 12 | 5.5 | 3.1 opencv |"
    assert f"| laplacian_build binomial photos_512 | fp32 | {cells}" in lines
    name = "laplacian_build binomial photos_512 channels_last backward"
    assert f"| {name} | bf16 | 71% | 0.4 |  |  |" in lines
    assert "| row | dtype | of copy |" in "\n".join(lines)


def test_milliseconds_are_for_gpus():
    lines = report.markdown([{**RECORD, "machine": GPU}]).splitlines()
    assert any("| row | dtype | ms | of copy |" in line for line in lines)
    assert any("| fp32 | 1.25 | 71% |" in line for line in lines)


def test_a_gpus_page_has_launches_and_memory():
    ours = provider(1.25, call_ms=1.5, launches=1, peak_mib=67.0)
    row = {**ROW, "providers": {**ROW["providers"], "ours": ours}}
    page = _page.page([{**RECORD, "machine": GPU, "rows": [row]}], {}, _page.Extras())
    assert "launches, ours" in page
    assert "<td>1.5</td><td></td><td></td><td>1</td><td></td><td></td><td>67</td>" in page
    page = _page.page([{**RECORD, "rows": [row]}], {}, _page.Extras())
    assert "launches, ours" not in page
    assert "peak MiB, ours" in page
    assert "<td>67</td>" in page


def test_missed_goals_absent_rivals_and_a_busy_machine_are_shown():
    text = report.markdown([RECORD])
    assert "Goals met: 1 of 3." in text
    name = "laplacian_build binomial photos_512 fp32"
    assert f"- missed: {name}: 3.1 {_results.TIMES} opencv, goal 4 {_results.TIMES} opencv" in text
    assert f"- open: {name}: not measured" in text
    busy = "laplacian_build binomial photos_512 channels_last backward bf16"
    assert f"measured on a busy machine, repeat: {busy};" in text
    assert "kornia: half a pixel off" in text
    assert "no pywavelets: pywt is not installed" in text


def test_photographs_and_their_errors_are_on_the_page(tmp_path):
    write(tmp_path)
    folder = tmp_path / "photographs"
    folder.mkdir()
    (folder / "china.png").write_bytes(b"\x89PNG")
    (folder / "reconstruction.csv").write_text("input,error\nchina <1>,1e-7\n")
    assert run(tmp_path) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "alt='A pyramid of the photograph china: " in page
    assert "<td>china &lt;1&gt;</td>" in page


def test_one_machines_folder_will_do(tmp_path):
    path = write(tmp_path)
    assert _results.load(path.parent) == _results.load(tmp_path) == [RECORD]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "expected JSON"),
        ("[]", "got 'list'"),
        ('{"schema": 99}', "got 99"),
        ('{"schema": 1}', "missing 'family'"),
    ],
)
def test_a_bad_file_is_one_error_and_exit_code_2(tmp_path, capsys, content, says):
    path = tmp_path / "machine" / "pyramids.json"
    path.parent.mkdir()
    path.write_text(content)
    assert run(tmp_path) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("key", ["providers", "speedup", "goals", "strongest", "op"])
def test_a_damaged_row_is_an_error_that_names_the_key(tmp_path, capsys, key):
    record = copy.deepcopy(RECORD)
    del record["rows"][0][key]
    write(tmp_path, record)
    assert run(tmp_path) == 2
    assert repr(key) in capsys.readouterr().err


def sped(**speedups):
    """A row with these ratios; a library is the strongest where there is one."""
    names = [n for n in speedups if n not in ("eager", "compiled")]
    spreads = {n: spread(v) if isinstance(v, float) else v for n, v in speedups.items()}
    return {**ROW, "speedup": spreads, "strongest": names[0] if names else None}


def test_a_row_is_won_only_where_the_fastest_other_is_slower_in_most_rounds():
    assert _summary.verdict(sped(eager=3.0, compiled=1.2)) == "faster"
    assert _summary.verdict(sped(eager=3.0, compiled=1.05)) == "level"  # a quartile is below 1
    assert _summary.verdict(sped(eager=3.0, opencv=0.8)) == "slower"
    assert _summary.verdict(sped(eager=3.0, compiled=1.2, float32=0.5)) == "faster"  # no rival


def test_the_summary_has_counts_medians_ranges_and_losses_by_name():
    rows = [sped(eager=4.0), sped(eager=2.0, compiled=0.5), sped(eager=9.0, opencv=1.05)]
    records = [{**RECORD, "rows": rows}]
    said = "\n".join(_summary.sentences(records))
    assert "3 rows measured. Ours is the fastest in 1, level with the fastest other in 1," in said
    assert "slower than somebody in 1" in said
    assert f"eager PyTorch (3 rows): 4{_results.TIMES} as fast in the median" in said
    assert f"from 2{_results.TIMES} (" in said
    assert f"to 9{_results.TIMES} (" in said
    assert "torch.compile (1 row): 0.5" in said
    (loss,) = _summary.losses(rows)
    name = "laplacian_build binomial photos_512 fp32"
    assert loss == f"{name}: torch.compile is 2.00{_results.TIMES} as fast"
    assert f"- {loss}" in report.markdown(records)
    assert loss in _page.page(records, {}, _page.Extras())


def test_each_row_is_held_to_the_limit_it_is_nearest_to():
    product = {**ROW, "product_fraction": spread(0.9)}
    old = {**ROW, "op": "dfm"}
    said = "\n".join(_summary.sentences([{**RECORD, "rows": [ROW, product, old]}]))
    assert "1 row is bound by memory" in said
    assert "71% at best" in said
    assert "1 row is bound by arithmetic" in said
    assert "90% at best" in said
    assert "1 row is bound by matrix products, whose limit was not measured" in said
    assert "| of copy | of peak |" in report.markdown([{**RECORD, "rows": [product]}])


def test_losses_are_marked_as_clearly_as_wins():
    page = _page.page([{**RECORD, "rows": [sped(eager=2.0), sped(eager=0.5)]}], {}, _page.Extras())
    assert page.count("<td class='faster'>▲ faster</td>") == 1
    assert page.count("<td class='slower'>▼ slower</td>") == 1
    assert "<td class='slower'>0.5</td>" in page


def test_every_operator_and_family_that_is_measured_is_explained():
    sources = {p.stem.removeprefix("bench_"): p for p in ROOT.glob("benchmarks/bench_*.py")}
    assert sources.keys() == _glossary.FAMILIES.keys()
    text = "".join(p.read_text() for p in sources.values())
    assert set(re.findall(r'op="(\w+)"', text)) <= _glossary.OPERATORS.keys()
    for path in ROOT.glob("benchmarks/results/*/*.json"):
        for row in json.loads(path.read_text())["rows"]:
            assert row["op"] in _glossary.OPERATORS
    assert _glossary.OPERATORS.keys() >= _glossary.PRODUCTS
    shown = _results.columns({**RECORD, "machine": GPU, "rows": [{"product_fraction": 1}]})
    assert set(shown) <= {term.format(times=_results.TIMES) for term in _glossary.TERMS}


def test_a_missing_or_empty_folder_is_an_error(tmp_path, capsys):
    assert run(tmp_path / "absent") == 2
    assert "absent" in capsys.readouterr().err
    assert run(tmp_path) == 2
    assert "found none" in capsys.readouterr().err


def test_without_matplotlib_the_text_is_still_written(tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "dfm_fast.cli" and args[2] == ("_plots",):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    write(tmp_path)
    assert run(tmp_path) == 0
    assert "need matplotlib" in capsys.readouterr().err
    assert (tmp_path / "report" / "report.md").exists()
    assert "data:image" not in (tmp_path / "report" / "index.html").read_text()
