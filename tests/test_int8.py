"""Weights of 8 bits: torchao's in our layers, and those of exported files."""

import copy

import pytest
import torch
from helpers import INTERPRET, assert_within_budget
from test_exports import MODELS, checked, decoder, dfm, in_onnx_runtime, unet
from torch import nn
from torch.utils import _pytree as pytree

from dfm_fast import cli
from dfm_fast.models import DFMTransformer, _int8, exports
from dfm_fast.models._exportable import exportable
from dfm_fast.models.exports import export_model

quantization = pytest.importorskip("torchao.quantization")
pytestmark = pytest.mark.skipif(INTERPRET, reason="weights of 8 bits have no kernels of ours")

MAKE = {"unet": unet, "dfm": dfm, "dfm of blocks": lambda: dfm(block_conditioning=True)}


def quantized(model):
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def dequantized(model):
    """The values of its weights as they are."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    return model


# --- In layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 2), (24, 20)])  # of many rows fused products take the weights
@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_models_compute_with_quantized_weights(name, grid):
    model = quantized(MAKE[name]())
    run = exportable(MAKE[name](), None, None).wrap(model)
    checked(dequantized(model), lambda examples: pytree.tree_leaves(run(**examples)), [(2, grid)])


@pytest.mark.parametrize("name", MAKE)
def test_what_is_not_quantized_learns(name):
    """Gradients of the inputs and of what is left, as of the same values in float32."""
    model = quantized(MAKE[name]())
    given, found = exportable(MAKE[name](), None, None), []
    for m, double in ((model, False), (dequantized(model), False), (dequantized(model), True)):
        examples = given.examples(2, (24, 20))
        if double:
            m, examples = m.double(), pytree.tree_map(exports._to_double, examples)
        leaves = [x.requires_grad_() for x in pytree.tree_leaves(examples) if x.is_floating_point()]
        sum(y.square().mean() for y in pytree.tree_leaves(given.wrap(m)(**examples))).backward()
        grads = {i: x.grad for i, x in enumerate(leaves)}
        grads |= {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        found.append(grads)
    assert found[0].keys() == found[1].keys() == found[2].keys()
    got, ref, exact = (torch.cat([g.flatten() for g in grads.values()]) for grads in found)
    assert got.numel() > 1000
    assert_within_budget(got, ref, exact, cap=64, what=name)


# --- In files -------------------------------------------------------------------------------------


def products(model):
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            yield name, layer


def rounded(model, stored):
    """`model` with the weights of a file, each (int8, a scale per row), which are looked at: the
    nearest integers, where 127.5 steps are a row's largest magnitude."""
    state = model.state_dict()
    for name, layer in products(model):
        values, scale = stored(name)
        assert values.shape == layer.weight.shape
        assert values.dtype == torch.int8
        rows, scale = layer.weight.flatten(1), scale.view(-1, 1)
        torch.testing.assert_close(scale, rows.abs().amax(1, True) / 127.5)
        off = (values.flatten(1) - (rows / scale).clamp(-128, 127)).abs().max()
        assert off <= 0.5 + 1e-4
        state[f"{name}.weight"] = (values.flatten(1) * scale).view(values.shape)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("name", ["unet", "decoder"])
@torch.no_grad()
def test_onnx_has_the_rounded_weights(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    make, options = MODELS[name]
    file = tmp_path / "model.onnx"
    exported = export_model(make(), file, **options, weights="int8")
    assert 1e-3 < exported.rounding < _int8.BUDGET
    assert exported.parity
    onnx.checker.check_model(file, full_check=True)
    graph = onnx.load(file).graph
    found = {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in graph.initializer}
    nodes = [n for n in graph.node if n.op_type == "DequantizeLinear"]
    assert len(nodes) == len(list(products(make())))
    prefix = "" if name == "decoder" else "model."
    model = rounded(
        make(), lambda layer: [found[f"{prefix}{layer}.weight{end}"] for end in ("", "_scale")]
    )
    checked(model, in_onnx_runtime(file), **options)


@pytest.mark.parametrize("name", ["decoder", "dfm"])
@torch.no_grad()
def test_programs_have_the_rounded_weights(name, tmp_path):
    make, options = MODELS[name]
    file = tmp_path / "model.pt2"
    export_model(make(), file, **options, weights="int8")
    program = torch.export.load(file)
    prefix = "" if name == "decoder" else "model."
    of = "{}{}.parametrizations.weight.original{}".format
    state = program.state_dict
    model = rounded(make(), lambda layer: [state[of(prefix, layer, i)] for i in (0, 1)])
    module = program.module()
    run = lambda examples: pytree.tree_leaves(module(**examples))  # noqa: E731
    checked(model, run, **options)


@torch.no_grad()
def test_files_have_the_weights_that_torchao_gives_a_model(tmp_path):
    export_model(dfm(), tmp_path / "dfm.pt2", weights="int8")
    state = torch.export.load(tmp_path / "dfm.pt2").state_dict
    for name, layer in products(quantized(dfm())):
        key = f"model.{name}.parametrizations.weight.original"
        assert torch.equal(state[f"{key}0"], layer.weight.qdata)
        assert torch.equal(state[f"{key}1"], layer.weight.scale)


@torch.no_grad()
def test_the_model_that_was_given_stays(tmp_path):
    model = decoder()
    before = {name: v.clone() for name, v in model.state_dict().items()}
    requires = [p.requires_grad for p in model.parameters()]
    export_model(model, tmp_path / "a.pt2", weights="int8")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert requires == [p.requires_grad for p in model.parameters()]


def test_outputs_of_zero_are_not_moved(tmp_path):
    """As those of a new DFM transformer."""
    model = DFMTransformer(hidden_size=32, depth=1, num_heads=2, input_size=(8, 8)).eval()
    exported = export_model(model, tmp_path / "a.pt2", weights="int8")
    assert exported.rounding == 0


def test_the_command_says_what_rounding_does(tmp_path, capsys):
    decoder().save_pretrained(tmp_path / "decoder")
    out = tmp_path / "a.onnx"
    command = ["export", str(tmp_path / "decoder"), "--out", str(out), "--weights", "int8"]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "int8 weights: at most" in told
    assert "from the model in float64" in told
    assert out.exists()


def test_rounding_that_moves_too_much_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(_int8, "BUDGET", 1e-4)
    with pytest.raises(exports.ParityError, match=r"weights: expected int8 to move no output"):
        export_model(decoder(), tmp_path / "a.onnx", weights="int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ("int4", ValueError, "weights: expected one of float32, int8, got 'int4'"),
        ("int8", ImportError, r"weights: expected torchao .*pip install 'dfm_fast\[export\]'"),
    ],
)
def test_bad_weights(tmp_path, monkeypatch, weights, error, message):
    monkeypatch.setattr(_int8, "find_spec", lambda name: None)
    with pytest.raises(error, match=message):
        export_model(decoder(), tmp_path / "a.pt2", weights=weights)
    assert not list(tmp_path.iterdir())
