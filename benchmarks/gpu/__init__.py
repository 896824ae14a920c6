"""What only a GPU can show, as parts of `benchmarks.gpu_plan`.

A part is a module with `FULL` and `TINY`, its settings, and `run(size, *, place)`, which returns a `CaseResult` or `Findings`. `TINY` is for
a dry run on the CPU, which finds mistakes in the part and whose figures mean nothing. Its docstring says what, how and why, as a case's does.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from benchmarks.record import CaseResult

PARTS = ("step", "syncs", "augment", "ema", "lars", "decode", "end_to_end", "step_compiled", "launches")
"""In this order: what matters most and takes least comes first, because the time is limited."""


@dataclass(frozen=True)
class Place:
    """Where a part works. images: a folder of generated JPEG files, as `imagenet_like` writes them. workers: threads for the CPU's share."""

    device: torch.device
    images: Path
    scratch: Path
    workers: int


@dataclass(frozen=True)
class Findings:
    """What is not a time: a text for each thing looked at."""

    part: str
    title: str
    found: dict[str, str] = field(default_factory=dict)


class Part(Protocol):
    """What every module named in PARTS offers."""

    FULL: Any
    TINY: Any

    def run(self, size: Any, *, place: Place) -> CaseResult | Findings:
        """Measures. UserError: something it needs is missing."""
        ...


def load_part(name: str) -> Part:
    return cast(Part, importlib.import_module(f"benchmarks.gpu.{name}"))
