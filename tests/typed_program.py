"""A user's program: `mypy --strict` passes it, and nothing runs it."""

from collections.abc import Sequence

import torch
from torch import Tensor

import dfm_fast
from dfm_fast import accelerate, nn, profile, rms_norm
from dfm_fast.flow import DecomposableFlow, Haar
from dfm_fast.models import DFM_B, DFMTransformer, SnapGenPipeline, snapgen_tiny
from dfm_fast.training.config import preset
from dfm_fast.training.loop import Outcome, train


class Block(torch.nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = nn.MultiQueryAttention(dim, heads=4, qk_norm=False)
        self.convolution = nn.DepthwiseConv2d(dim, kernel_size=5, padding="same")
        self.mlp = nn.FeedForward(dim, activation_fn="swiglu")
        self.weight = torch.nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.attention(rms_norm(x, self.weight, eps=1e-6))
        return dfm_fast.gated_residual(y, self.mlp.forward(y), torch.ones(y.shape[0], y.shape[-1]))


def losses(model: DFMTransformer, pictures: Sequence[Tensor]) -> list[float]:
    flow = DecomposableFlow(Haar(2))
    return [flow.loss(model, x, seed=i).item() for i, x in enumerate(pictures)]


def draw(prompts: Sequence[str]) -> Tensor:
    pipeline = SnapGenPipeline.from_pretrained("snapgen/", device="cuda", dtype=torch.bfloat16)
    latents: Tensor = pipeline(prompts, num_inference_steps=8, output_type="latent").images
    return pipeline.decode(latents)


def tell() -> Outcome:
    with profile() as p:
        losses(DFM_B(4, (1, 2), depth=2), [torch.randn(1, 4, 64, 64)])
    report = accelerate(snapgen_tiny())
    print(p.table(), report.bytes_saved, dfm_fast.backends())
    return train(preset("digits", "out", steps=10))
