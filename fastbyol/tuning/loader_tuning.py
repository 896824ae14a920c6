"""Tunes the loader alone: which stored form to read, what decodes it, and how many threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

from fastbyol.config.schema import DataConfig
from fastbyol.data.build import backend_of, build_run_loader
from fastbyol.data.loader import TwoViewLoader
from fastbyol.tuning import candidates
from fastbyol.tuning.bench import Bench
from fastbyol.tuning.comparison import Comparison, Trial

IMAGES_PER_WORKER = 32
"""Images per thread in a batch of a trial: a thread takes 16 images at a time, and a batch should not take long."""
MIN_BATCHES = 3


@dataclass(frozen=True)
class Reading:
    """One way to read the images: the path, the backend, and what DALI does."""

    path: str
    backend: str
    dali_ops: str

    @property
    def name(self) -> str:
        ops = f", {self.dali_ops}" if self.backend == "dali" and self.dali_ops != "auto" else ""
        return f"{Path(self.path).name} ({self.backend}{ops})"

    def applied(self, data: DataConfig) -> DataConfig:
        """Returns the settings changed to read the images this way."""
        return replace(data, train=self.path, backend=self.backend, dali_ops=self.dali_ops)


def readings(paths: Sequence[str], data: DataConfig, *, device: str, kept: frozenset[str]) -> list[Reading]:
    """Returns every way to read the paths on this device ('cpu' or 'cuda'), in their order. UserError for a path that does not exist."""
    found = []
    for path in paths:
        fitting = backend_of(path, option="--data")
        backend = data.backend if "data.backend" in kept else fitting
        both = fitting == "dali" and device == "cuda" and "data.dali_ops" not in kept
        found += [Reading(path, backend, ops) for ops in (("crop", "decode") if both else (data.dali_ops,))]
    return found


def tune_reading(bench: Bench, ways: Sequence[Reading]) -> None:
    """Chooses the path and the decoder, where there is a choice."""
    if len(ways) == 1:
        return
    data = replace(bench.found.config.data, workers=bench.found.config.data.workers or bench.cores)
    by_name = {way.name if len({w.name for w in ways}) == len(ways) else f"{way.path} {way.name}": way for way in ways}
    comparison = _loaders_alone(bench, f"loader alone, {data.workers} threads", {name: way.applied(data) for name, way in by_name.items()})
    chosen = by_name[bench.found.add(comparison, "data.train", "data.backend", "data.dali_ops")]
    bench.found.choose(data=chosen.applied(bench.found.config.data))


def tune_workers(bench: Bench, *, step_rate: float) -> dict[int, float]:
    """Chooses the fewest threads that feed the step, or else the fastest number; returns images per second of the loader alone, by threads."""
    data = bench.found.config.data
    counts = [data.workers or bench.cores] if bench.keeps("data.workers") else candidates.worker_counts(bench.cores)
    comparison = _loaders_alone(bench, "loader alone, by threads", {str(count): replace(data, workers=count) for count in counts})
    fastest = int(bench.found.add(comparison, "data.workers"))
    rates = {count: comparison.rate(str(count)) for count in counts}
    needed = candidates.workers_to_feed(rates, step_rate=step_rate)
    bench.found.choose(data=replace(data, workers=needed if needed in rates else fastest))
    return rates


def _loaders_alone(bench: Bench, title: str, variants: Mapping[str, DataConfig]) -> Comparison:
    with ExitStack() as leaving:
        trials = []
        for number, (name, data) in enumerate(variants.items()):
            # A small batch, as the cost per image is the same; but the whole one where a GPU decodes it, which is faster with more at once.
            decodes_on_gpu = bench.on_gpu and data.backend == "dali" and data.dali_ops != "decode"
            batch = bench.micro_batch if decodes_on_gpu else min(bench.micro_batch, IMAGES_PER_WORKER * data.workers)
            config = bench.trial_config(batch, data=data)
            loader = leaving.enter_context(build_run_loader(config, bench.process, option="--data"))
            trials.append(Trial(name, loader_alone(loader, epoch=number)))
        return bench.compare(title, trials)


def loader_alone(loader: TwoViewLoader, *, epoch: int) -> Callable[[float], float]:
    """Returns a trial's `run`, which takes the loader's batches from this epoch on."""
    # Each trial starts in another epoch, so that none reads what another has just brought into the file cache.
    loader.set_epoch(epoch)

    def run(seconds: float) -> float:
        with closing(loader.endless()) as batches:
            next(batches)  # from here on the threads are always as far ahead
            images = taken = 0
            start = time.perf_counter()
            while taken < (MIN_BATCHES if seconds else 1) or time.perf_counter() - start < seconds:
                images += len(next(batches).index)
                taken += 1
            return images / (time.perf_counter() - start)

    return run
