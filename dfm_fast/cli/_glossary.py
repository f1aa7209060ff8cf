"""What a reader of results needs to know, in plain words: families, operators, columns."""

from __future__ import annotations

# family: (title, what it is for)
FAMILIES = {
    "pyramids": (
        "Pyramids",
        "Split a picture into a small version and the details of each larger size, and put it "
        "together again.",
    ),
    "noises": (
        "Noise",
        "Mix data with random numbers drawn from a seed: what a diffusion model trains on.",
    ),
    "steps": ("Solver steps", "Move a sample one step from noise towards a picture."),
    "norms": (
        "Norms of rows",
        "Keep a transformer's numbers in range, and apply its conditioning.",
    ),
    "group_norms": ("Group norms", "Keep a convolutional network's numbers in range."),
    "rotaries": ("Rotary embedding", "Tell attention where each token lies in the picture."),
    "matrices": ("Linear layers", "Mix the channels of every token: products of matrices."),
    "activations": ("Activations", "The non-linear step between two matrix products."),
    "convolutions": ("Depthwise convolutions", "Filter every channel by itself."),
    "separables": (
        "Separable convolutions",
        "A filter per channel, then a product that mixes channels: a cheap convolution.",
    ),
    "decoders": (
        "SnapGen's decoder",
        "Turn a UNet's result into pixels: the whole decoder, and its residual blocks.",
    ),
    "upsamples": ("Upsampling", "Double a picture's size, then convolve it."),
    "attentions": ("Attention", "Let every token look at all others; its keys may be shared."),
    "layers": ("Layers", "Whole layers of a network, with their weights."),
    "blocks": ("Blocks", "A whole block of a diffusion transformer: attention and feed-forward."),
    "models": ("DFM transformer", "The whole model: a training step, and drawing a picture."),
    "snapgen": ("SnapGen", "The whole UNet, in one pass."),
    "acceleration": ("accelerate()", "Somebody else's model, with its layers replaced in place."),
    "distillation": ("Distillation", "A step of training a small model to imitate a large one."),
}

# operator: what one row of it computes
OPERATORS = {
    "laplacian_build": "picture to levels, coarse to fine",
    "laplacian_collapse": "levels back to the picture",
    "haar_build": "picture to levels by Haar wavelets, as many numbers as before",
    "haar_collapse": "Haar levels back to the picture",
    "philox_normal": "normal random numbers from a seed",
    "add_noise": "data and noise mixed, and the target of training",
    "pyramid_add_noise": "data and noise mixed on every level of a pyramid",
    "velocity_loss": "the training loss per level, its noise made again from the seed",
    "cfg_euler_step": "a first-order step of sampling, with guidance",
    "heun_step": "a second-order step of sampling, with guidance",
    "rms_norm": "each row divided by its root mean square",
    "ada_layer_norm": "a norm whose shift and scale come from the condition",
    "gated_residual": "a block's result times a gate, added to its input",
    "gated_residual_ada_layer_norm": "that addition and the next norm in one pass",
    "group_norm_silu": "norm over groups of channels, then SiLU",
    "channel_statistics": "mean and variance of every channel",
    "qk_norm_rope": "norm and rotation of attention's queries and keys",
    "geglu": "one half times the GELU of the other",
    "swiglu": "one half times the SiLU of the other",
    "gelu_tanh": "GELU by its tanh formula, bias included",
    "linear": "one matrix product, as a layer",
    "feed_forward": "two matrix products with an activation between",
    "gated_linear": "matrix product and gated activation in one kernel",
    "depthwise_conv2d": "a filter per channel",
    "norm_silu_depthwise_conv2d": "norm, SiLU and a filter per channel in one pass",
    "separable_conv2d": "a filter per channel, then a product over channels",
    "separable_one_kernel": "a separable convolution as one GPU kernel",
    "separable_conv_block": "SnapGen's residual block: norms, separable convolutions, time step",
    "separable_residual": "the decoder's block in one pass over memory",
    "upsample_conv2d": "upsampling and convolution, with no larger picture in between",
    "multi_query_attention": "attention whose heads share keys and values",
    "cross_attention": "attention of picture tokens to text",
    "multi_query_attention_layer": "projections, norm, rotation and attention",
    "separable_conv_attention": "attention whose projections are separable convolutions",
    "separable_conv_layer": "separable_conv2d as a layer",
    "upsample_conv_layer": "upsample_conv2d as a layer",
    "dit_block": "one block of a diffusion transformer",
    "dfm": "one pass through a DFM transformer",
    "dfm_sampling": "one picture, all its steps",
    "snapgen_unet": "one pass through the 384 M UNet",
    "snapgen_decoder": "latents to pixels",
    "accelerated_unet": "diffusers' own UNet after dfm_fast.accelerate",
    "distillation_step": "forward of teacher and student, backward of the student",
}

# Operators whose time is that of matrix products: a copy is no limit to hold them to.
PRODUCTS = {
    *("linear", "feed_forward", "gated_linear", "separable_conv2d", "separable_one_kernel"),
    *("separable_conv_block", "separable_residual", "upsample_conv2d", "multi_query_attention"),
    *("cross_attention", "multi_query_attention_layer", "separable_conv_attention"),
    *("separable_conv_layer", "upsample_conv_layer", "dit_block", "dfm", "dfm_sampling"),
    *("snapgen_unet", "snapgen_decoder", "accelerated_unet", "distillation_step"),
}

# A column or a word, and what it means. {times} stands for the sign.
TERMS = {
    "row": "Operator, variant and case: a shape that a real model has. Shapes stand below a table. "
    "channels_last: a pixel's channels lie side by side in memory. backward: gradients alone; "
    "training: forward and backward. Otherwise forward alone.",
    "dtype": "How numbers are stored: fp32 in 4 bytes, bf16 and fp16 in 2.",
    "verdict": "Against the fastest of all others. level: in the middle half of the rounds of "
    "measurement the two changed places, so that neither is called faster.",
    "ms": "Milliseconds that ours takes.",
    "{times} eager": "How many times faster ours is than plain PyTorch, called line by line. "
    "Below 1, ours is slower.",
    "{times} compiled": "The same against torch.compile, PyTorch's compiler: the fastest of "
    "several ways to write the code.",
    "{times} best library": "The same against the fastest other library or other way to call "
    "PyTorch, which is named.",
    "of copy": "How near the memory's limit: reading inputs once and writing results once at 100% "
    "would be as quick as copying as many bytes. Caches and inputs that are read again can move it "
    "past 100%.",
    "of peak": "How near the arithmetic limit: operations of matrix products, as eager does them, "
    "per second, as a share of what one large matrix product reaches here. Past 100%, ours needs "
    "fewer operations.",
    "goal": "A speed that was set before measuring. Missed goals stay in the report.",
    "busy": "Somebody else used the machine during a row: its figures are worth little.",
}
