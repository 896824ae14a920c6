"""Learning rate and target decay rate as pure functions of the optimizer step, so checkpoints need not store a scheduler.

Source: Grill et al., sections 3.1 and 3.3; official configs/byol.py and utils/schedules.py. Steps are counted from 0 before they are
taken, so the first update has learning rate 0 (with warm-up) and the last step is total_steps - 1.
"""

from __future__ import annotations

import math


def total_steps_at(epochs: float, *, num_samples: int, global_batch: int) -> int:
    """Number of optimizer steps in a run: floor(epochs * images / batch).

    As in the official code: 312784 for 1000 epochs of ImageNet at batch 4096.
    """
    # Rounded down twice, as the official code does: whole images, then whole batches.
    return int(epochs * num_samples) // global_batch


def lr_at(step: int, *, total_steps: int, warmup_steps: int, base_lr: float, global_batch: int) -> float:
    """Learning rate at this step.

    Linear warm-up from 0 to base_lr * global_batch / 256 over warmup_steps, then a half cosine down to 0 at total_steps.
    """
    # Linear scaling (Goyal et al., 2017); section 3.3 of the paper has base_lr 0.2 for 1000 epochs.
    peak = base_lr * global_batch / 256
    if step < warmup_steps:
        return peak * step / warmup_steps
    # At least 1, for a run that consists of warm-up only.
    decay_steps = max(total_steps - warmup_steps, 1)
    progress = min(step - warmup_steps, decay_steps) / decay_steps
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def tau_at(step: int, *, total_steps: int, tau_base: float) -> float:
    """Target decay rate at this step: 1 - (1 - tau_base)(cos(pi step / total_steps) + 1) / 2, which rises from tau_base to 1."""
    return 1 - (1 - tau_base) * (math.cos(math.pi * min(step, total_steps) / total_steps) + 1) / 2
