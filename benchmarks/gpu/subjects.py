"""Device work as subjects of `timing.measure`, the largest batch whose step fits in the device's memory, and the result of a part."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import Place
from benchmarks.own_process import PEAK
from benchmarks.record import CaseResult, make_result, measured
from benchmarks.timing import Subject, measure
from fastbyol.augment.parameters import draw_parameters
from fastbyol.config.errors import UserError, is_out_of_memory
from fastbyol.config.views import ViewPair
from fastbyol.data.batch import ViewBatch
from fastbyol.tuning.stepper import release_memory, synchronize

ENOUGH_S = 0.05
"""Minimum duration of a sample in seconds."""
MOST_CALLS = 200
PROBES = (16, 48)
"""Batches whose memory shows how much an image needs."""
SHARE = 0.85
"""Share of the free memory that a step may take: allocation leaves gaps, and a part holds several networks at once."""
MULTIPLE = 32
LARGEST = 2048


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
    """Returns a subject that repeats the work, then waits once for the device; nothing in the work itself should wait.

    The work already runs twice here: to compile, and to see how often it fits into `enough_s` seconds (0: a single call).
    """
    calls = calls_for(_seconds(work, device), enough_s=enough_s)

    def repeated() -> None:
        for _ in range(calls):
            work()
        # Once a sample, not once a call: the launches of a training step overlap with the work before them too.
        synchronize(device)

    # In one call: `Subject.calls` would wait for the device after each.
    return Subject(name, repeated, units=units * calls, note=note, role=role)


def device_subjects(work: Mapping[str, Callable[[], object]], **given: Any) -> list[Subject]:
    """Returns `device_subject` of each piece of work, in order."""
    return [device_subject(name, do, **given) for name, do in work.items()]


def calls_for(seconds: float, *, enough_s: float) -> int:
    """Returns how often work of this duration is called in one sample."""
    return min(MOST_CALLS, max(1, math.ceil(enough_s / max(seconds, 1e-6))))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    work()  # compiles
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


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


def largest_batch(step: Callable[[int], object], device: torch.device) -> int:
    """Returns the largest multiple of 32 whose step runs on the CUDA device: predicted from two small batches, then tried, with a smaller
    one after each failure. `step` runs a batch of the given size and keeps nothing.
    """
    free, _ = torch.cuda.mem_get_info(device)
    batch = fitting_batch({n: _peak_bytes(step, n, device) for n in PROBES}, limit=SHARE * (free + torch.cuda.memory_reserved(device)))
    while batch >= MULTIPLE:
        try:
            _peak_bytes(step, batch, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            batch = int(0.9 * batch) // MULTIPLE * MULTIPLE
        else:
            return batch
    raise UserError(f"{MULTIPLE} images do not fit in the memory of {device}")


def fitting_batch(peaks: dict[int, int], *, limit: float) -> int:
    """Returns the largest multiple of 32, at most 2048, that a straight line through two peaks (bytes, by batch) puts under the limit."""
    (small, low), (large, high) = sorted(peaks.items())
    per_image = (high - low) / (large - small)
    fixed = low - small * per_image
    return min(LARGEST, int((limit - fixed) / per_image) // MULTIPLE * MULTIPLE)


def _peak_bytes(step: Callable[[int], object], batch: int, device: torch.device) -> int:
    release_memory()
    step(batch)
    torch.cuda.synchronize(device)
    # Reserved, not allocated: what the allocator's gaps take is not there for a larger batch either.
    return torch.cuda.max_memory_reserved(device)


def crops_batch(views: ViewPair, num: int, *, num_classes: int = 1, seed: int = 0) -> ViewBatch:
    """Returns a batch as the loader gives it for a GPU: uint8 crops (of noise) in channels-last memory, and parameters drawn for them."""
    side = np.full(num, 2 * views.size_px)
    drawn = draw_parameters(views, seed=seed, epoch=0, index=np.arange(num), height=side, width=side)
    generator = torch.Generator().manual_seed(seed)
    crops = torch.randint(0, 256, (2, num, views.size_px, views.size_px, 3), dtype=torch.uint8, generator=generator).permute(0, 1, 4, 2, 3)
    index = torch.arange(num)
    return ViewBatch(crops[0], crops[1], index % num_classes, index, torch.from_numpy(drawn))


@dataclass(frozen=True)
class Variant:
    """Work on the device that is made when its turn comes, and gone after it."""

    make: Callable[[], AbstractContextManager[Callable[[], object]]]
    images: int
    """Images of one call."""


def one_after_another(
    part: str, title: str, variants: Mapping[str, Variant], ceiling: Subject, *, settings: Any, place: Place
) -> Iterator[CaseResult]:
    """Times each variant alone in the device's memory, and yields the result so far after each. The first one is the reference.

    settings: has `rounds` and `enough_s`. Raises UserError if the reference does not run here.
    """
    # Not in rounds by turns, as elsewhere: two networks of this size do not fit at once, and a card with nobody else on it is steady.
    subjects, timings = [ceiling], measure([ceiling], rounds=settings.rounds)
    reference, skipped, peaks = next(iter(variants)), {}, {}
    result, told = None, 0
    for name, variant in variants.items():
        release_memory()
        torch.compiler.reset()  # the same code for other networks would count as compiled again, and torch gives up after eight times
        try:
            with variant.make() as work:
                subject = device_subject(name, work, device=place.device, units=variant.images, enough_s=settings.enough_s)
                timings |= measure([subject], rounds=settings.rounds)
                if place.device.type == "cuda":
                    peaks[name] = {PEAK: torch.cuda.max_memory_allocated(place.device) / 2**20}
        except (UserError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            skipped[name] = str(error) if isinstance(error, UserError) else f"out of memory at batch {variant.images}"
            if name == reference:
                raise UserError(f"{name}: {skipped[name]}") from None
            continue
        # Only its name and numbers are kept: its work holds the networks.
        subjects.append(Subject(name, lambda: None, units=subject.units, note=f"batch {variant.images}"))
        del subject, work
        told = len(skipped)
        given = {"settings": settings, "skipped": dict(skipped), "threads": torch.get_num_threads(), "device": place.device.type}
        result = make_result(f"gpu.{part}", title, subjects, timings, reference=reference, ceiling=ceiling.name, primary="wall", **given)
        result = result.with_extra(peaks)
        yield result
    if result is not None and len(skipped) > told:
        yield replace(result, skipped=skipped)


def measured_part(
    part: str, title: str, subjects: Sequence[Subject], *, place: Place, threads: int | None = None, **given: Any
) -> CaseResult:
    """Returns `measured` of a part of the plan, by the wall clock. threads: None means those of torch."""
    # The CPU clock sees only the launches of kernels.
    device, threads = place.device.type, threads or torch.get_num_threads()
    return measured(f"gpu.{part}", title, subjects, threads=threads, primary="wall", device=device, **given)
