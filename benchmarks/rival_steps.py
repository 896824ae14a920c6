"""BYOL's training step as other libraries take it, at their best: bf16 autocast, channels-last, a view at a time, torch's batch norm, the
target's update by foreach, their own LARS, which takes one tensor at a time.

Both have the product's encoder with torch's nn.BatchNorm2d, which is torchvision's ResNet, and a probe on view 1's detached feature, as our
step has. Neither keeps freed memory: each belongs into a process of its own.

solo-learn: its package pins other versions of torch and Lightning, so the step of its BYOL module is written here from torch's parts, as
its users run it: heads, then loss, each view in turn, and the spread of the projections that it logs. Its LARS is torch-optimizer's here,
the same rule by the same passes. It moves the target in a loop over tensors; here foreach does, which favours it.

lightly: its own heads, loss, LARS and update_momentum (by foreach), in the order of its example of BYOL.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals import import_rival
from benchmarks.updates import CPU, foreach_update, lightly_lars
from fastbyol.config.schema import OptimConfig, PrecisionConfig, TrainConfig
from fastbyol.data.batch import ViewBatch
from fastbyol.models import encoder_from
from fastbyol.optim.build import build_optimizer
from fastbyol.run.precision import autocast


class RivalStep(ABC):
    """Networks of another library, and an optimizer step with them. They are named as ours are, for `byol_param_groups`."""

    def __init__(self, config: TrainConfig, *, num_classes: int, lr: float, tau: float, device: torch.device = CPU) -> None:
        torch.manual_seed(config.seed)
        self._device = device
        encoder = encoder_from(config.model)
        feature_dim = int(encoder.feature_dim)  # type: ignore[arg-type]
        projector, predictor = self.heads(feature_dim, hidden_dim=config.model.hidden_dim, out_dim=config.model.projection_dim)
        self.online = nn.ModuleDict({"encoder": encoder, "projector": projector, "predictor": predictor})
        self.target = copy.deepcopy(nn.ModuleDict({"encoder": encoder, "projector": projector})).requires_grad_(False)
        self.probe = nn.Linear(feature_dim, num_classes).to(device)
        for network in (self.online, self.target):
            network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._lr, self._tau = lr, tau

    @abstractmethod
    def heads(self, feature_dim: int, *, hidden_dim: int, out_dim: int) -> tuple[nn.Module, nn.Module]:
        """Returns projector and predictor."""

    @abstractmethod
    def optimizer(self, *, lr: float) -> Callable[[], object]:
        """Returns the step of the library's LARS over the online network."""

    @abstractmethod
    def target_update(self, target: nn.Module, online: nn.Module, tau: float) -> Callable[[], object]:
        """Returns the update of a part of the target."""

    @abstractmethod
    def loss(self, batch: ViewBatch) -> Tensor:
        """Returns the loss of both views, with the probe's."""

    def run(self, batch: ViewBatch) -> None:
        """Takes one optimizer step."""
        # Like ours in float32 on a CPU that is slower with bf16: a rival at its best.
        with autocast(PrecisionConfig(autocast="bf16"), device=self._device):
            loss = self.loss(batch)
        loss.backward()
        self.update()
        self.online.zero_grad(set_to_none=True)
        self.probe.zero_grad(set_to_none=True)

    def update(self) -> None:
        """Takes LARS's step with the gradients that are there, and moves the target."""
        for update in self._updates:
            update()

    @functools.cached_property
    def _updates(self) -> list[Callable[[], object]]:
        # Made at the first step: until then `synchronise` may be called, and parameters may be replaced.
        pairs = [(self.target[part], self.online[part]) for part in ("encoder", "projector")]
        return [self.optimizer(lr=self._lr), *(self.target_update(*pair, self._tau) for pair in pairs)]

    def synchronise(self) -> None:
        """Makes every batch norm torch's nn.SyncBatchNorm, which has statistics of all ranks and refuses a CPU."""
        for network in (self.online, self.target):
            nn.SyncBatchNorm.convert_sync_batchnorm(network)

    def probe_loss(self, feature: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(self.probe(feature.detach()), label)


class SoloLearnStep(RivalStep):
    """Raises UserError if torch-optimizer, whose LARS stands for solo-learn's, is not installed."""

    def heads(self, feature_dim: int, *, hidden_dim: int, out_dim: int) -> tuple[nn.Module, nn.Module]:
        def head(in_dim: int) -> nn.Module:
            return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim))

        return head(feature_dim), head(out_dim)

    def optimizer(self, *, lr: float) -> Callable[[], object]:
        optimizer = build_optimizer(OptimConfig(name="torch_optimizer_lars"), self.online)
        for group in optimizer.param_groups:
            group["lr"] = lr
        return optimizer.step

    def target_update(self, target: nn.Module, online: nn.Module, tau: float) -> Callable[[], object]:
        return foreach_update(target, online, tau)

    def loss(self, batch: ViewBatch) -> Tensor:
        views, online, target = (batch.view1, batch.view2), self.online, self.target
        features = [online["encoder"](view) for view in views]
        with torch.no_grad():
            aims = [target["projector"](target["encoder"](view)) for view in views]
        projections = [online["projector"](feature) for feature in features]
        predictions = [online["predictor"](projection) for projection in projections]
        # A prediction of one view is compared with the target's projection of the other.
        of_pairs = [F.cosine_similarity(p, aim, dim=-1).mean() for p, aim in zip(predictions, reversed(aims), strict=True)]
        with torch.no_grad():
            sum(F.normalize(projection, dim=-1).std(dim=0).mean() for projection in projections)
        return 4 - 2 * (of_pairs[0] + of_pairs[1]) + self.probe_loss(features[0], batch.label)


class LightlyStep(RivalStep):
    """Raises UserError if lightly is not installed."""

    def __init__(self, config: TrainConfig, **given: Any) -> None:
        self._criterion = import_rival("lightly.loss").NegativeCosineSimilarity()
        super().__init__(config, **given)

    def heads(self, feature_dim: int, *, hidden_dim: int, out_dim: int) -> tuple[nn.Module, nn.Module]:
        modules = import_rival("lightly.models.modules")
        return modules.BYOLProjectionHead(feature_dim, hidden_dim, out_dim), modules.BYOLPredictionHead(out_dim, hidden_dim, out_dim)

    def optimizer(self, *, lr: float) -> Callable[[], object]:
        return lightly_lars(self.online, lr=lr)

    def target_update(self, target: nn.Module, online: nn.Module, tau: float) -> Callable[[], object]:
        update_momentum = import_rival("lightly.models.utils").update_momentum
        return lambda: update_momentum(online, target, tau)

    def loss(self, batch: ViewBatch) -> Tensor:
        online, target = self.online, self.target
        features, predictions, aims = [], [], []
        for view in (batch.view1, batch.view2):
            features.append(online["encoder"](view))
            predictions.append(online["predictor"](online["projector"](features[-1])))
            with torch.no_grad():
                aims.append(target["projector"](target["encoder"](view)))
        of_pairs = [self._criterion(p, aim) for p, aim in zip(predictions, reversed(aims), strict=True)]
        return (of_pairs[0] + of_pairs[1]) / 2 + self.probe_loss(features[0], batch.label)


SOLO_LEARN, LIGHTLY = "solo-learn's module at its best", "lightly's blocks at their best"
STEPS: dict[str, type[RivalStep]] = {SOLO_LEARN: SoloLearnStep, LIGHTLY: LightlyStep}
"""The rivals' steps, by the name of their row."""
