"""What MkDocs does not do of itself: reference pages of all public names, pages and files that lie
outside of docs/, and formulas as MathML, which needs no script and no font."""

from __future__ import annotations

import ast
import html
import json
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/results/amd-epyc-avx512-2c/report.md": "results/cpu.md",
    "benchmarks/results/h200/report.md": "results/h200.md",
}
PACKAGES = "dfm_fast", "dfm_fast.ops", "dfm_fast.nn", "dfm_fast.flow", "dfm_fast.models"
LINK = re.compile(r"(!?\[[^\]]*\])\(([^()#\s]+)(#[^()\s]*)?\)")
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)


def on_config(config: Any) -> Any:
    """Reference pages into the navigation."""
    (entry,) = (e for e in config.nav if isinstance(e, dict) and "Reference" in e)
    entry["Reference"] = [{title: page_of(title)} for title in config.extra["reference"]]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Pages of what lies outside of docs/, and of the reference."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    exported, shown = dict(exports()), set()
    for title, modules in config.extra["reference"].items():
        text = f"# {title}\n"
        for module, *names in map(str.split, modules):
            names = names or exported[f"dfm_fast.{module}"]
            shown.update(names)
            text += f"\n::: dfm_fast.{module}\n    options:\n      members: {json.dumps(names)}\n"
        files.append(File.generated(config, page_of(title), content=text))
    if missing := {name for names in exported.values() for name in names} - shown:
        raise PluginError(f"mkdocs.yml: no page of extra.reference shows {sorted(missing)}")
    return files


def page_of(title: str) -> str:
    return f"reference/{title.lower().replace(' ', '_')}.md"


def exports() -> Iterator[tuple[str, list[str]]]:
    """(module, the names that its package re-exports of it)."""
    for package in PACKAGES:
        path = ROOT / package.replace(".", "/") / "__init__.py"
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module.startswith(f"{package}."):
                names = [alias.asname or alias.name for alias in node.names]
                if names := [name for name in names if name[0] not in "_*"]:
                    yield node.module, names


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links out of docs/, and those of the pages from outside, to where the site has them."""
    source = {page: source for source, page in OUTSIDE.items()}.get(page.file.src_uri)
    folder = (ROOT / (source or f"docs/{page.file.src_uri}")).parent

    def relocate(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = Path(os.path.normpath(folder / target))
        if "://" in target or not path.is_relative_to(ROOT) or not path.exists():
            return match.group()
        if path.is_dir():  # a site has no folders
            return text.strip("![]")
        place = placed(path.relative_to(ROOT).as_posix(), config, files)
        place = posixpath.relpath(place, posixpath.dirname(page.file.src_uri))
        return f"{text}({place}{anchor or ''})"

    return LINK.sub(relocate, markdown)


def placed(path: str, config: Any, files: Files) -> str:
    """Where the site has a file of the repository, copied if it lies outside of docs/."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in OUTSIDE:
        return OUTSIDE[path]
    place = f"files/{path}"
    if place not in files.src_uris:
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return place


def on_page_content(content: str, **_: Any) -> str:
    """Formulas, as arithmatex marks them, to MathML."""
    content = INLINE.sub(lambda m: mathml(m[1], "inline"), content)
    return BLOCK.sub(lambda m: mathml(m[1], "block"), content)


def mathml(formula: str, display: str) -> str:
    """Bars over several letters as a macron, which browsers stretch; the converter's dash they do
    not."""
    return convert(html.unescape(formula), display=display).replace(
        '<mo accent="true">&#x02015;</mo>', '<mo stretchy="true">&#x000AF;</mo>'
    )


class Raises(griffe.Extension):
    """Errors that a docstring names on one line ("TypeError: a. ValueError: b.") apart."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring and "Raises:" in obj.docstring.value:
            before, mark, raises = obj.docstring.value.partition("Raises:")
            raises = re.sub(r"\.\s+(?=\w+Error: )", ".\n    ", raises)
            obj.docstring.value = before + mark + raises
