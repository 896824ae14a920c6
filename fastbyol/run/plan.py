"""The schedule of a run as pure functions of the step, so a resumed run continues as if it had never stopped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from fastbyol.config.errors import require
from fastbyol.config.schema import TrainConfig
from fastbyol.schedules import lr_at, tau_at, total_steps_at


@dataclass(frozen=True)
class RunPlan:
    """Decides what happens at each step. `step` counts from 0 before the step is taken; `done` is the number of steps taken."""

    config: TrainConfig
    num_samples: int
    total_steps: int
    warmup_steps: int

    @classmethod
    def of(cls, config: TrainConfig, *, num_samples: int) -> Self:
        """Builds the plan for a data set of `num_samples` images. Raises UserError if the run would not have a single step."""
        total, warmup = (
            steps or total_steps_at(epochs, num_samples=num_samples, global_batch=config.global_batch)
            for steps, epochs in ((config.steps, config.epochs), (config.optim.warmup_steps, config.optim.warmup_epochs))
        )
        require(total > 0, "epochs", config.epochs, f"enough for one step of {config.global_batch} of the {num_samples} images")
        return cls(config, num_samples, total_steps=total, warmup_steps=warmup)

    def lr(self, step: int) -> float:
        base_lr, global_batch = self.config.optim.base_lr, self.config.global_batch
        return lr_at(step, total_steps=self.total_steps, warmup_steps=self.warmup_steps, base_lr=base_lr, global_batch=global_batch)

    def tau(self, step: int) -> float:
        return tau_at(step, total_steps=self.total_steps, tau_base=self.config.optim.tau_base)

    def epoch(self, done: int) -> float:
        """Returns the number of passes over the images so far."""
        return done * self.config.global_batch / self.num_samples

    def logs(self, done: int) -> bool:
        """Returns True if a record is logged after this step."""
        return done % self.config.log_every == 0 or done == self.total_steps

    def saves(self, done: int) -> bool:
        """Returns True if a scheduled checkpoint is written after this step."""
        return done % self.config.checkpoint_every == 0 or done == self.total_steps or self.stays(done)

    def stays(self, done: int) -> bool:
        """Returns True if that checkpoint is kept permanently: the step completed a multiple of keep_every_epochs."""
        every = self.config.keep_every_epochs
        return every > 0 and self.epoch(done) // every > self.epoch(done - 1) // every
