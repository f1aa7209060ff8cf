"""Models that somebody else wrote, on this library's kernels."""

from dfm_fast.acceleration import (  # noqa: F401  (each registers its units)
    diffusers_attentions,
    diffusers_blocks,
    diffusers_layers,
    torch_layers,
    vision_transformers,
)
from dfm_fast.acceleration._swaps import AccelerateReport, accelerate, restore

__all__ = ["AccelerateReport", "accelerate", "restore"]
