"""Traversal: pure functions of (seed, epoch, step), no sample lost or repeated."""

from __future__ import annotations

import numpy as np
import pytest

from fastbyol.config.errors import UserError
from fastbyol.data.traversal import Traversal, epoch_order

LAYOUTS = [(world, accumulate) for world in (1, 2, 3) for accumulate in (1, 2)]


def walk(world: int, accumulate: int, *, epoch: int = 4) -> list[list[np.ndarray]]:
    """By micro-batch, by rank: the indices of 25 samples in global batches of 12."""
    ranks = [Traversal(25, 7, 12, accumulate=accumulate, rank=rank, world_size=world) for rank in range(world)]
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


def test_over_epochs_every_sample_comes_though_each_epoch_drops_one() -> None:
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
