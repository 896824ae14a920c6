"""Theoretical roofline: what a BYOL step must compute, move and send per image, and the rates that this allows on given hardware.

python -m benchmarks.roofline           prints its tables; docs/performance.md shows and explains them

Nothing is measured here. Operations and tensor sizes are counted on torch's meta device; figures of GPUs and links come from data
sheets.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report_text import markdown_table
from fastbyol.byol import build_byol
from fastbyol.config.schema import ModelConfig
from fastbyol.models import encoder_from
from fastbyol.models.sync_batchnorm import GATHERED_RANKS
from fastbyol.monitors.compute import flop_per_image, peak_flop_per_s

VIEWS = 2
HALF, SINGLE, DOUBLE = 2, 4, 8
"""Bytes per bf16, float32 and float64 number."""
JPEG_BYTES = 115e3
"""Mean size of ImageNet-1k's training files: about 148 GB over 1,281,167."""
CONV_SHARE, MEMORY_SHARE = 0.55, 0.85
"""Shares of the peaks that convolutions and long passes over memory reach in practice. With them, the model's range for supervised
ResNet-50 training contains the published figures: see docs/performance.md.
"""


@dataclass(frozen=True)
class Card:
    """One GPU (SXM) and its links. memory, nvlink: bytes/s, the latter in one direction; network: bytes/s of the one adapter per GPU."""

    name: str
    memory: float
    nvlink: float
    network: float

    @property
    def flop_per_s(self) -> float:
        """Peak rate of dense 16-bit operations."""
        peak = peak_flop_per_s(self.name, autocast="bf16")
        assert peak is not None
        return peak


CARDS = (Card("A100", 2.04e12, 300e9, 25e9), Card("H100", 3.35e12, 450e9, 50e9), Card("H200", 4.8e12, 450e9, 50e9))
"""Data sheets of NVIDIA: A100 80 GB, H100, H200, all SXM; 200 and 400 Gbit/s InfiniBand."""
ENCODERS = (ModelConfig(encoder="resnet50"), ModelConfig(encoder="resnet50", width=2), ModelConfig(encoder="resnet200", width=2))


class Elements(NamedTuple):
    """Numbers in the activations of one forward pass of one view, by the operation that reads or writes them."""

    conv_in: int
    conv_out: int
    norm: int
    relu: int
    add: int


class Work(NamedTuple):
    """Work for one image (two views): operations, and bytes of activations in 16 bits."""

    flop: float
    separate_bytes: float
    """Bytes moved if each operation is a separate kernel, as in eager mode."""
    fused_bytes: float
    """Bytes moved if batch norm's second pass includes the ReLU and the residual sum, as when compiled."""


def count_elements(module: nn.Module, view: Tensor) -> Elements:
    """Counts the elements of one forward pass of `view` (N, 3, H, W), per image; meta tensors are enough."""
    with _ElementCounter() as counter:
        module(view)
    return Elements(*(counter.counts[name] // len(view) for name in Elements._fields))


class _ElementCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        # Four dimensions: the heads' norms and the counters of batches are no activations of the encoder.
        if name == "convolution":
            self.counts["conv_in"] += args[0].numel()
            self.counts["conv_out"] += result.numel()
        elif name in ("native_batch_norm", "relu", "add") and args[0].dim() == 4:
            self.counts[name.removeprefix("native_batch_")] += args[0].numel()
        return result


def separate_passes(n: Elements) -> tuple[int, int]:
    """Returns (forward, backward) numbers read and written for one view if each operation is a separate kernel.

    Forward: a convolution reads its input and writes its output; batch norm reads twice (statistics, then values) and writes; ReLU
    reads and writes; a sum reads two and writes one. Backward: a convolution reads the output's gradient and writes the input's, then
    reads both the input and the output's gradient for the weights'; batch norm reads input and gradient twice and writes; ReLU reads
    two and writes; where a residual splits, two gradients are read and their sum is written.
    """
    conv = n.conv_in + n.conv_out
    return conv + 3 * n.norm + 2 * n.relu + 3 * n.add, 2 * conv + 5 * n.norm + 3 * n.relu + 3 * n.add


def fused_passes(n: Elements) -> tuple[int, int]:
    """Returns the same if batch norm's second pass includes ReLU and residual sum, whose other operand is still read."""
    conv = n.conv_in + n.conv_out
    return conv + 3 * n.norm + n.add, 2 * conv + 5 * n.norm + 3 * n.add


@functools.cache
def work_of(model: ModelConfig, *, size_px: int = 224) -> Work:
    """Returns the work per image: for each view online forward and backward, and the target's forward, without the heads' activations."""
    with torch.device("meta"):
        elements = count_elements(encoder_from(model), torch.empty(2, 3, size_px, size_px))
    moved = [HALF * VIEWS * (2 * forward + backward) for forward, backward in (separate_passes(elements), fused_passes(elements))]
    return Work(flop_per_image(model, size_px=size_px), *moved)


def limits(work: Work, card: Card) -> dict[str, float]:
    """Returns upper limits of images/s on one GPU: by operations, and by memory with separate and with fused kernels."""
    return {
        "operations": card.flop_per_s / work.flop,
        "separate": card.memory / work.separate_bytes,
        "fused": card.memory / work.fused_bytes,
    }


def attainable(flop: float, num_bytes: float, card: Card) -> tuple[float, float]:
    """Returns images/s at the shares of the peaks above if convolutions and memory passes do not overlap, and if they overlap fully."""
    compute_s, memory_s = flop / (CONV_SHARE * card.flop_per_s), num_bytes / (MEMORY_SHARE * card.memory)
    return 1 / (compute_s + memory_s), 1 / max(compute_s, memory_s)


@dataclass(frozen=True)
class Messages:
    """Bytes that one rank sends per step. gradient_bytes: all gradients. norm_layers: number of batch norms, online and target.
    norm_bytes: one rank's statistics of all layers, forward; norm_backward_bytes: what is summed in the backward.
    """

    gradient_bytes: float
    norm_layers: tuple[int, int]
    norm_bytes: float
    norm_backward_bytes: float

    @property
    def norm_messages(self) -> int:
        """Number of batch-norm messages: forward passes of both networks, and the online network's backward; both views share a message."""
        online, target = self.norm_layers
        return 2 * online + target


def messages_of(model: ModelConfig, *, num_classes: int = 1000) -> Messages:
    """Returns the messages of a step in float32, including the linear probe's gradients."""
    with torch.device("meta"):
        byol = build_byol(model, num_classes=num_classes)
    channels = [
        [m.num_features for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] for net in (byol.online, byol.target)
    ]
    trained = sum(p.numel() for p in byol.parameters() if p.requires_grad)
    statistics = sum(2 * VIEWS * c + 1 for net in channels for c in net)
    return Messages(
        gradient_bytes=SINGLE * trained,
        norm_layers=(len(channels[0]), len(channels[1])),
        norm_bytes=SINGLE * statistics,
        norm_backward_bytes=SINGLE * sum(2 * VIEWS * c for c in channels[0]),
    )


def all_reduce_s(num_bytes: float, *, ranks: int, bytes_per_s: float) -> float:
    """Seconds of a ring all-reduce: each rank sends 2 (n - 1) / n of the message."""
    return 2 * (ranks - 1) / ranks * num_bytes / bytes_per_s


def all_gather_s(num_bytes: float, *, ranks: int, bytes_per_s: float) -> float:
    """Seconds of an all-gather: each rank receives the message of every other rank."""
    return (ranks - 1) * num_bytes / bytes_per_s


def statistics_s(num_bytes: float, *, ranks: int, bytes_per_s: float) -> float:
    """Seconds of the forward's statistics, num_bytes of a rank in float32: gathered, or by many ranks summed in float64."""
    if ranks > GATHERED_RANKS:
        return all_reduce_s(DOUBLE / SINGLE * num_bytes, ranks=ranks, bytes_per_s=bytes_per_s)
    return all_gather_s(num_bytes, ranks=ranks, bytes_per_s=bytes_per_s)


def work_table(models: Sequence[ModelConfig] = ENCODERS) -> str:
    titles = ("encoder", "GFLOP an image", "MB an image, separate kernels", "MB an image, fused")
    works = [(_name(model), work_of(model)) for model in models]
    rows = [(name, f"{w.flop / 1e9:.1f}", f"{w.separate_bytes / 1e6:,.0f}", f"{w.fused_bytes / 1e6:,.0f}") for name, w in works]
    return markdown_table(titles, rows)


def limits_table(
    models: Sequence[ModelConfig] = ENCODERS, cards: Sequence[Card] = CARDS, *, ours: Mapping[ModelConfig, float] = MappingProxyType({})
) -> str:
    """Returns limits of images/s. ours: bytes an image that our code moves for an encoder, where they have been derived."""
    kinds = ("memory, separate", "memory, fused", "ideal kernels, separate", "ideal kernels, fused")
    rows = []
    for model, card in itertools.product(models, cards):
        work = work_of(model)
        bounds = [f"{value:,.0f}" for value in limits(work, card).values()]
        moved = [work.separate_bytes, work.fused_bytes, *([ours[model]] if model in ours else [])]
        rates = [f"{low:,.0f} to {high:,.0f}" for low, high in (attainable(work.flop, num_bytes, card) for num_bytes in moved)]
        rows.append([f"{_name(model)}, {card.name}", *bounds, *rates, *([] if model in ours else ["not derived"])])
    return markdown_table(("encoder, card (all derived, not measured)", "operations", *kinds, "to expect of our compiled code"), rows)


def input_table(rates: Sequence[int] = (1000, 2000, 3000, 4000), *, size_px: int = 224, core_images_per_s: float) -> str:
    """Returns the data rates that a GPU needs at given images/s. core_images_per_s: rate of a CPU core that makes both views."""
    per_s = ("JPEG files, MB/s", "uint8 crops to the GPU, MB/s", "float32 views instead, MB/s")
    numbers = VIEWS * 3 * size_px**2
    each = [num_bytes / 1e6 for num_bytes in (JPEG_BYTES, numbers, SINGLE * numbers)]
    rows = [[f"{rate:,}", *(f"{rate * mb:,.0f}" for mb in each), f"{rate / core_images_per_s:.1f}"] for rate in rates]
    return markdown_table(("images/s per GPU", *per_s, "CPU cores for whole views"), rows, text_columns=0)


def messages_table(model: ModelConfig = ENCODERS[0], card: Card = CARDS[1], *, global_batch: int = 4096, images_per_s: float = 2000) -> str:
    """Returns milliseconds of a step's messages by bandwidth alone, compared with the step's own at the given rate per GPU."""
    times = ("step alone, ms", "gradients, ms", "BN statistics, ms", "BN backward, ms")
    titles = ("GPUs (times derived, not measured)", "images a GPU", *times, "BN statistics are", "messages of BN")
    sent, rows = messages_of(model), []
    for ranks in (8, 64, 512):
        link = card.nvlink if ranks <= 8 else card.network  # 8 GPUs share a machine
        share = global_batch // ranks
        gradients = all_reduce_s(sent.gradient_bytes, ranks=ranks, bytes_per_s=link)
        summed = ranks > GATHERED_RANKS
        forward = statistics_s(sent.norm_bytes, ranks=ranks, bytes_per_s=link)
        backward = all_reduce_s(sent.norm_backward_bytes, ranks=ranks, bytes_per_s=link)
        messages = [f"{1000 * seconds:.2f}" for seconds in (gradients, forward, backward)]
        how = "summed" if summed else "gathered"
        rows.append([str(ranks), str(share), f"{1000 * global_batch / ranks / images_per_s:.1f}", *messages, how, str(sent.norm_messages)])
    return markdown_table(titles, rows, text_columns=0)


def _name(model: ModelConfig) -> str:
    return f"ResNet-{model.encoder.removeprefix('resnet')}" + (f" ({model.width}x)" if model.width > 1 else "")


def main() -> None:
    for text in (work_table(), limits_table(), messages_table()):
        print(text, end="\n\n")


if __name__ == "__main__":
    main()
