"""`dfm-fast profile`: a model with and without our kernels, and what users get wrong."""

import json
import sys
from pathlib import Path

import pytest
import torch
from small_models import inputs, small
from torch import nn

from dfm_fast._library import INTERPRET
from dfm_fast.cli import main
from dfm_fast.profiling import ceilings, comparisons, scripts, targets, words
from dfm_fast.profiling.ceilings import Ceilings
from dfm_fast.profiling.comparisons import Comparison, Parity, Side, parity, together
from dfm_fast.profiling.profiles import Profile
from dfm_fast.profiling.recorder import Call

pytestmark = pytest.mark.skipif(INTERPRET, reason="the same code whatever the kernels")
FLAT = Ceilings("cpu", [(1, 1e-9), (1 << 40, 1e-9 * (1 << 40))])
FLAT.products |= dict.fromkeys((torch.float32, torch.bfloat16), 1e9)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Known ceilings, and the fewest rounds."""
    monkeypatch.setattr(ceilings, "measured", lambda device: FLAT)
    monkeypatch.setattr(comparisons, "ROUNDS", (3, 3))
    monkeypatch.setattr(comparisons, "PASSES", (2, 2))


def profile(capsys, *argv):
    """(status, what is printed, and to stderr)."""
    status = main(["profile", *map(str, argv)])
    return status, *capsys.readouterr()


# --- Before and after -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "dtype", "train"),
    [
        ("snapgen_tiny", 4, torch.float32, False),
        ("snapgen_decoder", 4, torch.float32, False),
        ("snapgen_decoder", 4, torch.bfloat16, True),
    ],
)
def test_presets_against_their_plain_forms(name, size, dtype, train):
    """The plain form has none of our operators."""
    target = targets.load(name, 2, size, CPU, dtype)
    found = comparisons.compare(target, train=train, before=True, seconds=0)
    assert found.parity.holds
    assert not found.parity.zero
    ours = [{c.name for c in s.profile.calls if "dfm_fast" in c.name} for s in sides(found)]
    assert not ours[0]
    assert ours[1]
    assert any("backward" in n for n in ours[1]) == train


def sides(found):
    return found.before, found.after


def test_a_dfm_in_bfloat16_on_another_grid_than_its_table():
    """Its plain form, too, computes in the parameters' dtype."""
    model = small(input_size=(3, 3)).bfloat16()
    levels, *rest, y = inputs(model, batch=1, dtype=torch.bfloat16)
    target = targets.Target("small", model, (levels, *rest), {"y": y})
    found = comparisons.compare(target, train=False, before=True, seconds=0)
    assert found.parity.holds
    assert found.before.title == "before: forward in plain torch"


def test_inputs_of_a_dfm_fit_its_levels_and_table():
    target = targets.load("DFM_S", 3, 8, CPU, torch.bfloat16)
    (coarse, fine), t, active = target.args
    assert (coarse.shape, fine.shape) == ((3, 4, 4, 4), (3, 4, 8, 8))
    assert (coarse.dtype, t.dtype, active.dtype) == (torch.bfloat16, torch.float32, torch.bool)
    assert target.module.input_size == (4, 4)
    assert all(p.any() for p in target.module.parameters())


@pytest.mark.parametrize("train", [False, True])
def test_a_users_model_as_it_is_and_accelerated(train):
    """Dropout in training draws the same in both."""
    target = targets.load("profiled:with_inputs", 1, None, CPU, None)
    weight = target.module[0].weight
    found = comparisons.compare(target, train=train, before=True, seconds=0)
    names = [{c.name for c in side.profile.calls} for side in sides(found)]
    assert {"aten::native_group_norm", "aten::silu"} <= names[0]
    assert "dfm_fast::group_norm_silu" in names[1]
    assert len(found.report.swapped) == 3
    assert found.parity.holds
    assert target.module[0].weight is weight
    assert len(found.before.seconds) == len(found.after.seconds) == 3


def test_torch_compile_takes_its_turn(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    target = targets.load("profiled:with_inputs", 1, None, CPU, None)
    found = comparisons.compare(target, train=False, before=True, compiled=True, seconds=0)
    assert len(found.compiled) == 3
    assert any("Against torch.compile" in line for line in words.sentences(found))


def test_parity_is_the_distance_of_all_tensors():
    one, other = ([torch.tensor([3.0]), torch.tensor([y])] for y in (4.0, 4.5))
    assert parity(one, other).distance == pytest.approx(0.1)
    assert not parity(one, other[:1]).holds
    assert parity(one, one) == Parity(0.0, 2e-3)
    assert not parity(one, [torch.tensor([float("nan")])] * 2).holds
    assert parity([torch.zeros(2)], [torch.zeros(2)]).zero
    assert not parity([torch.zeros(2)], [torch.ones(2)]).holds


def test_results_that_differ_are_said_and_are_an_error(monkeypatch, capsys):
    real = comparisons.accelerate

    def wrong(module):
        report = real(module)
        nn.init.normal_(module[0].bias)
        module[0] = nn.Conv2d(3, 8, 3, padding=1)
        return report

    monkeypatch.setattr(comparisons, "accelerate", wrong)
    status, out, err = profile(capsys, "profiled:layers", "--size", 8)
    assert status == 1
    assert "Before and after do NOT give the same: relative distance" in out
    assert "do NOT give the same" in err


def test_zeros_prove_nothing(capsys):
    status, out, _ = profile(capsys, "profiled:zeros")
    assert status == 0
    assert "both give zeros alone: whether they compute the same is not shown" in out


def known(calls, seconds):
    p = Profile()
    p.calls, p.seconds, p._trace = list(calls), seconds, object()
    p.ceilings = FLAT
    return p


def test_an_interruption_in_one_pass_is_left_out():
    def calls(*seconds):
        return [Call(n, "", s, 0, 0, None, 0) for n, s in zip("ab", seconds, strict=True)]

    passes = [known(calls(1, 2), 4), known(calls(1.5, 9), 20), known(calls(7, 2.5), 15)]
    p = together(passes)
    assert [c.seconds for c in p.calls] == [1.5, 2.5]
    assert p.seconds == 1.5 + 2.5 + 1
    other = known([Call("c", "", 3.0, 0, 0, None, 0)], 5)
    assert together([passes[0], other, known(calls(7, 2), 9)]).operator_seconds in (3, 4, 9)


def compared(before, after):
    one = Call("aten::mul", "", sum(before) / 2, 0, 0, None, 0)
    two = Call("dfm_fast::rms_norm", "", sum(after) / 2, 0, 0, None, 0)
    made = [
        Side(t, known([c], 100.0), s, 1.0)
        for t, c, s in (("before", one, before), ("after", two, after))
    ]
    return Comparison(made[1], made[0], Parity(1e-7, 2e-3), None)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], "it is 2.00 times faster (2.00 to 2.00"),
        ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], "it is 2.00 times slower (0.50 to 0.50"),
        ([1.0, 1.0, 1.0], [0.9, 1.0, 1.2], "there is no difference that shows: 1.00 times"),
        ([3.0], [1.0], "in one run each, with all that first calls cost"),
    ],
)
def test_how_much_faster_is_said_as_it_is(before, after, said):
    assert said in words.sentences(compared(before, after))[0]


def test_what_the_time_went_into_is_said():
    _, moved, same, *_ = words.sentences(compared([2.0] * 3, [1.0] * 3))
    assert moved.startswith(
        "Less time went into aten::mul by 3,000 ms; more into dfm_fast::rms_norm"
    )
    assert same.startswith(
        "Before and after give the same up to rounding: relative distance 1.0e-07"
    )


# --- The command ----------------------------------------------------------------------------------


def test_everything_is_written(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new"
    status, text, _ = profile(capsys, "profiled:with_inputs", "--train", "--out", out)
    assert status == 0
    files = ["operators.png", "profile.json", "report.txt", "trace-after.json", "trace-before.json"]
    assert sorted(f.name for f in out.iterdir()) == files
    assert (out / "report.txt").read_text().strip() in text
    assert (out / "operators.png").stat().st_size <= 200_000
    figures = json.loads((out / "profile.json").read_text())
    assert figures["parity"]["distance"] <= figures["parity"]["allowed"]
    for name in ("before", "after"):
        side = figures[name]
        total = sum(row["seconds"] for row in side["operators"])
        assert total == pytest.approx(side["operator_seconds"])
        assert json.loads((out / f"trace-{name}.json").read_text())["traceEvents"]
    assert "before: forward and backward as it is" in text
    assert "after: forward and backward with dfm_fast" in text
    assert "The largest cost is" in text


def test_without_before_there_is_no_comparison(capsys):
    status, out, _ = profile(capsys, "profiled:with_named_inputs", "--no-before", "--limit", 3)
    assert status == 0
    assert "before:" not in out
    assert "dfm_fast::" in out


def test_a_model_that_nothing_is_known_of(capsys):
    status, out, _ = profile(capsys, "profiled:unknown", "--batch", 2, "--size", 5)
    assert status == 0
    assert "inputs 2x5x8 (an input guessed from the first layer)" in out
    assert "no module is of a class that dfm_fast knows" in out
    assert "there is nothing to compare with" in out


BAD = [
    (("DFM_M",), "TARGET: expected a preset (DFM_S, DFM_B, DFM_L, DFM_XL, snapgen_t2i"),
    (("no.such.module:make",), "TARGET: expected a module that can be imported, got 'no.such"),
    (("profiled:nothing",), "TARGET: expected a callable of profiled, such as"),
    (("profiled:no_module",), "expected a callable that returns a torch.nn.Module, or (module,"),
    (("profiled:embedding",), "expected (module, inputs) for a module whose first layer is no"),
    (("no_such.py",), "TARGET: expected a script that is there, got 'no_such.py'"),
    (("DFM_S", "--device", "cuda:99"), "--device: expected a device that is here (cpu"),
    (("DFM_S", "--device", "abacus"), "--device: expected one of cpu"),
    (("DFM_S", "--size", "9"), "--size: expected an even number"),
    (("snapgen_tiny", "--size", "6"), "--size: expected a multiple of 4"),
    (("DFM_S", "--batch", "0"), "--batch: expected at least 1, got 0"),
    (("DFM_S", "--limit", "0"), "--limit: expected at least 1, got 0"),
    (("DFM_S", "--args", "x"), "--args: expected none but for a script"),
    (("DFM_S", "--compile", "--no-before"), "--compile: expected the form before"),
]


@pytest.mark.parametrize(("argv", "said"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_what_users_get_wrong_is_one_line(argv, said, capsys):
    status, out, err = profile(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("dfm-fast profile: ")
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_told_before_any_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "load", None)
    (tmp_path / "file").touch()
    status, _, err = profile(capsys, "DFM_S", "--out", tmp_path / "file" / "out")
    assert status == 2
    assert "--out: expected a folder" in err
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "error"), [("broken", "a factory's own error"), ("wrong_inputs", "RuntimeError")]
)
def test_errors_of_the_users_own_code_show_where(name, error, capsys, tmp_path):
    status, _, err = profile(capsys, f"profiled:{name}", "--out", tmp_path / "out")
    assert status == 1
    assert err.startswith("Traceback")
    assert "profiled.py" in err or "conv.py" in err
    assert "profiling/targets.py" not in err
    assert error in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# --- Scripts --------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
from profiled import layers

x = torch.randn(2, 3, 8, 8)
model = layers()
for _ in range(2):
    model(x).sum().backward()
torch.save(sys.argv[1:], sys.argv[1])
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_as_it_is_and_with_its_modules_accelerated(script, tmp_path, capsys):
    argv, call = list(sys.argv), nn.Module.__call__
    out = tmp_path / "given"
    status, text, _ = profile(capsys, script, "--args", f"{out} 'a b'")
    assert status == 0
    assert torch.load(out) == [str(out), "a b"]
    before, after = text.split("after: the script, its modules accelerated")
    assert "aten::native_group_norm" in before
    assert "dfm_fast::" not in before
    assert "dfm_fast::group_norm_silu" in after
    assert "Swapped 3 modules" in after
    assert "Before and after give the same up to rounding" in after
    assert (sys.argv, nn.Module.__call__) == (argv, call)


def test_layers_are_swapped_before_the_first_call(script, tmp_path):
    p, watch = scripts.run(script, [str(tmp_path / "given")], accelerating=True)
    names = [c.name for c in p.calls]
    assert names.count("dfm_fast::group_norm_silu") == names.count("aten::convolution") == 2
    assert len(watch.report.swapped) == 3


def test_other_inputs_are_not_compared(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("import torch\ntorch.seed()\ntorch.nn.Linear(2, 2)(torch.randn(2))\n")
    found = scripts.compare_script(path, [], before=True)
    assert found.parity is None
    assert found.note == scripts.NOT_COMPARED


def test_a_script_with_no_module(tmp_path, capsys):
    path = tmp_path / "script.py"
    path.write_text("import torch\ntorch.ones(2) + 1\n")
    status, out, _ = profile(capsys, path)
    assert status == 0
    assert "It calls no module of torch." in out


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise KeyError('mine')", "KeyError: 'mine'"),
        ("import sys; sys.exit(3)", "ended with status 3"),
    ],
)
def test_a_script_that_fails(code, said, tmp_path, capsys):
    path = tmp_path / "script.py"
    path.write_text(f"{code}\n")
    status, _, err = profile(capsys, path, "--out", tmp_path / "out")
    assert status == 1
    assert said in err.splitlines()[-1]
    assert err.startswith("Traceback") == ("raise" in code)
    assert "runpy" not in err
    assert not (tmp_path / "out").exists()


def test_a_script_that_ends_well_by_exit(tmp_path, capsys):
    path = tmp_path / "script.py"
    path.write_text("import sys, torch\ntorch.ones(2) + 1\nsys.exit()\n")
    assert profile(capsys, path)[0] == 0


def test_a_script_decides_its_device_and_inputs(script, capsys):
    status, _, err = profile(capsys, script, "--batch", 4)
    assert status == 2
    assert "--batch: expected none for a script, which decides itself, got 4" in err
    assert Path(script).exists()
