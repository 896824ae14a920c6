"""Finds the largest batch whose step fits in the device's memory."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from fastbyol.config.errors import UserError

PROBES = (16, 48)
"""Batches whose memory shows how much an image needs."""
SHARE = 0.85
"""Share of the free memory that a step may take: allocation leaves gaps, and a part holds several networks at once."""
MULTIPLE = 32
LARGEST = 2048
_SIGNS = ("out of memory", "ALLOC_FAILED")
"""Texts of out-of-memory errors that are not torch's OutOfMemoryError: those of the driver, cuBLAS and cuDNN."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Returns True if the error says that the device is out of memory, including errors of the driver, cuBLAS and cuDNN."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)


def largest_batch(step: Callable[[int], object], device: torch.device) -> int:
    """Returns the largest multiple of 32 whose step runs. It is predicted from two small batches and then tried, with a smaller one
    after each failure.

    Args:
        step: runs one or more steps of a batch and keeps nothing.
        device: a CUDA device.
    """
    free, _ = torch.cuda.mem_get_info(device)
    batch = fitting_batch({n: _peak_bytes(step, n, device) for n in PROBES}, limit=SHARE * (free + torch.cuda.memory_reserved(device)))
    while batch >= MULTIPLE:
        try:
            _peak_bytes(step, batch, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            batch = int(0.9 * batch) // MULTIPLE * MULTIPLE
        else:
            return batch
    raise UserError(f"{MULTIPLE} images do not fit in the memory of {device}")


def fitting_batch(peaks: dict[int, int], *, limit: float) -> int:
    """Returns the largest multiple of 32, at most 2048, that a straight line through the two measured peaks (bytes, by batch) puts under
    the limit.
    """
    (small, low), (large, high) = sorted(peaks.items())
    per_image = (high - low) / (large - small)
    fixed = low - small * per_image
    return min(LARGEST, int((limit - fixed) / per_image) // MULTIPLE * MULTIPLE)


def _peak_bytes(step: Callable[[int], object], batch: int, device: torch.device) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step(batch)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device)
