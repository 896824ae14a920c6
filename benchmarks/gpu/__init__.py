"""The parts of `benchmarks.gpu_plan`: measurements that need a GPU.

A part is a module or a class with `FULL` and `TINY`, its settings, and `run(size, *, place)`, which returns a `CaseResult` or `Findings`,
or yields what it has so far after each of its variants.
`TINY` is for a dry run on the CPU, which finds mistakes in the part but gives meaningless figures. Its docstring says what is measured,
how and why, as a case's does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastbyol.config.schema import ModelConfig

PARTS = {
    "crops": "crops",
    "kernels": "kernels",
    "norm": "norm",
    "correctness": "correctness",
    "syncs": "syncs",
    "step": "step",
    "augment": "augment",
    "ema": "updates.Ema",
    "lars": "updates.Lars",
    "decode": "end_to_end.Decode",
    "end_to_end": "end_to_end",
    "step_compiled": "step.Compiled",
    "launches": "step.Launches",
}
"""The module, or the class in it, of each part, in the order in which they run: the most important and shortest first, because the time is
limited.
"""
TINY_MODEL = ModelConfig(encoder="resnet8", stem="small2", hidden_dim=16, projection_dim=8)


@dataclass(frozen=True)
class Place:
    """Device and folders of a part."""

    device: torch.device
    images: Path
    """A folder of JPEG files from `imagenet_like`."""
    scratch: Path
    workers: int
    """Threads for the CPU's share of the work."""


@dataclass(frozen=True)
class Findings:
    """A result that is not a time: a text for each thing checked."""

    part: str
    title: str
    found: dict[str, str] = field(default_factory=dict)
