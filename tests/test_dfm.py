"""The DFM transformer: against itself written out, against SiT, and what it promises."""

import copy
import json

import pytest
import torch
from helpers import assert_within_budget
from small_models import SMALL, assert_close, inputs, small
from torch import nn

from dfm_fast.flow import DecomposableFlow, Laplacian, sampler
from dfm_fast.models import (
    DFM_B,
    DFM_L,
    DFM_S,
    DFM_XL,
    DFMTransformer,
    expand_to_dfm,
)
from dfm_fast.models._functions import precondition, sincos_2d
from dfm_fast.models.dfm_plain import plain_forward

# --- Sizes ----------------------------------------------------------------------------------------


PAPER = {"in_channels": 16, "qk_norm": True, "block_conditioning": True}


@pytest.mark.parametrize(
    ("make", "options", "parameters"),
    [
        (DFM_XL, {}, 679_107_476),
        (DFM_S, {}, 33_404_564),
        (DFM_B, {}, 132_279_572),
        (DFM_L, {}, 461_245_460),
        (DFM_XL, {"in_channels": 16}, 679_245_776),
        (DFM_XL, {"in_channels": 16, "patch_sizes": (1, 2, 4)}, 684_117_840),
        (DFM_XL, {"patch_sizes": (2,)}, 674_816_272),  # SiT-XL/2
        # The paper prints 712.122 M for flow matching and 716.482 M for DFM: of the latter 41 k
        # (0.006 %) lie in parts that it does not describe.
        (DFM_XL, {**PAPER, "patch_sizes": (2,)}, 712_122_112),
        (DFM_XL, PAPER, 716_440_976),
    ],
)
def test_parameter_counts(make, options, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in make(**options).parameters()) == parameters


# --- Values ---------------------------------------------------------------------------------------

VARIANTS = {
    "default": {},
    "one-level": {"patch_sizes": (2,)},
    "three-levels": {"patch_sizes": (1, 2, 4)},
    "rope": {"positions": "rope"},
    "qk-norm": {"positions": "rope", "qk_norm": True},
    "stages": {"stage_embedding": True},
    "edm": {"data_std": (0.7, 0.2)},
    "haar": {"in_channels": (4, 12), "patch_sizes": (1, 1)},
    "unconditional": {"num_classes": 0},
    "flipped": {"flip_time": True},
    "block-conditioning": {"block_conditioning": True},
    "paper": {
        "positions": "rope",
        "qk_norm": True,
        "block_conditioning": True,
        "stage_embedding": True,
        "data_std": (0.7, 0.2),
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_itself_written_out(name):
    """Velocities and gradients of all parameters."""
    model = small(**VARIANTS[name]).double()
    levels, t, active, y = inputs(model, dtype=torch.float64)
    y = y if model.num_classes else None
    results = []
    for forward in (model, lambda *a, **k: plain_forward(model, *a, **k)):
        out = forward(levels, t, active, y=y)
        loss = sum(v.square().mean() for v in out)
        results.append((out, torch.autograd.grad(loss, list(model.parameters()))))
    # The sin-cos table and the sinusoid of t are in float32.
    assert_close(results[0][0], results[1][0], 1e-6)
    assert_close(results[0][1], results[1][1], 1e-6)
    single = small(**VARIANTS[name])
    got = single([v.float() for v in levels], t, active, y=y)
    assert_close(got, [v.float() for v in results[1][0]])


@pytest.mark.parametrize("blocks", [False, True], ids=["shared", "of-blocks"])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_conditioning_learns_as_exactly_as_in_plain_torch(batch, blocks):
    """All blocks' modulations are one layer: the gradient of what it reads is of 76 x 256 products
    in each element, where plain torch adds up a sum for each vector."""
    options = {"hidden_size": 256, "depth": 12, "num_heads": 4, "mlp_ratio": 1.0}
    model = small(**options, block_conditioning=blocks)
    for p in model.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    levels, t, active, y = inputs(model, batch=batch, base=4)
    dv = [torch.randn_like(v) for v in levels]
    parts = ("t_embedders", "y_embedder", "block_conditioning")

    def gradients(model, forward):
        dtype = model.patch_bias.dtype
        out = forward([v.to(dtype) for v in levels], t, active, y=y)
        given = [p for name, p in model.named_parameters() if name.startswith(parts)]
        return torch.autograd.grad(out, given, [v.to(dtype) for v in dv])

    exact = copy.deepcopy(model).double()
    want = gradients(exact, lambda *a, **k: plain_forward(exact, *a, **k))
    plain = gradients(model, lambda *a, **k: plain_forward(model, *a, **k))
    for got, ref, grad in zip(gradients(model, model), plain, want, strict=True):
        rounding = torch.finfo(torch.float32).eps / 2 * grad.norm()
        assert (got - grad).norm() <= 2 * (ref - grad).norm() + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["default", "block-conditioning"])
def test_modulations_lie_row_by_row(name, dtype):
    """Norms read shift and scale where they lie, if a row's numbers are side by side."""
    model = small(**VARIANTS[name]).to(dtype)
    _, t, _, y = inputs(model)
    for table in (
        model.modulation_table(t[None], y=y)[0],
        model.modulations(torch.rand_like(model.conditioning(t, None, y))),
    ):
        assert table.is_contiguous()
        assert all(v.stride(-1) == 1 for vectors in model._vectors(table) for v in vectors)


def test_other_sizes_than_the_kept_positions():
    model = small()
    levels, t, active, y = inputs(model, base=6)
    want = plain_forward(model, levels, t, active, y=y)
    assert_close(model(levels, t, active, y=y), want)
    narrow = [v[..., : v.shape[-1] // 2].contiguous() for v in levels]
    want = plain_forward(model, narrow, t, active, y=y)
    assert_close(model(narrow, t, active, y=y), want)


def test_sincos_turns_columns_then_rows():
    table = sincos_2d(3, 5, 16).view(3, 5, 2, 2, 4)  # [h, w, axis, sin or cos, frequency]
    frequencies = 10000.0 ** (-torch.arange(4) / 4)
    for i in range(3):
        for j in range(5):
            for axis, position in enumerate((j, i)):
                angles = position * frequencies
                torch.testing.assert_close(table[i, j, axis, 0], angles.sin())
                torch.testing.assert_close(table[i, j, axis, 1], angles.cos())


@pytest.mark.parametrize("name", ["default", "three-levels", "edm", "rope", "paper"])
def test_none_equals_zeros(name):
    """A level that nobody has active: its bias and its noise level of 1 are still there."""
    model = small(**VARIANTS[name])
    levels, t, active, y = inputs(model)
    t[:, -1], active[:, -1] = 1, False
    zeros = [*levels[:-1], torch.zeros_like(levels[-1])]
    got = model([*levels[:-1], None], t, active, y=y)
    assert got[-1] is None
    assert_close(got[:-1], model(zeros, t, active, y=y)[:-1])
    moved = model([*levels[:-1], None], t - 0.5 * ~active, active, y=y)
    assert not torch.allclose(moved[0], got[0])
    with torch.no_grad():
        model.patch_bias[-1] += 1
    assert not torch.allclose(model([*levels[:-1], None], t, active, y=y)[0], got[0])


def test_videos_by_rope_3d():
    model = small(positions="rope", hidden_size=96, num_heads=2)
    levels, t, active, y = inputs(model, batch=2, base=4, frames=3)
    out = model(levels, t, active, y=y)
    assert [v.shape for v in out] == [v.shape for v in levels]
    assert_close(out, plain_forward(model, levels, t, active, y=y))
    # Frames see one another.
    levels[0][:, :, 2] += 1
    assert not torch.allclose(model(levels, t, active, y=y)[1][:, :, 0], out[1][:, :, 0])


def test_a_new_model_gives_zeros():
    torch.manual_seed(0)
    model = DFMTransformer(**SMALL)
    assert all(not v.any() for v in model(*inputs(model)[:3]))


def test_hooks_and_replaced_layers_count():
    model = small(block_conditioning=True)
    levels, t, active, y = inputs(model)
    block, calls = model.blocks[0], []
    layers = [block.attn.qkv, block.attn.proj, model.block_conditioning]
    layers += [block.mlp.net[0].proj, block.mlp.net[2]]
    hooks = [m.register_forward_hook(lambda *_: calls.append("forward")) for m in layers]
    hooks += [m.register_full_backward_hook(lambda *_: calls.append("backward")) for m in layers]
    sum(v.sum() for v in model(levels, t, active, y=y)).backward()
    assert sorted(calls) == ["backward"] * 5 + ["forward"] * 5
    for hook in hooks:
        hook.remove()
    plain = small()
    seen = plain.modulation.register_forward_hook(lambda *_: calls.append("modulation"))
    plain(levels, t, active, y=y)
    assert calls[-1] == "modulation"
    seen.remove()
    for owner, name in ((plain.blocks[0].attn, "qkv"), (plain.blocks[0].attn, "proj")):
        layer = getattr(owner, name)
        setattr(owner, name, nn.Sequential(layer, nn.Tanh()))
        assert_close(plain(levels, t, active, y=y), plain_forward(plain, levels, t, active, y=y))
        setattr(owner, name, layer)


def test_preconditioning_gives_unit_variances():
    """Of what the network sees and of its target, uncorrelated: 2^20 values of each."""
    generator = torch.Generator().manual_seed(0)
    sigma, t = 0.35, torch.tensor(0.3, dtype=torch.float64)
    x, eps = (torch.randn(1 << 20, generator=generator, dtype=torch.float64) for _ in range(2))
    c_in, c_skip, c_out = precondition(sigma, t)
    x_t = (1 - t) * sigma * x + t * eps
    seen, target = c_in * x_t, (eps - sigma * x - c_skip * x_t) / c_out
    for value in (seen.std() - 1, target.std() - 1, (seen * target).mean()):
        assert value.abs() < 0.005


# --- Labels, training -----------------------------------------------------------------------------


def test_labels_are_dropped_in_training_only():
    model = small(class_dropout=1.0)
    levels, t, active, y = inputs(model)
    null = model(levels, t, active, y=torch.full_like(y, model.null_class))
    assert_close(model(levels, t, active), null)
    with_labels = model(levels, t, active, y=y)
    assert not torch.allclose(with_labels[0], null[0])
    assert_close(model.train()(levels, t, active, y=y), null)


@pytest.mark.parametrize("name", ["default", "paper"])
def test_checkpointing_changes_no_bit(name):
    grads = []
    for checkpointing in (False, True):
        options = {"checkpointing": checkpointing, "class_dropout": 0.0}
        model = small(**options, **VARIANTS[name]).train()
        levels, t, active, y = inputs(model)
        loss = sum(v.square().mean() for v in model(levels, t, active, y=y))
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_block_sees_the_conditioning_as_it_is_at_first():
    model = small()
    own = expand_to_dfm(model, (), block_conditioning=True)
    levels, t, active, y = inputs(model)
    assert_close(own(levels, t, active, y=y), model(levels, t, active, y=y))
    # A new model's modulations are 0: they learn in the first step, what they see in the second.
    torch.manual_seed(0)
    new = DFMTransformer(**SMALL, block_conditioning=True)
    optimizer = torch.optim.SGD(new.parameters(), lr=1.0)
    moved = []
    for _ in range(4):
        optimizer.zero_grad()
        out = new(levels, t, active, y=y)
        sum((v - level).square().mean() for v, level in zip(out, levels, strict=True)).backward()
        moved.append(new.block_conditioning.weight.grad.abs().sum().item())
        optimizer.step()
    assert moved[0] == 0 < moved[-1]


@pytest.mark.parametrize("name", ["default", "paper"])
def test_one_graph_under_the_compiler(name):
    model = small(**VARIANTS[name])
    levels, t, active, y = inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for given in (levels, [levels[0], None]):
        assert_close(compiled(given, t, active, y=y), model(given, t, active, y=y))
        loss = compiled(given, t, active, y=y)[0].square().mean()
        want = model(given, t, active, y=y)[0].square().mean()
        parameters = [model.heads.weight, model.patch_bias, model.blocks[0].attn.qkv.weight]
        assert_close(
            torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), 1e-4
        )
    modulations = model.modulation_table(t.unsqueeze(0), active, y=y)[0]
    got = compiled([levels[0], None], t, active, modulations=modulations)
    assert_close(got, model([levels[0], None], t, active, y=y))


def test_under_autocast_the_sum_of_blocks_stays_wide():
    model = small()
    levels, t, active, y = inputs(model)
    want = model(levels, t, active, y=y)
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        got = model(levels, t, active, y=y)
    assert seen == [torch.float32]
    assert all(v.dtype == torch.float32 for v in got)
    assert_close(got, want, 0.05)


def test_trains_and_samples():
    """Twenty steps on one picture: the loss falls well under that of a model of zeros, 1 + E x²."""
    torch.manual_seed(0)
    flow = DecomposableFlow(Laplacian(2))
    model = DFMTransformer(**{**SMALL, "in_channels": 1, "input_size": (4, 4)})
    x = torch.linspace(-1, 1, 8).expand(64, 1, 8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = flow.loss(model, x, y=torch.zeros(64, dtype=torch.int64)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:3]) * 10 / 3
    y = torch.zeros(2, dtype=torch.int64)
    options = {"cfg_scale": 1.5, "uncond": {"y": torch.full_like(y, model.null_class)}}
    out = flow.sample(model.eval(), (2, 1, 8, 8), steps=(3, 2), seed=0, y=y, **options)
    assert out.shape == (2, 1, 8, 8)
    assert out.isfinite().all()


# --- Modulations of all steps ahead ---------------------------------------------------------------

SCHEDULES = {1: ((2,), (4,)), 2: ((1, 2), (3, 2)), 3: ((1, 2, 4), (2, 2, 2))}


def sample(model, flow, seed=0, **options):
    side, y = 8 * model.patch_sizes[-1], torch.tensor([1, 2])
    call = options.pop("call", model)
    options = {"uncond": {"y": torch.full_like(y, model.null_class)}, "y": y, **options}
    return flow.sample(call, (2, 4, side, side), seed=seed, device="cpu", **options)


def recomputed(model):
    """The same model, which offers nothing."""
    return lambda *args, **cond: model(*args, **cond)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("levels", SCHEDULES)
def test_modulations_ahead_cost_no_accuracy(levels, scale, dtype, monkeypatch):
    """Against samples of the same model in float64, from the same states in float32."""
    patches, steps = SCHEDULES[levels]
    options = {"stage_embedding": True, "block_conditioning": levels == 2}
    model, flow = (
        small(patch_sizes=patches, **options).to(dtype),
        DecomposableFlow(Laplacian(levels)),
    )
    exact = copy.deepcopy(model).double()

    def wide(given, t, active, **cond):
        out = exact([None if v is None else v.double() for v in given], t, active, **cond)
        return [None if v is None else v.float() for v in out]

    options = {"steps": steps, "cfg_scale": scale}
    want = sample(exact, flow, call=wide, **options).double()
    without = sample(model, flow, call=recomputed(model), **options)
    calls, batch = [], 2 if scale == 1 else 4
    call = model.conditioning
    monkeypatch.setattr(model, "conditioning", lambda t, *a: calls.append(len(t)) or call(t, *a))
    ahead = sample(model, flow, **options)
    assert calls == [k * batch for k in steps]
    assert_within_budget(ahead, without, want, cap=1e3, what="samples", inputs=dtype)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("graphs", [True, False])
def test_modulations_ahead_in_every_kind_of_step(stacked, graphs, monkeypatch):
    """Guided in a part of the schedule, in one batch or two, by Heun's rule; in replays, where
    what was captured sees the step on the device alone."""
    model, flow = small(stage_embedding=True), DecomposableFlow(Laplacian(2))
    options = {"steps": (4, 3), "cfg_scale": 2.0, "cfg_interval": (0.2, 0.8), "solver": "heun"}
    if not stacked:
        options["uncond"] = {"y": None}
    want = sample(model, flow, call=recomputed(model), **options)
    captured = []
    if graphs:
        run = sampler.Sampler.__call__
        monkeypatch.setattr(sampler.Sampler, "__call__", lambda self, *a: run(self, *a[:-1], True))
        monkeypatch.setattr(sampler, "capture", lambda call, _: captured.append(call) or call)
    got = sample(model, flow, **options)
    assert_close([got], [want])
    assert bool(captured) == graphs


def test_modulations_ahead_where_they_are_none():
    model = small()
    t, y = torch.rand(33, 2, 2), torch.tensor([1, 2])
    assert model.modulation_table(t, y=y) is None  # 66 rows, 64 columns of weights
    table = model.modulation_table(t[:32], y=y)
    want = model.modulations(model.conditioning(t[3], None, y))
    assert_close([table[3]], [want])
    with pytest.raises(ValueError, match=r"y: expected int64 labels \[2\], got torch.int64 \[3\]"):
        sample(model, DecomposableFlow(Laplacian(2)), steps=(1, 1), y=torch.arange(3))

    class Shard(torch.Tensor):
        """As FSDP2's: whole in forward only."""

    model.modulation.weight = nn.Parameter(model.modulation.weight.detach().as_subclass(Shard))
    assert model.modulation_table(t[:1], y=y) is None


# --- Expansion ------------------------------------------------------------------------------------


def test_expanded_model_is_unchanged_and_learns():
    model = small(patch_sizes=(1,))
    wide = expand_to_dfm(model, (2,))
    assert wide.patch_sizes == (1, 2)
    levels, t, active, y = inputs(wide)
    (want,) = model(levels[:1], t[:, :1], y=y)
    coarse, fine = wide(levels, t, active, y=y)
    assert_close([coarse], [want])
    assert not fine.any()
    wide.train()(levels, t, active, y=y)[1].sum().backward()
    assert wide.heads.bias.grad[-1] != 0


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in ("one-level", "haar")])
def test_expansion_changes_nothing_whatever_the_options(name):
    """Of all levels that were there, in every stage; also with what may be added on the way."""
    variant = VARIANTS[name]
    model, std = small(**variant), variant.get("data_std")
    levels, t, active, y = inputs(model)
    y = y if model.num_classes else None
    want = model(levels, t, active, y=y)
    finer, flag = [*levels, torch.randn(3, 4, 32, 32)], torch.ones(3, 1, dtype=torch.bool)
    if len(levels) == 3:
        finer[-1] = torch.randn(3, 4, 64, 64)
    patch, options = 2 * model.patch_sizes[-1], {}
    if std:
        options["data_std"] = (*std, 0.1)
    for more in ({}, {"stage_embedding": True, "block_conditioning": True, "checkpointing": True}):
        wide = expand_to_dfm(model, (patch,), **options, **more)
        for on in (True, False):  # the new level takes part, or waits
            seen = [*finer[:-1], finer[-1] if on else None]
            noise = torch.rand(3, 1) if on else torch.ones(3, 1)
            stage = torch.cat((active, flag & on), 1)
            got = wide(seen, torch.cat((t, noise), 1), stage, y=y)
            assert_close(got[: len(levels)], want)


@pytest.mark.parametrize(
    ("option", "value"),
    [("positions", "rope"), ("qk_norm", True), ("num_classes", 7), ("flip_time", True),
     ("data_std", (0.5, 0.5)), ("num_heads", 1), ("hidden_size", 32)],
)  # fmt: skip
def test_expansion_refuses_what_would_change_the_model(option, value):
    with pytest.raises(ValueError, match=f"expand_to_dfm: {option}: expected .*trained, got"):
        expand_to_dfm(small(patch_sizes=(1,)), (2,), **{option: value})
    edm = small(patch_sizes=(1,), data_std=(0.7,))
    for std in (None, (0.7,), (0.6, 0.5)):
        with pytest.raises(ValueError, match=r"data_std: expected \[0.7\]"):
            expand_to_dfm(edm, (2,), data_std=std)


# --- Saving ---------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    model = small(positions="rope", qk_norm=True, data_std=(0.7, 0.2))
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["_class_name"] == "DFMTransformer"
    assert config["patch_sizes"] == [1, 2]
    again = DFMTransformer.from_pretrained(tmp_path / "model")
    levels, t, active, y = inputs(model)
    for got, want in zip(again(levels, t, active, y=y), model(levels, t, active, y=y), strict=True):
        assert torch.equal(got, want)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    kept = small()
    kept.save_pretrained(tmp_path / "kept")
    assert torch.equal(
        DFMTransformer.from_pretrained(tmp_path / "kept").position_table, kept.position_table
    )
    half = DFMTransformer.from_pretrained(tmp_path / "kept", dtype=torch.bfloat16)
    assert half.heads.weight.dtype == torch.bfloat16


def test_weights_that_do_not_fit_are_named(tmp_path):
    small().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"heads.bias: expected shape \[9\], got \[20\]"):
        DFMTransformer.from_pretrained(tmp_path, in_channels=1, patch_sizes=[1, 2, 2])


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    model = small()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        small(seed=1).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("patch_sizes", {"patch_sizes": ()}),
        ("patch_sizes", {"patch_sizes": (1, 0)}),
        ("hidden_size", {"hidden_size": 66}),
        ("positions", {"positions": "learned"}),
        ("class_dropout", {"class_dropout": 1.5}),
        ("in_channels", {"in_channels": (4,)}),
        ("data_std", {"data_std": (1.0,)}),
        ("data_std", {"data_std": (1.0, 0.0)}),
    ],
)
def test_wrong_arguments_are_named(argument, options):
    with pytest.raises((ValueError, TypeError), match=f"DFMTransformer: {argument}: expected"):
        DFMTransformer(**{**SMALL, **options})


def test_wrong_inputs_are_named():
    model = small(stage_embedding=True)
    levels, t, active, y = inputs(model)

    def fails(match, *args, **kwargs):
        with pytest.raises((ValueError, TypeError), match=match):
            model(*args, **kwargs)

    fails("levels: expected 2 levels, got 1", levels[:1], t, active)
    fails("levels: expected at least one level", [None, None], t, active)
    fails(r"levels\[1\]: expected tokens", [levels[0], levels[1][..., :8]], t, active)
    fails(r"levels\[0\]: expected \[N, 4,", [levels[0][:, :3], levels[1]], t, active)
    fails("active: expected", levels, t)
    fails("y: expected int64", levels, t, active, y=y.float())
    fails("y: expected int64", levels, t, active, y=y[:2])
    video = [v.unsqueeze(2).expand(-1, -1, 2, -1, -1) for v in levels]
    fails("levels: expected images, as positions are 'sincos', got 2 frames", video, t, active)
