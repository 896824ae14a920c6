"""Scores of encoders and classifiers on test images, with the images shared among the ranks."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastbyol.data.backends.source import Indices
from fastbyol.data.loader import ImageLoader
from fastbyol.evaluation.comparison import Comparison, compare_hits
from fastbyol.evaluation.protocols import top_k_hits
from fastbyol.evaluation.splits import renumbered
from fastbyol.evaluation.tasks.job import Job
from fastbyol.ranks.process_group import gather_everywhere
from fastbyol.run.precision import autocast, is_compiled


class Hits(NamedTuple):
    """Which test images were classified correctly, (N,) bool each, in the order of the rows."""

    top1: Tensor
    top5: Tensor

    def shares(self) -> dict[str, float]:
        return {"top1": self.top1.double().mean().item(), "top5": self.top5.double().mean().item()}


def rank_share(rows: Indices, job: Job) -> Indices:
    """Returns this rank's rows: a contiguous part, so that its files are neighbours on disk."""
    return np.array_split(rows, job.process.world_size)[job.process.rank]


@torch.no_grad()
def outputs(job: Job, network: nn.Module, loader: ImageLoader, rows: Indices) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the network's float32 outputs (N, ...) and the loader's labels (N,) for these images, batch by batch, both on the CPU.

    A result is copied from the device only after the next batch has been started there, so that the device never waits for the host.
    """
    device, waiting = job.process.device, None
    for batch in loader.batches_of(rows):
        image, count = batch.image, len(batch.image)
        if count < job.batch and is_compiled(network):
            # Pad the last batch: code is compiled for one shape, and another one would be compiled anew.
            image = torch.cat([image, image.new_zeros(job.batch - count, *image.shape[1:])])
        image = image.to(device, non_blocking=True, memory_format=torch.channels_last)
        with autocast(job.precision, device=device):
            # A copy: CUDA graphs (compile_mode reduce-overhead) write every batch's output to the same memory.
            output = network(image)[:count].clone()
        if waiting is not None:
            yield waiting[0].float().cpu(), waiting[1]
        waiting = output, batch.label
    if waiting is not None:
        yield waiting[0].float().cpu(), waiting[1]


def hits_of(
    job: Job,
    loader: ImageLoader,
    rows: Indices,
    score: Callable[[Iterator[tuple[Tensor, Tensor]]], Iterator[tuple[Tensor, Tensor]]],
    *,
    network: nn.Module,
    class_names: tuple[str, ...],
) -> list[Hits]:
    """Returns the hits of H classifiers on these images, gathered from all ranks. Images of other classes are misses.

    score: turns the network's outputs into (N, H, K) scores, with the labels passed on.
    """
    parts = []
    for scores, label in score(outputs(job, network, loader, rank_share(rows, job))):
        label = renumbered(label, loader.class_names, class_names)
        parts.append(torch.stack([torch.stack([top_k_hits(one, label, k=k) for one in scores.unbind(1)]) for k in (1, 5)]))
    own = torch.cat(parts, dim=2) if parts else torch.empty((2, 0, 0), dtype=torch.bool)
    everyone = [part for part in gather_everywhere(own) if part.shape[2]]
    top1, top5 = torch.cat(everyone, dim=2)
    return [Hits(*pair) for pair in zip(top1, top5, strict=True)]


def compare_with_first(job: Job, hits: Mapping[str, Tensor]) -> dict[str, Comparison]:
    """Compares the job's first encoder with each other one; hits: (N,) bool by name, on the same test images."""
    first, *others = (subject.name for subject in job.subjects)
    return {other: compare_hits(hits[first], hits[other]) for other in others}


def packed(hits: Tensor) -> str:
    """Returns (N,) bool as text, for a part of a job; `unpacked` reads it."""
    return f"{len(hits)} {base64.b64encode(np.packbits(hits.numpy()).tobytes()).decode()}"


def unpacked(text: str) -> Tensor:
    num, _, bits = text.partition(" ")
    return torch.from_numpy(np.unpackbits(np.frombuffer(base64.b64decode(bits), dtype=np.uint8), count=int(num)).astype(bool))
