"""Code in the documentation runs, and does what the text around it says.

Of README.md and all of docs/: blocks of python, a page's one after the other, as a reader runs
them, and the options of shell commands. What needs weights or a GPU is marked text, not python.
"""

import contextlib
import functools
import importlib.util
import inspect
import io
import re
import shlex

import pytest
import torch
from helpers import ROOT

import dfm_fast
from dfm_fast import cli, nn, ops
from dfm_fast._library import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="the same code in every backend")
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]


def blocks(path, language="python"):
    return re.findall(rf"^```(?:{language})\n(.*?)^```", (ROOT / path).read_text(), re.S | re.M)


def commands(path):
    """Lines of shell blocks, as words, with their continuations."""
    text = "\n".join(blocks(path, "bash|sh")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def test_the_worked_example_of_the_flow_trains_and_samples():
    code = blocks("docs/flow.md")[0]
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


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path)])
def test_python_runs(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space = {"__name__": "__main__"}
    for i, code in enumerate(blocks(path)):
        exec(compile(code, f"{path}, block {i}", "exec"), space)


@functools.cache
def known_options(command):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    return set(re.findall(r"--[\w.-]+", text.getvalue()))


def unknown(words):
    """What a command names and nobody has: targets of make, modules, options of `dfm-fast`."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        return set(words[1:]) - set(targets)
    for i, word in enumerate(words):
        if word in ("dfm-fast", "dfm_fast.cli"):
            command, *rest = words[i + 1 :]
            options = {w.partition("=")[0] for w in rest if w.startswith("--")}
            return {command} - set(cli.COMMANDS) or options - known_options(command)
        if word == "-m" and not importlib.util.find_spec(words[i + 1]):
            return {words[i + 1]}
    return set()


@pytest.mark.parametrize("path", [path for path in PAGES if commands(path)])
def test_commands_name_what_exists(path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # no option's name is broken in two
    assert not {" ".join(words): bad for words in commands(path) if (bad := unknown(words))}


def test_the_table_of_operators_is_the_signatures():
    text = (ROOT / "docs/operators.md").read_text()
    layers = {name for name in nn.__all__ if name[0].isupper()}
    assert layers == set(re.findall(r"`nn\.(\w+)`", text))
    for name in ops.__all__:
        assert f"`{name}" in text, name
    cells = " ".join(re.findall(r"^\| (`.*?`) \|", text, re.M))
    for name, arguments in re.findall(r"`(\w+)\((.*?)\)`", cells):
        parameters = inspect.signature(getattr(dfm_fast, name)).parameters.values()
        keyword_only = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
        positional, _, keywords = map(names, arguments.partition("*"))
        assert positional == [p.name for p in parameters if p.name not in keyword_only], name
        assert set(keywords) <= set(keyword_only), name


def names(arguments):
    given = (a.partition("=")[0].strip() for a in arguments.split(","))
    return [a for a in given if a not in ("", "...", "*")]
