"""Measures training on several ranks: does a rank's work take longer if there are others, and is that due to the machine or to the
messages?

How: processes joined by gloo as torchrun joins them, the product's `build` and `train_step` (DDP, cross-replica BN), views given, one
thread and the same images per rank: n ranks have n times the global batch. Reference: one rank, the others idle. `n, nobody speaks`:
n processes that train at the same time without exchanging messages, which shows what cores and memory allow. Ceiling: that row for
the largest n. Figures are per image of all ranks, CPU time is summed over ranks; `efficiency` is images/s per rank over the
reference's.

    python -m benchmarks.run scaling

Why: the gap between `n, nobody speaks` and n times the reference is due to the machine: shared memory bandwidth, and other users of
the cores. The gap between n ranks and that is due to us: averaging the gradients, and two messages for each BN layer and view, in a
small network with little work between them; on a CPU gloo copies through the loopback. This says nothing about NVLink or InfiniBand
(not measured yet).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.imagenet_like import write_imagenet_like
from benchmarks.own_process import start_process
from benchmarks.record import CaseResult, measured
from benchmarks.timing import Subject, count_cpu_seconds
from benchmarks.training_step import noise_batch
from fastbyol.config.presets import preset_config
from fastbyol.config.schema import DataConfig, ModelConfig, TrainConfig
from fastbyol.config.views import PAPER
from fastbyol.ranks.process_group import Process, join_process_group, leave_process_group
from fastbyol.tuning.stepper import Stepper

REFERENCE = "1 rank"
ANSWER_S = 300.0
"""Seconds after which a rank that does not answer has failed."""
NUM_CLASSES = 2


@dataclass(frozen=True)
class Size:
    steps: int
    """Steps per round."""
    rounds: int
    rank_batch: int
    """Images per rank and step."""
    size_px: int
    model: ModelConfig
    ranks: int = 0
    """0 means one per core, 8 at most."""
    seed: int = 0


QUICK = Size(steps=2, rounds=6, rank_batch=16, size_px=32, model=preset_config("cpu_demo").model, ranks=2)
FULL = Size(steps=4, rounds=9, rank_batch=16, size_px=64, model=ModelConfig(encoder="resnet18"))


def run(size: Size, *, scratch: Path) -> CaseResult:
    ranks = size.ranks or min(8, len(os.sched_getaffinity(0)))
    images = max(NUM_CLASSES, ranks * size.rank_batch)
    # `build` needs to see a data set, but nobody reads it.
    data = write_imagenet_like(scratch / "images", images=images, classes=NUM_CLASSES, scale=0.05, seed=size.seed)
    counts = [n for n in (2, 4, 8) if n < ranks] + ([ranks] if ranks > 1 else [])
    with ExitStack() as stack:
        groups = {n: stack.enter_context(RankGroup(n, size, data)) for n in counts or [1]}

        def work_of(group: RankGroup, how: str, ranks: int) -> Callable[[], None]:
            # The ranks go on living, so the system has not added their time to ours.
            return lambda: count_cpu_seconds(sum(group.run(how, ranks=ranks)))

        work = {REFERENCE: (1, work_of(groups[min(groups)], "alone", 1))}
        for n in counts:
            work[f"{n} ranks"] = n, work_of(groups[n], "joined", n)
            work[f"{n}, nobody speaks"] = n, work_of(groups[n], "alone", n)
        subjects = [Subject(name, run, units=n * size.steps * size.rank_batch) for name, (n, run) in work.items()]
        title = f"{size.model.encoder} at {size.size_px} px, {size.rank_batch} images a rank"
        ceiling = subjects[-1].name  # as many processes as there are ranks at most
        result = measured("scaling", title, subjects, reference=REFERENCE, ceiling=ceiling, threads=ranks, primary="wall", settings=size)
    shares = efficiency(result, {name: n for name, (n, _) in work.items()})
    return result.with_extra({name: {"efficiency": share} for name, share in shares.items()})


def efficiency(result: CaseResult, ranks: dict[str, int]) -> dict[str, float]:
    """Returns images/s per rank over the reference's, by row; 1 if other ranks cost nothing. ranks: number of working ranks, by row."""
    return {name: result.row(name).speedup["wall"].median / num for name, num in ranks.items()}


class RankGroup:
    """A group of n processes that wait for work."""

    def __init__(self, n: int, size: Size, data: Path) -> None:
        port = _free_port()
        ranks = [start_process(_serve, rank, n, port, size, str(data), daemon=True, method="forkserver") for rank in range(n)]
        self._processes, self._pipes = zip(*ranks, strict=True)
        for pipe in self._pipes:
            _answer(pipe)  # all have joined and built, so that no round waits for that

    def run(self, how: str, *, ranks: int) -> list[float]:
        """Runs a round on the first `ranks` processes, 'joined' (only with all of them) or 'alone'; returns the CPU seconds of each."""
        for pipe in self._pipes[:ranks]:
            pipe.send(how)
        return [_answer(pipe) for pipe in self._pipes[:ranks]]

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()  # tells the process to end
        for process in self._processes:
            process.join(timeout=30)
            process.kill()


def _answer(pipe: Connection) -> float:
    if not pipe.poll(ANSWER_S):
        raise RuntimeError(f"a rank of the scaling case did not answer for {ANSWER_S:.0f} s")
    return pipe.recv()


def _free_port() -> int:
    with socket.socket() as s:
        # Another process could take the port before the ranks do; rare enough for a benchmark.
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(pipe: Connection, rank: int, world_size: int, port: int, size: Size, data: str) -> None:
    """Runs a rank: joins as under torchrun, then works on request until the pipe is closed."""
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    joined = join_process_group()
    # 'Alone' is a rank of a world of one: the step then sends no message, though the process has joined the group.
    do = {"joined": _make_steps(size, data, joined), "alone": _make_steps(size, data, replace(joined, rank=0, world_size=1))}
    pipe.send(0.0)
    try:
        while True:
            how = pipe.recv()
            start = time.process_time()
            do[how]()
            pipe.send(time.process_time() - start)
    except EOFError:
        leave_process_group()


def _make_steps(size: Size, data: str, process: Process) -> Callable[[], None]:
    """Returns a function that runs the product's steps on one repeated batch of noise."""
    config = TrainConfig(
        global_batch=size.rank_batch * process.world_size,
        seed=size.seed,
        data=DataConfig(train=data, workers=1, prefetch=1),
        model=size.model,
        views=replace(PAPER, size_px=size.size_px),
    )
    stepper = Stepper(config, process)
    stepper.networks()  # built here, together on all ranks, and not in the first step
    batch = noise_batch(replace(config, global_batch=size.rank_batch), num_classes=NUM_CLASSES)  # a rank's share

    def steps() -> None:
        for _ in range(size.steps):
            stepper.step(iter([batch]))

    return steps
