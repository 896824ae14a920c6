"""Checks labels against the class counts of a manifest, and names classes by number if there is no manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.formats.manifest import Manifest

MAX_CLASSES = 1 << 20
"""Larger labels are not accepted as class numbers: each class needs memory for its name and for a row of every classifier."""


def refuse_other_counts(path: Path, labels: NDArray[np.int64], manifest: Manifest) -> None:
    """Raises UserError unless the labels, (N,) int64, have as many of each class as the manifest says. A label of -1 means unlabelled."""
    classes = len(manifest.class_names)
    outside = labels[(labels < -1) | (labels >= classes)]
    if len(outside):
        raise UserError(f"{path}: holds the label {int(outside[0])}, its manifest names {classes} classes; copy it again, or convert again")
    counts = np.bincount(labels[labels >= 0], minlength=classes).tolist()
    if counts != list(manifest.class_counts):
        raise UserError(f"{path}: has other numbers of images per class than its manifest says (damaged, or edited); convert again")


def numbered_class_names(path: Path, labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Returns '0', '1', … up to the highest label. A label of -1 means unlabelled. Raises UserError for a label above the limit."""
    highest = int(labels.max())
    if highest >= MAX_CLASSES:
        image = int(labels.argmax())
        raise UserError(
            f"{path}: image {image} has the label {highest}; labels are class numbers from 0 up to {MAX_CLASSES - 1:,}, or -1 for none. "
            "Write the file with such labels"
        )
    return tuple(map(str, range(highest + 1)))
