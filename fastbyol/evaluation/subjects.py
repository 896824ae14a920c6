"""The encoders that are compared, with their features: the trained one and two baselines; features are extracted once for all protocols."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastbyol.config.errors import require_choice
from fastbyol.config.schema import TrainConfig
from fastbyol.data.backends.source import DamagedImage
from fastbyol.evaluation.features import Features, extract_features, pixel_features
from fastbyol.evaluation.splits import Split, Splits
from fastbyol.models import encoder_from

T = TypeVar("T")
CALIBRATION_IMAGES = 2048
CALIBRATION_BATCH = 256
SUBJECTS = ("byol", "untrained", "pca")
BASELINE_TITLES = {"untrained": "untrained encoder", "pca": "PCA of raw pixels"}


class SubjectFeatures(NamedTuple):
    """One subject's features of both splits (of val no rows, if there is none), and the seconds their extraction took."""

    train: Features
    val: Features
    seconds: float


class OtherEncoder(NamedTuple):
    """Another trained encoder to compare with, and the same images as it wants them: its own size and normalisation."""

    title: str
    encoder: nn.Module
    splits: Splits


class FeatureBank:
    """Features by subject, cached after the first request.

    Args:
        encoder: the run's trained encoder.
        config: the run's config, from which the untrained encoder is built.
        splits: the labelled images.
        device: where the encoders run; features are returned on the CPU.
        announce: called with a short text when something slow starts.
        data_settings: what was chosen of the data, to be stored with each result.
        title: what the trained encoder is called.
        other: a further baseline; its title must differ.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        config: TrainConfig,
        splits: Splits,
        device: str = "cpu",
        announce: Callable[[str], None] = lambda _: None,
        data_settings: dict[str, str] | None = None,
        title: str = "BYOL",
        other: OtherEncoder | None = None,
    ) -> None:
        self.encoder = encoder
        self.config = config
        self.splits = splits
        self.device = device
        self.announce = announce
        self.data_settings = data_settings or {}
        self.titles = {"byol": title, **BASELINE_TITLES}
        self.subjects = SUBJECTS
        self._other = other
        if other is not None:
            self.titles[other.title] = other.title
            self.subjects = (*SUBJECTS, other.title)
        self._known: dict[str, SubjectFeatures] = {}
        self._untrained: nn.Module | None = None

    def of(self, subject: str) -> SubjectFeatures:
        """Returns the features of one of `subjects`."""
        require_choice("subject", subject, self.subjects)
        if subject not in self._known:
            self.announce(f"features of {self.splits.num_samples:,} images: {self.titles[subject]}")
            start = time.perf_counter()
            train, val = self._extract(subject)
            self._known[subject] = SubjectFeatures(train, val, seconds=time.perf_counter() - start)
        return self._known[subject]

    def past_damage(self, work: Callable[[], T]) -> T:
        """Returns what `work` returns. If it meets a damaged original image, all of them are left out, and it is done again.

        Where an accuracy is measured every image counts, so there damage stays an error.
        """
        try:
            return work()
        except DamagedImage:
            if not self.splits.unscored or not sum(split.leave_out_damaged() for split in (self.splits.train, self.splits.val) if split):
                raise
        self._known.clear()
        self._untrained = None
        return work()

    def network(self, subject: str) -> nn.Module:
        """Returns the encoder of 'byol' or 'untrained', in eval mode."""
        if subject == "byol":
            return self.encoder
        if self._untrained is None:
            self._untrained = untrained_encoder(self.config, random_images(self.splits.train, seed=self.config.seed))
        return self._untrained

    def _extract(self, subject: str) -> tuple[Features, Features]:
        splits, encoder = self.splits, None
        if self._other is not None and subject == self._other.title:
            splits, encoder = self._other.splits, self._other.encoder
        train, val = splits.train, splits.val
        if subject == "pca":
            of_train = pixel_features(train)
            return pca_features(of_train, pixel_features(val) if val else of_train.rows(slice(0)))
        extract = functools.partial(extract_features, encoder or self.network(subject), device=self.device)
        of_train = extract(train)
        return of_train, extract(val) if val else of_train.rows(slice(0))


def random_images(split: Split, *, count: int = CALIBRATION_IMAGES, seed: int = 0) -> torch.Tensor:
    """Returns `count` different images of the split (all, if it has fewer) in random order, (N, 3, S, S). Seeded."""
    order = torch.randperm(split.num_samples, generator=torch.Generator().manual_seed(seed))
    return split.pick(order[:count])


PCA_COMPONENTS = 128


def untrained_encoder(config: TrainConfig, images: torch.Tensor) -> nn.Module:
    """Returns the run's encoder as it was before step 0 (same constructor and seed), with batch-norm statistics of `images`; eval mode,
    on the CPU.

    The running statistics of a new network are mean 0 and variance 1, so its features would reflect the missing statistics more than
    the random weights. So `images` (N, 3, S, S), a random sample of the training set, are passed through it once in training mode.
    """
    # An evaluation must not change the caller's random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = encoder_from(config.model)
    set_batchnorm_statistics(encoder, images)
    return encoder.eval()


@torch.no_grad()
def set_batchnorm_statistics(encoder: nn.Module, images: torch.Tensor, *, batch: int = CALIBRATION_BATCH) -> None:
    """Sets the running statistics to the plain average of the batch statistics over `images`, in the given order. Leaves the encoder in
    training mode.
    """
    layers = [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # in torch, None means the cumulative average
    encoder.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    # Batches of equal size, because each has the same weight in the average.
    for part in images.tensor_split(max(1, len(images) // batch)):
        encoder(part)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def pca_features(train: Features, val: Features, *, components: int = PCA_COMPONENTS) -> tuple[Features, Features]:
    """Projects both sets onto the leading principal components of the training pixels, at most as many as there are images or pixels."""
    from sklearn.decomposition import PCA

    components = min(components, *train.feature.shape)
    pca = PCA(n_components=components, svd_solver="randomized", random_state=0).fit(train.feature.numpy())
    projected = [
        torch.from_numpy(pca.transform(part.feature.numpy())).float() if len(part.feature) else torch.empty(0, components)
        for part in (train, val)
    ]
    return train._replace(feature=projected[0]), val._replace(feature=projected[1])
