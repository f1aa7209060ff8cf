"""Tiny teachers and students of random weights, and inputs for them."""

import math

import pytest
import torch

from dfm_fast.models import SnapGenUNet

SIZES = {"in_channels": 3, "channels": (16, 32), "depths": (0, 1), "heads": (1, 2), "groups": 8}
WIDTHS = {"cross_dim": 12, "time_channels": 16, "self_attention": (False, True), "layers": 1}


def randn(*shape, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def randomise(module, seed=0):
    """Random where a new model is zero; magnitudes are kept."""
    for i, p in enumerate(module.parameters()):
        value = randn(*p.shape, seed=1000 * seed + i)
        p.data.copy_(1 + 0.1 * value if p.ndim == 1 else value / math.sqrt(p[0].numel()))
    return module


def snapgen(seed=0, **options):
    return randomise(SnapGenUNet(**{**SIZES, **WIDTHS, **options}), seed)


def sd3(seed=0, patch=2):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=patch, in_channels=3, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
        pooled_projection_dim=10, out_channels=3, pos_embed_max_size=8,
    )  # fmt: skip
    return randomise(model, seed)


def sd3_cond(n):
    text = randn(n, 5, 12, seed=3)
    return {"encoder_hidden_states": text, "pooled_projections": randn(n, 10, seed=4)}


def inputs(n=4, device="cpu"):
    return randn(n, 3, 8, 8, seed=7, device=device), {"text": randn(n, 5, 12, seed=8).to(device)}


def mse64(x, *targets):
    """Mean squares of samples."""
    return [(x.double() - t.double()).square().flatten(1).mean(1) for t in targets]
