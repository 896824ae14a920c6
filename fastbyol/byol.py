"""BYOL: an online network learns to predict how a slowly moving target network represents the other view.

Source: Grill et al., sections 3.1 and 3.2.
"""

from __future__ import annotations

import copy
from functools import partial
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
    """Outputs for one view: feature (N, F), projection (N, D), prediction (N, D), which is the projection without a predictor."""

    feature: Tensor
    projection: Tensor
    prediction: Tensor


class BYOLOutput(NamedTuple):
    """Outputs of one forward pass: losses to minimise (scalars) and detached tensors for the monitors.

    loss: the objective; BYOL's regression loss in [0, 8] unless the config chooses another one.
    alignment: mean cosine between each prediction and the projection it predicts, in [-1, 1].
    probe_loss: cross-entropy of the linear probe on view 1, over the labelled images; its gradient stops at the feature.
    probe_correct: (N,) 1 if the probe's first guess is the label, else 0; NaN for an unlabelled image, and for all if there is one class.
    projection: (N, D) online projection of view 1.
    feature: (N, F) encoder output for view 1.
    """

    loss: Tensor
    alignment: Tensor
    probe_loss: Tensor
    probe_correct: Tensor
    projection: Tensor
    feature: Tensor


def one_batch(view1: Tensor, view2: Tensor | None) -> Tensor:
    """Returns both views as one batch (2N, ...), view 1 first; view2 None: `view1` is that batch already."""
    return view1 if view2 is None else torch.cat([view1, view2])


class Online(nn.Module):
    """Online network: encoder, projector and predictor. In training, batch-norm statistics are computed for each view separately."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor

    def forward(self, view1: Tensor, view2: Tensor | None = None) -> tuple[OnlineOutput, OnlineOutput]:
        """Returns the outputs for both views, each (N, 3, H, W), or given as one batch (2N, 3, H, W), view 1 first."""
        # One forward pass over 2N images is faster than two over N. It gives the same result because batch norm sees each view separately.
        feature = self.encoder(one_batch(view1, view2))
        projection = self.projector(feature)
        halves = (x.chunk(NUM_VIEWS) for x in (feature, projection, self.predictor(projection)))
        output1, output2 = (OnlineOutput(*half) for half in zip(*halves, strict=True))
        return output1, output2


class Target(nn.Module):
    """Target network: a frozen copy of the online encoder and projector. It stays in training mode, with batch statistics of its own."""

    # It has no predictor. Without that asymmetry, BYOL collapses: the paper's ablation has 0.2 % top-1 without any (section 5).
    def __init__(self, online: Online) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(online.encoder)
        self.projector = copy.deepcopy(online.projector)
        # No gradient buffers, no DDP messages, and no optimizer state for the target.
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, view1: Tensor, view2: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the projection (N, D) of each view, without gradient. The views are given as to `Online`."""
        projection1, projection2 = self.projector(self.encoder(one_batch(view1, view2))).chunk(NUM_VIEWS)
        return projection1, projection2


class BYOL(nn.Module):
    """The online and target networks, the symmetrised loss, and a linear probe that does not affect training.

    Args:
        encoder: (N, 3, H, W) -> (N, F); has `feature_dim`.
        hidden_dim, projection_dim: width of the heads' hidden layers and of the projection.
        projector_layers, predictor_layers: number of linear layers; 0 predictor layers means no predictor.
        head_bias: gives the last linear layer of both heads a bias.
        num_classes: number of classes of the probe.
        objective: BYOL's regression, or another member of the InfoNCE-beta family.

    Differs from the paper: the target starts as a copy of the online network, as in the paper's pseudo-code; the official code
    initialises it from another random key. The authors saw no difference.
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
        head_bias: bool = False,
        objective: ObjectiveConfig = BYOL_OBJECTIVE,
    ) -> None:
        super().__init__()
        self.objective = objective
        feature_dim = int(encoder.feature_dim)  # type: ignore[arg-type]
        head = partial(mlp_head, hidden_dim=hidden_dim, out_dim=projection_dim, last_bias=head_bias)
        projector = head(feature_dim, layers=projector_layers)
        predictor: nn.Module = nn.Identity()
        if predictor_layers:
            predictor = head(projection_dim, layers=predictor_layers)
        self.online = Online(encoder, projector, predictor)
        # Before the target is copied, so that both networks have statistics per view.
        convert_to_view_batchnorm(self.online, views=NUM_VIEWS)
        self.target = Target(self.online)
        self.probe = nn.Linear(feature_dim, num_classes)

    def forward(self, view1: Tensor, view2: Tensor | None, label: Tensor) -> BYOLOutput:
        """Runs both views, normalised, through both networks.

        view1, view2: (N, 3, H, W) each; or view1 (2N, 3, H, W), one view after the other, and view2 None, which saves a copy.
        label: (N,) int64, used by the probe only; negative for an unlabelled image.
        """
        views = one_batch(view1, view2)
        # Run the target first: its activations are freed before those of the online network, kept for the backward pass, fill the memory.
        of_target = self.target(views) if self.objective.target == "ema" else None
        online1, online2 = self.online(views)
        projections = of_target or self._predicted(online1, online2)
        predictions = online1.prediction, online2.prediction
        if self.objective.predictor == "least_squares":
            # Each view predicts the other one, as in the loss.
            pairs = (online1.projection, projections[1]), (online2.projection, projections[0])
            predictions = least_squares_prediction(*pairs[0]), least_squares_prediction(*pairs[1])
        regression = byol_loss(*predictions, *projections)
        logits = self.probe(online1.feature.detach())
        return BYOLOutput(
            # The probe reads a detached feature, so labels never influence the encoder.
            loss=self._loss(predictions, projections, regression),
            # regression = 4 - 2 (cos1 + cos2), so this is the mean of both cosines.
            alignment=1 - regression.detach() / 4,
            probe_loss=_probe_loss(logits if logits.dtype == torch.float64 else logits.float(), label),
            # With a single class every guess is right, which would look like success.
            probe_correct=torch.where((label >= 0) & (logits.shape[1] > 1), (logits.detach().argmax(dim=1) == label).float(), torch.nan),
            projection=online1.projection.detach(),
            feature=online1.feature.detach(),
        )

    def _loss(self, predictions: tuple[Tensor, Tensor], projections: tuple[Tensor, Tensor], regression: Tensor) -> Tensor:
        """Returns the loss to minimise: BYOL's regression of unit vectors, unless the objective chooses another one."""
        if self.objective.beta > 0:
            return infonce_beta_loss(*predictions, *projections, beta=self.objective.beta, alpha=self.objective.alpha)
        if self.objective.normalization != "l2":
            return byol_loss(*predictions, *projections, normalization=self.objective.normalization)
        return regression

    def _predicted(self, online1: OnlineOutput, online2: OnlineOutput) -> tuple[Tensor, Tensor]:
        """Returns the online network's own projections (N, D) of both views, for an objective without a target network."""
        if self.objective.target == "online":
            return online1.projection, online2.projection
        return online1.projection.detach(), online2.projection.detach()

    def update_target(self, tau: float | Tensor) -> None:
        """Moves the target's parameters, not its batch-norm statistics, towards the online ones; call it once after each optimizer step."""
        self.target_update(tau).apply()

    def target_update(self, tau: float | Tensor, *, backend: str = "auto") -> TargetUpdate:
        """Returns the same update for an optimizer's `step(target_update=...)`. backend: the config's optim.update."""
        # Parameters only: the target's batch-norm statistics are those of its own forward passes, as in the official code.
        target = [*self.target.encoder.parameters(), *self.target.projector.parameters()]
        online = [*self.online.encoder.parameters(), *self.online.projector.parameters()]
        return TargetUpdate(target, online, tau, backend)


def _probe_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled images; 0 if none is labelled (torch's own mean would be NaN)."""
    # Any negative label means unlabelled, but ignore_index matches only -1.
    total = F.cross_entropy(logits, label.clamp(min=-1), ignore_index=-1, reduction="sum")
    return total / (label >= 0).sum().clamp(min=1)


def build_byol(config: ModelConfig, *, num_classes: int, objective: ObjectiveConfig = BYOL_OBJECTIVE) -> BYOL:
    """Builds the networks that a config describes, freshly initialised from torch's global generator."""
    byol = BYOL(
        encoder_from(config),
        num_classes=num_classes,
        hidden_dim=config.hidden_dim,
        projection_dim=config.projection_dim,
        projector_layers=config.projector_layers,
        predictor_layers=config.predictor_layers,
        head_bias=config.head_bias,
        objective=objective,
    )
    if config.initialisation == "truncated_normal":
        for head in (byol.online.projector, byol.online.predictor, byol.probe):
            head.apply(_truncated_normal_linear)
        # The target was copied before the heads were initialised again.
        byol.target.projector.load_state_dict(byol.online.projector.state_dict())
    return byol


def _truncated_normal_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        truncated_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
