"""Exported models: in runtimes that do not know this library, against the model in float64."""

from collections import Counter

import pytest
import torch
from cases import CASES
from helpers import assert_within_budget, run_python, tensors
from small_models import small
from test_snapgen import randomise
from torch.utils import _pytree as pytree

import dfm_fast
from dfm_fast import cli, nn
from dfm_fast._library import INTERPRET, OPERATORS, RAW
from dfm_fast.cli import export
from dfm_fast.models import (
    ClassTokens,
    DFMTransformer,
    SnapGenDecoder,
    SnapGenPipeline,
    SnapGenUNet,
    exports,
)
from dfm_fast.models._exportable import exportable
from dfm_fast.models.exports import export_model
from dfm_fast.ops import _decompositions as decompositions

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(INTERPRET, reason="graphs have none of our kernels")

UNET = {
    "in_channels": 4, "channels": (32, 64), "depths": (1, 0), "heads": (4, 2), "layers": 1,
    "mid_depth": 0, "self_attention": (True, False), "rope": True, "cross_dim": 24,
    "time_channels": 32, "num_ids": 2,
}  # fmt: skip
SIZES = ((1, (2, 3)), (3, (7, 4)))  # batch and grid, of which none is the trace's


def unet():
    return randomise(SnapGenUNet(**UNET)).eval()


def decoder():
    return randomise(SnapGenDecoder(4, 3, (8, 16), (1, 1))).eval()


def dfm(**options):
    return small(**{"in_channels": 3, "depth": 1, "qk_norm": True, "positions": "rope", **options})


MODELS = {
    "unet": (unet, {}),
    "decoder": (decoder, {}),
    "dfm": (dfm, {}),
    "first level": (lambda: dfm(stage_embedding=True, positions="sincos"), {"levels": 1}),
}


def checked(model, run, sizes=SIZES, levels=None, size=None):
    """`run` gives what the model does in float64, as nearly as plain torch in float32: all outputs
    of all sizes as one, as of a few values the largest error says little."""
    given = exportable(model, levels, size)
    wide, values = given.wrap(exports._twin(model, torch.float64)), ([], [], [])
    for batch, grid in sizes:
        examples = given.examples(batch, grid)
        exact = wide(**pytree.tree_map(exports._to_double, examples))
        for into, found in zip(
            values, (run(examples), given.plain(model, **examples), exact), strict=True
        ):
            into.extend(y.flatten() for y in pytree.tree_leaves(found))
    assert_within_budget(*map(torch.cat, values), cap=64, what=type(model).__name__)


def in_onnx_runtime(file):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(examples):
        names = [value.name for value in session.get_inputs()]
        values = [value.numpy() for value in pytree.tree_leaves(examples)]
        return [
            torch.from_numpy(y) for y in session.run(None, dict(zip(names, values, strict=True)))
        ]

    return run


LOADS = """
import sys, torch
from pathlib import Path
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dfm_fast":
            raise ImportError("not here")
sys.meta_path.insert(0, Nowhere())
folder, found = Path(sys.argv[1]), {}
for name, cases in torch.load(folder / "cases").items():
    module = torch.export.load(folder / f"{name}.pt2").module()
    found[name] = [torch.utils._pytree.tree_leaves(module(**case)) for case in cases]
torch.save(found, folder / "found")
assert not any(name.startswith("dfm_fast") for name in sys.modules)
"""


# --- Forms ----------------------------------------------------------------------------------------

FORMS = {str(packet).removeprefix("dfm_fast."): packet for packet in decompositions.FORMS}
FORM_CASES = [
    case for case in CASES if OPERATORS[case.operator].raw[0].removeprefix("dfm_fast::") in FORMS
]


@pytest.mark.parametrize("case", FORM_CASES, ids=lambda case: f"{case.operator}-{case.id}")
@torch.no_grad()
def test_forms_are_the_operators(case):
    args, public = case.args(torch.float64), OPERATORS[case.operator].public
    want = tensors(public(*args, **case.kwargs))
    used = Counter()

    def counted(form):
        def call(*args, **kwargs):
            used[form] += 1
            return form(*args, **kwargs)

        return call

    forms = {**decompositions.FORMS, **decompositions.ONNX_FORMS}
    with decompositions.StandardForms({of: counted(form) for of, form in forms.items()}):
        got = tensors(public(*args, **case.kwargs))
    assert used
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("forms", ["pt2", "onnx"])
@torch.no_grad()
def test_norms_keep_their_digits_far_from_zero(forms, layout):
    """torch takes E[x²] - m² of channels_last on a CPU: at mean 100 that leaves three digits."""
    torch.manual_seed(0)
    x = (100 + torch.randn(2, 8, 16, 16)).contiguous(memory_format=layout)
    exact = torch.nn.functional.group_norm(x.double(), 4)
    own = decompositions.FORMS | (decompositions.ONNX_FORMS if forms == "onnx" else {})
    with decompositions.StandardForms(own):
        got = dfm_fast.group_norm_silu(x, 4, activation="none")
    ref = torch.nn.functional.group_norm(x.contiguous(), 4)
    assert_within_budget(got, ref, exact, cap=64, what=forms)


MAP, KERNELS = (2, 3, 4, 5), ((3, 1, 3, 3), (8, 3, 1, 1), (8,), (8, 1, 3, 3), (3, 8, 1, 1), (3,))
RAW_CASES = {
    "linear_glu": ((4, 6), (10, 6), (10,), "gelu"),
    "separable_residual": (MAP, *KERNELS),
    "separable_upsample": (MAP, *KERNELS[:3]),
}


@pytest.mark.parametrize("name", RAW_CASES)
@torch.no_grad()
def test_forms_are_the_operators_of_layers(name):
    torch.manual_seed(0)
    args = [torch.randn(a).double() if isinstance(a, tuple) else a for a in RAW_CASES[name]]
    if args[0].ndim == 4:
        args[0] = args[0].contiguous(memory_format=torch.channels_last)
    want = getattr(torch.ops.dfm_fast, name)(*args)
    torch.testing.assert_close(decompositions.FORMS[FORMS[name]](*args), want)


def test_every_operator_of_a_network_has_a_form():
    outside = {"pyramids", "noises", "steps"}  # what trains and samples it
    inside = {name for name, kernel in RAW.items() if kernel.split(":")[0] not in outside}
    assert {name for name in inside if not name.endswith(("_backward", "_again"))} == FORMS.keys()


@pytest.mark.parametrize("kv_heads", [1, 2])
@torch.no_grad()
def test_keys_are_not_repeated(kv_heads):
    layer, x = nn.MultiQueryAttention(32, 4, kv_heads), torch.randn(2, 5, 32)
    with decompositions.StandardForms(decompositions.FORMS | decompositions.ONNX_FORMS):
        graph = torch.export.export(layer, (x,)).graph
    calls = Counter(str(node.target) for node in graph.nodes)
    assert calls["aten.matmul.default"] == 2
    assert not any("expand" in name or "repeat" in name for name in calls)


# --- Parity ---------------------------------------------------------------------------------------


def assert_standard(file, opset):
    onnx.checker.check_model(file, full_check=True)
    model = onnx.load(file)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    assert {node.domain for node in model.graph.node} == {""}
    assert "GroupNormalization" not in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("name", ["unet", "dfm", "first level"])  # the decoder: by the command
@torch.no_grad()
def test_onnx_is_the_model(name, tmp_path):
    make, options = MODELS[name]
    model, file = make(), tmp_path / "model.onnx"
    opset = 23 if name == "first level" else exports.OPSET
    exported = export_model(model, file, **options, opset=opset)
    assert_standard(file, opset)
    checked(model, in_onnx_runtime(file), **options)
    assert max(p.error for p in exported.parity) <= exports.budget(exported.parity)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@torch.no_grad()
def test_a_torch_without_us_loads_the_programs(tmp_path):
    cases = {}
    for name in ("unet", "decoder", "dfm"):
        make, options = MODELS[name]
        # Fixed sides are another graph, and the UNet's is the largest.
        options = {**options, "size": (8, 12)} if name == "unet" else options
        export_model(make(), tmp_path / f"{name}.pt2", **options, check=False)
        given = exportable(make(), None, options.get("size"))
        sizes = [(n, given.grids[0]) for n in (1, 3)] if name == "unet" else SIZES
        cases[name] = options, sizes, [given.examples(*size) for size in sizes]
    torch.save({name: examples for name, (_, _, examples) in cases.items()}, tmp_path / "cases")
    result = run_python("-c", LOADS, str(tmp_path))
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "found")
    for name, (options, sizes, _) in cases.items():
        results = iter(found[name])
        checked(MODELS[name][0](), lambda _, results=results: next(results), sizes, **options)


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Exported by a run, with a UNet that has no ids."""
    folder = tmp_path_factory.mktemp("run")
    unet = randomise(SnapGenUNet(**{**UNET, "num_ids": 0})).eval()
    SnapGenPipeline(unet, decoder(), ClassTokens(5, 3, 24), sample_size=8).save_pretrained(
        folder / "model"
    )
    return folder


def test_the_command_exports_a_part_of_a_pipeline(pipeline, tmp_path, capsys):
    out = tmp_path / "decoder.onnx"
    assert cli.main(["export", str(pipeline), "--part", "decoder", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "latents [batch, 4, height, width]" in told
    assert "from the model in float64" in told
    assert_standard(out, exports.OPSET)
    model = SnapGenDecoder.from_pretrained(pipeline / "model" / "decoder")
    with torch.no_grad():
        checked(model, in_onnx_runtime(out))


def test_what_folders_hold(pipeline, tmp_path):
    dfm().save_pretrained(tmp_path / "dfm")
    decoder().save_pretrained(tmp_path / "run" / "model")
    found = {
        SnapGenUNet: (pipeline, None),
        SnapGenDecoder: (tmp_path / "run", None),
        DFMTransformer: (tmp_path / "dfm", None),
    }
    for kind, (folder, part) in found.items():
        assert type(export._model(folder, part, None)) is kind
    assert type(export._model(pipeline / "model" / "unet", None, None)) is SnapGenUNet


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "a.txt"], "out: expected a file that ends in .onnx or .pt2, or a format"),
        (["--out", "a.onnx", "--format", "coreml"], "format: expected one of onnx, pt2, got 'cor"),
        (["--out", "none/a.onnx"], "out: expected a file in a folder that is there, got none/a.on"),
        (
            ["--out", "a.onnx", "--weights", "int4"],
            "weights: expected one of float32, int8, got 'i",
        ),
        (["--out", "a.onnx", "--opset", "17"], "opset: expected at least 18, got 17"),
        (["--out", "a.onnx", "--opset", "99"], "opset: expected at most 23, got 99"),
        (["--out", "a.onnx", "--part", "vae"], "--part: expected one of unet, decoder, got 'vae'"),
        (["--out", "a.onnx", "--levels", "1"], "levels: expected None, as SnapGenUNet has one"),
        (["--out", "a.onnx", "--size", "8"], "size: expected height and width, got [8]"),
        (["--out", "a.onnx", "--size", "8", "7"], "size (width): expected a multiple of 2, got 7"),
    ],
)
def test_bad_arguments_are_one_line(pipeline, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", str(pipeline), *options]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_folders_without_a_model_are_named(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert cli.main(["export", str(folder), "--out", str(tmp_path / "a.onnx")]) == 2
        assert f"{folder}: expected a training folder" in capsys.readouterr().err


def test_without_onnx_the_error_says_how_to_get_it(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exports, "find_spec", lambda name: None)
    assert cli.main(["export", str(pipeline), "--out", str(tmp_path / "a.onnx")]) == 2
    assert "pip install 'dfm_fast[export]'" in capsys.readouterr().err


def test_a_file_that_is_off_is_not_left(tmp_path, monkeypatch):
    """An old one stays."""
    file = tmp_path / "a.pt2"
    file.write_text("old")
    wrong = {**decompositions.FORMS, torch.ops.dfm_fast.separable_conv2d: _without_bias}
    monkeypatch.setattr(exports, "FORMS", wrong)
    with pytest.raises(exports.ParityError, match=r"images \[2, 3, 12, 10\]: expected within"):
        export_model(decoder(), file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_other_values_are_asked_for_before_a_file_is_off(tmp_path, monkeypatch):
    asked = []

    def parities(given, run, seeds=(0,)):
        for seed in seeds:
            asked.append(seed)
            yield exports.Parity("images", (1,), 2.5e-7, 1e-8 if seed < 2 else plain)

    monkeypatch.setattr(exports, "_parities", parities)
    plain = 1e-7
    assert export_model(decoder(), tmp_path / "a.pt2").parity
    assert asked == [0, 1, 2, 3]
    plain = 8e-8
    with pytest.raises(exports.ParityError, match=r"expected within 2\.2e-07 of the model"):
        export_model(decoder(), tmp_path / "a.pt2")


def _without_bias(x, depthwise, pointwise, bias, *rest, **options):
    return decompositions._separable_conv2d(x, depthwise, pointwise, None, *rest, **options)


def test_weights_beyond_a_message_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "LARGEST", 0)
    model, file = decoder(), tmp_path / "a.onnx"
    export_model(model, file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    with torch.no_grad():
        checked(model, in_onnx_runtime(file))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (torch.nn.Linear(1, 1), TypeError, "model: expected a SnapGenUNet"),
        (decoder().train(), ValueError, "model: expected a model in eval mode"),
        (decoder().half(), ValueError, "model: expected float32 on the CPU, got .* torch.float16"),
    ],
)
def test_models_that_are_not_exported(tmp_path, model, error, message):
    with pytest.raises(error, match=message):
        export_model(model, tmp_path / "a.onnx")
