"""FLUX over levels: against diffusers' own model and scheduler, on a tiny one of random weights."""

import pytest
import torch
from helpers import run_python
from small_models import assert_close, small
from torch import nn

diffusers = pytest.importorskip("diffusers")

from dfm_fast.flow import DecomposableFlow, Laplacian  # noqa: E402
from dfm_fast.models import FluxDFM, expand_to_dfm  # noqa: E402
from dfm_fast.ops import philox_normal  # noqa: E402

TINY = {
    "in_channels": 16,  # 4 in patches of 2 x 2
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 6, 6),
}
LENGTH = 3  # of the text


def tiny(**options):
    """diffusers' model."""
    torch.manual_seed(0)
    flux = diffusers.FluxTransformer2DModel(**{**TINY, **options}).eval()
    for p in flux.parameters():
        nn.init.normal_(p, std=0.1)
    return flux


def conditions(batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder_hidden_states": torch.randn(batch, LENGTH, 12, generator=generator),
        "pooled_projections": torch.randn(batch, 8, generator=generator),
    }


def inputs(batch=2, scale=2, height=8, width=12):
    """Levels and t."""
    generator = torch.Generator().manual_seed(2)
    sides = ((height, width), (scale * height, scale * width))
    levels = [torch.randn(batch, 4, *side, generator=generator) for side in sides]
    return levels, torch.rand(batch, 2, generator=generator)


def call_flux(flux, latents, t, **cond):
    """As diffusers' pipeline packs latents and numbers their patches."""
    n, c, height, width = latents.shape
    packed = latents.view(n, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    ids = torch.zeros(height // 2, width // 2, 3)
    ids[..., 1] += torch.arange(height // 2)[:, None]
    ids[..., 2] += torch.arange(width // 2)[None]
    cond = {"img_ids": ids.view(-1, 3), "txt_ids": torch.zeros(LENGTH, 3), **cond}
    out = flux(packed.reshape(n, -1, 4 * c), timestep=t, **cond).sample
    out = out.view(n, height // 2, width // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return out.reshape(latents.shape)


# --- The start ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guided", [False, True])
def test_starts_as_flux_bit_for_bit(guided, dtype):
    flux = tiny(guidance_embeds=guided).to(dtype)
    model = expand_to_dfm(flux, (4,))
    levels, t = inputs()
    levels, cond = [v.to(dtype) for v in levels], {k: v.to(dtype) for k, v in conditions().items()}
    guidance = {"guidance": torch.tensor([3.5, 2.0])} if guided else {}
    want = call_flux(flux, levels[0], t[:, 0], **cond, **guidance)
    coarse, fine = model(levels, t, **cond, **guidance)
    assert torch.equal(coarse, want)
    assert fine.shape == levels[1].shape
    assert not fine.any()
    # A level that nobody has active is zeros.
    again = model([levels[0], None], t, **cond, **guidance)
    assert again[1] is None
    assert torch.equal(again[0], want)


def test_levels_of_one_size_and_of_other_channels():
    model = expand_to_dfm(tiny(), (2, 4), in_channels=(4, 6))
    assert model.patch_sizes == (2, 2, 4)
    (coarse, fine), _ = inputs(scale=1)
    finest = torch.randn(2, 6, 16, 24)
    out = model([coarse, fine, finest], torch.rand(2, 3), **conditions())
    assert [v.shape for v in out] == [coarse.shape, fine.shape, finest.shape]


def test_time_and_sign_are_those_of_diffusers():
    """The library's sampler with one level is the Euler loop of diffusers' scheduler."""
    flux, cond, steps = tiny(), conditions(), 5
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    x = philox_normal((2, 4, 8, 8), 3)
    with torch.no_grad():
        for at in scheduler.timesteps:
            v = call_flux(flux, x, (at / 1000).expand(2), **cond)
            x = scheduler.step(v, at, x).prev_sample
    model, flow = expand_to_dfm(flux, ()), DecomposableFlow(Laplacian(1))
    got = flow.sample(model, (2, 4, 8, 8), steps=steps, seed=3, device="cpu", **cond)
    assert_close([got], [x])


# --- Training and sampling ------------------------------------------------------------------------


def random_finer_levels(model):
    for part in (model.patch_embedders, model.t_embedders, model.heads):
        for p in part.parameters():
            nn.init.normal_(p, std=0.1)
    return model


def test_none_equals_zeros():
    model = random_finer_levels(expand_to_dfm(tiny(), (4,)))
    levels, t = inputs()
    t[:, 1] = 1
    zeros = model([levels[0], torch.zeros_like(levels[1])], t, **conditions())
    assert_close(model([levels[0], None], t, **conditions())[:1], zeros[:1])
    moved = model([levels[0], None], t - torch.tensor([0.0, 0.5]), **conditions())
    assert not torch.allclose(moved[0], zeros[0])


def test_every_part_of_a_finer_level_learns():
    """At once where it meets what is not zero, else in the second step."""
    model = expand_to_dfm(tiny(), (4,)).train()
    levels, t = inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reached, losses = [], []
    for _ in range(4):
        out = model(levels, t, **conditions())
        loss = sum((v - level).square().mean() for v, level in zip(out, levels, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        reached.append({name for name, p in model.named_parameters() if p.grad.any()})
    parts = {name for name, _ in model.named_parameters() if not name.startswith("transformer")}
    later = {f"heads.0.modulation.{kind}" for kind in ("weight", "bias")}
    later |= {f"t_embedders.0.0.{kind}" for kind in ("weight", "bias")}
    assert parts - reached[0] == later
    assert parts <= reached[1]
    assert losses[-1] < losses[0]


def test_trains_and_samples():
    torch.manual_seed(0)
    flow = DecomposableFlow(Laplacian(2), stage_probs=(0.5, 0.5))
    model = expand_to_dfm(tiny(), (4,)).train()
    x = torch.linspace(-1, 1, 8).expand(32, 4, 8, 8)
    cond = {k: v.expand(32, *v.shape[1:]) for k, v in conditions(1).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = {1: [], 2: []}
    for _ in range(60):
        stage = flow.stages(1)[0] + 1
        loss = flow.loss(model, x, **cond).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[stage].append(loss.item())
    for values in losses.values():
        assert sum(values[-5:]) < 0.7 * sum(values[:5])
    few, other = conditions(), conditions(seed=9)
    options = {"steps": (3, 2), "seed": 0, "cfg_scale": 1.5, "uncond": other}
    out = flow.sample(model.eval(), (2, 4, 8, 8), **options, **few)
    assert out.shape == (2, 4, 8, 8)
    assert out.isfinite().all()


def test_checkpointing_changes_no_bit():
    flux, grads = tiny(), []
    for checkpointing in (False, True):
        model = random_finer_levels(expand_to_dfm(flux, (4,), checkpointing=checkpointing)).train()
        torch.manual_seed(0)
        random_finer_levels(model)
        levels, t = inputs()
        loss = sum(v.square().mean() for v in model(levels, t, **conditions()))
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_one_graph_under_the_compiler():
    model = random_finer_levels(expand_to_dfm(tiny(), (4,)))
    levels, t = inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for given in (levels, [levels[0], None]):
        assert_close(compiled(given, t, **conditions()), model(given, t, **conditions()))


# --- Saving, bad input ----------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    model = random_finer_levels(expand_to_dfm(tiny(guidance_embeds=True), (4,)))
    model.save_pretrained(tmp_path)
    again = FluxDFM.from_pretrained(tmp_path)
    levels, t = inputs()
    cond = {**conditions(), "guidance": 3.5}
    for got, want in zip(again(levels, t, **cond), model(levels, t, **cond), strict=True):
        assert torch.equal(got, want)


def test_memory_is_shared_with_the_model_that_was_given():
    flux = tiny()
    model = expand_to_dfm(flux, (4,))
    assert model.transformer.proj_out.weight.data_ptr() == flux.proj_out.weight.data_ptr()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("model", lambda: expand_to_dfm(nn.Linear(1, 1), (4,))),
        ("patch_sizes", lambda: FluxDFM(TINY, (1, 2))),
        ("patch_sizes", lambda: FluxDFM(TINY, ())),
        ("in_channels", lambda: FluxDFM(TINY, (2, 4), (4, 4, 4))),
        ("transformer", lambda: FluxDFM({**TINY, "out_channels": 8})),
    ],
)
def test_wrong_arguments_are_named(argument, call):
    with pytest.raises((ValueError, TypeError), match=f": {argument}: expected"):
        call()


def test_a_model_that_is_not_known():
    known = "expected a DFMTransformer or diffusers' FluxTransformer2DModel, got Linear"
    with pytest.raises(TypeError, match=known):
        expand_to_dfm(nn.Linear(1, 1), (4,))


def test_wrong_inputs_are_named():
    model = expand_to_dfm(tiny(), (4,))
    levels, t = inputs()

    def fails(match, *args, **changes):
        with pytest.raises((ValueError, TypeError), match=match):
            model(*args, **{**conditions(), **changes})

    fails("levels: expected 2 levels, got 1", levels[:1], t)
    fails(r"levels\[1\]: expected tokens", [levels[0], levels[1][..., :8]], t)
    fails(r"levels\[0\]: expected images", [v.unsqueeze(2) for v in levels], t)
    fails("guidance: expected None, as guidance_embeds is False, got 3.5", levels, t, guidance=3.5)
    model = expand_to_dfm(tiny(guidance_embeds=True), (4,))
    fails(r"guidance: expected a number or \[N\], got None", levels, t)


def test_diffusers_is_imported_for_flux_alone():
    code = "import sys, dfm_fast.models; sys.exit('diffusers' in sys.modules)"
    assert run_python("-c", code).returncode == 0


def test_own_models_expand_as_before():
    assert expand_to_dfm(small(patch_sizes=(1,)), (2,)).patch_sizes == (1, 2)
