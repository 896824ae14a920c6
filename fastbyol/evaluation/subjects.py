"""The encoders that are compared, with their features: the trained one and two baselines; features are extracted once for all protocols."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fastbyol.config.errors import require_choice
from fastbyol.config.schema import TrainConfig
from fastbyol.evaluation.baselines import CALIBRATION_IMAGES, pca_features, untrained_encoder
from fastbyol.evaluation.features import Features, extract_features, pixel_features
from fastbyol.evaluation.splits import Split, Splits

SUBJECTS = ("byol", "untrained", "pca")
SUBJECT_TITLES = {"byol": "BYOL", "untrained": "untrained encoder", "pca": "PCA of raw pixels"}


class SubjectFeatures(NamedTuple):
    """One subject's features of both splits, and the seconds their extraction took."""

    train: Features
    val: Features
    seconds: float


class FeatureBank:
    """Features by subject, cached after the first request.

    Args:
        encoder: the run's trained encoder.
        config: the run's config, from which the untrained encoder is built.
        splits: the labelled images.
        device: where the encoders run; features are returned on the CPU.
        announce: called with a short text when something slow starts.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        config: TrainConfig,
        splits: Splits,
        device: str = "cpu",
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.encoder = encoder
        self.config = config
        self.splits = splits
        self.device = device
        self.announce = announce
        self._known: dict[str, SubjectFeatures] = {}

    def of(self, subject: str) -> SubjectFeatures:
        """Returns the features of one of SUBJECTS."""
        require_choice("subject", subject, SUBJECTS)
        if subject not in self._known:
            num_images = self.splits.train.num_samples + self.splits.val.num_samples
            self.announce(f"features of {num_images:,} images: {SUBJECT_TITLES[subject]}")
            start = time.perf_counter()
            train, val = self._extract(subject)
            self._known[subject] = SubjectFeatures(train, val, seconds=time.perf_counter() - start)
        return self._known[subject]

    def _extract(self, subject: str) -> tuple[Features, Features]:
        train, val = self.splits.train, self.splits.val
        if subject == "pca":
            return pca_features(pixel_features(train), pixel_features(val))
        encoder = self.encoder if subject == "byol" else untrained_encoder(self.config, random_images(train, seed=self.config.seed))
        extract = functools.partial(extract_features, encoder, device=self.device)
        return extract(train), extract(val)


def random_images(split: Split, *, count: int = CALIBRATION_IMAGES, seed: int = 0) -> torch.Tensor:
    """Returns `count` different images of the split (all, if it has fewer) in random order, (N, 3, S, S). Seeded."""
    order = torch.randperm(split.num_samples, generator=torch.Generator().manual_seed(seed))
    return split.pick(order[:count])
