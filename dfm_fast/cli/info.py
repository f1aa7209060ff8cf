"""`dfm-fast info`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import textwrap

import torch

import dfm_fast


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    versions = {
        "dfm_fast": dfm_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    rows = dfm_fast.backends()
    if args.json:
        data = {"versions": versions, "backends": [dataclasses.asdict(row) for row in rows]}
        print(json.dumps(data, indent=2))
        return 0
    for name, value in versions.items():
        print(f"{name:<9} {value}")
    print()
    width = max(len(row.operator) for row in rows)
    for row in rows:
        line = f"{row.operator:<{width}} {row.device:<5} {row.implementation:<16} {row.reason}"
        print(textwrap.fill(line, width + 90, subsequent_indent=" " * (width + 24)))
    return 0
