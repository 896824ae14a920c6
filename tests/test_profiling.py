"""Profiles: which steps are recorded, what the table contains, and that training is not affected."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import torch
from torch import nn

from fastbyol.run.profiling import FOLDER, TABLE, TRACE, WAIT_STEPS, WARMUP_STEPS, Span, StepProfiler, profile_table

CPU = torch.device("cpu")


def test_the_table_adds_up_shares_per_step_and_counts_waits():
    spans = [Span("conv", 3000.0, 4), Span("add", 1000.0, 20), Span("aten::_local_scalar_dense", 0.0, 6), Span("ProfilerStep*", 900.0, 2)]
    lines = profile_table(spans, steps=2, span_us=8000.0, device="GPU").splitlines()
    assert lines[1].split() == ["conv", "1.500", "75.0%", "2.0"]
    assert lines[2].split() == ["add", "0.500", "25.0%", "10.0"]
    assert not any("ProfilerStep" in line for line in lines)
    assert lines[-2] == "4.000 ms a step under the profiler; GPU is busy 50% of the time"
    assert lines[-1] == "host waits for the device: 3.0 times a step"


def test_the_asked_steps_are_recorded_after_the_first_five_and_parts_are_named(tmp_path: Path):
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    calls = []
    with StepProfiler(tmp_path, steps=2, parts={"first part": network[0]}, device=CPU) as profiler:
        for step in range(WAIT_STEPS + WARMUP_STEPS + 4):
            network(torch.full((1, 4), float(step))).sum().item()
            profiler.step()
            calls.append((tmp_path / FOLDER / TRACE).exists())
    assert calls == [False] * 6 + [True] * 3
    with gzip.open(tmp_path / FOLDER / TRACE, "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("first part") == 2
    assert "host waits for the device: 1.0 times a step" in (tmp_path / FOLDER / TABLE).read_text()
    assert not network[0]._forward_pre_hooks  # nothing stays behind
    assert not network[0]._forward_hooks


def test_a_run_that_ends_earlier_is_divided_by_the_steps_recorded_and_one_that_recorded_none_says_so(tmp_path: Path, caplog):
    def profile(folder: Path, taken: int) -> None:
        with StepProfiler(folder, steps=5, parts={}, device=CPU) as profiler:
            for step in range(taken):
                torch.full((1, 4), float(step)).sum().item()
                profiler.step()

    with caplog.at_level(logging.INFO, "fastbyol"):
        profile(tmp_path, WAIT_STEPS + WARMUP_STEPS + 3)
    assert "profile of 3 steps" in caplog.text
    assert "host waits for the device: 1.0 times a step" in (tmp_path / FOLDER / TABLE).read_text()
    profile(tmp_path / "short", WAIT_STEPS + WARMUP_STEPS)
    assert "profile_steps = 5: nothing is recorded, because this process took 5 steps and the first 5 are left out" in caplog.text
    assert not (tmp_path / "short").exists()


def test_without_steps_to_profile_no_trace_is_written(tmp_path: Path):
    with StepProfiler(tmp_path, steps=0, parts={}, device=CPU) as profiler:
        profiler.step()
    assert not (tmp_path / FOLDER).exists()
