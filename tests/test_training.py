"""The training loop: resumed exactly, on any number of ranks, saved whole, stopped in order."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, run_python, torchrun

from dfm_fast._library import INTERPRET
from dfm_fast.training import distributed, loop, orders, pictures, recipes, saved
from dfm_fast.training.checkpoints import CheckpointError, Checkpoints, reason
from dfm_fast.training.config import FlowConfig, ModelConfig, OptimizerConfig, preset
from dfm_fast.training.monitors import Board, NotFinite, Report
from dfm_fast.training.outputs import RunError

pytest.importorskip("sklearn")
pytest.importorskip("tensorboard")
pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="nothing of it is a kernel"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

MODEL = ModelConfig(width=32, depth=2, heads=2, patch_sizes=(2, 4), class_dropout=0.3)


def tiny(out, **changes):
    """Constant learning rate: what a step does must not depend on how many are to come."""
    options = {
        "model": MODEL, "flow": FlowConfig(stage_probs=(0.6, 0.4), sample_steps=(2, 1)),
        "optimizer": OptimizerConfig(lr=3e-3, warmup=2, ema=0.5), "batch": 8, "steps": 6,
        "save_every": 3, "sample_every": 0, "log_every": 2, "device": "cpu",
    }  # fmt: skip
    return preset("digits", out, **{**options, **changes})


def run(config, **options):
    """(losses by step, outcome)"""
    losses = {}
    outcome = loop.train(config, on_step=lambda r: losses.update({r.step: r.loss}), **options)
    return losses, outcome


def weights(folder, path=None):
    """All that a checkpoint holds, by key: the last, or the one at path."""
    import torch.distributed.checkpoint as dcp

    path = path or Checkpoints(folder / loop.CHECKPOINTS).latest()
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(v.size, dtype=v.properties.dtype) if hasattr(v, "size") else None
        for name, v in metadata.items()
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def assert_same_state(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert any(name.startswith("optimizer.") for name in a)
    for name, value in a.items():
        same = torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name]
        assert same, name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, losses) of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(tiny(folder))[0]


# --- Data order ---


def test_every_epoch_has_every_sample_once():
    for epoch in range(3):
        found = [orders.draw(5, epoch * 11 + i, 11).index for i in range(11)]
        assert sorted(found) == list(range(11))
    first = [orders.draw(5, i, 11) for i in range(22)]
    assert [orders.draw(5, i, 11) for i in reversed(range(22))] == first[::-1]
    assert [d.index for d in first[:11]] != [d.index for d in first[11:]]
    assert [orders.draw(6, i, 11).index for i in range(11)] != [d.index for d in first[:11]]
    many = [orders.draw(0, i, 7, 0.1) for i in range(4000)]
    for share, p in ((sum(d.flip for d in many), 0.5), (sum(d.drop for d in many), 0.1)):
        assert abs(share - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p))


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_ranks_and_parts_share_a_batch(world, parts):
    slices = [orders.Slices(24, 2, 12, parts, rank, world) for rank in range(world)]
    for step in range(2):
        found = []
        for part, s in itertools.product(range(parts), slices):
            positions = list(s)[step * parts + part]
            row = s.start(part)
            assert positions == list(range(24 + 12 * step + row, 24 + 12 * step + row + s.rows))
            found += positions
        assert sorted(found) == list(range(24 + 12 * step, 36 + 12 * step))


def test_workers_keep_the_order():
    data = [(torch.full((1, 2, 2), float(i)), i) for i in range(10)]
    ordered = orders.Ordered(data, 3, True, 0.5, 99)
    slices = orders.Slices(4, 5, 4, 1, 0, 1)
    both = [list(orders.loader(ordered, slices, n, False)) for n in (0, 2)]
    for a, b in zip(*both, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    labels = torch.cat([y for _, y in both[0]])
    assert (labels == 99).any()
    assert (labels != 99).any()


# --- Resuming ---


@pytest.mark.parametrize("stop", [2, 4])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(whole, tmp_path, stop):
    folder, losses = whole

    def interrupt(report):
        first[report.step] = report.loss
        if report.step == stop:
            os.kill(os.getpid(), signal.SIGTERM if stop == 2 else signal.SIGINT)

    first, before = {}, [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    outcome = loop.train(tiny(tmp_path), on_step=interrupt)
    assert outcome.stopped_by == ("SIGTERM" if stop == 2 else "SIGINT")
    assert stop <= outcome.step <= stop + 1  # reports come a step late
    assert outcome.checkpoint == Checkpoints(tmp_path / loop.CHECKPOINTS).latest()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    torch.rand(7)  # no global generator has a say
    second, _ = run(tiny(tmp_path), resume=True)
    assert {**first, **second} == losses
    assert min(second) == outcome.step + 1
    assert_same_state(folder, tmp_path)


def test_a_signal_to_the_whole_group_saves_in_spite_of_workers(tmp_path):
    """As torchrun and schedulers send it."""
    arguments = "import sys, test_training as t; from pathlib import Path\n"
    arguments += "c = t.tiny(Path(sys.argv[1]), save_every=10**6, steps=10**6, workers=2)\n"
    arguments += "print(t.loop.train(c, on_step=lambda r: print(r.step, flush=True)).stopped_by)"
    process = subprocess.Popen(
        [sys.executable, "-c", arguments, str(tmp_path)], cwd=ROOT / "tests",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "1\n"
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == "SIGTERM"
    (saved,) = Checkpoints(tmp_path / loop.CHECKPOINTS).all()
    assert saved.name == f"step-{int(out.splitlines()[-2]):08d}"


def test_a_process_that_fails_does_not_wait_for_its_workers(tmp_path):
    """An error keeps their iterator alive to the end, where Python stops and joins them."""
    code = "from dfm_fast.training import orders; data = [(i, i) for i in range(99)]\n"
    code += "order = orders.Ordered(data, 0, False, 0.0, 0)\n"
    code += "slices = orders.Slices(0, 50, 1, 1, 0, 1)\n"
    code += "batches = orders.batches(orders.loader(order, slices, 2, False))\n"
    code += "next(batches); raise KeyError('failed')"
    result = run_python("-c", code, timeout=60)
    assert "KeyError: 'failed'" in result.stderr
    assert "DataLoader worker" not in result.stderr


def test_parts_of_a_batch_give_the_losses_of_the_batch(whole, tmp_path):
    losses, _ = run(tiny(tmp_path, accumulate=2, steps=4))
    assert losses == pytest.approx({k: whole[1][k] for k in losses}, rel=1e-5)


def test_the_average_forgets_the_first_weights(tmp_path):
    """After the first step it is the weights; then it keeps (1 + n) / (10 + n), at most the decay:
    2/11, 3/12 and 0.3 of itself here."""
    run(tiny(tmp_path, optimizer=OptimizerConfig(ema=0.3), steps=4, save_every=1, keep=4))
    paths = Checkpoints(tmp_path / loop.CHECKPOINTS, 4).all()
    states = [weights(tmp_path, path) for path in paths]
    names = [n.removeprefix("ema.") for n in states[0] if n.startswith("ema.")]
    assert len(paths) == 4
    for name in names:
        average = states[0][f"model.{name}"]
        for state, keeps in zip(states[1:], (2 / 11, 3 / 12, 0.3), strict=True):
            average = keeps * average + (1 - keeps) * state[f"model.{name}"]
        torch.testing.assert_close(states[-1][f"ema.{name}"], average, rtol=1e-5, atol=1e-7)


def test_a_folder_with_checkpoints_needs_resume(whole):
    with pytest.raises(ValueError, match="train: out: expected a new folder, or --resume, got one"):
        loop.train(tiny(whole[0]))


def test_killed_in_mid_run_it_loses_only_the_steps_since_the_last_checkpoint(whole, tmp_path):
    arguments = "import sys, test_training as t, time; from pathlib import Path\n"
    arguments += "c = t.tiny(Path(sys.argv[1]), save_every=1, steps=6)\n"
    arguments += "t.loop.train(c, on_step=lambda r: time.sleep(0.3))"
    process = subprocess.Popen(
        [sys.executable, "-c", arguments, str(tmp_path)], cwd=ROOT / "tests",
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoints, limit = Checkpoints(tmp_path / loop.CHECKPOINTS, keep=2), time.monotonic() + 120
    while len(checkpoints.all()) < 2 and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    assert process.poll() is None
    process.kill()
    process.wait()
    last = checkpoints.latest()
    assert 2 <= int(last.name.removeprefix("step-")) < 6
    # What a kill while saving leaves behind is no checkpoint, and goes with the next one.
    left = shutil.copytree(last, last.with_name(".tmp-step-00000099"))
    losses, outcome = run(tiny(tmp_path, save_every=1), resume=True)
    assert min(losses) == int(last.name.removeprefix("step-")) + 1
    assert losses == {k: whole[1][k] for k in losses}
    assert outcome.step == 6
    assert not left.exists()
    assert [p.name for p in checkpoints.all()] == ["step-00000005", "step-00000006"]
    assert_same_state(whole[0], tmp_path)


# --- Checkpoints ---


def test_a_full_disk_leaves_the_old_checkpoint(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    before = weights(tmp_path)
    config = tiny(tmp_path, steps=7)
    message = r"could not save .*step-00000007: OSError"
    # The logs are smaller.
    with largest_file(100_000), pytest.raises(CheckpointError, match=message) as e:
        loop.train(config, resume=True)
    folder = tmp_path / loop.CHECKPOINTS
    assert f"the last good checkpoint: {folder / 'step-00000006'}" in str(e.value)
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000003", "step-00000006"]
    after = weights(tmp_path)
    assert all(torch.equal(v, after[k]) for k, v in before.items() if torch.is_tensor(v))
    losses, _ = run(config, resume=True)  # space again
    assert list(losses) == [7]


@contextlib.contextmanager
def largest_file(size):
    """Files beyond it fail while they are written, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def failing(error, name):
    """`name`'s replacement, as on a full disk."""

    def fail(*args, **kwargs):
        raise OSError(28, f"{error}: {name}")

    return fail


def test_logs_and_grids_that_cannot_be_written_do_not_end_the_run(
    whole, tmp_path, monkeypatch, capfd
):
    """Told once each; the losses and the checkpoint are those of the run."""
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setattr(SummaryWriter, "add_scalar", failing("No space left", "log"))
    monkeypatch.setattr(pictures, "write", failing("No space left", "grid"))
    config = tiny(tmp_path, sample_every=2, sample_count=2, log_every=1)
    assert run(config)[0] == whole[1]
    assert_same_state(whole[0], tmp_path)
    err = capfd.readouterr().err
    for what in ("log", "grid"):
        assert err.count(f"not written from here on: [Errno 28] No space left: {what}") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboards_own_file_may_be_cut_off(whole, tmp_path):
    """Its writer fails in a thread of its own."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    config = tiny(tmp_path, steps=40, save_every=100, log_every=1)
    with largest_file(4000), pytest.raises(CheckpointError, match="step-00000040"):
        loop.train(config, resume=True)


def test_an_export_that_cannot_be_written_names_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "export", failing("No space left", "model"))
    message = r"could not write .*model: OSError: .*No space left.* weights are in .*step-00000001"
    with pytest.raises(RunError, match=message):
        loop.train(tiny(tmp_path, steps=1))
    assert len(Checkpoints(tmp_path / loop.CHECKPOINTS).all()) == 1


def test_one_run_to_a_folder(tmp_path):
    """Another process' is named; a process that has died holds nothing on, nor do its workers."""
    code = "import sys, os, time; from pathlib import Path\n"
    code += "from dfm_fast.training.outputs import alone\n"
    code += "with alone('train', Path(sys.argv[1])):\n"
    code += "    if os.fork() == 0: time.sleep(60)\n"
    code += "    print(os.getpid(), flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        number = int(process.stdout.readline())
        with pytest.raises(ValueError, match=f"out: .*no other run writes to, got .*{number}'s$"):
            loop.train(tiny(tmp_path, steps=1))
        process.kill()
        process.wait()
        assert loop.train(tiny(tmp_path, steps=1)).step == 1
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / ".lock").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """Though the loss of the step before was."""
    config = tiny(tmp_path, steps=4, save_every=1)
    update = loop.Run._update

    def broken(self):
        norm = update(self)
        if self.step == 2:  # the third step
            with torch.no_grad():
                self.ema.heads.bias[0] = math.inf
        return norm

    monkeypatch.setattr(loop.Run, "_update", broken)
    with pytest.raises(NotFinite, match=r"step 3: weights .*checkpoint: .*step-00000002$"):
        loop.train(config)
    names = [p.name for p in Checkpoints(tmp_path / loop.CHECKPOINTS).all()]
    assert names == ["step-00000001", "step-00000002"]


def test_copies_and_remains_among_the_checkpoints(whole, tmp_path):
    """A user's copy is no checkpoint; what is not whole does not count as saved."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(tmp_path / loop.CHECKPOINTS)
    last = checkpoints.latest()
    copy = shutil.copytree(last, last.with_name(f"{last.name}-bak"))
    (last.with_name("step-00000007")).mkdir()
    assert checkpoints.latest() == last
    losses, outcome = run(tiny(tmp_path, steps=7), resume=True)
    assert list(losses) == [7]
    assert outcome.checkpoint == checkpoints.latest() == last.with_name("step-00000007")
    assert saved.open_model(copy)[0] == saved.open_model(tmp_path)[0]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_damaged_checkpoint_is_named_and_so_is_the_one_before(whole, tmp_path, name):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    last = Checkpoints(tmp_path / loop.CHECKPOINTS).latest()
    (last / name).write_bytes((last / name).read_bytes()[:50])
    older = last.with_name("step-00000003")
    message = f"{last}: damaged checkpoint: .*; the one before, {older}, is used where"
    for call in (lambda: run(tiny(tmp_path), resume=True), lambda: saved.open_model(tmp_path)):
        with pytest.raises(ValueError, match=message):
            call()
    last.rename(last.with_name("damaged"))
    assert list(run(tiny(tmp_path), resume=True)[0]) == [4, 5, 6]


def test_a_full_disk_is_called_one():
    """torch's own words for it name a line of its source."""
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 22")
    assert "is the disk full" in reason(error)


def test_checkpoints_of_another_shape_name_the_keys(whole):
    other = dataclasses.replace(MODEL, width=64, qk_norm=False)
    with pytest.raises(ValueError, match="does not fit this run") as e:
        loop.train(tiny(whole[0], model=other), resume=True)
    assert "model.hidden_size: saved 32, now 64" in str(e.value)
    assert "model.qk_norm: saved true, now false" in str(e.value)
    path = Checkpoints(whole[0] / loop.CHECKPOINTS).latest()
    state = {"model": {"heads.bias": torch.zeros(3), "tail": torch.zeros(1)}}
    with pytest.raises(ValueError, match="does not fit the model") as e:
        loop.load(path, state)
    assert "model.heads.bias: expected shape [3], got [20]" in str(e.value)
    assert "model.tail: missing" in str(e.value)


def test_nan_stops_with_the_step_and_the_last_good_checkpoint(tmp_path, monkeypatch):
    opened = loop.open_dataset

    def broken(config, split):
        data = opened(config, split)
        data.x = data.x.clone()
        data.x[orders.draw(0, 8 * 4 + 2, len(data)).index] = math.nan  # comes in step 5
        return data

    monkeypatch.setattr(loop, "open_dataset", broken)
    with pytest.raises(NotFinite, match=r"step 5: loss nan.*checkpoint: .*step-00000003"):
        loop.train(tiny(tmp_path))
    assert [p.name for p in Checkpoints(tmp_path / loop.CHECKPOINTS).all()] == ["step-00000003"]


# --- Logs ---


def test_speed_is_of_the_steps_and_the_last_window_is_written(tmp_path):
    """Reports come a step late, at a step that saves at once: it is when they were done that
    counts."""
    written = {}
    board = Board(tmp_path, 0, 7, 2, main=True)
    board.writer.add_scalar = lambda name, value, step: written.update({(name, step): value})
    board.since = 100.0
    for step in range(1, 6):
        terms = {"level_1": float(step)} if step % 4 == 1 else {}
        board.step(Report(step, float(step), terms, 1.0, 1e-3, 100.0 + 0.5 * step), 8)
    board.step(Report(6, 6.0, {}, 1.0, 1e-3, 103.0), 8)
    board.step(Report(7, 7.0, {}, 1.0, 1e-3, 103.5), 8)
    board.pause()  # a checkpoint, and the end: nothing was trained since
    board.close()
    speeds = {step: value for (name, step), value in written.items() if "images" in name}
    assert speeds == pytest.approx({2: 16, 4: 16, 6: 16})
    assert [written["loss", step] for step in (2, 4, 6, 7)] == [1.5, 3.5, 5.5, 7.0]
    assert {s: v for (name, s), v in written.items() if name == "loss/level_1"} == {2: 1, 6: 5}


# --- Ranks ---


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_give_the_losses_of_one(whole, tmp_path, kind):
    """From the start, and from one process' checkpoint; and back to one process."""
    folder, losses = whole
    torchrun(__file__, kind, str(tmp_path))
    found = {int(k): v for k, v in json.loads((tmp_path / "losses.json").read_text()).items()}
    assert found == pytest.approx({k: losses[k] for k in found}, rel=1e-4)
    assert list(found) == [1, 2, 3, 4]
    assert len(list((tmp_path / "samples").iterdir())) == 4
    back, _ = run(tiny(tmp_path), resume=True)
    assert list(back) == [5, 6]
    assert back == pytest.approx({k: losses[k] for k in back}, rel=1e-4)
    a, b = weights(folder), weights(tmp_path)
    for name, value in a.items():
        if torch.is_tensor(value):
            torch.testing.assert_close(value, b[name], atol=2e-4, rtol=1e-2, msg=name)


def ranks(kind, folder):
    """What each rank runs: two steps, then a resumed two."""
    losses = {}
    for steps in (2, 4):
        options = {"save_every": 2, "accumulate": 2, "sample_every": 1, "sample_count": 2}
        config = tiny(folder, steps=steps, distribution=kind, **options)
        losses |= run(config, resume=steps == 4)[0]
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    from pathlib import Path

    ranks(sys.argv[1], Path(sys.argv[2]))
    distributed.leave(0)
