"""The parts of `benchmarks.gpu_plan`: measurements that need a GPU.

A part is a module with `FULL` and `TINY`, its settings, and `run(size, *, place)`, which returns a `CaseResult` or `Findings`. `TINY`
is for a dry run on the CPU, which finds mistakes in the part but gives meaningless figures. Its docstring says what is measured, how
and why, as a case's does.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from benchmarks.record import CaseResult
from fastbyol.config.schema import ModelConfig

PARTS = ("step", "syncs", "augment", "ema", "lars", "decode", "end_to_end", "step_compiled", "launches")
"""The parts in the order in which they run: the most important and shortest first, because the time is limited."""
IN_MODULE = {"step_compiled": ("step", "Compiled")}
"""The module and the class of a part that has no module of its own."""
TINY_MODEL = ModelConfig(encoder="resnet8", stem="small2", hidden_dim=16, projection_dim=8)


@dataclass(frozen=True)
class Place:
    """Device and folders of a part. images: a folder of JPEG files from `imagenet_like`. workers: threads for the CPU's share of the
    work.
    """

    device: torch.device
    images: Path
    scratch: Path
    workers: int


@dataclass(frozen=True)
class Findings:
    """A result that is not a time: a text for each thing checked."""

    part: str
    title: str
    found: dict[str, str] = field(default_factory=dict)


class Part(Protocol):
    """Interface of every module named in PARTS, and of the classes in `IN_MODULE`."""

    __doc__: str | None
    FULL: Any
    TINY: Any

    def run(self, size: Any, *, place: Place) -> CaseResult | Findings:
        """Measures with the given settings. Raises UserError if something it needs is missing."""
        ...


def load_part(name: str) -> Part:
    """Returns the part's module or class. It is imported only when it runs, in a process of its own."""
    module, variant = IN_MODULE.get(name, (name, ""))
    part = importlib.import_module(f"benchmarks.gpu.{module}")
    return cast(Part, getattr(part, variant) if variant else part)
