"""Tiny models of random weights, inputs for them, and how their outputs are compared."""

import torch
from torch import nn

from dfm_fast.models import DFMTransformer

SMALL = {"hidden_size": 64, "depth": 2, "num_heads": 2, "num_classes": 10, "input_size": (8, 8)}


def small(seed=0, **options):
    """Random where a new model is zero."""
    torch.manual_seed(seed)
    model = DFMTransformer(**{**SMALL, **options}).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def inputs(model, batch=3, base=8, frames=0, dtype=torch.float32):
    """levels, t, active, y"""
    generator = torch.Generator().manual_seed(1)
    shapes = [
        (batch, c, *([frames] if frames else []), base * p, base * p)
        for c, p in zip(model.channels, model.patch_sizes, strict=True)
    ]
    levels = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    t = torch.rand(batch, model.num_levels, generator=generator)
    return levels, t, torch.ones(t.shape, dtype=torch.bool), torch.arange(batch) % 10


def assert_close(got, want, rtol=2e-5):
    """Relative to the largest value."""
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            assert (g - w).abs().max() <= rtol * w.abs().max()
