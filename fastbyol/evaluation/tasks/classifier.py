"""A classifier, an encoder with a linear layer on top, trained as a whole or tested by all ranks together."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol.data import crops_on_device
from fastbyol.data.backends.source import Indices
from fastbyol.data.loader import CropLoader, ImageLoader
from fastbyol.evaluation.tasks.job import Job
from fastbyol.evaluation.tasks.scoring import outputs
from fastbyol.evaluation.tasks.training import TrainingFigures, train_network
from fastbyol.models.resnet import truncated_normal_
from fastbyol.ranks.process_group import all_gather_rows
from fastbyol.run.precision import compiles_augmentation, input_dtype, prepare_model
from fastbyol.schedules import lr_at

LR_BATCH = 256
"""Images per step to which a base learning rate belongs."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, K) float32, targets (N, ...)) -> mean loss."""


class Classifier(nn.Module):
    """An encoder and a linear layer of its feature: images (N, 3, S, S) -> logits (N, num_classes) float32."""

    def __init__(self, encoder: nn.Module, num_classes: int, *, seed: int = 0) -> None:
        """Takes the encoder as it is. The layer's weights are drawn from `seed` as in the official code, its bias is 0."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(int(encoder.feature_dim), num_classes)  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            truncated_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        feature = self.encoder(images)
        # In float32 whatever the encoder's format: among logits in bf16 the two highest are often equal.
        with torch.autocast(images.device.type, enabled=False):
            return self.head(feature.to(self.head.weight.dtype))


def build_classifier(job: Job, encoder: nn.Module, *, num_classes: int) -> Classifier:
    """Returns the classifier on the job's device and in its memory layout, compiled if its precision says so. Batch norms are each rank's."""
    network = Classifier(encoder, num_classes, seed=job.seed)
    prepare_model(network, job.precision, device=job.process.device)
    return network


class RestartedClassifier:
    """One classifier for several trainings, each from the same weights: what is compiled once serves them all."""

    def __init__(self, job: Job, encoder: nn.Module, *, num_classes: int) -> None:
        torch.compiler.reset()  # code of earlier networks is of no use, and its number is limited
        self._network = build_classifier(job, encoder, num_classes=num_classes)
        self._initial = copy.deepcopy(self._network.state_dict())

    def network(self) -> Classifier:
        """Returns the classifier with its first weights; those of the training before are lost."""
        gc.collect()  # frees the DDP wrapper of the training before, whose hooks are on the same parameters
        self._network.load_state_dict(self._initial)
        return self._network


def build_sgd(network: nn.Module, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> torch.optim.SGD:
    """Returns SGD with Nesterov momentum over all parameters, the paper's optimizer of everything that is trained with labels (appendix C.1)."""
    return torch.optim.SGD(network.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0)


def fit_classifier(
    job: Job,
    key: str,
    *,
    network: nn.Module,
    crops: CropLoader,
    targets: Tensor,
    lr: float,
    total_steps: int,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    loss: Loss = F.cross_entropy,
) -> TrainingFigures:
    """Trains the whole network in place with SGD and a rate that falls from `lr` to 0 on a half cosine; see `train_network`.

    Call it inside `job.once(key, ...)`.

    Args:
        job: precision, ranks, folder.
        key: name of this training in the job.
        network: of `build_classifier`.
        crops: the views to train on; their number is the batch.
        targets: (num_images, ...) what to predict for each image of the loader, by its index, on the CPU.
        lr: learning rate of the first step.
        total_steps: length of the training.
        momentum: of SGD.
        weight_decay: of SGD, on all parameters.
        loss: of the logits and the targets of a batch.

    Raises:
        Diverged: the loss is not finite.
        TaskStopped: a signal arrived; the state is saved.
    """
    network.train()
    return train_network(
        job,
        key,
        network=network,
        optimizer=build_sgd(network, lr=lr, momentum=momentum, weight_decay=weight_decay),
        lr_at=lambda step: lr_at(step, total_steps=total_steps, warmup_steps=0, base_lr=lr, global_batch=LR_BATCH),
        batches=lambda step: batches_on_device(job, crops, targets, step=step),
        loss_of=lambda model, batch: loss(model(batch[0]), batch[1]),
        total_steps=total_steps,
        step_images=crops.traversal.global_batch,
    )


def batches_on_device(job: Job, crops: CropLoader, targets: Tensor, *, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (images, targets) of this rank from a step on, without end, on the job's device."""
    device = job.process.device
    how = {"dtype": input_dtype(job.precision, device=device), "compiled": compiles_augmentation(device)}
    # Here and not in the loss, which is computed under autocast: the augmentation of a GPU is float32.
    for batch in crops.batches_from(step):
        images, _ = crops_on_device(batch, crops.views, device, **how)
        yield images, targets[batch.index].to(device, non_blocking=True)


def scores_of(job: Job, network: nn.Module, loader: ImageLoader, *, rows: Indices) -> Tensor:
    """Returns the network's output (N, K) for these images of the loader, in their order, float32 on the CPU of every rank.

    Each rank computes a share of the images, with the network in eval mode.
    """
    process = job.process
    share = -(-len(rows) // process.world_size)
    # The gather needs equal shares: the last image fills them up.
    filled = np.append(rows, np.full(share * process.world_size - len(rows), rows[-1]))
    own = filled[share * process.rank : share * (process.rank + 1)]
    was_training = network.training
    network.eval()
    found = [output for output, _ in outputs(job, network, loader, own)]
    network.train(was_training)
    return all_gather_rows(torch.cat(found))[: len(rows)]
