"""Measures a step of the paper's linear evaluation with one learning rate, and with all five trained side by side.

How: the frozen encoder's forward in bf16 and channels-last on images in memory, then heads, loss, backward and SGD as in
`fastbyol.evaluation.tasks.linear`. Reference: one rate. Ceiling: the encoder's forward alone. The rival is what a user of other libraries
does: a run for each rate.

    python -m benchmarks.run linear_sweep

Why: the encoder sees each image once, and five heads of 2048 x 1000 cost 5 x 6 M multiply-adds an image where a ResNet-50 costs 4.1 G.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import CaseResult, measured
from benchmarks.timing import subjects_of, torch_threads
from fastbyol.config.schema import PrecisionConfig
from fastbyol.evaluation.tasks.linear import Heads, LinearSettings, build_sgd, heads_loss
from fastbyol.models import build_encoder
from fastbyol.run.precision import autocast

REFERENCE, CEILING, OURS, RIVAL = "one rate", "forward alone", "five rates side by side", "five runs of one rate"


@dataclass(frozen=True)
class Size:
    batch: int
    rounds: int
    encoder: str
    size_px: int
    classes: int
    torch_threads: int = 1
    seed: int = 0


QUICK = Size(batch=32, rounds=6, encoder="resnet18", size_px=64, classes=100)
FULL = Size(batch=32, rounds=9, encoder="resnet50", size_px=224, classes=1000)


def run(size: Size, *, scratch: Path) -> CaseResult:
    torch.manual_seed(size.seed)
    settings = LinearSettings()
    encoder = build_encoder(size.encoder).eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = torch.randn(size.batch, 3, size.size_px, size.size_px).to(memory_format=torch.channels_last)
    label = torch.randint(size.classes, (size.batch,))

    def features() -> Tensor:
        with torch.no_grad(), autocast(PrecisionConfig(autocast="bf16"), device=torch.device("cpu")):
            return encoder(image)

    def step(rates: tuple[float, ...]) -> Callable[[], None]:
        heads = Heads(len(rates), feature_dim=features().shape[1], num_classes=size.classes, seed=size.seed)
        # So small a rate changes nothing that costs time, and the weights stay finite whatever the number of rounds.
        optimizer = build_sgd(heads, tuple(1e-6 * rate for rate in rates), momentum=settings.momentum)

        def take() -> None:
            heads_loss(heads(features()), label, settings).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return take

    alone = [step((rate,)) for rate in settings.rates]
    with torch_threads(size.torch_threads):
        work = {
            CEILING: features,
            REFERENCE: alone[0],
            OURS: step(settings.rates),
            RIVAL: lambda: [take() for take in alone],
        }
        title = f"linear evaluation of {size.encoder} at {size.size_px} px, {size.classes} classes, batch {size.batch}"
        subjects = subjects_of(work, units=size.batch, rivals={RIVAL})
        return measured("linear_sweep", title, subjects, reference=REFERENCE, ceiling=CEILING, threads=size.torch_threads, settings=size)
