"""Triton kernels, one module per family; imported as `dfm_fast.kernels` and only on first use."""

from typing import Any

if __name__ != "dfm_fast.kernels":
    # As `kernels` it is found where a process runs in the repository's root, by libraries that look
    # for a package of that name (transformers): nothing is in that, least of all a second copy.
    __path__: list[str] = []

    def __getattr__(name: str) -> Any:
        kind = AttributeError if name.startswith("__") else ImportError
        raise kind(f"{name}: expected import as dfm_fast.kernels, got {__name__}")
