"""The loss against the official code and against loops written from the paper's equations."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbyol.objectives import byol_loss, infonce_beta_loss, l2_normalize, regression_loss

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("pred_view1", "pred_view2", "proj_target_view1", "proj_target_view2")


@pytest.mark.parametrize(("precision", "tolerance", "gradient_tolerance"), [("f64", 9e-15, 4e-15), ("f32", 5e-6, 1e-4)])
def test_loss_and_gradients_equal_the_official_code(precision, tolerance, gradient_tolerance):
    golden = np.load(GOLDEN / f"loss_{precision}.npz")
    prediction1, prediction2, projection1, projection2 = (torch.tensor(golden[name]) for name in NAMES)
    prediction1.requires_grad_()
    prediction2.requires_grad_()
    loss = byol_loss(prediction1, prediction2, projection1, projection2)
    loss.backward()
    assert abs(loss.item() - float(golden["total_loss"])) <= tolerance * 8
    per_sample = regression_loss(prediction1, projection2).detach().numpy()
    np.testing.assert_allclose(per_sample, golden["per_sample_loss_12"], atol=tolerance * 4, rtol=0)
    np.testing.assert_allclose(l2_normalize(prediction1).detach().numpy(), golden["l2norm_pred_view1"], atol=tolerance, rtol=0)
    for prediction, name in ((prediction1, "grad_pred_view1"), (prediction2, "grad_pred_view2")):
        ours, theirs = prediction.grad.numpy(), golden[name]
        # Rows whose gradient is 0 in exact arithmetic are compared absolutely, the others relative to their own norm.
        scale = np.maximum(np.linalg.norm(theirs, axis=1, keepdims=True), 1.0)
        assert np.max(np.abs(ours - theirs) / scale) <= gradient_tolerance


def test_the_loss_is_the_sum_of_both_directions_from_0_to_8():
    x = torch.randn(5, 7, dtype=torch.float64)
    assert byol_loss(x, x, x, x).item() == pytest.approx(0, abs=1e-12)
    assert byol_loss(x, x, -x, -x).item() == pytest.approx(8, abs=1e-12)


def _infonce_by_loops(queries, same, other, beta, alpha):
    """Equations 6 to 9 for one direction, an image at a time."""
    num = len(queries)
    total = 0.0
    for i in range(num):
        among = [math.exp(float(queries[i] @ same[j]) / alpha) for j in range(num) if j != i]
        across = [math.exp(float(queries[i] @ other[j]) / alpha) for j in range(num)]
        total += 2 / num * float(queries[i] @ other[i]) - beta * 2 * alpha / num * math.log(sum(among) + sum(across))
    return total


@pytest.mark.parametrize(("beta", "alpha"), [(0.0, 0.1), (0.5, 0.1), (1.0, 0.3)])
def test_infonce_beta_equals_the_papers_equations(beta, alpha):
    generator = torch.Generator().manual_seed(0)
    q1, q2, z1, z2 = torch.nn.functional.normalize(torch.randn(4, 6, 5, dtype=torch.float64, generator=generator), dim=-1)
    expected = -(_infonce_by_loops(q1, z1, z2, beta, alpha) + _infonce_by_loops(q2, z2, z1, beta, alpha))
    assert infonce_beta_loss(q1, q2, z1, z2, beta=beta, alpha=alpha).item() == pytest.approx(expected, abs=1e-12)


def test_infonce_with_beta_zero_is_byols_loss_up_to_a_constant():
    q1, q2, z1, z2 = torch.randn(4, 6, 5, dtype=torch.float64)
    assert infonce_beta_loss(q1, q2, z1, z2, beta=0.0, alpha=0.1).item() == pytest.approx(byol_loss(q1, q2, z1, z2).item() - 4, abs=1e-12)
