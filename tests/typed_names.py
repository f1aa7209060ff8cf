"""What a type checker knows of the public names: `make types` checks it, and nothing runs it."""

from typing import assert_type

import torch
from torch import Tensor

import dfm_fast
from dfm_fast import nn
from dfm_fast.flow import DecomposableFlow, Laplacian
from dfm_fast.models import DFMTransformer, snapgen_tiny
from dfm_fast.ops import ChannelStatistics

x, weight = torch.randn(2, 8, 4, 4), torch.randn(8)
assert_type(dfm_fast.laplacian_build(x, 2, filter="binomial"), tuple[Tensor, ...])
assert_type(dfm_fast.laplacian_collapse([x]), Tensor)
assert_type(dfm_fast.rms_norm(x, weight, eps=1e-6), Tensor)
assert_type(dfm_fast.qk_norm_rope(x, x, weight), tuple[Tensor, Tensor])
assert_type(dfm_fast.channel_statistics(x), ChannelStatistics)
assert_type(dfm_fast.separable_conv2d(x, x, x), Tensor)
both = dfm_fast.separable_conv2d(x, x, x, with_statistics=True)
assert_type(both, tuple[Tensor, ChannelStatistics])
assert_type(dfm_fast.add_noise(x, weight, seed=1), tuple[Tensor, Tensor])
assert_type(dfm_fast.cfg_euler_step([x], [x], None, weight), list[Tensor])
assert_type(nn.GroupNormSiLU(4, 8), nn.GroupNormSiLU)
assert_type(DecomposableFlow(Laplacian(2)).loss(DFMTransformer(), x), Tensor)
assert_type(DFMTransformer.from_pretrained("folder"), DFMTransformer)
assert_type(nn.MultiQueryAttention(8, 2).forward(x), Tensor)
assert_type(nn.CrossAttention(8, 8, 2).key_values(x), nn.KeyValues)
assert_type(snapgen_tiny().transformers()[0].transformer_blocks[0].attn2, nn.CrossAttention)

dfm_fast.rms_norm("x")  # type: ignore[arg-type]
dfm_fast.rms_norm(x, epsilon=1.0)  # type: ignore[call-arg]
dfm_fast.laplacian_build(x, levels=2)  # type: ignore[call-arg]
