"""Trains and tests every encoder of a job: rates on held-out images, then a training for each seed; compares them on the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastbyol.config.errors import Diverged, require, require_positive
from fastbyol.data.traversal import Indices, seeded_permutation
from fastbyol.evaluation.comparison import Comparison
from fastbyol.evaluation.result_file import SubjectResult, TaskResult
from fastbyol.evaluation.tasks.dense.batches import Source, training_batches
from fastbyol.evaluation.tasks.held_out import Amounts, held_out_rows
from fastbyol.evaluation.tasks.job import Job, Subject
from fastbyol.evaluation.tasks.training import TrainingFigures, train_network
from fastbyol.models.backbone import Backbone
from fastbyol.ranks.process_group import all_reduce_mean
from fastbyol.run.precision import prepare_model

_CALIBRATION_STREAM = 0x63616C69  # "cali" in ASCII
RESAMPLES = 1000
CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class Trial:
    """One training to do: its name in the job, and what differs between the trials of a task.

    train_rows: rows of the task's train images to train on. test_rows: rows of its train images to test on; None: all of its test images.
    """

    key: str
    lr: float
    seed: int
    train_rows: Indices
    test_rows: Indices | None = None


@dataclass(frozen=True)
class Outcome:
    """Result of one encoder's trials: the chosen rate, the parts of its seeds, and the scores on held-out images by rate."""

    lr: float
    parts: list[dict[str, Any]]
    held_out: dict[str, float | str] = field(default_factory=dict)

    def mean(self, name: str) -> float:
        return float(np.mean([part["scores"][name] for part in self.parts]))

    @property
    def seconds(self) -> float:
        return float(sum(part["seconds"] for part in self.parts))


def run_trials(
    job: Job,
    *,
    lrs: Sequence[float],
    seeds: int,
    held_out: Amounts = (),
    num_train: int,
    selected_by: str,
    run: Callable[[Subject, Trial], dict[str, Any]],
) -> dict[str, Outcome]:
    """Returns the outcome of every subject. `run` trains and tests once, and returns a plain dict with 'scores' and 'seconds'.

    With several rates, some random train images are held out, as many as `held_out` says, and each rate is tried on the others. The rate with the
    best score `selected_by` on the held-out images is used for all seeds, on all train images.
    """
    rows, outcomes = np.arange(num_train), {}
    for subject in job.subjects:
        lr, tried = float(lrs[0]), {}
        if len(lrs) > 1:
            rest, held = held_out_rows(rows, held_out=held_out, seed=job.seed)
            for each in lrs:
                trial = Trial(f"{subject.name} rate {each:g}", each, job.seed, rest, held)
                part = job.once(trial.key, lambda s=subject, t=trial: _or_diverged(run, s, t))
                tried[f"{each:g}"] = part.get("diverged") or part["scores"][selected_by]
            good = {float(name): value for name, value in tried.items() if isinstance(value, float)}
            if not good:
                raise Diverged(f"{job.task}: {subject.title}: the loss is not finite at any of the rates {', '.join(tried)}")
            lr = max(good, key=lambda each: good[each])
        parts = []
        for number in range(seeds):
            trial = Trial(f"{subject.name} seed {job.seed + number}", lr, job.seed + number, rows)
            parts.append(job.once(trial.key, lambda s=subject, t=trial: run(s, t)))
        outcomes[subject.name] = Outcome(lr, parts, tried)
    return outcomes


def _or_diverged(run: Callable[[Subject, Trial], dict[str, Any]], subject: Subject, trial: Trial) -> dict[str, Any]:
    try:
        return run(subject, trial)
    except Diverged as error:
        return {"diverged": str(error)}


def spread_rows(num: int, count: int) -> Indices:
    """Returns `count` rows spread evenly over `num`, all of them for 0."""
    return np.arange(num) if not 0 < count < num else np.linspace(0, num - 1, count).round().astype(np.int64)


# ---- rates


def check_drops(drop_at: tuple[float, ...], drop: float) -> None:
    """Raises UserError unless the rate falls at increasing shares of the training."""
    require(all(0 < a <= 1 for a in drop_at) and list(drop_at) == sorted(drop_at), "--drop_at", drop_at, "increasing shares in (0, 1]")
    require_positive("--drop", drop)


def drop_without_effect(drop_at: tuple[float, ...]) -> dict[str, str]:
    """Returns why --drop has no effect, by its name, where the rate never falls; else {}."""
    return {} if drop_at else {"drop": "without --drop_at"}


def rate_at(step: int, *, base: float, total_steps: int, drop_at: tuple[float, ...], drop: float, warmup_steps: int = 0) -> float:
    """Returns the rate of a step: `base`, times `drop` at each share of the training in `drop_at`; linear from 1/1000 in the warm-up."""
    passed = sum(step >= round(share * total_steps) for share in drop_at)
    warm = 1.0 if step >= warmup_steps else 1e-3 + (1 - 1e-3) * step / warmup_steps
    return base * drop**passed * warm


class Schedule(Protocol):
    """The part of a task's settings that says how long a training is, and how its rate falls."""

    @property
    def steps(self) -> int: ...

    @property
    def batch_images(self) -> int: ...

    @property
    def drop_at(self) -> tuple[float, ...]: ...

    @property
    def drop(self) -> float: ...


def train_trial(
    job: Job,
    trial: Trial,
    settings: Schedule,
    *,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[nn.Module, Any], Tensor],
    source: Source,
    collate: Callable[[list[Any]], Any],
    warmup_steps: int = 0,
) -> TrainingFigures:
    """Trains the network in place on the trial's images, as `train_network` does."""
    rate = partial(
        rate_at, base=trial.lr, total_steps=settings.steps, drop_at=settings.drop_at, drop=settings.drop, warmup_steps=warmup_steps
    )
    return train_network(
        job,
        trial.key,
        network=network,
        optimizer=optimizer,
        lr_at=rate,
        batches=training_batches(job, source, rows=trial.train_rows, global_batch=settings.batch_images, seed=trial.seed, collate=collate),
        loss_of=loss_of,
        total_steps=settings.steps,
        step_images=settings.batch_images,
    )


def mean_over_pixels(loss: Tensor, counted: Tensor) -> Tensor:
    """Returns the sum of a loss over this rank's counted pixels divided by the ranks' mean number of them; 0 where none counts.

    The mean over ranks, which DDP takes, is then the mean over all pixels: those of a rank with few do not weigh more.
    """
    # Torch's mean over no pixel is NaN; over many ranks their mean number may be below 1.
    return loss / all_reduce_mean(counted.sum().float()).clamp(min=1e-3)


# ---- networks and their images


def normalised(images: Tensor, subject: Subject) -> Tensor:
    """Returns uint8 images (N, 3, H, W) as the encoder takes them, channels last."""
    x = (images.float() / 255).contiguous(memory_format=torch.channels_last)
    # Per channel with Python numbers: a tensor made from a list would be a synchronising copy to the device.
    for channel, mean, std in zip(x.unbind(1), subject.views.mean, subject.views.std, strict=True):
        channel.sub_(mean).div_(std)
    return x


def calibration_images(read: Callable[[int], Tensor], subject: Subject, *, num_train: int, seed: int, size_px: int) -> Tensor:
    """Returns some random training images, normalised: for the batch norms of an untrained encoder."""
    count = CALIBRATION_IMAGES if size_px <= 128 else CALIBRATION_IMAGES // 8
    order = seeded_permutation(num_train, _CALIBRATION_STREAM, seed)[:count]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return normalised(torch.stack([read(int(row)) for row in order]), subject)


def sgd(network: nn.Module, backbone: Backbone, *, encoder_rate: float, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    """Returns SGD over the network; the backbone's rate is `encoder_rate` times the others', and for 0 it is frozen here."""
    if not encoder_rate:
        backbone.freeze()
    inner = {id(parameter) for parameter in backbone.parameters()}
    groups: list[dict[str, Any]] = [{"params": [p for p in network.parameters() if id(p) not in inner]}]
    if encoder_rate:
        groups.append({"params": list(backbone.parameters()), "lr_factor": encoder_rate})
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, weight_decay=weight_decay)


def prepared(network: nn.Module, job: Job) -> nn.Module:
    """Moves the network to the job's device and memory layout; compiled where the job's precision says so."""
    return prepare_model(network, job.precision, device=job.process.device)


# ---- results and their comparison


def trial_result(
    job: Job,
    outcomes: Mapping[str, Outcome],
    *,
    columns: Mapping[str, str],
    evidence: Callable[[dict[str, Any]], Any],
    compare: Callable[[list[Any], list[Any]], Comparison],
    details: Callable[[Outcome, list[Any]], dict[str, Any]],
    **parts: Any,
) -> TaskResult:
    """Returns the result of a job: every encoder's mean scores over its seeds, and the first one compared with the others.

    Args:
        job: its encoders are those of `outcomes`.
        outcomes: of `run_trials`.
        columns: titles of the scores, by name.
        evidence: a trained and tested part -> what the test images say, for `compare` and `details`.
        compare: evidence of each seed of the first encoder and of another one -> their comparison.
        details: further figures of an encoder.
        parts: the other fields of the result.
    """
    found = {name: [evidence(part) for part in outcome.parts] for name, outcome in outcomes.items()}
    first, *others = (subject.name for subject in job.subjects)
    subjects = {
        subject.name: SubjectResult(
            subject.title,
            {name: outcome.mean(name) for name in columns},
            outcome.seconds,
            chosen={"lr": outcome.lr},
            details={
                "seeds": [part["scores"] for part in outcome.parts],
                "images_per_s": [part["images_per_s"] for part in outcome.parts],
                **details(outcome, found[subject.name]),
            },
        )
        for subject in job.subjects
        for outcome in (outcomes[subject.name],)
    }
    comparisons = {name: compare(found[first], found[name]) for name in others}
    return job.result(columns=dict(columns), subjects=subjects, comparisons=comparisons, **parts)


Score = Callable[[NDArray[np.float64]], float]
"""Returns the score of a weighted set of images from the weight of each, (N,); larger is better."""


def compare_scores(
    subject: Sequence[Score], baseline: Sequence[Score], *, alone: tuple[NDArray[Any], NDArray[Any]], resamples: int = RESAMPLES
) -> Comparison:
    """Compares the mean score over seeds of two encoders on the same images; the interval is a bootstrap over the images.

    subject, baseline: of each seed. alone: (N,) figure of each image by itself; gained and lost are the images where it is higher, or lower.
    """
    num = len(alone[0])

    def difference(weights: NDArray[np.float64]) -> float:
        return float(np.mean([score(weights) for score in subject]) - np.mean([score(weights) for score in baseline]))

    generator = np.random.default_rng(0)
    drawn = [difference(generator.multinomial(num, np.full(num, 1 / num)).astype(np.float64)) for _ in range(resamples)]
    middle = difference(np.ones(num))
    # Centred on what was counted: a resample lacks some images of rare classes, which shifts a mean over classes.
    low, high = np.nanquantile(drawn, [0.025, 0.975]) - np.nanmean(drawn) + middle
    gained, lost = int((alone[0] > alone[1]).sum()), int((alone[0] < alone[1]).sum())
    return Comparison(middle, float(low), float(high), gained, lost)


def compare_statistics(
    subject: Sequence[NDArray[Any]], baseline: Sequence[NDArray[Any]], score: Callable[[NDArray[Any], NDArray[np.float64]], float]
) -> Comparison:
    """Compares encoders by a score of weighted sums: `score(statistics, weights)` with a row of statistics for each image, (N, ...)."""
    pairs = [[np.asarray(each, dtype=np.float64) for each in many] for many in (subject, baseline)]
    one = np.ones(1)
    alone = [np.array([np.mean([score(each[row : row + 1], one) for each in many]) for row in range(len(many[0]))]) for many in pairs]
    mine, others = ([partial(score, each) for each in many] for many in pairs)
    return compare_scores(mine, others, alone=(alone[0], alone[1]))
