"""Where the time of a step goes: waiting for data, forward and backward, update."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

STEPS_KEPT = 64
"""The split is the mean of at most this many of the interval's last steps: a long interval shall not hold events by the thousand."""


class Stopwatch:
    """Marks in a step and the time between them: by the clock on the CPU, by events on a GPU, which nobody waits for.

    On a GPU `forward_backward_ms` and `update_ms` are the device's time from mark to mark, its idle gaps included (the last kernel of one step
    to the first of the next is in neither); waiting is the host's time. Not run on a GPU yet.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._steps: deque[tuple[Any, Any, Any, float]] = deque(maxlen=STEPS_KEPT)
        self._first: Any = None
        self._gradients: Any = None
        self._waited_inside_s = 0.0
        self.wait_s = 0.0

    def reset(self) -> None:
        """Forgets the steps that are complete."""
        self._steps.clear()
        self.wait_s = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        waited_s = time.perf_counter() - start
        self.wait_s += waited_s
        if self._first is None:
            self._first = self._mark()
        else:
            self._waited_inside_s += waited_s

    def gradients_ready(self) -> None:
        """The last backward of the step has been called."""
        self._gradients = self._mark()

    def step_done(self) -> None:
        """The update has been called."""
        if self._first is not None and self._gradients is not None:
            self._steps.append((self._first, self._gradients, self._mark(), self._waited_inside_s))
        self._first = self._gradients = None
        self._waited_inside_s = 0.0

    def split_ms(self) -> tuple[float, float]:
        """Milliseconds per step of forward and backward, and of the update. On a GPU its last step must be complete."""
        if not self._steps:
            return 0.0, 0.0
        # On a GPU a wait between two micro-batches may hide behind work that is queued; on the CPU nothing else went on.
        forward_backward = [self._between_ms(a, b) - (0.0 if self._on_gpu else 1000 * waited) for a, b, _, waited in self._steps]
        update = [self._between_ms(b, c) for _, b, c, _ in self._steps]
        return sum(forward_backward) / len(self._steps), sum(update) / len(self._steps)

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between_ms(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self._on_gpu else 1000 * (end - start)
