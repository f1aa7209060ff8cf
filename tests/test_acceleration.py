"""accelerate and restore: other people's models, by value before and after."""

import copy
import dataclasses
import io
import json
import pickle
import subprocess
import sys
import warnings

import accelerated_models as models
import pytest
import torch
from accelerated_models import cast, make, operators, output, relative, run
from helpers import INTERPRET, ROOT
from torch import nn

import dfm_fast
from dfm_fast.acceleration._units import KINDS, UNITS, unit_of

pytestmark = pytest.mark.skipif(INTERPRET, reason="operators have their own tests there")

# --- Whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
def test_the_same_values_as_before_and_back(name):
    """float32 against float64: at most twice the model's own error, plus one rounding."""
    model, inputs, given = make(name)
    exact = run(copy.deepcopy(model).double(), inputs, given, torch.float64)
    before = run(model, inputs, given)
    with torch.no_grad():
        inference = output(model, inputs, given)
    report = dfm_fast.accelerate(model)
    assert report.swapped
    after = run(model, inputs, given)
    for got, low, ex in zip(after, before, exact, strict=True):
        assert relative(got, ex) <= 2 * relative(low, ex) + torch.finfo(torch.float32).eps / 2
    with torch.no_grad():
        got = output(model, inputs, given)
        assert relative(got, exact[0]) <= 2 * relative(inference, exact[0]) + 6e-8
        assert operators(output, model, inputs, given)
        dfm_fast.restore(model)
        assert torch.equal(output(model, inputs, given), inference)
        assert not operators(output, model, inputs, given)


@pytest.mark.parametrize("name", ["dreamlite", "sdxl", "sd3", "flux", "official_dit"])
def test_as_exact_in_bfloat16(name):
    model, inputs, given = make(name)
    dtype = torch.bfloat16
    model.to(dtype)
    inputs, given = cast(inputs, dtype), cast(given, dtype)
    with torch.no_grad():
        exact = output(copy.deepcopy(model).double(), *cast((inputs, given), torch.float64))
        low = output(model, inputs, given)
        dfm_fast.accelerate(model)
        got = output(model, inputs, given)
    assert got.dtype == low.dtype
    assert relative(got, exact) <= 2 * relative(low, exact) + torch.finfo(dtype).eps / 2


# What must be swapped: a class, and how many modules of it.
SWAPPED = {
    "sdxl": {"ResnetBlock2D": 8, "FeedForward": 8, "Upsample2D": 1, "GroupNorm": 21},
    "sd3": {"JointTransformerBlock": 2, "AdaLayerNormZero": 2, "SD35AdaLayerNormZeroX": 1,
            "Attention": 3, "FeedForward": 3},
    "flux": {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 2, "FluxAttention": 3,
             "AdaLayerNormZeroSingle": 2, "AdaLayerNormContinuous": 1, "FeedForward": 2},
    "dit": {"BasicTransformerBlock": 2, "AdaLayerNormZero": 2, "FeedForward": 2},
    "autoencoder_kl": {"ResnetBlock2D": 10, "Upsample2D": 1},
    "autoencoder_tiny": {"Sequential": 1},
    "official_dit": {"DiTBlock": 2, "FinalLayer": 1, "Mlp": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", SWAPPED)
def test_what_is_swapped(name):
    model, _, _ = make(name)
    old = [kind for _, kind, _ in dfm_fast.accelerate(model).swapped]
    for kind, count in SWAPPED[name].items():
        assert old.count(kind) == count, kind


def test_the_whole_of_snapgens_unet():
    unets = pytest.importorskip("diffusers.models.unets.unet_dreamlite")
    with torch.device("meta"):
        model = unets.DreamLiteUNetModel(**models.FULL_DREAMLITE)
    report = dfm_fast.accelerate(model)
    old = [kind for _, kind, _ in report.swapped]
    assert len(old) >= 150
    counts = {"ResnetBlock2DDreamLite": 17, "Attention": 60, "FeedForward": 36, "RMSNorm": 120}
    for kind, count in counts.items():
        assert old.count(kind) == count, kind
    assert not report.kept
    text = str(report)
    assert "17 x ResnetBlock2DDreamLite -> SeparableConvBlock" in text
    # 36 gates, 60 copies of keys and values, 120 norms, 17 blocks: bytes of float32.
    assert report.bytes_saved > 4 * 17 * 24 * 256
    assert f"{report.bytes_saved:,}" in text


def test_each_unit_of_dreamlite_runs_its_operators():
    model, inputs, given = make("dreamlite")
    dfm_fast.accelerate(model)
    with torch.no_grad():
        seen = operators(output, model, inputs, given)
    assert seen.count("separable_conv2d") == 2 * 17
    assert seen.count("multi_query_attention") == seen.count("qk_norm_rope") == 31
    assert seen.count("upsample_conv2d") == 2
    assert "rms_norm" not in seen  # that of queries and keys is in qk_norm_rope
    assert "depthwise_conv2d" not in seen


# --- What stays as it was -------------------------------------------------------------------------


def test_objects_names_and_optimizer_stay():
    model, inputs, given = make("dreamlite")
    reference = copy.deepcopy(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    pointers = {name: p.data_ptr() for name, p in parameters.items()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = {name: type(m) for name, m in modules.items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    dfm_fast.accelerate(model)
    assert all(m is modules[name] for name, m in model.named_modules())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(p.data_ptr() == pointers[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(isinstance(m, kinds[name]) for name, m in model.named_modules())
    output(model, inputs, given).square().mean().backward()
    optimizer.step()
    other = torch.optim.SGD(reference.parameters(), 0.01)
    output(reference, inputs, given).square().mean().backward()
    other.step()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name, atol=1e-4, rtol=1e-4)
    dfm_fast.restore(model)
    assert {name: type(m) for name, m in model.named_modules()} == kinds


def test_twice_is_once():
    model, _, _ = make("official_dit")
    first = dfm_fast.accelerate(model)
    kinds = [type(m) for m in model.modules()]
    again = dfm_fast.accelerate(model)
    assert [type(m) for m in model.modules()] == kinds
    assert not again.swapped
    assert again.bytes_saved == 0
    assert sorted(name for name, _ in again.kept) == sorted(name for name, _, _ in first.swapped)
    assert all("already accelerated" in reason for _, reason in again.kept)
    assert dfm_fast.restore(model) is model
    assert dfm_fast.accelerate(model).swapped == first.swapped


def test_bytes_saved():
    """SiLU reads and writes 64 channels; a doubled map of 4 times 64 is written and read."""
    model = nn.Sequential(
        nn.GroupNorm(8, 64), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(64, 8, 3, padding=1)
    )
    assert dfm_fast.accelerate(model).bytes_saved == 4 * (2 * 64 + 8 * 64)
    dfm_fast.restore(model).bfloat16()
    assert dfm_fast.accelerate(model).bytes_saved == 2 * (2 * 64 + 8 * 64)


def test_a_model_that_is_not_known():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"a": Own(3, 4), "b": nn.LSTM(3, 4), "c": nn.Sequential(nn.ReLU())})
    kinds = [type(m) for m in model.modules()]
    report = dfm_fast.accelerate(model)
    assert [type(m) for m in model.modules()] == kinds
    assert (report.swapped, report.kept, report.bytes_saved) == ([], [], 0)
    assert "Nothing was swapped: no module is of a class that dfm_fast knows" in str(report)


def test_subclasses_are_not_the_class():
    class Norm(nn.RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    assert not dfm_fast.accelerate(Norm(8)).swapped


def test_diffusers_and_peft_are_not_imported():
    code = "import sys, torch, dfm_fast; dfm_fast.accelerate(torch.nn.RMSNorm(4)); "
    code += "sys.exit(any(m in sys.modules for m in ('diffusers', 'peft', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("round_trip", ["deepcopy", "pickle", "save"])
def test_copies_and_pickles(round_trip):
    model, inputs, given = make("dreamlite")
    dfm_fast.accelerate(model)
    if round_trip == "deepcopy":
        other = copy.deepcopy(model)
    elif round_trip == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    kinds = zip(model.modules(), other.modules(), strict=True)
    assert all(type(a) is type(b) for a, b in kinds)
    with torch.no_grad():
        assert torch.equal(output(other, inputs, given), output(model, inputs, given))
        assert "separable_conv2d" in operators(output, other, inputs, given)
    next(other.parameters()).data.zero_()
    assert next(model.parameters()).any()
    dfm_fast.restore(other)
    assert not operators(output, other, inputs, given)
    assert operators(output, model, inputs, given)


def test_saved_configurations_name_the_original_class(tmp_path):
    model, inputs, given = make("dreamlite")
    dfm_fast.accelerate(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == type(model).__name__
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        want = output(model, inputs, given)
        assert relative(output(loaded, inputs, given), want) < 1e-5
    inner = model.down_blocks[0].resnets[0]
    assert type(inner).__name__ == "ResnetBlock2DDreamLite"
    assert "ResnetBlock2DDreamLite[dfm_fast]" in repr(inner)
    assert "dfm_fast" not in repr(dfm_fast.restore(inner))


# --- Layouts that only look alike -----------------------------------------------------------------


def test_another_computation_of_the_same_layout_is_kept():
    class Mlp(models.Mlp):
        def forward(self, x):
            return x + super().forward(x)

    class DiTBlock(models.DiTBlock):
        def forward(self, x, c):
            return super().forward(x, 1.001 * c)

    for module in (Mlp(8, 16), DiTBlock(32, 4)):
        report = dfm_fast.accelerate(module)
        reasons = dict(report.kept)
        assert "computes something else" in reasons[""], reasons


def test_a_forward_of_other_arguments_is_kept():
    class Mlp(models.Mlp):
        def forward(self, x, scale=1.0):
            return scale * super().forward(x)

    assert "other arguments" in dict(dfm_fast.accelerate(Mlp(8, 16)).kept)[""]


def test_another_version_of_a_known_class_is_kept():
    def forward(self, hidden_states, output_size=None, *args, **kwargs):
        return hidden_states

    body = {"__module__": "diffusers.models.upsampling", "forward": forward, "use_conv": True}
    module = type("Upsample2D", (nn.Module,), body)()
    ((_, reason),) = dfm_fast.accelerate(module).kept
    assert "not the version that is known" in reason
    assert "use_conv_transpose" in reason
    body["use_conv"] = property(lambda self: self.missing)
    assert not dfm_fast.accelerate(type("Upsample2D", (nn.Module,), body)()).kept


def test_a_layout_that_is_not_meant():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 4)

    report = dfm_fast.accelerate(Mlp())
    assert (report.swapped, report.kept) == ([], [])


def test_trials_leave_the_model_alone():
    model, _, _ = make("official_dit")
    calls = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    dfm_fast.accelerate(model.train())
    assert not calls
    assert model.blocks[0].training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# --- Arguments ------------------------------------------------------------------------------------


def test_only():
    model, _, _ = make("official_dit")

    def swapped(*only):
        report = dfm_fast.accelerate(dfm_fast.restore(model), only=only)
        return {name for name, _, _ in report.swapped}

    everything = swapped(*KINDS)
    assert everything == {f"blocks.{i}{s}" for i in (0, 1) for s in ("", ".mlp")} | {"final_layer"}
    assert swapped("norms") == {"final_layer"}
    assert swapped("blocks", "norms") == {"blocks.0", "blocks.1", "final_layer"}
    assert swapped("blocks.1*") == {"blocks.1", "blocks.1.mlp"}
    assert swapped("activations", "blocks.1*") == {"blocks.1.mlp"}
    assert swapped("*.attn") == set()
    assert swapped() == set()


@pytest.mark.parametrize(
    ("call", "argument", "error"),
    [
        (lambda m: dfm_fast.accelerate("model"), "model", TypeError),
        (lambda m: dfm_fast.accelerate(m, only="norms"), "only", TypeError),
        (lambda m: dfm_fast.accelerate(m, only=3), "only", TypeError),
        (lambda m: dfm_fast.accelerate(m, only=[3]), "only", TypeError),
        (lambda m: dfm_fast.accelerate(m, only=["norm"]), "only", ValueError),
        (lambda m: dfm_fast.restore(None), "model", TypeError),
    ],
)
def test_bad_calls_are_clear_errors(call, argument, error):
    model = nn.Sequential(nn.RMSNorm(4))
    with pytest.raises(error, match=f": {argument}: expected .*, got "):
        call(model)
    assert type(model[0]) is nn.RMSNorm


def test_every_unit_is_of_a_kind_and_found():
    assert {unit.kind for unit in UNITS.values()} == set(KINDS)
    assert unit_of(nn.RMSNorm(3)).new == "RMSNorm"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "1 module" in str(dfm_fast.accelerate(nn.RMSNorm(3)))


# --- Benchmark ------------------------------------------------------------------------------------


def test_a_row_of_the_benchmark():
    pytest.importorskip("diffusers.models.unets.unet_dreamlite")
    sys.path.append(str(ROOT))
    from benchmarks import bench_acceleration, harness

    assert "accelerated_unet-snapgen_512-bfloat16-contiguous-forward" in bench_acceleration.ROWS
    row = dataclasses.replace(bench_acceleration.unet_row("thin"), compiled={})
    record, _ = harness.measure(row, "cpu", 0.0, lambda text, end=None: None)
    assert record["speedup"]["eager"]["median"] > 0
    inputs = harness.make_inputs(row, "cpu")
    assert not operators(row.eager, *inputs)
    assert operators(row.ours, *inputs)
