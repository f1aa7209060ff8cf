"""`dfm-fast equivariance`: the command line is the dataclass `EquivarianceConfig`."""

from __future__ import annotations

import argparse

from dfm_fast.cli import _configs

PROG = "dfm-fast equivariance"
EVERY = 50  # steps between lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.allow_abbrev = False


def run(args: argparse.Namespace) -> int:
    return _configs.reported(PROG, lambda: _run(args.rest))


def _run(rest: list[str]) -> None:
    from dfm_fast.training.equivariance import EquivarianceConfig, Losses, finetune

    config = _configs.parse(EquivarianceConfig, rest, prog=PROG)

    def tell(step: int, losses: Losses) -> None:
        if step % EVERY == 0 or step + 1 == config.steps:
            values = "  ".join(f"{name} {value:.4f}" for name, value in vars(losses).items())
            print(f"step {step + 1}  {values}", flush=True)

    done = finetune(config, on_step=tell)
    if done.stopped_by:
        print(f"stopped at step {done.steps} by {done.stopped_by}, saved ", end="")
    print(done.folder)
