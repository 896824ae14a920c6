"""Wraps device work as a subject of `timing.measure`, called so often that the final wait for the device is negligible."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from benchmarks.timing import Subject
from fastbyol.config.errors import UserError

ENOUGH_S = 0.05
"""Minimum duration of a sample in seconds."""
MOST_CALLS = 200


def device_subject(
    name: str,
    work: Callable[[], object],
    *,
    device: torch.device,
    units: float = 1.0,
    enough_s: float = ENOUGH_S,
    note: str = "",
    role: str = "",
) -> Subject:
    """Returns a subject that repeats the work, then waits once for the device. The work already runs twice here: to compile, and to see
    how long it takes.

    Args:
        name: name in the table.
        work: launches kernels only; nothing in it should wait.
        device: where it runs.
        units: units per call.
        enough_s: minimum duration of a sample; 0 for a single call.
        note: note in the table.
        role: role of the subject.
    """
    calls = calls_for(_seconds(work, device), enough_s=enough_s)

    def repeated() -> None:
        for _ in range(calls):
            work()
        synchronize(device)

    return Subject(name, repeated, units=units * calls, note=note, role=role)


def calls_for(seconds: float, *, enough_s: float) -> int:
    """Returns how often work of this duration is called in one sample."""
    return min(MOST_CALLS, max(1, math.ceil(enough_s / max(seconds, 1e-6))))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    work()
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits for all work queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def why_it_fails(work: Callable[[], object]) -> str:
    """Returns why the work does not run here, in one line, or '' if it does. One failing back end must not stop the others."""
    try:
        work()
    except UserError as error:
        return str(error)
    except Exception as error:  # compilers and drivers have exception classes of their own
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def captures(work: dict[str, Callable[[], object]], device: torch.device, skipped: dict[str, str]) -> dict[str, Callable[[], object]]:
    """Returns each piece of work as a CUDA graph; those that cannot be captured go into `skipped`."""
    graphs: dict[str, Callable[[], object]] = {}
    for name, do in work.items():
        if why := why_it_fails(lambda name=name, do=do: graphs.update({name: captured(do, device)})):
            skipped[name] = why
    return graphs


def captured(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Returns the work as a CUDA graph to replay; on the CPU the work itself."""
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # warm up: buffers and tables must be created outside the graph
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
