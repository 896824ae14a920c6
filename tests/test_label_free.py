"""Measures without labels against closed forms and float64 loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastbyol.evaluation.label_free import LIDAR_DELTA, LIDAR_EPSILON, alignment, lidar, other_view_hits, uniformity


def random_features(num: int, views: int, dim: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, views, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_alignment_is_0_for_equal_views_4_for_opposite_ones_and_2_for_unrelated_ones():
    one = F.normalize(random_features(50, 1, 8), dim=2)
    assert alignment(torch.cat([one, one], dim=1)) == 0
    assert alignment(torch.cat([one, -one], dim=1)) == pytest.approx(4)
    unrelated = F.normalize(random_features(20_000, 4, 8), dim=2)
    assert alignment(unrelated) == pytest.approx(2, abs=0.02)


def test_uniformity_equals_the_loop_over_all_pairs():
    unit = F.normalize(random_features(12, 1, 5)[:, 0], dim=1)
    pairs = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i in range(12) for j in range(12) if i < j]
    assert uniformity(unit) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-12)
    assert uniformity(unit[:1].expand(5, 5)) == pytest.approx(0, abs=1e-12)


def test_uniformity_of_points_on_a_circle_is_bessels_function():
    """On the unit circle E exp(-2 |x - y|^2) = e^-4 I0(4)."""
    angle = torch.linspace(0, 2 * math.pi, 4001, dtype=torch.float64)[:-1]
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert uniformity(circle) == pytest.approx(-4 + math.log(np.i0(4)), abs=1e-3)


def loop_lidar(features: np.ndarray) -> float:
    """Reference in float64, as the paper writes it: the inverse root of the covariance within, around the covariance between."""
    num, views, dim = features.shape
    mean = features.mean(axis=1)
    between, within = np.zeros((dim, dim)), LIDAR_DELTA * np.eye(dim)
    for i in range(num):
        between += np.outer(mean[i] - mean.mean(axis=0), mean[i] - mean.mean(axis=0)) / (num - 1)
        for v in range(views):
            within += np.outer(features[i, v] - mean[i], features[i, v] - mean[i]) / (num * (views - 1))
    value, axes = np.linalg.eigh(within)
    root = axes @ np.diag(value**-0.5) @ axes.T
    eigenvalue = np.linalg.eigvalsh(root @ between @ root).clip(min=0)
    share = eigenvalue / eigenvalue.sum() + LIDAR_EPSILON
    return float(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.parametrize("shape", [(30, 4, 6), (5, 3, 9)])
def test_lidar_equals_the_papers_formula_in_a_loop(shape):
    features = random_features(*shape) + 2 * random_features(shape[0], 1, shape[2], seed=1)
    assert float(lidar(features)) == pytest.approx(loop_lidar(features.numpy()), rel=1e-3)


def test_lidar_counts_directions_that_tell_images_apart_and_not_those_of_the_views():
    image = random_features(4000, 1, 10)
    image[:, :, 6:] = 0  # images differ in six directions
    noise = 0.1 * random_features(4000, 4, 10, seed=1)
    noise[:, :, 6:] *= 100  # and views in the four others
    assert float(lidar(image + noise)) == pytest.approx(6, abs=0.4)


def test_views_are_found_by_cosine_among_all_images():
    first = torch.eye(4)
    features = torch.stack([first, 3 * first], dim=1)
    assert other_view_hits(features).tolist() == [True] * 4
    features[[0, 1], 1] = features[[1, 0], 1]
    assert other_view_hits(features).tolist() == [False, False, True, True]
