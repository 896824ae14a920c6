"""The cores of this machine, and this process's share of them when torchrun started several here."""

from __future__ import annotations

import os

from fastbyol.config.errors import environment_integer


def default_workers() -> int:
    """Returns the usable CPU cores divided by the number of processes that torchrun started on this machine; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // place_on_machine()[1])


def place_on_machine() -> tuple[int, int]:
    """Returns this process's local rank and the number of processes that torchrun started on this machine."""
    return environment_integer("LOCAL_RANK", 0), max(1, environment_integer("LOCAL_WORLD_SIZE", 1))
