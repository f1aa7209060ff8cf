"""Functional operators; all are re-exported by `dfm_fast`."""

from dfm_fast.ops._velocity import velocity_loss
from dfm_fast.ops.noises import add_noise, philox_normal, pyramid_add_noise
from dfm_fast.ops.pyramids import (
    haar_build,
    haar_collapse,
    laplacian_build,
    laplacian_collapse,
)

__all__ = [
    "add_noise",
    "haar_build",
    "haar_collapse",
    "laplacian_build",
    "laplacian_collapse",
    "philox_normal",
    "pyramid_add_noise",
    "velocity_loss",
]
