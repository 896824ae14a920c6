"""Memory for whole batches, reused once a batch is no longer referenced: page faults of fresh memory cost up to a fifth of its CPU time."""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.config.errors import UserError

_NUMPY_TYPE = {torch.float32: np.float32, torch.uint8: np.uint8}


class BatchMemory:
    """Pool of batch-sized tensors of one type. Memory is reused only after every tensor that shares it has been freed."""

    def __init__(self, dtype: torch.dtype, *, pinned: bool, spare: int) -> None:
        """Keeps at most `spare` unused batches. Pinned memory is pooled by PyTorch instead, which knows when the device has read it."""
        self._dtype, self._pinned = dtype, pinned
        self._spare: deque[NDArray[np.generic]] = deque(maxlen=spare)

    def lend(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns an uninitialised tensor of this shape, (views, images, S, S, 3). Raises UserError if there is not enough memory."""
        try:
            if self._pinned:
                return torch.empty(shape, dtype=self._dtype, pin_memory=True)
            memory = self._spare.pop() if self._spare else np.empty(shape, dtype=_NUMPY_TYPE[self._dtype])
            if memory.shape != shape:  # the smaller last batch of a pass
                memory = np.empty(shape, dtype=memory.dtype)
        except (MemoryError, RuntimeError) as error:
            gib = math.prod(shape) * self._dtype.itemsize / 2**30
            raise UserError(
                f"a batch of {shape[1]} images at views.size_px = {shape[2]} needs {gib:.1f} GiB, and there is not as much memory; "
                "take a smaller batch or smaller views"
            ) from error
        # PyTorch keeps the numpy view alive until the last tensor on it is freed; then the finalizer returns the memory to the pool.
        lent = memory.view()
        weakref.finalize(lent, self._spare.append, memory).atexit = False
        return torch.from_numpy(lent)
