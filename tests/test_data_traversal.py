"""Tests of the traversal: a pure function of (seed, epoch, step) that neither loses nor repeats a sample."""

from __future__ import annotations

import numpy as np
import pytest

from fastbyol.config.errors import UserError
from fastbyol.data.traversal import (
    NEVER,
    Blocks,
    Traversal,
    block_order,
    block_uses,
    epoch_order,
    group_into_blocks,
    local_order,
    local_windows,
)

LAYOUTS = [(world, accumulate) for world in (1, 2, 3) for accumulate in (1, 2)]


def walk(world: int, accumulate: int, *, epoch: int = 4, blocks: Blocks | None = None) -> list[list[np.ndarray]]:
    """Returns the sample indices of each micro-batch and rank, for 25 samples in global batches of 12."""
    ranks = [Traversal(25, 7, 12, accumulate=accumulate, rank=rank, world_size=world, blocks=blocks) for rank in range(world)]
    return [[t.share(t.order(epoch), m) for t in ranks] for m in range(ranks[0].micro_batches)]


@pytest.mark.parametrize(("world", "accumulate"), LAYOUTS)
def test_an_epoch_repeats_no_sample_and_drops_only_the_last_incomplete_global_batch(world: int, accumulate: int) -> None:
    parts = walk(world, accumulate)
    assert len(parts) == 2 * accumulate
    assert {len(share) for shares in parts for share in shares} == {12 // (world * accumulate)}
    seen = np.concatenate([share for shares in parts for share in shares])
    assert len(set(seen.tolist())) == len(seen) == 24
    assert set(seen.tolist()) <= set(range(25))


@pytest.mark.parametrize(("world", "accumulate"), LAYOUTS)
def test_a_step_sees_the_same_images_in_the_same_order_for_any_ranks_and_accumulation(world: int, accumulate: int) -> None:
    flat = np.concatenate([np.concatenate(shares) for shares in walk(world, accumulate)])
    assert flat.tolist() == epoch_order(25, seed=7, epoch=4)[:24].tolist()


def test_over_several_epochs_every_sample_is_used_though_each_epoch_drops_one() -> None:
    seen = {int(i) for epoch in range(8) for shares in walk(1, 1, epoch=epoch) for share in shares for i in share}
    assert seen == set(range(25))


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    orders = [epoch_order(50, seed=seed, epoch=epoch).tolist() for seed in (0, 1, 2**63 - 1) for epoch in (0, 1, 299)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_order_of_seed_0_epoch_0_is_the_published_one() -> None:
    assert epoch_order(10, seed=0, epoch=0).tolist() == PUBLISHED


PUBLISHED = [9, 5, 4, 7, 2, 6, 0, 3, 8, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch": 26}, "global_batch = 26: the data has 25 images"),
        ({"global_batch": 10, "world_size": 3}, "divisible by 3 processes x 1"),
        ({"global_batch": 10, "accumulate": 4}, "divisible by 1 processes x 4"),
        ({"global_batch": 10, "world_size": 2, "rank": 2}, "rank = 2"),
        ({"global_batch": 0}, "global_batch = 0"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Traversal(num_samples=25, seed=0, **arguments)


# ---- local order


def small_blocks(num: int = 25, *, window: int = 3) -> Blocks:
    """Returns blocks of 300 bytes in two files, whose samples of 100 bytes are stored in reverse order."""
    lies_at = np.arange(num)[::-1]
    return group_into_blocks(lies_at // 13, 100 * (lies_at % 13) + 40, block_bytes=300, window_bytes=300 * window)


def test_blocks_are_the_pages_of_each_file_in_storage_order() -> None:
    file, offset = np.array([1, 0, 0, 0, 1, 0]), np.array([5, 250, 0, 90, 0, 100])
    blocks = group_into_blocks(file, offset, block_bytes=100, window_bytes=250)
    assert blocks.sample.tolist() == [2, 3, 5, 1, 4, 0]
    assert blocks.number.tolist() == [0, 0, 1, 2, 3, 3]
    assert [blocks.members(block).tolist() for block in range(blocks.num_blocks)] == [[2, 3], [5], [1], [4, 0]]
    assert blocks.window == 2
    assert group_into_blocks(file, offset, block_bytes=100, window_bytes=1).window == 1


@pytest.mark.parametrize("window", [1, 3, 100])
def test_a_local_epoch_visits_every_sample_once_window_by_window(window: int) -> None:
    blocks = small_blocks(200, window=window)
    for epoch in (0, 7):
        order, reading = local_order(blocks, seed=3, epoch=epoch).tolist(), block_order(blocks, seed=3, epoch=epoch)
        assert sorted(order) == list(range(200))
        for first in range(0, blocks.num_blocks, window):
            members = {int(i) for block in reading[first : first + window] for i in blocks.members(block)}
            taken, order = order[: len(members)], order[len(members) :]
            assert set(taken) == members


def test_samples_of_a_window_are_shuffled_and_each_epoch_groups_blocks_into_other_windows() -> None:
    blocks = small_blocks(3000, window=500)
    block_of = np.empty(3000, dtype=int)
    block_of[blocks.sample] = blocks.number
    orders = [local_order(blocks, seed=0, epoch=epoch) for epoch in range(2)]
    # A pair of neighbours is of one block of 3 with probability 2 / 1499 in a window of 1500 samples.
    together = [(np.diff(block_of[order]) == 0).mean() for order in orders]
    assert max(together) < 0.006
    first_windows = [set(order[:1500].tolist()) for order in orders]
    assert 600 < len(first_windows[0] & first_windows[1]) < 900  # half of a half


@pytest.mark.parametrize(("world", "accumulate"), LAYOUTS)
def test_a_local_step_sees_the_same_images_for_any_ranks_and_accumulation(world: int, accumulate: int) -> None:
    blocks = small_blocks()
    flat = np.concatenate([np.concatenate(shares) for shares in walk(world, accumulate, blocks=blocks)])
    assert flat.tolist() == local_order(blocks, seed=7, epoch=4)[:24].tolist()


def test_the_local_order_of_seed_0_epoch_0_is_the_published_one() -> None:
    assert local_order(small_blocks(10, window=2), seed=0, epoch=0).tolist() == PUBLISHED_LOCAL
    assert local_order(small_blocks(10, window=2), seed=0, epoch=1).tolist() != PUBLISHED_LOCAL


PUBLISHED_LOCAL = [4, 5, 2, 3, 6, 1, 0, 7, 9, 8]


# ---- parts of nodes


def slow_part(blocks: Blocks, *, seed: int, epoch: int, node: int, nodes: int) -> list[int]:
    """Returns the order of a node's part: the epoch's blocks in a row, cut into equal parts, each window of a part sorted by random words."""
    place = {int(block): at for at, block in enumerate(block_order(blocks, seed=seed, epoch=epoch))}
    words = dict(
        zip(blocks.sample.tolist(), np.random.PCG64((0x6F726465, seed, epoch)).random_raw(len(blocks.sample)).tolist(), strict=True)
    )
    block_of = dict(zip(blocks.sample.tolist(), blocks.number.tolist(), strict=True))
    row = [int(i) for block in sorted(place, key=lambda block: place[block]) for i in blocks.members(block)]
    part = row[len(row) * node // nodes : len(row) * (node + 1) // nodes]
    first = place[block_of[part[0]]]
    return sorted(part, key=lambda i: ((place[block_of[i]] - first) // blocks.window, words[i]))


@pytest.mark.parametrize("nodes", [1, 2, 3, 7])
def test_a_node_mixes_windows_of_its_own_part(nodes: int) -> None:
    blocks = small_blocks(101, window=4)
    parts = [local_order(blocks, seed=3, epoch=2, node=node, nodes=nodes).tolist() for node in range(nodes)]
    assert parts == [slow_part(blocks, seed=3, epoch=2, node=node, nodes=nodes) for node in range(nodes)]
    assert sorted(i for part in parts for i in part) == list(range(101))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    # All but the blocks at the cuts belong to one node.
    block_of = np.empty(101, dtype=int)
    block_of[blocks.sample] = blocks.number
    owners = [{int(block_of[i]) for i in part} for part in parts]
    assert sum(map(len, owners)) <= blocks.num_blocks + nodes - 1


def test_one_node_has_the_order_of_a_local_traversal_and_another_number_of_nodes_has_another() -> None:
    blocks = small_blocks(100)
    whole = local_order(blocks, seed=1, epoch=0).tolist()
    assert local_order(blocks, seed=1, epoch=0, node=0, nodes=1).tolist() == whole
    assert local_order(blocks, seed=1, epoch=0, node=0, nodes=2).tolist() != whole[:50]


@pytest.mark.parametrize(("world", "nodes", "accumulate"), [(2, 2, 1), (4, 2, 3), (6, 3, 2), (4, 4, 1)])
def test_in_a_sharded_epoch_each_image_is_seen_once_and_each_node_drops_the_end_of_its_order(
    world: int, nodes: int, accumulate: int
) -> None:
    num, blocks = 100, small_blocks(100, window=2)
    ranks = [Traversal(num, 7, 12, accumulate=accumulate, rank=rank, world_size=world, blocks=blocks, nodes=nodes) for rank in range(world)]
    per_node, seen = world // nodes, {node: [] for node in range(nodes)}
    assert {walk.micro_batches for walk in ranks} == {num // 12 * accumulate}
    for micro_batch in range(ranks[0].micro_batches):
        for walk in ranks:
            share = walk.share(walk.order(4), micro_batch).tolist()
            assert len(share) == 12 // (world * accumulate)
            seen[walk.rank // per_node] += share
    for node, images in seen.items():
        assert images == local_order(blocks, seed=7, epoch=4, node=node, nodes=nodes)[: len(images)].tolist()
    together = [i for images in seen.values() for i in images]
    assert len(set(together)) == len(together) == num // 12 * 12


@pytest.mark.parametrize("nodes", [1, 3])
def test_windows_are_the_blocks_of_each_stretch_of_the_order(nodes: int) -> None:
    blocks = small_blocks(101, window=4)
    block_of = np.empty(101, dtype=int)
    block_of[blocks.sample] = blocks.number
    for node in range(nodes):
        order = local_order(blocks, seed=3, epoch=2, node=node, nodes=nodes)
        windows, ends = local_windows(blocks, seed=3, epoch=2, node=node, nodes=nodes)
        assert ends[-1] == len(order)
        for window, start, end in zip(windows, [0, *ends[:-1]], ends, strict=True):
            assert set(window.tolist()) == set(block_of[order[start:end]].tolist())


def test_block_uses_are_the_first_and_last_positions_in_an_order() -> None:
    order, block_of = np.array([4, 0, 3, 1, 5]), np.array([0, 2, 2, 0, 1, 2])
    first, last = block_uses(order, block_of, num_blocks=4)
    assert first.tolist() == [1, 0, 3, NEVER]
    assert last.tolist() == [2, 0, 4, -1]


def test_nodes_that_do_not_divide_the_ranks_or_have_no_blocks_are_refused() -> None:
    for options in ({"world_size": 4, "nodes": 3, "blocks": small_blocks()}, {"world_size": 4, "nodes": 2}):
        with pytest.raises(UserError, match="nodes = "):
            Traversal(25, 0, 12, **options)  # type: ignore[arg-type]
