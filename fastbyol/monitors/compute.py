"""Compute utilisation of a run: operations per image, peak of the GPU, memory."""

from __future__ import annotations

import functools
import logging
import math
import re
import resource
import sys

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastbyol.byol import build_byol
from fastbyol.config.schema import ModelConfig, ObjectiveConfig, TrainConfig
from fastbyol.models import encoder_from

log = logging.getLogger("fastbyol")
PEAK_TFLOP_PER_S = (
    ("GH200", 989.0),
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX A6000", 154.8),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
    ("T4", 65.0),
)
"""Dense 16-bit tensor-core peaks with float32 accumulation, from NVIDIA's data sheets (half of the figure 'with sparsity').
The first entry whose name occurs in the device's name counts. bf16 and fp16 are equal; V100 and T4 support fp16 only.
"""
COUNTED_BATCH = 2


def peak_flop_per_s(device_name: str, *, autocast: str) -> float | None:
    """Returns the GPU's peak for the run's precision; None for a GPU that is not in the table, and for float32 and TF32."""
    if autocast not in ("bf16", "fp16"):
        return None
    for name, tflop in PEAK_TFLOP_PER_S:
        # Whole words: an L4 is no L40.
        if re.search(rf"\b{name}\b", device_name):
            return 1e12 * tflop
    return None


@functools.cache  # counting takes a second, which several runs in one process need not pay again
def flop_per_image(model: ModelConfig, *, size_px: int, target: str = "ema") -> float:
    """Counts the operations of convolutions and matrix products for both views of an image, in all passes, two per multiply-add.

    The probe and the negative term of InfoNCE are left out (below 0.1 %).
    """
    # On the meta device nothing is computed. Building the networks draws numbers, which must not change those of the run.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        byol = build_byol(model, num_classes=1, objective=ObjectiveConfig(target=target))
        view = torch.empty(COUNTED_BATCH, 3, size_px, size_px)
        with FlopCounterMode(display=False) as counter:
            byol(view, view, torch.zeros(COUNTED_BATCH, dtype=torch.int64)).loss.backward()
    return counter.get_total_flops() / COUNTED_BATCH


def largest_activation(model: ModelConfig, *, size_px: int) -> int:
    """Counts the numbers in the largest tensor that a module of the encoder returns for one view of an image."""
    sizes = [0]
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        encoder = encoder_from(model)
        for module in encoder.modules():
            module.register_forward_hook(lambda _, inputs, output: sizes.append(output.numel()) if isinstance(output, Tensor) else None)
        encoder(torch.empty(COUNTED_BATCH, 3, size_px, size_px))
    return max(sizes) // COUNTED_BATCH


class ComputeMeter:
    """Measures achieved operations per second and, if the GPU's peak is known, their share of it."""

    def __init__(self, config: TrainConfig, *, device: torch.device) -> None:
        self._config = config
        self._flop_per_image: float | None = None
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = peak_flop_per_s(name, autocast=config.precision.autocast)

    def rates(self, *, images_per_s_per_device: float) -> dict[str, float | None]:
        """Returns tflop_per_s_per_device and mfu (model FLOP utilisation, in [0, 1]), None if unknown; the peak of a CPU always is."""
        if self._flop_per_image is None:  # about a second for a ResNet-50, so not before the first step
            self._flop_per_image = self._count()
        achieved = self._flop_per_image * images_per_s_per_device
        if math.isnan(achieved):
            return {"tflop_per_s_per_device": None, "mfu": None}
        return {"tflop_per_s_per_device": achieved / 1e12, "mfu": achieved / self._peak if self._peak else None}

    def _count(self) -> float:
        """Returns `flop_per_image`, or NaN with a warning: a third-party encoder that fails on the meta device must not end the run."""
        config = self._config
        try:
            return flop_per_image(config.model, size_px=config.views.size_px, target=config.objective.target)
        except Exception as error:
            log.warning("operations per image could not be counted (%s: %s); mfu stays unknown", type(error).__name__, error)
            return math.nan


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory so far: PyTorch's tensors on a GPU, resident memory of this process on a CPU. Does not synchronise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in bytes on macOS and in KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
