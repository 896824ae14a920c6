"""Profiles a few training steps: a trace (torch.profiler) and a short table of it, in the run folder."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from fastbyol.config.console import in_utf8
from fastbyol.config.errors import UserError

log = logging.getLogger("fastbyol")
FOLDER, TRACE, TABLE = "profile", "trace.json.gz", "table.txt"
WAIT_STEPS, WARMUP_STEPS = 3, 2
"""Steps that are not recorded: first those that compile and touch memory for the first time, then those in which the profiler starts up."""
TOP = 12
SYNCS = frozenset({"aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"})
"""Operations in which the host waits for the device; on a CPU the first of them only reads a number."""


@dataclass(frozen=True)
class Span:
    """One kind of event in a trace; its self time, over all `count` events, is on the working device (the GPU if there is one)."""

    name: str
    self_us: float
    count: int


class StepProfiler:
    """Records `steps` steps of a run (0: none), from the sixth on; only those are slowed down.

    The run folder gets profile/trace.json.gz, for Perfetto or chrome://tracing, and profile/table.txt. The trace names the `parts` of the
    networks, and on a GPU NVTX ranges do so for Nsight.
    """

    def __init__(self, folder: Path, *, steps: int, parts: dict[str, nn.Module], device: torch.device) -> None:
        self._folder, self._steps, self._on_gpu = folder / FOLDER, steps, device.type == "cuda"
        self._parts = parts
        self._profile: profile | None = None
        self._taken, self._written = 0, False
        self._leaving = ExitStack()

    def __enter__(self) -> Self:
        if not self._steps:
            return self
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        plan = schedule(wait=WAIT_STEPS, warmup=WARMUP_STEPS, active=self._steps, repeat=1)
        for name, module in self._parts.items():
            for handle in _named_in_trace(module, name, nvtx=self._on_gpu):
                self._leaving.callback(handle.remove)
        self._profile = self._leaving.enter_context(profile(activities=activities, schedule=plan, on_trace_ready=self._write))
        return self

    def step(self) -> None:
        """Reports that one optimizer step is done."""
        if self._profile is not None:
            self._taken += 1
            self._profile.step()

    def __exit__(self, *_: object) -> None:
        self._leaving.close()
        if self._steps and not self._written:
            log.warning(
                "profile_steps = %d: nothing is recorded, because this process took %d steps and the first %d are left out",
                self._steps,
                self._taken,
                WAIT_STEPS + WARMUP_STEPS,
            )

    def _write(self, taken: profile) -> None:
        # A run that ends earlier has recorded fewer.
        steps = min(self._steps, self._taken - WAIT_STEPS - WARMUP_STEPS)
        if steps < 1:
            return
        self._written = True
        spans = spans_of(taken.key_averages(), on_gpu=self._on_gpu)
        table = profile_table(spans, steps=steps, span_us=_recorded_us(taken), device="GPU" if self._on_gpu else "CPU")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            taken.export_chrome_trace(f"{in_utf8(self._folder)}/{TRACE}")
            (self._folder / TABLE).write_text(table + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self._folder}: the profile cannot be written ({error.strerror})") from error
        log.info("profile of %d steps in %s", steps, self._folder)
        for line in table.split("\n"):
            log.info("%s", line)


def spans_of(events: Iterable[Any], *, on_gpu: bool) -> list[Span]:
    """Returns torch.profiler's averaged events with the time that each works on the device itself."""
    if not on_gpu:
        return [Span(event.key, event.self_cpu_time_total, event.count) for event in events]
    # A kernel's time is reported twice, by the kernel's own event and by the operation on the host that launched it; and an annotation
    # (record_function) has a span on the device too, which contains those of its kernels.
    return [
        Span(event.key, 0.0 if event.device_type == DeviceType.CPU else event.self_device_time_total, event.count)
        for event in events
        if not event.is_user_annotation
    ]


def profile_table(spans: Iterable[Span], *, steps: int, span_us: float, device: str) -> str:
    """Formats per step the slowest operations, the share of time that the device works, and how often the host waits for it."""
    spans = sorted(spans, key=lambda span: -span.self_us)
    # torch.profiler's own span of each step contains all others.
    working = [span for span in spans if not span.name.startswith("ProfilerStep")]
    busy_us = sum(span.self_us for span in working)
    lines = [f"{'operation':<44}{'ms a step':>10}{'share':>8}{'calls a step':>14}"]
    for span in working[:TOP]:
        share = span.self_us / busy_us if busy_us else 0.0
        lines.append(f"{span.name[:42]:<44}{span.self_us / steps / 1e3:>10.3f}{share:>8.1%}{span.count / steps:>14.1f}")
    syncs = sum(span.count for span in working if span.name in SYNCS)
    lines.append(
        f"{span_us / steps / 1e3:.3f} ms a step under the profiler; {device} is busy {min(busy_us / span_us, 1.0):.0%} of the time"
    )
    lines.append(f"host waits for the device: {syncs / steps:.1f} times a step")
    return "\n".join(lines)


def _recorded_us(taken: profile) -> float:
    """Returns microseconds from the start of the first recorded event to the end of the last."""
    events = taken.events() or []
    return max(e.time_range.end for e in events) - min(e.time_range.start for e in events)


def _named_in_trace(module: nn.Module, name: str, *, nvtx: bool) -> list[Any]:
    """Registers hooks that record each forward pass of the module under its name; calls may be nested."""
    opened: list[record_function] = []

    def begin(*_: object) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()
        if nvtx:
            torch.cuda.nvtx.range_push(name)

    def end(*_: object) -> None:
        if nvtx:
            torch.cuda.nvtx.range_pop()
        opened.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]
