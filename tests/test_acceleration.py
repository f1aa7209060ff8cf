"""accelerate and restore: other people's models, by value before and after."""

import copy
import io
import json
import pickle
import subprocess
import sys
import warnings

import accelerated_models as models
import pytest
import torch
import torch.nn.functional as F
from accelerated_models import fill, randn
from helpers import INTERPRET, ROOT
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import dfm_fast
from dfm_fast.acceleration._units import KINDS, UNITS, unit_of

pytestmark = pytest.mark.skipif(INTERPRET, reason="operators have their own tests there")
DIFFUSERS = [name for name in models.MODELS if name != "official_dit"]


def make(name):
    if name in DIFFUSERS:
        pytest.importorskip("diffusers.models.unets.unet_dreamlite")
    model, inputs, given = models.MODELS[name]()
    return model.eval(), inputs, given


def cast(tree, dtype):
    """Floating tensors only."""
    return pytree.tree_map(
        lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v, tree
    )


def output(model, inputs, given):
    (y,) = (v for v in pytree.tree_leaves(model(**inputs, **given)) if v is not None)
    return y


def run(model, inputs, given, dtype=torch.float32):
    """Output, and all gradients as one vector."""
    inputs = {k: v.to(dtype).requires_grad_() for k, v in inputs.items()}
    y = output(model, inputs, cast(given, dtype))
    leaves = [*inputs.values(), *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(y, leaves, randn(*y.shape, seed=9).to(y), allow_unused=True)
    flat = [g.flatten() for g in grads if g is not None]
    return y.detach(), torch.cat(flat).detach()


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


class Operators(TorchDispatchMode):
    """Names of this library's operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dfm_fast":
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def operators(function, *args, **kwargs):
    with Operators() as seen:
        function(*args, **kwargs)
    return seen.names


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


# --- What somebody did to the model before or after -----------------------------------------------


def trainable_adapters(model, targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=targets, r=2, lora_alpha=4)
    adapted = peft.inject_adapter_in_model(config, model)
    for i, (name, p) in enumerate(adapted.named_parameters()):
        if "lora_" in name:
            p.data.copy_(0.3 * randn(*p.shape, seed=i))
    return adapted


TARGETS = [
    "to_q",
    "to_v",
    "to_out.0",
    "proj",
    "net.2",
    "time_emb_proj",
    "pointwise",
    "conv_shortcut",
]


@pytest.mark.parametrize("first", ["accelerate", "adapt"])
def test_adapters(first):
    model, inputs, given = make("dreamlite")
    theirs = trainable_adapters(copy.deepcopy(model), TARGETS)
    if first == "accelerate":
        dfm_fast.accelerate(model)
        ours = trainable_adapters(model, TARGETS)
    else:
        ours = copy.deepcopy(theirs)
        assert dfm_fast.accelerate(ours).swapped
    exact = run(copy.deepcopy(theirs).double(), inputs, given, torch.float64)
    both = run(ours, inputs, given), run(theirs, inputs, given)
    for got, low, ex in zip(*both, exact, strict=True):
        assert relative(got, ex) <= 2 * relative(low, ex) + torch.finfo(torch.float32).eps / 2
    with torch.no_grad():
        seen = operators(output, ours, inputs, given)
    assert "qk_norm_rope" in seen  # projections are called; the norms of heads stay fused
    assert "separable_conv2d" not in seen  # whose weights are not all there is
    assert "group_norm_silu" in seen


def test_pefts_own_model():
    peft = pytest.importorskip("peft")
    model, inputs, given = make("dreamlite")
    config = peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    want = output(adapted, inputs, given)
    assert dfm_fast.accelerate(adapted).swapped
    assert relative(output(adapted, inputs, given), want) < 1e-5


def inner_calls(model, inputs, given):
    """How often the forward hook of every module runs."""
    calls, handles = {}, []

    def hook_of(name):
        def hook(*_):
            calls[name] = calls.get(name, 0) + 1

        return hook

    for name, m in model.named_modules():
        handles.append(m.register_forward_hook(hook_of(name)))
    with torch.no_grad():
        y = output(model, inputs, given)
    for handle in handles:
        handle.remove()
    return calls, y


@pytest.mark.parametrize(
    "name", ["dreamlite", "sd3", "flux", "dit", "autoencoder_tiny", "official_dit"]
)
def test_hooks_of_inner_modules_run(name):
    model, inputs, given = make(name)
    want, y = inner_calls(model, inputs, given)
    dfm_fast.accelerate(model)
    got, z = inner_calls(model, inputs, given)
    assert got == want
    assert relative(z, y) < 1e-5


@pytest.mark.parametrize("path", [
    "down_blocks.0.resnets.1.conv1.depthwise",
    "down_blocks.0.resnets.1.norm2",
    "down_blocks.2.attentions.0.transformer_blocks.0.attn1.norm_k",
    "down_blocks.2.attentions.0.transformer_blocks.0.ff.net.0",
    "up_blocks.0.upsamplers.0.conv",
])  # fmt: skip
@pytest.mark.parametrize("kind", ["forward", "pre", "replaced"])
def test_one_hook_changes_what_its_module_gives(path, kind):
    model, inputs, given = make("dreamlite")
    other = copy.deepcopy(model)
    dfm_fast.accelerate(model)
    for m in (model, other):
        inner = m.get_submodule(path)
        if kind == "forward":
            inner.register_forward_hook(lambda module, args, y: 0.5 * y)
        elif kind == "pre":
            inner.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        else:
            old = inner.forward
            inner.forward = lambda *args, old=old: 0.5 * old(*args)
    with torch.no_grad():
        got, want = (output(m, inputs, given) for m in (model, other))
    assert relative(got, want) < 1e-5


def test_a_backward_hook_inside():
    model, inputs, given = make("dreamlite")
    dfm_fast.accelerate(model)
    seen = []
    norm = model.mid_block.attentions[0].transformer_blocks[0].attn1.norm_q
    norm.register_full_backward_hook(lambda *_: seen.append(1))
    output(model, inputs, given).sum().backward()
    assert seen


def test_a_forward_that_was_replaced_is_kept():
    norm = nn.RMSNorm(8)
    norm.forward = lambda x: x + 1
    report = dfm_fast.accelerate(nn.Sequential(norm))
    assert not report.swapped
    assert "replaced" in report.kept[0][1]
    assert torch.equal(norm(torch.zeros(8)), torch.ones(8))


def test_another_attention_processor():
    model, inputs, given = make("dreamlite")
    dfm_fast.accelerate(model)

    class Zero:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return torch.zeros_like(hidden_states)

    want = copy.deepcopy(model)
    for m in (model, dfm_fast.restore(want)):
        m.set_attn_processor(Zero())
    with torch.no_grad():
        assert relative(output(model, inputs, given), output(want, inputs, given)) < 1e-5
        assert "multi_query_attention" not in operators(output, model, inputs, given)
        model.set_default_attn_processor()
        assert "multi_query_attention" in operators(output, model, inputs, given)


def test_masks_of_the_text():
    model, inputs, given = make("dreamlite")
    given["encoder_attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        want = output(model, inputs, given)
        dfm_fast.accelerate(model)
        assert relative(output(model, inputs, given), want) < 1e-5
        del given["encoder_attention_mask"]
        assert relative(output(model, inputs, given), want) > 1e-3


def test_masks_of_keys():
    model, inputs, _ = make("dreamlite")
    attn = model.mid_block.attentions[0].transformer_blocks[0].attn2
    x, text = randn(2, 9, 96), inputs["encoder_hidden_states"]
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    want = attn(x, text, attention_mask=mask)
    dfm_fast.accelerate(attn)
    assert relative(attn(x, text, attention_mask=mask), want) < 1e-5
    assert "multi_query_attention" in operators(attn, x, text, attention_mask=mask)


def test_frozen():
    model, inputs, given = make("dreamlite")
    model.requires_grad_(False)
    model.conv_in.requires_grad_(True)
    other = copy.deepcopy(model)
    dfm_fast.accelerate(model)
    grads = []
    for m in (model, other):
        output(m, inputs, given).square().sum().backward()
        grads.append(m.conv_in.weight.grad)
        assert all(p.grad is None for p in m.parameters() if not p.requires_grad)
    assert relative(*grads) < 1e-4


def test_dropout_in_training():
    """Drawn by the same modules in the same order: the same numbers for the same seed."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("diffusers.models.unets.unet_dreamlite")
    from diffusers.models.attention import FeedForward
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_dreamlite import ResnetBlock2DDreamLite

    assert diffusers
    widths = {"in_channels": 32, "out_channels": 64, "temb_channels": 16, "dropout": 0.5}
    cases = [
        (ResnetBlock2DDreamLite(**widths, use_sep_conv=True), (randn(2, 32, 6, 6), randn(2, 16))),
        (ResnetBlock2D(**widths), (randn(2, 32, 6, 6), randn(2, 16))),
        (FeedForward(32, dropout=0.5, final_dropout=True), (randn(2, 6, 32),)),
        (models.Mlp(32, 64, drop=0.5), (randn(2, 6, 32),)),
        (nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 32)),
         (randn(2, 6, 32),)),
    ]  # fmt: skip
    for module, given in cases:
        fill(module).train()
        torch.manual_seed(3)
        want = module(*given)
        assert dfm_fast.accelerate(module).swapped
        torch.manual_seed(3)
        got = module(*given)
        assert relative(got, want) < 1e-5, module
        torch.manual_seed(4)
        assert relative(module(*given), want) > 1e-2
        module.eval()
        got = module(*given)
        assert relative(got, dfm_fast.restore(module)(*given)) < 1e-5


@pytest.mark.parametrize("name", ["dreamlite", "official_dit"])
def test_autocast(name):
    model, inputs, given = make(name)
    other = copy.deepcopy(model)
    dfm_fast.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (output(m, inputs, given) for m in (model, other))
    assert got.dtype == want.dtype
    exact = output(other, inputs, given)
    assert relative(got, exact) <= 2 * relative(want, exact) + 4e-3


def test_torch_func_and_forward_mode_use_the_old_code():
    model = fill(nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.RMSNorm(5)))
    x = randn(3, 2, 8, 5)
    want = torch.stack([model(v) for v in x])
    tangent = torch.func.jvp(model, (x[0],), (x[1],))[1]
    assert dfm_fast.accelerate(model).swapped
    torch.testing.assert_close(torch.vmap(model)(x), want)
    torch.testing.assert_close(torch.func.jvp(model, (x[0],), (x[1],))[1], tangent)
    state = {k: 2 * v for k, v in model.state_dict().items()}
    got = torch.func.functional_call(model, state, (x[0],))
    want = torch.func.functional_call(dfm_fast.restore(model), state, (x[0],))
    torch.testing.assert_close(got, want)


def test_checkpointing():
    model, inputs, given = make("dreamlite")
    other = copy.deepcopy(model)
    dfm_fast.accelerate(model)
    for m in (model, other):
        m.train().enable_gradient_checkpointing()
    got, want = (run(m, inputs, given)[1] for m in (model, other))
    assert relative(got, want) < 1e-4


# --- Compiled and sharded -------------------------------------------------------------------------


class Graphs:
    """A backend of torch.compile that runs what it is given, and knows its operators."""

    def __init__(self):
        self.names = []

    def __call__(self, graph, inputs):
        self.names += [str(node.target) for node in graph.graph.nodes]
        return graph.forward


# Operators of the graph.
COMPILED = {
    "sd3": ("gated_residual_ada_layer_norm", "qk_norm_rope"),
    "flux": ("gated_residual", "qk_norm_rope"),
    "official_dit": ("gated_residual_ada_layer_norm", "gelu_tanh"),
    "autoencoder_tiny": ("upsample_conv2d",),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    model, inputs, given = make(name)
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        want = output(compiled, inputs, given)
        assert not any("dfm_fast" in target for target in graphs.names)
        assert dfm_fast.accelerate(compiled).swapped  # what is inside, after it was compiled
        assert relative(output(compiled, inputs, given), want) < 1e-5
        for op in COMPILED[name]:
            assert any(f"dfm_fast.{op}" in target for target in graphs.names), op
        dfm_fast.restore(compiled)
        assert torch.equal(output(compiled, inputs, given), want)


def test_dreamlite_compiled_with_its_gradients():
    model, inputs, given = make("dreamlite")
    want = run(model, inputs, given)
    dfm_fast.accelerate(model)
    torch._dynamo.reset()
    block = model.down_blocks[2].attentions[0].transformer_blocks[0]
    x, text = randn(2, 9, 96), inputs["encoder_hidden_states"]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(x, encoder_hidden_states=text), block(x, encoder_hidden_states=text)
    )
    resnet = model.down_blocks[1].resnets[0]
    x, temb = randn(2, 32, 6, 6).requires_grad_(), randn(2, 128)
    ys = torch.compile(resnet, backend="aot_eager", fullgraph=True)(x, temb), resnet(x, temb)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in ys]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    for got, w in zip(run(model, inputs, given), want, strict=True):
        assert relative(got, w) < 1e-5


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["accelerate", "shard"])
def test_fsdp(process_group, first):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, inputs, given = make("official_dit")
    want = run(model, inputs, given)
    mesh = init_device_mesh("cpu", (1,))

    def shard():
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    kinds = [type(m) for m in model.modules()]
    steps = [shard, lambda: dfm_fast.accelerate(model)]
    for step in steps if first == "shard" else reversed(steps):
        step()
    block = model.blocks[0]
    assert isinstance(block, FSDPModule)
    assert isinstance(block, models.DiTBlock)
    model(**inputs, **given).backward(randn(*want[0].shape, seed=9))
    got = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
    assert relative(got, want[1][-got.numel() :]) < 1e-5
    with torch.no_grad():
        assert "gated_residual_ada_layer_norm" in operators(output, model, inputs, given)
        dfm_fast.restore(model)
        assert not operators(output, model, inputs, given)
        assert relative(output(model, inputs, given), want[0]) < 1e-5
    assert isinstance(block, FSDPModule)
    assert type(block).__name__ == "FSDPDiTBlock"
    assert [
        next(k for k in type(m).__mro__ if "FSDP" not in k.__name__) for m in model.modules()
    ] == kinds


# --- Layers of torch ------------------------------------------------------------------------------

# layers, shape of the input, operators that then run
LAYERS = {
    "rms_norm": (lambda: nn.RMSNorm(12), (2, 3, 12), ["rms_norm"]),
    "rms_norm of two dimensions": (lambda: nn.RMSNorm((3, 4)), (2, 3, 4), ["rms_norm"]),
    "rms_norm without weight": (
        lambda: nn.RMSNorm(12, elementwise_affine=False), (2, 12), ["rms_norm"]),
    "group_norm": (lambda: nn.GroupNorm(3, 12), (2, 12, 5), ["group_norm_silu"]),
    "group_norm, silu": (
        lambda: nn.Sequential(nn.GroupNorm(3, 12), nn.SiLU(), nn.SiLU()), (2, 12, 4, 5),
        ["group_norm_silu"]),
    "depthwise": (
        lambda: nn.Conv2d(6, 6, 5, 2, 1, groups=6), (2, 6, 9, 8), ["depthwise_conv2d"]),
    "depthwise, same": (
        lambda: nn.Conv2d(6, 6, 3, padding="same", groups=6), (2, 6, 9, 8), ["depthwise_conv2d"]),
    "upsample": (
        lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 6, 3, padding=1)),
        (2, 4, 5, 6), ["upsample_conv2d"]),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 6)), (2, 300, 8), []),
    "mlp, tanh": (
        lambda: nn.Sequential(
            nn.Linear(8, 20), nn.GELU("tanh"), nn.Dropout(0.1), nn.Linear(20, 6), nn.ReLU()),
        (2, 7, 8), ["gelu_tanh"]),
}  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_torch(name, dtype, layout):
    build, shape, expected = LAYERS[name]
    layer = fill(build()).to(dtype).eval()
    x = randn(*shape, dtype=dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=layout)
    given = {"x" if "rms_norm" in name else "input": x}
    exact = run(copy.deepcopy(layer).double(), given, {}, torch.float64)
    low = run(layer, given, {}, dtype)
    assert dfm_fast.accelerate(layer).swapped
    # In float64 there is nothing wider: two orders of summation, each of a few roundings.
    rounding = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    for g, lo, ex in zip(run(layer, given, {}, dtype), low, exact, strict=True):
        assert g.dtype == lo.dtype
        assert relative(g, ex) <= 2 * relative(lo, ex) + rounding
    with torch.no_grad():
        seen = operators(layer, x)
        assert all(op in seen for op in expected), seen
        y = layer(x)
        assert relative(y, exact[0]) <= 2 * relative(low[0], exact[0]) + rounding
        assert y.stride() == dfm_fast.restore(layer)(x).stride()


KEPT = {
    "groups of several": (lambda: nn.Conv2d(8, 8, 3, groups=4), "groups of several channels"),
    "dilated": (lambda: nn.Conv2d(8, 8, 3, groups=8, dilation=2), "dilation"),
    "even kernel": (lambda: nn.Conv2d(8, 8, 4, groups=8), "a kernel that is not"),
    "stride 3": (lambda: nn.Conv2d(8, 8, 3, 3, groups=8), "a stride that is not 1 or 2"),
    "reflect": (
        lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect"), "of zeros"),
    "wide": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=3), "padding of a kernel or more"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_layers_that_are_kept(name):
    build, reason = KEPT[name]
    layer = build()
    report = dfm_fast.accelerate(nn.Sequential(layer))
    assert not report.swapped
    assert [k for k, _ in report.kept] == ["0"]
    assert reason in report.kept[0][1]
    assert reason in str(report)
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize("layers", [
    lambda: (nn.Upsample(scale_factor=3), nn.Conv2d(8, 8, 3, padding=1)),
    lambda: (nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 8, 3, padding=1)),
    lambda: (nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 5, padding=2)),
    lambda: (nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3)),
    lambda: (nn.Upsample((8, 8)), nn.Conv2d(8, 8, 3, padding=1)),
    lambda: (nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
    lambda: (nn.SiLU(), nn.GroupNorm(2, 8)),
])  # fmt: skip
def test_sequences_that_are_none(layers):
    assert "Sequential" not in [
        kind for _, kind, _ in dfm_fast.accelerate(nn.Sequential(*layers())).swapped
    ]


def test_a_sequence_may_change():
    model = fill(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()))
    dfm_fast.accelerate(model)
    x = randn(2, 8, 3, 3)
    model[1] = nn.Tanh()
    torch.testing.assert_close(
        model(x), torch.tanh(F.group_norm(x, 2, model[0].weight, model[0].bias))
    )


def test_inputs_that_no_kernel_takes():
    norm, conv = fill(nn.RMSNorm(4)), nn.Conv2d(8, 8, 3, groups=8)
    mixed = randn(3, 4, dtype=torch.bfloat16)
    want = norm(mixed)
    for layer in (norm, conv):
        assert dfm_fast.accelerate(layer).swapped
    assert norm(torch.empty(0, 4)).shape == (0, 4)
    assert norm(mixed).dtype == want.dtype
    assert torch.equal(norm(mixed), want)
    with pytest.raises(RuntimeError, match="channels"):  # torch's own message
        conv(randn(1, 4, 5, 5))
    assert norm.to("meta")(torch.empty(3, 4, device="meta")).device.type == "meta"


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


def test_a_layout_that_is_not_meant():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 4)

    report = dfm_fast.accelerate(Mlp())
    assert (report.swapped, report.kept) == ([], [])


def test_trials_leave_the_model_alone():
    model, inputs, given = make("official_dit")
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
