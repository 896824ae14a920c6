"""Average precision of detections: VOC's, by 11 points, with difficult objects ignored; COCO's by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.config.errors import UserError
from fastbyol.evaluation.comparison import Comparison
from fastbyol.evaluation.tasks.dense.trials import Score, compare_scores

POINTS = np.arange(11) / 10
RESAMPLES = 300


@dataclass(frozen=True)
class Detections:
    """Detections of one image: boxes (n, 4) as x_min, y_min, x_max, y_max in px of the original image, labels and scores (n,)."""

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class Objects:
    """True objects of one image, boxes as in `Detections`."""

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]


@dataclass(frozen=True)
class ClassMatches:
    """The detections of one class in all images by falling score.

    image: number of each detection's image. hit: True if it found an object. counted: False for a detection of a difficult object, which is
    neither hit nor miss. objects: (num_images,) number of objects that are not difficult.
    """

    image: NDArray[np.int64]
    hit: NDArray[np.bool_]
    counted: NDArray[np.bool_]
    objects: NDArray[np.int64]


def match_class(detections: Sequence[Detections], objects: Sequence[Objects], *, label: int, overlap: float = 0.5) -> ClassMatches:
    """Matches the detections of a class to its objects as VOC's devkit does.

    A detection belongs to the object of its image with which it overlaps most. It is a hit if that is at least `overlap` (intersection over
    union) and no detection with a higher score has found the object; a second one is a miss. A detection of a difficult object is not counted.
    """
    rows = [(image, at) for image, found in enumerate(detections) for at in np.flatnonzero(found.labels == label).tolist()]
    scores = np.array([detections[image].scores[at] for image, at in rows], dtype=np.float64)
    rows = [rows[at] for at in np.argsort(-scores, kind="stable").tolist()]
    truth = [each.labels == label for each in objects]
    found_already = [np.zeros(int(mine.sum()), dtype=bool) for mine in truth]
    hit, counted = np.zeros(len(rows), dtype=bool), np.ones(len(rows), dtype=bool)
    for number, (image, at) in enumerate(rows):
        boxes = objects[image].boxes[truth[image]]
        if not len(boxes):
            continue
        overlaps = intersection_over_union(detections[image].boxes[at], boxes)
        best = int(overlaps.argmax())
        if overlaps[best] < overlap:
            continue
        if objects[image].difficult[truth[image]][best]:
            counted[number] = False
        elif not found_already[image][best]:
            hit[number] = found_already[image][best] = True
    num_objects = np.array([int((mine & ~each.difficult).sum()) for mine, each in zip(truth, objects, strict=True)], dtype=np.int64)
    return ClassMatches(np.array([image for image, _ in rows], dtype=np.int64), hit, counted, num_objects)


def intersection_over_union(box: NDArray[Any], boxes: NDArray[Any]) -> NDArray[np.float64]:
    """Returns the overlap of a box (4,) with each of boxes (n, 4)."""
    box, boxes = box.astype(np.float64), boxes.astype(np.float64)
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    both = (high - low).clip(min=0).prod(axis=1)
    return both / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - both)


def average_precision(matches: ClassMatches, weights: NDArray[np.float64] | None = None) -> float:
    """Returns VOC2007's AP: the mean over recall 0, 0.1, …, 1 of the largest precision at that recall or above; NaN without objects.

    weights: of each image, for a bootstrap; without, every image counts once.
    """
    weights = np.ones(len(matches.objects)) if weights is None else weights
    total = float(weights @ matches.objects)
    if not total:
        return float("nan")
    each = weights[matches.image] * matches.counted
    hits, all_found = np.cumsum(each * matches.hit), np.cumsum(each)
    recall, precision = hits / total, hits / np.maximum(all_found, 1e-12)
    # The largest precision from here on: recall only grows along the list.
    best = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, POINTS - 1e-12)
    return float(np.append(best, 0.0)[at].mean())


def class_scores(matches: Sequence[ClassMatches], classes: Sequence[str]) -> dict[str, float | None]:
    """Returns VOC2007's AP of each class by name, None for one without objects."""
    found = (average_precision(each) for each in matches)
    return {name: None if np.isnan(value) else value for name, value in zip(classes, found, strict=True)}


def mean_average_precision(matches: Sequence[ClassMatches], weights: NDArray[np.float64] | None = None) -> float:
    """Returns the mean over the classes that have objects; NaN if none has."""
    found = [value for each in matches if not np.isnan(value := average_precision(each, weights))]
    return float(np.mean(found)) if found else float("nan")


def kept_matches(part: dict[str, Any]) -> list[ClassMatches]:
    """Returns the matches of each class that a part of a job keeps as plain lists."""
    kinds = {"image": np.int64, "hit": bool, "counted": bool, "objects": np.int64}
    return [ClassMatches(**{name: np.array(each[name], dtype=kind) for name, kind in kinds.items()}) for each in part["matches"]]


def compare_matches(mine: list[list[ClassMatches]], others: list[list[ClassMatches]]) -> Comparison:
    """Compares by VOC's AP50; gained and lost are the images in which more, or fewer, objects were found."""
    alone = [sum(_found(each) for each in many) for many in (mine, others)]
    scores: list[list[Score]] = [[partial(mean_average_precision, each) for each in many] for many in (mine, others)]
    return compare_scores(scores[0], scores[1], alone=(np.asarray(alone[0]), np.asarray(alone[1])), resamples=RESAMPLES)


def _found(matches: list[ClassMatches]) -> NDArray[np.int64]:
    return np.sum([np.bincount(each.image[each.hit], minlength=len(each.objects)) for each in matches], axis=0)


def coco_metric() -> Any:
    """Returns torchmetrics' metric of COCO. Raises UserError if it or pycocotools is not installed."""
    try:
        from torchmetrics.detection import MeanAveragePrecision
    except ImportError as error:
        raise UserError("evaluate detection: torchmetrics is not installed; pip install 'fastbyol[eval]'") from error
    try:
        return MeanAveragePrecision(box_format="xyxy", iou_type="bbox", backend="pycocotools")
    except ModuleNotFoundError as error:
        raise UserError("evaluate detection: pycocotools is not installed; pip install 'fastbyol[eval]'") from error


def coco_scores(detections: Sequence[Detections], objects: Sequence[Objects]) -> dict[str, float]:
    """Returns COCO's AP (mean over overlaps 0.5 to 0.95), AP50 and AP75, by torchmetrics; difficult objects count as COCO's crowds, ignored."""
    metric = coco_metric()
    metric.warn_on_many_detections = False
    for found, truth in zip(detections, objects, strict=True):
        predicted = {"boxes": _tensor(found.boxes), "labels": _tensor(found.labels), "scores": _tensor(found.scores)}
        true = {"boxes": _tensor(truth.boxes), "labels": _tensor(truth.labels), "iscrowd": _tensor(truth.difficult.astype(np.int64))}
        metric.update([predicted], [true])
    values = metric.compute()
    # -1 stands for 'no object of any class'.
    scores = {"ap": values["map"], "ap50": values["map_50"], "ap75": values["map_75"]}
    return {name: max(float(value), 0.0) for name, value in scores.items()}


def _tensor(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
