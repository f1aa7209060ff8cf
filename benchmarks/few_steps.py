"""A small SnapGen UNet learns digits, and then to draw them in 4 steps: `python -m
benchmarks.few_steps`.

For every seed a teacher is trained (`dfm-fast snapgen --preset digits`) and distilled from its own
weights (`--preset digits-4`). Samples of the teacher with 28 steps and with 4, and of the student
with 4, are compared with the test split: the Fréchet distances and the share of samples that a
classifier trained apart names as asked, all without guidance. Every result is written at once, and
runs go on from their checkpoints: an interrupted command may be given again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.dfm_against_flow_matching import BATCH, SAMPLES, Judge
from dfm_fast.models import SnapGenPipeline, snapgen_folders
from dfm_fast.models._pretrained import write_bytes
from dfm_fast.training import pictures
from dfm_fast.training.config import to_json
from dfm_fast.training.snapgen import SnapGenConfig, preset, train_snapgen

OUT = Path(__file__).parent / "results" / "local" / "comparisons" / "few_steps"
TITLES = {"pca": "Fréchet, PCA", "classifier": "Fréchet, classifier", "agreement": "as asked"}
# name: (whose weights, sampling steps)
METHODS = {
    "teacher, 28 steps": ("teacher", 28),
    "teacher, 4 steps": ("teacher", 4),
    "student, 4 steps": ("student", 4),
}


def config_of(role: str, seed: int, args: argparse.Namespace) -> SnapGenConfig:
    teacher = args.out / f"teacher-{seed}"
    changes: dict[str, Any] = {"seed": seed, "device": args.device}
    if args.steps:
        changes |= {"steps": args.steps, "save_every": args.steps}
    if role == "teacher":
        return preset("digits", teacher, **changes)
    return preset("digits-4", args.out / f"student-{seed}", teacher=teacher, **changes)


def trained(config: SnapGenConfig) -> SnapGenPipeline:
    if snapgen_folders.pipeline_in(config.out) is None:
        outcome = train_snapgen(config, resume=True)
        if outcome.stopped_by:
            raise KeyboardInterrupt(outcome.stopped_by)
    folder = snapgen_folders.pipeline_in(config.out)
    return SnapGenPipeline.from_pretrained(folder).to(config.device)


def drawn(pipeline: SnapGenPipeline, labels: Tensor, steps: int, seed: int) -> Tensor:
    """A sample for each label, as the data are: from -1 to 1."""
    options = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
    parts = [
        pipeline(class_labels=part, seed=seed + BATCH * i, **options).images.float().cpu()
        for i, part in enumerate(labels.split(BATCH))
    ]
    return torch.cat(parts)


def plain(config: SnapGenConfig) -> dict[str, Any]:
    """What numbers depend on."""
    left_out = ("out", "teacher", "workers", "keep", "save_every", "device")
    return {k: v for k, v in to_json(config).items() if k not in left_out}


def found(entry: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(entry.get(k) == v for k, v in key.items())


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All entries of `few_steps.json`, the floor first; those that are missing are computed."""
    path, count = args.out / "few_steps.json", args.samples or SAMPLES["digits"]
    entries = json.loads(path.read_text())["entries"] if path.exists() else []
    judge = cache(lambda: Judge(preset("digits", args.out), count))
    wanted = [{"method": "training split", "samples": count}]
    for seed in range(args.seeds):
        for method, (role, steps) in METHODS.items():
            configs = [plain(config_of(r, seed, args)) for r in {"teacher": 1, role: 1}]
            key = {"method": method, "seed": seed, "steps": steps, "configs": configs}
            wanted.append({**key, "samples": count})
    for key in wanted:
        if any(found(e, key) for e in entries):
            continue
        if "seed" not in key:
            scores = judge().floor
        else:
            seed = key["seed"]
            trained(config_of("teacher", seed, args))
            pipeline = trained(config_of(METHODS[key["method"]][0], seed, args))
            x = drawn(pipeline, judge().labels, key["steps"], 10_000 * (seed + 1))
            scores = judge()(x)
        entries.append({**key, **scores})
        write_bytes(path, (json.dumps({"entries": entries}, indent=1) + "\n").encode())
        told = "  ".join(f"{k} {v:.4f}" for k, v in scores.items())
        print(f"{key['method']} {key.get('seed', '')}: {told}", flush=True)
    return [next(e for e in entries if found(e, key)) for key in wanted]


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds."""
    lines = [f"| | seeds | {' | '.join(TITLES.values())} |", "|---|---:|" + "---:|" * len(TITLES)]
    for method in dict.fromkeys(e["method"] for e in entries):
        own = [e for e in entries if e["method"] == method]
        cells = []
        for score in TITLES:
            values = [e[score] for e in own]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3g}{spread}")
        lines.append(f"| {method} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(args: argparse.Namespace) -> Path:
    """Two rows of every method, of the first seed, with the same noise."""
    labels, rows = torch.arange(10).repeat(2), []
    for role, steps in METHODS.values():
        rows.append(drawn(trained(config_of(role, 0, args)), labels, steps, 1))
    image = pictures.grid(torch.cat(rows), 10)
    return pictures.write(args.out / "few_steps.png", image)


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.few_steps", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, help="of each; by default as many as digits train")
    parser.add_argument("--steps", type=int, help="of every run, in place of the presets'")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(table(measure(args)))
    print(picture(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
