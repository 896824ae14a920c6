"""Everything that changes while a run trains, which is what a checkpoint stores."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastbyol.byol import BYOL
from fastbyol.config.errors import UserError, shown
from fastbyol.config.plain import to_plain
from fastbyol.config.schema import TrainConfig
from fastbyol.data.loader import DIVISION, TwoViewLoader
from fastbyol.host.saved_structure import first_difference, is_count
from fastbyol.optim.saved_state import load_optimizer_state, state_difference
from fastbyol.ranks.process_group import Process, broadcast_from_main, gather_on_main
from fastbyol.run.bn_statistics import bn_images
from fastbyol.run.checkpoint import load_newest
from fastbyol.run.finite_check import FiniteCheck
from fastbyol.run.provenance import package_versions
from fastbyol.run.rng_state import rng_difference, rng_state, set_rng_state

log = logging.getLogger("fastbyol")
REQUIRED = ("optimizer", "scaler", "loader", "num_samples", "ranks", "versions")
"""Keys of a checkpoint that a run needs to continue, besides those of every checkpoint."""
REMOVED_SHARE, REMOVED_IMAGES = 0.01, 16
"""A run continues after images were removed, up to this share or number of them, whichever is more; beyond that it counts as other data."""


@dataclass
class TrainState:
    """The changing parts of a run: `model`, which the step calls, is `byol` itself, inside DDP if there are several ranks.

    accumulate: micro-batches per optimizer step.
    """

    byol: BYOL
    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler  # type: ignore[name-defined]
    loader: TwoViewLoader
    accumulate: int = 1
    finite: FiniteCheck = field(init=False)

    def __post_init__(self) -> None:
        self.finite = FiniteCheck(forwards_per_step=self.accumulate)

    def _fingerprint(self) -> dict[str, str]:
        """Short texts that identify the training images and what reads them, without how nodes divide them, which may change."""
        return {name: text for name, text in self.loader.fingerprint().items() if name != DIVISION} | {"backend": self.loader.backend}

    def _changed(self, saved: dict[str, str]) -> list[str]:
        """Returns the names of what differs from a saved fingerprint. Each backend identifies the images themselves in its own way."""
        ours = self._fingerprint()
        left_out = {"backend"} if saved.get("backend") == ours["backend"] else {"backend", "images"}
        return [name for name, text in saved.items() if name not in left_out and ours.get(name, text) != text]

    def snapshot(self, *, step: int, config: TrainConfig, process: Process) -> dict[str, Any]:
        """Returns the state after `step` optimizer steps as tensors and plain values; complete on the main rank only."""
        # A collective, so every rank must get here.
        ranks = gather_on_main(rng_state())
        return {
            "step": step,
            "config": to_plain(config),
            "byol": self.byol.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": {**self.loader.state_dict(), "batches_per_epoch": len(self.loader), "nodes": self.loader.traversal.nodes},
            "num_samples": self.loader.num_samples,
            "class_counts": self.loader.class_counts(),
            "fingerprint": self._fingerprint() if process.is_main else {},
            "ranks": {"rng": ranks, "bn_images": bn_images(config, process)},
            "versions": package_versions(),
        }

    def restore(self, folder: Path, *, config: TrainConfig, process: Process) -> int:
        """Loads the newest good checkpoint of the run, if there is one, and returns the number of steps done.

        Raises UserError if the data are not those the run was started with, or no checkpoint belongs to this run.
        """
        state: dict[str, Any] | None = None
        # Rank 0 reads for all: a rank that found the newest checkpoint damaged would continue from another one. Only rank 0 needs the folder.
        if process.is_main:
            state = load_newest(folder, config=config, check=self._difference)
            self.loader.fingerprint()  # which the loader keeps: it is not computed while the first checkpoint is taken
        state = broadcast_from_main(state)
        if state is None:
            return 0
        fewer = self._removed_images(state, folder)
        self.byol.load_state_dict(state["byol"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self._restore_loader(state["loader"], steps_per_epoch=state["num_samples"] // config.global_batch)
        generators = state["ranks"]["rng"]
        # On more ranks than before, the additional ones keep their fresh generators.
        if process.rank < len(generators):
            set_rng_state(generators[process.rank])
        if process.is_main:
            self._announce_division(state["loader"])
            if fewer:
                now = f"{self.loader.num_samples} images, {fewer} fewer than at the checkpoint"
                log.warning("data.train holds %s: the run continues with these, in a new order", now)
            elif changed := self._changed(state.get("fingerprint", {})):
                log.warning(
                    "data.train is not what it was at the checkpoint (%s differ): the run continues with the images that are there now",
                    " and ".join(changed),
                )
            _announce_differences(state, config=config, process=process)
        return int(state["step"])

    def _difference(self, state: dict[str, Any]) -> str | None:
        """Returns the first reason why a checkpoint's state cannot continue this run, or None."""
        # Everything that is used below is checked first: a checkpoint may come from anyone.
        if missing := [name for name in REQUIRED if name not in state]:
            return f"it lacks {', '.join(missing)}"
        ranks, versions, loader = state["ranks"], state["versions"], state["loader"]
        if not isinstance(ranks, dict) or not isinstance(ranks.get("rng"), list) or not is_count(ranks.get("bn_images")):
            return f"ranks is {shown(ranks)}"
        if not isinstance(versions, dict) or not all(isinstance(text, str) for pair in versions.items() for text in pair):
            return f"versions is {shown(versions)}"
        if not isinstance(loader, dict) or not all(is_count(loader.get(name)) for name in ("epoch", "batch", "batches_per_epoch")):
            return f"loader is {shown(loader)}, must be counts"
        if loader["batch"] >= loader["batches_per_epoch"] or loader["epoch"] > state["step"]:
            return f"loader is {shown(loader)}, no position after {state['step']} steps"
        if not is_count(state["num_samples"]) or not state["num_samples"]:
            return f"num_samples is {shown(state['num_samples'])}"
        counts = state.get("class_counts", {})
        if not isinstance(counts, dict) or not all(isinstance(name, str) and is_count(count) for name, count in counts.items()):
            return f"class_counts is {shown(counts)}"
        fingerprint = state.get("fingerprint", {})  # earlier versions wrote none
        if not isinstance(fingerprint, dict) or not all(isinstance(text, str) for pair in fingerprint.items() for text in pair):
            return f"fingerprint is {shown(fingerprint)}"
        scale = state["scaler"].get("scale", 1.0) if isinstance(state["scaler"], dict) else 1.0
        return (
            first_difference(state["byol"], self.byol.state_dict(), "byol")
            or first_difference(state["scaler"], self.scaler.state_dict(), "scaler")
            or (f"scaler.scale is {scale}" if not scale > 0 else None)
            or next((wrong for each in ranks["rng"] if (wrong := rng_difference(each))), None)
            or state_difference(self.optimizer, state["optimizer"])
        )

    def _removed_images(self, state: dict[str, Any], folder: Path) -> int:
        """Returns how many images were removed since the checkpoint. Raises UserError for more images, too few, or other classes."""
        before, now = state["num_samples"], self.loader.num_samples
        if now == before:
            return 0
        counts = self.loader.class_counts()
        recorded = state.get("class_counts", counts)  # earlier versions wrote none
        gained = [name for name, count in counts.items() if count > recorded.get(name, 0)]
        if now > before or before - now > max(REMOVED_SHARE * before, REMOVED_IMAGES) or gained:
            raise UserError(
                f"data.train holds {now} images, the run in {folder} was started with {before}"
                + (f", and more of class {gained[0]!r} than then" if gained else "")
                + f"; give the run's own data (up to {REMOVED_SHARE:.0%} or {REMOVED_IMAGES} of its images may be removed)"
            )
        return before - now

    def _announce_division(self, saved: dict[str, int]) -> None:
        """Warns if other nodes than before divide the images, in the middle of an epoch."""
        before, now = saved.get("nodes", 1), self.loader.traversal.nodes
        if now != before and saved["batch"]:
            log.warning(
                "data.traversal sharded: %s nodes divide the images now, before %s, so the rest of this epoch shows some images twice and others "
                "not at all; the next epochs are whole",
                shown(now),
                shown(before),
            )

    def _restore_loader(self, saved: dict[str, int], *, steps_per_epoch: int) -> None:
        per_epoch_now = self.loader.traversal.num_samples // self.loader.traversal.global_batch
        # The position is converted to optimizer steps, because the number of micro-batches per step may differ now; the images are the
        # same then. If it lies beyond the end of an epoch that lost images, the next epoch starts.
        steps = saved["batch"] * steps_per_epoch // saved["batches_per_epoch"]
        epoch, steps = (saved["epoch"], steps) if steps < per_epoch_now else (saved["epoch"] + 1, 0)
        self.loader.load_state_dict({"epoch": epoch, "batch": steps * len(self.loader) // per_epoch_now})


def _announce_differences(state: dict[str, Any], *, config: TrainConfig, process: Process) -> None:
    """Logs how this machine differs from the one that wrote the checkpoint, and the consequences."""
    ranks, before = process.world_size, len(state["ranks"]["rng"])
    if ranks != before:
        log.info("continuing on %d ranks (before: %d): each step has the same images, but sums are in another order", ranks, before)
    now, images = bn_images(config, process), state["ranks"]["bn_images"]
    if now != images:
        log.warning("batch norm now sees %d images at once, before %d, because rank_batch or the number of ranks has changed", now, images)
    versions, recorded = package_versions(), state["versions"]
    changed = [f"{name} was {recorded.get(name)}, is {versions[name]}" for name in versions if recorded.get(name) != versions[name]]
    if changed:
        log.warning("package versions differ from the checkpoint's, so results may not be bitwise the same: %s", "; ".join(changed))
