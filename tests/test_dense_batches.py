"""Batches of the dense tasks: a pure function of seed and step, whatever reads them; comparison of scores by a bootstrap."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbyol.config.errors import UserError
from fastbyol.config.views import PAPER
from fastbyol.evaluation.tasks.dense.batches import all_samples, training_batches
from fastbyol.evaluation.tasks.dense.trials import compare_statistics, normalised
from fastbyol.ranks.process_group import Process
from tests.dense_jobs import make_job, subject


class Numbers:
    """Ten samples: their number and a random one."""

    def __len__(self) -> int:
        return 10

    def train(self, index: int) -> tuple[int, float]:
        return index, float(torch.rand(()))

    def test(self, index: int) -> int:
        if index == 8:
            raise UserError("number 8 cannot be read")
        return index


def drawn(tmp_path: Path, *, first: int = 0, steps: int = 6, seed: int = 0, workers: int = 1, rank: int = 0, ranks: int = 1) -> list:
    settings = dataclasses.make_dataclass("Settings", [])()
    job = dataclasses.replace(
        make_job("task", settings, data=tmp_path, folder=tmp_path), workers=workers, process=Process(rank, ranks, torch.device("cpu"))
    )
    batches = training_batches(job, Numbers(), rows=np.arange(10), global_batch=4, seed=seed, collate=list)
    return list(itertools.islice(batches(first), steps))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_a_step_has_the_same_batch_after_a_stop_with_other_workers_and_in_the_shares_of_ranks(tmp_path: Path) -> None:
    whole = drawn(tmp_path)
    state = torch.random.get_rng_state()
    assert drawn(tmp_path, first=2, steps=4) == whole[2:]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert drawn(tmp_path, steps=3, workers=3) == whole[:3]
    shares = [drawn(tmp_path, rank=rank, ranks=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
    numbers = [index for batch in whole for index, _ in batch]
    assert sorted(numbers[:10]) == sorted(numbers[10:20]) == list(range(10))
    assert numbers[:10] != numbers[10:20]
    values = [value for batch in whole for _, value in batch]
    assert len(set(values)) == len(values)
    other = drawn(tmp_path, seed=1)
    assert not {value for batch in other for _, value in batch} & set(values)
    with pytest.raises(UserError, match="--batch_images 4: must be divisible by the 3 ranks"):
        drawn(tmp_path, ranks=3)


def test_every_test_sample_comes_once_and_one_that_cannot_be_read_ends_the_job_with_its_line(tmp_path: Path) -> None:
    job = make_job("task", dataclasses.make_dataclass("Settings", [])(), data=tmp_path, folder=tmp_path)
    rows = np.array([0, 3, 6, 7, 9])
    assert [row for batch in all_samples(job, Numbers(), rows=rows, batch=2) for row, _ in batch] == rows.tolist()
    with pytest.raises(UserError, match="number 8 cannot be read"):
        list(all_samples(job, Numbers(), rows=np.arange(10), batch=2))


def test_images_are_normalised_without_a_tensor_whose_values_the_device_would_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, new = images.clone(), torch.tensor
    mean, std = (new(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (PAPER.mean, PAPER.std))

    def without_copy(*values: Any, device: Any = None, **options: Any) -> torch.Tensor:
        assert device is None, "a list is copied to the device, which the host waits for"
        return new(*values, **options)

    monkeypatch.setattr(torch, "tensor", without_copy)
    found = normalised(images, subject())
    torch.testing.assert_close(found.double(), (images.double() / 255 - mean) / std, rtol=1e-6, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


def test_the_bootstrap_finds_a_clear_difference_and_no_difference_of_an_encoder_from_itself() -> None:
    rng = np.random.default_rng(0)
    hits = rng.uniform(0.4, 0.6, 200)
    better = np.stack([np.full(200, 100.0), 100 * (hits + 0.05)], axis=1)
    worse = np.stack([np.full(200, 100.0), 100 * hits], axis=1)

    def share(statistics: np.ndarray, weights: np.ndarray) -> float:
        pixels, found = weights @ statistics
        return float(found / pixels)

    found = compare_statistics([better], [worse], share)
    assert found.outcome == "better"
    assert found.difference == pytest.approx(0.05)
    assert (found.gained, found.lost) == (200, 0)
    assert compare_statistics([better], [better], share).outcome == "same"
    # Different images decide: the interval is that of a mean of paired differences.
    mixed = worse.copy()
    mixed[:, 1] += rng.normal(0.5, 10, 200)
    differences = (mixed - worse)[:, 1] / 100
    found = compare_statistics([mixed], [worse], share)
    half = 1.96 * differences.std() / np.sqrt(200)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    assert (found.low + found.high) / 2 == pytest.approx(differences.mean(), abs=0.2 * half)
