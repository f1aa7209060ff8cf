"""`dfm-fast tune`: time what SnapGen's UNet and decoder may be launched with on this GPU, whatever
tables know already, and write a table of the shipped form. In kernels/tables/, under the GPU's name
in lower case with dashes (nvidia-h200.json), it is one.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from dfm_fast import warmup
from dfm_fast.kernels import tuning

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="samples in a call")
    parser.add_argument("--size", type=int, nargs="+", default=[64, 128], help="sides of latents")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")


def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("tune: expected a GPU, got none")
        return 1
    if not args.out.parent.is_dir():
        print(f"tune: --out: expected a folder {args.out.parent}, got none")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    sizes = [(n, side) for n in args.batch for side in args.size]
    tiles = tiles_of(device, _calls(device, DTYPES[args.dtype], sizes))
    tuning.write_table(args.out, tuning.names(device)[0], tiles)
    print(f"{args.out}: {len(tiles)} buckets")
    return 0


def _calls(
    device: torch.device, dtype: torch.dtype, sizes: Iterable[tuple[int, int]]
) -> Iterator[Callable[[], object]]:
    from dfm_fast.models import SnapGenDecoder, snapgen_t2i
    from dfm_fast.profiling.targets import channels_last

    unet, decoder = (
        channels_last(model.to(device, dtype).eval()) for model in (snapgen_t2i(), SnapGenDecoder())
    )
    for n, side in sizes:
        latents = n, 16, side, side
        yield functools.partial(warmup, unet, latents, (n,), (n, 77, 2304))
        yield functools.partial(warmup, decoder, latents)


def tiles_of(device: torch.device, calls: Iterable[Callable[[], object]]) -> dict[str, str]:
    """Bucket -> fastest candidate, timed during the calls; the user's table is left alone."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"XDG_CACHE_HOME": folder, "DFM_FAST_AUTOTUNE": "1"}
        tuning.autotune.cache_clear()
        tuning.tables.cache_clear()
        tuning.tables(device)["shipped"].clear()
        for call in calls:
            call()
        return dict(tuning.tables(device)["cache"])
