"""Weights of others: equal to a plain SiT or DFM that is written here with their names."""

import pytest
import torch
import torch.nn.functional as F
from small_models import SMALL, assert_close, inputs
from torch import nn

from dfm_fast.models import (
    DFMTransformer,
    dit_state_dict,
    sit_state_dict,
)
from dfm_fast.models._functions import sincos_2d


class SiT(nn.Module):
    """Plain SiT: one level, time from noise 0 to data 1, velocity x - eps; published key names."""

    def __init__(self, dim=64, depth=2, heads=2, patch=2, channels=4, classes=10, outputs=8):
        super().__init__()
        self.heads, self.patch, self.channels, self.outputs = heads, patch, channels, outputs
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, dim, patch, patch)
        self.t_embedder, self.y_embedder = nn.Module(), nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, dim)
        self.pos_embed = nn.Parameter(sincos_2d(8, 8, dim).unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList(self.block(dim) for _ in range(depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(dim, patch * patch * outputs)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    @staticmethod
    def block(dim):
        block = nn.Module()
        block.attn, block.mlp = nn.Module(), nn.Module()
        block.attn.qkv, block.attn.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        block.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        return block

    def forward(self, x, t, y):
        def norm(x, shift, scale):
            x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
            return x * (1 + scale[:, None]) + shift[:, None]

        n, _, height, width = x.shape
        tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        steps = torch.exp(-torch.log(torch.tensor(1e4)) * torch.arange(128) / 128)
        angles = t[:, None] * steps
        c = self.t_embedder.mlp(torch.cat((angles.cos(), angles.sin()), 1))
        c = c + self.y_embedder.embedding_table(y)
        for b in self.blocks:
            m = b.adaLN_modulation(c).chunk(6, 1)
            qkv = b.attn.qkv(norm(tokens, m[0], m[1])).view(n, -1, 3, self.heads, 32)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            tokens = tokens + m[2][:, None] * b.attn.proj(a)
            h = F.gelu(b.mlp.fc1(norm(tokens, m[3], m[4])), approximate="tanh")
            tokens = tokens + m[5][:, None] * b.mlp.fc2(h)
        m = self.final_layer.adaLN_modulation(c).chunk(2, 1)
        out = self.final_layer.linear(norm(tokens, *m))
        p = self.patch
        out = out.view(n, height // p, width // p, p, p, self.outputs)
        out = out.permute(0, 5, 1, 3, 2, 4).reshape(n, self.outputs, height, width)
        return out[:, : self.channels]


@pytest.mark.parametrize("outputs", [4, 8], ids=["velocity", "learn-sigma"])
def test_equals_sit_with_its_weights(outputs):
    torch.manual_seed(0)
    theirs = SiT(outputs=outputs)
    for p in theirs.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    ours = DFMTransformer(**SMALL, patch_sizes=(2,), flip_time=True).eval()
    ours.load_state_dict(sit_state_dict(theirs.state_dict()))
    (x,), t, _, y = inputs(ours)
    (got,) = ours([x], t, y=y)
    want = -theirs(x, 1 - t[:, 0], y)  # eps - x at noise level t
    assert_close([got], [want])


def test_dit_is_the_same_layout_unturned():
    torch.manual_seed(0)
    theirs = SiT()
    ours = DFMTransformer(**SMALL, patch_sizes=(2,)).eval()
    ours.load_state_dict(dit_state_dict(theirs.state_dict()))
    (x,), t, _, y = inputs(ours)
    assert_close(ours([x], t, y=y), [theirs(x, t[:, 0], y)])


def test_wrong_checkpoints_are_named():
    state = SiT().state_dict()
    with pytest.raises(ValueError, match=r"expected the key 'y_embedder\.embedding_table"):
        sit_state_dict({k: v for k, v in state.items() if "y_embedder" not in k})
    with pytest.raises(ValueError, match="expected SiT's keys, got extra more"):
        sit_state_dict({**state, "extra": torch.zeros(1)})
