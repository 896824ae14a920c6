"""Fine-tuning: the whole network trained with labels from the checkpoint's weights, rate and length chosen on held-out images (appendix C.1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastbyol.config.errors import Diverged, UserError, require, require_at_least, require_positive
from fastbyol.data.backends.source import Indices
from fastbyol.data.loader import CropLoader
from fastbyol.evaluation.comparison import compare_hits
from fastbyol.evaluation.protocols import top_k_hits
from fastbyol.evaluation.result_file import SubjectResult, TaskResult
from fastbyol.evaluation.tasks.classifier import LR_BATCH, RestartedClassifier, batches_on_device, build_sgd, fit_classifier, scores_of
from fastbyol.evaluation.tasks.estimate import measure_step, probe_batch
from fastbyol.evaluation.tasks.held_out import IMAGENET, NOTHING_TO_CHOOSE, check_amounts, held_out_beside, held_out_notes
from fastbyol.evaluation.tasks.images import LabelledImages, batch_notes, crop_and_flip, open_labelled
from fastbyol.evaluation.tasks.job import Job, Subject
from fastbyol.evaluation.tasks.registry import Task
from fastbyol.evaluation.tasks.scoring import packed, unpacked
from fastbyol.evaluation.tasks.training import raise_if_stopped
from fastbyol.host.quantities import count_text
from fastbyol.schedules import total_steps_at


@dataclass(frozen=True)
class FinetuneSettings:
    """How the network is fine-tuned; the defaults are the paper's (appendix C.1)."""

    rates: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.005)
    """Learning rates to choose from, per 256 images: multiplied by global_batch / 256."""
    epochs: tuple[int, ...] = (30, 50)
    """Lengths to choose from, in passes over the labelled images."""
    global_batch: int = 1024
    """Images of all ranks in a step; fewer where there are fewer labelled images."""
    momentum: float = 0.9
    """Nesterov momentum of SGD."""
    weight_decay: float = 0.0
    """Weight decay of SGD, on all weights."""
    smallest_crop: float = 0.08
    """Area of the smallest random crop, as a share of the image's (appendix B)."""
    held_out: tuple[float, ...] = IMAGENET
    """Training images on which rate and length are chosen: a number, or a share below 1. Of two values, the second is used where the
    first is more than a quarter of the training images.
    """

    def __post_init__(self) -> None:
        for name in ("rates", "epochs"):
            values = getattr(self, name)
            require(len(values) > 0 and len(set(values)) == len(values), name, values, "one or several different numbers")
        for rate in self.rates:
            require_positive("rates", rate)
        for epochs in self.epochs:
            require_at_least("epochs", epochs, 1)
        require_at_least("global_batch", self.global_batch, 1)
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        require_at_least("weight_decay", self.weight_decay, 0)
        require(0 < self.smallest_crop <= 1, "smallest_crop", self.smallest_crop, "in (0, 1]")
        check_amounts("held_out", self.held_out)

    def without_effect(self, _: Sequence[str]) -> dict[str, str]:
        """Returns why each option that these settings don't use has no effect."""
        return NOTHING_TO_CHOOSE if len(self.grid) == 1 else {}

    @property
    def grid(self) -> list[tuple[float, int]]:
        """All pairs of rate and epochs."""
        return [(rate, epochs) for epochs in self.epochs for rate in self.rates]


@dataclass(frozen=True)
class LabelledPart:
    """The training images whose labels are used.

    name: for tables, '' where there is one part only. share: of the training images. rows: their indices.
    """

    name: str
    share: float
    rows: Indices

    @property
    def label(self) -> str:
        return self.name or "100 %"

    def column(self, k: int) -> str:
        return f"top{k} {self.name}".strip()

    def title(self, k: int) -> str:
        return f"{self.name}: top-{k} %" if self.name else f"top-{k} %"


QUICK: dict[str, Any] = {"rates": (0.2, 0.8), "global_batch": 64, "smallest_crop": 0.4, "held_out": (0.1,)}
"""For thousands of images of 32 to 64 px. With 1 % of the labels of the demo's photographs, the higher of the rates 0.05, 0.2 and 0.8 did
better, from scratch too, and a smallest crop of 0.4 better than one of 0.08; with 10 %, 0.8 did better than 0.2.
"""
FRACTIONS: dict[str, dict[float, tuple[float, ...]]] = {
    "paper: BYOL R50": {0.01: (53.2, 78.4), 0.1: (68.8, 89.0), 1.0: (77.7, 93.9)},
    "paper: SimCLR R50": {0.01: (48.3, 75.5), 0.1: (65.6, 87.8), 1.0: (76.0, 93.1)},
    "paper: SimCLR R50, repeated": {1.0: (76.5, 93.5)},
    "paper: supervised R50": {0.01: (25.4, 48.4), 0.1: (56.4, 80.4), 1.0: (76.5,)},
    "paper: BYOL R50 2x": {0.01: (62.2, 84.1), 0.1: (73.5, 91.7)},
    "paper: BYOL R50 4x": {0.01: (69.1, 87.9), 0.1: (75.7, 92.5)},
    "paper: BYOL R200 2x": {0.01: (71.2, 89.5), 0.1: (77.7, 93.7)},
}
"""Tables 2 and 8 (100 %): (top-1, top-5) on ImageNet, by the share of its labels."""
PartsOf = Callable[[LabelledImages], list[LabelledPart]]


def all_labelled(images: LabelledImages) -> list[LabelledPart]:
    """Returns one part, all training images that have a label."""
    return [LabelledPart("", 1.0, images.labelled_rows)]


def tune_parts(job: Job, settings: FinetuneSettings, parts_of: PartsOf) -> TaskResult:
    """Fine-tunes each encoder on each part of the labels, and tests it once with the rate and length that did best on held-out images."""
    subjects: dict[str, SubjectResult] = {}
    hits: dict[str, dict[str, torch.Tensor]] = {}
    parts: list[LabelledPart] = []
    sizes: dict[str, int] = {}
    nums: list[int] = []
    for subject in job.subjects:
        with open_labelled(job, subject.views) as images:
            parts = parts or parts_of(images)  # the same images for every encoder
            tuned = _Tuning(job, settings, subject, images)
            splits = [tuned.split(part) for part in parts]
            images.require_decodable(job, np.unique(np.concatenate([held_out for _, held_out in splits])))
            nums = [len(rows) for part, (fitted, _) in zip(parts, splits, strict=True) for rows in (fitted, part.rows)]
            outcomes = {part.name: tuned.outcome(part) for part in parts}
            sizes = {"train": len(images.labelled_rows), **{f"at {part.name}": len(part.rows) for part in parts if part.name}}
            sizes["val"] = len(tuned.test_rows)
        hits[subject.name] = {name: unpacked(outcome["tested"]["top1_hits"]) for name, outcome in outcomes.items()}
        subjects[subject.name] = _subject_result(subject, parts, outcomes)
    first = job.subjects[0].name
    comparisons = {
        f"{other.title}, with {part.name} of the labels" if part.name else name: compare_hits(hits[first][part.name], hits[name][part.name])
        for name, other in subjects.items()
        if name != first
        for part in parts
    }
    return job.result(
        columns={part.column(k): part.title(k) for part in parts for k in (1, 5)},
        subjects=subjects,
        sizes=sizes,
        paper=paper_rows(parts),
        comparisons=comparisons,
        notes=[
            *_notes(job, settings, num_labelled=sizes["train"]),
            *batch_notes(job, settings.global_batch, nums),
            *choice_lines(subjects),
        ],
    )


def paper_rows(parts: Sequence[LabelledPart]) -> dict[str, dict[str, float]]:
    """Returns the paper's rows that have a figure for one of these shares of the labels."""
    rows = {}
    for title, figures in FRACTIONS.items():
        values = {
            part.column(k): value for part in parts if part.share in figures for k, value in zip((1, 5), figures[part.share], strict=False)
        }
        if values:
            rows[title] = values
    return rows


def _notes(job: Job, settings: FinetuneSettings, *, num_labelled: int) -> list[str]:
    notes = [
        "note: the paper's rows are ResNets (R50 2x: of width 2) on ImageNet, of tables 2 and 8",
        f"note: rates are per {LR_BATCH} images and fall on a half cosine without warm-up, as in the official code; the paper does not say",
        "note: batch-norm statistics are those of each device's images, as in the official code",
    ]
    if len(settings.grid) > 1:
        notes.append("note: rate and length were chosen on held-out training images; the network was then trained again, and tested once")
        notes += held_out_notes(num_labelled, settings.held_out)
    if any(subject.name == "untrained" for subject in job.subjects):
        notes.append("note: 'training from scratch' is the same network from random weights, under the same settings and choice")
    return notes


def choice_lines(subjects: dict[str, SubjectResult]) -> list[str]:
    """Returns a sentence for each choice that was made."""
    return [
        f"chosen: {subject.title}, {label} of the labels: rate {choice['rate']:g}, {choice['epochs']} epochs "
        f"({100 * choice['held_out_top1']:.1f} % of {choice['held_out_images']:,} held-out images)"
        for subject in subjects.values()
        for label, choice in subject.chosen.items()
        if choice["held_out_top1"] is not None
    ]


def _subject_result(subject: Subject, parts: Sequence[LabelledPart], outcomes: dict[str, dict[str, Any]]) -> SubjectResult:
    scores, chosen, details, seconds = {}, {}, {}, 0.0
    for part in parts:
        outcome = outcomes[part.name]
        for k in (1, 5):
            scores[part.column(k)] = unpacked(outcome["tested"][f"top{k}_hits"]).double().mean().item()
        chosen[part.label] = {name: outcome["chosen"][name] for name in ("rate", "epochs", "held_out_top1", "held_out_images")}
        details[part.label] = {"trials": outcome["trials"], "images_per_s": outcome["tested"]["images_per_s"]}
        seconds += sum(trial["seconds"] for trial in outcome["trials"]) + outcome["tested"]["seconds"]
    title = "training from scratch" if subject.name == "untrained" else subject.title
    return SubjectResult(title, scores, round(seconds, 3), chosen, details)


class _Tuning:
    """The trainings of one encoder."""

    def __init__(self, job: Job, settings: FinetuneSettings, subject: Subject, images: LabelledImages) -> None:
        self.job, self.settings, self.subject, self.images = job, settings, subject, images
        self.targets = torch.from_numpy(images.labels)
        labels = images.test_labels
        self.test_rows = images.test_rows
        self.test_labels = torch.from_numpy(labels[self.test_rows])
        if not len(self.test_rows):
            raise UserError(f"--data {job.data}: no val image is of a class that train has")
        self._classifier: RestartedClassifier | None = None

    def split(self, part: LabelledPart) -> tuple[Indices, Indices]:
        """Returns the images to train on while rate and length are chosen, and the held-out ones: none where there is one pair only."""
        if len(self.settings.grid) == 1:
            return part.rows, part.rows[:0]
        return held_out_beside(part.rows, self.images.labelled_rows, held_out=self.settings.held_out, seed=self.job.seed)

    def outcome(self, part: LabelledPart) -> dict[str, Any]:
        """Returns every trial on held-out images, which one was chosen, and the test of that choice."""
        settings = self.settings
        trials: list[dict[str, Any]] = []
        if len(settings.grid) > 1:
            fitted, held_out = self.split(part)
            with self.crops(fitted) as crops:
                for rate, epochs in settings.grid:
                    key = f"{self.subject.name}, {part.label}, rate {rate:g}, {epochs} epochs"
                    trials.append(self.job.once(key, partial(self._trial, key, crops, held_out, rate=rate, epochs=epochs)))
                    raise_if_stopped(self.job)
            finished = [trial for trial in trials if trial["held_out_top1"] is not None]
            if not finished:
                raise Diverged(
                    f"{self.job.task}: {self.subject.title}, {part.label}: diverged with every one of the rates; give lower --rates"
                )
            # On a tie max takes the first, in the order of the settings.
            chosen = max(finished, key=lambda trial: trial["held_out_top1"])
        else:
            ((rate, epochs),) = settings.grid
            chosen = {"rate": rate, "epochs": epochs, "held_out_top1": None, "held_out_images": 0}
        key = f"{self.subject.name}, {part.label}, all, rate {chosen['rate']:g}, {chosen['epochs']} epochs"
        tested = self.job.once(key, partial(self._tested, key, part.rows, rate=chosen["rate"], epochs=chosen["epochs"]))
        raise_if_stopped(self.job)
        return {"trials": trials, "chosen": chosen, "tested": tested}

    def _trial(self, key: str, crops: CropLoader, held_out: Indices, *, rate: float, epochs: int) -> dict[str, Any]:
        """Trains with this pair and returns the accuracy on the held-out images: None if the training diverged."""
        start, top1, images_per_s = time.perf_counter(), None, 0.0
        try:
            network, images_per_s = self._fitted(key, crops, rate=rate, epochs=epochs)
        except Diverged as error:
            self.job.announce(str(error))
        else:
            scores = scores_of(self.job, network, self.images.train, rows=held_out)
            top1 = top_k_hits(scores, self.targets[held_out], k=1).double().mean().item()
        found = {"rate": rate, "epochs": epochs, "held_out_top1": top1, "held_out_images": len(held_out)}
        return {**found, "images_per_s": images_per_s, "seconds": round(time.perf_counter() - start, 3)}

    def _tested(self, key: str, rows: Indices, *, rate: float, epochs: int) -> dict[str, Any]:
        """Trains on all these images and returns which test images are right."""
        start = time.perf_counter()
        with self.crops(rows) as crops:
            network, images_per_s = self._fitted(key, crops, rate=rate, epochs=epochs)
        scores = scores_of(self.job, network, self.images.test, rows=self.test_rows)
        hits = {f"top{k}_hits": packed(top_k_hits(scores, self.test_labels, k=k)) for k in (1, 5)}
        return {**hits, "images_per_s": images_per_s, "seconds": round(time.perf_counter() - start, 3)}

    def crops(self, rows: Indices, *, global_batch: int = 0) -> CropLoader:
        """Returns a loader of random views of these images, in batches of this size (0: that of the settings)."""
        views = crop_and_flip(self.images.views, smallest=self.settings.smallest_crop)
        return self.images.crops(self.job, rows, global_batch=global_batch or self.settings.global_batch, views=views)

    def _fitted(self, key: str, crops: CropLoader, *, rate: float, epochs: int) -> tuple[nn.Module, float]:
        """Returns the network, trained from this encoder's weights, and the images per second of its training."""
        batch = crops.traversal.global_batch
        network = self.network()
        figures = fit_classifier(
            self.job,
            key,
            network=network,
            crops=crops,
            targets=self.targets,
            lr=rate * batch / LR_BATCH,
            total_steps=total_steps_at(epochs, num_samples=len(crops.rows), global_batch=batch),
            momentum=self.settings.momentum,
            weight_decay=self.settings.weight_decay,
        )
        return network, round(figures.images_per_s, 1)

    def network(self) -> nn.Module:
        """Returns the classifier with this encoder's weights and a new head; made only if some training is not done yet."""
        if self._classifier is None:
            encoder = self.subject.encoder(lambda: self.images.sample(self.images.labelled_rows, seed=self.job.seed))
            self._classifier = RestartedClassifier(self.job, encoder, num_classes=len(self.images.class_names))
        return self._classifier.network()


def plan_parts(job: Job, settings: FinetuneSettings, parts_of: PartsOf) -> list[str]:
    """Returns how much there is to do: images, steps, and time, memory and disk from a few steps of the first encoder."""
    subject, ranks, chosen = job.subjects[0], job.process.world_size, len(settings.grid) > 1
    with open_labelled(job, subject.views) as images:
        parts, tuning = parts_of(images), _Tuning(job, settings, subject, images)
        num_train, num_test = len(images.labelled_rows), len(tuning.test_rows)
        lines = [
            f"{job.task}: {num_train:,} labelled training images of {len(images.class_names):,} classes, {num_test:,} test images, "
            f"{count_text(len(job.subjects), 'encoder')}"
        ]
        trained = tested = 0
        for part in parts:
            fitted, held_out = tuning.split(part)
            split = {"num_fitted": len(fitted), "num_held_out": len(held_out)}
            fits = list(fits_of(len(part.rows), **split, num_test=num_test, settings=settings))
            steps = sum(fit.steps for fit in fits)
            images_of = sum(fit.trained for fit in fits)
            trained, tested = trained + images_of, tested + sum(fit.tested for fit in fits)
            lines.append(
                f"{part.label} of the labels: {len(part.rows):,} images, {count_text(len(fits), 'training')} of each encoder "
                f"({len(fits) - 1} of them to choose), {steps:,} steps of {min(settings.global_batch, len(part.rows)):,}, {images_of:,} images"
            )
        if chosen:
            lines += held_out_notes(num_train, settings.held_out)
        job.announce("measuring a few steps")
        rank_batch = max(1, min(settings.global_batch, max(len(part.rows) for part in parts)) // ranks)
        network, batch = tuning.network(), probe_batch(job, rank_batch) * ranks
        with tuning.crops(images.labelled_rows, global_batch=batch) as crops:
            cost = measure_step(
                job,
                network=network,
                optimizer=build_sgd(network, lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay),
                batches=batches_on_device(job, crops, tuning.targets),
                loss_of=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
            )
    encoders = len(job.subjects)
    return [*lines, *cost.lines(trained=encoders * trained, tested=encoders * tested, ranks=ranks, rank_batch=rank_batch)]


@dataclass(frozen=True)
class FitSize:
    """How much one training is: steps, images in them, and images that are then tested."""

    steps: int
    trained: int
    tested: int


def fits_of(num_rows: int, *, num_fitted: int, num_held_out: int, num_test: int, settings: FinetuneSettings) -> Iterator[FitSize]:
    """Yields the size of every training of one encoder on a part of the labels, the tested one last.

    num_rows: images of the part. num_fitted, num_held_out: as `held_out_beside` splits them. The length of the last training is the longest
    of `epochs`, because it is not chosen yet.
    """

    def fit(rows: int, epochs: int, tested: int) -> FitSize:
        batch = min(settings.global_batch, rows)
        steps = total_steps_at(epochs, num_samples=rows, global_batch=batch)
        return FitSize(steps, steps * batch, tested)

    if len(settings.grid) > 1:
        for _, epochs in settings.grid:
            yield fit(num_fitted, epochs, num_held_out)
    yield fit(num_rows, max(settings.epochs), num_test)


def _run(job: Job, settings: FinetuneSettings) -> TaskResult:
    return tune_parts(job, settings, all_labelled)


def _plan(job: Job, settings: FinetuneSettings) -> list[str]:
    return plan_parts(job, settings, all_labelled)


TASKS = {
    "finetune": Task(
        title="fine-tuning",
        what="the whole network fine-tuned with all labels",
        versions={"paper": FinetuneSettings(), "quick": FinetuneSettings(epochs=(5,), **QUICK)},
        run=_run,
        plan=_plan,
    )
}
