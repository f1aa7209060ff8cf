"""SnapGenDecoder: against itself in plain torch, by tiles, in a pipeline, on disk."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import DEVICES, INTERPRET, dtypes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dfm_fast.models import DFMTransformer, SnapGenDecoder, snapgen_decoder
from dfm_fast.models.snapgen_decoder_plain import plain_forward
from dfm_fast.training import saved

# Triton's kernels take no float64, and its interpreter takes seconds for a picture.
once = pytest.mark.skipif(INTERPRET, reason="the same layers in every backend")

TINY = {
    "latent_channels": 4, "block_out_channels": (6, 10, 12), "layers_per_block": (1, 1, 2),
}  # fmt: skip


def tiny(seed=0, **options):
    """Of weights that keep the magnitude, so that every one of them shows."""
    model = SnapGenDecoder(**{**TINY, **options}).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        value = torch.randn(p.shape, generator=generator)
        p.data.copy_(value * (0.2 if p.ndim == 1 else p[0].numel() ** -0.5))
    return model


def latents(*size, n=2, dtype=torch.float32, device="cpu", channels=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, *size, generator=generator).to(device, dtype)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


class Seen(TorchDispatchMode):
    """Names of what was called, and the largest of what came out of it."""

    def __init__(self, channels=()):
        super().__init__()
        self.names, self.largest, self.channels = [], 0, channels

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if isinstance(out, torch.Tensor) and out.ndim == 4 and out.shape[1] not in self.channels:
            self.largest = max(self.largest, out.numel())
        return out


# --- The table of layers --------------------------------------------------------------------------


def table():
    """(name, parameters, GMAC) of the rows of the module's docstring."""
    rows = re.findall(r"^\| .*\|$", snapgen_decoder.__doc__, re.M)[1:]
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in rows]
    return [(c[1], int(c[2].replace(",", "")), float(c[3])) for c in cells]


@once
def test_the_table_is_the_model():
    with torch.device("meta"):
        model = SnapGenDecoder()
        z = torch.empty(1, 16, 128, 128)
    with torch.no_grad(), FlopCounterMode(display=False, depth=9) as counter:
        assert model(z).shape == (1, 3, 1024, 1024)
    counts = {k.removeprefix("SnapGenDecoder."): v for k, v in counter.get_flop_counts().items()}
    names = ["conv_in"]
    for i, stage in enumerate(model.stages):
        names += [f"stages.{i}.blocks", *([f"stages.{i}.upsample"] if stage.upsample else [])]
    *rows, last, total = table()
    assert len(rows) == len(names)
    for name, (title, parameters, gmac) in zip(names, rows, strict=True):
        module = model.get_submodule(name)
        assert sum(p.numel() for p in module.parameters()) == parameters, title
        assert sum(counts[name].values()) / 2e9 == pytest.approx(gmac, abs=0.0051), title
    assert sum(p.numel() for p in model.conv_out.parameters()) == last[1]
    assert sum(p.numel() for p in model.parameters()) == total[1]
    assert abs(total[1] / 1.38e6 - 1) < 0.02  # the paper's
    assert counter.get_total_flops() / 2e9 == pytest.approx(total[2], abs=0.051)
    assert sum(r[2] for r in (*rows, last)) == pytest.approx(total[2], abs=0.051)


# --- Against plain torch --------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gradients", [False, True])
def test_equals_itself_written_out(device, layout, gradients):
    model = tiny().to(device)
    z = latents(5, 7, device=device).contiguous(memory_format=layout)
    with torch.set_grad_enabled(gradients):
        got = model(z)
    want = plain_forward(copy.deepcopy(model).double(), z.double())
    assert got.shape == (2, 3, 20, 28)
    assert got.is_contiguous(memory_format=layout)
    assert relative(got, want) < 1e-6


def run(forward, model, z):
    """Output and all gradients."""
    z = z.detach().requires_grad_()
    y = forward(model, z)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return [y, *torch.autograd.grad(y, [z, *model.parameters()], dy)]


@once
@pytest.mark.parametrize(
    ("device", "dtype"), [(device, dtype) for device in DEVICES for dtype in dtypes(device)]
)
def test_within_the_error_budget(device, dtype):
    """Against float64, of the same rounded weights and latents: at most twice the plain one's."""
    model, z = tiny().to(device, dtype), latents(6, 5, device=device, dtype=dtype)
    exact = run(plain_forward, copy.deepcopy(model).cpu().double(), z.cpu().double())
    with torch.no_grad():
        fused = model(z)
    plain, slack = run(plain_forward, model, z), torch.finfo(dtype).eps
    slack *= 16 if dtype == torch.float64 else 1  # there the yardstick is as exact
    ours = run(SnapGenDecoder.__call__, model, z)
    for got, p, ex in zip(ours, plain, exact, strict=True):
        assert got.dtype == dtype
        assert relative(got.cpu(), ex) <= 2 * relative(p.cpu(), ex) + slack
    assert relative(fused.cpu(), exact[0]) <= 2 * relative(plain[0].cpu(), exact[0]) + slack


def test_silu_takes_no_pass_without_gradients():
    model, z = tiny(), latents(4, 4)
    with torch.no_grad(), Seen() as inference:
        model(z)
    with Seen() as training:
        model(z)
    blocks = sum(TINY["layers_per_block"])
    assert "silu" not in inference.names
    assert training.names.count("silu") == blocks + 1
    counts = {"separable_residual": blocks, "separable_upsample": 2, "separable_conv2d": 2}
    assert {name: inference.names.count(name) for name in counts} == counts


@once
def test_gradients_of_frozen_parts():
    """The last convolution trained alone: its input has no gradient, so that SiLU is fused."""
    model, z = tiny().double(), latents(4, 4, dtype=torch.float64)
    model.requires_grad_(False)
    model.conv_out.requires_grad_(True)
    got = torch.autograd.grad(model(z).square().sum(), list(model.conv_out.parameters()))
    want = torch.autograd.grad(
        plain_forward(model, z).square().sum(), list(model.conv_out.parameters())
    )
    for g, w in zip(got, want, strict=True):
        assert relative(g, w) < 1e-12


@once
def test_compiles_as_one_graph():
    model, z = tiny(), latents(4, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(z), model(z))


@once
def test_a_new_decoder_keeps_variances():
    """It is upsampling by nearest pixels, and blocks do nothing yet."""
    torch.manual_seed(0)
    model, x = SnapGenDecoder(), torch.randn(2, 240, 6, 8)
    with torch.no_grad():
        assert torch.equal(model.stages[0].blocks(x), x)
        y = model.stages[0].upsample(x)
        z = model(torch.randn(1, 16, 16, 16))
    assert y.shape == (2, 128, 12, 16)
    assert torch.equal(y, y[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert 0.8 < y.std() < 1.2
    assert 0.2 < z.std() < 2


# --- Tiles ----------------------------------------------------------------------------------------


@once
@pytest.mark.parametrize("size", [(19, 24), (1, 30)])
def test_tiles_are_the_whole(size):
    model, z = tiny().double(), latents(*size, n=1, dtype=torch.float64)
    with torch.no_grad():
        whole = model(z)
        for tile in (1, 3, 8, 19, 64):
            got = model.decode(z, tile=tile).sample
            assert relative(got, whole) < 1e-13, tile
            assert got.is_contiguous()


@once
@pytest.mark.parametrize("device", DEVICES)
def test_tiles_in_low_precision(device):
    """Other sums, at most: those of a pixel stay in one order on a CPU."""
    low = torch.bfloat16
    model, z = tiny().to(device, low), latents(16, 16, n=1, dtype=low, device=device)
    with torch.no_grad():
        assert relative(model.decode(z, tile=6).sample, model(z)) < 2 * torch.finfo(low).eps


@once
def test_margins_are_what_a_pixel_sees():
    """No smaller than the reach of a pixel, and hardly larger."""
    model, side = tiny().double(), 41
    z = latents(side, side, n=1, dtype=torch.float64).requires_grad_()
    y, margin = model(z), model._margins()[0][0] + 1
    middle = model.factor * (side // 2)
    (seen,) = torch.autograd.grad(y[:, :, middle : middle + model.factor].sum(), z)
    rows = seen.abs().sum((0, 1, 3)).nonzero().flatten()
    reach = max(side // 2 - rows.min().item(), rows.max().item() - side // 2)
    assert reach <= margin <= reach + 2


@once
@pytest.mark.parametrize("less", [(3, 0), (0, 1)])
def test_a_smaller_margin_would_show(less, monkeypatch):
    model, z = tiny().double(), latents(24, 24, n=1, dtype=torch.float64)
    margins = SnapGenDecoder._margins

    def smaller(self):
        return [(needs - less[0], left - less[1]) for needs, left in margins(self)]

    monkeypatch.setattr(SnapGenDecoder, "_margins", smaller)
    with torch.no_grad():
        assert relative(model.decode(z, tile=8).sample, model(z)) > 1e-9


@once
def test_memory_is_that_of_a_tile():
    model = tiny()
    largest = []
    for side in (40, 80):
        with torch.no_grad(), Seen(channels=(3, 4)) as seen:  # but for pictures and latents
            model.decode(latents(side, side, n=1), tile=4)
        largest.append(seen.largest)
    assert largest[0] == largest[1]
    with torch.no_grad(), Seen(channels=(3, 4)) as whole:
        model(latents(40, 40, n=1))
    assert largest[0] < whole.largest / 4


# --- As others use it -----------------------------------------------------------------------------


@once
def test_scaled_latents():
    model, z = tiny(scaling_factor=0.5, shift_factor=0.25), latents(4, 4)
    with torch.no_grad():
        want = model(z)
        assert torch.equal(model.decode(z).sample, want)
        assert torch.equal(model.decode(z, return_dict=False)[0], want)
        torch.testing.assert_close(model.decode((z - 0.25) * 0.5, scaled=True).sample, want)
        torch.testing.assert_close(model.decode((z - 0.25) * 0.5, scaled=True, tile=3).sample, want)
    default = SnapGenDecoder().config
    assert (default.scaling_factor, default.shift_factor) == (1.5305, 0.0609)  # SD3's
    with pytest.raises(AttributeError, match="no_such"):
        _ = default.no_such


@once
def test_in_a_pipeline_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    sizes = {"sample_size": 8, "patch_size": 1, "num_layers": 1, "num_attention_heads": 2}
    sizes |= {"attention_head_dim": 8, "joint_attention_dim": 8, "caption_projection_dim": 16}
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        **sizes, in_channels=4, out_channels=4, pooled_projection_dim=8, pos_embed_max_size=8
    )
    model = tiny()
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3")
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(), model,
        **dict.fromkeys((*names, "tokenizer_3")),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    given = {
        "prompt_embeds": torch.randn(1, 3, 8), "pooled_prompt_embeds": torch.randn(1, 8),
        "latents": latents(8, 8, n=1), "num_inference_steps": 1, "guidance_scale": 1.0,
        "height": 32, "width": 32,
    }  # fmt: skip
    z = pipeline(**given, output_type="latent").images
    pictures = pipeline(**given, output_type="pt").images
    with torch.no_grad():
        want = (model.decode(z, scaled=True).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pictures, want)


@once
def test_saved_and_loaded(tmp_path):
    model, z = tiny(scaling_factor=0.7), latents(4, 4)
    model.save_pretrained(tmp_path)
    loaded = SnapGenDecoder.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(z), model(z))
        # What `dfm-fast sample --decoder` takes, for samples of these latents.
        decode = saved.decoder(tmp_path, SimpleNamespace(shape=z.shape[1:]), "cpu")
        assert torch.equal(decode(z), model.decode(z, scaled=True).sample)
    with pytest.raises(ValueError, match=r"--decoder: expected an autoencoder of 3 channels"):
        saved.decoder(tmp_path, SimpleNamespace(shape=(3, 4, 4)), "cpu")
    assert SnapGenDecoder.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="expected its own folder, got SnapGenDecoder's"):
        DFMTransformer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.1\.conv1\.\S+: not in the model"):
        SnapGenDecoder.from_pretrained(tmp_path, layers_per_block=(1, 1, 1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"latent_channels": 0}, ValueError, "latent_channels: expected at least 1, got 0"),
        ({"expansion": 1.5}, TypeError, "expansion: expected an int, got float"),
        ({"block_out_channels": (8, 0, 8)}, ValueError, "block_out_channels: expected at least 1"),
        ({"layers_per_block": (1, -1, 1)}, ValueError, "layers_per_block: expected at least 0"),
        ({"layers_per_block": (1, 1)}, ValueError, "layers_per_block: expected 3 numbers, .* 2"),
        ({"block_out_channels": ()}, ValueError, "expected at least one stage"),
        ({"scaling_factor": 0.0}, ValueError, "scaling_factor: expected a positive number"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=f"SnapGenDecoder: .*{message}|SnapGenDecoder: {message}"):
        SnapGenDecoder(**{**TINY, **options})


def test_bad_latents():
    model, z = tiny(), latents(4, 4)
    for call in (model, model.decode):
        with pytest.raises(ValueError, match=r"latents: expected shape \[N, 4, h, w\], got \[2, 3"):
            call(z[:, :3])
        with pytest.raises(ValueError, match="latents: expected 4 dimensions"):
            call(z[0])
        with pytest.raises(TypeError, match=r"latents: expected torch\.float32 like"):
            call(z.double())
        with pytest.raises(TypeError, match="latents: expected a tensor, got list"):
            call([z])
        with pytest.raises(ValueError, match="latents: expected shape"):
            call(z[:, :, :0])
    with pytest.raises(ValueError, match="tile: expected at least 1, got 0"):
        model.decode(z, tile=0)
    with pytest.raises(TypeError, match="tile: expected an int, got float"):
        model.decode(z, tile=4.0)
