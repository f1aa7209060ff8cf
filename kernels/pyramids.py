"""Laplacian and Haar pyramids in Triton."""

from __future__ import annotations

from dfm_fast.kernels import resample

laplacian_build = resample.build
laplacian_build_backward = resample.build_backward
laplacian_collapse = resample.collapse
laplacian_collapse_backward = resample.collapse_backward
