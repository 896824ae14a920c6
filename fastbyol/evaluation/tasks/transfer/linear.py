"""Transfer by a linear classifier: l2-regularised logistic regression on frozen features (appendix D.2 of the paper)."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbyol.config.errors import UserError, require, require_at_least
from fastbyol.data.backends.source import Indices
from fastbyol.data.loader import ImageLoader
from fastbyol.data.traversal import seeded_permutation
from fastbyol.evaluation.subjects import CALIBRATION_IMAGES
from fastbyol.evaluation.tasks.job import Job, Subject
from fastbyol.evaluation.tasks.scoring import outputs, rank_share
from fastbyol.evaluation.tasks.training import TaskStopped
from fastbyol.evaluation.tasks.transfer.metrics import METRICS, packed_hits
from fastbyol.evaluation.tasks.transfer.opening import SetRefused, TransferImages, on_every_rank
from fastbyol.evaluation.tasks.transfer.regression import SWEEP_TOLERANCE, LogisticRegression
from fastbyol.host.cores import default_workers
from fastbyol.host.durable_files import durable_file
from fastbyol.host.progress import Progress
from fastbyol.host.quantities import bytes_text, duration_text
from fastbyol.ranks.process_group import gather_everywhere, gather_on_main

SHARD_IMAGES = 4096
"""Images of a part of the features, which is kept on the disk: a stopped job extracts no other part again."""
_PROBE_IMAGES = 64
_FITTED_EVALUATIONS = 40
"""Evaluations of a fit, for the estimate; small sets took 13 to 27 in the sweep."""


@dataclass(frozen=True)
class TransferLinearSettings:
    """The defaults are the paper's (appendix D.2)."""

    sets: tuple[str, ...] = ("all",)
    """all: every set of the paper that is below --data; or names of sets and of folders of your own, separated by commas"""
    download: bool = False
    """yes: let torchvision download the missing sets that it can"""
    penalties: int = 45
    """number of log-spaced l2 penalties, from which one is chosen on the validation images"""
    lowest: float = 1e-6
    """smallest penalty, in sum of losses + l2 / 2 |weight|^2"""
    highest: float = 1e5
    """largest penalty"""
    max_steps: int = 1000
    """largest number of L-BFGS steps in one fit (the paper names no limit)"""

    def __post_init__(self) -> None:
        require_at_least("penalties", self.penalties, 1)
        require(0 < self.lowest <= self.highest < math.inf, "lowest", self.lowest, f"above 0 and at most highest = {self.highest:g}")
        require_at_least("max_steps", self.max_steps, 1)

    @property
    def grid(self) -> list[float]:
        """The penalties from strong to weak, so that each fit starts from a smoother solution."""
        return np.geomspace(self.highest, self.lowest, self.penalties).tolist()


def image_loader(job: Job, subject: Subject, images: TransferImages, *, crop_share: float) -> ImageLoader:
    """Returns a loader of all images of the set, centre-cropped as the subject's encoder takes them."""
    workers = job.workers or default_workers()
    return ImageLoader(images.open_source(), views=subject.views, batch=job.batch, workers=workers, crop_share=crop_share)


def sample(loader: ImageLoader, rows: Indices, *, seed: int) -> Tensor:
    """Returns a random sample of these images (N, 3, S, S): for the batch norms of an untrained encoder."""
    order = seeded_permutation(len(rows), seed)[:CALIBRATION_IMAGES]
    return torch.cat([batch.image for batch in loader.batches_of(rows[order])])


def evaluate_linear(job: Job, settings: TransferLinearSettings, images: TransferImages, subject: Subject) -> dict[str, Any]:
    """Returns the test score of one encoder on one set, what was chosen, and how the fits went."""
    start = time.perf_counter()
    key = f"{images.key} {subject.name}"
    # The paper resizes the short side to 224 and crops the centre: the whole short side is seen, unlike in ImageNet's test crop of 7/8.
    with image_loader(job, subject, images, crop_share=1.0) as loader:
        encoder = on_every_rank(lambda: subject.encoder(partial(sample, loader, images.train, seed=job.seed)))
        # The few test images first: one that is damaged is found before hours of training images.
        parts = {split: cached_features(job, f"{key} {split}", encoder, loader, getattr(images, split)) for split in reversed(images.sizes)}
    found: dict[str, Any] = {}
    error: Exception | None = None
    if job.process.is_main:
        features = {split: torch.from_numpy(np.concatenate([np.load(path) for path in paths])) for split, paths in parts.items()}
        try:
            found = choose_and_test(job, settings, images, features, what=key)
        except (UserError, TaskStopped) as raised:
            error = raised
    # Only rank 0 fits. The other ranks wait for it here, and must end as it does.
    failed = gather_everywhere(error)
    if failed[0] is not None:
        raise failed[0] if isinstance(failed[0], TaskStopped) else SetRefused(str(failed[0]))
    if job.process.is_main:
        for path in (path for paths in parts.values() for path in paths):
            path.unlink()
    return found | {"seconds": time.perf_counter() - start}


def cached_features(job: Job, key: str, encoder: nn.Module, loader: ImageLoader, rows: Indices) -> list[Path]:
    """Extracts the features of these images, in parts, each shared by the ranks; returns rank 0's files in order: (n, D) float32.

    Parts that an earlier start of the job has written are not extracted again. Raises SetRefused if an image cannot be read or a feature is not
    finite, TaskStopped if a signal has arrived.
    """
    process = job.process
    encoder.to(process.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    paths = []
    with ExitStack() as leaving:
        progress = leaving.enter_context(Progress(key, len(rows), unit="images")) if process.is_main else None
        for number, first in enumerate(range(0, len(rows), SHARD_IMAGES)):
            part = rows[first : first + SHARD_IMAGES]
            paths.append(job.part(f"{key} {number:04d}", ".npy"))
            is_there = gather_everywhere(process.is_main and _holds(paths[-1], len(part)))[0]
            if not is_there:
                shares = gather_on_main(on_every_rank(partial(features_of, job, encoder, loader, rank_share(part, job))))
                if process.is_main:
                    _write(paths[-1], torch.cat(shares))
            if progress is not None:
                progress.reach(min(first + SHARD_IMAGES, len(rows)))
            if any(gather_everywhere(job.stop.requested)):
                raise TaskStopped(
                    f"{job.task}: stopped while extracting features of {key}, those so far are kept; the same command goes on"
                )
    return paths


def features_of(job: Job, encoder: nn.Module, loader: ImageLoader, rows: Indices) -> Tensor:
    """Returns the encoder's output for these images (N, D), float32 on the CPU. Raises UserError if it is not finite."""
    empty = torch.empty((0, int(encoder.feature_dim)))  # type: ignore[call-overload]
    features = torch.cat([empty, *(output for output, _ in outputs(job, encoder, loader, rows))])
    if not bool(torch.isfinite(features).all()):
        raise UserError("the encoder's features are not finite: the run diverged; take an earlier checkpoint or lower optim.base_lr")
    return features


def choose_and_test(
    job: Job, settings: TransferLinearSettings, images: TransferImages, features: dict[str, Tensor], *, what: str
) -> dict[str, Any]:
    """Chooses the penalty on the validation images, fits on them and the training images, and scores the test images once."""
    device, num_classes, metric = job.process.device, len(images.class_names), METRICS[images.metric]
    labels = {split: torch.from_numpy(images.labels[getattr(images, split)]) for split in features}
    regression = LogisticRegression(features["train"], labels["train"], num_classes=num_classes, device=device)
    scores: dict[float, float] = {}
    unfinished = 0
    with Progress(f"{what} penalties", settings.penalties + 1, unit="fits") as progress:
        for l2 in settings.grid:
            fitted = regression.fit(l2, max_steps=settings.max_steps, tolerance=SWEEP_TOLERANCE)
            unfinished += not fitted.converged
            scores[l2] = metric(fitted.scores(features["valid"]).cpu(), labels["valid"])
            progress.advance()
            if job.stop.requested:
                raise TaskStopped(
                    f"{job.task}: stopped while choosing the penalty for {what}; the features are kept, the same command goes on"
                )
        # On a tie the strongest penalty is chosen.
        chosen = max(scores, key=lambda l2: (scores[l2], l2))
        del regression
        whole = LogisticRegression(
            torch.cat([features["train"], features["valid"]]),
            torch.cat([labels["train"], labels["valid"]]),
            num_classes=num_classes,
            device=device,
        )
        fitted = whole.fit(chosen, max_steps=10 * settings.max_steps)
        progress.advance()
    tested = fitted.scores(features["test"]).cpu()
    return {
        "score": metric(tested, labels["test"]),
        "hits": packed_hits(tested, labels["test"]),
        "chosen": {"l2": chosen, "valid": scores[chosen]},
        "converged": fitted.converged,
        "evaluations": fitted.evaluations,
        "unfinished_fits": unfinished,
        "valid_scores": {f"{l2:.3g}": score for l2, score in scores.items()},
    }


def plan_linear(job: Job, settings: TransferLinearSettings, images: TransferImages) -> tuple[list[str], float]:
    """Returns what one set takes, and its seconds here, from a forward pass over some of its images and a few evaluations of the objective."""
    num, num_classes = sum(images.sizes.values()), len(images.class_names)
    subject = job.subjects[0]
    with image_loader(job, subject, images, crop_share=1.0) as loader:
        encoder = subject.encoder(partial(sample, loader, images.train, seed=job.seed))
        encoder.to(job.process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        probe = images.train[:_PROBE_IMAGES]
        features_of(job, encoder, loader, probe)
        start = time.perf_counter()
        feature = features_of(job, encoder, loader, probe)
        image_s = (time.perf_counter() - start) / len(probe)
    rows = len(images.train) + len(images.valid)
    # Random features of the real number and size: what an evaluation costs does not depend on their values.
    dims, some = feature.shape[1], min(rows, 16 * _PROBE_IMAGES)
    label = torch.from_numpy(images.labels[images.train[np.arange(some) % len(images.train)]])
    regression = LogisticRegression(torch.randn(some, dims), label, num_classes=num_classes, device=job.process.device)
    start = time.perf_counter()
    evaluations = regression.fit(1.0, max_steps=5, tolerance=0.0).evaluations
    evaluation_s = (time.perf_counter() - start) / evaluations * rows / some
    subjects, ranks = len(job.subjects), job.process.world_size
    extract_s, fit_s = num * image_s / ranks * subjects, (settings.penalties + 1) * _FITTED_EVALUATIONS * evaluation_s * subjects
    lines = [
        f"{num:,} images x {subjects} encoders; {settings.penalties + 1} fits each; about {duration_text(extract_s + fit_s)}: "
        f"{duration_text(extract_s)} for features ({1 / image_s:.3g} images/s of a rank, measured), {duration_text(fit_s)} for "
        f"fits of {_FITTED_EVALUATIONS} evaluations ({1000 * evaluation_s:.3g} ms each, measured on {some:,} rows)",
        f"disk {bytes_text(4 * num * dims)} while it runs, memory of rank 0 about {bytes_text(4 * num * dims + 8 * rows * dims + 8 * dims**2)}",
    ]
    return lines, extract_s + fit_s


def _holds(path: Path, rows: int) -> bool:
    try:
        return len(np.load(path, mmap_mode="r", allow_pickle=False)) == rows
    except (OSError, ValueError, EOFError):
        return False


def _write(path: Path, features: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable_file(path) as file:
        np.save(file, features.numpy(), allow_pickle=False)
