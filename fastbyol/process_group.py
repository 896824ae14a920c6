"""Who we are among the processes that torchrun started, and the group that joins them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)
"""A rank that dies or hangs ends the others after this long; torch's own default for gloo is 30 minutes."""


@dataclass(frozen=True)
class Process:
    """This process: its rank of `world_size`, its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_process_group() -> Process:
    """Reads torchrun's environment and joins the group; plain `python` is one process without a group.

    The store is prefixed with torchrun's restart count: restarted workers would otherwise read the dead attempt's addresses and hang
    (pytorch issue 135712).
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "MASTER_ADDR" in os.environ and world_size > 1:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = dist.TCPStore(address, port, world_size, is_master=serves, timeout=TIMEOUT)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"attempt_{attempt}", store),
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
        )
    return Process(rank=rank, world_size=world_size, device=device)


def leave_process_group() -> None:
    """Closes the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over ranks, in place; the tensor itself on one process."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def all_gather_rows(values: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks below one another, in rank order, on every rank; each must bring as many. The tensor itself on one process."""
    if not dist.is_initialized():
        return values
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values.contiguous())
    return torch.cat(rows)


def copy_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrites each tensor with rank 0's."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
