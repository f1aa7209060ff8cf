"""Code in the documentation runs, and does what the text around it says."""

import re

import pytest
import torch
from helpers import ROOT, run_python

from dfm_fast._library import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="the same code in every backend")
NAMES = ("acceleration", "models", "snapgen", "text")
PAGES = ("README.md", *(f"docs/{name}.md" for name in NAMES))


def blocks(path):
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.S)


def test_the_worked_example_of_the_flow_trains_and_samples():
    (code,) = blocks("docs/flow.md")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) < 30
    torch.manual_seed(0)
    code = code.replace("for step in range(20):", "for step in range(150):")
    code = code.replace("loss.backward()", "losses.append(loss.item()); loss.backward()")
    space = {"losses": []}
    exec(code, space)
    losses = space["losses"]
    assert sum(losses[-30:]) < 0.8 * sum(losses[:30])
    assert space["images"].shape == (4, 3, 32, 32)
    assert space["images"].isfinite().all()


@pytest.mark.parametrize(
    ("path", "index"),
    [(path, i) for path in PAGES for i in range(len(blocks(path)))],
)
def test_code_runs(path, index):
    result = run_python("-c", blocks(path)[index])
    assert result.returncode == 0, result.stderr
