"""Training images that are held out to choose a rate, a length or a classifier: how many, and which."""

from __future__ import annotations

import numpy as np

from fastbyol.config.errors import UserError, require, require_positive
from fastbyol.data.backends.source import Indices
from fastbyol.data.traversal import seeded_permutation

Amounts = tuple[float, ...]
"""How many images are held out: a number of them, or a share below 1. Of several, the first that is not too large counts, else the last."""
IMAGENET: Amounts = (10_009, 0.08)
"""The paper's 10,009 images of ImageNet (appendix C.1), and a share for sets of which these would be too many."""
LARGEST_SHARE = 0.25
"""The first of several amounts counts where it is at most this share of the images."""
NOTHING_TO_CHOOSE = {"held_out": "where there is nothing to choose"}
"""Why --held_out has no effect on settings that leave no choice."""
_STREAM = 0x68656C64  # "held" in ASCII, so that this permutation is independent of others with the same seed


def check_amounts(name: str, amounts: Amounts) -> None:
    """Raises UserError unless there is an amount and all are above 0. name: of the setting."""
    require(len(amounts) > 0, name, amounts, "a number of images, or a share below 1")
    for amount in amounts:
        require_positive(name, amount)


def held_out_count(num: int, amounts: Amounts) -> int:
    """Returns how many of `num` training images are held out. Raises UserError unless both parts get some."""
    counts = [round(amount * num) if amount < 1 else int(amount) for amount in amounts]
    count = next((each for each in counts if each <= LARGEST_SHARE * num), counts[-1])
    if not 0 < count < num:
        typed = ",".join(f"{amount:g}" for amount in amounts)
        raise UserError(f"--held_out {typed}: {count:,} of {num:,} labelled training images; both parts need images")
    return count


def held_out_notes(num: int, amounts: Amounts) -> list[str]:
    """Returns a sentence if another amount than the first was used, because the user did not ask for it."""
    count = held_out_count(num, amounts)
    if len(amounts) == 1 or count == amounts[0]:
        return []
    return [
        f"note: {count:,} of the {num:,} training images were held out to choose with; the settings' {amounts[0]:,.10g} would be more than a "
        f"quarter of them (--held_out N takes another number)"
    ]


def held_out_rows(rows: Indices, *, held_out: Amounts, seed: int) -> tuple[Indices, Indices]:
    """Splits row numbers at random into (train, held out), both ascending.

    Differs from the paper: it holds out the last 10,009 images of a shuffled listing; ours is sorted by class, so a seeded random choice
    stands for it.
    """
    count = held_out_count(len(rows), held_out)
    order = seeded_permutation(len(rows), _STREAM, seed)
    return np.sort(rows[order[count:]]), np.sort(rows[order[:count]])


def held_out_beside(rows: Indices, labelled: Indices, *, held_out: Amounts, seed: int) -> tuple[Indices, Indices]:
    """Returns (the images of `rows` to train on while something is chosen, the held-out images), both ascending.

    The held-out images are drawn from the labelled images outside `rows`, so that a small part loses none. If there are too few outside, they
    are drawn from all labelled images and left out of the training. held_out: amounts, of the labelled images.
    """
    _, drawn = held_out_rows(labelled, held_out=held_out, seed=seed)
    beside = np.setdiff1d(labelled, rows)
    if len(beside) > len(drawn):
        _, drawn = held_out_rows(beside, held_out=(len(drawn),), seed=seed)
    return np.setdiff1d(rows, drawn), drawn
