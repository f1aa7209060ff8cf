"""DFM against plain flow matching: `python -m benchmarks.dfm_against_flow_matching digits photos`.

The same transformer, data order, steps, optimizer, sampling steps and seeds; plain flow matching is
the one-level case, whose patches are those of DFM's finest level. Samples are drawn from the
average of the weights (`--last`: from the weights themselves) at fractions of the run, and compared
with the test split by the Fréchet distance in feature spaces that are fitted on the training split.
Beside them stand the floor, the training split's own distance, and the ceiling, an untrained
model's; and, with labels, how often a classifier trained apart names the class that was asked for.

Every result is written at once, and runs go on from their checkpoints: an interrupted command may
be given again. Where nothing is left to do it prints the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfm_fast.models._pretrained import write_bytes
from dfm_fast.training import evaluation, pictures, saved
from dfm_fast.training.checkpoints import Checkpoints, step_of
from dfm_fast.training.config import TrainConfig, from_json, preset, to_json
from dfm_fast.training.datasets import open_dataset
from dfm_fast.training.loop import CHECKPOINTS, EXPORT, train

METHODS = ("dfm", "dfm, untrained", "flow matching", "flow matching, untrained")
TRAINING = "training split"
# Deeper than the rows that `dfm-fast report` reads.
OUT = Path(__file__).parent / "results" / "local" / "comparisons" / "dfm_against_flow_matching"
BATCH = 128  # samples that are drawn at once
SAVES = 2  # checkpoints per fraction of a run that is measured
CFGS = {"digits": (1.0, 1.5), "photos": (1.0,)}
SAMPLES = {"digits": 1437, "photos": 1000}


# --- Runs -----------------------------------------------------------------------------------------


def config_of(data: str, method: str, seed: int, args: argparse.Namespace) -> TrainConfig:
    """The preset; plain flow matching has one level and as many sampling steps in all."""
    out = args.out / data / f"{method.replace(',', '').replace(' ', '-')}-{seed}"
    config = preset(data, out, seed=seed)
    steps = 0 if method.endswith("untrained") else args.steps or config.steps
    every = max(1, steps // (SAVES * args.points))
    config = dataclasses.replace(
        config, steps=steps, save_every=every, keep=SAVES * args.points + 1, sample_every=0,
        device=args.device, workers=args.workers,
    )  # fmt: skip
    if args.batch:
        config = dataclasses.replace(config, batch=args.batch)
    if method.startswith("dfm"):
        return config
    model = dataclasses.replace(config.model, patch_sizes=config.model.patch_sizes[-1:])
    flow = dataclasses.replace(config.flow, stage_probs=None, sample_steps=(40,))
    return dataclasses.replace(config, model=model, flow=flow)


def marks(config: TrainConfig) -> list[int]:
    """Steps at which a run is measured."""
    if not config.steps:
        return [0]
    every = SAVES * config.save_every
    return [*range(every, config.steps - config.save_every, every), config.steps]


def trained(config: TrainConfig) -> dict[int, Path]:
    """Step -> model; trains what is missing."""
    outcome = train(config, resume=True)
    if outcome.stopped_by:
        raise KeyboardInterrupt(outcome.stopped_by)
    if not config.steps:
        return {0: config.out / EXPORT}
    folder = Checkpoints(config.out / CHECKPOINTS, config.keep)
    return {step_of(path): path for path in folder.all()}


# --- Distances ------------------------------------------------------------------------------------


class Judge:
    """Feature spaces, the test split's features, and a classifier where there are labels."""

    def __init__(self, config: TrainConfig, count: int) -> None:
        data = open_dataset(config.data)
        x, labels = evaluation.gather(data, max(count, 4096))
        y, y_labels = evaluation.gather(open_dataset(config.data, "test"))
        known = labels if data.num_classes else None
        self.spaces = evaluation.feature_spaces(x, known)
        self.real = {name: space(y) for name, space in self.spaces.items()}
        self.classifier = None if known is None else evaluation.fit_classifier(x, known)
        # As many samples as will be drawn, of the same classes: distances depend on their number.
        self.x, self.labels = evaluation.gather(data, count)
        if known is None:
            self.labels = None
        # Of the training split it would be that of samples the classifier has seen.
        self.floor = self(self.x)
        if self.classifier is not None:
            test = evaluation.classifier_agreement(y, y_labels, self.classifier)
            self.floor["agreement"] = test

    def __call__(self, x: Tensor) -> dict[str, float]:
        scores = {
            name: evaluation.frechet_distance(space(x), self.real[name])
            for name, space in self.spaces.items()
        }
        if self.classifier is not None:
            agreement = evaluation.classifier_agreement(x, self.labels, self.classifier)
            scores["agreement"] = agreement
        return scores


def drawn(recipe: Any, model: Any, judge: Judge, cfg: float, seed: int, device: str) -> Tensor:
    """As many samples as the judge has, of its labels."""
    parts, flow = [], recipe.build_flow()
    for first in range(0, len(judge.x), BATCH):
        labels = None if judge.labels is None else judge.labels[first : first + BATCH]
        count = min(BATCH, len(judge.x) - first)
        parts.append(
            pictures.sample(
                model, flow, recipe, labels, count, cfg=cfg, seed=seed + first, device=device
            ).float().cpu()
        )  # fmt: skip
    return torch.cat(parts)


# --- Results --------------------------------------------------------------------------------------


def plain_of(config: TrainConfig) -> dict[str, Any]:
    """What numbers depend on."""
    return {k: v for k, v in to_json(config).items() if k not in ("out", "workers", "keep")}


class Results:
    """One JSON file per dataset, written after every entry."""

    def __init__(self, path: Path, samples: int) -> None:
        self.path, self.samples = path, samples
        self.entries: list[dict[str, Any]] = (
            json.loads(path.read_text())["entries"] if path.exists() else []
        )
        for e in self.entries:  # fields that are younger than a result had their defaults
            if "config" in e:
                e["config"] = plain_of(from_json(TrainConfig, {"out": "", **e["config"]}))

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        whole = {**key, "samples": self.samples}
        return next((e for e in self.entries if all(e.get(k) == v for k, v in whole.items())), None)

    def add(self, key: dict[str, Any], scores: dict[str, float]) -> None:
        self.entries.append({**key, "samples": self.samples, **scores})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path, (json.dumps({"entries": self.entries}, indent=1) + "\n").encode())


def keys(data: str, config: TrainConfig, method: str, averaged: bool) -> list[dict[str, Any]]:
    """What each result of a run is found by: all that it depends on."""
    same = {"method": method, "seed": config.seed, "config": plain_of(config)}
    same["weights"] = None if averaged else "last"
    return [{**same, "step": step, "cfg": cfg} for step in marks(config) for cfg in CFGS[data]]


def measure(data: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All results of a dataset; those that are missing are computed."""
    count = args.samples or SAMPLES[data]
    results = Results(args.out / f"{data}.json", count)
    runs = [(m, config_of(data, m, s, args)) for s in range(args.seeds) for m in METHODS]
    judge = cache(lambda: Judge(runs[0][1], count))
    wanted = [{"method": TRAINING}]
    if results.find(wanted[0]) is None:
        results.add(wanted[0], judge().floor)
    for method, config in runs:
        own = keys(data, config, method, not args.last)
        wanted += own
        missing = [key for key in own if results.find(key) is None]
        paths = trained(config) if missing else {}
        for key in missing:
            recipe, model = saved.open_model(
                paths[key["step"]], args.device, averaged=not args.last
            )
            seed = 10_000 * (config.seed + 1)
            results.add(key, judge()(drawn(recipe, model, judge(), key["cfg"], seed, args.device)))
            print(f"{data}: {line(results.entries[-1])}", flush=True)
    return [results.find(key) for key in wanted]


def line(entry: dict[str, Any]) -> str:
    return "  ".join(
        f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}"
        for k, v in entry.items()
        if k not in ("config", "samples") and v is not None
    )


# --- Tables ---------------------------------------------------------------------------------------


def table(entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of a Markdown table: mean and standard deviation over seeds."""
    scores = [k for k in TITLES if k in entries[0]]
    yield "| | step | guidance | seeds | " + " | ".join(TITLES[k] for k in scores) + " |"
    yield "|---|---:|---:|---:|" + "---:|" * len(scores)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for e in entries:
        groups.setdefault((e.get("cfg", 0), e.get("step", -1), e["method"]), []).append(e)
    for (cfg, step, method), group in sorted(groups.items(), key=lambda item: item[0]):
        about = f"| {method} | " + (f"{step} | {cfg} | {len(group)}" if step >= 0 else "| |")
        yield f"{about} | " + " | ".join(cell([e[k] for e in group]) for k in scores) + " |"


TITLES = {
    "pca": "Fréchet distance, PCA",
    "classifier": "Fréchet distance, classifier",
    "agreement": "asked class named (first row: of the test split)",
}


def cell(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "benchmarks.dfm_against_flow_matching", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("data", nargs="+", choices=list(CFGS))
    add("--out", type=Path, default=OUT)
    add("--seeds", type=int, default=3)
    add("--steps", type=int, help="of training; default: the preset's")
    add("--batch", type=int, help="default: the preset's")
    add("--points", type=int, default=2, help="fractions of a run that are measured")
    add("--samples", type=int, help="drawn per model; default: 1437 (digits), 1000 (photos)")
    add("--last", action="store_true", help="samples of the last step's weights, not averaged")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=0)
    args = parser.parse_args(argv)
    for data in args.data:
        try:
            entries = measure(data, args)
        except KeyboardInterrupt as stop:
            print(f"stopped ({stop}); the same command goes on", file=sys.stderr)
            return 130
        print(f"\n{data}, against the test split:\n")
        print("\n".join(table(entries)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
