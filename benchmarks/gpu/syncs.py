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
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu import TINY_MODEL, Findings, Place
from benchmarks.training_step import TrainingStep
from fastbyol.augment.parameters import draw_parameters
from fastbyol.byol import BYOLOutput, build_byol
from fastbyol.config.schema import ModelConfig, PrecisionConfig, TrainConfig
from fastbyol.config.views import ViewPair
from fastbyol.data.batch import ViewBatch, views_on_device
from fastbyol.monitors import Monitor
from fastbyol.optim.build import build_optimizer
from fastbyol.run.precision import autocast, prepare_model
from fastbyol.tuning.stepper import LR, TAU, synchronize

CLEAN, UNCHECKED = "no wait", "ran; not checked, because only CUDA has the mode"
NUM_CLASSES = 10


@dataclass(frozen=True)
class Size:
    model: ModelConfig
    size_px: int
    batch: int


FULL = Size(model=ModelConfig(encoder="resnet50"), size_px=224, batch=32)
TINY = Size(model=TINY_MODEL, size_px=32, batch=4)


def run(size: Size, *, place: Place) -> Findings:
    pieces = _Pieces(size, place.device)
    for do in 2 * [*pieces.in_order.values()]:
        do()
    synchronize(place.device)
    found = {name: check(do, place.device) for name, do in {**pieces.in_order, **_controls(place.device)}.items()}
    return Findings("syncs", f"does the host wait for the device? {size.model.encoder}, batch {size.batch}", found)


def check(piece: Callable[[], object], device: torch.device) -> str:
    """Returns 'no wait', or 'waits: ' and torch's message."""
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

    def __init__(self, size: Size, device: torch.device) -> None:
        self.device = device
        config = TrainConfig(global_batch=size.batch, model=size.model, precision=PrecisionConfig(), views=ViewPair(size_px=size.size_px))
        self.config, self.batch = config, crops_batch(size, config.views, device)
        self.byol = build_byol(config.model, num_classes=NUM_CLASSES)
        prepare_model(self.byol, config.precision, device=device)
        self.optimizer = build_optimizer(config.optim, self.byol)
        for group in self.optimizer.param_groups:
            group["lr"] = LR
        self.monitor = Monitor(global_batch=size.batch, world_size=1, device=device)
        self.whole = TrainingStep(config, num_classes=NUM_CLASSES, device=device)
        self.in_order: dict[str, Callable[[], object]] = {
            "copy and augmentation": self.copy_and_augment,
            "forward and loss": self.forward,
            "backward": self.backward,
            "monitor": lambda: self.monitor.add(self.output),
            "LARS": self.update,
            "the target's update": lambda: self.byol.update_target(TAU),
            "the whole train_step": lambda: self.whole.run([self.batch]),
        }
        self.output: BYOLOutput

    def copy_and_augment(self) -> None:
        self.views = views_on_device(self.batch, self.config.views, self.device)

    def forward(self) -> None:
        with autocast(self.config.precision, device=self.device):
            self.output = self.byol(*self.views)

    def backward(self) -> None:
        (self.output.loss + self.output.probe_loss).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def crops_batch(size: Size, views: ViewPair, device: torch.device) -> ViewBatch:
    """Returns uint8 crops of noise with drawn parameters, in pinned memory if there is a GPU."""
    side = np.full(size.batch, 2 * size.size_px)
    drawn = draw_parameters(views, seed=0, epoch=0, index=np.arange(size.batch), height=side, width=side)
    crops = torch.randint(0, 256, (2, size.batch, size.size_px, size.size_px, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    index = torch.arange(size.batch)
    batch = ViewBatch(crops[0], crops[1], index % NUM_CLASSES, index, torch.from_numpy(drawn))
    return ViewBatch(*(tensor.pin_memory() for tensor in batch)) if device.type == "cuda" else batch


def _controls(device: torch.device) -> dict[str, Callable[[], object]]:
    number, pageable = torch.ones((), device=device), torch.ones(1 << 20)
    return {"control, must wait: .item()": number.item, "control, must wait: copy of pageable memory": lambda: pageable.to(device)}
