"""Vision and diffusion transformers of many packages, known by their layout.

What a class of that name and layout computes is not taken for granted: it is tried (`_trials`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dfm_fast.acceleration._trials import randn
from dfm_fast.acceleration._units import first_reason, idle, register, same
from dfm_fast.acceleration.diffusers_blocks import NEW, gated, gated_modulated
from dfm_fast.acceleration.diffusers_layers import modulated, without_weights
from dfm_fast.acceleration.torch_layers import GELU, projected
from dfm_fast.nn._hooks import hooked


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda module: all(hasattr(module, name) for name in names)


# --- timm's MLP -----------------------------------------------------------------------------------


def _mlp_refusal(mlp: Any) -> str | None:
    return first_reason(
        (not same(mlp.act, nn.GELU), "an activation that is not GELU"),
        (not (same(mlp.fc1, nn.Linear) and same(mlp.fc2, nn.Linear)), "no linear layers"),
        (not same(getattr(mlp, "norm", None), nn.Identity, type(None)), "a norm inside"),
    )


@register(
    "activations",
    "",
    "Mlp",
    "FeedForward",
    knows=_has("fc1", "act", "fc2", "drop1", "drop2"),
    refusal=_mlp_refusal,
    saved=lambda mlp: 2 * mlp.fc1.out_features,  # GELU reads and writes the hidden tensor
    trial=lambda mlp: (randn(2, 3, mlp.fc1.in_features),),
)
def mlp(module: Any, x: Tensor) -> Tensor | None:
    """timm's `Mlp`: fc1, act, drop1, norm, fc2, drop2."""
    inner = [module.fc1, module.act, module.drop1, module.fc2]
    if getattr(module, "norm", None) is not None:
        inner.append(module.norm)
    if any(map(hooked, inner)) or not idle(module.drop1) or _mlp_refusal(module):
        return None
    y = projected(x, module.fc1, GELU[module.act.approximate], module.fc2)
    return None if y is None else module.drop2(y)


# --- Blocks of DiT and SiT ------------------------------------------------------------------------


def _width(module: Any) -> int:
    return module.adaLN_modulation[-1].in_features


def _block_refusal(block: Any) -> str | None:
    both = without_weights(block.norm1) and without_weights(block.norm2)
    return None if both else "norms with weights"


def _of_block(block: Any) -> tuple[Tensor, Tensor]:
    return randn(2, 4, _width(block)), randn(2, _width(block))


def _register_block(of: str) -> None:
    @register(
        "blocks",
        "",
        of,
        NEW,
        knows=_has("norm1", "attn", "norm2", "mlp", "adaLN_modulation"),
        refusal=_block_refusal,
        saved=lambda block: (4 + 9) * _width(block),  # the first norm; gates, sums, the second
        trial=_of_block,
    )
    def block(module: Any, x: Tensor, c: Tensor) -> Tensor:
        """x [B, T, D], c [B, D] (arXiv 2212.09748, adaLN-Zero)."""
        shift, scale, gate, *of_mlp = module.adaLN_modulation(c).chunk(6, dim=1)
        y = module.attn(modulated(module.norm1, x, shift, scale))
        shift, scale, gate_mlp = of_mlp
        x, normed = gated_modulated(module.norm2, x, y, gate, shift, scale)
        return gated(x, module.mlp(normed), gate_mlp)


_register_block("DiTBlock")
_register_block("SiTBlock")


@register(
    "norms",
    "",
    "FinalLayer",
    "ada_layer_norm",
    knows=_has("norm_final", "linear", "adaLN_modulation"),
    refusal=lambda layer: None if without_weights(layer.norm_final) else "a norm with weights",
    saved=lambda layer: 4 * _width(layer),
    trial=_of_block,
)
def final_layer(module: Any, x: Tensor, c: Tensor) -> Tensor:
    """x [B, T, D], c [B, D]: the head of DiT and SiT."""
    shift, scale = module.adaLN_modulation(c).chunk(2, dim=1)
    return module.linear(modulated(module.norm_final, x, shift, scale))
