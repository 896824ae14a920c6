"""Groups, outliers and near-duplicates of a set of images, found from their features alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from fastbyol.evaluation.knn import nearest

NEIGHBOUR = 5
"""An image's oddness is its distance to this nearest neighbour: not the first, so that a pair of odd twins counts too."""
SIMILAR_COSINE = 0.95
"""Cosine of the centred features from which on two images are compared by their pixels."""
COMPARED_PX = 16
SAME_PIXELS = 0.95
"""Correlation of the pixels, averaged down to COMPARED_PX, from which on two images show the same: a copy, resized or compressed again."""
DISTANCES_AT_ONCE = 2**26


class Cluster(NamedTuple):
    """A cluster of k-means. size: images in it. nearest: rows of those nearest to its centre, nearest first."""

    size: int
    nearest: torch.Tensor


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


def find_outliers(feature: torch.Tensor, *, count: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rows of the images that are farthest from their NEIGHBOURth neighbour, farthest first, and those distances.

    The features (N, D) are standardised and compared by their Euclidean distance: an image that is nothing like the others often has
    features of an unusual size, which a cosine does not see. Source: Ramaswamy et al., Efficient algorithms for mining outliers, 2000.
    """
    std, mean = torch.std_mean(feature.double(), dim=0)
    standard = ((feature - mean) / std.clamp_min(1e-6)).float().to(device)
    k = min(NEIGHBOUR + 1, len(standard))  # an image is its own nearest neighbour
    parts = standard.split(max(1, DISTANCES_AT_ONCE // len(standard)))
    distance = torch.cat([torch.cdist(part, standard).kthvalue(k, dim=1).values.cpu() for part in parts])
    farthest = distance.argsort(descending=True)[:count]
    return farthest, distance[farthest]


def similar_pairs(feature: torch.Tensor, *, at_most: int, device: str = "cpu") -> torch.Tensor:
    """Returns the pairs of rows (P, 2), most similar first, whose cosine is at least SIMILAR_COSINE.

    Each image is compared with its NEIGHBOUR nearest ones.

    feature: (N, D) with N >= 2. They are candidates for `show_the_same`: an encoder is trained to give different views one feature.
    """
    unit = centred(feature)
    similarity, position = nearest(unit, unit, k=min(NEIGHBOUR + 1, len(unit)), device=device)
    own = torch.arange(len(unit))[:, None].expand_as(position)
    close = (similarity >= SIMILAR_COSINE) & (position != own)
    pairs, inverse = torch.stack([own[close], position[close]], dim=1).sort(dim=1).values.unique(dim=0, return_inverse=True)
    cosine = torch.zeros(len(pairs)).scatter_(0, inverse, similarity[close])
    return pairs[cosine.argsort(descending=True)][:at_most]


def show_the_same(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Returns (N,) bool: whether the normalised images (N, 3, S, S) of each pair are the same picture, see SAME_PIXELS."""

    def small(images: torch.Tensor) -> torch.Tensor:
        pixels = F.adaptive_avg_pool2d(images.double(), min(COMPARED_PX, images.shape[-1])).flatten(1)
        return F.normalize(pixels - pixels.mean(dim=1, keepdim=True), dim=1)

    # Two images of one even colour have no pattern to correlate; then their colours are compared.
    correlation, colours = (small(first) * small(second)).sum(dim=1), (first - second).abs().amax(dim=(1, 2, 3)) < 0.1
    return (correlation >= SAME_PIXELS) | colours
