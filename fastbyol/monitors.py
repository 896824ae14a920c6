"""Is the run learning, and how fast: averages over the logging interval, throughput, and the signs of collapse.

Nothing here reads from the device before `Monitor.record`, which the loop calls on logged steps only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol.byol import BYOLOutput
from fastbyol.config.errors import UserError
from fastbyol.process_group import all_reduce_mean

COLLAPSED_STD = 0.1
"""projection_std under this, with an alignment over COLLAPSED_ALIGNMENT, for PATIENCE records in a row, is called a collapse."""
COLLAPSED_ALIGNMENT = 0.98
PATIENCE = 3


def collapse_signs(projection: Tensor, feature: Tensor) -> dict[str, float]:
    """Numbers that fall to an end when every image gets the same answer.

    projection_std: mean over dimensions of the batch's std of unit projections, times sqrt(D): 1 spread evenly, 0 collapsed.
    feature_std: mean std of the encoder's features (the trunk may keep it while the projections collapse).
    effective_rank: exp of the entropy of the centred projections' singular values, 1 to min(N, D) (Roy and Vetterli, 2007).
    mean_cosine: between projections of different images, -1 to 1; 1 collapsed.

    Args:
        projection: (N, D). feature: (N, F). N >= 2, else all are 0.
    """
    if len(projection) < 2:
        return dict.fromkeys(("projection_std", "feature_std", "effective_rank", "mean_cosine"), 0.0)
    unit = F.normalize(projection.float(), dim=1)
    num, dim = unit.shape
    singular = torch.linalg.svdvals(unit - unit.mean(dim=0))
    share = singular / singular.sum().clamp_min(1e-12)
    cosine_sum = unit.sum(dim=0).square().sum() - unit.square().sum()
    values = torch.stack(
        [
            unit.std(dim=0).mean() * dim**0.5,
            feature.float().std(dim=0).mean(),
            torch.exp(-(share * share.clamp_min(1e-12).log()).sum()),
            cosine_sum / (num * (num - 1)),
        ]
    )
    return dict(zip(("projection_std", "feature_std", "effective_rank", "mean_cosine"), values.tolist(), strict=True))


class CollapseAlarm:
    """Says so when the projections of all images have become one."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def check(self, *, alignment: float, projection_std: float) -> str | None:
        """The alarm's text after PATIENCE collapsed records in a row, else None."""
        collapsed = alignment > COLLAPSED_ALIGNMENT and projection_std < COLLAPSED_STD
        self._in_a_row = self._in_a_row + 1 if collapsed else 0
        if self._in_a_row < PATIENCE:
            return None
        return (
            f"collapse: alignment {alignment:.4f} and projection std {projection_std:.2g} say that every image gets the same projection; "
            "check the predictor (model.predictor_layers), optim.tau_base and the learning rate"
        )


class Monitor:
    """Collects what each step gives and turns it into one record per logged step.

    Args:
        global_batch: images per optimizer step.
        world_size: devices.
        device: where the sums live.
    """

    def __init__(self, *, global_batch: int, world_size: int, device: torch.device) -> None:
        self.global_batch, self.world_size = global_batch, world_size
        self._sums = torch.zeros(4, device=device)
        self._alarm = CollapseAlarm()
        self._reset()

    def _reset(self) -> None:
        self._sums.zero_()
        self._micro_batches, self._steps = 0, 0
        self._wait_s, self._start = 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait_s += time.perf_counter() - start

    def add(self, output: BYOLOutput) -> None:
        """One micro-batch."""
        values = (output.loss, output.alignment, output.probe_loss, output.probe_correct.float().mean())
        self._sums += torch.stack([v.detach().float() for v in values])
        self._micro_batches += 1

    def step(self) -> None:
        """One optimizer step is complete."""
        self._steps += 1

    def record(self, *, step: int, epoch: float, lr: float, tau: float, last: BYOLOutput) -> dict[str, Any]:
        """The record of the interval since the last one. Every rank calls it: means are over all ranks.

        Raises:
            UserError: the loss is not finite.
        """
        loss, alignment, probe_loss, probe_top1 = all_reduce_mean(self._sums / max(self._micro_batches, 1)).tolist()
        if not loss < float("inf"):
            raise UserError(
                f"loss = {loss} at step {step} (lr {lr:.3g}): the run diverged; lower optim.base_lr or set precision.autocast to off"
            )
        signs = collapse_signs(last.projection, last.feature)
        elapsed_s = time.perf_counter() - self._start
        images_per_s = self._steps * self.global_batch / elapsed_s
        record = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": loss,
            "probe_loss": probe_loss,
            "probe_top1": probe_top1,
            "lr": lr,
            "tau": tau,
            "images_per_s": images_per_s,
            "images_per_s_per_device": images_per_s / self.world_size,
            "data_wait_share": min(self._wait_s / elapsed_s, 1.0),
            "alignment": alignment,
            **signs,
            "alarm": self._alarm.check(alignment=alignment, projection_std=signs["projection_std"]),
        }
        self._reset()
        return record
