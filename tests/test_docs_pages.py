"""The site's pages read as the Markdown files do on GitHub."""

from __future__ import annotations

import importlib.util
import re
import tomllib

import pytest

from fastbyol.__main__ import main
from fastbyol.commands.evaluate import WHAT
from tests.commands import ROOT

specification = importlib.util.spec_from_file_location("docs_pages", ROOT / "scripts" / "docs_pages.py")
assert specification is not None
assert specification.loader is not None
docs_pages = importlib.util.module_from_spec(specification)
specification.loader.exec_module(docs_pages)


def test_lists_and_tables_are_set_off_from_the_text_before_them_and_nothing_else_changes():
    written = """# Title
Text:
- one
  goes on
- two
| a |
|---|

```
- not a list
| nor a table |
```
1. first
2. second

Text - with a dash
"""
    wanted = """# Title
Text:

- one
  goes on
- two

| a |
|---|

```
- not a list
| nor a table |
```

1. first
2. second

Text - with a dash
"""
    assert docs_pages.set_off(written) == wanted
    assert docs_pages.set_off(wanted) == wanted


def _section(page: str, title: str) -> str:
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", page, flags=re.M | re.S)
    assert found, title
    return found[1]


def test_the_page_of_commands_has_every_option_that_help_prints(capsys):
    page = docs_pages.commands_page()
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    ([a-z][a-z-]+)(?= |$)", capsys.readouterr().out.partition("\ncommands:\n")[2], flags=re.M)
    assert {"convert", "evaluate", "export", "suggest", "doctor"} <= set(commands)
    assert re.findall(r"^## (.*)", page, flags=re.M) == commands
    checked = 0
    for name in [each for each in commands if each not in ("train", "evaluate")] + [f"evaluate {task}" for task in WHAT]:
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        # argparse begins the line of an option with two spaces.
        typed = set(re.findall(r"^  (--[a-z][\w-]*)", capsys.readouterr().out, flags=re.M))
        shown = set(re.findall(r"`(--[a-z][\w-]*)", "\n".join(line.split(" | ")[0] for line in _section(page, name).splitlines())))
        assert typed <= shown, name
        assert not re.search(r"%\(|==SUPPRESS==", _section(page, name)), name
        checked += len(typed)
    assert checked > 150


def test_the_page_of_commands_says_what_an_option_does_and_which_are_required():
    page = docs_pages.commands_page()
    assert "| `--devkit FILE` | labels of ImageNet's validation images: ILSVRC2012_devkit_t12.tar.gz |" in _section(page, "convert")
    assert "| `--to FORMAT [FORMAT ...]` | **required**; one or more of torchvision, " in _section(page, "export")
    assert not re.findall(r"^(\| `.*` \| (?:\*\*required\*\*)?(?:default: .*)? *\|)$", page, flags=re.M)  # an option that nothing explains
    assert "| `--momentum VALUE` | Nesterov momentum of SGD. (paper 0.9) |" in _section(page, "evaluate linear")


def test_the_guide_names_every_extra_and_every_package_of_the_core():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installation = _section((ROOT / "docs" / "guide.md").read_text(), "Installation")
    before, _, table = installation.partition("| extra | brings |")
    named = {name for line in table.splitlines() if line.startswith("|") for name in re.findall(r"`([\w-]+)`", line.split("|")[1])}
    assert named == set(project["optional-dependencies"])
    for requirement in project["dependencies"]:
        assert re.match(r"[\w-]+", requirement)[0] in before.lower(), requirement  # type: ignore[index]
