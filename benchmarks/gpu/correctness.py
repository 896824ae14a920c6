"""Measures how far the device's results are from those they should equal: compiled and eager, augmentation, a skipped step, a resumed run.

How: 20 steps of a small network on the same batch, eager and compiled, in float32; the augmentation of crops on the device beside the same
operations on the CPU; an fp16 step whose gradient scale is too large for any gradient, after which neither network may have moved and the
scale must be halved; and five steps beside three steps, all state saved and loaded into new networks, and two more.

    python -m benchmarks.gpu_plan correctness

Why: the suite's tests of these run on CPUs. A card has other kernels, other rounding, and a compiler of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu import TINY_MODEL, Findings, Place
from benchmarks.gpu.subjects import crops_batch
from benchmarks.training_step import CPU, StepSize, TrainingStep
from fastbyol.config.errors import UserError
from fastbyol.config.schema import ModelConfig, PrecisionConfig
from fastbyol.data.batch import views_on_device
from fastbyol.run.precision import compiles_augmentation
from fastbyol.tuning.candidates import reason_not_to_compile

NUM_CLASSES = 10
STEPS, BEFORE, AFTER = 20, 3, 2
LARGEST_TRACE, LARGEST_LEVELS = 0.02, 1.0
"""Differences that are still rounding: of the loss, in [0, 8], after 20 steps; of a view's pixels, in units of 255 levels, on average."""


@dataclass(frozen=True)
class Size(StepSize):
    compile: bool = True


FULL = Size(model=ModelConfig(encoder="resnet18"), size_px=96, batch=32, rounds=1)
TINY = Size(model=TINY_MODEL, size_px=32, batch=4, rounds=1, compile=False)


def run(size: Size, *, place: Place) -> Iterator[Findings]:
    """Yields what was found so far after each check."""
    checks = {
        f"{STEPS} steps, compiled beside eager": compiled_beside_eager,
        "augmentation beside the CPU's": augmentation,
        "fp16, gradients that overflow": overflow,
        "resumed beside uninterrupted": resumed,
    }
    found: dict[str, str] = {}
    for name, check in checks.items():
        try:
            found[name] = check(size, place)
        except UserError as reason:
            found[name] = f"not checked: {reason}"
        yield Findings("correctness", f"is it right on this card? {size.model.encoder}, {size.size_px} px, batch {size.batch}", dict(found))


def verdict(difference: float, *, most: float, unit: str) -> str:
    """Returns 'right' or 'WRONG' with the difference."""
    right = math.isfinite(difference) and difference <= most
    return f"{'right' if right else 'WRONG'}: differs by {difference:.3g} {unit}, at most {most:g} is rounding"


def _step(size: Size, place: Place, **precision: object) -> TrainingStep:
    options = {"autocast": "off", "compile": "no"} | precision
    return TrainingStep(size.config(precision=PrecisionConfig(**options)), num_classes=NUM_CLASSES, device=place.device)  # type: ignore[arg-type]


def compiled_beside_eager(size: Size, place: Place) -> str:
    if not size.compile:
        raise UserError("takes a minute to compile: not in a dry run")
    if reason := reason_not_to_compile(place.device, seconds=math.inf):
        raise UserError(reason)
    eager, compiled = (_losses(_step(size, place, compile=how), STEPS) for how in ("no", "yes"))
    return verdict((eager - compiled).abs().max().item(), most=LARGEST_TRACE, unit="in the loss")


def _losses(step: TrainingStep, steps: int) -> torch.Tensor:
    """Takes the steps on noise, and returns the loss of each."""
    losses = []
    for _ in range(steps):
        step.run_on_noise()
        losses.append(step.last.loss.detach())
    return torch.stack(losses).cpu()


def augmentation(size: Size, place: Place) -> str:
    views = size.config().views
    batch = crops_batch(views, size.batch, num_classes=NUM_CLASSES)
    ours, _ = views_on_device(batch, views, place.device, compiled=compiles_augmentation(place.device))
    wanted, _ = views_on_device(batch, views, CPU)
    std = torch.tensor(views.std).view(1, 3, 1, 1)
    return verdict((255 * std * (ours.cpu().float() - wanted)).abs().mean().item(), most=LARGEST_LEVELS, unit="levels on average")


def overflow(size: Size, place: Place) -> str:
    step = _step(size, place, autocast="fp16")  # UserError on a CPU
    networks = step.networks()
    step.run_on_noise()
    before = [parameter.detach().clone() for parameter in networks.byol.parameters()]
    scale = 2.0**60
    networks.scaler.update(scale)
    step.run_on_noise()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, networks.byol.parameters(), strict=True))
    now = networks.scaler.get_scale()
    right = moved == 0 and now == scale / 2
    return f"{'right' if right else 'WRONG'}: {moved} parameters moved, the scale went from {scale:.3g} to {now:.3g}"


def resumed(size: Size, place: Place) -> str:
    whole, first = _step(size, place), _step(size, place)
    wanted = _losses(whole, BEFORE + AFTER)[BEFORE:]
    first.run_on_noise(BEFORE)
    saved = first.state()
    second = TrainingStep(replace(first.config, seed=first.config.seed + 1), num_classes=NUM_CLASSES, device=place.device)
    networks = second.networks()
    networks.byol.load_state_dict(saved["byol"])  # type: ignore[arg-type]
    networks.optimizer.load_state_dict(saved["optimizer"])  # type: ignore[arg-type]
    networks.scaler.load_state_dict(saved["scaler"])  # type: ignore[arg-type]
    return verdict((_losses(second, AFTER) - wanted).abs().max().item(), most=LARGEST_TRACE, unit="in the loss")
