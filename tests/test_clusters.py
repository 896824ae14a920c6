"""Clusters, outliers, near-duplicates and the map, on features whose groups are known."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastbyol.evaluation.clusters import NEIGHBOUR, find_clusters, find_outliers, show_the_same, similar_pairs
from fastbyol.evaluation.feature_map import cells, coordinates, map_picture
from fastbyol.evaluation.features import Features
from fastbyol.evaluation.gallery import nearest_neighbours
from tests.images import smooth_image


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


def test_an_image_like_no_other_is_the_first_outlier_also_if_only_its_size_is_odd():
    for odd in (torch.tensor([0.0, 0, 0, 0, 0, -9.0]), 6 * groups(20, 20)[3]):
        feature = groups(20, 20)
        feature[7] = odd
        outlier, distance = find_outliers(feature, count=3)
        assert outlier[0] == 7
        standard = (feature - feature.mean(dim=0)) / feature.std(dim=0)
        gaps = sorted(float((standard[7] - standard[i]).norm()) for i in range(40) if i != 7)
        assert float(distance[0]) == pytest.approx(gaps[NEIGHBOUR - 1], rel=1e-4)
        assert distance.tolist() == sorted(distance.tolist(), reverse=True)


def test_similar_pairs_are_each_pair_once_most_similar_first_and_no_image_with_itself():
    feature = 3 * torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    feature[31] = feature[12]
    feature[5] = feature[30] + 0.1 * feature[2]
    pairs = similar_pairs(feature, at_most=9)
    assert pairs.tolist() == [[12, 31], [5, 30]]
    assert similar_pairs(feature, at_most=1).tolist() == [[12, 31]]
    equal = similar_pairs(torch.cat([torch.ones(12, 3), torch.eye(3), -torch.eye(3)]), at_most=999)
    assert (equal < 12).all()
    assert len(equal) >= 12 - NEIGHBOUR - 1
    assert (equal[:, 0] < equal[:, 1]).all()


def test_a_copy_that_was_compressed_again_shows_the_same_and_another_image_of_the_same_colours_does_not():
    original = smooth_image(1, 64, 64)
    buffer = io.BytesIO()
    original.save(buffer, format="jpeg", quality=40)
    again, turned = Image.open(buffer), original.rotate(180)
    even = Image.new("RGB", (64, 64), (200, 30, 30))
    images = [original, again, turned, even, even, Image.new("RGB", (64, 64), (30, 30, 200))]
    first, copy, other, red, red2, blue = (torch.from_numpy(np.array(i)).permute(2, 0, 1).double() / 64 - 2 for i in images)
    pairs = [(first, copy), (first, other), (red, red2), (red, blue)]
    assert show_the_same(*(torch.stack(side) for side in zip(*pairs, strict=True))).tolist() == [True, False, True, False]


def test_without_val_an_image_is_not_its_own_neighbour_even_among_equal_ones():
    feature = torch.cat([torch.eye(4)[:1].repeat(9, 1), torch.eye(4)])
    train = Features(feature, torch.full((13,), -1), torch.arange(13))
    found = nearest_neighbours(train, train.rows(slice(0)), queries=13, k=3)
    assert found.neighbour.shape == (13, 3)
    assert not (found.neighbour == found.query[:, None]).any()


@pytest.mark.parametrize("images", [3, 4, 80])
def test_umap_puts_groups_apart_however_few_images_there_are(images: int, recwarn: pytest.WarningsRecorder):
    pytest.importorskip("umap", reason="pip install 'fastbyol[umap]'")
    place = coordinates(groups(images // 2, images - images // 2), method="umap")
    assert place.shape == (images, 2)
    assert np.isfinite(place).all()
    assert not [str(warned.message) for warned in recwarn if "n_jobs" in str(warned.message)]
    if images == 80:
        apart = np.linalg.norm(place[:40].mean(axis=0) - place[40:].mean(axis=0))
        assert apart > 3 * place[:40].std(axis=0).max()
        assert np.array_equal(place, coordinates(groups(40, 40), method="umap")), "the same seed, the same map"


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
