"""The MLP used as projector and predictor."""

from __future__ import annotations

from torch import nn

from fastbyol.config.errors import require_at_least
from fastbyol.models.resnet import BN_EPS, BN_MOMENTUM


def mlp_head(in_dim: int, *, hidden_dim: int = 4096, out_dim: int = 256, layers: int = 2, last_bias: bool = False) -> nn.Sequential:
    """Builds Linear - BN - ReLU, (layers - 1) times, then one Linear, without bias unless `last_bias`: (N, in_dim) -> (N, out_dim).

    Source: official utils/networks.py (`MLP`): hidden linear layers have a bias, the last one has neither bias nor BN.
    Differs from the paper: its pseudo-code (appendix J.2) gives the last layer a bias; its code does not.
    """
    require_at_least("layers", layers, 1)
    modules: list[nn.Module] = []
    dim = in_dim
    # The paper's heads have two layers; other depths are for its ablation (appendix F).
    for _ in range(layers - 1):
        modules += [nn.Linear(dim, hidden_dim), nn.BatchNorm1d(hidden_dim, eps=BN_EPS, momentum=BN_MOMENTUM), nn.ReLU(inplace=True)]
        dim = hidden_dim
    modules.append(nn.Linear(dim, out_dim, bias=last_bias))
    return nn.Sequential(*modules)
