"""A short, seeded form of `tests/long/fuzz_inputs.py`: damaged files are taken or refused in one line; anything else fails."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.long.fuzz_inputs import TARGETS, mutated_bytes, tried

INPUTS = {target: 120 for target in TARGETS} | {"checkpoint": 30}
"""How many damaged files of each kind are tried; a checkpoint costs a tenth of a second."""


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_are_accepted_or_refused_in_one_line(target: str, tmp_path: Path) -> None:
    attack = TARGETS[target](tmp_path)
    counts = Counter(tried(attack, target, seed=1, number=number) for number in range(INPUTS[target]))
    assert counts["refused"] + counts["taken"] == INPUTS[target]
    if target != "checkpoint":  # where the checkpoint before it is taken instead
        assert min(counts["refused"], counts["taken"]) > 0


def test_the_same_seed_makes_the_same_input() -> None:
    import random

    data = bytes(range(256))
    assert [mutated_bytes(data, random.Random(n)) for n in range(50)] == [mutated_bytes(data, random.Random(n)) for n in range(50)]
    assert len({mutated_bytes(data, random.Random(n)) for n in range(50)}) > 40
