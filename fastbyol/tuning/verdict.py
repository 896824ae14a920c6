"""Says what limits a run, and what to change next."""

from __future__ import annotations

from dataclasses import dataclass

WAIT_SHARE = 0.05
"""A step that spends a larger share of its time waiting is held up by the data."""
SMALL_SPREAD = 0.9
"""Whole steps that reach this share of the speed of the step alone lose nothing to the data."""


@dataclass(frozen=True)
class Speeds:
    """Images per second of one process: the loader alone, the step alone, both together, and the share of the time that the step waits.

    workers: threads with which the loader was measured. workers_needed: threads that would feed the step. cores: cores of this process.
    torch_threads: threads that the step computes with, on a CPU.
    """

    loader: float
    step: float
    whole: float
    wait_share: float
    workers: int
    workers_needed: int
    cores: int
    torch_threads: int
    on_gpu: bool

    @property
    def data_bound(self) -> bool:
        return self.wait_share > WAIT_SHARE and self.whole < SMALL_SPREAD * self.step


def verdict(speeds: Speeds) -> str:
    """Returns 'data-bound' or 'compute-bound' with the reason, and the next thing to change."""
    if not speeds.data_bound:
        return f"compute-bound: the step waits {speeds.wait_share:.0%} of the time for data. {_faster_step(speeds)}"
    waits = f"data-bound: the step waits {speeds.wait_share:.0%} of the time"
    if speeds.loader >= speeds.step:
        return (
            f"{waits}, though the loader alone is faster than the step: other work takes their cores. Next: more cores, or fewer processes"
        )
    return f"{waits}. {_cheaper_data(speeds)}"


def _faster_step(speeds: Speeds) -> str:
    if not speeds.on_gpu and speeds.torch_threads < speeds.cores:
        return f"Next: OMP_NUM_THREADS={speeds.cores}, for torch computes with {speeds.torch_threads} of {speeds.cores} cores"
    if not speeds.on_gpu:
        return "Next: a GPU, or a smaller encoder or views.size_px; more loader threads do not help"
    return "Next: precision.compile if it is off, then more GPUs; more loader threads do not help"


def _cheaper_data(speeds: Speeds) -> str:
    if speeds.workers < min(speeds.workers_needed, speeds.cores):
        return f"Next: data.workers {min(speeds.workers_needed, speeds.cores)}"
    smaller = "images stored smaller (data_prep/to_ffcv.py --max-side)"
    if speeds.on_gpu:
        return f"Next: {smaller}; tar shards, whose JPEGs DALI decodes on the GPU (data.dali_ops crop); a machine with more cores per GPU"
    return f"Next: {smaller}; more cores"
