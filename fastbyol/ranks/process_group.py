"""This process's rank among those that torchrun or srun started, and the process group that connects them."""

from __future__ import annotations

import gc
import importlib
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastbyol.config.errors import Lost, UserError, environment_integer, first_line, require, require_between
from fastbyol.host.cores import share_cores, usable_cores
from fastbyol.ranks.collectives import gathered
from fastbyol.ranks.slurm_environment import adopt_slurm_environment

TIMEOUT_S = 600.0
_ATTEMPT = "fastbyol/attempt"
_PEER_LOST = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed out|timeout|remote process exited|ncclRemoteError|"
    r"connectFullMesh failed|communicator was aborted",
    re.IGNORECASE,
)
"""What gloo, NCCL and the store say if another rank is gone. Their complaints about settings (two ranks on one GPU, sizes that differ) and
devices are errors of this run, which a restart would meet again.
"""


@dataclass(frozen=True)
class Process:
    """This process: its rank, the number of ranks, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_process_group(*, timeout_s: float = TIMEOUT_S) -> Process:
    """Reads the environment of torchrun or srun and joins the process group; plain `python` is a single process without a group.

    A rank that dies or hangs ends the others after `timeout_s`. Raises UserError if the environment is not a launcher's or incomplete, Lost
    if the other ranks did not join in time.
    """
    from_slurm = adopt_slurm_environment(os.environ)
    rank, world_size, local_rank = _place_in_environment()
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        ask_for_expandable_segments()  # before CUDA starts
        # Before NCCL starts: otherwise every rank opens a context on GPU 0.
        torch.cuda.set_device(device)
    process = Process(rank=rank, world_size=world_size, device=device)
    if world_size > 1:
        # Import it before there is a group: its functions bind the current group as a default argument and keep it alive, so `leave_process_group`
        # could not end gloo's threads. One that takes the interpreter lock after Python's shutdown aborts a finished run with exit code 134.
        importlib.import_module("torch.distributed.nn.functional")
        timeout = timedelta(seconds=timeout_s)
        try:
            with lost_ranks_named(process):
                store = meeting_point(process, timeout)
                # gloo beside NCCL, so that messages between hosts need not wait for a device.
                backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
                dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
                share_cores(usable_cores(), gather_everywhere(usable_cores()))
        except Lost as error:
            if not from_slurm:
                raise
            raise Lost(
                f"{error}. Other ranks were expected because SLURM_STEP_NUM_TASKS = {world_size}: start all of them with `srun python -m "
                "fastbyol train …`, or one process alone with `env -u SLURM_STEP_NUM_TASKS python -m fastbyol train …`"
            ) from error
    return process


def ask_for_expandable_segments() -> None:
    """Sets torch's option against fragmented GPU memory, which would run out at the largest batch, unless the user has set options there."""
    # The second is the older name, which torch reads only if the first is missing.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _place_in_environment() -> tuple[int, int, int]:
    """Returns rank, world size and local rank as set by the launcher. Raises UserError if they are impossible."""
    alone = "start with torchrun or srun, or, for one process, unset RANK WORLD_SIZE LOCAL_RANK"
    rank, world_size, local_rank = (environment_integer(name, int(name == "WORLD_SIZE")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    require(world_size >= 1, "WORLD_SIZE", world_size, f"a number >= 1; {alone}")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size > 1 and missing:
        raise UserError(f"WORLD_SIZE = {world_size}: is in the environment, but {', '.join(missing)} is not; {alone}")
    require(0 <= rank < world_size, "RANK", rank, f"in [0, WORLD_SIZE), and WORLD_SIZE is {world_size}; {alone}")
    if world_size > 1:
        require_between("MASTER_PORT", environment_integer("MASTER_PORT", 0), 1, 65535)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else local_rank + 1
    require(0 <= local_rank < gpus, "LOCAL_RANK", local_rank, f"in [0, {gpus}), the GPUs that PyTorch sees here; {alone}")
    return rank, world_size, local_rank


def meeting_point(process: Process, timeout: timedelta) -> dist.Store:
    """Returns a store without keys of an earlier attempt."""
    address, port = os.environ["MASTER_ADDR"], environment_integer("MASTER_PORT", 0)
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        left = timedelta(seconds=deadline - time.monotonic())
        try:
            store = dist.TCPStore(address, port, process.world_size, is_master=process.is_main and not agent_serves, timeout=left)
            return fresh_store(store, rank=process.rank, world_size=process.world_size, timeout_s=left.total_seconds())
        except dist.DistNetworkError:
            # Without torchrun rank 0 serves the store. A rank may have reached the store of an attempt that is ending, which closes when that
            # attempt's rank 0 leaves: it then tries again, to find the new one.
            if process.is_main or agent_serves or time.monotonic() > deadline - 1:
                raise
            time.sleep(0.1)


def fresh_store(store: dist.Store, *, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """Returns the store under a prefix that only the ranks of this attempt know."""
    # torchrun restarts its workers with the store of the dead ones. They would read the old addresses and hang (pytorch issue 135712).
    # torchrun's restart count cannot serve as a prefix, because the agents of several machines may disagree on it. So rank 0 names the
    # attempt, every other rank signs it, and it begins once rank 0 has published all signatures: a leftover name can never show the
    # signature of a rank that has just joined.
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set(_ATTEMPT, mine)
        signatures = [store.get(f"{_ATTEMPT}/{mine}/{other}").decode() for other in range(1, world_size)]
        store.set(f"{_ATTEMPT}/{mine}/all", " ".join(signatures))
        return dist.PrefixStore(mine, store)
    deadline, signed = time.monotonic() + timeout_s, ""
    while time.monotonic() < deadline:
        attempt = store.get(_ATTEMPT).decode()
        if attempt != signed:
            store.set(f"{_ATTEMPT}/{attempt}/{rank}", mine)
            signed = attempt
        everyone = f"{_ATTEMPT}/{attempt}/all"
        if store.check([everyone]) and mine in store.get(everyone).decode().split():
            return dist.PrefixStore(attempt, store)
        time.sleep(0.1)
    raise Lost(f"rank {rank}: not all of the {world_size} ranks connected within timeout_s = {timeout_s:g} s")


_smaller_groups: list[dist.ProcessGroup] = []
"""This rank's groups beside that of all ranks."""


def rank_groups(size: int, *, timeout_s: float) -> str:
    """Divides all ranks into groups of `size` neighbours, and returns the name of this rank's. Every rank must call it."""
    # torch gives a new group its own default timeout, not that of the group of all ranks.
    mine, _ = dist.new_subgroups(group_size=size, timeout=timedelta(seconds=timeout_s))
    _smaller_groups.append(mine)
    return mine.group_name


def leave_process_group(*, failed: bool = False) -> None:
    """Closes the group, if there is one, and ends its threads. failed: do not wait for messages that are under way; a peer may be gone."""
    if dist.is_initialized():
        gc.collect()  # free DDP's reference cycles first: the last reference to the group must be dropped by Python code, which releases the interpreter lock
        if failed and dist.group.WORLD is not None and "nccl" in dist.get_backend_config(dist.group.WORLD):
            # destroy_process_group waits for NCCL's queue, and for ever if a peer that should answer is dead.
            for group in (*_smaller_groups, dist.group.WORLD):
                group.abort()
        _smaller_groups.clear()
        dist.destroy_process_group()


@contextmanager
def lost_ranks_named(process: Process) -> Iterator[None]:
    """Turns a collective's failure because another rank is gone into Lost; all other errors pass unchanged."""
    try:
        yield
    except RuntimeError as error:
        connection = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
        # A kernel that exceeds its time limit is a fault of this device: "CUDA error: the launch timed out and was terminated".
        says_so = _PEER_LOST.search(str(error)) and not str(error).startswith("CUDA error")
        if process.world_size == 1 or not (connection or says_so):
            raise
        raise Lost(
            f"rank {process.rank} got no answer from another rank: it has ended, hangs, or cannot be reached ({first_line(error, limit=160)}); "
            "the same command continues from the last checkpoint"
        ) from error


def all_reduce_mean(values: torch.Tensor) -> torch.Tensor:
    """Averages over ranks in place; with one process, returns the tensor unchanged."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def all_gather_rows(values: torch.Tensor) -> torch.Tensor:
    """Returns the rows of all ranks in rank order, on every rank; each must bring the same number. With one process, the tensor itself."""
    return gathered(values) if dist.is_initialized() else values


def copy_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrites each tensor with that of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_on_main(value: Any) -> list[Any]:
    """Returns the values (plain ones and CPU tensors, of a few kilobytes) of all ranks, in rank order, on the main process; else []."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values or None, dst=0)
    return values


def gather_everywhere(value: Any) -> list[Any]:
    """Returns the values (plain ones, small) of all ranks, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_main(value: Any) -> Any:
    """Returns the main process's value on every rank."""
    if not dist.is_initialized():
        return value
    held = [value]
    # Through gloo, so that it need not wait for a GPU.
    dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
    return held[0]
