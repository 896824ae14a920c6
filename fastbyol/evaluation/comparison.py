"""Compares two subjects on the same images: tells a real difference from the noise of that many images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

CONFIDENCE = 0.95
_Z = 1.959963984540054
"""Quantile of the normal distribution for CONFIDENCE."""


@dataclass(frozen=True)
class Comparison:
    """Accuracy of a subject minus that of a baseline on the same images, as a share in [-1, 1].

    difference: as counted. low, high: 95 % interval for another draw of as many images; another seed of the run is not in it.
    gained, lost: images that only the subject, or only the baseline, got right.
    """

    difference: float
    low: float
    high: float
    gained: int
    lost: int

    @property
    def outcome(self) -> str:
        """'better' or 'worse' if the whole interval is on one side of 0, else 'same'."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "same"


def compare_hits(subject: torch.Tensor, baseline: torch.Tensor) -> Comparison:
    """Compares which images each got right, (N,) bool each.

    The images are paired: only those on which the two differ count, as in McNemar's test. Source of the interval: Bonett and Price,
    Adjusted Wald confidence interval for a difference of binomial proportions based on paired data, J. Educ. Behav. Stat. 37, 2012.
    """
    num = len(subject)
    gained, lost = int((subject & ~baseline).sum()), int((~subject & baseline).sum())
    share_gained, share_lost = (gained + 1) / (num + 2), (lost + 1) / (num + 2)
    middle = share_gained - share_lost
    half = _Z * math.sqrt((share_gained + share_lost - middle**2) / (num + 2))
    return Comparison((gained - lost) / num, max(-1.0, middle - half), min(1.0, middle + half), gained, lost)
