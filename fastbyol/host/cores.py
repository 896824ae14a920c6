"""The cores of this machine, and this process's share of them when a launcher started several here."""

from __future__ import annotations

import os
import platform

from fastbyol.config.errors import environment_integer

Cores = tuple[str, frozenset[int]]
"""A machine's name, and the numbers of the cores on it that a process may use."""

_sharing: int | None = None


def usable_cores() -> Cores:
    """Returns this machine and the cores that this process may use."""
    return platform.node(), frozenset(os.sched_getaffinity(0))


def share_cores(mine: Cores, of_all: list[Cores]) -> None:
    """Notes how many ranks share this process's cores, given the usable cores of all ranks, this one included."""
    # A launcher may bind each rank to cores of its own (srun --cpus-per-task, numactl), and then they are divided already.
    global _sharing
    machine, cores = mine
    users = [other for name, other in of_all if name == machine and other & cores]
    _sharing = max(sum(core in other for other in users) for core in cores)


def default_workers() -> int:
    """Returns this process's share of the CPU cores that it may use; at least 1.

    Before `share_cores` has been told, all processes that the launcher started on this machine are assumed to share them.
    """
    return max(1, len(os.sched_getaffinity(0)) // (_sharing or place_on_machine()[1]))


def place_on_machine() -> tuple[int, int]:
    """Returns this process's local rank and the number of processes that torchrun started on this machine."""
    return environment_integer("LOCAL_RANK", 0), max(1, environment_integer("LOCAL_WORLD_SIZE", 1))
