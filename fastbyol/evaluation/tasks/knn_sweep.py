"""k-nearest neighbours over a grid of k, temperature and votes, chosen on held-out training images; the ranks share keys and images.

The paper has no kNN evaluation. Weighted votes with temperature 0.07 are those of InstDisc (Wu et al. 2018, k = 200) and DINO (Caron et
al. 2021, k of 10, 20, 100, 200).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbyol.config.errors import UserError, require
from fastbyol.data.backends.source import Indices
from fastbyol.data.loader import ImageLoader
from fastbyol.evaluation.features import Features
from fastbyol.evaluation.knn import nearest
from fastbyol.evaluation.protocols import top_k_hits
from fastbyol.evaluation.result_file import SubjectResult, TaskResult
from fastbyol.evaluation.splits import renumbered
from fastbyol.evaluation.tasks.estimate import estimate_lines, seconds_per_image
from fastbyol.evaluation.tasks.held_out import check_amounts, held_out_rows
from fastbyol.evaluation.tasks.images import LabelledImages, open_labelled
from fastbyol.evaluation.tasks.job import Job, Subject
from fastbyol.evaluation.tasks.registry import Task
from fastbyol.evaluation.tasks.scoring import Hits, compare_with_first, outputs, packed, rank_share, unpacked
from fastbyol.ranks.process_group import all_gather_rows, gather_everywhere

VOTES = ("weighted", "plain")


@dataclass(frozen=True)
class KnnSettings:
    """A grid of kNN classifiers by cosine similarity."""

    neighbours: tuple[int, ...] = (1, 5, 10, 20, 50, 100, 200)
    """Values of k."""
    temperatures: tuple[float, ...] = (0.05, 0.07, 0.1, 0.2)
    """Temperatures of weighted votes exp(similarity / temperature)."""
    votes: tuple[str, ...] = VOTES
    """weighted, plain, or both."""
    held_out: tuple[float, ...] = (0.1,)
    """Training images on which the classifier is chosen: a share below 1, or a number."""

    def __post_init__(self) -> None:
        require(bool(self.neighbours) and min(self.neighbours) >= 1, "neighbours", self.neighbours, "at least one number, each at least 1")
        require(bool(self.temperatures) and min(self.temperatures) > 0, "temperatures", self.temperatures, "at least one number above 0")
        require(bool(self.votes) and set(self.votes) <= set(VOTES), "votes", self.votes, f"of {', '.join(VOTES)}")
        check_amounts("held_out", self.held_out)

    def without_effect(self, _: Sequence[str]) -> dict[str, str]:
        """Returns why each option that these settings don't use has no effect."""
        return {} if "weighted" in self.votes else {"temperatures": "on plain votes"}

    def grid(self) -> list[tuple[int, float | None]]:
        """Returns (k, temperature) of each classifier, temperature None for plain votes; fewer neighbours first."""
        temperatures = [*(self.temperatures if "weighted" in self.votes else ()), *((None,) if "plain" in self.votes else ())]
        return [(k, temperature) for k in sorted(set(self.neighbours)) for temperature in temperatures]


def run(job: Job, settings: KnnSettings) -> TaskResult:
    """Scores each encoder with the classifier that does best on held-out training images."""
    results: dict[str, SubjectResult] = {}
    hits: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    notes: list[str] = []
    for subject in job.subjects:
        with open_labelled(job, subject.views) as images:
            fit, held_out = held_out_rows(images.labelled_rows, held_out=settings.held_out, seed=job.seed)
            grid = [(k, temperature) for k, temperature in settings.grid() if k <= len(fit)]
            if not grid:
                raise UserError(f"--neighbours {min(settings.neighbours)}: there are only {len(fit)} training images to choose from")
            if left_out := sorted({k for k, _ in settings.grid() if k > len(fit)}):
                notes = [f"k of {', '.join(map(str, left_out))} left out: there are {len(fit)} training images to choose from"]
            sizes = {"train": len(fit), "held out": len(held_out), "val": len(images.test_rows)}
            start = time.monotonic()
            part = job.once(subject.name, lambda: _scored(job, subject, images, fit, held_out, grid))  # noqa: B023
            best = max(grid, key=lambda one: part["grid"][_name(one)]["held_out"])  # on a tie the first, which has the fewest neighbours
            hits[subject.name] = unpacked(part["hits"][_name(best)])
            results[subject.name] = SubjectResult(
                title=subject.title,
                scores={key: part["grid"][_name(best)][key] for key in ("top1", "top5")},
                seconds=round(time.monotonic() - start, 3),
                chosen={"classifier": _name(best), "held_out_top1": part["grid"][_name(best)]["held_out"]},
                details={"grid": part["grid"], "images_per_s": part["images_per_s"]},
            )
    return job.result(
        columns={"top1": "top-1 %", "top5": "top-5 %"},
        subjects=results,
        sizes=sizes,
        comparisons=compare_with_first(job, hits),
        notes=[*notes, "the paper has no kNN figures"],
    )


def plan(job: Job, settings: KnnSettings) -> list[str]:
    """Returns what a job amounts to, from the speed of the encoder on a few real images here."""
    with open_labelled(job, job.subjects[0].views) as images:
        rows = images.labelled_rows
        fit, held_out = held_out_rows(rows, held_out=settings.held_out, seed=job.seed)
        encoder = _frozen(job, job.subjects[0], images)
        seconds = seconds_per_image(job, encoder, images.train, rows)
        passes = (len(rows) + len(images.test_rows)) * len(job.subjects)
        width = int(encoder.feature_dim)  # type: ignore[arg-type]
    held = 4 * width * (len(rows) // job.process.world_size + len(held_out) + len(images.test_rows))
    return [
        f"images: {len(fit):,} train, {len(held_out):,} held out, {len(images.test_rows):,} val, {len(images.class_names):,} classes",
        f"classifiers: {len(settings.grid())}; features of a rank: {held / 2**30:.2f} GiB",
        *estimate_lines(job, passes, seconds, work_bytes=0, what="forward passes"),
    ]


def _frozen(job: Job, subject: Subject, images: LabelledImages) -> torch.nn.Module:
    encoder = subject.encoder(lambda: images.sample(images.labelled_rows)).eval().requires_grad_(False)
    return encoder.to(job.process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _scored(
    job: Job, subject: Subject, images: LabelledImages, fit: Indices, held_out: Indices, grid: list[tuple[int, float | None]]
) -> dict[str, Any]:
    """Returns the accuracy of every classifier on held-out and val images, and its hits on val."""
    job.announce(f"kNN: {subject.title}")
    encoder, start = _frozen(job, subject, images), time.monotonic()

    def features(loader: ImageLoader, rows: Indices) -> Features:
        own = rank_share(rows, job)
        made = [
            (feature, renumbered(label, loader.class_names, images.class_names)) for feature, label in outputs(job, encoder, loader, own)
        ]
        if not made:
            empty = torch.empty(0, int(encoder.feature_dim))  # type: ignore[arg-type]
            return Features(empty, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
        return Features(*(torch.cat(parts) for parts in zip(*made, strict=True)), index=torch.from_numpy(own))

    own_val = features(images.test, images.test_rows)  # first: a damaged one is found before all training images are through
    own_fit, own_held_out = features(images.train, fit), features(images.train, held_out)
    seconds = time.monotonic() - start
    num = len(fit) + len(held_out) + len(images.test_rows)
    keys = Features(*(torch.cat(parts) for parts in zip(own_fit, own_held_out, strict=True)))
    held_out_hits = _grid_hits(job, own_fit, _everyones(own_held_out), grid, num_classes=len(images.class_names))
    val_hits = _grid_hits(job, keys, _everyones(own_val), grid, num_classes=len(images.class_names))
    return {
        "grid": {
            _name(one): {"held_out": held.shares()["top1"], **val.shares()}
            for one, held, val in zip(grid, held_out_hits, val_hits, strict=True)
        },
        "hits": {_name(one): packed(val.top1) for one, val in zip(grid, val_hits, strict=True)},
        "images_per_s": round(num / seconds, 1),
    }


def _everyones(own: Features) -> Features:
    """Returns the rows of all ranks in the order of the images, on every rank."""
    return Features(*(torch.cat(parts) for parts in zip(*gather_everywhere(own), strict=True)))


def _grid_hits(job: Job, own_keys: Features, queries: Features, grid: list[tuple[int, float | None]], *, num_classes: int) -> list[Hits]:
    """Returns the hits of each classifier: every rank searches its own keys for all queries, and the nearest of all ranks are merged."""
    most = max(k for k, _ in grid)
    similarity, label = torch.full((len(queries.label), most), -torch.inf), torch.zeros(len(queries.label), most, dtype=torch.int64)
    found = min(most, len(own_keys.label))
    if found:
        near, position = nearest(own_keys.feature, queries.feature, k=found, device=job.process.device)
        similarity[:, :found], label[:, :found] = near, own_keys.label[position]
    # (ranks x N, k) to (N, ranks x k), whose best k are the best of all keys.
    similarity, label = (
        all_gather_rows(part.to(job.process.device)).cpu().view(-1, *part.shape).transpose(0, 1).flatten(1) for part in (similarity, label)
    )
    similarity, order = similarity.topk(most, dim=1)
    label = label.gather(1, order)
    return [_hits(votes(similarity[:, :k], label[:, :k], temperature, num_classes=num_classes), queries.label) for k, temperature in grid]


def votes(similarity: Tensor, label: Tensor, temperature: float | None, *, num_classes: int) -> Tensor:
    """Returns class scores (N, num_classes) of neighbours (N, k), nearest first: the log of their summed votes, -inf for a class without.

    temperature: of weights exp(similarity / temperature); None: every neighbour has one vote.
    """
    weight = torch.ones_like(similarity, dtype=torch.float64)
    if temperature is not None:
        weight = ((similarity - similarity[:, :1]).double() / temperature).exp()
    return torch.zeros(len(label), num_classes, dtype=torch.float64).scatter_add_(1, label, weight).log()


def _hits(score: Tensor, label: Tensor) -> Hits:
    return Hits(top_k_hits(score, label, k=1), top_k_hits(score, label, k=5))


def _name(one: tuple[int, float | None]) -> str:
    k, temperature = one
    return f"k={k} plain" if temperature is None else f"k={k} T={temperature:g}"


TASKS: dict[str, Task] = {
    "knn": Task(title="kNN evaluation", what="kNN over a grid", versions={"paper": KnnSettings()}, run=run, plan=plan),
}
