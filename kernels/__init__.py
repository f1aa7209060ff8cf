"""Triton kernels, one module per family; imported as `dfm_fast.kernels` and only on first use."""

if __name__ != "dfm_fast.kernels":
    # Found in the current folder under a name that a package of others has, too: transformers
    # imports it to ask for its version. Nothing can be had from it.
    __path__: list[str] = []

    def __getattr__(name: str) -> None:
        raise AttributeError(f"expected import as dfm_fast.kernels, got {__name__} (for {name})")
