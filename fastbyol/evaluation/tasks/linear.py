"""Linear evaluation as in the paper (appendix C.1): one linear layer on the frozen encoder, SGD on random crops, the learning rate swept.

The heads of all rates train side by side on the same features, so a sweep costs about as much as one head.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbyol.config.errors import require, require_at_least, require_choice, require_positive
from fastbyol.data import crops_on_device
from fastbyol.data.backends.source import Indices
from fastbyol.data.loader import CropLoader
from fastbyol.evaluation.result_file import SubjectResult, TaskResult
from fastbyol.evaluation.tasks.estimate import estimate_lines, seconds_per_image
from fastbyol.evaluation.tasks.held_out import IMAGENET, NOTHING_TO_CHOOSE, check_amounts, held_out_notes, held_out_rows
from fastbyol.evaluation.tasks.images import LabelledImages, batch_notes, crop_and_flip, open_labelled
from fastbyol.evaluation.tasks.job import Job, Subject
from fastbyol.evaluation.tasks.registry import Task
from fastbyol.evaluation.tasks.scoring import Hits, compare_with_first, hits_of, packed, unpacked
from fastbyol.evaluation.tasks.training import train_network
from fastbyol.run.precision import autocast, compiles_augmentation, input_dtype
from fastbyol.schedules import lr_at

TANH_SCALE = 20.0
PAPER_ROWS: dict[str, dict[str, float]] = {
    "paper: BYOL": {"top1": 74.3, "top5": 91.6},
    "paper: SimCLR": {"top1": 69.3, "top5": 89.0},
    "paper: supervised": {"top1": 76.4, "top5": 92.9},
}
"""Table 1, and the supervised baseline of appendix C.2: ImageNet, ResNet-50, 1000 epochs."""


@dataclass(frozen=True)
class LinearSettings:
    """The paper's linear evaluation on ImageNet."""

    epochs: float = 80.0
    """Passes over the training images, for the sweep and for the final fit."""
    global_batch: int = 1024
    """Images of all ranks in a step; fewer where there are fewer training images."""
    rates: tuple[float, ...] = (0.4, 0.3, 0.2, 0.1, 0.05)
    """Learning rates per 256 images that are swept."""
    momentum: float = 0.9
    """Nesterov momentum of SGD."""
    held_out: tuple[float, ...] = IMAGENET
    """Training images on which the rate is chosen: a number, or a share below 1. Of two values, the second is used where the first is
    more than a quarter of the training images.
    """
    views: str = "crop_flip"
    """Augmentation: crop_flip; pretraining: that of the run's view 1 (table 7)."""
    tanh_logits: bool = False
    """Table 7's variant: logits t = 20 tanh(x / 20), with the loss 0.01 mean(t^2) added."""
    logit_penalty: float = 1e-2
    """Weight of mean(t^2) where tanh_logits is yes."""

    def __post_init__(self) -> None:
        require_positive("epochs", self.epochs)
        require_at_least("global_batch", self.global_batch, 1)
        require(bool(self.rates) and all(rate > 0 for rate in self.rates), "rates", self.rates, "at least one number above 0")
        require(len(set(self.rates)) == len(self.rates), "rates", self.rates, "different numbers")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        check_amounts("held_out", self.held_out)
        require_choice("views", self.views, ("crop_flip", "pretraining"))
        require(self.logit_penalty >= 0, "logit_penalty", self.logit_penalty, "a number >= 0")

    def without_effect(self, _: Sequence[str]) -> dict[str, str]:
        """Returns why each option that these settings don't use has no effect."""
        penalty = {} if self.tanh_logits else {"logit_penalty": "without --tanh_logits yes"}
        return penalty | (NOTHING_TO_CHOOSE if len(self.rates) == 1 else {})

    def split(self, job: Job, images: LabelledImages) -> tuple[Indices, Indices]:
        """Returns the images to train on while the rate is chosen, and the held-out ones: none where there is one rate only."""
        rows = images.labelled_rows
        return held_out_rows(rows, held_out=self.held_out, seed=job.seed) if len(self.rates) > 1 else (rows, rows[:0])


class Heads(nn.Module):
    """Linear layers with the same initial weights, applied to the same features by one matrix product: (N, D) -> (N, H, K).

    Initial weights: normal, cut off at two standard deviations of 1 / sqrt(D), as the official code's Haiku has them; biases 0.
    """

    def __init__(self, num_heads: int, *, feature_dim: int, num_classes: int, seed: int) -> None:
        super().__init__()
        std = feature_dim**-0.5
        first = torch.empty(num_classes, feature_dim)
        nn.init.trunc_normal_(first, std=std, a=-2 * std, b=2 * std, generator=torch.Generator().manual_seed(seed))
        # A parameter for each head, so that the optimizer can give each its own rate.
        self.weight = nn.ParameterList(nn.Parameter(first.clone()) for _ in range(num_heads))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(num_classes)) for _ in range(num_heads))

    def forward(self, feature: Tensor) -> Tensor:
        # Outside autocast: 16-bit logits of a thousand classes would lose what the rates differ by.
        with torch.autocast(feature.device.type, enabled=False):
            logits = F.linear(feature.to(self.weight[0].dtype), torch.cat(list(self.weight)), torch.cat(list(self.bias)))
        return logits.unflatten(1, (len(self.weight), -1))


def heads_loss(logits: Tensor, label: Tensor, settings: LinearSettings) -> Tensor:
    """Returns the sum over heads of each head's mean cross-entropy: (N, H, K) and (N,) -> scalar. So a head's gradient is its own."""
    penalty = logits.new_zeros(())
    if settings.tanh_logits:
        logits = TANH_SCALE * torch.tanh(logits / TANH_SCALE)
        penalty = settings.logit_penalty * logits.square().mean(dim=(0, 2)).sum()
    num, heads, classes = logits.shape
    losses = F.cross_entropy(logits.reshape(num * heads, classes), label.repeat_interleave(heads), reduction="none")
    return losses.view(num, heads).mean(dim=0).sum() + penalty


def build_sgd(heads: Heads, rates: tuple[float, ...], *, momentum: float) -> torch.optim.SGD:
    """Returns SGD with Nesterov momentum and no regularisation, each head at its own rate times the step's common factor."""
    groups = [{"params": [weight, bias], "lr_factor": rate} for weight, bias, rate in zip(heads.weight, heads.bias, rates, strict=True)]
    return torch.optim.SGD(groups, lr=1.0, momentum=momentum, nesterov=momentum > 0)


def run(job: Job, settings: LinearSettings) -> TaskResult:
    """Scores each encoder: the rate is chosen on held-out training images, a new head is fitted on all of them, val is scored once."""
    results: dict[str, SubjectResult] = {}
    hits: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for subject in job.subjects:
        with open_labelled(job, subject.views) as images:
            fit, held_out = settings.split(job, images)
            sizes = {"train": len(fit), "held out": len(held_out), "val": len(images.test_rows)}
            images.require_decodable(job, held_out)
            evaluation = _Evaluation(job, settings, subject, images)
            results[subject.name], hits[subject.name] = evaluation.result(fit, held_out)
    return job.result(
        columns={"top1": "top-1 %", "top5": "top-5 %"},
        subjects=results,
        sizes=sizes,
        paper=PAPER_ROWS,
        comparisons=compare_with_first(job, hits),
        notes=[
            "the paper's rows are ImageNet, ResNet-50, 1000 epochs; ours are this run's images and length",
            *batch_notes(job, settings.global_batch, (sizes["train"], sizes["train"] + sizes["held out"])),
            *(held_out_notes(sizes["train"] + sizes["held out"], settings.held_out) if sizes["held out"] else ()),
        ],
    )


class _Evaluation:
    """One encoder's evaluation: what its two trainings and its tests share."""

    def __init__(self, job: Job, settings: LinearSettings, subject: Subject, images: LabelledImages) -> None:
        self.job, self.settings, self.subject, self.images = job, settings, subject, images
        self.device = job.process.device
        self._encoder: nn.Module | None = None
        self.views = crop_and_flip(images.views) if settings.views == "crop_flip" else images.views

    @property
    def encoder(self) -> nn.Module:
        """The frozen encoder on the device, in eval mode; made only if some part is not done yet."""
        if self._encoder is None:
            rows = self.images.labelled_rows
            self._encoder = self.subject.encoder(lambda: self.images.sample(rows)).eval().requires_grad_(False)
            self._encoder.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self._encoder

    @property
    def feature_dim(self) -> int:
        return int(self.encoder.feature_dim)  # type: ignore[arg-type]

    def result(self, fit: Indices, held_out: Indices) -> tuple[SubjectResult, Tensor]:
        name, settings, start = self.subject.name, self.settings, time.monotonic()
        rate, top1 = settings.rates[0], None
        if len(held_out):
            top1 = self.job.once(f"{name} sweep", lambda: self._sweep(f"{name} sweep", fit, held_out))["top1"]
            rate = max(settings.rates, key=lambda rate: (top1[f"{rate:g}"], -rate))
        final = self.job.once(f"{name} rate={rate:g}", lambda: self._final(f"{name} rate={rate:g}", rate))
        result = SubjectResult(
            title=self.subject.title,
            scores={"top1": final["top1"], "top5": final["top5"]},
            seconds=round(time.monotonic() - start, 3),
            chosen={"rate": rate, "held_out_top1": top1},
            details={"images_per_s": final["images_per_s"], "global_batch": final["global_batch"]},
        )
        return result, unpacked(final["hits"])

    def _sweep(self, key: str, fit: Indices, held_out: Indices) -> dict[str, Any]:
        heads, _ = self._trained(key, fit, self.settings.rates)
        hits = self._hits(heads, held_out, test=False)
        return {"top1": {f"{rate:g}": one.shares()["top1"] for rate, one in zip(self.settings.rates, hits, strict=True)}}

    def _final(self, key: str, rate: float) -> dict[str, Any]:
        heads, figures = self._trained(key, self.images.labelled_rows, (rate,))
        (hits,) = self._hits(heads, self.images.test_rows, test=True)
        return {**hits.shares(), "hits": packed(hits.top1), **figures}

    def _trained(self, key: str, rows: Indices, rates: tuple[float, ...]) -> tuple[Heads, dict[str, Any]]:
        settings, job = self.settings, self.job
        with self.images.crops(job, rows, global_batch=settings.global_batch, views=self.views) as loader:
            batch = loader.traversal.global_batch
            heads = Heads(len(rates), feature_dim=self.feature_dim, num_classes=len(self.images.class_names), seed=job.seed).to(self.device)
            total = max(1, round(settings.epochs * len(rows) / batch))
            figures = train_network(
                job,
                key,
                network=heads,
                optimizer=build_sgd(heads, rates, momentum=settings.momentum),
                lr_at=lambda step: lr_at(step, total_steps=total, warmup_steps=0, base_lr=1.0, global_batch=batch),
                batches=lambda step: self._features(loader, step),
                loss_of=lambda model, made: heads_loss(model(made[0]), made[1], settings),
                total_steps=total,
                step_images=batch,
            )
        return heads, {"images_per_s": round(figures.images_per_s, 1), "global_batch": batch}

    def _features(self, loader: CropLoader, step: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yields the frozen encoder's features (N, D) of each batch, and the labels as numbers of the common classes."""
        precision, compiled = self.job.precision, compiles_augmentation(self.device)
        for batch in loader.batches_from(step):
            batch = batch._replace(label=self.images.label_of(batch.label))
            dtype = input_dtype(precision, device=self.device)
            image, label = crops_on_device(batch, self.views, self.device, dtype=dtype, compiled=compiled)
            with torch.no_grad(), autocast(precision, device=self.device):
                feature = self.encoder(image)
            yield feature, label

    def _hits(self, heads: Heads, rows: Indices, *, test: bool) -> list[Hits]:
        def score(made: Any) -> Any:
            for feature, label in made:
                with torch.no_grad():
                    yield heads(feature.to(self.device)).float().cpu(), label

        loader = self.images.test if test else self.images.train
        return hits_of(self.job, loader, rows, score, network=self.encoder, class_names=self.images.class_names)


def plan(job: Job, settings: LinearSettings) -> list[str]:
    """Returns what a job amounts to, from the speed of the frozen encoder on a few real images here."""
    subject = job.subjects[0]
    with open_labelled(job, subject.views) as images:
        rows = images.labelled_rows
        fit, held_out = settings.split(job, images)
        trained = (fit, rows) if len(held_out) else (rows,)
        evaluation = _Evaluation(job, settings, subject, images)
        speed = seconds_per_image(job, evaluation.encoder, images.train, rows)
        passes = settings.epochs * sum(map(len, trained)) + len(held_out) + len(images.test_rows)
        parameters = len(settings.rates) * (evaluation.feature_dim + 1) * len(images.class_names)
        steps = [max(1, round(settings.epochs * len(part) / min(settings.global_batch, len(part)))) for part in trained]
    sweep = f"{steps[0]:,} for the sweep of {len(settings.rates)} rates, " if len(steps) > 1 else ""
    return [
        f"images: {len(fit):,} train, {len(held_out):,} held out, {len(images.test_rows):,} val, {len(images.class_names):,} classes",
        f"steps: {sweep}{steps[-1]:,} for the final fit, for each encoder",
        *estimate_lines(job, passes * len(job.subjects), speed, work_bytes=12 * parameters, what="forward passes of the frozen encoder"),
    ]


TASKS = {
    "linear": Task(
        title="linear evaluation",
        what="a linear classifier on frozen features",
        versions={"paper": LinearSettings()},
        run=run,
        plan=plan,
    )
}
