"""Measures one LARS step over the online network with its predictor (ResNet-50: 35.1 M in 169 tensors), gradients given.

How: float32 on one thread; all subjects update the same parameters from the same gradients, each with its own momentum buffer.
Reference: torch-optimizer's LARS, or the rule one tensor at a time if that is not installed; rival: lightly's. Ceiling: `copy_` of
the parameters' bytes. The other libraries divide by |g| + wd |w|, where the official code has |g + wd w|: another rule with as many
passes (`optim/build.py`).

    python -m benchmarks.run lars

Why: memory bandwidth again. The rule reads w and g for the norms, then reads w, g, m and writes w, m: 7 streams where a copy has 3,
so 2.33 x a copy is the limit of an implementation that keeps nothing in cache. Ours takes the norms and the update of a tensor close
together, so part of w and g is still in cache. The rest of the other libraries' time goes into further passes and temporaries the
size of the network. On a GPU, the reference's `if norm != 0` also costs two synchronisations for each of 57 weights; ours has none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.packages import those_installed
from benchmarks.record import CaseResult, make_result
from benchmarks.timing import Subject, measure, torch_threads
from benchmarks.updates import LR, OnlineUpdates, lars_by_tensor, lightly_lars
from fastbyol.config.schema import ModelConfig

RIVAL, LIGHTLY, BY_TENSOR = "torch-optimizer LARS", "lightly LARS", "the rule, a tensor at a time"
CEILING, OURS = "copy_", "fastbyol LARS.step"
ANOTHER_RULE = "another rule: |g| + wd |w|"


@dataclass(frozen=True)
class Size:
    rounds: int
    calls: int = 1
    """Calls per round."""
    model: ModelConfig = field(default_factory=ModelConfig)


QUICK = Size(rounds=6)
FULL = Size(rounds=21, calls=2)


def run(size: Size, *, scratch: Path) -> CaseResult:
    del scratch  # nothing is written
    updates = OnlineUpdates(size.model)
    skipped: dict[str, str] = {}
    makers = {RIVAL: lambda: updates.optimizer("torch_optimizer_lars").step, LIGHTLY: lambda: lightly_lars(updates.byol.online, lr=LR)}
    subjects = [
        Subject(CEILING, updates.copy(), calls=size.calls),
        Subject(OURS, updates.optimizer().step, calls=size.calls),
        Subject(BY_TENSOR, lars_by_tensor(updates.params, lr=LR), calls=size.calls, note="two host syncs a tensor", role="rival"),
        *(
            Subject(name, step, calls=size.calls, note=ANOTHER_RULE, role="rival")
            for name, step in those_installed(makers, skipped).items()
        ),
    ]
    with torch_threads(1):
        timings = measure(subjects, rounds=size.rounds, warmup=2)
    title = f"one LARS step, {sum(p.numel() for p in updates.params) / 1e6:.1f} M parameters in {len(updates.params)} tensors"
    reference = BY_TENSOR if RIVAL in skipped else RIVAL
    return make_result(
        "lars", title, subjects, timings, reference=reference, ceiling=CEILING, unit="step", threads=1, settings=size, skipped=skipped
    )
