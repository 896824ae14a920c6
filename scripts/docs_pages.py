"""MkDocs hook: pages that are made while the site is built, from the schema, the presets, the public names, and files outside docs/."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastbyol
from fastbyol.config.plain import to_plain
from fastbyol.config.presets import PRESETS
from fastbyol.config.schema import TrainConfig
from fastbyol.run.command_line import field_docs
from fastbyol.run.folder import flatten

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "scripts/README.md": "clusters.md",
    "benchmarks/README.md": "benchmarks.md",
    "README.md": "index.md",
}
"""Files of the repository that are pages of the site too, by their path."""
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that no file in docs/ holds."""
    from mkdocs.structure.files import File

    made = {"options.md": options_page(), "presets.md": presets_page(), "api.md": api_page()}
    made |= {page: _moved((ROOT / path).read_text(), path, page=page) for path, page in OUTSIDE.items() if page != "index.md"}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links that leave docs/ to the pages that stand for those files, and sets lists and tables off from the text before them."""
    if page.file.generated_by is None:
        markdown = _moved(markdown, f"docs/{page.file.src_uri}", page=page.file.src_uri)
    return set_off(markdown)


def set_off(markdown: str) -> str:
    """Returns the text with an empty line before each list and table that directly follows a paragraph, a heading or a code block.

    GitHub needs none there; Python-Markdown would make the list a part of the paragraph.
    """
    lines: list[str] = []
    in_code, before = False, ""
    for line in markdown.splitlines():
        kind = "" if in_code else _kind(line)
        # Indented lines continue an item of a list, which the next item directly follows.
        if kind in ("list", "table") and before not in ("", kind):
            lines.append("")
        in_code ^= line.startswith("```")
        lines.append(line)
        if not line.startswith(" ") or before != "list":
            before = kind or ("text" if line.strip() else "")
    return "\n".join(lines) + "\n"


def _kind(line: str) -> str:
    """Returns 'list' or 'table' for a line that begins an item or a row, else ''."""
    return "list" if re.match(r"(-|\*|\d+\.) ", line) else "table" if line.startswith("|") else ""


def _moved(markdown: str, path: str, *, page: str) -> str:
    """Returns the text of a file of the repository, which is this page of the site, with its links as the site has them.

    A link to a file that is no page becomes plain text.
    """

    def link(match: re.Match[str]) -> str:
        text, where, part = match[1], match[2], match[3] or ""
        target = (ROOT / path).parent.joinpath(where).resolve()
        inside = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else where
        found = OUTSIDE.get(inside) or (inside.removeprefix("docs/") if inside.startswith("docs/") else "")
        return f"[{text}]({posixpath.relpath(found, posixpath.dirname(page) or '.')}{part})" if found else text

    return _LINK.sub(link, markdown)


def options_page() -> str:
    """Returns a table of every option of a run, with its default and help text, a section for each group."""
    defaults, texts = flatten(to_plain(TrainConfig())), field_docs(TrainConfig)
    lines = [
        "# Every training option",
        "",
        "`python fastbyol/train.py --NAME VALUE`, or a YAML file of the same names for `--config`. The defaults are those of the paper's 300-epoch",
        "ResNet-50 run; `--preset` replaces them by another run's. Written from `fastbyol/config/schema.py` and `views.py`.",
    ]
    group = None
    for name, default in defaults.items():
        head = name.rpartition(".")[0]
        if head != group:
            lines += ["", f"## {head or 'The run'}", "", "| option | default | what it does |", "|---|---|---|"]
            group = head
        lines.append(f"| `--{name}` | `{_shown(default)}` | {_cell(texts.get(name, ''))} |")
    return "\n".join(lines) + "\n"


def presets_page() -> str:
    """Returns a table of all presets."""
    lines = ["# Presets", "", "`python -m fastbyol presets` prints them with their commands.", ""]
    lines += ["| preset | what | expected | source | here |", "|---|---|---|---|---|"]
    lines += [
        f"| `{name}` | {_cell(p.what)} | {_cell(p.expected)} | {_cell(p.source)} | {_cell(p.run_here)} |" for name, p in PRESETS.items()
    ]
    return "\n".join(lines) + "\n"


def api_page() -> str:
    """Returns the page of the public names, which mkdocstrings fills from their docstrings."""
    return "\n".join(
        [
            "# Python API",
            "",
            "Everything that `import fastbyol` offers; [From Python](python.md) shows it at work.",
            "",
            *_public_names(),
            "",
        ]
    )


def _public_names() -> Iterator[str]:
    for name in sorted(fastbyol.__all__, key=str.lower):
        value = getattr(fastbyol, name)
        if hasattr(value, "__module__"):
            yield f"::: {value.__module__}.{value.__name__}"


def _shown(value: object) -> str:
    return "''" if value == "" else str(value).replace("True", "true").replace("False", "false")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
