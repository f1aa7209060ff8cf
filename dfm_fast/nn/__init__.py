"""Drop-in modules."""

from dfm_fast.nn.activations import GEGLU, FeedForward
from dfm_fast.nn.convolutions import DepthwiseConv2d
from dfm_fast.nn.group_norms import GroupNormSiLU
from dfm_fast.nn.noises import PerScaleNoise
from dfm_fast.nn.norms import AdaLayerNorm, RMSNorm
from dfm_fast.nn.pyramids import LaplacianPyramid
from dfm_fast.nn.rotaries import QKNormRotary
from dfm_fast.nn.separables import SeparableConv2d, SeparableConvBlock, UpsampleConv2d
from dfm_fast.ops.rotaries import rope_2d, rope_3d

__all__ = [
    "GEGLU",
    "AdaLayerNorm",
    "DepthwiseConv2d",
    "FeedForward",
    "GroupNormSiLU",
    "LaplacianPyramid",
    "PerScaleNoise",
    "QKNormRotary",
    "RMSNorm",
    "SeparableConv2d",
    "SeparableConvBlock",
    "UpsampleConv2d",
    "rope_2d",
    "rope_3d",
]
