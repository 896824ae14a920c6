"""Rows of features from a cluster of Ray: a Ray Data pipeline whose actors hold the encoder, and whose rows come back in order.

Ray decides how many actors there are and which rows each gets, and repeats the rows of a lost node.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.config.errors import UserError
from fastbyol.ranks.ray_cluster import import_ray, node_resources, ray_cluster, warn_if_none_fits

Index = NDArray[np.int64]
RowEncoder = Callable[[Index], list[Tensor]]
"""Returns the blocks of features, (n, D) each, of the images at n indices."""


def rows_on_ray(index: Index, opened: Callable[..., RowEncoder], *, block: int, workers: int, device: str) -> Iterator[list[Tensor]]:
    """Yields the features of the images at these indices, in this order, up to `block` of them at once.

    Args:
        opened: called in each actor as `opened(workers=…, device=…)`; must be picklable.
        block: images that an actor is given at once: what a lost node costs each of its actors.
        workers: decoding threads of an actor, and the CPUs that Ray keeps for it; 0: on a GPU its share of the node's CPUs, else 1.
        device: 'cuda' for one GPU an actor, 'cpu' for none, 'auto' for GPUs if the cluster has some.
    """
    if not len(index):
        return
    with ray_cluster() as ray:
        ray_data = import_ray("ray.data")
        gpus = 0 if device == "cpu" else sum(node_resources(ray, "GPU"))
        if device == "cuda" and not gpus:
            raise UserError("--device cuda: the cluster of Ray has no GPU; take auto or cpu")
        cpus = workers or _cpus_of_a_gpu(ray) if gpus else workers or 1
        warn_if_none_fits(ray, cpus=cpus)
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # These loggers would report that Ray's progress bars are off, and print the traceback of an error that is shown as one line here.
        for name in ("_internal.progress", "_internal.execution.streaming_executor_state", "exceptions"):
            logging.getLogger(f"ray.data.{name}").setLevel(logging.CRITICAL)
        context = ray_data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False  # ours shows how much is written
        context.raise_original_map_exception = True  # otherwise an error of ours would arrive as text inside one of Ray's
        most = gpus or max(1, sum(node_resources(ray, "CPU")) // cpus)
        rows = ray_data.from_numpy([index[first : first + block] for first in range(0, len(index), block)])
        features = rows.map_batches(
            _Actor,
            fn_constructor_args=(opened, cpus, "cuda" if gpus else "cpu"),
            batch_size=block,
            compute=ray_data.ActorPoolStrategy(min_size=1, max_size=most),
            num_cpus=cpus,
            num_gpus=1 if gpus else 0,
        )
        done = 0
        for batch in features.iter_batches(batch_size=None, batch_format="numpy"):
            found = batch.pop("index")
            if not np.array_equal(found, index[done : done + len(found)]):
                raise RuntimeError(f"rows {found[:3]}… came from Ray where {index[done : done + 3]}… were expected")
            done += len(found)
            yield [torch.from_numpy(np.array(batch[name], dtype=np.float32)) for name in sorted(batch)]


def _cpus_of_a_gpu(ray: Any) -> int:
    """Returns the CPUs for each GPU on the node that has the fewest."""
    return max(1, min(cpus // gpus for cpus, gpus in zip(node_resources(ray, "CPU"), node_resources(ray, "GPU"), strict=True) if gpus))


class _Actor:
    """Holds the encoder in a process of the cluster."""

    def __init__(self, opened: Callable[..., RowEncoder], workers: int, device: str) -> None:
        self._opened, self._workers, self._device = opened, workers, device
        self._encode: RowEncoder | None = None

    def __call__(self, rows: dict[str, Index]) -> dict[str, NDArray[Any]]:
        # Opened at the first rows: Ray would try a constructor that fails again and again, and hide its error.
        self._encode = self._encode or self._opened(workers=self._workers, device=self._device)
        index = rows["data"]
        return {"index": index} | {f"block{number}": block.numpy() for number, block in enumerate(self._encode(index))}
