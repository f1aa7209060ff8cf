"""DFM against plain flow matching: `python -m benchmarks.dfm_against_flow_matching digits photos`.

The same transformer, data order, steps, optimizer, sampling steps and seeds; plain flow matching is
the one-level case, whose patches are those of DFM's finest level. Samples are drawn from the
average of the weights at fractions of the run, and compared with the test split by the Fréchet
distance in feature spaces that are fitted on the training split. Beside them stand the floor, the
training split's own distance, and the ceiling, an untrained model's; and, with labels, how often a
classifier trained apart names the class that was asked for.

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfm_fast.models._pretrained import write_bytes
from dfm_fast.training import evaluation, pictures, saved
from dfm_fast.training.checkpoints import Checkpoints
from dfm_fast.training.config import TrainConfig, preset, to_json
from dfm_fast.training.datasets import open_dataset
from dfm_fast.training.loop import CHECKPOINTS, train

METHODS = ("dfm", "flow matching")
BATCH = 128  # samples that are drawn at once
CFGS = {"digits": (1.0, 1.5), "photos": (1.0,)}


# --- Runs -----------------------------------------------------------------------------------------


def config_of(data: str, method: str, seed: int, args: argparse.Namespace) -> TrainConfig:
    """The preset; plain flow matching has one level and as many sampling steps in all."""
    out = args.out / data / f"{method.replace(' ', '-')}-{seed}"
    config = preset(data, out, seed=seed)
    steps = args.steps or config.steps
    every = max(1, steps // args.points)
    config = dataclasses.replace(
        config, steps=steps, save_every=every, keep=args.points + 1, sample_every=0,
        device=args.device, workers=args.workers,
    )  # fmt: skip
    if args.batch:
        config = dataclasses.replace(config, batch=args.batch)
    if method == "dfm":
        return config
    model = dataclasses.replace(config.model, patch_sizes=config.model.patch_sizes[-1:])
    flow = dataclasses.replace(config.flow, stage_probs=None, sample_steps=(40,))
    return dataclasses.replace(config, model=model, flow=flow)


def trained(config: TrainConfig) -> list[tuple[int, Path]]:
    """(step, checkpoint) at every fraction of the run; trains what is missing."""
    outcome = train(config, resume=True)
    if outcome.stopped_by:
        raise KeyboardInterrupt(outcome.stopped_by)
    marks = [config.save_every * i for i in range(1, config.steps // config.save_every)]
    folder = Checkpoints(config.out / CHECKPOINTS, config.keep)
    found = {folder.step_of(path): path for path in folder.all()}
    return [(step, found[step]) for step in (*marks, config.steps) if step in found]


# --- Distances ------------------------------------------------------------------------------------


class Judge:
    """Feature spaces, the test split's features, and a classifier where there are labels."""

    def __init__(self, config: TrainConfig, count: int) -> None:
        data = open_dataset(config.data)
        x, labels = evaluation.gather(data, max(count, 4096))
        y, _ = evaluation.gather(open_dataset(config.data, "test"))
        known = labels if data.num_classes else None
        self.spaces = evaluation.feature_spaces(x, known)
        self.real = {name: space(y) for name, space in self.spaces.items()}
        self.classifier = None if known is None else evaluation.fit_classifier(x, known)
        # As many samples as will be drawn, of the same classes: distances depend on their number.
        self.x, self.labels = evaluation.gather(data, count)
        if known is None:
            self.labels = None

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


def untrained(config: TrainConfig, args: argparse.Namespace) -> TrainConfig:
    return dataclasses.replace(config, steps=0, out=args.out / "untrained" / config.out.name)


# --- Results --------------------------------------------------------------------------------------


class Results:
    """One JSON file per dataset, written after every entry."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = (
            json.loads(path.read_text())["entries"] if path.exists() else []
        )

    def find(self, **key: Any) -> dict[str, Any] | None:
        return next((e for e in self.entries if key.items() <= e.items()), None)

    def add(self, scores: dict[str, float], **key: Any) -> None:
        self.entries.append({**key, **scores})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path, (json.dumps({"entries": self.entries}, indent=1) + "\n").encode())


def measure(data: str, args: argparse.Namespace) -> Results:
    """All results of a dataset, those that are missing computed."""
    results = Results(args.out / f"{data}.json")
    configs = {m: [config_of(data, m, s, args) for s in range(args.seeds)] for m in METHODS}
    first = configs["dfm"][0]
    judge = None

    def judged() -> Judge:
        nonlocal judge
        judge = judge or Judge(first, args.samples or {"digits": 1437}.get(data, 1000))
        return judge

    count = args.samples
    if results.find(method="training split", samples=count) is None:
        results.add(judged()(judged().x), method="training split", samples=count)
    jobs = [(m, s) for s in range(args.seeds) for m in ("untrained", *METHODS)]
    for method, seed in jobs:
        config = configs["dfm" if method == "untrained" else method][seed]
        about = {"method": method, "seed": seed, "samples": count, "config": comparable(config)}
        todo = [step for step in marks(config, method) if missing(results, data, step, about)]
        if not todo:
            continue
        run = untrained(config, args) if method == "untrained" else config
        for step, checkpoint in trained(run):
            if step not in todo:
                continue
            recipe, model = saved.open_model(checkpoint, args.device)
            for cfg in CFGS[data]:
                key = {**about, "step": step, "cfg": cfg}
                if results.find(**key) is None:
                    x = drawn(recipe, model, judged(), cfg, 10_000 * (seed + 1), args.device)
                    results.add(judged()(x), **key)
                    print(f"{data}: {line(results.entries[-1])}", flush=True)
    return results


def comparable(config: TrainConfig) -> dict[str, Any]:
    """What a result depends on."""
    values = to_json(config)
    return {k: v for k, v in values.items() if k not in ("out", "workers", "keep", "log_every")}


def marks(config: TrainConfig, method: str) -> list[int]:
    if method == "untrained":
        return [0]
    count = config.steps // config.save_every
    return [*(config.save_every * i for i in range(1, count)), config.steps]


def missing(results: Results, data: str, step: int, about: dict[str, Any]) -> bool:
    return any(results.find(**about, step=step, cfg=cfg) is None for cfg in CFGS[data])


def line(entry: dict[str, Any]) -> str:
    return "  ".join(
        f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}"
        for k, v in entry.items()
        if k not in ("config", "samples")
    )


# --- Tables ---------------------------------------------------------------------------------------


def table(results: Results, args: argparse.Namespace) -> Iterator[str]:
    """Lines of a Markdown table: mean and standard deviation over seeds."""
    entries = [e for e in results.entries if e["samples"] == args.samples]
    scores = [k for k in ("pca", "classifier", "agreement") if k in entries[0]]
    yield "| | step | guidance | seeds | " + " | ".join(TITLES[k] for k in scores) + " |"
    yield "|---|---:|---:|---:|" + "---:|" * len(scores)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for e in entries:
        groups.setdefault((e.get("cfg", 0), e["method"], e.get("step", 0)), []).append(e)
    for (cfg, method, step), group in sorted(groups.items(), key=lambda item: item[0]):
        cells = (cell([e[k] for e in group]) for k in scores)
        where = f"| {method} | {step or ''} | {cfg or ''} | {len(group)} | "
        yield where + " | ".join(cells) + " |"


TITLES = {
    "pca": "Fréchet distance, PCA",
    "classifier": "Fréchet distance, classifier",
    "agreement": "asked class named",
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
    default = Path(__file__).parent / "results" / "local" / "dfm_against_flow_matching"
    add("--out", type=Path, default=default)
    add("--seeds", type=int, default=3)
    add("--steps", type=int, help="of training; default: the preset's")
    add("--batch", type=int, help="default: the preset's")
    add("--points", type=int, default=2, help="fractions of a run that are measured")
    add("--samples", type=int, help="drawn per model; default: 1437 (digits), 1000 (photos)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=0)
    args = parser.parse_args(argv)
    for data in args.data:
        try:
            results = measure(data, args)
        except KeyboardInterrupt as stop:
            print(f"stopped ({stop}); the same command goes on", file=sys.stderr)
            return 130
        print(f"\n{data}, against the test split:\n")
        print("\n".join(table(results, args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
