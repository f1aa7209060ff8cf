"""Fused kernels for coarse-to-fine and mobile-size generative backbones."""

from dfm_fast._library import load_extension as _load_extension
from dfm_fast._version import __version__
from dfm_fast.ops import *  # noqa: F403
from dfm_fast.ops import __all__ as _ops

__all__ = [*_ops, "__version__"]

_load_extension()
