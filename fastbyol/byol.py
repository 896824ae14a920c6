"""BYOL: an online network learns to predict what a slowly moving target network sees in the other view (Grill et al., sections 3.1, 3.2)."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol.config.schema import ModelConfig, ObjectiveConfig
from fastbyol.models import encoder_from
from fastbyol.models.heads import mlp_head
from fastbyol.models.resnet import truncated_normal_
from fastbyol.models.view_batchnorm import convert_to_view_batchnorm
from fastbyol.objectives import byol_loss, infonce_beta_loss, least_squares_prediction
from fastbyol.optim.ema import TargetUpdate

BYOL_OBJECTIVE = ObjectiveConfig()
NUM_VIEWS = 2


class OnlineOutput(NamedTuple):
    """feature (N, F) of the encoder, projection (N, D), prediction (N, D); the prediction is the projection where there is no predictor."""

    feature: Tensor
    projection: Tensor
    prediction: Tensor


class BYOLOutput(NamedTuple):
    """What one forward gives: the losses to minimise (scalars), and what monitors look at (detached).

    loss: the objective; BYOL's regression loss in [0, 8] unless the run has another.
    alignment: mean cosine between each prediction and what it predicts, in [-1, 1].
    probe_loss: cross-entropy of the linear probe on view 1, over the images with a label; its gradient stops at the feature.
    probe_correct: (N,) 1 where the probe's first guess was the label, else 0; NaN for an image without one.
    projection: (N, D) online projection of view 1.
    feature: (N, F) encoder output for view 1.
    """

    loss: Tensor
    alignment: Tensor
    probe_loss: Tensor
    probe_correct: Tensor
    projection: Tensor
    feature: Tensor


class Online(nn.Module):
    """encoder, projector, predictor; in training each view has batch statistics of its own."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[OnlineOutput, OnlineOutput]:
        """What each view (N, 3, H, W) becomes; both travel as one batch."""
        feature = self.encoder(torch.cat([view1, view2]))
        projection = self.projector(feature)
        halves = (x.chunk(NUM_VIEWS) for x in (feature, projection, self.predictor(projection)))
        output1, output2 = (OnlineOutput(*half) for half in zip(*halves, strict=True))
        return output1, output2


class Target(nn.Module):
    """encoder, projector: a frozen copy of the online ones, in training mode, with batch statistics of its own."""

    def __init__(self, online: Online) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(online.encoder)
        self.projector = copy.deepcopy(online.projector)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """The projection (N, D) of each view, without gradient."""
        projection1, projection2 = self.projector(self.encoder(torch.cat([view1, view2]))).chunk(NUM_VIEWS)
        return projection1, projection2


class BYOL(nn.Module):
    """Online and target network, the symmetrised loss, and a linear probe that watches without touching.

    Args:
        encoder: (N, 3, H, W) -> (N, F); has `feature_dim`.
        hidden_dim, projection_dim: width of the heads' hidden layers and of the projection.
        projector_layers, predictor_layers: number of Linears; 0 predictor layers leave it out.
        num_classes: of the probe.
        objective: BYOL's regression, or another of the InfoNCE-beta family.

    Differs from the paper: the target starts as a copy of the online network, as the paper's pseudo-code has it; the official code draws it from
    another key and saw no difference.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_classes: int,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        projector_layers: int = 2,
        predictor_layers: int = 2,
        objective: ObjectiveConfig = BYOL_OBJECTIVE,
    ) -> None:
        super().__init__()
        self.objective = objective
        feature_dim = int(encoder.feature_dim)  # type: ignore[arg-type]
        projector = mlp_head(feature_dim, hidden_dim=hidden_dim, out_dim=projection_dim, layers=projector_layers)
        predictor: nn.Module = nn.Identity()
        if predictor_layers:
            predictor = mlp_head(projection_dim, hidden_dim=hidden_dim, out_dim=projection_dim, layers=predictor_layers)
        self.online = Online(encoder, projector, predictor)
        convert_to_view_batchnorm(self.online, views=NUM_VIEWS)
        self.target = Target(self.online)
        self.probe = nn.Linear(feature_dim, num_classes)

    def forward(self, view1: Tensor, view2: Tensor, label: Tensor) -> BYOLOutput:
        """Both views through both networks as one batch of 2N images, in which BN statistics are per view.

        Args:
            view1, view2: (N, 3, H, W), normalised.
            label: (N,) int64, seen by the probe only; below 0: the image has none.
        """
        online1, online2 = self.online(view1, view2)
        projections = self._predicted(view1, view2, online1, online2)
        predictions = online1.prediction, online2.prediction
        if self.objective.predictor == "least_squares":
            pairs = (online1.projection, projections[1]), (online2.projection, projections[0])
            predictions = least_squares_prediction(*pairs[0]), least_squares_prediction(*pairs[1])
        regression = byol_loss(*predictions, *projections)
        logits = self.probe(online1.feature.detach())
        return BYOLOutput(
            loss=self._loss(predictions, projections, regression),
            alignment=1 - regression.detach() / 4,
            probe_loss=_probe_loss(logits if logits.dtype == torch.float64 else logits.float(), label),
            probe_correct=torch.where(label >= 0, (logits.detach().argmax(dim=1) == label).float(), torch.nan),
            projection=online1.projection.detach(),
            feature=online1.feature.detach(),
        )

    def _loss(self, predictions: tuple[Tensor, Tensor], projections: tuple[Tensor, Tensor], regression: Tensor) -> Tensor:
        """What the run minimises: BYOL's regression of unit vectors, unless the objective says otherwise."""
        if self.objective.beta > 0:
            return infonce_beta_loss(*predictions, *projections, beta=self.objective.beta, alpha=self.objective.alpha)
        if self.objective.normalization != "l2":
            return byol_loss(*predictions, *projections, normalization=self.objective.normalization)
        return regression

    def _predicted(self, view1: Tensor, view2: Tensor, online1: OnlineOutput, online2: OnlineOutput) -> tuple[Tensor, Tensor]:
        """The projections (N, D) of both views that the predictions are held to."""
        if self.objective.target == "ema":
            return self.target(view1, view2)
        if self.objective.target == "online":
            return online1.projection, online2.projection
        return online1.projection.detach(), online2.projection.detach()

    def update_target(self, tau: float | Tensor) -> None:
        """Moves the target's parameters towards the online ones; call it once after each optimizer step. BN statistics stay each network's own."""
        self.target_update(tau).apply()

    def target_update(self, tau: float | Tensor, *, backend: str = "auto") -> TargetUpdate:
        """Returns the same move, for an optimizer's `step(target_update=...)`; backend: the config's optim.update."""
        return TargetUpdate(self._target_parameters(), self._online_parameters(), tau, backend)

    def _target_parameters(self) -> list[Tensor]:
        return [*self.target.encoder.parameters(), *self.target.projector.parameters()]

    def _online_parameters(self) -> list[Tensor]:
        return [*self.online.encoder.parameters(), *self.online.projector.parameters()]


def _probe_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy over the images with a label, 0 where none has one (torch's own mean is NaN then)."""
    total = F.cross_entropy(logits, label.clamp(min=-1), ignore_index=-1, reduction="sum")
    return total / (label >= 0).sum().clamp(min=1)


def build_byol(config: ModelConfig, *, num_classes: int, objective: ObjectiveConfig = BYOL_OBJECTIVE) -> BYOL:
    """The networks of a config, freshly initialised from torch's global generator."""
    byol = BYOL(
        encoder_from(config),
        num_classes=num_classes,
        hidden_dim=config.hidden_dim,
        projection_dim=config.projection_dim,
        projector_layers=config.projector_layers,
        predictor_layers=config.predictor_layers,
        objective=objective,
    )
    if config.initialisation == "truncated_normal":
        for head in (byol.online.projector, byol.online.predictor, byol.probe):
            head.apply(_truncated_normal_linear)
        byol.target.projector.load_state_dict(byol.online.projector.state_dict())
    return byol


def _truncated_normal_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        truncated_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
