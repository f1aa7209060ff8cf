"""Small models of other packages, stand-ins for such that cannot be installed here, and what runs
them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# The configuration of SnapGen's UNet in diffusers: 17 residual blocks, 60 attentions, 36
# feed-forward layers.
FULL_DREAMLITE = {
    "in_channels": 16,
    "out_channels": 16,
    "block_out_channels": (256, 512, 896),
    "transformer_layers_per_block": (1, 2, 4),
    "attention_head_dim": (4, 8, 14),
    "ff_mult": 3,
    "cross_attention_dim": 2304,
    "use_linear_projection": True,
}
THIN_DREAMLITE = {
    **FULL_DREAMLITE,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64, 96),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 3),
    "cross_attention_dim": 24,
    "norm_num_groups": 16,
}


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def fill(module, seed=0):
    """Weights that show in every product; of norms about 1."""
    for i, (name, p) in enumerate(module.named_parameters()):
        value = randn(*p.shape, seed=seed + i) * (0.2 if p.ndim == 1 else p[0].numel() ** -0.5)
        p.data.copy_(1 + value if "norm" in name and p.ndim == 1 and "weight" in name else value)
    return module


# Each gives (model, inputs of floats, other arguments); what it returns has tensors.


def dreamlite():
    from diffusers.models.unets.unet_dreamlite import DreamLiteUNetModel

    model = fill(DreamLiteUNetModel(**THIN_DREAMLITE))
    given = {"timestep": torch.tensor([3, 500]), "return_dict": False}
    return model, {"sample": randn(2, 4, 16, 16), "encoder_hidden_states": randn(2, 7, 24)}, given


def sdxl():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        layers_per_block=1,
    )
    added = {"text_embeds": randn(2, 16), "time_ids": torch.ones(2, 6)}
    given = {"timestep": torch.tensor([3, 500]), "return_dict": False}
    given["added_cond_kwargs"] = added
    inputs = {"sample": randn(2, 4, 16, 16), "encoder_hidden_states": randn(2, 7, 24)}
    return fill(model), inputs, given


def sd3(dual=(0,), qk_norm="rms_norm"):
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=dual,
        qk_norm=qk_norm,
    )
    inputs = {
        "hidden_states": randn(2, 4, 8, 8),
        "encoder_hidden_states": randn(2, 5, 24, seed=1),
        "pooled_projections": randn(2, 16, seed=2),
    }
    return fill(model), inputs, {"timestep": torch.tensor([3, 500]), "return_dict": False}


def flux():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": randn(2, 12, 4),
        "encoder_hidden_states": randn(2, 5, 24, seed=1),
        "pooled_projections": randn(2, 16, seed=2),
    }
    ids = torch.stack(torch.meshgrid(*map(torch.arange, (1, 3, 4)), indexing="ij"), -1)
    given = {"txt_ids": torch.zeros(5, 3), "img_ids": ids.flatten(0, 2).float()}
    return (
        fill(model),
        inputs,
        {**given, "timestep": torch.tensor([0.1, 0.7]), "return_dict": False},
    )


def dit():
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    given = {"class_labels": torch.tensor([1, 4]), "return_dict": False}
    return (
        fill(model),
        {"hidden_states": randn(2, 4, 8, 8)},
        {"timestep": torch.tensor([3, 9]), **given},
    )


class Decoding(nn.Module):
    """A decoder as a model."""

    def __init__(self, autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, z):
        return self.autoencoder.decode(z, return_dict=False)[0]


def autoencoder_kl():
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    return fill(Decoding(model)), {"z": randn(1, 4, 8, 8)}, {}


def autoencoder_tiny():
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return fill(Decoding(model)), {"z": randn(1, 4, 8, 8)}, {}


# --- Stand-ins, written from the layouts of their attributes --------------------------------------


class Mlp(nn.Module):
    """As timm's."""

    def __init__(self, dim, hidden, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class SelfAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """As of DiT: a SiTBlock has the same attributes."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, 4 * dim, lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        parts = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + parts[2].unsqueeze(1) * self.attn(modulate(self.norm1(x), *parts[:2]))
        return x + parts[5].unsqueeze(1) * self.mlp(modulate(self.norm2(x), *parts[3:5]))


class FinalLayer(nn.Module):
    def __init__(self, dim, outputs):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class DiT(nn.Module):
    def __init__(self, dim=32, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock(dim, 4) for _ in range(depth))
        self.final_layer = FinalLayer(dim, 8)

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


def official_dit():
    return fill(DiT()), {"x": randn(2, 6, 32), "c": randn(2, 32, seed=1)}, {}


MODELS = {
    "dreamlite": dreamlite,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "dit": dit,
    "autoencoder_kl": autoencoder_kl,
    "autoencoder_tiny": autoencoder_tiny,
    "official_dit": official_dit,
}


# --- Running them ---------------------------------------------------------------------------------

DIFFUSERS = [name for name in MODELS if name != "official_dit"]


def make(name):
    if name in DIFFUSERS:
        pytest.importorskip("diffusers.models.unets.unet_dreamlite")
    model, inputs, given = MODELS[name]()
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
