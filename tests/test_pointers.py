"""Everything that messages and help texts refer to exists: pages and their sections, files, make targets, pip extras, commands."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator

import pytest

from fastbyol.__main__ import _build_parser
from tests.commands import ROOT

SOURCES = sorted(path for folder in ("fastbyol", "data_prep", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
COMMANDS = {name for action in _build_parser()._actions for name in action.choices or ()}


def texts(tree: ast.AST) -> Iterator[str]:
    """Yields every text of a module; the pieces of an f-string are joined."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def pointers(text: str) -> Iterator[tuple[str, str]]:
    """Returns (kind, target) of everything a text refers to; 'page.md: words)' names a section."""
    for page, section in re.findall(r"\b((?:(?:docs|scripts|benchmarks)/)?[\w-]+\.md)\b(?:: ([^()]+)\))?", text):
        if page not in ("report.md", "tables.md"):  # what the benchmarks and reproduce write
            yield "page", f"{page}#{section}"
    for file in re.findall(r"\b(?:data_prep|scripts|fastbyol|tests)/[\w/]+\.(?:py|sh|sbatch|yaml)\b", text):
        yield "file", file
    for target in re.findall(r"['`]make ([a-z]+)", text):
        yield "make target", target
    for extra in re.findall(r"(?:fastbyol|\.)\[([\w-]+)\]'", text):
        yield "extra", extra
    for command in re.findall(r"-m fastbyol ([a-z][a-z-]*)", text):
        yield "command", command


def is_there(kind: str, where: str) -> bool:
    if kind == "page":
        page, _, section = where.partition("#")
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.M) if (ROOT / page).is_file() else None
        return headings is not None and (not section or any(section.lower() in heading.lower() for heading in headings))
    if kind == "file":
        return (ROOT / where).is_file()
    if kind == "make target":
        return re.search(rf"^{where}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M) is not None
    if kind == "command":
        return where in COMMANDS
    return where in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def test_all_that_messages_and_help_point_at_is_there():
    found = {
        (source, pointer)
        for source in SOURCES
        for text in texts(ast.parse(source.read_text(encoding="utf-8")))
        for pointer in pointers(text)
    }
    assert {kind for _, (kind, _) in found} == {"page", "file", "make target", "extra", "command"}
    assert not [f"{source.relative_to(ROOT)}: {' '.join(pointer)}" for source, pointer in sorted(found) if not is_there(*pointer)]


@pytest.mark.parametrize("where", ["README.md#what it needs", "docs/monitors.md#No such part", "docs/none.md#"])
def test_a_page_or_section_that_is_not_there_would_be_found(where):
    assert not is_there("page", where)
    assert ("page", where) in pointers(f"see ({where.replace('#', ': ')})" if not where.endswith("#") else f"see {where[:-1]}")
