"""Predictions with no GPU: what launchers launch, how machine code is counted, what bounds it."""

import dataclasses
import json
import os

import pytest
import torch
from helpers import run_python

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

import dfm_fast  # noqa: E402
from benchmarks import bench_norms, predictions  # noqa: E402
from dfm_fast.cli import main  # noqa: E402
from dfm_fast.kernels import _code, _predictions  # noqa: E402

TTGIR = """
  tt.func public @k(%x_ptr: !tt.ptr<bf16>, %rows: i32) {
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c4_i32 = arith.constant 4 : i32 loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc1)
    %last = arith.addi %rows, %c4_i32 : i32 loc(#loc1)
    %a = tt.load %x_ptr : tensor<8x16x!tt.ptr<bf16>, #blocked> loc(#loc1)
    %s = scf.for %i = %pid to %last step %c4_i32 iter_args(%t = %a) -> (f32)  : i32 {
      %b = tt.load %x_ptr : tensor<64x!tt.ptr<f32>, #blocked> loc(#loc1)
      scf.for %j = %c0_i32 to %c4_i32 step %c4_i32 : i32 {
        tt.store %x_ptr, %b : tensor<32x!tt.ptr<bf16>, #blocked> loc(#loc1)
      } loc(#loc1)
    } loc(#loc1)
    %n = tt.load %x_ptr : !tt.ptr<i32> loc(#loc1)
    scf.for %i = %c0_i32 to %n step %c4_i32 : i32 {
    } loc(#loc1)
"""


def sass(*lines):
    code = [line if line.startswith(".L") else f"        /*0000*/   {line} ;" for line in lines]
    return "\n".join(code)


def test_trips_and_bytes_of_ttgir():
    loops, asked = _code.read_loops(TTGIR, {"rows": 32})
    assert loops == [(9, -1), (1, 0), (None, -1)]
    assert asked == 8 * 16 * 2 + 9 * (64 * 4 + 32 * 2)
    assert _code.read_loops(TTGIR, {})[0][0].trips is None


def test_instructions_are_weighed_by_trips():
    body = ["LDG.E.128 R4, desc[UR4][R2.64]", "FADD R8, R4, R5", "MUFU.EX2 R9, R8"]
    body += ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", "HMMA.1688.F32.TF32 R4, R4, R6, R8"]
    loop = [".L_x_0:", *body, "@P0 BRA `(.L_x_0)"]
    text = sass("S2R R1, SR_TID.X", *loop, "EXIT", ".L_x_1:", "BRA `(.L_x_1)", "NOP")
    code = _code.read_code(text, [_code.Loop(10, -1), _code.Loop(1, -1)], 1000)
    assert (code.instructions, code.special, code.exact) == (2 + 10 * 6, 10, True)
    assert code.products == 10 * (2 * 64 * 128 * 16 / 4 + 2 * 2 * 16 * 8 * 8)
    assert code.load_bits == 128
    assert 10 * 1000 < code.alone < 11 * 1000
    assert not _code.read_code(text, [_code.Loop(None, -1)], 1000).exact
    assert not _code.read_code(text, [], 1000).exact


def test_a_load_asked_for_ahead_is_waited_for_less():
    work = ["FADD R9, R9, R9"] * 100
    late = sass("LDG.E R4, desc[UR4][R2.64]", "FADD R8, R4, R4", *work)
    early = sass("LDG.E R4, desc[UR4][R2.64]", *work, "FADD R8, R4, R4")
    clocks = [_code.read_code(text, [], 150).alone for text in (late, early)]
    assert clocks == [2 + 150 + 2 * 100, 2 * 102]
    copies = sass("LDGSTS.E.128 [R1], desc[UR4][R2.64]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x0")
    assert _code.read_code(copies, [], 150).alone == 4 + 150
    ahead = copies.replace("0x0 ", "0x1 ")
    assert _code.read_code(ahead, [], 150).alone == 6


def launched(call):
    with _predictions.recording() as launches:
        call()
    return [(launch.name, launch.grid) for launch in launches if launch.compiled]


def test_what_launchers_launch_is_recorded():
    shape = (4, 1024, 1152)

    def norm():
        x, shift = torch.empty(shape), torch.empty(4, 1152)
        x.requires_grad_()
        y = dfm_fast.ada_layer_norm(x, shift, shift, eps=1e-6)
        torch.autograd.grad(y, x, torch.empty_like(y))

    def pyramid():
        dfm_fast.laplacian_build(torch.empty(8, 16, 128, 128), num_levels=3)

    names = [name.removeprefix("row_norms._") for name, _ in launched(norm)]
    assert names == ["forward_kernel", "backward_kernel", "add_blocks_kernel"]
    assert launched(norm)[0][1] == 2048
    assert launched(pyramid) == [("walks.build_kernel", 512)]
    assert (
        launched(lambda: dfm_fast.geglu(torch.empty(2, 8, 512)))[0][0] == "activations._glu_kernel"
    )


def test_recording_leaves_nothing_behind():
    before = torch.Tensor.is_cuda, torch.Tensor.data_ptr, torch.cuda.get_device_capability
    with _predictions.recording():
        assert torch.empty(1).is_cuda
    after = torch.Tensor.is_cuda, torch.Tensor.data_ptr, torch.cuda.get_device_capability
    assert before == after
    assert torch.empty(1).device.type == "cpu"
    assert not torch.empty(1, device="meta").is_cuda


def test_convolutions_keep_their_layout():
    """As cuDNN's do: the kernels that follow are those of the layout."""
    last = torch.channels_last
    with _predictions.recording():
        x = torch.empty(2, 8, 6, 6).contiguous(memory_format=last)
        y = torch.nn.functional.conv2d(x, torch.empty(4, 8, 3, 3))
        assert y.is_contiguous(memory_format=last)
        assert not torch.nn.functional.conv2d(
            x.contiguous(), torch.empty(4, 8, 3, 3)
        ).is_contiguous(memory_format=last)


def test_a_launch_predicted():
    """Three maps of 4.7 MB and a vector."""
    with _predictions.recording() as launches:
        x = torch.empty(1, 1024, 1152)
        dfm_fast.gated_residual(x, torch.empty_like(x), torch.empty(1, 1152))
        (launch,) = [launch for launch in launches if launch.compiled]
        found = _predictions.predict(launch)
        twice = _predictions.predict(dataclasses.replace(launch, grid=2 * launch.grid))
    assert found.least == (3 * 1024 + 1) * 1152 * 4 <= found.asked
    assert (found.load_bits, found.spills, found.exact) == (128, 0, True)
    resident = found.waves * 132
    assert found.grid / resident == pytest.approx(round(found.grid / resident))
    assert (twice.waves, twice.occupancy) == (2 * found.waves, found.occupancy)
    machine = _predictions.H200
    assert found.floor == pytest.approx(
        1e6 * (machine.launch + machine.ramp + found.least / machine.bandwidth)
    )
    assert found.microseconds >= found.floor


def test_the_longest_bounds():
    bound, machine = _predictions._bound, _predictions.H200
    launch = machine.launch
    assert bound({"memory": 9e-6, "instructions": 8e-6}, machine) == ("memory", launch + 9e-6)
    assert bound({"memory": 1e-6, "instructions": 8e-6}, machine)[0] == "instructions"
    assert bound({"memory": 1e-6, "instructions": 2e-6}, machine) == ("launch", launch + 2e-6)
    code = _code.Code(1000, 0, 0, 5000, 128, True)
    work = _predictions._work(code, 4 * 1320, 1320, 10.0, machine)
    assert work["latency"] == pytest.approx(10 * 5000 / machine.clock)
    assert work["instructions"] == pytest.approx(1000 * 40 / (4 * 0.8 * machine.clock))
    few = _predictions._work(code, 4 * 66, 66, 0.1, machine)
    assert few["latency"] == pytest.approx(5000 / machine.clock)
    assert few["instructions"] == pytest.approx(1000 * 4 / (4 * 0.8 * machine.clock))


def test_faults_and_stated_reasons():
    good = {
        "kernel": "k", "dtype": "bfloat16", "registers": 64, "waves": 3.9, "load_bits": 128,
        "least": 1 << 24, "spills": 0, "occupancy": 0.5, "grid": 4096, "reason": "",
        "microseconds": 30.0, "floor": 10.0, "bound": "instructions",
    }  # fmt: skip
    assert predictions.faults(good) == []
    bad = {
        "load_bits": 32, "spills": 8, "occupancy": 0.125, "grid": 131, "waves": 1.2,
    }  # fmt: skip
    words = ["loads of 32 bits", "8 bytes spilled", "occupancy 12%", "131 programs", "a last wave"]
    for (key, value), expected in zip(bad.items(), words, strict=True):
        (fault,) = predictions.faults({**good, key: value})
        assert fault.startswith(expected)
    assert predictions.faults({**good, "load_bits": 32, "least": 1000}) == []
    row = {"row": "a row", "kernels": [{**good, "spills": 8}, good]}
    assert [lost for lost, _ in predictions.to_mend([row])] == [20.0]
    assert predictions.to_mend([{"row": "a row", "kernels": [{**good, "reason": "why"}]}]) == []
    row["kernels"][0]["reason"] = "needs it"
    assert predictions.to_mend([row]) == []


def test_the_command(tmp_path, capsys, monkeypatch):
    table, page = tmp_path / "table.json", tmp_path / "page.md"
    monkeypatch.setattr(predictions, "FAMILIES", ["norms"])
    name = "gated_residual-dit_xl-float32-contiguous-forward"
    assert name in bench_norms.ROWS
    arguments = ["--rows", name, "--json", str(table), "--page", str(page)]
    assert main(["check", "--predict", *arguments]) == 0
    (row,) = json.loads(table.read_text())["rows"]
    assert (row["row"], row["launches"]) == (name, 1)
    assert f"{row['microseconds']:.1f} µs" in capsys.readouterr().out
    assert "row_norms._forward_kernel" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--predict", "--rows", "nothing"], "rows like 'nothing'"),
        (["--predict", "--target", "sm_80"], "at most --target sm_90"),
        (["--predict", "--dtype", "bf16"], "no --dtype"),
        (["--rows", "geglu*"], "--predict with --rows"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, expected, capsys, monkeypatch):
    monkeypatch.setattr(predictions, "FAMILIES", ["norms"])
    assert main(["check", *arguments]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("check: expected")
    assert expected in line


def test_the_installed_command_finds_the_rows():
    """Whose path of modules does not begin with the current folder."""
    result = run_python("-P", "-m", "dfm_fast.cli", "check", "--predict", "--rows", "nothing")
    assert "rows like 'nothing'" in result.stdout, result
