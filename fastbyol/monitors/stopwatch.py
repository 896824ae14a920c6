"""Measures where the time of a step goes: waiting for data, forward and backward, update."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

STEPS_KEPT = 64
"""The split is averaged over at most this many of the interval's last steps, so a long interval does not hold thousands of events."""


class Stopwatch:
    """Records marks in a step and the time between them: the clock on a CPU, CUDA events on a GPU, which do not make the host wait.

    On a GPU `forward_backward_ms` and `update_ms` are the device's time from mark to mark, including idle gaps (the gap between the
    last kernel of one step and the first of the next is in neither); waiting is the host's time. Not run on a GPU yet.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._steps: deque[tuple[Any, Any, Any, float]] = deque(maxlen=STEPS_KEPT)
        self._first: Any = None
        self._gradients: Any = None
        self._waited_inside_s = 0.0
        self.wait_s = 0.0

    def reset(self) -> None:
        """Forgets the completed steps."""
        self._steps.clear()
        self.wait_s = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside the block as waiting for data."""
        start = time.perf_counter()
        yield
        waited_s = time.perf_counter() - start
        self.wait_s += waited_s
        # A step begins when its first batch has come; waits for its other micro-batches lie inside it.
        if self._first is None:
            self._first = self._mark()
        else:
            self._waited_inside_s += waited_s

    def gradients_ready(self) -> None:
        """Marks that the last backward of the step has been called."""
        self._gradients = self._mark()

    def step_done(self) -> None:
        """Marks that the update has been called."""
        if self._first is not None and self._gradients is not None:
            self._steps.append((self._first, self._gradients, self._mark(), self._waited_inside_s))
        self._first = self._gradients = None
        self._waited_inside_s = 0.0

    def split_ms(self) -> tuple[float, float]:
        """Returns milliseconds per step of forward and backward, and of the update. On a GPU the last step must have completed."""
        if not self._steps:
            return 0.0, 0.0
        # Subtract waits between micro-batches only on the CPU: on a GPU queued work may have run meanwhile.
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
