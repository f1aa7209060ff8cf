"""Rounds of training and sampling leave nothing behind; what does is found."""

import mmap
import tempfile
import threading

import pytest

from benchmarks.soak import LEAST, MEGABYTES, Rounds, growth, soak
from dfm_fast._library import INTERPRET

pytest.importorskip("sklearn")
pytest.importorskip("tensorboard")
pytestmark = pytest.mark.skipif(INTERPRET, reason="nothing of it is a kernel")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_training_and_sampling_stay_as_they_are(tmp_path):
    """Seconds of what `python -m benchmarks.soak` does for half an hour."""
    assert growth(soak(Rounds(tmp_path, steps=1), 0)) == []


def pages(size):
    """Memory that is the process's from now on: an allocator may have what was freed before."""
    memory = mmap.mmap(-1, size)
    memory.write(bytes(size))
    return memory


def leaking(kept, stop):
    """What each round may forget to give back."""
    return {
        "memory": lambda _: kept.append(pages(int(3 * MEGABYTES * (1 << 20) / LEAST))),
        "files": lambda _: kept.append(tempfile.TemporaryFile()),
        "threads": lambda _: threading.Thread(target=stop.wait, daemon=True).start(),
    }


@pytest.mark.parametrize("what", ["memory", "files", "threads"])
def test_a_leak_is_found(what):
    kept, stop = [], threading.Event()
    try:
        found = growth(soak(leaking(kept, stop)[what], 0))
    finally:
        stop.set()
        for leaked in kept:
            leaked.close()
    assert [text.split(":")[0] for text in found] == [what]
