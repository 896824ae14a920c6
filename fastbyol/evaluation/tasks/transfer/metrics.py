"""The scores of the transfer tasks: top-1, mean per class, and VOC2007's 11-point mean average precision; shares in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastbyol.config.errors import UserError
from fastbyol.evaluation.tasks.scoring import packed

RECALL_LEVELS = 10
"""The eleven points are recall 0/10, 1/10 ... 10/10."""


def top1(score: Tensor, label: Tensor) -> float:
    """Returns the share of images whose highest score (N, K) is that of their label (N,)."""
    return (score.argmax(1) == label).double().mean().item()


def mean_per_class(score: Tensor, label: Tensor) -> float:
    """Returns the accuracy within each class, averaged over the classes that have images: a rare class counts as much as a frequent one."""
    hit = (score.argmax(1) == label).double()
    images = torch.bincount(label, minlength=score.shape[1])
    hits = torch.bincount(label, weights=hit, minlength=score.shape[1])
    return (hits[images > 0] / images[images > 0]).mean().item()


def mean_ap(score: Tensor, truth: Tensor) -> float:
    """Returns VOC2007's mean over the classes of the 11-point average precision.

    score: (N, K). truth: (N, K), 1 where the class is in the image, -1 where it is not, 0 where all its objects are marked 'difficult': such
    an image is neither right nor wrong and does not count for this class. Raises UserError if a class is in no image.
    """
    return sum(average_precision(score[:, k], truth[:, k]) for k in range(score.shape[1])) / score.shape[1]


def average_precision(score: Tensor, truth: Tensor) -> float:
    """Returns the mean over recall 0, 0.1 ... 1 of the highest precision at that recall or more, of one class: (N,) each, see `mean_ap`.

    Images of equal score enter together, so their order does not matter. Source of the formula: VOC2007's development kit, VOCevalcls.m.
    """
    counted = truth != 0
    score, right = score[counted], truth[counted] > 0
    total = int(right.sum())
    if not total:
        raise UserError("a class is in no image that counts, so it has no average precision; are these all images of the set?")
    order = score.argsort(descending=True)
    score, right = score[order], right[order].long()
    last_of_equal = torch.cat([score[1:] != score[:-1], torch.tensor([True], device=score.device)])
    found = right.cumsum(0)[last_of_equal]
    precision = found.double() / (torch.arange(1, len(score) + 1, device=score.device)[last_of_equal])
    # In integers: 3/10 of ten images is a recall of 0.3, which as floating-point numbers 3 / 10 and 3 * 0.1 disagree about.
    reached = [precision[found * RECALL_LEVELS >= level * total].max().item() for level in range(RECALL_LEVELS + 1)]
    return sum(reached) / len(reached)


def packed_hits(score: Tensor, label: Tensor) -> str:
    """Returns which images' highest score is that of their label, as text for a part of a job; '' for labels of several classes."""
    return packed(score.argmax(1) == label) if label.ndim == 1 else ""


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {"top1": top1, "mean_per_class": mean_per_class, "map11": mean_ap}
METRIC_TITLES = {"top1": "top-1", "mean_per_class": "mean per class", "map11": "11-point mAP"}
