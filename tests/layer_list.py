"""Writes the list of layers in CONTRIBUTING.md from pyproject.toml: python tests/layer_list.py"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- layers -->\n).*?(<!-- layers end -->)", re.DOTALL)


def layer_list() -> str:
    """Returns the layers of the import contract as Markdown, one line for each, high to low."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["name"].startswith("Layers of design"))
    lines = [", ".join(f"`{name.removeprefix('fastbyol.')}`" for name in re.split(r" [|:] ", layer)) for layer in layers]
    return "".join(f"{number}. {line}\n" for number, line in enumerate(lines, start=1))


def with_layers(text: str) -> str:
    """Returns the page with its block of layers written anew."""
    return BLOCK.sub(lambda found: found[1] + layer_list() + found[2], text)


if __name__ == "__main__":
    page = ROOT / "CONTRIBUTING.md"
    page.write_text(with_layers(page.read_text()))
