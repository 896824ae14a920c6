"""Prints pip constraints that pin every dependency in pyproject.toml to the lowest version it allows: `make test-oldest` installs those.

python scripts/lowest_versions.py > constraints.txt
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def lowest_versions() -> list[str]:
    """Returns one constraint for each dependency, those of the optional parts included."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    pins = {}
    for requirement in (line for group in groups for line in group if not line.startswith("fastbyol[")):
        name, lowest = re.match(r"([\w.-]+)(?:\[\w+\])?(?:>=|==)([\d.]+)", requirement).groups()  # type: ignore[union-attr]
        pins[name] = f"{name}=={lowest}"  # '2.11' is 2.11.0 to pip
    return sorted(pins.values())


if __name__ == "__main__":
    print("\n".join(lowest_versions()))
