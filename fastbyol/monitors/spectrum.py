"""How many directions a set of vectors uses: three numbers computed from the singular values of the matrix of all vectors.

None of them needs a label. They say how many dimensions are in use, not whether these hold what a task needs: noise uses all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

RANKME_EPSILON = 1e-7
"""Added to each share of the singular values, as in RankMe's equation 1."""


def singular_values(rows: Tensor) -> Tensor:
    """Returns the min(N, D) singular values of (N, D), ascending, float64, from the eigenvalues of the smaller Gram matrix.

    A tenth of the time of an SVD. Squares lose half of the digits, hence float64. NaN counts as 0, because eigvalsh may raise on it.
    """
    rows = rows.double().nan_to_num()
    gram = rows.T @ rows if rows.shape[1] <= len(rows) else rows @ rows.T
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()


def effective_rank(rows: Tensor) -> Tensor:
    """Returns exp of the entropy of the shares that the singular values of the centred rows (N, D) have in their sum: 1 to min(N, D).

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007. Centred, so that a direction common to all vectors does not count.
    """
    rows = rows.double()
    return _exp_entropy(_shares(singular_values(rows - rows.mean(dim=0))))


def rankme(rows: Tensor) -> Tensor:
    """Returns RankMe of the rows (N, D): their effective rank without centring, with a small epsilon added to each share.

    Source: Garrido et al., RankMe, ICML 2023, equation 1. Runs of one method whose RankMe is low are rarely good; a high one is no proof.
    """
    return _exp_entropy(_shares(singular_values(rows)) + RANKME_EPSILON)


def participation_ratio(rows: Tensor) -> Tensor:
    """Returns (sum of v)^2 / (sum of v^2) with the variances v along the principal axes of the rows (N, D): 1 to D.

    It counts only the directions that hold the variance, so it is lower than the effective rank. Source: Gao et al., A theory of
    multineuronal dimensionality, dynamics and measurement, bioRxiv 2017.
    """
    rows = rows.double()
    variance = singular_values(rows - rows.mean(dim=0)).square()
    return variance.sum().square() / variance.square().sum().clamp_min(torch.finfo(torch.float64).tiny)


def _shares(singular: Tensor) -> Tensor:
    return singular / singular.sum().clamp_min(1e-12)


def _exp_entropy(share: Tensor) -> Tensor:
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
