"""Transfer by fine-tuning: the whole network trained from the checkpoint's weights, rate and weight decay chosen on validation images
(appendix D.3 of the paper).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastbyol.config.errors import Diverged, require, require_at_least, require_positive
from fastbyol.data.backends.source import Indices
from fastbyol.data.loader import CropLoader, ImageLoader
from fastbyol.data.traversal import Traversal
from fastbyol.evaluation.tasks.classifier import (
    Classifier,
    RestartedClassifier,
    batches_on_device,
    build_sgd,
    fit_classifier,
    scores_of,
)
from fastbyol.evaluation.tasks.estimate import StepCost, measure_step, probe_batch
from fastbyol.evaluation.tasks.images import batch_notes, crop_and_flip, divided_batch
from fastbyol.evaluation.tasks.job import Job, Subject
from fastbyol.evaluation.tasks.soundness import require_decodable
from fastbyol.evaluation.tasks.training import raise_if_stopped
from fastbyol.evaluation.tasks.transfer.linear import image_loader, sample
from fastbyol.evaluation.tasks.transfer.metrics import METRICS, packed_hits
from fastbyol.evaluation.tasks.transfer.opening import SetRefused, TransferImages, on_every_rank
from fastbyol.host.cores import default_workers

TEST_SHARE = 224 / 256
"""Short side 256, centre 224, scaled to other sizes: the centred square of 7/8 of the short side."""


def _spaced(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in np.geomspace(low, high, count))


@dataclass(frozen=True)
class TransferFinetuneSettings:
    """The defaults are the paper's (appendix D.3), and SimCLR's (appendix B.8) for training from random weights."""

    sets: tuple[str, ...] = ("all",)
    """all: every set of the paper that is below --data; or names of sets and of folders of your own, separated by commas"""
    download: bool = False
    """yes: let torchvision download the missing sets that it can"""
    steps: int = 20_000
    """length of each training"""
    global_batch: int = 256
    """images per step on all devices together"""
    rates: tuple[float, ...] = _spaced(1e-4, 1e-1, 7)
    """learning rates to choose from"""
    decays: tuple[float, ...] = (*_spaced(1e-6, 1e-3, 7), 0.0)
    """weight decays to choose from; each is divided by the learning rate"""
    momentum: float = 0.9
    """Nesterov momentum of SGD"""
    smallest_crop: float = 0.08
    """area of the smallest random crop, as a share of the image's (appendix B)"""
    scratch_steps: int = 40_000
    """length of each training of the untrained network"""
    scratch_rates: tuple[float, ...] = _spaced(1e-3, 1.0, 7)
    """learning rates to choose from for the untrained network"""
    scratch_decays: tuple[float, ...] = _spaced(1e-5, 10**-1.5, 8)
    """weight decays to choose from for the untrained network"""

    def __post_init__(self) -> None:
        for name in ("steps", "scratch_steps", "global_batch"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("rates", "decays", "scratch_rates", "scratch_decays"):
            values = getattr(self, name)
            require(len(values) > 0 and len(set(values)) == len(values), name, values, "one or several different numbers")
        for rate in (*self.rates, *self.scratch_rates):
            require_positive("rates", rate)
        for decay in (*self.decays, *self.scratch_decays):
            require_at_least("decays", decay, 0)
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        require(0 < self.smallest_crop <= 1, "smallest_crop", self.smallest_crop, "in (0, 1]")

    def without_effect(self, encoders: Sequence[str]) -> dict[str, str]:
        """Returns why each option that these encoders don't use has no effect."""
        scratch, tuned = ("scratch_steps", "scratch_rates", "scratch_decays"), ("steps", "rates", "decays")
        without = dict.fromkeys(scratch, "without --init untrained") if "untrained" not in encoders else {}
        return without | (dict.fromkeys(tuned, "on an untrained network alone") if set(encoders) == {"untrained"} else {})

    @property
    def tuned(self) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
        """Steps, rates and decays of trained encoders."""
        return self.steps, self.rates, self.decays

    @property
    def scratch(self) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
        """Steps, rates and decays of the untrained network."""
        return self.scratch_steps, self.scratch_rates, self.scratch_decays

    def grid(self, subject: Subject) -> list[tuple[float, float]]:
        """All pairs of rate and weight decay for this encoder, the decay as the paper counts it."""
        _, rates, decays = self.scratch if subject.name == "untrained" else self.tuned
        return [(rate, decay) for rate in rates for decay in decays]

    def steps_for(self, subject: Subject) -> int:
        return self.scratch_steps if subject.name == "untrained" else self.steps


def bn_momentum(steps_per_epoch: float) -> float:
    """Returns torch's momentum of the running batch-norm averages: 1 minus the paper's decay, which is max(1 - 10 / s, 0.9)."""
    return min(10.0 / steps_per_epoch, 0.1)


def set_loss(labels: np.ndarray) -> Any:
    """Returns the loss of logits and targets: cross-entropy, or binary cross-entropies of VOC2007's classes without the difficult ones."""
    return F.cross_entropy if labels.ndim == 1 else _binary_loss


def _binary_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Returns the mean over the images of the sum over the classes; a class whose truth is 0 in an image does not count there."""
    each = F.binary_cross_entropy_with_logits(logits, (truth > 0).to(logits.dtype), reduction="none")
    return (each * (truth != 0)).sum(1).mean()


def evaluate_finetune(job: Job, settings: TransferFinetuneSettings, images: TransferImages, subject: Subject) -> dict[str, Any]:
    """Returns the test score of one encoder on one set, and every trial. It keeps each finished training in the job."""
    start = time.perf_counter()
    with image_loader(job, subject, images, crop_share=TEST_SHARE) as loader:
        later = ("validation and test images", loader, np.concatenate([images.valid, images.test]))
        on_every_rank(partial(require_decodable, job, f"{images.key} images", later))
        tuning = _Tuning(job, settings, subject, images, loader)
        trials = tuning.trials(settings.grid(subject))
        finished = [trial for trial in trials if trial["valid"] is not None]
        if trials and not finished:
            raise Diverged(f"{images.name}: {subject.title} diverged with every one of the {len(trials)} pairs; give lower --rates")
        ((rate, decay), *_) = settings.grid(subject)
        # On a tie max takes the first: the smallest rate, then the settings' first decay.
        chosen = max(finished, key=lambda trial: trial["valid"]) if trials else {"rate": rate, "decay": decay, "valid": None}
        pair = {"rate": chosen["rate"], "decay": chosen["decay"]}
        key = f"{images.key} {subject.name} refit rate {pair['rate']:g} decay {pair['decay']:g}"
        tested = job.once(key, partial(tuning.refit, key, **pair))
    seconds = sum(trial["seconds"] for trial in trials) + tested["seconds"]
    nums = (len(images.train), len(images.train) + len(images.valid))
    return {
        "score": tested["score"],
        "hits": tested["hits"],
        "chosen": pair | {"valid": chosen["valid"]},
        "trials": trials,
        "notes": batch_notes(job, settings.global_batch, nums[0 if trials else 1 :]),
        "images_per_s": tested["images_per_s"],
        "seconds": max(seconds, time.perf_counter() - start),
    }


def crop_loader(
    job: Job, subject: Subject, images: TransferImages, rows: Indices, *, global_batch: int, smallest_crop: float
) -> CropLoader:
    """Returns a loader of random crops and flips of these images; a batch larger than their number is reduced to it."""
    process = job.process
    batch = divided_batch(global_batch, len(rows), ranks=process.world_size)
    if not batch:
        raise SetRefused(f"{images.name}: {len(rows)} images are fewer than the {process.world_size} ranks")
    walk = Traversal(len(rows), job.seed, batch, rank=process.rank, world_size=process.world_size)
    output = "uint8" if process.device.type == "cuda" else "float32"
    views, workers = crop_and_flip(subject.views, smallest=smallest_crop), job.workers or default_workers()
    return CropLoader(images.open_source(), views=views, rows=rows, traversal=walk, output=output, workers=workers)


class _Tuning:
    """The trainings of one encoder on one set."""

    def __init__(self, job: Job, settings: TransferFinetuneSettings, subject: Subject, images: TransferImages, loader: ImageLoader) -> None:
        self.job, self.settings, self.subject, self.images, self.loader = job, settings, subject, images, loader
        self.targets = torch.from_numpy(images.labels)
        self._classifier: RestartedClassifier | None = None

    def trials(self, grid: list[tuple[float, float]]) -> list[dict[str, Any]]:
        """Returns the trial of every pair, or none if there is only one: nothing is chosen then. Each is kept in the job."""
        if len(grid) == 1:
            return []
        found = []
        with self.crops(self.images.train) as crops:
            for rate, decay in grid:
                key = f"{self.images.key} {self.subject.name} rate {rate:g} decay {decay:g}"
                found.append(self.job.once(key, partial(self.trial, key, crops, rate=rate, decay=decay)))
                raise_if_stopped(self.job)
        return found

    def trial(self, key: str, crops: CropLoader, *, rate: float, decay: float) -> dict[str, Any]:
        """Trains with this pair on the training images; 'valid' is the score on the validation images, None if the training diverged."""
        start, valid = time.perf_counter(), None
        try:
            network, _ = self._fitted(key, crops, rate=rate, decay=decay)
        except Diverged as error:
            self.job.announce(str(error))
        else:
            valid = METRICS[self.images.metric](*self._scored(network, self.images.valid))
        return {"rate": rate, "decay": decay, "valid": valid, "seconds": round(time.perf_counter() - start, 3)}

    def refit(self, key: str, *, rate: float, decay: float) -> dict[str, Any]:
        """Trains on the training and validation images and scores the test images."""
        start = time.perf_counter()
        rows = np.sort(np.concatenate([self.images.train, self.images.valid]))
        with self.crops(rows) as crops:
            network, images_per_s = self._fitted(key, crops, rate=rate, decay=decay)
        scores, truth = self._scored(network, self.images.test)
        found = {"score": METRICS[self.images.metric](scores, truth), "hits": packed_hits(scores, truth)}
        return {**found, "images_per_s": images_per_s, "seconds": round(time.perf_counter() - start, 3)}

    def crops(self, rows: Indices) -> CropLoader:
        """Returns a loader of random views of these images in batches of the settings' size."""
        how = {"global_batch": self.settings.global_batch, "smallest_crop": self.settings.smallest_crop}
        return crop_loader(self.job, self.subject, self.images, rows, **how)

    def _fitted(self, key: str, crops: CropLoader, *, rate: float, decay: float) -> tuple[nn.Module, float]:
        network = self.network(steps_per_epoch=len(crops.rows) / self.settings.global_batch)
        figures = fit_classifier(
            self.job,
            key,
            network=network,
            crops=crops,
            targets=self.targets,
            lr=rate,
            total_steps=self.settings.steps_for(self.subject),
            momentum=self.settings.momentum,
            weight_decay=decay / rate,
            loss=set_loss(self.images.labels),
        )
        return network, round(figures.images_per_s, 1)

    def _scored(self, network: nn.Module, rows: Indices) -> tuple[Tensor, Tensor]:
        """Returns the network's scores of these images and what they should be."""
        return scores_of(self.job, network, self.loader, rows=rows), self.targets[torch.from_numpy(rows)]

    def network(self, *, steps_per_epoch: float) -> Classifier:
        """Returns the classifier with this encoder's weights and a new head."""
        if self._classifier is None:
            encoder = on_every_rank(lambda: self.subject.encoder(partial(sample, self.loader, self.images.train, seed=self.job.seed)))
            self._classifier = RestartedClassifier(self.job, encoder, num_classes=len(self.images.class_names))
        network = self._classifier.network()
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = bn_momentum(steps_per_epoch)
        return network


def measure_finetune(job: Job, settings: TransferFinetuneSettings, images: TransferImages) -> StepCost:
    """Returns what a training step of the first encoder costs here, from a few real ones."""
    subject, ranks = job.subjects[0], job.process.world_size
    batch = probe_batch(job, max(1, settings.global_batch // ranks)) * ranks
    with (
        image_loader(job, subject, images, crop_share=TEST_SHARE) as loader,
        crop_loader(job, subject, images, images.train, global_batch=batch, smallest_crop=settings.smallest_crop) as crops,
    ):
        tuning = _Tuning(job, settings, subject, images, loader)
        network, loss = tuning.network(steps_per_epoch=1.0), set_loss(images.labels)
        return measure_step(
            job,
            network=network,
            optimizer=build_sgd(network, lr=0.0, momentum=settings.momentum),
            batches=batches_on_device(job, crops, tuning.targets),
            loss_of=lambda model, batch: loss(model(batch[0]), batch[1]),
        )


def plan_finetune(job: Job, settings: TransferFinetuneSettings, images: TransferImages, cost: StepCost) -> tuple[list[str], float]:
    """Returns how much there is to do on one set, and its seconds, at the cost of a step that was measured."""
    batch = min(settings.global_batch, len(images.train))
    steps = trained = tested = trainings = 0
    for subject in job.subjects:
        pairs = len(settings.grid(subject))
        pairs = pairs if pairs > 1 else 0  # nothing to choose
        trainings += pairs + 1
        steps += (pairs + 1) * settings.steps_for(subject)
        tested += pairs * len(images.valid) + len(images.test)
    trained = steps * batch
    ranks = job.process.world_size
    head = f"{trainings} trainings of {len(job.subjects)} encoders, {steps:,} steps of {batch:,}, {trained:,} images; "
    first, *rest = cost.lines(trained=trained, tested=tested, ranks=ranks, rank_batch=max(1, batch // ranks))
    return [head + first, *rest], cost.seconds(trained=trained, tested=tested, ranks=ranks)
