"""Measures whether any part of a training step makes the host wait for the device.

How: each piece runs twice to warm up, then once under `torch.cuda.set_sync_debug_mode("error")`, which turns such a wait into an
error. The batch is uint8 crops in pinned memory, as from the loader on a GPU. Two controls that do wait (`.item()`, a copy from
memory that is not pinned) show that the mode detects it.

    python -m benchmarks.gpu_plan syncs

Why: a wait empties the queue of launches, and the device idles until the host has filled it again, for tens of microseconds each.
Steps of other libraries have hundreds of waits (one for each batch norm across ranks, two for each tensor of LARS).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import TINY_MODEL, Findings, Place
from benchmarks.gpu.subjects import crops_batch
from benchmarks.training_step import StepSize, TrainingStep
from fastbyol.byol import BYOLOutput
from fastbyol.config.schema import ModelConfig
from fastbyol.data.batch import views_on_device
from fastbyol.run.precision import autocast, compiles_augmentation, input_dtype
from fastbyol.tuning.stepper import TAU, synchronize

CLEAN, UNCHECKED = "no wait", "ran; not checked, because only CUDA has the mode"
NUM_CLASSES = 10
PINNED = ("view1", "view2", "label", "parameters")
"""Fields of a batch that the loader pins; a test holds it to this."""


FULL = StepSize(model=ModelConfig(encoder="resnet50"), size_px=224, batch=32, rounds=1)
TINY = StepSize(model=TINY_MODEL, size_px=32, batch=4, rounds=1)


def run(size: StepSize, *, place: Place) -> Findings:
    pieces = _Pieces(size, place.device)
    # Twice: the first step creates momentum buffers, loads kernels and grows the allocator's pools, all of which may wait.
    for do in 2 * [*pieces.in_order.values()]:
        do()
    synchronize(place.device)
    found = {name: check(do, place.device) for name, do in {**pieces.in_order, **_controls(place.device)}.items()}
    return Findings("syncs", f"does the host wait for the device? {size.model.encoder}, batch {size.batch}", found)


def check(piece: Callable[[], object], device: torch.device) -> str:
    """Returns 'no wait', or 'waits: ' and torch's message; only CUDA can be checked."""
    if device.type != "cuda":
        piece()
        return UNCHECKED
    torch.cuda.set_sync_debug_mode("error")
    try:
        piece()
    except RuntimeError as error:
        return f"waits: {str(error).splitlines()[0]}"
    else:
        return CLEAN
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _Pieces:
    """A training step divided into pieces; each leaves what the next one needs."""

    output: BYOLOutput

    def __init__(self, size: StepSize, device: torch.device) -> None:
        self.config = size.config()
        step = TrainingStep(self.config, num_classes=NUM_CLASSES, device=device)
        batch = crops_batch(self.config.views, size.batch, num_classes=NUM_CLASSES)
        # A copy from memory that is not pinned waits: the loader pins all that is copied (not the index), and the last control shows the wait.
        copied = {name: getattr(batch, name).pin_memory() for name in PINNED} if device.type == "cuda" else {}
        self.batch = batch._replace(**copied)
        self.device, self.state = device, step.networks()
        # As the step calls it.
        self.formats: dict[str, Any] = {
            "dtype": input_dtype(self.config.precision, device=device),
            "compiled": compiles_augmentation(device),
        }
        self.in_order: dict[str, Callable[[], object]] = {
            "copy and augmentation": self.copy_and_augment,
            "forward and loss": self.forward,
            "backward": lambda: (self.output.loss + self.output.probe_loss).backward(),
            "monitor": lambda: step.monitor.add(self.output),
            "LARS": self.update,
            "the target's update": lambda: self.state.byol.update_target(TAU),
            "the whole train_step": lambda: step.run([self.batch]),
        }

    def copy_and_augment(self) -> None:
        self.views, self.label = views_on_device(self.batch, self.config.views, self.device, **self.formats)

    def forward(self) -> None:
        with autocast(self.config.precision, device=self.device):
            self.output = self.state.byol(self.views, None, self.label)

    def update(self) -> None:
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)


def _controls(device: torch.device) -> dict[str, Callable[[], object]]:
    number, pageable = torch.ones((), device=device), torch.ones(1 << 20)
    return {"control, must wait: .item()": number.item, "control, must wait: copy of pageable memory": lambda: pageable.to(device)}
