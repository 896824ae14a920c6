"""The ranks and images over which batch norm computes its statistics. They are part of the method: in the paper, the whole batch."""

from __future__ import annotations

import logging

from fastbyol.config.errors import UserError
from fastbyol.config.schema import TrainConfig, accumulation_of
from fastbyol.ranks.process_group import Process, rank_groups

log = logging.getLogger("fastbyol")


def bn_ranks(config: TrainConfig, process: Process) -> int:
    """Number of ranks that share batch-norm statistics."""
    return (config.precision.bn_ranks or process.world_size) if config.precision.cross_replica_bn else 1


def bn_images(config: TrainConfig, process: Process) -> int:
    """Number of images over which batch norm computes its statistics."""
    # A micro-batch's: the paper's ablation of the batch size also accumulates gradients and not statistics (section 5).
    accumulate = accumulation_of(config, world_size=process.world_size)
    return config.global_batch // (process.world_size * accumulate) * bn_ranks(config, process)


def check_bn_images(config: TrainConfig, process: Process) -> None:
    """Warns where batch norm sees less than the ranks' images together.

    Raises UserError if precision.bn_ranks does not divide the number of ranks, or batch norm would see only one image at a time.
    """
    ranks, shared = process.world_size, bn_ranks(config, process)
    if ranks % shared:
        fitting = ", ".join(str(n) for n in range(2, ranks) if ranks % n == 0)
        raise UserError(
            f"precision.bn_ranks = {shared}: must divide the number of ranks, {ranks}; use 0 for all of them{fitting and f', or {fitting}'}"
        )
    # The heads' output would then be the same for every image: one value minus itself.
    if bn_images(config, process) == 1:
        raise UserError(
            f"global_batch = {config.global_batch}, rank_batch = {config.rank_batch}: a batch norm would see one image at a time; it needs two or more"
        )
    if shared < ranks:
        log.warning(
            "batch norm sees %d of the %d images at a time (%s); in the paper it sees all of them",
            bn_images(config, process),
            bn_images(config, process) // shared * ranks,
            f"precision.bn_ranks = {shared}" if config.precision.cross_replica_bn else "precision.cross_replica_bn = false",
        )


def bn_group(config: TrainConfig, process: Process) -> str:
    """Returns the name of the group that shares this rank's statistics; '' means all ranks. Every rank must call it: it makes the groups."""
    shared = bn_ranks(config, process)
    return "" if shared == process.world_size else rank_groups(shared, timeout_s=config.timeout_s)
