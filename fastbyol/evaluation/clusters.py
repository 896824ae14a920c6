"""Groups, outliers and near-duplicates of a set of images, found from their features alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from fastbyol.evaluation.knn import nearest

NEIGHBOUR = 5
"""An image is as odd as its distance to this neighbour: not the first, so that a pair of odd twins counts too."""
DUPLICATE_COSINE = 0.99
"""Cosine of the centred features above which two images are shown as near-duplicates."""


class Cluster(NamedTuple):
    """A cluster of k-means. size: images in it. nearest: rows of those nearest to its centre, nearest first."""

    size: int
    nearest: torch.Tensor


class OddImages(NamedTuple):
    """outlier: rows, oddest first. distance: 1 - cosine to the NEIGHBOURth neighbour, of each. pair: rows (P, 2) of all near-duplicates, most
    similar first. cosine: of each pair.
    """

    outlier: torch.Tensor
    distance: torch.Tensor
    pair: torch.Tensor
    cosine: torch.Tensor


def centred(feature: torch.Tensor) -> torch.Tensor:
    """Returns unit vectors (N, D) of the features without their mean: what all images share would make every cosine large."""
    return F.normalize(feature.double() - feature.double().mean(dim=0), dim=1).float()


def find_clusters(feature: torch.Tensor, *, count: int, shown: int, seed: int = 0) -> list[Cluster]:
    """Returns the clusters of k-means on the centred unit features (N, D), largest first. Seeded."""
    from sklearn.cluster import KMeans

    unit = centred(feature)
    found = KMeans(n_clusters=min(count, len(unit.unique(dim=0))), n_init=3, random_state=seed).fit(unit.numpy())  # type: ignore[arg-type]  # its stubs know "auto" only
    number = torch.from_numpy(found.labels_).long()
    distance = (unit - torch.from_numpy(found.cluster_centers_).float()[number]).norm(dim=1)
    clusters = []
    for cluster in range(int(number.max()) + 1):
        rows = torch.nonzero(number == cluster).flatten()
        clusters.append(Cluster(len(rows), rows[distance[rows].argsort()][:shown]))
    return sorted(clusters, key=lambda cluster: -cluster.size)


def find_odd_images(feature: torch.Tensor, *, outliers: int, threshold: float = DUPLICATE_COSINE, device: str = "cpu") -> OddImages:
    """Returns the images that are least like any other, and the pairs that are almost equal, among (N, D) features with N >= 2.

    Of a group of equal images each is paired with its NEIGHBOUR nearest at most.
    """
    unit = centred(feature)
    k = min(NEIGHBOUR + 1, len(unit))
    similarity, position = nearest(unit, unit, k=k, device=device)
    own = torch.arange(len(unit))
    # An image is its own nearest neighbour, except that an equal one may stand in its place.
    is_self = position == own[:, None]
    is_self[~is_self.any(dim=1), -1] = True
    similarity, position = similarity[~is_self].view(len(unit), k - 1), position[~is_self].view(len(unit), k - 1)
    distance = 1 - similarity[:, -1]
    oddest = distance.argsort(descending=True)[:outliers]
    close = similarity >= threshold
    pairs = torch.stack([own[:, None].expand_as(position)[close], position[close]], dim=1).sort(dim=1).values
    pairs, inverse = pairs.unique(dim=0, return_inverse=True)
    cosine = torch.zeros(len(pairs)).scatter_(0, inverse, similarity[close])
    order = cosine.argsort(descending=True)
    return OddImages(oddest, distance[oddest], pairs[order], cosine[order])
