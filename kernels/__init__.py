"""Triton kernels, one module per family; imported as `dfm_fast.kernels` and only on first use."""

if __name__ != "dfm_fast.kernels":
    raise ImportError(f"expected import as dfm_fast.kernels, got {__name__}")
