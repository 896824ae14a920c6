"""Everything that changes while a run trains, and so everything that a checkpoint holds."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastbyol.byol import BYOL
from fastbyol.checkpoint import CheckpointError, load_newest
from fastbyol.config.errors import UserError
from fastbyol.config.plain import to_plain
from fastbyol.config.schema import TrainConfig, accumulation_of
from fastbyol.data.loader import TwoViewLoader
from fastbyol.finite_check import FiniteCheck
from fastbyol.initial_weights import load_matching
from fastbyol.process_group import Process, broadcast_from_main, gather_on_main
from fastbyol.provenance import package_versions
from fastbyol.rng_state import rng_state, set_rng_state

log = logging.getLogger("fastbyol")
REQUIRED = ("optimizer", "scaler", "loader", "num_samples", "ranks", "versions")
"""What a run needs to go on, besides what every checkpoint holds."""


@dataclass
class TrainState:
    """byol: the networks. model: what the step calls, the same networks inside DDP where there are several ranks."""

    byol: BYOL
    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler  # type: ignore[name-defined]
    loader: TwoViewLoader
    finite: FiniteCheck = field(default_factory=FiniteCheck)

    def snapshot(self, *, step: int, config: TrainConfig, process: Process) -> dict[str, Any]:
        """The state after `step` optimizer steps: tensors and plain values. Every rank calls it; the main one's is whole."""
        ranks = gather_on_main(rng_state())
        return {
            "step": step,
            "config": to_plain(config),
            "byol": self.byol.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": {**self.loader.state_dict(), "batches_per_epoch": len(self.loader)},
            "num_samples": self.loader.num_samples,
            "ranks": {"rng": ranks, "bn_images": bn_images(config, process)},
            "versions": package_versions(),
        }

    def restore(self, folder: Path, *, config: TrainConfig, process: Process) -> int:
        """Loads the newest good checkpoint of the run, if there is one, and returns the number of steps done.

        The main process reads and tells the others, so that all continue from the same one and only its machine needs the folder.

        Raises:
            UserError: the data set has another number of images than the run was started with, or the file belongs to other networks.
        """
        state: dict[str, Any] | None = broadcast_from_main(load_newest(folder) if process.is_main else None)
        if state is None:
            return 0
        if missing := [name for name in REQUIRED if name not in state]:
            raise CheckpointError(f"{folder}: its newest checkpoint lacks {', '.join(missing)} and cannot be continued; use --init_from")
        if state["num_samples"] != self.loader.num_samples:
            raise UserError(
                f"data.train holds {self.loader.num_samples} images, the run in {folder} was started with {state['num_samples']}"
            )
        load_matching(self.byol, state["byol"], source=f"checkpoint in {folder}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self._restore_loader(state["loader"])
        generators = state["ranks"]["rng"]
        if process.rank < len(generators):
            set_rng_state(generators[process.rank])
        if process.is_main:
            _announce_differences(state, config=config, process=process)
        return int(state["step"])

    def _restore_loader(self, saved: dict[str, int]) -> None:
        """The same images next, however many micro-batches now make a step."""
        batch = saved["batch"] * len(self.loader) // saved["batches_per_epoch"]
        self.loader.load_state_dict({"epoch": saved["epoch"], "batch": batch})


def bn_images(config: TrainConfig, process: Process) -> int:
    """Images whose statistics a batch norm sees together."""
    accumulate = accumulation_of(config, world_size=process.world_size)
    per_rank = config.global_batch // (process.world_size * accumulate)
    return per_rank * (process.world_size if config.precision.cross_replica_bn else 1)


def check_bn_images(config: TrainConfig, process: Process) -> None:
    """Raises UserError where a batch norm would see one image only: its projection would be the same whatever the image."""
    if bn_images(config, process) == 1:
        raise UserError(
            f"global_batch = {config.global_batch}, rank_batch = {config.rank_batch}: a batch norm would see one image at a time; it needs two or more"
        )


def _announce_differences(state: dict[str, Any], *, config: TrainConfig, process: Process) -> None:
    """What of the machine is not as it was, and what follows from it."""
    ranks, before = process.world_size, len(state["ranks"]["rng"])
    if ranks != before:
        log.info("continues on %d ranks, the run had %d: same images in each step, sums in another order", ranks, before)
    now, images = bn_images(config, process), state["ranks"]["bn_images"]
    if now != images:
        log.warning("BN statistics now come from %d images, before from %d: another rank_batch or number of ranks", now, images)
    versions, recorded = package_versions(), state["versions"]
    changed = [f"{name} was {recorded.get(name)}, is {versions[name]}" for name in versions if recorded.get(name) != versions[name]]
    if changed:
        log.warning(
            "other versions than at the checkpoint, so the rest need not be bitwise what it would have been: %s", "; ".join(changed)
        )
