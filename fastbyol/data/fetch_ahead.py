"""Fetches the blocks of a store into the cache before the loader needs them, in the order of use, as far ahead as the cache has room."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.backends.block_cache import BlockCache
from fastbyol.data.traversal import NEVER, Indices, Traversal, block_uses

THREADS = 4
"""Blocks that one process fetches at a time: a single connection to an object store is slower than the network."""
_LONGEST_WAIT_S, _POLL_S = 30.0, 1.0
_REST = 20
"""Pause between two searches for room in the cache, as a multiple of the time of a search."""


class FetchAhead:
    """Threads that fetch this process's share of the blocks: each rank of a node fetches every n-th.

    They retry a store in trouble for as long as the run lasts; giving up is left to the loader, when it needs a block that is not there.

    Args:
        cache: where the blocks go. `start_epoch` sets its `next_use`.
        traversal: the order in which the samples are read.
        lag: number of micro-batches before the one that the loader plans that may still be in work, here or on another rank.
        reader, num_readers: this process's place among those that share the cache.
    """

    def __init__(self, cache: BlockCache, traversal: Traversal, *, lag: int, reader: int = 0, num_readers: int = 1) -> None:
        self._cache, self._traversal = cache, traversal
        self._lag, self._reader, self._num_readers = lag * traversal.stride, reader, num_readers
        self._changed = threading.Condition()
        self._turn = threading.Lock()
        self._stopped = threading.Event()
        self._start = 0
        self._epoch, self._position = -1, 0
        self._uses: dict[int, tuple[Indices, Indices]] = {}
        self._sequence: Iterator[int] = iter(())
        # Daemon threads: one that waits for a hanging store must not keep the process alive.
        self._threads = [threading.Thread(target=self._work, name="fastbyol-fetch", daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def start_epoch(self, epoch: int, order: Indices, *, position: int) -> None:
        """Moves to a position of an epoch; order: the samples of that epoch in reading order."""
        known = self._uses.get(epoch) or self._uses_in(order)
        with self._changed:
            self._uses = {epoch: known}
            self._epoch, self._position = epoch, position
            self._start += 1
            self._sequence = self._coming(epoch, position, known)
            self._changed.notify_all()
        # Set only now: before the first epoch images may be read too, while no block's next use is known.
        self._cache.next_use = self._next_use

    def reach(self, position: int) -> None:
        """Notes that the loader plans a batch from this position of the epoch's order on, so that the cache may remove blocks used up before it."""
        with self._changed:
            self._position = position
            self._changed.notify_all()

    def close(self) -> None:
        """Stops the threads, but waits only a moment for one that the store keeps waiting."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=0.5)
        self._cache.next_use = None

    def _uses_in(self, order: Indices) -> tuple[Indices, Indices]:
        return block_uses(order, self._cache.block_of, num_blocks=self._cache.blocks.num_blocks)

    def _coming(self, epoch: int, position: int, uses: tuple[Indices, Indices]) -> Iterator[int]:
        """Yields this process's share of the blocks in order of first use: those of the rest of this epoch, then those of the next one."""
        first, last = uses
        yield from self._share(np.where(last >= position, first, NEVER))
        following = self._uses_in(self._traversal.order(epoch + 1))
        with self._changed:
            if self._epoch == epoch:
                self._uses[epoch + 1] = following
        yield from self._share(following[0])

    def _share(self, first: Indices) -> list[int]:
        used = np.argsort(first, kind="stable")[: int((first != NEVER).sum())]
        return used[self._reader :: self._num_readers].tolist()

    def _next_use(self, in_need: bool) -> NDArray[np.float64]:
        """Returns the position of each block's next use, counted on from this epoch into the next; infinite if that is not known yet.

        in_need: batches that are in work do not count, so that a block which another batch waits for finds room.
        """
        with self._changed:
            epoch, reached = self._epoch, self._position - (0 if in_need else self._lag)
            (first, last), following = self._uses[epoch], self._uses.get(epoch + 1)
        later = np.full(len(first), np.inf)
        if following is not None:
            later = np.where(following[0] != NEVER, following[0] + float(self._traversal.num_samples), np.inf)
        return np.where(last >= reached, first.astype(np.float64), later)

    def _work(self) -> None:
        while (claimed := self._next_claim()) is not None:
            block, unfinished = claimed
            wait_s = 0.5
            while not self._stopped.is_set():
                try:
                    self._cache.fetch(block, unfinished)
                    break
                except UserError:  # the loader meets the same error when it reads this block, and then it ends the run
                    break
                except Exception:
                    self._stopped.wait(wait_s)
                    wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            unfinished.unlink(missing_ok=True)

    def _next_claim(self) -> tuple[int, Path] | None:
        """Waits for the next block to fetch and room for it; returns the block and the file that reserves the room, or None at the end."""
        with self._turn:
            while not self._stopped.is_set():
                with self._changed:
                    start, sequence = self._start, self._sequence
                block = next(sequence, None)
                if block is None:
                    self._wait(lambda start=start: self._start != start)
                elif not self._cache.holds(block) and (unfinished := self._claim(block, start)) is not None:
                    return block, unfinished
        return None

    def _claim(self, block: int, start: int) -> Path | None:
        """Waits for room and returns the file that reserves it; None at the end, after another `start_epoch`, or if the disk refuses."""
        while not self._stopped.is_set() and self._start == start:
            position, began = self._position, time.monotonic()
            try:
                unfinished = self._cache.claim(block)
            except UserError:  # the disk refuses; the loader meets the same error
                return None
            if unfinished is not None:
                return unfinished
            # Looking for room reads the cache's whole folder, which takes long if it is large.
            self._stopped.wait(_REST * (time.monotonic() - began))
            self._wait(lambda position=position: self._start != start or self._position != position)
        return None

    def _wait(self, until: Callable[[], bool]) -> None:
        """Waits until the condition holds or the end, at most _POLL_S, because other processes change the cache too."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped.is_set() or until(), timeout=_POLL_S)
