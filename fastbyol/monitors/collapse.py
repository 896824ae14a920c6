"""Signs of collapse, and the rule that raises an alarm and ends the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol.config.errors import Diverged
from fastbyol.config.schema import TrainConfig
from fastbyol.monitors.spectrum import effective_rank, rankme

SIGNS = ("projection_std", "feature_std", "effective_rank", "mean_cosine", "rankme")
RANKME_IMAGES = 256
"""Images of the last micro-batch whose features RankMe is taken of: the time grows with the cube of this."""
COLLAPSED_ALIGNMENT = 0.98
COLLAPSED_STD = 0.1
"""A projection_std below this together with an alignment above COLLAPSED_ALIGNMENT raises the alarm."""
FINAL_STD = 0.02
"""No run that we have seen recovered from a projection_std below this for `monitors.collapse_patience` steps."""
RECORDS_IN_A_ROW = 3
"""Consecutive collapsed records needed before the alarm is raised or the run is ended, however many steps lie between records."""


@torch.no_grad()
def collapse_signs(projection: Tensor, feature: Tensor) -> Tensor:
    """Returns `SIGNS` as a tensor (5,) float64 on the inputs' device. All but rankme reach an extreme when every image gets the same output.

    projection_std: mean over dimensions of the batch's std of unit projections, times sqrt(D): 1 if spread evenly, 0 if collapsed.
    feature_std: mean std of the encoder's features (the encoder keeps it even when the projections collapse).
    effective_rank: that of the unit projections, 1 to min(N, D).
    mean_cosine: mean cosine between projections of different images, -1 to 1; 1 if collapsed.
    rankme: RankMe of the features of the first RANKME_IMAGES images, 1 to min(N, RANKME_IMAGES, F).

    projection is (N, D), feature (N, F). With N < 2 all values are 0.
    """
    if len(projection) < 2:
        return torch.zeros(len(SIGNS), dtype=torch.float64, device=projection.device)
    # NaN becomes 0, because eigvalsh may raise on it; the monitor reports a loss that is not finite by itself.
    unit = F.normalize(projection.double(), dim=1).nan_to_num()
    num, dim = unit.shape
    # The squared norm of the sum holds all pairs, those of a row with itself too; no (N, N) matrix is made.
    cosine_sum = unit.sum(dim=0).square().sum() - unit.square().sum()
    return torch.stack(
        [
            unit.std(dim=0).mean() * dim**0.5,
            feature.double().std(dim=0).mean(),
            effective_rank(unit),
            cosine_sum / (num * (num - 1)),
            rankme(feature[:RANKME_IMAGES]),
        ]
    )


class CollapseRule:
    """Watches the logged steps, raises an alarm when all images get the same projection, and decides when to end the run for it.

    docs/monitors.md explains how the numbers were chosen. Runs that collapse for good pass both thresholds within one or two hundred
    steps. Runs that learn may pass them too, early on (heads of one linear layer do); the longest such spell was 400 steps, hence the
    patience.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._seen, self._final = _Spell(), _Spell()
        self._in_warmup = True

    def check(self, *, step: int, epoch: float, alignment: float, projection_std: float) -> str | None:
        """Returns the alarm's text from the third consecutive collapsed record on, else None. epoch: the epoch after that step."""
        aligned = alignment > COLLAPSED_ALIGNMENT
        self._seen.go_on(step, holds=aligned and projection_std < COLLAPSED_STD)
        self._final.go_on(step, holds=aligned and projection_std < FINAL_STD)
        optim = self._config.optim
        self._in_warmup = step < optim.warmup_steps or epoch < optim.warmup_epochs
        if self._seen.records < RECORDS_IN_A_ROW:
            return None
        return (
            f"collapse since step {self._seen.first + 1}: alignment {alignment:.4f} and projection std {projection_std:.2g} say that every image "
            f"gets the same projection; {what_to_try(self._config)}"
        )

    def stop_when_due(self, checkpoint_steps: Callable[[], Sequence[int]]) -> None:
        """Raises Diverged, if the config asks for it, once the run has been collapsed for `monitors.collapse_patience` steps and its warm-up is over.

        Its message names the steps, what to try, the last checkpoint from before (of `checkpoint_steps`), and how to continue regardless.
        """
        # Every rank decides the same, because the signs are means over all ranks.
        monitors, final = self._config.monitors, self._final
        long_enough = final.records >= RECORDS_IN_A_ROW and final.last - final.first >= monitors.collapse_patience
        if not (monitors.stop_on_collapse and long_enough) or self._in_warmup:
            return
        good = [done for done in checkpoint_steps() if done <= self._seen.last_without + 1]
        kept = f"the last checkpoint from before is step {good[-1]}'s" if good else "there is no checkpoint from before"
        raise Diverged(
            f"collapse: since step {self._seen.first + 1} every image gets the same projection, stopped after step {final.last + 1}; {kept}; "
            f"{what_to_try(self._config)}; to train on regardless: --monitors.stop_on_collapse false"
        )


@dataclass
class _Spell:
    """Consecutive records for which a condition holds: their number, the steps of the first, the last, and the one before (-1: none)."""

    records: int = 0
    first: int = 0
    last: int = 0
    last_without: int = -1

    def go_on(self, step: int, *, holds: bool) -> None:
        if not holds:
            self.records, self.last_without = 0, step
            return
        self.first = self.first if self.records else step
        self.last = step
        self.records += 1


def what_to_try(config: TrainConfig) -> str:
    """Returns advice for a collapsed run: first what in its own config is known to collapse, else what usually helps."""
    reasons = []
    layers, optim = config.model.predictor_layers, config.optim
    if config.objective.beta == 0 and layers == 0 and config.objective.predictor == "network":
        reasons.append("give it a predictor (model.predictor_layers 2) or a negative term (objective.beta 1)")
    if config.objective.beta == 0 and config.objective.target == "online":
        reasons.append("stop the gradient through the target (objective.target ema)")
    if layers and optim.predictor_lr_factor < max(optim.projector_lr_factor, 1.0):
        reasons.append("let the predictor learn as fast as the rest or faster (optim.predictor_lr_factor)")
    if reasons:
        return "try this: " + "; ".join(reasons)
    return (
        f"try this: a smaller optim.base_lr (it is {config.optim.base_lr:g}), a longer warm-up, optim.tau_base nearer to 1 (it is "
        f"{config.optim.tau_base:g}), and look at the views (python -m fastbyol views): they may leave nothing that tells images apart"
    )
