"""kNN accuracy of the encoder during training, always on the same few thousand images."""

from __future__ import annotations

import copy
import logging
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig, TrainConfig
from fastbyol.data import build_image_loader
from fastbyol.data.build import backend_of
from fastbyol.data.loader import ImageLoader
from fastbyol.evaluation.features import Features, extract_features
from fastbyol.evaluation.knn import DEFAULT_K, knn_predict
from fastbyol.evaluation.splits import common_classes, renumbered
from fastbyol.ranks.process_group import Process, all_gather_rows, all_reduce_mean, copy_from_main
from fastbyol.run.rank_agreement import opened_alike

log = logging.getLogger("fastbyol")
BATCH = 256


def check_online_knn(config: TrainConfig) -> None:
    """Raises UserError, before any work, if data.val does not exist. Its content is checked once the training data are open."""
    if config.data.val:
        backend_of(config.data.val, option="data.val")


class OnlineKnn:
    """Weighted kNN (`knn_predict`) of val images among train images, both a fixed random choice of at most `monitors.knn_images`.

    A full evaluation scores higher because it searches all of train for neighbours. All ranks share the work. Training is not
    affected: the features come from a copy of the encoder in eval mode.

    Args:
        config: data, views and monitors are used.
        process: this rank.
        num_samples: number of training images.
        first_step, total_steps: step at which this process starts, and number of steps of the run.

    Raises:
        UserError: data.val cannot be read, or has no class in common with data.train.
    """

    def __init__(self, config: TrainConfig, process: Process, *, num_samples: int, first_step: int, total_steps: int) -> None:
        self._process, self._total_steps = process, total_steps
        self._periods_per_step = config.global_batch / (num_samples * config.monitors.knn_every_epochs)
        self._period = int(first_step * self._periods_per_step)
        # A file of labels names the images of train only, and converted images have their labels with them.
        converted = backend_of(config.data.val, option="data.val") != "folder"
        labels = config.data.labels if config.data.labels == "folders" and not converted else "auto"
        sources = (
            (config.data, "data.train"),
            (
                DataConfig(train=config.data.val, labels=labels, cache=config.data.cache, cache_gib=config.data.cache_gib),
                "data.val",
            ),
        )
        self._train, self._val = (
            opened_alike(
                partial(
                    build_image_loader,
                    data,
                    views=config.views,
                    batch=BATCH,
                    workers=config.data.workers,
                    option=option,
                    replace_damaged=True,  # as in training, which a damaged image must not end
                ),
                process,
                option=option,
            )
            for data, option in sources
        )
        for loader, (data, option) in zip((self._train, self._val), sources, strict=True):
            if not loader.class_names:
                raise UserError(f"{option} = {data.train}: has no labels, which kNN needs; set monitors.knn_every_epochs to 0")
        self._class_names = common_classes(
            self._train.class_names, self._val.class_names, names=("data.train", f"data.val = {config.data.val!r}")
        )
        self._train_index, self._val_index = (
            choose_images(loader.num_samples, at_most=config.monitors.knn_images) for loader in (self._train, self._val)
        )

    @property
    def num_classes(self) -> int:
        """Number of classes that both sets of images have."""
        return len(self._class_names)

    def due(self, done: int) -> bool:
        """Returns True if a multiple of `knn_every_epochs` was passed since the last call, or if the run has ended. done: steps taken."""
        period, self._period = self._period, int(done * self._periods_per_step)
        return self._period > period or done == self._total_steps

    def top1(self, encoder: nn.Module) -> float:
        """Returns the share in [0, 1] of val images that are classified correctly. Every rank must call it; all get the same result."""
        # A copy, because eval mode and other buffers would change the training.
        encoder = copy.deepcopy(encoder).eval()
        copy_from_main(encoder.buffers())  # without cross-replica BN the statistics differ between ranks
        train = self._all_features(encoder).labelled()
        share = self._val_index[self._process.rank :: self._process.world_size]
        counted = right = 0
        if len(train.label) and len(share):  # with few val images, a rank may have none
            val = self._features(encoder, self._val, share).labelled()
            counted = len(val.label)
        if counted:
            options = {"num_classes": len(self._class_names), "k": min(DEFAULT_K, len(train.label))}
            scores = knn_predict(train, val.feature, **options, device=self._process.device)
            right = int((scores.argmax(dim=1) == val.label).sum())
        counts = torch.tensor([float(right), float(counted)], device=self._process.device)
        right_share, num = all_reduce_mean(counts).tolist()
        return right_share / num if num else 0.0

    def close(self) -> None:
        self._train.close()
        self._val.close()

    def _all_features(self, encoder: nn.Module) -> Features:
        """Returns the features of the chosen train images on the CPU: each rank computes its share and gathers the others'."""
        index, world_size = self._train_index, self._process.world_size
        share = -(-len(index) // world_size)
        padded = np.resize(index, share * world_size)  # repeats the first images so that all shares have the same size
        own = self._features(encoder, self._train, padded[self._process.rank * share :][:share])
        rows = [all_gather_rows(part.to(self._process.device)).cpu()[: len(index)] for part in own]
        return Features(*rows)

    def _features(self, encoder: nn.Module, loader: ImageLoader, index: NDArray[np.int64]) -> Features:
        features = extract_features(encoder, loader.batches_of(index), device=self._process.device, every_image=False)
        return features._replace(label=renumbered(features.label, loader.class_names, self._class_names))


def build_online_knn(config: TrainConfig, process: Process, *, num_samples: int, first_step: int, total_steps: int) -> OnlineKnn | None:
    """Returns the run's kNN monitor, or None if `monitors.knn_every_epochs` is 0, or with a warning if there is one class."""
    if not config.monitors.knn_every_epochs:
        return None
    monitor = OnlineKnn(config, process, num_samples=num_samples, first_step=first_step, total_steps=total_steps)
    if monitor.num_classes > 1:
        return monitor
    monitor.close()
    if process.is_main:
        log.warning(
            "monitors.knn_every_epochs: left out, because data.train and data.val have only one class in common: all would be right"
        )
    return None


def choose_images(num: int, *, at_most: int) -> NDArray[np.int64]:
    """Returns positions of a fixed random choice among `num` images, ascending so that files are read from front to back."""
    if num <= at_most:
        return np.arange(num)
    return np.sort(np.random.default_rng(0).choice(num, size=at_most, replace=False))
