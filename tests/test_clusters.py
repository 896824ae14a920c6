"""Clusters, outliers, near-duplicates and the map, on features whose groups are known."""

from __future__ import annotations

import numpy as np
import torch

from fastbyol.evaluation.clusters import find_clusters, find_odd_images
from fastbyol.evaluation.feature_map import cells, coordinates, map_picture
from fastbyol.evaluation.features import Features
from fastbyol.evaluation.gallery import nearest_neighbours


def groups(*sizes: int, dim: int = 6) -> torch.Tensor:
    """Features around one axis for each group."""
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    noise = torch.randn(len(label), dim, generator=torch.Generator().manual_seed(0))
    return 5 * torch.eye(dim)[label] + 0.3 * noise


def test_clusters_are_the_groups_largest_first_with_the_images_nearest_to_each_centre():
    clusters = find_clusters(groups(20, 30, 10), count=3, shown=4)
    assert [cluster.size for cluster in clusters] == [30, 20, 10]
    for cluster, (low, high) in zip(clusters, [(20, 50), (0, 20), (50, 60)], strict=True):
        assert len(cluster.nearest) == 4
        assert ((cluster.nearest >= low) & (cluster.nearest < high)).all()
    assert [c.size for c in find_clusters(torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0]]), count=9, shown=5)] == [2, 1], "two different images"


def test_the_image_like_no_other_is_the_first_outlier_and_copies_are_near_duplicates():
    feature = groups(20, 20)
    feature[7] = torch.tensor([0.0, 0, 0, 0, 0, -9.0])
    feature[30] = 2 * feature[12] - feature.mean(dim=0)  # same direction from the mean
    feature[31] = feature[12]
    found = find_odd_images(feature, outliers=3)
    assert found.outlier[0] == 7
    assert found.distance.tolist() == sorted(found.distance.tolist(), reverse=True)
    assert found.pair[:1].tolist() == [[12, 31]]
    assert (found.cosine >= 0.99).all()
    assert (found.pair[:, 0] < found.pair[:, 1]).all()
    assert len(found.pair) == len(found.pair.unique(dim=0))


def test_a_group_of_many_equal_images_is_its_own_neighbourhood():
    feature = torch.cat([torch.ones(12, 3), torch.eye(3), -torch.eye(3)])
    found = find_odd_images(feature, outliers=2)
    assert len(found.pair) >= 12 - 1
    assert (found.pair < 12).all()
    assert (found.pair[:, 0] != found.pair[:, 1]).all()
    assert (found.outlier >= 12).all()


def test_without_val_an_image_is_not_its_own_neighbour_even_among_equal_ones():
    feature = torch.cat([torch.eye(4)[:1].repeat(9, 1), torch.eye(4)])
    train = Features(feature, torch.full((13,), -1), torch.arange(13))
    found = nearest_neighbours(train, train.rows(slice(0)), queries=13, k=3)
    assert found.neighbour.shape == (13, 3)
    assert not (found.neighbour == found.query[:, None]).any()


def test_the_map_puts_groups_apart_and_one_image_into_each_cell():
    feature = groups(20, 20)
    place = coordinates(feature, method="pca")
    assert abs(place[:20, 0].mean() - place[20:, 0].mean()) > 4 * place[:20, 0].std()
    placed = cells(place, columns=8, rows=5)
    assert len(set(placed.values())) == len(placed) > 3
    assert all(0 <= x < 8 and 0 <= y < 5 for x, y in placed.values())
    tiles = np.stack([np.full((4, 4, 3), 10 * i, dtype=np.uint8) for i in range(len(placed))])
    picture = map_picture(tiles, placed)
    x, y = placed[next(iter(placed))]
    assert picture.dtype == np.uint8
    assert picture[y * 34 + 5, x * 34 + 5].tolist() == [0, 0, 0]
    assert (picture[-1, -1] == 255).all()
