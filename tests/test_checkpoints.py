"""Weights of others: equal to a plain SiT or DFM that is written here with their names."""

import pytest
import torch
import torch.nn.functional as F
from small_models import SMALL, assert_close, inputs
from torch import nn

from dfm_fast.models import (
    DFMTransformer,
    dfm_sit_state_dict,
    dit_state_dict,
    sit_state_dict,
)
from dfm_fast.models._functions import sincos_2d
from dfm_fast.models.checkpoints import LEVELS


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

    @staticmethod
    def norm(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def run_blocks(self, tokens, c):
        for b in self.blocks:
            m = b.adaLN_modulation(c).chunk(6, 1)
            qkv = b.attn.qkv(self.norm(tokens, m[0], m[1]))
            q, k, v = qkv.view(len(c), -1, 3, self.heads, 32).permute(2, 0, 3, 1, 4)
            a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            tokens = tokens + m[2][:, None] * b.attn.proj(a)
            h = F.gelu(b.mlp.fc1(self.norm(tokens, m[3], m[4])), approximate="tanh")
            tokens = tokens + m[5][:, None] * b.mlp.fc2(h)
        return tokens

    def run_head(self, head, tokens, c, like, p):
        n, _, height, width = like.shape
        out = head.linear(self.norm(tokens, *head.adaLN_modulation(c).chunk(2, 1)))
        out = out.view(n, height // p, width // p, p, p, self.outputs).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(n, self.outputs, height, width)[:, : self.channels]

    def forward(self, x, t, y):
        tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder.mlp(sinusoids(t)) + self.y_embedder.embedding_table(y)
        return self.run_head(self.final_layer, self.run_blocks(tokens, c), c, x, self.patch)


def sinusoids(t):
    angles = t[:, None] * torch.exp(-torch.log(torch.tensor(1e4)) * torch.arange(128) / 128)
    return torch.cat((angles.cos(), angles.sin()), 1)


def randomise(model):
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("outputs", [4, 8], ids=["velocity", "learn-sigma"])
def test_equals_sit_with_its_weights(outputs):
    torch.manual_seed(0)
    theirs = randomise(SiT(outputs=outputs))
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


# --- DFM on SiT's blocks --------------------------------------------------------------------------


class PlainDFM(SiT):
    """Levels' patches and times added up before one trunk, and a head for each level; our time and
    velocity. `names`: what the levels' parts are called."""

    def __init__(self, names, patches=(1, 2), **options):
        super().__init__(**options)
        for name in names:
            delattr(self, name)
        self.names, self.patches = names, patches
        self.levels = [SiT(patch=p, **options) for p in patches]  # of which the parts count
        for s, level in enumerate(self.levels):
            for name in names:  # a module's name has no dots
                self.add_module(f"{name}{s}", getattr(level, name))

    def weights(self):
        """The state dict under the names."""
        own = {f"{n}{s}": to.format(s) for n, to in self.names.items() for s in range(2)}
        parts = (name.partition(".") for name in self.state_dict())
        return {
            f"{own.get(part, part)}{dot}{rest}": self.state_dict()[part + dot + rest]
            for part, dot, rest in parts
        }

    def forward(self, levels, t, y):
        tokens, c = self.pos_embed, self.y_embedder.embedding_table(y)
        for s, (part, x) in enumerate(zip(self.levels, levels, strict=True)):
            tokens = tokens + part.x_embedder.proj(x).flatten(2).transpose(1, 2)
            c = c + part.t_embedder.mlp(sinusoids(t[:, s]))
        tokens = self.run_blocks(tokens, c)
        return [
            self.run_head(part.final_layer, tokens, c, x, part.patch)
            for part, x in zip(self.levels, levels, strict=True)
        ]


OTHER = {"x_embedder": "x_embedder_{}", "t_embedder": "t.{}", "final_layer": "out.{}.last"}


@pytest.mark.parametrize("names", [LEVELS, OTHER], ids=["default", "other"])
@pytest.mark.parametrize("outputs", [4, 8], ids=["velocity", "learn-sigma"])
def test_equals_a_plain_dfm_with_its_weights(names, outputs):
    torch.manual_seed(0)
    theirs = randomise(PlainDFM(names, outputs=outputs))
    state = {f"module.{name}": v for name, v in theirs.weights().items()}
    state["module.projectors.0.weight"] = torch.ones(1)
    ours = DFMTransformer(**SMALL).eval()
    ours.load_state_dict(dfm_sit_state_dict(state, names=names, ignore=("projectors",)))
    levels, t, active, y = inputs(ours)
    assert_close(ours(levels, t, active, y=y), theirs(levels, t, y))


# --- Bad input ------------------------------------------------------------------------------------


def test_wrong_checkpoints_are_named():
    state = SiT().state_dict()
    with pytest.raises(ValueError, match=r"expected the key 'y_embedder\.embedding_table"):
        sit_state_dict({k: v for k, v in state.items() if "y_embedder" not in k})
    with pytest.raises(ValueError, match="expected SiT's keys, got extra more"):
        sit_state_dict({**state, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"expected the key 'x_embedders\.0\.proj\.weight', got"):
        dfm_sit_state_dict(state)
    with pytest.raises(ValueError, match="names: expected the keys x_embedder, t_embedder, final"):
        dfm_sit_state_dict(state, names={"x_embedder": "x.{}"})
    levels = PlainDFM(LEVELS).weights()
    with pytest.raises(ValueError, match=r"expected a DFM's keys, got projectors\.0 more"):
        dfm_sit_state_dict({**levels, "projectors.0": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"expected the key 'x_embedders\.2\.proj\.weight'"):
        dfm_sit_state_dict(levels, 3)
