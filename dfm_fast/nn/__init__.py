"""Drop-in modules."""

from dfm_fast.nn.noises import PerScaleNoise
from dfm_fast.nn.norms import AdaLayerNorm, RMSNorm
from dfm_fast.nn.pyramids import LaplacianPyramid

__all__ = ["AdaLayerNorm", "LaplacianPyramid", "PerScaleNoise", "RMSNorm"]
