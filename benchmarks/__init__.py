"""Benchmarks: `pytest benchmarks/ --benchmark-only`, from the root of the repository."""
