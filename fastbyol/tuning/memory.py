"""Finds how many images fit into a GPU's memory, by trying: no formula knows the allocator and cuDNN's workspaces. Never run on a GPU by us."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from fastbyol.tuning.comparison import TrialFailed

MEMORY_SHARE = 0.9
"""Share of the card's memory that the training step may take: a run evaluates too, and DALI decodes there."""


@contextmanager
def memory_as_failure() -> Iterator[None]:
    """Turns running out of device memory inside into a TrialFailed."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrialFailed("out of memory") from error


def release_memory() -> None:
    """Frees device memory that is no longer in use, so that a failed trial does not make the next one fail."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def fits_memory(run: Callable[[], object], device: torch.device) -> bool:
    """Says whether the work runs and takes no more than `MEMORY_SHARE` of the device's memory, which is freed afterwards."""
    fits = _runs(run) and (
        device.type != "cuda"
        or torch.cuda.max_memory_allocated(device) <= MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory
    )
    release_memory()  # the exception is gone by now; its frames held the memory
    return fits


def _runs(run: Callable[[], object]) -> bool:
    try:
        with memory_as_failure():
            run()
    except TrialFailed:
        return False
    return True


def those_that_fit(candidates: Sequence[int], fits: Callable[[int], bool]) -> list[int]:
    """Returns the candidates, which ascend, up to the first that does not fit; larger ones are not tried."""
    fitting = []
    for candidate in candidates:
        if not fits(candidate):
            break
        fitting.append(candidate)
    return fitting
