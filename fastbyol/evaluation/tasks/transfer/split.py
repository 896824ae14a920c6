"""Seeded splits of exactly the paper's sizes, for sets of which the paper states the sizes but not the images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.backends.source import Indices
from fastbyol.data.traversal import seeded_permutation

_STREAM = 0x74726673  # "trfs" in ASCII, so that these permutations are independent of others with the same seed
OWN_SHARE = 0.2
"""Share of the training images that is held out of a set whose sizes the paper does not give."""


def hold_out(rows: Indices, count: int, *, seed: int) -> tuple[Indices, Indices]:
    """Returns (kept, held out): `count` of the rows at random, both ascending. Raises UserError unless both have some."""
    if not 0 < count < len(rows):
        raise UserError(f"{count:,} of {len(rows):,} training images would be held out for validation; both parts need images")
    order = seeded_permutation(len(rows), _STREAM, seed)
    return np.sort(rows[order[count:]]), np.sort(rows[order[:count]])


def hold_out_of_each(
    rows: Indices, labels: NDArray[np.int64], count: int, *, class_names: Sequence[str], seed: int
) -> tuple[Indices, Indices]:
    """Returns (kept, held out): `count` of the rows of each class at random, both ascending.

    labels: (num_images,) of all images, which `rows` index. Raises UserError for a class that has no more than that.
    """
    order = seeded_permutation(len(rows), _STREAM, seed)
    shuffled = rows[order]
    held: list[Indices] = []
    for label, name in enumerate(class_names):
        members = shuffled[labels[shuffled] == label]
        if len(members) <= count:
            raise UserError(f"class {name!r}: has {len(members)} training images, and {count} of each class are held out of them")
        held.append(members[:count])
    chosen = np.sort(np.concatenate(held))
    return np.setdiff1d(rows, chosen), chosen


def held_out_count(paper: tuple[int, int, int], rows: int) -> int:
    """Returns how many of so many training images are held out: the paper's number, or its share of a set of another size."""
    train, valid, _ = paper
    return valid if rows == train + valid else round(valid / (train + valid) * rows)
