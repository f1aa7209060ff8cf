"""Fused kernels for coarse-to-fine and mobile-size generative backbones."""

from dfm_fast import ops
from dfm_fast._backends import Backend, backends
from dfm_fast._library import load_extension as _load_extension
from dfm_fast._version import __version__
from dfm_fast._warmup import WarmupReport, warmup
from dfm_fast.acceleration import AccelerateReport, accelerate, restore
from dfm_fast.ops import *  # noqa: F403
from dfm_fast.profiling import profile

__all__ = [
    "AccelerateReport",
    "Backend",
    "WarmupReport",
    "__version__",
    "accelerate",
    "backends",
    "profile",
    "restore",
    "warmup",
    *ops.__all__,
]

_load_extension()
