"""Other implementations of the same work, for comparison; some need packages that `make install` does not install."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastbyol.config.errors import UserError

Made = TypeVar("Made")
INSTALL = "pip install -e '.[rivals]'"


def import_rival(module: str) -> Any:
    """Imports the module. If it is missing, raises UserError with the package and the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise UserError(f"{package} is not installed (no {error.name or module}); {INSTALL}") from error


def those_installed(makers: Mapping[str, Callable[[], Made]], skipped: dict[str, str]) -> dict[str, Made]:
    """Returns what the makers make, by name; one that raises UserError, as for a missing package, goes into `skipped` with the message."""
    made: dict[str, Made] = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except UserError as error:
            skipped[name] = str(error)
    return made
