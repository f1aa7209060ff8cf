"""Drop-in modules."""

from dfm_fast.nn.group_norms import GroupNormSiLU
from dfm_fast.nn.noises import PerScaleNoise
from dfm_fast.nn.pyramids import LaplacianPyramid

__all__ = ["GroupNormSiLU", "LaplacianPyramid", "PerScaleNoise"]
