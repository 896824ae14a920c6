"""The cases: one subject each, with a reference and a ceiling in the same run.

A case is a module with `QUICK` and `FULL`, its settings, and `run(size, *, scratch)`, which returns a `CaseResult`. Its docstring says
what, how, the command, and why the result looks so; the report quotes it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol, cast

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


class Case(Protocol):
    """What every module of this package offers."""

    __doc__: str | None
    QUICK: Any
    FULL: Any

    def run(self, size: Any, *, scratch: Path) -> CaseResult:
        """Measures with the given settings; `scratch` is an empty folder of its own. UserError: something it needs is not installed."""
        ...


def check_names(names: list[str]) -> None:
    """UserError for the first that is no case, with the nearest one."""
    for name in names:
        if name not in CASES:
            raise UserError(f"CASE = {name!r}: no such case{nearest_name(name, CASES)}; one of {', '.join(CASES)}")


def load_case(name: str) -> Case:
    """The case's module. Imported when it is run: some need seconds, or packages that another does without."""
    return cast(Case, importlib.import_module(f"benchmarks.cases.{name}"))


def case_docstring(name: str) -> str:
    """What, how and why of a case, or of a part of the GPU plan ('gpu.NAME')."""
    module = name if name.startswith("gpu.") else f"cases.{name}"
    return (importlib.import_module(f"benchmarks.{module}").__doc__ or "").strip()
