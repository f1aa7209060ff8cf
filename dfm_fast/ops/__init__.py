"""Functional operators; all are re-exported by `dfm_fast`."""

from dfm_fast.ops._velocity import velocity_loss
from dfm_fast.ops.activations import geglu, gelu_tanh, swiglu
from dfm_fast.ops.attentions import multi_query_attention
from dfm_fast.ops.convolutions import depthwise_conv2d, norm_silu_depthwise_conv2d
from dfm_fast.ops.group_norms import ChannelStatistics, channel_statistics, group_norm_silu
from dfm_fast.ops.noises import add_noise, philox_normal, pyramid_add_noise
from dfm_fast.ops.norms import (
    ada_layer_norm,
    gated_residual,
    gated_residual_ada_layer_norm,
    rms_norm,
)
from dfm_fast.ops.pyramids import (
    haar_build,
    haar_collapse,
    laplacian_build,
    laplacian_collapse,
)
from dfm_fast.ops.rotaries import qk_norm_rope, rope_2d, rope_3d
from dfm_fast.ops.separables import separable_conv2d
from dfm_fast.ops.steps import cfg_euler_step, heun_step
from dfm_fast.ops.upsamples import upsample_conv2d

__all__ = [
    "ChannelStatistics",
    "ada_layer_norm",
    "add_noise",
    "cfg_euler_step",
    "channel_statistics",
    "depthwise_conv2d",
    "gated_residual",
    "gated_residual_ada_layer_norm",
    "geglu",
    "gelu_tanh",
    "group_norm_silu",
    "haar_build",
    "haar_collapse",
    "heun_step",
    "laplacian_build",
    "laplacian_collapse",
    "multi_query_attention",
    "norm_silu_depthwise_conv2d",
    "philox_normal",
    "pyramid_add_noise",
    "qk_norm_rope",
    "rms_norm",
    "rope_2d",
    "rope_3d",
    "separable_conv2d",
    "swiglu",
    "upsample_conv2d",
    "velocity_loss",
]
