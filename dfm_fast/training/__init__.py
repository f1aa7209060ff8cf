"""Training: data, the loop, checkpoints, evaluation. Each module is imported by its own name."""
