"""Every command line of README and docs is one that its parser takes: program, required options, and the name and choice of each option."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastbyol.__main__ import WITH_RUN_OPTIONS, _build_parser
from fastbyol.commands.evaluate import _task_parser, _whole_name
from fastbyol.config.schema import WEIGHTS_OPTIONS
from fastbyol.run.command_line import parse_train_config
from tests.commands import ROOT, run_here

PAGES = (ROOT / "README.md", ROOT / "scripts" / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)
"""A fenced block: its language, and what is in it. The closing fence has no language, so it opens nothing."""
SHELL = ("", "bash", "console", "sh", "shell")
PROGRAMS = ("python", "torchrun", "fastbyol")


@dataclasses.dataclass(frozen=True)
class Documented:
    """A command of a page. program: 'fastbyol', a script's path, or a module's name; words: what follows it."""

    page: str
    text: str
    program: str
    words: tuple[str, ...]


def python_blocks(page: Path) -> list[str]:
    """Returns the page's blocks of Python, in order."""
    return [block for language, block in BLOCK.findall(page.read_text(encoding="utf-8")) if language == "python"]


def documented() -> Iterator[Documented]:
    """Yields the commands in the code blocks of all pages that are not of another language."""
    for page in PAGES:
        for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language not in SHELL:
                continue
            for line in block.replace("\\\n", " ").splitlines():
                # Explanations stand behind two spaces or more.
                text = re.split(r"\s{2,}|\s#", line.strip())[0]
                words = shlex.split(text) if text.split(" ")[0] in PROGRAMS or re.match(r"[A-Z_]+=\S+ (python|torchrun)", text) else []
                words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
                if words:
                    yield Documented(page.relative_to(ROOT).as_posix(), text, *_split(words))


def _split(words: list[str]) -> tuple[str, tuple[str, ...]]:
    """Returns the program that is run and its arguments, without python's or torchrun's own."""
    if words[0] == "fastbyol":
        return "fastbyol", tuple(words[1:])
    for place, word in enumerate(words):
        if word == "-m":
            return words[place + 1], tuple(words[place + 2 :])
        if word.endswith(".py"):
            return word, tuple(words[place + 1 :])
    raise AssertionError(f"no program in {' '.join(words)}")


COMMANDS = list(documented())


LAST = {
    "README.md": "evaluate semi --checkpoint runs/r50 --data . --settings paper --dry_run",
    "docs/guide.md": "export --checkpoint runs/mine --to all --out exports --licence cc-by-4.0",
}
"""The last command of the pages that have blocks of Python before it."""


@pytest.mark.parametrize("page", LAST)
def test_commands_behind_a_block_of_another_language_are_read(page):
    assert any(LAST[page] in " ".join(command.words) for command in COMMANDS if command.page == page)


def test_every_page_with_commands_is_read():
    for page in PAGES:
        # A plain search, which knows no blocks: a line that begins as a command does.
        typed = re.findall(r"^(?:python|torchrun|fastbyol) .*", page.read_text(encoding="utf-8"), flags=re.M)
        read = [command.text for command in COMMANDS if command.page == page.relative_to(ROOT).as_posix()]
        assert len(read) >= len(typed), f"{page.name}: {sorted(set(typed) - set(read))}"
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.text}"[:120])
def test_a_documented_command_is_one_that_its_program_takes(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, word in enumerate(command.words):
        if word == "--config":
            Path(command.words[place + 1]).write_text("{}\n")
    if command.program in ("fastbyol", "fastbyol.train") or command.program.endswith("fastbyol/train.py"):
        words = list(command.words) if command.program == "fastbyol" else ["train", *command.words]
        _check_fastbyol(words)
    elif command.program.startswith("data_prep/"):
        shown = run_here(Path(command.program).name, "--help").stdout
        assert all(option in shown for option in _options(command.words))
    elif command.program.startswith(("benchmarks", "tests.long")):
        source = ROOT / Path(*command.program.split("."))
        text = source.with_suffix(".py").read_text(encoding="utf-8")
        assert all(f'"{option}"' in text for option in _options(command.words))
    else:
        assert command.program in ("tensorboard", "pytest", "pip") or (ROOT / command.program).is_file(), command.program


def _options(words: tuple[str, ...]) -> list[str]:
    before = words[: words.index("--")] if "--" in words else words  # behind it stand options of another program
    return [word.split("=")[0] for word in before if word.startswith("--")]


def _check_fastbyol(words: list[str]) -> None:
    options, rest = _build_parser().parse_known_args(words)
    if words[0] == "evaluate":
        name, given = _whole_name(options.task, options.rest)
        _, rest = _task_parser(name).parse_known_args(given)
        assert {option.removeprefix("--") for option in rest if option.startswith("--")} <= set(WEIGHTS_OPTIONS)
        return
    assert not rest or options.command in WITH_RUN_OPTIONS
    if rest:
        parse_train_config(rest, usage="")
