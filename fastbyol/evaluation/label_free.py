"""Quality of an encoder without labels, beside that of the same encoder untrained.

What each number can and cannot say, and what it was for runs whose accuracy is known, stands in docs/monitors.md. None replaces an accuracy.
LiDAR (Thilak et al., ICLR 2024) was tried and left out: it was highest for untrained encoders.
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
"""Largest number of images for the ranks: RankMe's own (Garrido et al., section 3.2)."""
PAIR_IMAGES = 1024
"""Largest number of images of which two views are drawn."""
BATCH = 64
PIXELS = "pixels"
NETWORKS = ("byol", "untrained")
SETTINGS = {"rank_images": RANK_IMAGES, "pair_images": PAIR_IMAGES}


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
            "alignment": alignment(unit),
            "uniformity": (uniformity(unit[:, 0]) + uniformity(unit[:, 1])) / 2,
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
        # Not compared with raw pixels: they recognise an image's other view about as well as encoders that tell classes apart far better.
        comparisons={"untrained": compare_hits(hits["byol"], hits["untrained"])},
    )


def view_features(bank: FeatureBank, index: list[int]) -> dict[str, Tensor]:
    """Returns the features (N, 2, D) of both views that the run draws of these images in its first epoch: of both encoders, and the pixels."""
    views = bank.config.views
    bank.announce(f"two views each of {len(index):,} images: {' and '.join(bank.titles[name] for name in NETWORKS)}")
    drawn: dict[str, list[Tensor]] = {name: [] for name in (*NETWORKS, PIXELS)}
    source = DataConfig(train=bank.splits.train.source, prefetch=1)
    with build_loader(source, views=views, seed=bank.config.seed, global_batch=1, option="--data") as loader:
        for batch in loader.views_of(index, epoch=0, batch=BATCH):
            images = [ImageBatch(view, batch.label, batch.index) for view in (batch.view1, batch.view2)]
            for name in NETWORKS:
                found = [extract_features(bank.network(name), [one], device=bank.device, every_image=False).feature for one in images]
                drawn[name].append(torch.stack(found, dim=1))
            pixels = [F.adaptive_avg_pool2d(one.image, min(PIXEL_SIDE_PX, views.size_px)).flatten(1) for one in images]
            drawn[PIXELS].append(torch.stack([part - part.mean(dim=1, keepdim=True) for part in pixels], dim=1))
    return {name: torch.cat(parts) for name, parts in drawn.items()}


def other_view_hits(features: Tensor) -> Tensor:
    """Returns (N,) bool: whether among the second views of all N images the most similar one to an image's first view is its own.

    features: (N, 2, D), compared by cosine. Chance is 1 / N. This is what instance discrimination trains for (Wu et al. 2018);
    an encoder that ignores what the views change and keeps what tells images apart is good at it.
    """
    first, second = F.normalize(features[:, 0].double(), dim=1), F.normalize(features[:, 1].double(), dim=1)
    return (first @ second.T).argmax(dim=1) == torch.arange(len(features))


def alignment(unit: Tensor) -> float:
    """Returns the mean squared distance between two views of an image, 0 to 4: 0 if the encoder ignores all that the views change.

    unit: (N, 2, D) unit vectors. Source: Wang and Isola, Understanding contrastive representation
    learning through alignment and uniformity on the hypersphere, ICML 2020, alpha = 2.
    """
    return float((unit[:, 0] - unit[:, 1]).square().sum(dim=1).mean())


def uniformity(unit: Tensor) -> float:
    """Returns log of the mean of exp(-2 |x - y|^2) over all pairs of different rows of (N, D) unit vectors: 0 if all are equal, about -4 at
    best.

    Source: Wang and Isola (see `alignment`), t = 2.
    """
    potential = (4 * (unit.double() @ unit.double().T) - 4).exp()  # |x - y|^2 = 2 - 2 x.y for unit vectors
    num = len(unit)
    return float(((potential.sum() - potential.diagonal().sum()) / (num * (num - 1))).log())
