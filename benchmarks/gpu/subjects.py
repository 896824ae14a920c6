"""Work on a device as a subject of `timing.measure`: called often enough that waiting for the device at the end costs nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from benchmarks.timing import Subject
from fastbyol.config.errors import UserError

ENOUGH_S = 0.05
"""A sample lasts this long at least."""
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
    """The work, repeated, then one wait for the device. It runs two times here already: compilation, first touch, then to see how long it takes.

    Args:
        name: as in the table.
        work: launches only; nothing in it needs to wait.
        device: where it runs.
        units: that one call does.
        enough_s: how long a sample lasts at least; 0 for one call.
        note: as in the table.
        role: of the subject.
    """
    calls = calls_for(_seconds(work, device), enough_s=enough_s)

    def repeated() -> None:
        for _ in range(calls):
            work()
        synchronize(device)

    return Subject(name, repeated, units=units * calls, note=note, role=role)


def calls_for(seconds: float, *, enough_s: float) -> int:
    """How often work of so many seconds is called in one sample."""
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
    """Why the work does not run here, in one line; empty where it does. One back end that breaks shall not cost what the others show."""
    try:
        work()
    except UserError as error:
        return str(error)
    except Exception as error:  # a compiler's, a driver's: each has classes of its own
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def captures(work: dict[str, Callable[[], object]], device: torch.device, skipped: dict[str, str]) -> dict[str, Callable[[], object]]:
    """Each piece of work as a CUDA graph; what cannot be captured is named in `skipped`."""
    graphs: dict[str, Callable[[], object]] = {}
    for name, do in work.items():
        if why := why_it_fails(lambda name=name, do=do: graphs.update({name: captured(do, device)})):
            skipped[name] = why
    return graphs


def captured(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The work as a CUDA graph to be replayed; on the CPU the work itself."""
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # buffers and tables are made outside the graph
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
