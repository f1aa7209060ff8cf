"""Who decides how a kernel is launched, with a GPU's name and a clock made up."""

import json
import os
import subprocess
import sys
import time
import warnings

import pytest
import torch
from helpers import ROOT, assert_within_budget, run_python
from torch import nn

import dfm_fast
from dfm_fast._library import INTERPRET
from dfm_fast._version import __version__
from dfm_fast.kernels import tuning
from dfm_fast.nn import activations as layers

pytest.importorskip("triton")
CPU, GPU = torch.device("cpu"), "Fake GPU 9"
BUCKET = "product bfloat16 64 128"  # of 65 to 128 rows
TIMES = {"slow": 2.0, "fast": 1.0, "faster": 0.5}


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A GPU nobody knows, an empty cache folder, nothing shipped, nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DFM_FAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tables")
    monkeypatch.setattr(tuning, "names", lambda _: (GPU, "sm_9"))
    monkeypatch.setattr(tuning, "sources", {})
    (tmp_path / "tables").mkdir()
    forget()
    yield
    forget()


def forget():
    """As a new process."""
    tuning._chosen.clear()
    for function in (tuning.autotune, tuning.tables, tuning._in_a_table):
        function.cache_clear()


@pytest.fixture
def timed(monkeypatch):
    """What a clock was asked to time; autotuning is on."""
    monkeypatch.setenv("DFM_FAST_AUTOTUNE", "1")
    asked, launched = [], []

    def clock(call, _):
        call()
        asked.append(launched[-1])
        return TIMES[launched[-1]]

    monkeypatch.setattr(tuning, "clock", clock)
    monkeypatch.setattr(tuning, "launched", launched, raising=False)
    return asked


def choose(rows=100, candidates=("slow", "fast"), kernel="product", width=64, run=None):
    run = run or getattr(tuning, "launched", []).append
    return tuning.choose(kernel, CPU, rows, (torch.bfloat16, width), candidates, run)


def ship(name, tiles):
    tuning.write_table(tuning.FOLDER / f"{name}.json", {"fake-gpu-9": GPU}.get(name, name), tiles)


def remember(tiles):
    path = tuning.cache_file(GPU)
    path.parent.mkdir(parents=True, exist_ok=True)
    tuning.write_table(path, GPU, tiles)
    return path


# --- Who decides ----------------------------------------------------------------------------------


def test_the_order_of_tables(timed):
    """By name, by architecture, the user's, the clock: each decides where those before do not."""
    assert choose() == "fast"  # timed
    remember({BUCKET: "c"})
    candidates = ("default", "a", "b", "c")
    for name, decision in ((None, "c"), ("sm_9", "b"), ("fake-gpu-9", "a")):
        if name:
            ship(name, {BUCKET: decision})
        forget()
        assert choose(candidates=candidates) == decision
    assert timed == ["slow", "fast"]
    assert tuning.sources == {(GPU, BUCKET): "timed"}  # as first met


def test_nothing_is_timed_unless_asked_for(monkeypatch):
    monkeypatch.setattr(tuning, "clock", lambda *_: pytest.fail("timed"))
    for value in (None, "0", ""):
        if value is not None:
            monkeypatch.setenv("DFM_FAST_AUTOTUNE", value)
        forget()
        assert choose(run=lambda _: pytest.fail("launched")) == "slow"
    assert not tuning.cache_file(GPU).parent.exists()
    remember({BUCKET: "fast"})
    forget()
    assert choose() == "fast"  # tables serve all the same


def test_buckets_round_rows_up_and_nothing_else(timed):
    assert [choose(rows) for rows in (65, 100, 128)] == ["fast"] * 3
    assert timed == ["slow", "fast"]
    choose(129)
    choose(64)
    choose(width=65)
    choose(kernel="another")
    assert len(timed) == 5 * 2
    assert {bucket for _, bucket in tuning.sources} == {
        BUCKET, "product bfloat16 64 256", "product bfloat16 64 64", "product bfloat16 65 128",
        "another bfloat16 64 128",
    }  # fmt: skip


def test_a_decision_is_kept_on_disk(timed):
    assert choose() == "fast"
    forget()
    assert choose() == "fast"
    assert timed == ["slow", "fast"]
    table = json.loads(tuning.cache_file(GPU).read_text())
    assert table.pop("triton")
    assert table == {"device": GPU, "dfm_fast": __version__, "tiles": {BUCKET: "fast"}}


def test_the_default_stays_where_another_is_hardly_faster(timed, monkeypatch):
    monkeypatch.setitem(TIMES, "fast", 1.95)
    assert choose() == "slow"
    forget()
    assert choose() == "slow"
    assert timed == ["slow", "fast"]


def test_what_fails_or_spills_is_no_choice_but_errors_of_the_default_are_shown(timed):
    class Spills:
        n_spills = 4

    def run(tile):
        if tile == "broken":
            raise RuntimeError("out of resource: shared memory")
        tuning.launched.append(tile)
        return Spills() if tile == "faster" else None

    assert choose(candidates=("slow", "broken", "faster", "fast"), run=run) == "fast"
    with pytest.raises(RuntimeError, match="out of resource"):
        choose(rows=1, candidates=("broken", "fast"), run=run)


def test_a_table_names_candidates_only(timed):
    """What an older version could launch is timed anew, and replaced."""
    path = remember({BUCKET: "gone", "other 1": "x"})
    assert choose() == "fast"
    assert json.loads(path.read_text())["tiles"] == {BUCKET: "fast", "other 1": "x"}


@pytest.mark.parametrize("recorded", ["is_current_stream_capturing", "is_compiling"])
def test_calls_that_are_recorded_are_not_timed(recorded, timed, monkeypatch):
    module = torch.compiler if recorded == "is_compiling" else torch.cuda
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, "is_available", lambda: True)
        m.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        m.setattr(module, recorded, lambda: True)
        assert choose() == "slow"
        remember({"product bfloat16 64 512": "fast"})
        forget()
        assert choose(512) == "fast"  # a table's
    assert not timed
    assert choose() == "fast"  # the next call is timed


def test_a_setting_that_is_none_is_one_error(monkeypatch):
    monkeypatch.setenv("DFM_FAST_AUTOTUNE", "yes")
    message = "dfm_fast: DFM_FAST_AUTOTUNE: expected one of 0, 1, got 'yes'"
    for call in (choose, lambda: dfm_fast.warmup(nn.Linear(2, 2), (1, 2))):
        with pytest.raises(ValueError, match=message):
            call()


def test_off_a_gpu_and_alone_a_candidate_is_not_asked_for(timed, monkeypatch):
    assert choose(candidates=("slow",)) == "slow"
    monkeypatch.setattr(tuning, "names", lambda _: ())
    assert choose() == "slow"
    assert not timed
    assert not tuning.sources


def test_the_second_call_costs_less_than_a_microsecond():
    run = print
    key = "product", CPU, 100, (torch.bfloat16, 64, "NHWC", 512, 1024), ("slow", "fast"), run
    tuning.choose(*key)

    def seconds(calls=2000):
        start = time.perf_counter()
        for _ in range(calls):
            tuning.choose(*key)
        return (time.perf_counter() - start) / calls

    assert min(seconds() for _ in range(20)) < 1e-6


def test_the_report_says_who_decided(timed):
    ship("sm_9", {"product bfloat16 64 8": "fast"})
    model = lambda x: [choose(rows) for rows in (8, 100)]  # noqa: E731
    first, second = (dfm_fast.warmup(model, (1, 1)) for _ in range(2))
    assert first.tiles == {"product bfloat16 64 8": "shipped", BUCKET: "timed"}
    assert first.timed == 1
    assert second.tiles == {}


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1, 2]",
        '{"tiles": [1]}',
        {"tiles": {BUCKET: 3}},
        {"device": "Another GPU"},
        {"dfm_fast": "0.0.1"},
        {"triton": "1.0"},
    ],
    ids=str,
)
def test_a_file_that_is_no_table_is_one_warning(content, timed):
    path = remember({BUCKET: "faster"})
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_text(content)
    with pytest.warns(UserWarning, match="ignored as a table of tiles") as caught:
        found = [choose(rows, ("slow", "fast", "faster")) for rows in (100, 50)]
    assert found == ["faster", "faster"]
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    assert timed[:3] == ["slow", "fast", "faster"]  # it was timed, not read
    tuning.read_table(path, {"device": GPU})  # and is a table again


def test_a_folder_that_cannot_be_written_is_one_warning(timed, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(UserWarning, match="cannot be kept") as caught:
        assert choose() == "fast"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == choose(70) == "fast"


def test_a_write_that_is_cut_short_leaves_the_file(timed, monkeypatch):
    path = remember({"other 1": "x"})
    before = path.read_text()

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as m:
        m.setattr(os, "replace", fail)
        with pytest.warns(UserWarning, match="no space left"):
            assert choose() == "fast"
    assert path.read_text() == before
    assert {p.name for p in path.parent.iterdir()} == {path.name, f"{path.name}.lock"}


TUNER = """
import sys, torch
from dfm_fast.kernels import tuning
tuning.names = lambda _: ("Fake GPU 9", "sm_9")
tuning.clock = lambda call, _: call() or times[launched[-1]]
launched, (own, other) = [], sys.argv[1:]
times = {"default": 3.0, own: 1.0, other: 2.0}
for i in range(30):
    rows, names = (torch.bfloat16, i), ("default", "a", "b")
    for kernel in ("shared", own):
        chosen = tuning.choose(kernel, torch.device("cpu"), 8, rows, names, launched.append)
        print(kernel, i, chosen)
"""


def test_processes_that_tune_at_once_agree_and_lose_nothing():
    """They prefer different candidates: whoever comes first decides for both."""
    env = {**os.environ, "DFM_FAST_AUTOTUNE": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TUNER, *names],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True,
        )
        for names in (("a", "b"), ("b", "a"))
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    shared = [[line for line in lines if line.startswith("shared")] for lines in said]
    assert len(shared[0]) == 30
    assert shared[0] == shared[1]
    tiles = tuning.read_table(tuning.cache_file(GPU), {"device": GPU})
    assert len(tiles) == 3 * 30
    assert {v for k, v in tiles.items() if k.startswith("a ")} == {"a"}


def test_shipped_tables_are_well_formed():
    folder = ROOT / "kernels" / "tables"
    for path in folder.glob("*"):
        tiles = tuning.read_table(path, {})
        device = json.loads(path.read_text())["device"]
        assert path.name == f"{tuning._slug(device)}.json"
        assert tiles


def test_tune_writes_a_table_of_what_it_timed(timed, monkeypatch):
    from dfm_fast.cli import tune

    ship("sm_9", {BUCKET: "slow"})
    remember({BUCKET: "slow"})
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert tune.tiles_of(CPU, [choose, lambda: choose(3)]) == {
        BUCKET: "fast", "product bfloat16 64 4": "fast",
    }  # fmt: skip


def test_tune_without_a_gpu_is_one_error(monkeypatch, capsys):
    from dfm_fast.cli import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--out", "x.json"]) == 1
    assert capsys.readouterr().out == "tune: expected a GPU, got none\n"


# --- Kernels --------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRET, reason="it starts such a process")
def test_every_candidate_computes_the_same_in_the_interpreter():
    select = "served_by_a_table or gated_projection"
    command = "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", select
    result = run_python(*command, env={"TRITON_INTERPRET": "1"})
    assert result.returncode == 0, result.stdout[-4000:]
    assert "skipped" not in result.stdout


def served(monkeypatch, kernel, call):
    """{candidate: result} of all that a table can name for this call."""
    seen, choose = [], tuning.choose

    def look(name, device, rows, exact, candidates, run):
        chosen = choose(name, device, rows, exact, candidates, run)
        if name == kernel:
            seen.append((tuning.bucket_of(name, rows, exact), candidates, chosen))
        return chosen

    monkeypatch.setattr(tuning, "choose", look)
    call()
    ((bucket, candidates, default),) = seen
    assert default == candidates[0]
    results = {}
    for candidate in candidates:
        ship("sm_9", {bucket: str(candidate)})
        forget()
        results[candidate] = call()
        assert seen[-1][2] == candidate
    return results


@pytest.mark.skipif(not INTERPRET, reason="of Triton's kernels, interpreted")
@pytest.mark.parametrize(
    ("op", "layout"),
    [
        ("separable_conv2d", "contiguous"),
        ("separable_conv2d", "channels_last"),
        ("upsample_conv2d", "contiguous"),
        ("upsample_conv2d", "channels_last"),
        ("linear_glu", "contiguous"),
    ],
)
def test_every_candidate_served_by_a_table_is_the_definition(op, layout, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        value = torch.randn(shape, generator=generator).half()
        last = layout == "channels_last" and len(shape) == 4
        return value.contiguous(memory_format=torch.channels_last) if last else value

    given, call, reference = OPERATORS[op](normal)
    exact = reference(*(v.double() for v in given))
    results = served(monkeypatch, op, lambda: call(*given))
    assert len(results) > 2
    for tile, y in results.items():
        assert_within_budget(y, reference(*given), exact, cap=64, what=f"{op} {tile}")


def _separable(normal):
    from dfm_fast.ops.separables import separable_conv2d_ref as reference

    given = normal(1, 40, 4, 16), normal(40, 1, 3, 3), normal(24, 40, 1, 1) / 8, normal(24)
    return given, dfm_fast.separable_conv2d, reference


def _upsample(normal):
    from dfm_fast.ops.upsamples import upsample_conv2d_ref as reference

    given = normal(2, 40, 5, 9), normal(24, 40, 3, 3) / 16, normal(24)
    return given, dfm_fast.upsample_conv2d, reference


def _glu(normal):
    from dfm_fast.ops.activations import _linear_glu

    given = normal(70, 72), normal(2 * 40, 72) / 8, normal(2 * 40)
    return (
        given,
        lambda *v: torch.ops.dfm_fast.linear_glu(*v, "silu"),
        lambda *v: _linear_glu(*v, "silu"),
    )


OPERATORS = {"separable_conv2d": _separable, "upsample_conv2d": _upsample, "linear_glu": _glu}


@pytest.mark.skipif(not INTERPRET, reason="of Triton's kernels, interpreted")
def test_a_gated_projection_takes_the_kernel_where_a_table_says_so(monkeypatch):
    calls, run = [], layers._ops.linear_glu
    monkeypatch.setattr(layers._ops, "linear_glu", lambda *a: calls.append(0) or run(*a))
    layer = layers.FeedForward(16, activation_fn="swiglu").eval().half()
    x = torch.randn(2, 9, 16).half()
    with torch.no_grad():
        want = layer(x)
        assert not calls
        ship("sm_9", {"gated_projection float16 16 64 32": "True"})
        forget()
        torch.testing.assert_close(layer(x), want, atol=4e-3, rtol=4e-3)
        assert len(calls) == 1
        layer(x[:1])  # another bucket
    layer(x)  # with gradients it is not for it
    assert len(calls) == 1
