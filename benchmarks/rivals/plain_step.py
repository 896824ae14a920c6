"""A BYOL step as in most libraries: float32, NCHW, eager, a forward for each view, updates one tensor at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.updates import solo_learn_update
from fastbyol.byol import build_byol
from fastbyol.config.schema import OptimConfig, TrainConfig
from fastbyol.data.batch import ViewBatch
from fastbyol.models.view_batchnorm import convert_to_batchnorm
from fastbyol.objectives import byol_loss
from fastbyol.optim.build import build_optimizer


class PlainStep:
    """The product's networks and loss, with torch's own batch norm, torch-optimizer's LARS and solo-learn's target update."""

    def __init__(self, config: TrainConfig, *, num_classes: int, lr: float, tau: float) -> None:
        torch.manual_seed(config.seed)
        self._byol = build_byol(config.model, num_classes=num_classes)
        convert_to_batchnorm(self._byol)
        self._optimizer = build_optimizer(OptimConfig(name="torch_optimizer_lars"), self._byol)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._tau = tau

    def run(self, batch: ViewBatch) -> None:
        """Takes one optimizer step."""
        online, target, views = self._byol.online, self._byol.target, (batch.view1, batch.view2)
        features = [online.encoder(view) for view in views]
        predictions = [online.predictor(online.projector(feature)) for feature in features]
        with torch.no_grad():
            projections = [target.projector(target.encoder(view)) for view in views]
        probe_loss = F.cross_entropy(self._byol.probe(features[0].detach()), batch.label)
        (byol_loss(*predictions, *projections) + probe_loss).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        followers = (online.encoder, target.encoder), (online.projector, target.projector)
        for source, follower in followers:
            solo_learn_update(list(follower.parameters()), list(source.parameters()), self._tau)
