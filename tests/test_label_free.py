"""Measures without labels against closed forms and float64 loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastbyol.evaluation.label_free import alignment, other_view_hits, uniformity


def random_features(num: int, views: int, dim: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, views, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_alignment_is_0_for_equal_views_4_for_opposite_ones_and_2_for_unrelated_ones():
    one = F.normalize(random_features(50, 1, 8), dim=2)
    assert alignment(torch.cat([one, one], dim=1)) == 0
    assert alignment(torch.cat([one, -one], dim=1)) == pytest.approx(4)
    unrelated = F.normalize(random_features(20_000, 2, 8), dim=2)
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


def test_views_are_found_by_cosine_among_all_images():
    first = torch.eye(4)
    features = torch.stack([first, 3 * first], dim=1)
    assert other_view_hits(features).tolist() == [True] * 4
    features[[0, 1], 1] = features[[1, 0], 1]
    assert other_view_hits(features).tolist() == [False, False, True, True]
