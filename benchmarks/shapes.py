"""The shapes that rows are named after, and the goals that rows are held to."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """A tensor as a model has it, and its pyramid."""

    shape: tuple[int, ...]  # [N, C, (T,) H, W]
    num_levels: int
    factor: int | tuple[int, ...] = 2


CASES = {
    "dfm_latents": Case((8, 16, 128, 128), 3),  # DFM at 1024 px: 16 channels, an 8x autoencoder
    "dfm_latents_x4": Case((8, 16, 128, 128), 2, 4),
    "sd_vae_latents": Case((32, 4, 64, 64), 3),  # Stable Diffusion at 512 px
    "photos_512": Case((8, 3, 512, 512), 4),
    "photos_1024": Case((2, 3, 1024, 1024), 4),
    "video_latents": Case((1, 16, 16, 64, 64), 3, (1, 2, 2)),  # all frames kept
    "front_end": Case((32, 16, 64, 64), 2),  # DFM at 512 px, two levels, a batch of training
    "one_latent": Case((1, 16, 128, 128), 2),  # sampling one picture at 1024 px
    "large_latents": Case((8, 16, 1024, 1024), 3),  # larger than any cache; GPU only
}

# Tokens [B, T, D] of transformers.
TOKENS = {
    "dit_s": (16, 256, 384),  # DiT-S at 256 px
    "dit_xl": (4, 1024, 1152),  # DiT-XL: 1024 tokens are 512 px at patch 2
    "dit_xl_training": (32, 1024, 1152),
    "one_sample": (1, 256, 1152),  # sampling one picture at 256 px
}


class FeedForwardCase(NamedTuple):
    """A feed-forward layer as a model has it."""

    tokens: tuple[int, int]  # [B, T]
    dim: int
    inner: int  # of the hidden tensor; a gated projection is twice as wide
    activation: str


FEED_FORWARDS = {
    "snapgen": FeedForwardCase((2, 1024), 896, 2688, "geglu"),  # its lowest resolution, 1024 px
    "dit": FeedForwardCase((4, 1024), 1152, 4608, "gelu_tanh"),  # DiT-XL, 512 px, patches of 2
    "snapgen_batch": FeedForwardCase((8, 1024), 896, 2688, "geglu"),
    "large_snapgen": FeedForwardCase((16, 4096), 896, 2688, "geglu"),  # larger than any cache
    "large_dit": FeedForwardCase((32, 1024), 1152, 4608, "gelu_tanh"),
}

# Attention's heads: (B, T, H, Hkv, d).
HEADS = {
    "heads_16x64": (2, 256, 16, 16, 64),
    "snapgen_32": (2, 1024, 14, 1, 64),  # SnapGen's multi-query attention at 32x32
    "dit_xl_512": (4, 1024, 16, 16, 72),  # DiT-XL/2 at 512 px
    "large_heads": (16, 4096, 24, 24, 128),  # larger than any cache; GPU only
}

# Attention with shared keys: (B, T, S, H, Hkv, d), of a conditional and an unconditional sample.
ATTENTIONS = {
    "self_32": (2, 1024, 1024, 14, 1, 64),  # SnapGen's self-attention, at 32x32 for 1024 px
    "clip_32": (2, 1024, 77, 14, 1, 64),  # its cross-attention there, to CLIP's tokens
    "text_32": (2, 1024, 256, 14, 1, 64),  # and to those of a language model
    "clip_64": (2, 4096, 77, 8, 1, 64),  # at 64x64
    "text_64": (2, 4096, 256, 8, 1, 64),
    "grouped_32": (2, 1024, 1024, 16, 4, 64),
    "large_self": (8, 4096, 4096, 14, 1, 64),  # larger than any cache; GPU only
    "large_text": (32, 4096, 256, 8, 1, 64),
}

# Maps of SnapGen's UNet, of a conditional and an unconditional sample, at 1024 px and at 512.
MAPS = {
    "unet_256_64": (2, 256, 64, 64),
    "unet_256_128": (2, 256, 128, 128),
    "unet_512_32": (2, 512, 32, 32),
    "unet_512_64": (2, 512, 64, 64),
    "unet_896_16": (2, 896, 16, 16),
    "unet_896_32": (2, 896, 32, 32),
    "unet_1792_16": (2, 1792, 16, 16),
    "unet_1792_32": (2, 1792, 32, 32),
    "maps_past_l2": (16, 512, 128, 128),  # larger than any cache; GPU only
}


class Block(NamedTuple):
    """A residual block as SnapGen's UNet has it."""

    shape: tuple[int, int, int, int]  # [N, C, H, W]
    outputs: int


BLOCKS = {
    "block_256_64": Block((1, 256, 64, 64), 256),  # its three stages at 512 px
    "block_512_32": Block((1, 512, 32, 32), 512),
    "block_896_16": Block((1, 896, 16, 16), 896),
    "block_1408_32": Block((1, 1408, 32, 32), 512),  # going up, beside what came down
    "large_block_256": Block((8, 256, 128, 128), 256),  # at 1024 px; larger than any cache
    "large_block_512": Block((8, 512, 64, 64), 512),
    "large_block_896": Block((8, 896, 32, 32), 896),
}

# Maps of the blocks of SnapGen's decoder, which have no norm: a stage each, at 512 px.
RESIDUALS = {
    "decoder_32_512": (1, 32, 512, 512),
    "decoder_64_256": (1, 64, 256, 256),
    "decoder_128_128": (1, 128, 128, 128),
    "decoder_240_64": (1, 240, 64, 64),
    "large_decoder_32": (8, 32, 1024, 1024),  # at 1024 px; GPU only
    "large_decoder_64": (8, 64, 512, 512),
}


class AttentionLayer(NamedTuple):
    """An attention layer of SnapGen's UNet, of a conditional and an unconditional sample."""

    batch: int
    side: int  # of the map of tokens
    dim: int
    tokens: int  # of the text
    cross_dim: int


ATTENTION_LAYERS = {
    "layer_896_32": AttentionLayer(2, 32, 896, 256, 2304),  # its lowest stage, at 1024 px
    "layer_512_64": AttentionLayer(2, 64, 512, 256, 2304),
}

# Its convolutions alone.
CONVOLUTION_LAYERS = {"conv_512_32": Block((1, 512, 32, 32), 512)}

# Maps that SnapGen's UNet upsamples.
UPSAMPLES = {
    "up_256_64": (2, 256, 64, 64),
    "up_512_32": (2, 512, 32, 32),
    "up_896_16": (1, 896, 16, 16),
    "large_up_512": (8, 512, 64, 64),  # at 1024 px; GPU only
}


class Goal(NamedTuple):
    """Shown beside what was measured; a missed one is shown too, and fails nothing."""

    device: str  # pattern: cpu, cuda or *
    row: str  # pattern of Row.id
    # "copy": fraction of its bandwidth; "memory": the share of eager's peak that ours does without;
    # "float32": ours in it; else a rival's name.
    against: str
    at_least: float


GOALS = (
    Goal("cpu", "laplacian_*-bilinear-dfm_latents-float32-contiguous-*", "copy", 0.60),
    Goal("cpu", "laplacian_*-bilinear-dfm_latents-float32-contiguous-*", "eager", 10.0),
    Goal("cpu", "laplacian_*-bilinear-dfm_latents-float32-contiguous-*", "compiled", 5.0),
    Goal("cpu", "laplacian_build-binomial-photos_512-float32-contiguous-forward", "opencv", 4.0),
    Goal("cpu", "laplacian_build-binomial-photos_512-float32-contiguous-forward", "kornia", 100.0),
    Goal("*", "laplacian_*-bilinear-dfm_latents-bfloat16-contiguous-*", "float32", 1.0),
    Goal("cpu", "add_noise-*-dfm_latents-float32-contiguous-forward", "eager", 6.0),
    Goal("cpu", "add_noise-*-dfm_latents-float32-contiguous-forward", "compiled", 10.0),
    Goal("cpu", "pyramid_add_noise-bilinear-front_end-float32-contiguous-forward", "eager", 10.0),
    Goal("cpu", "velocity_loss-bilinear-front_end-float32-contiguous-training", "eager", 4.0),
    Goal("cpu", "cfg_euler_step-*-float32-contiguous-forward", "eager", 5.0),
    Goal("cpu", "geglu-snapgen-float32-contiguous-forward", "eager", 2.0),
    Goal("cpu", "feed_forward-*-forward", "eager", 1.1),
    Goal("cpu", "feed_forward-*-forward", "compiled", 1.1),
    Goal("cuda", "*glu-large_snapgen-*-forward", "copy", 0.85),
    Goal("cuda", "*glu-large_snapgen-*-forward", "compiled", 1.2),
    Goal("cuda", "gelu_tanh-bias-large_dit-*-forward", "copy", 0.85),
    Goal("cuda", "gelu_tanh-bias-large_dit-*-forward", "compiled", 1.2),
    Goal("cuda", "feed_forward-*-forward", "compiled", 1.1),
    Goal("cuda", "gated_linear-*-large_snapgen-*-forward", "cublas", 1.0),
    Goal("cpu", "qk_norm_rope-*-heads_16x64-float32-contiguous-forward", "eager", 5.0),
    Goal("*", "dit_block-*-training", "memory", 0.25),
    Goal("cpu", "dfm-*-training", "eager", 1.2),
    Goal("cpu", "dfm-*-training", "compiled", 1.1),
    Goal("cpu", "dfm_sampling-*", "eager", 1.2),
    Goal("cpu", "dfm_sampling-*", "compiled", 1.1),
    Goal("cuda", "dfm-*-training", "compiled", 1.15),
    Goal("cuda", "dfm_sampling-*", "compiled", 1.5),
    Goal("cpu", "snapgen_unet-*snapgen_512-bfloat16-*", "eager", 1.1),
    Goal("cpu", "snapgen_unet-*snapgen_512-bfloat16-*", "compiled", 1.1),
    *(
        Goal("cpu", "accelerated_unet-*snapgen_512-bfloat16-*", against, 1.0)
        for against in ("eager", "compiled")
    ),
    Goal("*", "distillation_step-*", "eager", 1.1),
    Goal("*", "distillation_step-*", "compiled", 1.1),
    Goal("cuda", "snapgen_unet-*", "eager", 3.0),
    Goal("cuda", "snapgen_unet-*", "compiled", 1.5),
    Goal("cuda", "snapgen_unet-*", "memory", 0.3),
    Goal("cpu", "snapgen_decoder-*", "eager", 1.3),
    Goal("cpu", "snapgen_decoder-*", "compiled", 1.0),
    Goal("cuda", "snapgen_decoder-*", "eager", 1.5),
    Goal("cuda", "snapgen_decoder-*", "compiled", 1.0),
    Goal("*", "multi_query_attention-*", "eager", 1.0),
    Goal("*", "multi_query_attention-*", "compiled", 1.0),
    Goal("*", "multi_query_attention-[!g]*", "view", 1.0),  # grouped keys have no such view
    Goal("*", "multi_query_attention-*", "expand", 1.0),
    Goal("*", "multi_query_attention-*", "enable_gqa", 1.0),
    Goal("cpu", "*ada_layer_norm-dit_xl-float32-contiguous-forward", "eager", 3.0),
    Goal("cpu", "*ada_layer_norm-dit_xl-float32-contiguous-forward", "compiled", 1.5),
    Goal("cuda", "*ada_layer_norm-dit_xl_training-*-forward", "copy", 0.85),
    Goal("cuda", "*ada_layer_norm-dit_xl_training-*-forward", "compiled", 1.2),
    Goal("cuda", "*ada_layer_norm-dit_xl_training-*-training", "compiled", 1.3),
    Goal("cpu", "group_norm_silu-*-unet_256_64-float32-*-forward", "eager", 3.0),
    Goal("cpu", "group_norm_silu-*-unet_256_64-float32-*-forward", "compiled", 3.0),
    Goal("cuda", "group_norm_silu-*-maps_past_l2-*-forward", "copy", 0.85),
    Goal("cuda", "group_norm_silu-*-unet_*-forward", "compiled", 1.2),
    Goal("cuda", "group_norm_silu-*-unet_*-training", "compiled", 1.3),
    Goal("cpu", "depthwise_conv2d-3x3-*-channels_last-forward", "eager", 1.5),
    Goal("cpu", "depthwise_conv2d-3x3-*-contiguous-forward", "eager", 3.0),
    Goal("cpu", "norm_silu_depthwise_conv2d-given-*-forward", "eager", 4.0),
    Goal("cpu", "norm_silu_depthwise_conv2d-given-*-forward", "compiled", 3.0),
    Goal("cuda", "*depthwise_conv2d-*-maps_past_l2-*-forward", "copy", 0.85),
    Goal("cuda", "depthwise_conv2d-3x3-*-forward", "eager", 1.3),
    Goal("cuda", "depthwise_conv2d-3x3-*-forward", "other layout", 1.3),
    Goal("cuda", "depthwise_conv2d-3x3-*-forward", "compiled", 1.3),
    *(
        Goal("cpu", f"separable_conv_block-{case}-{layout}-forward", against, at_least)
        for against, layout in (
            ("eager", "*"),
            ("compiled", "*"),
            ("diffusers", "*"),
            ("contiguous", "channels_last"),
        )
        for case, at_least in (
            ("block_256_64-bfloat16", 1.25),
            ("block_512_32-bfloat16", 1.15),
            ("block_896_16-bfloat16", 1.25),
            ("block_256_64-float32", 1.15),
            ("block_512_32-float32", 1.15),
            ("block_896_16-float32", 1.0),
            ("block_1408_32-*", 1.0),
        )
    ),
    Goal("cuda", "separable_conv_block-large_block_256-*-forward", "compiled", 1.6),
    Goal("cuda", "separable_conv_block-large_block_512-*-forward", "compiled", 1.2),
    Goal("cuda", "separable_conv_block-large_block_896-*-forward", "compiled", 1.0),
    *(
        Goal("*", f"{layer}-*-forward", against, 1.0)
        for layer in ("cross_attention", "multi_query_attention_layer", "separable_conv_layer")
        for against in ("eager", "compiled", "diffusers")
    ),
    Goal("*", "cross_attention-cached-*", "keys given", 1.0),
    Goal("*", "separable_conv_attention-*-forward", "compiled", 1.0),
    Goal("*", "upsample_conv_layer-*-forward", "diffusers", 1.0),
    Goal("*", "separable_conv_block-*-training", "eager", 1.0),
    Goal("*", "separable_conv_block-*-training", "compiled", 1.0),
    Goal("*", "separable_conv_block-*-training", "memory", 0.25),
    Goal("cuda", "separable_one_kernel-*_to_256-*", "two kernels", 1.0),
    Goal("cpu", "upsample_conv2d-*-forward", "eager", 1.6),
    Goal("*", "upsample_conv2d-*-forward", "compiled", 1.0),
    Goal("cuda", "add_noise-*-large_latents-*", "copy", 0.75),
    Goal("cuda", "add_noise-*-large_latents-*", "compiled", 1.5),
    # 700e9 normals a second, 2 bytes each, against 4.3e12 bytes a second of an H200's copy.
    Goal("cuda", "philox_normal-*-large_latents-bfloat16-*", "copy", 0.326),
    Goal("cuda", "laplacian_*-bilinear-dfm_latents-float32-contiguous-*", "compiled", 3.0),
    Goal("cuda", "laplacian_*-large_latents-*", "copy", 0.85),
    Goal("cuda", "laplacian_*-binomial-photos_512-float32-contiguous-forward", "copy", 0.85),
    Goal("cuda", "laplacian_*-binomial-photos_512-float32-contiguous-forward", "compiled", 1.7),
    Goal("cuda", "laplacian_build-binomial-photos_512-float32-contiguous-forward", "kornia", 10.0),
    Goal("cuda", "qk_norm_rope-*", "eager", 3.0),
    Goal("cuda", "qk_norm_rope-*", "compiled", 1.2),
    Goal("cuda", "qk_norm_rope-*-large_heads-*", "copy", 0.85),
)
