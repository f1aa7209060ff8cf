"""Whether a layer may be taken for what its class says: another path past its `forward` skips what
somebody else has put there."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def hooked(module: nn.Module) -> bool:
    """Whether somebody looks on when it is called, or has put other code in its place."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )
