"""Fused kernels for coarse-to-fine and mobile-size generative backbones."""

from dfm_fast._backends import Backend, backends
from dfm_fast._library import load_extension as _load_extension
from dfm_fast._version import __version__
from dfm_fast.ops import haar_build, haar_collapse, laplacian_build, laplacian_collapse

__all__ = [
    "Backend",
    "__version__",
    "backends",
    "haar_build",
    "haar_collapse",
    "laplacian_build",
    "laplacian_collapse",
]

_load_extension()
