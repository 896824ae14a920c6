"""Baselines for the trained encoder: the same encoder untrained, and principal components of the raw pixels."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastbyol.config.schema import TrainConfig
from fastbyol.evaluation.features import Features
from fastbyol.models import encoder_from

PCA_COMPONENTS = 128
CALIBRATION_IMAGES = 2048
CALIBRATION_BATCH = 256


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
    projected = [torch.from_numpy(pca.transform(part.feature.numpy())).float() for part in (train, val)]
    return train._replace(feature=projected[0]), val._replace(feature=projected[1])
