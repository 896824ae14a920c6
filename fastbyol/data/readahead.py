"""Reads the blocks of a local traversal into the page cache before their samples are read one by one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fastbyol.data.backends.source import Indices, Source
from fastbyol.data.traversal import Blocks, block_order


class Readahead:
    """A thread that stays one window ahead of the loader. It ignores read errors: they are raised when the samples themselves are read."""

    def __init__(self, source: Source, blocks: Blocks, *, seed: int, reader: int = 0, num_readers: int = 1) -> None:
        """Reads share number `reader` of `num_readers` of the blocks: the processes of one machine share the page cache."""
        self._source, self._blocks, self._seed = source, blocks, seed
        self._reader, self._num_readers = reader, num_readers
        self._samples_in_block = np.bincount(blocks.number)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fastbyol-readahead")
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Goes to the first window of an epoch."""
        order = block_order(self._blocks, seed=self._seed, epoch=epoch)
        firsts = range(0, len(order), self._blocks.window)
        self._windows: list[Indices] = [order[first : first + self._blocks.window] for first in firsts]
        samples = [int(self._samples_in_block[window].sum()) for window in self._windows]
        self._ends = np.cumsum(samples)
        self._next = 0

    def reach(self, position: int) -> None:
        """Fetches the window at this position of the epoch's order and the next one, each once. Call before reading from that position."""
        current = int(np.searchsorted(self._ends, position, side="right"))
        for window in self._windows[max(self._next, current) : current + 2]:
            for block in window[self._reader :: self._num_readers].tolist():
                self._pool.submit(self._source.read_ahead, self._blocks.members(block))
        self._next = max(self._next, current + 2)

    def close(self) -> None:
        """Stops the thread; blocks that it has not started are skipped."""
        self._pool.shutdown(wait=True, cancel_futures=True)
