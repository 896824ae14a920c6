"""Times the loader alone, opened as a run opens it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

from fastbyol.config.schema import DataConfig, TrainConfig, accumulation_of
from fastbyol.data import build_loader
from fastbyol.data.loader import TwoViewLoader
from fastbyol.ranks.process_group import Process

IMAGES_PER_WORKER = 32
"""Images per thread in a batch of a trial: a thread takes 16 images at a time, and a batch should not take long."""
MIN_BATCHES = 3


def open_loader(config: TrainConfig, process: Process) -> TwoViewLoader:
    """Returns the loader that `fastbyol.train.build` makes for this process."""
    return build_loader(
        config.data,
        views=config.views,
        seed=config.seed,
        global_batch=config.global_batch,
        accumulate=accumulation_of(config, world_size=process.world_size),
        device=process.device,
        output="uint8" if process.device.type == "cuda" else "float32",
        option="--data",
        traversal=config.data.traversal,
        window_mib=config.data.window_mib,
    )


def trial_batch(whole: int, data: DataConfig, process: Process) -> int:
    """Returns the batch size for timing the loader alone: small, as the cost per image is the same, but `whole` where a GPU decodes the batch."""
    on_gpu = process.device.type == "cuda" and data.backend == "dali" and data.dali_ops != "decode"
    return whole if on_gpu else min(whole, IMAGES_PER_WORKER * data.workers)


def loader_alone(loader: TwoViewLoader, *, epoch: int) -> Callable[[float], float]:
    """Returns a trial's `run`. Each trial starts in another epoch, so that none reads what another has just brought into the file cache."""
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
