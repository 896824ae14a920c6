"""Computes which images each rank reads at each step: pure functions of (seed, epoch, step), the same for every backend.

A global batch is a slice of the epoch's order. It is split into equal micro-batches, and each of those into equal shares for the ranks. So
a micro-batch has the same images for any number of ranks, and a loader's whole state is (epoch, next micro-batch).

The order is random over all samples. For data larger than memory on disks that are slow at random reads, it can instead shuffle blocks of
neighbouring samples and then the samples within windows of many blocks, so that whole blocks are read at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError, require, require_at_least

Indices = NDArray[np.int64]
# Extra key words, so that these permutations are independent of other random numbers keyed by (seed, epoch): "orde", "bloc" in ASCII.
_ORDER_STREAM, _BLOCK_STREAM = 0x6F726465, 0x626C6F63


def seeded_permutation(num: int, *key: int) -> Indices:
    """Returns a random permutation, (num,) int64: the argsort of the first `num` words of a PCG64 generator seeded with the key.

    Not `Generator.permutation`: numpy guarantees a stable stream of raw words but not a stable shuffle, and a run may resume under a newer numpy.
    """
    return np.argsort(np.random.PCG64(key).random_raw(num), kind="stable")


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> Indices:
    """Returns the order in which an epoch visits all samples, (num_samples,) int64."""
    return seeded_permutation(num_samples, _ORDER_STREAM, seed, epoch)


@dataclass(frozen=True)
class Blocks:
    """Samples grouped into blocks of neighbours on disk, which are read together.

    sample: (num_samples,) sample indices in storage order. number: (num_samples,) block number of each of these, from 0, never decreasing.
    """

    sample: Indices
    number: Indices
    window: int
    """Number of blocks whose samples are shuffled together."""

    @property
    def num_blocks(self) -> int:
        return int(self.number[-1]) + 1

    def members(self, block: int) -> Indices:
        """Returns the samples of a block in storage order."""
        first, last = np.searchsorted(self.number, [block, block + 1])
        return self.sample[first:last]


def group_into_blocks(file: Indices, offset: Indices, *, block_bytes: int, window_bytes: int) -> Blocks:
    """Groups samples into blocks of block_bytes, counted from the start of each file; with a .beton's page size, these are its pages.

    Args:
        file: (num_samples,) number of the file that holds each sample.
        offset: (num_samples,) offset of the sample's first byte in its file.
        block_bytes: size of a block, which is read in one go.
        window_bytes: size of the window whose samples are shuffled together; at least one block is used.
    """
    sample = np.lexsort((offset, file))
    page = offset[sample] // block_bytes
    # prepend=-1, which is no file or page: the first sample always starts a block.
    starts_block = (np.diff(file[sample], prepend=-1) != 0) | (np.diff(page, prepend=-1) != 0)
    return Blocks(sample, np.cumsum(starts_block) - 1, window=max(1, window_bytes // block_bytes))


def block_order(blocks: Blocks, *, seed: int, epoch: int) -> Indices:
    """Returns the order in which an epoch reads the blocks, (num_blocks,) int64; each `blocks.window` consecutive ones are one window."""
    return seeded_permutation(blocks.num_blocks, _BLOCK_STREAM, seed, epoch)


def local_order(blocks: Blocks, *, seed: int, epoch: int) -> Indices:
    """Returns the sample order of a local traversal, (num_samples,) int64: window by window, the samples within a window shuffled."""
    # The argsort of a permutation is its inverse: the place of each block in the order.
    window_of_block = np.argsort(block_order(blocks, seed=seed, epoch=epoch)) // blocks.window
    words = np.random.PCG64((_ORDER_STREAM, seed, epoch)).random_raw(len(blocks.sample))
    return blocks.sample[np.lexsort((words, window_of_block[blocks.number]))]


@dataclass(frozen=True)
class Traversal:
    """The samples that this rank reads, in order.

    The last incomplete global batch of an epoch is skipped (different images each epoch), so that all ranks take equally many steps.
    """

    num_samples: int
    seed: int
    global_batch: int
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    rank: int = 0
    world_size: int = 1
    blocks: Blocks | None = field(default=None, compare=False)
    """Blocks of a local traversal; None shuffles all samples."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "accumulate", "world_size"):
            require_at_least(name, getattr(self, name), 1)
        require(0 <= self.rank < self.world_size, "rank", self.rank, f"in [0, {self.world_size})")
        if self.global_batch > self.num_samples:
            raise UserError(
                f"global_batch = {self.global_batch}: the data has {self.num_samples} images; take a smaller batch or more data"
            )
        if self.global_batch % (self.world_size * self.accumulate):
            raise UserError(
                f"global_batch = {self.global_batch}: must be divisible by {self.world_size} processes x {self.accumulate} micro-batches"
            )

    @property
    def rank_batch(self) -> int:
        """Number of images in one micro-batch of one rank."""
        return self.global_batch // (self.world_size * self.accumulate)

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of this rank in one epoch."""
        return self.num_samples // self.global_batch * self.accumulate

    def share(self, order: Indices, micro_batch: int) -> Indices:
        """Returns this rank's sample indices, (rank_batch,), in the epoch's `micro_batch`-th micro-batch, given the epoch's order."""
        start = micro_batch * self.rank_batch * self.world_size + self.rank * self.rank_batch
        return order[start : start + self.rank_batch]

    def order(self, epoch: int) -> Indices:
        """Returns the sample order of an epoch, the same on all ranks."""
        if self.blocks is not None:
            return local_order(self.blocks, seed=self.seed, epoch=epoch)
        return epoch_order(self.num_samples, seed=self.seed, epoch=epoch)
