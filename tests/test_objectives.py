"""The loss against the official code and against loops written from the paper's equations."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbyol.objectives import (
    NORMALIZATIONS,
    batch_normalize,
    byol_loss,
    infonce_beta_loss,
    l2_normalize,
    layer_normalize,
    least_squares_prediction,
    regression_loss,
)

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


def test_infonce_under_autocast_is_that_of_float32():
    """bf16 cosines of the closest pairs would come in steps of 1/256, and are divided by alpha."""
    query = torch.nn.functional.normalize(torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    close = query + 0.05 * torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    expected = infonce_beta_loss(query, close, close, query, beta=1.0, alpha=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert infonce_beta_loss(query, close, close, query, beta=1.0, alpha=0.1).item() == expected.item()


def test_infonce_with_beta_zero_is_byols_loss_up_to_a_constant():
    q1, q2, z1, z2 = torch.randn(4, 6, 5, dtype=torch.float64)
    assert infonce_beta_loss(q1, q2, z1, z2, beta=0.0, alpha=0.1).item() == pytest.approx(byol_loss(q1, q2, z1, z2).item() - 4, abs=1e-12)


def _rows(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(num, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1


def _normalised_by_loops(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return [(v - mean) / math.sqrt(variance + 1e-5) for v in values]


def test_layer_and_batch_normalisation_of_the_loss_are_the_papers_formulas():
    """Appendix F.6: n_LN over the features of a row, n_BN over the batch for each feature, both over sqrt(d)."""
    x = _rows(6, 5)
    by_row = torch.tensor([_normalised_by_loops(row) for row in x.tolist()], dtype=torch.float64) / math.sqrt(5)
    by_column = torch.tensor([_normalised_by_loops(column) for column in x.T.tolist()], dtype=torch.float64).T / math.sqrt(5)
    torch.testing.assert_close(layer_normalize(x), by_row, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(batch_normalize(x), by_column, rtol=1e-12, atol=1e-12)


def test_the_loss_with_each_normalisation_is_the_squared_distance_summed_over_both_directions():
    q1, q2, z1, z2 = (_rows(6, 5, seed) for seed in range(4))
    for name, normalize in NORMALIZATIONS.items():
        pairs = [(normalize(q1), normalize(z2)), (normalize(q2), normalize(z1))]
        expected = sum(float((a[i] - b[i]) @ (a[i] - b[i])) for a, b in pairs for i in range(6)) / 6
        assert byol_loss(q1, q2, z1, z2, normalization=name).item() == pytest.approx(expected, rel=1e-12)
    assert byol_loss(q1, q2, z1, z2, normalization="none").item() == pytest.approx(
        sum(((a - b) ** 2).sum().item() for a, b in ((q1, z2), (q2, z1))) / 6, rel=1e-12
    )
    # Rows less their mean: the layer's normalisation is then the unit vector, but for the variance's epsilon.
    centred = [x - x.mean(dim=1, keepdim=True) for x in (q1, q2, z1, z2)]
    assert byol_loss(*centred, normalization="layer_norm").item() == pytest.approx(byol_loss(*centred).item(), rel=1e-4)


def test_bf16_projections_are_normalised_in_float32():
    for normalize in NORMALIZATIONS.values():
        assert normalize(_rows(6, 5).bfloat16()).dtype == torch.float32


def test_the_predictor_in_closed_form_is_the_least_squares_solution():
    projection, predicted = _rows(20, 5), _rows(20, 5, seed=1)
    solution = np.linalg.lstsq(projection.numpy(), predicted.numpy(), rcond=None)[0]
    prediction = least_squares_prediction(projection, predicted)
    np.testing.assert_allclose(prediction.numpy(), projection.numpy() @ solution, rtol=1e-10, atol=1e-10)
    mixing = _rows(5, 5, seed=2)
    torch.testing.assert_close(least_squares_prediction(projection, projection @ mixing), projection @ mixing, rtol=1e-9, atol=1e-9)


def test_the_predictor_in_closed_form_also_exists_where_there_are_fewer_rows_than_dimensions():
    projection, predicted = _rows(4, 9), _rows(4, 9, seed=1)
    torch.testing.assert_close(least_squares_prediction(projection, predicted), predicted, rtol=1e-6, atol=1e-6)
    constant = torch.ones(6, 3)  # collapsed: rank 1
    prediction = least_squares_prediction(constant, _rows(6, 3).float())
    torch.testing.assert_close(prediction, _rows(6, 3).float().mean(dim=0).expand(6, 3))
    assert prediction.dtype == torch.float32


def test_the_gradient_reaches_the_projections_through_the_closed_form_predictor_but_not_its_solution():
    projection, predicted = _rows(20, 5).requires_grad_(), _rows(20, 5, seed=1).requires_grad_()
    solution = np.linalg.lstsq(projection.detach().numpy(), predicted.detach().numpy(), rcond=None)[0]
    outward = _rows(20, 5, seed=2)
    (least_squares_prediction(projection, predicted) * outward).sum().backward()
    np.testing.assert_allclose(projection.grad.numpy(), outward.numpy() @ solution.T, rtol=1e-9, atol=1e-9)
    assert predicted.grad is None
