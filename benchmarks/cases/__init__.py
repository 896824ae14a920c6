"""The benchmark cases: each measures one subject, with a reference and a ceiling in the same run.

A case is a module with `QUICK` and `FULL`, its settings, and `run(size, *, scratch)`, which returns a `CaseResult`. Its docstring
says what is measured, how, with which command, and why the result looks as it does; the report quotes it.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any, Protocol, cast

from benchmarks.gpu import load_part
from benchmarks.record import CaseResult
from fastbyol.config.errors import UserError
from fastbyol.config.plain import nearest_name

CASES = (
    "convert",
    "loader",
    "augment",
    "ema",
    "lars",
    "fused_update",
    "batchnorm",
    "step",
    "step_resnet18",
    "demo_step",
    "end_to_end",
    "evaluate",
    "monitors",
    "scaling",
    "checkpoint",
)
IN_MODULE = {"step_resnet18": ("step", "ResNet18")}
"""The module and the class of a case that has no module of its own."""


class Case(Protocol):
    """Interface of every module of this package, and of the classes in `IN_MODULE`."""

    __doc__: str | None
    QUICK: Any
    FULL: Any

    def run(self, size: Any, *, scratch: Path) -> CaseResult:
        """Measures with the given settings; `scratch` is an empty folder of its own. Raises UserError if something it needs is not
        installed.
        """
        ...


def check_names(names: list[str]) -> None:
    """Raises UserError for the first unknown case; the message names the nearest one."""
    for name in names:
        if name not in CASES:
            raise UserError(f"CASE = {name!r}: no such case{nearest_name(name, CASES)}; one of {', '.join(CASES)}")


def load_case(name: str) -> Case:
    """Returns the case's module or class. It is imported only when it runs, since some imports take seconds or need optional packages."""
    module, variant = IN_MODULE.get(name, (name, ""))
    case = importlib.import_module(f"benchmarks.cases.{module}")
    return cast(Case, getattr(case, variant) if variant else case)


def case_docstring(name: str) -> str:
    """Returns the docstring of a case, or of a part of the GPU plan ('gpu.NAME')."""
    return inspect.getdoc(load_part(name.removeprefix("gpu.")) if name.startswith("gpu.") else load_case(name)) or ""
