"""Computes which images each rank reads at each step: pure functions of (seed, epoch, step), the same for every backend.

A global batch is a slice of the epoch's order. It is split into equal micro-batches, and each of those into equal shares for the ranks. So
a micro-batch has the same images for any number of ranks, and a loader's whole state is (epoch, next micro-batch).

The order is random over all samples. For data larger than memory on disks that are slow at random reads, it can instead shuffle blocks of
neighbouring samples and then the samples within windows of many blocks, so that whole blocks are read at once. Where several nodes read from
one store, each can own a part of the blocks for an epoch, so that together they read each block once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError, require, require_at_least
from fastbyol.host.shared_columns import row_pieces

Indices = NDArray[np.int64]
# Extra key words, so that these permutations are independent of other random numbers keyed by (seed, epoch): "orde", "bloc" in ASCII.
_ORDER_STREAM, _BLOCK_STREAM = 0x6F726465, 0x626C6F63


def seeded_permutation(num: int, *key: int) -> Indices:
    """Returns a random permutation, (num,) int64: the argsort of the first `num` words of a PCG64 generator seeded with the key.

    Not `Generator.permutation`: numpy guarantees a stable stream of raw words but not a stable shuffle, and a run may resume under a newer numpy.
    """
    return stable_argsort(np.random.PCG64(key).random_raw(num))


def stable_argsort(words: NDArray[np.uint64]) -> Indices:
    """Returns np.argsort(words, kind='stable'), int64, three times as fast for random words: 1e7 of them take about a second.

    It sorts the words themselves, each with its own index in place of the low bits. Where two differ only in those bits, it compares them whole.
    """
    num = len(words)
    bits = np.uint64(max(num - 1, 1).bit_length())
    index_mask = (np.uint64(1) << bits) - np.uint64(1)
    keys = words & ~index_mask
    keys |= np.arange(num, dtype=np.uint64)
    keys.sort()
    # In pieces, to limit memory.
    alike = [np.flatnonzero(np.diff(keys[at.start : at.stop + 1] >> bits) == 0) + at.start for at in row_pieces(num)]
    first = np.concatenate([np.zeros(0, dtype=np.int64), *alike])
    tied = np.union1d(first, first + 1)
    high = keys[tied] >> bits
    keys &= index_mask
    order = keys.view(np.int64)
    order[tied] = order[tied][np.lexsort((words[order[tied]], high))]
    return order


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> Indices:
    """Returns the order in which an epoch visits all samples, (num_samples,) int64."""
    return seeded_permutation(num_samples, _ORDER_STREAM, seed, epoch)


@dataclass(frozen=True)
class Blocks:
    """Samples grouped into blocks of neighbours on disk, which are read together.

    sample: (num_samples,) sample indices in storage order. number: (num_samples,) block number of each of these, from 0, never decreasing.
    Both are kept in 32 bits where the numbers fit.
    """

    sample: NDArray[np.integer]
    number: NDArray[np.integer]
    window: int
    """Number of blocks whose samples are shuffled together."""

    @property
    def num_blocks(self) -> int:
        return int(self.number[-1]) + 1

    def members(self, block: int) -> Indices:
        """Returns the samples of a block in storage order."""
        # Of the column's own type: searchsorted would copy the whole column to another one.
        first, last = np.searchsorted(self.number, np.array([block, block + 1], dtype=self.number.dtype))
        return self.sample[first:last].astype(np.int64)


def group_into_blocks(file: NDArray[np.integer], offset: NDArray[np.integer], *, block_bytes: int, window_bytes: int) -> Blocks:
    """Groups samples into blocks of block_bytes, counted from the start of each file; with a .beton's page size, these are its pages.

    Args:
        file: (num_samples,) number of the file that holds each sample.
        offset: (num_samples,) offset of the sample's first byte in its file.
        block_bytes: size of a block, which is read in one go.
        window_bytes: size of the window whose samples are shuffled together; at least one block is used.
    """
    num = len(offset)
    kind = np.int32 if num < 2**31 else np.int64
    number = np.zeros(num, dtype=kind)
    # A converter writes the images in storage order, so usually nothing is to be sorted.
    sample = np.arange(num, dtype=kind) if _in_storage_order(file, offset) else np.lexsort((offset, file)).astype(kind)
    last_file = last_page = -1  # which is no file or page: the first sample always starts a block
    last = -1
    for piece in row_pieces(num):
        rows = sample[piece]
        files, page = file[rows], offset[rows] // block_bytes
        starts_block = (np.diff(files, prepend=last_file) != 0) | (np.diff(page, prepend=last_page) != 0)
        number[piece] = np.cumsum(starts_block) + last
        last_file, last_page, last = files[-1], page[-1], int(number[piece][-1])
    return Blocks(sample, number, window=max(1, window_bytes // block_bytes))


def _in_storage_order(file: NDArray[np.integer], offset: NDArray[np.integer]) -> bool:
    """Returns True if the samples are in the order of their files and offsets already."""
    for at in row_pieces(len(offset) - 1):
        files, offsets = file[at.start : at.stop + 1], offset[at.start : at.stop + 1]
        if not ((files[1:] > files[:-1]) | ((files[1:] == files[:-1]) & (offsets[1:] >= offsets[:-1]))).all():
            return False
    return True


def block_order(blocks: Blocks, *, seed: int, epoch: int) -> Indices:
    """Returns the order in which an epoch reads the blocks, (num_blocks,) int64; each `blocks.window` consecutive ones are one window."""
    return seeded_permutation(blocks.num_blocks, _BLOCK_STREAM, seed, epoch)


def part_of_node(num_samples: int, *, node: int, nodes: int) -> tuple[int, int]:
    """Returns where a node's part of an epoch's samples, in the order of the blocks, begins and ends. The parts differ by one sample at most."""
    return num_samples * node // nodes, num_samples * (node + 1) // nodes


def local_order(blocks: Blocks, *, seed: int, epoch: int, node: int = 0, nodes: int = 1) -> Indices:
    """Returns the sample order of a local traversal, (num_samples,) int64: window by window, the samples within a window shuffled.

    With several nodes: the order of this node's part, in which the windows are counted from the first block of the part.
    """
    # The argsort of a permutation is its inverse: the place of each block in the order.
    place_of_block = np.argsort(block_order(blocks, seed=seed, epoch=epoch))
    words = np.random.PCG64((_ORDER_STREAM, seed, epoch)).random_raw(len(blocks.sample))
    if nodes > 1:
        place = place_of_block[blocks.number]
        start, end = part_of_node(len(place), node=node, nodes=nodes)
        own = np.argsort(place, kind="stable")[start:end]
        place, words = place[own], words[own]
        return blocks.sample[own[np.lexsort((words, (place - place[0]) // blocks.window))]].astype(np.int64)
    window_of_block = place_of_block // blocks.window
    # numpy sorts 16-bit integers, which have room for 65,536 windows, in a time that grows with their number only.
    window_of_block = window_of_block.astype(np.min_scalar_type(int(window_of_block.max())))
    shuffled = stable_argsort(words)
    # By window; within one, the stable sort keeps the order of the random words.
    order = shuffled[np.argsort(window_of_block[blocks.number[shuffled]], kind="stable")]
    for piece in row_pieces(len(order)):
        order[piece] = blocks.sample[order[piece]]
    return order


def local_windows(blocks: Blocks, *, seed: int, epoch: int, node: int = 0, nodes: int = 1) -> tuple[list[Indices], Indices]:
    """Returns the blocks of each window of `local_order`, in reading order, and the position in that order at which each window ends."""
    reading = block_order(blocks, seed=seed, epoch=epoch)
    ends = np.cumsum(np.bincount(blocks.number)[reading])
    start, end = part_of_node(len(blocks.sample), node=node, nodes=nodes)
    first, beyond = int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, end, side="left")) + 1
    firsts = range(first, beyond, blocks.window)
    windows = [reading[at : min(at + blocks.window, beyond)] for at in firsts]
    return windows, np.array([min(end, int(ends[min(at + blocks.window, beyond) - 1])) - start for at in firsts])


NEVER = np.iinfo(np.int64).max
"""Position of the first use of a block that an order does not use."""


def block_uses(order: Indices, block_of: Indices, *, num_blocks: int) -> tuple[Indices, Indices]:
    """Returns the positions in the order at which each block is first and last used, (num_blocks,) each; NEVER and -1 for an unused block.

    block_of: (num_samples,) number of each sample's block.
    """
    first, last = np.full(num_blocks, NEVER), np.full(num_blocks, -1)
    blocks, position = block_of[order], np.arange(len(order))
    # If several values are assigned to one place, numpy keeps the last.
    last[blocks] = position
    first[blocks[::-1]] = position[::-1]
    return first, last


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
    nodes: int = 1
    """Number of nodes that own a part of the blocks each (traversal sharded), which must have equally many ranks, numbered node by node; with 1,
    all ranks share one order. Each node takes the same share of every micro-batch from its part.
    """

    def __post_init__(self) -> None:
        for name in ("global_batch", "accumulate", "world_size", "nodes"):
            require_at_least(name, getattr(self, name), 1)
        divides = self.world_size % self.nodes == 0 and (self.nodes == 1 or self.blocks is not None)
        require(divides, "nodes", self.nodes, f"a divisor of {self.world_size} ranks, and 1 without blocks")
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

    @property
    def node(self) -> int:
        """Number of this rank's node, in [0, nodes)."""
        return self.rank // (self.world_size // self.nodes)

    @property
    def stride(self) -> int:
        """Number of samples that one micro-batch takes from the order."""
        return self.rank_batch * (self.world_size // self.nodes)

    def share(self, order: Indices, micro_batch: int) -> Indices:
        """Returns this rank's sample indices, (rank_batch,), in the epoch's `micro_batch`-th micro-batch, given the epoch's order."""
        start = micro_batch * self.stride + self.rank % (self.world_size // self.nodes) * self.rank_batch
        return order[start : start + self.rank_batch]

    def order(self, epoch: int) -> Indices:
        """Returns the sample order of an epoch, the same on all ranks that share it: all, or those of one node."""
        if self.blocks is not None:
            return local_order(self.blocks, seed=self.seed, epoch=epoch, node=self.node, nodes=self.nodes)
        return epoch_order(self.num_samples, seed=self.seed, epoch=epoch)

    def windows(self, epoch: int) -> tuple[list[Indices], Indices]:
        """Returns the blocks of each window of a local traversal's order, and where each window ends in it."""
        assert self.blocks is not None
        return local_windows(self.blocks, seed=self.seed, epoch=epoch, node=self.node, nodes=self.nodes)
