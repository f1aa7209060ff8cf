"""What is shipped: a wheel is built from a copy of the tree and imported from elsewhere."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, run_python

import dfm_fast
from dfm_fast._library import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="nothing of Triton in it")
TABLE = "kernels/tables/some-gpu.json"
PURE = {"DFM_FAST_NO_EXT": "1", "PATH": "/usr/bin:/bin"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tree: building in place would leave files behind."""
    copy = tmp_path_factory.mktemp("package") / "source"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "*.so", "results")
    shutil.copytree(ROOT, copy, ignore=ignore)
    (copy / TABLE).parent.mkdir(exist_ok=True)
    (copy / TABLE).write_text("{}")
    return copy


@pytest.fixture(scope="module")
def wheel(source):
    """A pure-Python wheel."""
    base = source.parent
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "-w", str(base), str(source)]
    subprocess.run(command, check=True, env=PURE, cwd=base)
    return next(base.glob("*.whl"))


def test_wheel_has_the_packages_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"dfm_fast", next(t for t in tops if t.endswith(".dist-info"))}
    for path in [*ROOT.glob("dfm_fast/**/*.py"), *ROOT.glob("kernels/*.py")]:
        shipped = path.relative_to(ROOT).as_posix().removeprefix("dfm_fast/")
        assert f"dfm_fast/{shipped}" in names
    assert {"dfm_fast/py.typed", "dfm_fast/cli/page.css", f"dfm_fast/{TABLE}"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_imports_and_runs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import torch, dfm_fast, dfm_fast.nn, dfm_fast.kernels
assert dfm_fast.__file__.startswith({str(tmp_path)!r}), dfm_fast.__file__
assert dfm_fast.kernels.__file__.startswith({str(tmp_path)!r}), dfm_fast.kernels.__file__
x = torch.randn(1, 2, 8, 8)
assert torch.allclose(dfm_fast.laplacian_collapse(dfm_fast.laplacian_build(x, 3)), x, atol=1e-6)
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_a_users_program_is_checked_against_the_installed_package(wheel, tmp_path):
    """mypy reads types of installed packages only, and of these where py.typed is."""
    venv.create(tmp_path / "venv")
    installed = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")})
    zipfile.ZipFile(wheel).extractall(installed)
    others = [path for path in sys.path if path.endswith("-packages")]  # where torch is
    (Path(installed) / "others.pth").write_text("\n".join(others))
    right = (ROOT / "tests/typed_program.py").read_text()
    wrong = right.replace("eps=1e-6", "eps='1e-6'").replace("heads=4", "heads=None")
    wrong = wrong.replace("num_inference_steps", "steps").replace("-> Outcome", "-> int")
    (tmp_path / "right.py").write_text(right)
    (tmp_path / "wrong.py").write_text(wrong)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "right.py", "wrong.py"]
    command += ["--python-executable", tmp_path / "venv/bin/python"]
    command += ["--cache-dir", ROOT / ".mypy_cache/strict"]  # of torch: 15 seconds, else 4
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = re.findall(r"^(\S+):\d+: error: .*\[(\S+)\]$", done.stdout, re.M)
    codes = ["arg-type", "arg-type", "call-arg", "return-value"]
    assert sorted(found) == [("wrong.py", code) for code in codes], done.stdout + done.stderr


def test_wheel_package_and_changelog_have_one_version(wheel):
    named, version = wheel.name.split("-")[:2]
    assert (named, version) == ("dfm_fast", dfm_fast.__version__)
    metadata = next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/METADATA"))
    assert f"\nVersion: {version}\n" in zipfile.ZipFile(wheel).read(metadata).decode()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == version


def test_pure_wheel_serves_every_python(wheel):
    """The limited API's tag is the extension's."""
    assert wheel.name.endswith("-py3-none-any.whl")


def test_extension_keeps_to_the_limited_api_of_python():
    """Python's header in the one source that is a module, and nothing of pybind11's in any."""
    sources = [p for p in ROOT.glob("csrc/cpu/*") if "Python.h" in p.read_text()]
    assert [p.name for p in sources] == ["module.cpp"]
    for path in ROOT.glob("csrc/cpu/*"):
        assert not re.search(r"pybind|torch/(extension|python)\.h", path.read_text()), path
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    include = sysconfig.get_paths()["include"]
    command = ["g++", "-fsyntax-only", "-Werror", "-DPy_LIMITED_API=0x030B0000", f"-I{include}"]
    command += ["-DTORCH_EXTENSION_NAME=_C", str(sources[0])]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("statement", ["from kernels import norms", "import kernels.norms"])
def test_kernels_are_importable_under_one_name_only(statement):
    result = run_python("-c", statement)
    assert result.returncode != 0
    expected = (
        "expected import as dfm_fast.kernels, got kernels",
        "No module named 'kernels.norms'",
    )
    assert any(line in result.stderr for line in expected), result.stderr


def test_libraries_that_look_for_a_package_named_kernels_find_none():
    """transformers imports it to ask for its version."""
    code = "import kernels; assert getattr(kernels, '__version__', 'N/A') == 'N/A'"
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_sdist_holds_the_sources_of_the_extension(source, tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, check=True, env=PURE, cwd=source)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = (
        *ROOT.glob("csrc/**/*.*"),
        *ROOT.glob("kernels/*.py"),
        *ROOT.glob("dfm_fast/*/*.css"),
    )
    for path in (*sources, ROOT / "setup.py"):
        assert str(path.relative_to(ROOT)) in names
    assert TABLE in names
