"""Linear evaluation: l2-regularised multinomial logistic regression on frozen, standardised features."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastbyol.config.errors import UserError
from fastbyol.evaluation.features import Features

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

L2_GRID = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Penalties from strong to weak, so that each fit starts from a smoother solution; on a tie the strongest is kept."""
HELD_OUT_SHARE = 0.2
MAX_LBFGS_STEPS = 500
LBFGS_TOLERANCE = 1e-4
"""A looser tolerance stops too early: 1e-2 cost 2.5 points on 10,000 x 128 synthetic features."""


ONE_THREAD_WORK = 2**28
"""Below this many multiply-adds per pass, BLAS gets one thread: its spinning threads made small fits 50 times slower on busy cores."""


@dataclass(frozen=True)
class LinearClassifier:
    """A fitted classifier: score = ((feature - mean) / std) @ weight + bias.

    mean, std: (D,); weight: (D, K); bias: (K,), all float32; a class not seen in training has bias -inf. l2: the chosen penalty, in
    mean cross-entropy + l2 / 2 |weight|^2. held_out_top1: accuracy of each penalty of the grid on the held-out part of the training
    set.
    """

    mean: torch.Tensor
    std: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    l2: float
    held_out_top1: dict[float, float]

    def scores(self, feature: torch.Tensor) -> torch.Tensor:
        """Maps (N, D) float32 features to (N, K) logits."""
        return (feature - self.mean) / self.std @ self.weight + self.bias


def fit_linear(
    train: Features, *, num_classes: int, l2_grid: tuple[float, ...] = L2_GRID, held_out_share: float = HELD_OUT_SHARE, seed: int = 0
) -> LinearClassifier:
    """Chooses the penalty that does best on a held-out, class-balanced part of `train`, then fits on all of `train`.

    No validation data are used: the final accuracy is measured once, outside. scikit-learn's L-BFGS, meant for up to about 1e5
    images. This is the paper's transfer protocol (appendix D.2: l2-regularised logistic regression by L-BFGS, penalty from a log
    grid).
    Differs from the paper: its ImageNet figures come from SGD with Nesterov momentum 0.9 (80 epochs, batch 1024, random crop and
    flip, no regularisation, learning rate from {0.4, 0.3, 0.2, 0.1, 0.05}, appendix C.1); here features are computed once, from the
    centre crop.
    Raises UserError if there are fewer than two classes, or no class has two images.
    """
    label = train.label.numpy()
    if len(np.unique(label)) < 2:
        raise UserError(f"the training set has {len(np.unique(label))} class: linear evaluation needs images of at least 2")
    mean, std = _standardisation(train.feature)
    standard = ((train.feature - mean) / std).numpy()
    held_out = held_out_mask(label, share=held_out_share, seed=seed)
    held_out_top1 = _grid_accuracy(standard, label, held_out, l2_grid)
    l2 = max(l2_grid, key=lambda value: (held_out_top1[value], value))
    weight, bias = _refit(standard, label, l2=l2, num_classes=num_classes)
    return LinearClassifier(mean=mean, std=std, weight=weight, bias=bias, l2=l2, held_out_top1=held_out_top1)


def held_out_mask(label: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """Returns a mask (N,) bool that selects a random `share` of each class, at least one image but never all. Seeded."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(len(label), dtype=bool)
    for value in np.unique(label):
        members = rng.permutation(np.flatnonzero(label == value))
        mask[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    if not mask.any():
        raise UserError("every class of the training set has a single image: linear evaluation needs at least 2 in some class")
    return mask


def _standardisation(feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and std (D,) over the images; a constant feature gets std 1, so that it becomes zero."""
    std, mean = torch.std_mean(feature.double(), dim=0, correction=0)
    # Relative to the mean: rounding gives a constant feature a tiny std, which would blow it up to noise.
    std = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, 1.0)
    return mean.float(), std.float()


def _grid_accuracy(standard: np.ndarray, label: np.ndarray, held_out: np.ndarray, l2_grid: tuple[float, ...]) -> dict[float, float]:
    model = _regression(warm_start=True)
    truth, accuracy = label[held_out], {}
    for l2 in l2_grid:
        _fit(model, standard[~held_out], label[~held_out], l2=l2)
        accuracy[l2] = float(np.mean(model.predict(standard[held_out]) == truth))
    return accuracy


def _refit(standard: np.ndarray, label: np.ndarray, *, l2: float, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    model = _regression(warm_start=False)
    _fit(model, standard, label, l2=l2)
    coefficient, intercept = torch.from_numpy(model.coef_).float(), torch.from_numpy(np.atleast_1d(model.intercept_)).float()
    if len(coefficient) == 1:  # for two classes scikit-learn has a single logit
        coefficient, intercept = torch.cat([-coefficient, coefficient]) / 2, torch.cat([-intercept, intercept]) / 2
    weight, bias = torch.zeros(standard.shape[1], num_classes), torch.full((num_classes,), -torch.inf)
    seen = torch.from_numpy(model.classes_)
    weight[:, seen], bias[seen] = coefficient.T, intercept
    return weight, bias


def _regression(*, warm_start: bool) -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(solver="lbfgs", max_iter=MAX_LBFGS_STEPS, tol=LBFGS_TOLERANCE, warm_start=warm_start)


def _fit(model: LogisticRegression, standard: np.ndarray, label: np.ndarray, *, l2: float) -> None:
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # scikit-learn's own dependency

    work = standard.size * len(np.unique(label))
    with threadpool_limits(1 if work < ONE_THREAD_WORK else None), warnings.catch_warnings():
        # With a weak penalty the accuracy converges long before the weights do.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # scikit-learn's C multiplies the sum of the losses.
        model.set_params(C=1 / (l2 * len(label))).fit(standard, label)
