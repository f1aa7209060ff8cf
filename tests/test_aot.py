"""Triton kernels compile for every target, within its limits, with no GPU: what `check` gates."""

import dataclasses
import json
import os
import re

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

from dfm_fast.cli import main  # noqa: E402


def check(tmp_path, *arguments):
    """(exit status, rows) of `dfm-fast check`."""
    path = tmp_path / "rows.json"
    status = main(["check", "--jobs", "2", "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


# Each has spilled, for a step of occupancy that ptxas would not give up.
@pytest.mark.parametrize(
    ("targets", "dtype", "kernel"),
    [
        (["sm_90"], "bf16", "laplacian_collapse_backward bilinear NHWC"),
        (["sm_90", "sm_100"], "fp32", "laplacian_collapse nearest NCHW"),
        (["sm_120"], "fp16", "haar_build NCHW"),
        (["sm_100"], "bf16", "depthwise weight gradient 3x3/1 NHWC"),
        (["sm_80"], "fp32", "depthwise weight gradient 5x5/2 NHWC"),
    ],
)
def test_what_once_spilled_spills_no_more(targets, dtype, kernel, tmp_path):
    arguments = [word for target in targets for word in ("--target", target)]
    status, rows = check(tmp_path, *arguments, "--dtype", dtype, "--kernel", kernel)
    rows = [row for row in rows if row["kernel"] == kernel]  # without those that begin so
    assert [(row["target"], row["spills"]) for row in rows] == [(target, 0) for target in targets]
    assert status == 0


def test_sizes_of_one_compile():
    """A launch makes a constant of every integer that is 1: every kernel must take that."""
    from triton.backends.compiler import GPUTarget

    from dfm_fast.kernels import _aot

    kinds = {}
    for spec in _aot.specialisations():
        key = spec.kernel, spec.constants.get("LAST"), spec.constants.get("DO")
        if "sm_90" in spec.targets:
            kinds.setdefault(key, spec)
    for (kernel, *_), spec in kinds.items():
        asked = kernel.do_not_specialize or ()
        kept = {kernel.arg_names[i] if isinstance(i, int) else i for i in asked}
        integers = {name for name, kind in spec.arguments.items() if kind in ("i32", "i64")}
        ones = dict.fromkeys((integers - kept) & set(kernel.arg_names), 1)
        ones = dataclasses.replace(spec, constants={**spec.constants, **ones})
        assert _aot._compile(ones, GPUTarget("cuda", 90, 32)).asm["cubin"], spec.name


# Everything on one target; then the one that matters most and the general one on the others.
# `dfm-fast check` alone does all of it.
@pytest.mark.parametrize(
    "arguments",
    [
        ("--target", "sm_90"),
        ("--dtype", "bf16", "--kernel", "build bilinear 1 NCHW"),
        ("--dtype", "bf16", "--dtype", "fp64", "--kernel", "resample 32"),
    ],
    ids=" ".join,
)
def test_kernels_compile_within_the_limits_of_every_target(arguments, tmp_path, capsys):
    status, rows = check(tmp_path, *arguments)
    assert status == 0, capsys.readouterr().out
    assert not any(row["spills"] for row in rows)
    limits = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
    assert all(row["shared"] <= 1024 * limits[row["target"]] for row in rows)
    assert all(row["registers"] > 0 and row["instructions"] > 0 for row in rows)


def test_loads_are_sixteen_bytes_wide(tmp_path, capsys):
    _, rows = check(
        tmp_path, "--target", "sm_90", "--dtype", "bf16", "--kernel", "build bilinear 1 NCHW"
    )
    assert [row["load_bits"] for row in rows] == [128]
    printed = capsys.readouterr().out
    assert "1/1 laplacian_build bilinear 1 NCHW" in printed
    assert "sm_90: 1 of 1 passed" in printed


# What is reached. A rise is a loss of speed: these kernels wait for nothing else.
@pytest.mark.parametrize(
    ("kernel", "most"),
    [
        ("philox_normal", {"bf16": 24.6, "fp16": 24.6, "fp32": 32}),
        ("add_noise NCHW", {"bf16": 31, "fp16": 31, "fp32": 36.5}),
    ],
)
def test_instructions_per_normal(kernel, most, tmp_path):
    _, rows = check(tmp_path, "--target", "sm_90", "--kernel", kernel)
    counts = {row["dtype"]: row["per_normal"] for row in rows if row["kernel"] == kernel}
    assert counts.pop("fp64") == 0
    assert counts.keys() == most.keys()
    assert all(0 < count <= most[dtype] for dtype, count in counts.items()), counts


def test_a_failed_gate_is_an_exit_status(monkeypatch, tmp_path, capsys):
    from dfm_fast.kernels import _aot

    spec = next(s for s in _aot.specialisations() if s.name == "resample 32-bit")
    report = _aot.check(_with(spec, load_bits=1024), "sm_90")
    assert report.failures == (f"widest load: expected 1024 bits, got {report.load_bits}",)
    report = _aot.check(_with(spec, constants={}), "sm_90")
    assert report.failures
    assert main(["check", "--kernel", "no such kernel"]) == 1
    assert "no such kernel" in capsys.readouterr().out
    assert main(["check", "--target", "sm_1"]) == 1


# `test_kernels_compile_within_the_limits_of_every_target` looks at all of them on sm_90.
@pytest.mark.parametrize(
    "name",
    ["linear_glu", "pointwise NHWC", "separable_conv2d norm", "upsample_conv2d NHWC",
     "multi_query_attention 256"],
)  # fmt: skip
def test_products_are_those_of_tensor_cores(name):
    """HGMMA is wgmma."""
    from dfm_fast.kernels import _aot

    specs = [
        s for s in _aot.specialisations()
        if s.name == name and s.dtype in ("bf16", "fp16") and "sm_90" in s.targets
    ]  # fmt: skip
    assert [s.dtype for s in specs] == ["bf16", "fp16"]
    assert all(s.matrix for s in specs)
    assert _aot.MATRIX["sm_90"] == "HGMMA"
    assert _aot.check(specs[0], "sm_90").failures == ()


@pytest.mark.parametrize("channels", [8, 64])
def test_sums_of_exact_float32_are_of_sixteen_products(channels):
    """Each begins at 0. Left to itself Triton begins with bias or residual, or goes on with all
    products before: errors grow with either."""
    from triton.backends.compiler import GPUTarget

    from dfm_fast.kernels import _aot, separables

    (spec,) = (
        s for s in separables.specialisations() if (s.name, s.dtype) == ("pointwise NHWC", "fp32")
    )
    spec = dataclasses.replace(spec, constants={**spec.constants, "C": channels, "OUT": 64})
    chains: dict[str, tuple[str, int]] = {}  # register -> what the chain to it begins with, length
    text = _aot._compile(spec, GPUTarget("cuda", 90, 32)).asm["ptx"]
    for to, before in re.findall(r"fma\.rn\.f32\s+(\S+), \S+, \S+, (\S+);", text):
        first, length = chains.get(before, (before, 0))
        chains[to] = first, length + 1
    assert max(length for _, length in chains.values()) == 16
    assert {first for first, length in chains.values() if length == 16} == {"0f00000000"}


def test_a_product_without_tensor_cores_fails():
    from dfm_fast.kernels import _aot

    spec = next(s for s in _aot.specialisations() if s.name == "resample 32-bit")
    (failure,) = _aot.check(_with(spec, matrix=True), "sm_90").failures
    assert failure == "instructions: expected HGMMA, got none"


def _with(spec, **changes):
    import dataclasses

    return dataclasses.replace(spec, **changes)


def test_occupancy():
    """Full with 32 registers; else by registers, shared memory, warps or blocks."""
    _aot = pytest.importorskip("dfm_fast.kernels._aot")
    assert _aot.occupancy("sm_90", 32, 0, 8) == 1
    assert _aot.occupancy("sm_90", 168, 0, 4) == 3 * 4 / 64
    assert _aot.occupancy("sm_90", 33, 0, 8) == 6 * 8 / 64  # 1280 a warp
    assert _aot.occupancy("sm_80", 32, 100 * 1024, 4) == 4 / 64
    assert _aot.occupancy("sm_120", 32, 0, 32) == 32 / 48
    assert _aot.occupancy("sm_90", 16, 0, 1) == 32 / 64
    assert _aot.occupancy("gfx942", 32, 0, 4) == 0
