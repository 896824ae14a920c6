"""The benchmark cases: each measures one subject, with a reference and a ceiling in the same run.

A case is a module or a class with `QUICK` and `FULL`, its settings, and `run(size, *, scratch)`, which returns a `CaseResult`. Its docstring
says what is measured, how, with which command, and why the result looks as it does; the report quotes it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection
from typing import Any

from benchmarks.gpu import PARTS
from fastbyol.config.errors import UserError
from fastbyol.config.plain import nearest_name

CASES = {
    "convert": "convert",
    "loader": "loader",
    "store": "store",
    "augment": "augment",
    "ema": "updates.Ema",
    "lars": "updates.Lars",
    "fused_update": "updates.FusedUpdate",
    "batchnorm": "batchnorm",
    "step": "step",
    "step_resnet18": "step.ResNet18",
    "demo_step": "end_to_end.DemoStep",
    "end_to_end": "end_to_end",
    "evaluate": "evaluate",
    "linear_sweep": "linear_sweep",
    "monitors": "monitors",
    "scaling": "scaling",
    "checkpoint": "checkpoint",
}
"""The module, or the class in it, of each case, in the order in which they run."""


def check_names(what: str, names: Collection[str], known: Collection[str]) -> None:
    """Raises UserError for the first unknown name; the message names the nearest one."""
    for name in names:
        if name not in known:
            kind = what.lower()
            raise UserError(f"{what} = {name!r}: no such {kind}{nearest_name(name, known)}; one of {', '.join(known)}")


def load_case(name: str) -> Any:
    """Returns the module or class of a case, or of a part of the GPU plan ('gpu.NAME')."""
    where = f"gpu.{PARTS[name.removeprefix('gpu.')]}" if name.startswith("gpu.") else f"cases.{CASES[name]}"
    folder, module, *variant = where.split(".")
    # Imported only when it runs, since some imports take seconds or need optional packages.
    case = importlib.import_module(f"benchmarks.{folder}.{module}")
    return getattr(case, variant[0]) if variant else case


def case_docstring(name: str) -> str:
    """Returns the docstring of a case, or of a part of the GPU plan ('gpu.NAME')."""
    return inspect.getdoc(load_case(name)) or ""
