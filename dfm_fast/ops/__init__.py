"""Functional operators; all are re-exported by `dfm_fast`."""

from dfm_fast.ops.pyramids import (
    haar_build,
    haar_collapse,
    laplacian_build,
    laplacian_collapse,
)

__all__ = ["haar_build", "haar_collapse", "laplacian_build", "laplacian_collapse"]
