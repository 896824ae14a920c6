"""How many images fit a GPU's memory: found by trying, since no formula knows the allocator and cuDNN's workspaces. Not run on a GPU by us yet."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from fastbyol.tuning.comparison import TrialFailed

MEMORY_SHARE = 0.9
"""Of the card, for the training step: a run evaluates too, and DALI decodes there."""


@contextmanager
def memory_as_failure() -> Iterator[None]:
    """Inside, a device that runs out of memory makes a TrialFailed."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrialFailed("out of memory") from error


def release_memory() -> None:
    """Gives back what nobody holds any more: what a failed trial had taken must not fail the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def fits_memory(run: Callable[[], object], device: torch.device) -> bool:
    """Whether the work runs, and leaves a part of the device free (`MEMORY_SHARE`). The memory is empty again afterwards."""
    fits = _runs(run) and (
        device.type != "cuda"
        or torch.cuda.max_memory_allocated(device) <= MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory
    )
    release_memory()  # the failure is forgotten by now, whose frames held what had been taken
    return fits


def _runs(run: Callable[[], object]) -> bool:
    try:
        with memory_as_failure():
            run()
    except TrialFailed:
        return False
    return True


def those_that_fit(candidates: Sequence[int], fits: Callable[[int], bool]) -> list[int]:
    """The candidates, ascending, up to the first that does not fit; larger ones are not tried."""
    fitting = []
    for candidate in candidates:
        if not fits(candidate):
            break
        fitting.append(candidate)
    return fitting
