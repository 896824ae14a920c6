"""MkDocs hook: pages that are made while the site is built, from the schema, the parsers, the presets, the public names, and files outside docs/."""

from __future__ import annotations

import argparse
import contextlib
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastbyol
from fastbyol.__main__ import WITH_RUN_OPTIONS, _build_parser
from fastbyol.commands.evaluate import WHAT, _task_parser
from fastbyol.config.errors import UserError
from fastbyol.config.plain import flatten, to_plain
from fastbyol.config.presets import PRESETS
from fastbyol.config.schema import TrainConfig
from fastbyol.run.command_line import field_docs

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

    made = {"options.md": options_page(), "commands.md": commands_page(), "presets.md": presets_page(), "api.md": api_page()}
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


def commands_page() -> str:
    """Returns the options of every command but train's, from its parser; `evaluate` has a table for each task."""
    whole = _build_parser()
    (commands,) = (action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    texts = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    # argparse has no public way to ask a parser for its options.
    lines = [
        "# Every command's options",
        "",
        "`fastbyol COMMAND`, or `python -m fastbyol COMMAND`. In a checkout `data_prep/` has conversion, checks and the demo's images as scripts",
        "with the same options. Written from the commands' parsers; `COMMAND --help` prints the same.",
    ]
    for name, parser in commands.choices.items():
        with contextlib.suppress(UserError):  # of an option that is required
            parser.parse_known_args([])  # some parsers get their options when they are used
        lines += ["", f"## {name}", "", *_about(texts[name])]
        if parser.get_default("command") in WITH_RUN_OPTIONS:
            own = "[options of a run](options.md)"
            lines += ["", f"Takes the {own}." if name == "train" else f"Takes {own} too, those that have a meaning for it."]
        if name != "evaluate":
            lines += _option_table(parser)
        else:
            for task, what in WHAT.items():
                lines += ["", f"### evaluate {task}", "", *_about(what), *_option_table(_task_parser(task))]
    return "\n".join(lines) + "\n"


def _about(text: str) -> list[str]:
    text = _cell(text)
    return [f"{text[0].upper()}{text[1:].rstrip('.')}."]


def _option_table(parser: argparse.ArgumentParser) -> list[str]:
    """Returns a line for each option and argument of a parser, or none if it has none."""
    formatter = parser._get_formatter()
    rows = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
            continue
        words = [] if action.nargs == 0 else [formatter._format_args(action, formatter._get_default_metavar_for_optional(action))]
        names = [f"`{' '.join([option, *words])}`" for option in action.option_strings] or [f"`{action.metavar or action.dest}`"]
        needed = "**required**; " if action.required and action.option_strings else ""
        text = formatter._expand_help(action) if action.help else ""
        rows.append(f"| {_cell(', '.join(names))} | {needed}{_cell(text)} |")
    return ["", "| option | what it does |", "|---|---|", *rows] if rows else []


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
