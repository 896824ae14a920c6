"""Whether labels are those that a manifest counts: the cheapest check that notices a label that has changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.manifest import Manifest


def refuse_other_counts(path: Path, labels: NDArray[np.int64], manifest: Manifest) -> None:
    """UserError unless the labels, (N,) int64, number as many of each class as the manifest says."""
    classes = len(manifest.class_names)
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise UserError(f"{path}: holds the label {int(outside[0])}, its manifest names {classes} classes; copy it again, or convert again")
    counts = np.bincount(labels, minlength=classes).tolist()
    if counts != list(manifest.class_counts):
        raise UserError(f"{path}: has other numbers of images per class than its manifest says (damaged, or edited); convert again")
