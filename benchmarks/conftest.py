"""pytest benchmarks/ --benchmark-only [--full] [--results DIR] [--device cpu|cuda] [--seconds S]
[--no-compile] [--compile-mode MODE]"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, records
from benchmarks.harness import Row, Say, measure
from dfm_fast.profiling.clocks import synchronised

LOCAL = Path(__file__).parent / "results" / "local"


@dataclasses.dataclass
class Session:
    """What the rows of this run have come to, by family."""

    device: str
    full: bool
    seconds: float
    results: Path
    compiling: bool = True
    done: int = 0
    families: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    files: set[Path] = dataclasses.field(default_factory=set)

    def add(self, family: str, record: dict[str, Any]) -> None:
        """Keep a row, and write the family's file: a run that is cut short leaves what it has."""
        if family not in self.families:
            self.families[family] = {**records.header(self.device, family, self.full), "rows": []}
        results = self.families[family]
        results["rows"].append(record)
        path = self.results / results["machine"]["slug"] / f"{family}.json"
        records.write_json(path, records.finish(results))
        self.files.add(path)


SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dfm_fast benchmarks")
    group.addoption("--full", action="store_true", help="all rows, not only the quick ones")
    group.addoption("--results", type=Path, default=LOCAL, help="folder of the results' JSON")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    group.addoption("--compile-mode", default="", help="torch.compile's, for rivals")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")
    group.addoption("--seconds", type=float, default=2.0, help="of timing per row, at least")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: the rows of a run without --full")
    # Inductor's own, on every compile.
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.script_method:DeprecationWarning")
    option = config.getoption
    harness.MODE = option("--compile-mode")
    device = option("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    config.stash[SESSION] = Session(
        device,
        option("--full"),
        option("--seconds"),
        option("--results"),
        not option("--no-compile"),
    )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Benchmarks are bench_*.py; a file named on the command line is collected by pytest itself."""
    named = parent.session.isinitpath(file_path)
    if file_path.match("bench_*.py") and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick rows first: what a time limit cuts off is then the rest."""
    session = config.stash[SESSION]
    keep, drop = [], []
    for item in items:
        row = item.callspec.params.get("row") if hasattr(item, "callspec") else None
        if row is None:
            keep.append(item)
            continue
        if row.quick:
            item.add_marker("quick")
        wanted = (row.quick or session.full) and row.device in ("", session.device)
        (keep if wanted else drop).append(item)
    keep.sort(key=lambda item: item.get_closest_marker("quick") is None)
    config.hook.pytest_deselected(items=drop)
    items[:] = keep


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Say:
    """Progress, past pytest's capture: a compile can take minutes."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    reporter = request.config.pluginmanager.getplugin("terminalreporter")

    def write(text: str, end: str = "\n") -> None:
        with capture.global_and_fixture_disabled():
            reporter.write(text + end, flush=True)

    return write


@pytest.fixture(name="measure")
def measure_fixture(
    request: pytest.FixtureRequest, benchmark: Any, say: Say
) -> Callable[[Row], None]:
    """Measure a row, keep its record, and give pytest-benchmark our call for its own table."""
    session = request.config.stash[SESSION]
    family = request.path.stem.removeprefix("bench_")

    def run(row: Row) -> None:
        session.done += 1
        say(f"\n[{session.done}/{request.session.testscollected}] {row.id}")
        record, call = measure(row, session.device, session.seconds, say, session.compiling)
        session.add(family, record)
        say(f"    {summary(record)}")
        benchmark.group = row.op
        benchmark.extra_info.update(records.rounded(record))
        benchmark.pedantic(synchronised(call, session.device), rounds=15, warmup_rounds=2)

    return run


def summary(record: dict[str, Any]) -> str:
    """One line: ours against all others, and the goals."""
    ours, speedup = record["providers"]["ours"]["ms"]["median"], record["speedup"]
    parts = [f"ours {ours:.3g} ms", f"{record['copy_fraction']['median']:.0%} of copy"]
    parts += [f"{ratio['median']:.3g}x {name}" for name, ratio in speedup.items()]
    form = record["providers"].get("compiled", {}).get("form")
    parts += [f"fastest compiled: {form}"] if form else []
    parts += [f"no {name}: {why}" for name, why in record["missing"].items()]
    parts += [] if record["steady"] else ["UNSTEADY: the machine is busy, repeat when it is not"]
    return ", ".join(parts)


def goal_line(row: dict[str, Any], goal: dict[str, Any]) -> str:
    measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.3g}"
    verdict = {True: "met", False: "MISSED", None: "open"}[goal["met"]]
    return f"{verdict:6}  {measured:>12} of {goal['at_least']:<5g} {goal['against']:9} {row['id']}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    for results in session.families.values():
        terminalreporter.section(f"goals: {results['family']} on {results['machine']['name']}")
        for row in results["rows"]:
            for goal in row["goals"]:
                terminalreporter.write_line(goal_line(row, goal))
    for path in sorted(session.files):
        terminalreporter.write_line(f"results: {path}")
