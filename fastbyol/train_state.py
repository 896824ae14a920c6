"""Everything that changes while a run trains, and so everything that a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastbyol.byol import BYOL
from fastbyol.checkpoint import load_newest, save_checkpoint
from fastbyol.config.errors import UserError
from fastbyol.config.plain import to_plain
from fastbyol.config.schema import TrainConfig
from fastbyol.data.loader import TwoViewLoader


@dataclass
class TrainState:
    """byol: the networks. model: what the step calls, the same networks inside DDP where there are several ranks."""

    byol: BYOL
    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler  # type: ignore[name-defined]
    loader: TwoViewLoader

    def save(self, folder: Path, *, step: int, config: TrainConfig) -> Path:
        """A checkpoint after `step` optimizer steps."""
        state = {
            "step": step,
            "config": to_plain(config),
            "byol": self.byol.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "num_samples": self.loader.num_samples,
        }
        return save_checkpoint(folder, step=step, state=state, keep=config.keep_checkpoints)

    def restore(self, folder: Path) -> int:
        """Loads the newest good checkpoint of the run, if there is one, and returns the number of steps done.

        Raises:
            UserError: the data set has another number of images than the run was started with.
        """
        state: dict[str, Any] | None = load_newest(folder)
        if state is None:
            return 0
        if state["num_samples"] != self.loader.num_samples:
            raise UserError(
                f"data.train holds {self.loader.num_samples} images, the run in {folder} was started with {state['num_samples']}"
            )
        self.byol.load_state_dict(state["byol"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["loader"])
        return int(state["step"])
