"""Networks as distillation sees them, teachers and students: noisy latents to velocities and to the
last map of features, whatever the kind of network.

    backbone(x_t, t, **cond) -> (velocity [N, C, H, W], features [N, channels, h, w])

with x_t = (1 - t) x + t eps, velocity eps - x and t from 0 to 1, 1 pure noise. Conditions are what
the network calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.models import DFMTransformer, SnapGenUNet


class Prediction(NamedTuple):
    """What a network says of a noisy latent."""

    velocity: Tensor  # [N, C, H, W]
    features: Tensor  # [N, channels, h, w]


class Backbone(nn.Module):
    """A network behind the protocol; its parameters are the network's.

    Args:
        model: the network, or a wrapper of it that is called alike (DDP, torch.compile).
        channels: of the features.
    """

    def __init__(self, model: nn.Module, channels: int) -> None:
        super().__init__()
        self.model, self.channels = model, channels

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Prediction:
        """x_t [N, C, H, W], t [N]."""
        raise NotImplementedError


class SnapGenBackbone(Backbone):
    """`SnapGenUNet`: features are what its last norm takes, as large as the latent.

    Conditions: `text`, and those that forward names.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, unwrapped(model).channels[0])

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Prediction:
        return Prediction(*self.model(x_t, t, features=True, **cond))


class WrappedBackbone(Backbone):
    """A backbone in DDP or torch.compile."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, unwrapped(model).channels)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Prediction:
        return self.model(x_t, t, **cond)


class DFMBackbone(Backbone):
    """`DFMTransformer` of one level: features are the last block's tokens, normed, as a map.

    Conditions: `y`.

    Raises:
        ValueError: several levels.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = unwrapped(model)
        if inner.num_levels != 1:
            _checks.fail(type(self).__name__, "model", "one level", f"{inner.num_levels} levels")
        super().__init__(model, inner.hidden_size)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Prediction:
        inner, found = unwrapped(self.model), list[Tensor]()
        hook = inner.blocks[-1].register_forward_hook(lambda _, __, out: found.append(out[1]))
        with hook:
            t = t[:, None]
            (velocity,) = self.model([x_t], t, torch.ones_like(t, dtype=torch.bool), **cond)
        return Prediction(velocity, _map(found[-1], x_t, inner.patch_sizes[0]))


class SD3Backbone(Backbone):
    """diffusers' `SD3Transformer2DModel`: features are what `proj_out` takes, as a map. Its time
    runs from 0 to 1000.

    Conditions: `encoder_hidden_states`, `pooled_projections`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, unwrapped(model).inner_dim)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Prediction:
        inner, found = unwrapped(self.model), list[Tensor]()
        hook = inner.proj_out.register_forward_pre_hook(lambda _, given: found.append(given[0]))
        with hook:
            (velocity,) = self.model(x_t, timestep=1000 * t, return_dict=False, **cond)
        return Prediction(velocity, _map(found[-1], x_t, inner.config.patch_size))


def backbone(model: nn.Module) -> Backbone:
    """The adapter of a network; a `Backbone` is itself.

    Raises:
        TypeError: of another kind.
    """
    if isinstance(model, Backbone):
        return model
    inner = unwrapped(model)
    if isinstance(inner, Backbone):
        return WrappedBackbone(model)
    if isinstance(inner, SnapGenUNet):
        return SnapGenBackbone(model)
    if isinstance(inner, DFMTransformer):
        return DFMBackbone(model)
    # diffusers is optional: its class is known by name.
    if any(c.__name__ == "SD3Transformer2DModel" for c in type(inner).__mro__):
        return SD3Backbone(model)
    expected = "a SnapGenUNet, DFMTransformer, SD3Transformer2DModel or Backbone"
    _checks.fail("backbone", "model", expected, type(inner).__name__, TypeError)


def frozen(model: nn.Module) -> Backbone:
    """A teacher: the network's adapter in eval mode, its parameters without gradients. Gradients
    still pass through it to what it is given."""
    return backbone(model).eval().requires_grad_(False)


def ask(
    teacher: Backbone, x_t: Tensor, t: Tensor, cond: Mapping[str, Any] | None = None
) -> Prediction:
    """What it says, in the dtype of its parameters, which conditions have already."""
    dtype = next((p.dtype for p in teacher.parameters()), x_t.dtype)
    return teacher(x_t.to(dtype), t, **(cond or {}))


def unwrapped(model: nn.Module) -> Any:
    """Without DDP and torch.compile."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            return inner


def _map(tokens: Tensor, x: Tensor, patch: int) -> Tensor:
    """Tokens [N, h w, D] of x [N, C, h patch, w patch] -> [N, D, h, w], a view."""
    return tokens.transpose(1, 2).unflatten(2, (x.shape[2] // patch, x.shape[3] // patch))
