"""Drop-in modules."""

from dfm_fast.nn.activations import GEGLU, FeedForward
from dfm_fast.nn.noises import PerScaleNoise
from dfm_fast.nn.pyramids import LaplacianPyramid

__all__ = ["GEGLU", "FeedForward", "LaplacianPyramid", "PerScaleNoise"]
