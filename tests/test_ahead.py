"""Kernels compiled ahead of a visit to a GPU: the files that Triton finds there."""

import json
import os
import subprocess
import sys
import tarfile

import pytest
from helpers import INTERPRET, ROOT

pytest.importorskip("triton.backends.nvidia")
pytestmark = pytest.mark.skipif(INTERPRET, reason="compiles")

RECORDED = """
import torch, dfm_fast
from dfm_fast.kernels._predictions import recording
with recording() as launches:
    x = torch.empty(16, 4096, 5376, dtype=torch.bfloat16)
    dfm_fast.geglu(x)
    for launch in launches:
        launch.compiled()
"""


def ahead(out, folder, *rows):
    command = [sys.executable, "-m", "benchmarks.ahead", str(out), *rows, "--folder", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_what_was_compiled_ahead_is_not_compiled_again(tmp_path):
    folder = tmp_path / "there"
    done = ahead(tmp_path / "kernels.tar.xz", folder, "geglu-large_snapgen-bfloat16-*-forward")
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "kernels.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    groups = [json.loads(p.read_text())["child_paths"] for p in folder.rglob("__grp__*")]
    assert len(groups) == 2  # in bfloat16, and in float32 beside it
    for files in groups:
        assert {name.rpartition(".")[2] for name in files} == {"json", "cubin"}
        assert all(os.path.exists(path) for path in files.values())
    env = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    subprocess.run([sys.executable, "-c", RECORDED], env=env, check=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_no_such_row_is_an_error(tmp_path):
    done = ahead(tmp_path / "kernels.tar.xz", tmp_path, "gegul-*")
    assert done.returncode == 1
    assert "ahead: ROW: expected the id of a row" in done.stdout
    assert not (tmp_path / "kernels.tar.xz").exists()
