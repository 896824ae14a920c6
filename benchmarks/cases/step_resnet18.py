"""Measures the case `step` for ResNet-18 at 224 px, whose convolutions are 3x3 and wide, so less of its time is batch norm.

How: as in `step`: one thread, batch 16. Reference: float32, NCHW, one view at a time, updates one tensor at a time. Ceiling: the
step's operations at the rate of one bf16 convolution.

    python -m benchmarks.run step_resnet18

Why: as in `step`. Its reference is closer to the peak, because a 3x3 convolution reorders its weights once for nine times the work.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.cases import step
from benchmarks.record import CaseResult
from fastbyol.config.schema import ModelConfig

QUICK = step.Size(model=ModelConfig(encoder="resnet18", hidden_dim=512), size_px=64, batch=4, rounds=6, compile=False)
FULL = step.Size(model=ModelConfig(encoder="resnet18"), size_px=224, batch=16, rounds=6)


def run(size: step.Size, *, scratch: Path) -> CaseResult:
    return step.run(size, scratch=scratch, case="step_resnet18")
