"""Quality of an encoder without labels, beside that of the same encoder untrained.

What each number can and cannot say stands in docs/guide.md. None replaces an accuracy: they tell a collapsed or idle encoder from one that
has learnt what its views ask for, not whether that is what a task needs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbyol.config.schema import DataConfig
from fastbyol.data.batch import ImageBatch
from fastbyol.data.build import build_loader
from fastbyol.evaluation.comparison import compare_hits
from fastbyol.evaluation.features import PIXEL_SIDE_PX, extract_features
from fastbyol.evaluation.result_file import LabelFreeResult
from fastbyol.evaluation.subjects import FeatureBank
from fastbyol.monitors.spectrum import effective_rank, participation_ratio, rankme

RANK_IMAGES = 25_600
"""At most so many images for the ranks: RankMe's own number (Garrido et al., section 3.2)."""
PAIR_IMAGES = 512
VIEW_EPOCHS = 2
"""Epochs of the run from which the views are drawn: two views an image in each."""
BATCH = 64
PIXELS = "pixels"
NETWORKS = ("byol", "untrained")
SETTINGS = {"rank_images": RANK_IMAGES, "pair_images": PAIR_IMAGES, "views": 2 * VIEW_EPOCHS}


def evaluate_label_free(bank: FeatureBank) -> LabelFreeResult:
    """Measures ranks on the centre crops of the train images, the rest on views of a random choice of them, drawn by the run's own loader."""
    split = bank.splits.train
    order = torch.randperm(split.num_samples, generator=torch.Generator().manual_seed(bank.config.seed))
    views = view_features(bank, split.positions[order[:PAIR_IMAGES].sort().values.numpy()].tolist())
    measures, hits = {}, {name: other_view_hits(features) for name, features in views.items()}
    for name in NETWORKS:
        centre = bank.of(name).train.feature[order[:RANK_IMAGES]]
        unit = F.normalize(views[name].double(), dim=2)
        measures[name] = {
            "rankme": float(rankme(centre)),
            "effective_rank": float(effective_rank(centre)),
            "participation_ratio": float(participation_ratio(centre)),
            "lidar": float(lidar(views[name])),
            "alignment": alignment(unit),
            "uniformity": sum(uniformity(unit[:, view]) for view in range(unit.shape[1])) / unit.shape[1],
            "feature_dim": centre.shape[1],
        }
    for name, found in hits.items():
        measures.setdefault(name, {})["other_view_top1"] = found.double().mean().item()
    return LabelFreeResult(
        protocol="labelfree",
        measures=measures,
        num_images=min(split.num_samples, RANK_IMAGES),
        num_pairs=len(hits["byol"]),
        settings={**SETTINGS, **bank.data_settings},
        comparisons={name: compare_hits(hits["byol"], hits[name]) for name in ("untrained", PIXELS)},
    )


def view_features(bank: FeatureBank, index: list[int]) -> dict[str, Tensor]:
    """Returns the features (N, V, D) of the views that the run draws of these images in its first epochs: of both encoders, and the pixels."""
    views = bank.config.views
    bank.announce(f"{2 * VIEW_EPOCHS} views each of {len(index):,} images: {' and '.join(NETWORKS)} encoder")
    drawn: dict[str, list[list[Tensor]]] = {name: [] for name in (*NETWORKS, PIXELS)}
    source = DataConfig(train=bank.splits.train.source, prefetch=1)
    with build_loader(source, views=views, seed=bank.config.seed, global_batch=1, option="--data") as loader:
        for epoch in range(VIEW_EPOCHS):
            for columns in drawn.values():
                columns += [[], []]
            for batch in loader.views_of(index, epoch=epoch, batch=BATCH):
                for view, image in enumerate((batch.view1, batch.view2), start=2 * epoch):
                    pixels = F.adaptive_avg_pool2d(image, min(PIXEL_SIDE_PX, views.size_px)).flatten(1)
                    drawn[PIXELS][view].append(pixels - pixels.mean(dim=1, keepdim=True))
                    for name in NETWORKS:
                        one = [ImageBatch(image, batch.label, batch.index)]
                        drawn[name][view].append(extract_features(bank.network(name), one, device=bank.device, every_image=False).feature)
    return {name: torch.stack([torch.cat(parts) for parts in columns], dim=1) for name, columns in drawn.items()}


def other_view_hits(features: Tensor) -> Tensor:
    """Returns (N,) bool: whether among the second views of all N images the most similar one to an image's first view is its own.

    features: (N, V, D); of views 0 and 1, by cosine. Chance is 1 / N. This is what instance discrimination trains for (Wu et al. 2018);
    an encoder that ignores what the views change and keeps what tells images apart is good at it.
    """
    first, second = F.normalize(features[:, 0].double(), dim=1), F.normalize(features[:, 1].double(), dim=1)
    return (first @ second.T).argmax(dim=1) == torch.arange(len(features))


def alignment(unit: Tensor) -> float:
    """Returns the mean squared distance between two views of an image, 0 to 4: 0 if the encoder ignores all that the views change.

    unit: (N, V, D) unit vectors; views 0 and 1, 2 and 3, … are compared. Source: Wang and Isola, Understanding contrastive representation
    learning through alignment and uniformity on the hypersphere, ICML 2020, alpha = 2.
    """
    return float((unit[:, ::2] - unit[:, 1::2]).square().sum(dim=2).mean())


def uniformity(unit: Tensor) -> float:
    """Returns log of the mean of exp(-2 |x - y|^2) over all pairs of different rows of (N, D) unit vectors: 0 if all are equal, about -4 at
    best.

    Source: Wang and Isola (see `alignment`), t = 2.
    """
    potential = (4 * (unit.double() @ unit.double().T) - 4).exp()  # |x - y|^2 = 2 - 2 x.y for unit vectors
    num = len(unit)
    return float(((potential.sum() - potential.diagonal().sum()) / (num * (num - 1))).log())


LIDAR_DELTA = 1e-4
LIDAR_EPSILON = 1e-7


def lidar(features: Tensor) -> Tensor:
    """Returns LiDAR of the features (N, V, D) of V views of N images, 1 to min(N - 1, D): how many directions tell images apart.

    The effective rank of the covariance between images, measured in units of the covariance between views of an image. Source: Thilak et
    al., LiDAR: Sensing linear probing performance in joint embedding SSL architectures, ICLR 2024, equations 2 to 6.
    """
    num, views, dim = features.shape
    mean = features.double().mean(dim=1)
    within = (features.double() - mean[:, None]).flatten(0, 1)
    between = mean - mean.mean(dim=0)
    value, axes = torch.linalg.eigh(within.T @ within / (num * (views - 1)) + LIDAR_DELTA * torch.eye(dim, dtype=torch.float64))
    whitened = between @ (axes * value.rsqrt()) / (num - 1) ** 0.5
    # Singular values of the whitened means: their squares are the eigenvalues of the product in the paper.
    share = torch.linalg.svdvals(whitened).square()
    share = share / share.sum().clamp_min(1e-12) + LIDAR_EPSILON
    return torch.exp(-(share * share.log()).sum())
