"""Batches of training samples with random augmentation, a pure function of seed and step; and all test samples, shared by the ranks."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from fastbyol.config.errors import UserError
from fastbyol.data.traversal import Indices, seeded_permutation
from fastbyol.evaluation.tasks.job import Job
from fastbyol.host.cores import default_workers
from fastbyol.host.signals import COMMAND_SIGNALS

_STREAM = 0x64656E73  # "dens" in ASCII: independent of other permutations of the same seed
FEW_WORKERS = 2
"""With this many workers or fewer the process decodes itself: on few cores others would only compete with the training."""


class Source(Protocol):
    """Samples by number. `train` draws its augmentation from torch's global generator, which is seeded for each sample."""

    def __len__(self) -> int: ...

    def train(self, index: int) -> Any: ...

    def test(self, index: int) -> Any: ...


class Fault(str):
    """Stands for a sample that could not be read: DataLoader would wrap an exception of a worker in its traceback."""


def training_batches(
    job: Job, source: Source, *, rows: Indices, global_batch: int, seed: int, collate: Callable[[list[Any]], Any]
) -> Callable[[int], Iterator[Any]]:
    """Returns a function from a first step to this rank's batches from there on, for ever, on the job's device.

    Every epoch visits the rows in another random order; its last images and the next epoch's first ones share a batch. The batch of a
    step depends on the seed alone, not on the number of workers, nor on where a stopped training went on.
    """
    ranks = job.process.world_size
    if global_batch % ranks:
        raise UserError(f"--batch_images {global_batch}: must be divisible by the {ranks} ranks")

    def batches(first: int) -> Iterator[Any]:
        positions = _Positions(first, global_batch=global_batch, rank=job.process.rank, ranks=ranks)
        yield from _loaded(job, _Drawn(source, rows, seed), batch_sampler=positions, collate_fn=functools.partial(_collated, collate))

    return batches


def all_samples(job: Job, source: Source, *, rows: Indices, batch: int) -> Iterator[list[tuple[int, Any]]]:
    """Yields lists of (row, test sample) that are this rank's share of the rows, each once; tensors stay on the CPU."""
    mine = rows[job.process.rank :: job.process.world_size]
    parts = [mine[start : start + batch].tolist() for start in range(0, len(mine), batch)]
    yield from _loaded(job, _Tested(source), batch_sampler=parts, collate_fn=_unchanged, to_device=False)


def _loaded(job: Job, dataset: Dataset[Any], *, to_device: bool = True, **options: Any) -> Iterator[Any]:
    count = job.workers or default_workers()
    processes: dict[str, Any] = {}
    if count > FEW_WORKERS:
        # spawn: forking a process that runs torch's threads may deadlock.
        processes = {"num_workers": count, "multiprocessing_context": "spawn", "worker_init_fn": _ignore_signals}
    device = job.process.device
    # A generator of its own: a DataLoader draws a number from the global one when it starts.
    options["generator"] = torch.Generator()
    loader = DataLoader(dataset, pin_memory=to_device and device.type == "cuda", **processes, **options)
    # The workers start here and inherit the blocked signal: only this process answers Ctrl-C, and then ends them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for batch in iterator:
        if isinstance(batch, Fault):
            raise UserError(str(batch))
        yield moved(batch, device) if to_device else batch


def moved(value: Any, device: torch.device) -> Any:
    """Returns the value with its tensors, in tuples, lists and dicts at any depth, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value


class _Positions:
    """The positions of this rank in the endless sequence of training samples, batch by batch."""

    def __init__(self, first: int, *, global_batch: int, rank: int, ranks: int) -> None:
        self.first, self.global_batch, self.share, self.rank = first, global_batch, global_batch // ranks, rank

    def __iter__(self) -> Iterator[list[int]]:
        start = self.first * self.global_batch + self.rank * self.share
        while True:
            yield list(range(start, start + self.share))
            start += self.global_batch


class _Drawn(Dataset):
    """Training samples by position."""

    def __init__(self, source: Source, rows: Indices, seed: int) -> None:
        self.source, self.rows, self.seed = source, rows, seed
        self._order: tuple[int, Indices] | None = None

    def __getitem__(self, position: int) -> Any:
        epoch, at = divmod(position, len(self.rows))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, seeded_permutation(len(self.rows), _STREAM, self.seed, epoch)
        row = int(self.rows[self._order[1][at]])
        with torch.random.fork_rng(devices=[]):
            # A different multiple for each seed, so that two seeds share no augmentation.
            torch.manual_seed((self.seed + 1) * 0x9E3779B97F4A7C15 + position & 0x7FFFFFFFFFFFFFFF)
            return _read(self.source.train, row)


class _Tested(Dataset):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, row: int) -> Any:
        sample = _read(self.source.test, row)
        return sample if isinstance(sample, Fault) else (row, sample)


def _read(read: Callable[[int], Any], row: int) -> Any:
    try:
        return read(row)
    except UserError as error:
        return Fault(error)


def _collated(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, Fault)), None) or collate(samples)


def _unchanged(samples: list[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, Fault)), None) or samples


def _ignore_signals(_: int) -> None:
    for number in COMMAND_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
