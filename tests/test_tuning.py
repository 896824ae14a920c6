"""`fastbyol tune`: what it chooses from given measurements, what it writes, tiny real runs, and mistakes before any work."""

from __future__ import annotations

import os
import re
import signal
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastbyol.__main__ import main
from fastbyol.byol import BYOL
from fastbyol.config.errors import UserError
from fastbyol.config.schema import UPDATES, DataConfig, PrecisionConfig, TrainConfig
from fastbyol.data.batch import ViewBatch
from fastbyol.ranks.process_group import Process
from fastbyol.run.checkpoint import checkpoint_steps
from fastbyol.run.command_line import parse_train_config
from fastbyol.train import main as train
from fastbyol.tuning import candidates
from fastbyol.tuning.bench import Bench, Findings, Request, cores_per_rank
from fastbyol.tuning.comparison import MIN_ROUNDS, ROUNDS, WARMUPS, Comparison, Trial, TrialFailed, compare
from fastbyol.tuning.loader_tuning import readings
from fastbyol.tuning.procedure import check_images
from fastbyol.tuning.report import Speeds, config_yaml, verdict
from fastbyol.tuning.step_tuning import (
    fitting_batches,
    num_ways_to_compile,
    switches,
    tune_compile,
    tune_rank_batch,
    tune_switches,
    tune_update,
    update_ways,
)
from fastbyol.tuning.stepper import Stepper, fits_memory, repeated, those_that_fit

CPU = torch.device("cpu")
SMALL = ("--preset", "cpu_demo", "--global_batch", "8", "--model.hidden_dim", "16", "--model.projection_dim", "8")
QUICK = ("--seconds", "0.05")
SPEEDS = Speeds(loader=500, step=1000, whole=480, wait_share=0.5, workers=2, workers_needed=5, cores=8, torch_threads=8, on_gpu=True)


# Which candidate.


def test_the_config_as_it_is_stays_unless_another_wins_every_round_by_more_than_the_margin() -> None:
    assert Comparison("x", {"own": (100.0, 100.0, 100.0), "other": (102.0, 101.0, 102.9)}).best == "own"
    assert Comparison("x", {"own": (100.0, 100.0, 100.0), "other": (120.0, 99.0, 120.0)}).best == "own"
    assert Comparison("x", {"own": (100.0, 100.0, 100.0), "other": (120.0, 104.0, 120.0)}).best == "other"


def test_a_slow_neighbour_that_hits_whole_rounds_changes_nothing() -> None:
    assert Comparison("x", {"own": (100.0, 10.0, 50.0), "other": (130.0, 13.0, 65.0)}).best == "other"


def test_of_equal_candidates_the_first_one_is_taken_and_not_the_fastest() -> None:
    threads = Comparison("x", {"1": (50.0, 50.0, 50.0), "2": (99.0, 98.0, 99.0), "4": (100.0, 100.0, 100.0)})
    assert threads.best == "2"


def test_a_reference_is_never_chosen() -> None:
    assert Comparison("x", {"step alone": (300.0, 300.0), "1": (100.0, 100.0), "2": (200.0, 200.0)}, reference="step alone").best == "2"


def test_candidates_take_turns_after_warming_up_and_slow_ones_get_the_fewest_rounds() -> None:
    calls: list[tuple[str, float]] = []

    def trial(name: str) -> Trial:
        return Trial(name, lambda seconds: calls.append((name, seconds)) or 7.0)

    comparison = compare("x", [trial("a"), trial("b")], seconds=2.0, clock=lambda: 0.0)
    assert calls[: 2 * WARMUPS] == [("a", 0.0), ("b", 0.0)] * WARMUPS
    assert calls[2 * WARMUPS :] == [("a", 2.0 / (2 * ROUNDS)), ("b", 2.0 / (2 * ROUNDS))] * ROUNDS
    assert comparison.rates == {"a": (7.0,) * ROUNDS, "b": (7.0,) * ROUNDS}
    late = iter(range(0, 1000, 100))
    assert len(compare("x", [trial("a")], seconds=2.0, clock=lambda: next(late)).rates["a"]) == MIN_ROUNDS


def test_a_candidate_that_fails_is_named_with_its_reason_and_only_all_of_them_are_an_error() -> None:
    def fail(_: float) -> float:
        raise TrialFailed("out of memory")

    comparison = compare("x", [Trial("large", fail), Trial("small", lambda _: 5.0)], seconds=0.0)
    assert (comparison.best, comparison.failed) == ("small", {"large": "out of memory"})
    with pytest.raises(UserError, match="x: nothing works here: large: out of memory"):
        compare("x", [Trial("large", fail)], seconds=0.0)


def test_a_candidate_that_fails_in_a_later_round_is_left_out_and_the_others_go_on() -> None:
    calls = iter(range(100))

    def run_out(_: float) -> float:
        if next(calls) > WARMUPS:
            raise TrialFailed("out of memory")
        return 9.0

    comparison = compare("x", [Trial("large", run_out), Trial("small", lambda _: 5.0)], seconds=0.0)
    assert comparison.rates == {"small": (5.0,) * len(comparison.rates["small"])}
    assert comparison.failed == {"large": "out of memory"}
    calls = iter(range(100))
    with pytest.raises(UserError, match="x: nothing works here: large: out of memory"):
        compare("x", [Trial("large", run_out)], seconds=0.0)


# Which candidates.


def test_loader_threads_go_up_in_powers_of_two_to_the_cores() -> None:
    assert [candidates.worker_counts(cores) for cores in (1, 2, 6, 16)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16]]


def test_rank_batches_are_powers_of_two_that_divide_the_share_of_a_rank_and_the_share_itself() -> None:
    assert candidates.rank_batches(4096 // 8, most=10_000) == [16, 32, 64, 128, 256, 512]
    assert candidates.rank_batches(96, most=10_000) == [16, 32, 96]
    assert candidates.rank_batches(8, most=10_000) == [8]


def test_the_preset_s_own_precision_comes_first_and_fp16_needs_a_gpu() -> None:
    own = PrecisionConfig(autocast="off", channels_last=False)
    on_cpu = candidates.precisions(own, device="cpu", kept=frozenset())
    assert list(on_cpu) == ["off channels_first", "off channels_last", "bf16 channels_first", "bf16 channels_last"]
    assert on_cpu["bf16 channels_last"] == replace(own, autocast="bf16", channels_last=True)
    assert list(candidates.precisions(own, device="cpu", kept=frozenset(), bf16=False)) == list(on_cpu)[:2]  # bf16 would be float32 again
    assert "fp16 channels_last" in candidates.precisions(own, device="cuda", kept=frozenset())
    assert list(candidates.precisions(own, device="cuda", kept=frozenset({"precision.autocast"}))) == list(on_cpu)[:2]
    assert list(candidates.precisions(own, device="cuda", kept=frozenset({"precision.autocast", "precision.channels_last"}))) == [
        "off channels_first"
    ]


def test_compilation_is_left_out_of_a_quick_look_with_the_reason() -> None:
    assert "--seconds 30" in str(candidates.reason_not_to_compile(CPU, seconds=5.0))


def test_doubling_ends_at_the_whole_batch() -> None:
    assert candidates.doubled_batches(8, most=64) == [8, 16, 32, 64]
    assert candidates.doubled_batches(8, most=50) == [8, 16, 32, 50]
    assert candidates.doubled_batches(3, most=3) == [3]


def test_threads_to_feed_a_step_are_the_fewest_measured_that_do_or_else_extrapolated() -> None:
    rates = {1: 100.0, 2: 200.0, 4: 360.0}
    assert candidates.workers_to_feed(rates, step_rate=150.0) == 2  # 187.5 are wanted
    assert candidates.workers_to_feed(rates, step_rate=170.0) == 4  # 212.5
    assert candidates.workers_to_feed(rates, step_rate=720.0) == 10  # 900 at 90 a thread


def test_dali_decodes_by_both_of_its_ways_on_a_gpu_only(data_paths: dict[str, Path]) -> None:
    paths = [str(path) for path in data_paths.values()]

    def names(device: str, *kept: str) -> list[str]:
        return [way.name.split()[-1].strip("()") for way in readings(paths, DataConfig(), device=device, kept=frozenset(kept))]

    assert names("cpu") == ["folder", "ffcv", "dali"]
    assert names("cuda") == ["folder", "ffcv", "crop", "decode"]
    assert names("cuda", "data.dali_ops") == ["folder", "ffcv", "dali"]


def test_the_ranks_of_one_machine_share_its_cores() -> None:
    cores = cores_per_rank(1, device=CPU)
    assert cores_per_rank(2, device=CPU) == max(1, cores // 2)
    assert cores_per_rank(10_000, device=CPU) == 1


# Compilation.


def test_ways_to_compile_are_the_own_mode_and_those_of_the_device_that_the_time_allows() -> None:
    own = PrecisionConfig()

    def modes(device: str, seconds: float, *kept: str, own: PrecisionConfig = own, accumulate: int = 1) -> list[str]:
        found = candidates.compiled(own, device=device, seconds=seconds, kept=frozenset(kept), accumulate=accumulate)
        assert list(found) == [f"compiled, {variant.compile_mode}" for variant in found.values()]
        assert all(variant.compile == "yes" for variant in found.values())
        return [variant.compile_mode for variant in found.values()]

    assert modes("cpu", 30) == ["default"]
    assert modes("cpu", 120) == ["default", "max-autotune"]
    assert modes("cuda", 30) == ["default", "reduce-overhead"]
    assert modes("cuda", 120) == ["default", "reduce-overhead", "max-autotune"]
    assert modes("cuda", 120, accumulate=8) == ["default", "max-autotune"], "train refuses CUDA graphs with micro-batches"
    graphs = PrecisionConfig(compile="yes", compile_mode="reduce-overhead", compile_cache="c")
    assert modes("cuda", 30, own=graphs) == ["reduce-overhead", "default"]
    assert modes("cuda", 300, "precision.compile_mode", own=graphs) == ["reduce-overhead"]
    assert candidates.eager(graphs) == PrecisionConfig(compile="no")
    assert (candidates.step_name(own), candidates.step_name(graphs)) == ("eager", "compiled, reduce-overhead")


class FakeStepper:
    """Steps at the speed given for its precision; `failing` names what runs out of memory, in warming up or, with 'late', in the rounds."""

    def __init__(self, config: TrainConfig, process: Process, *, speeds: dict[str, float], failing: dict[str, str]) -> None:
        self.config, self.speeds, self.failing = config, speeds, failing

    def alone(self, sample: ViewBatch) -> Callable[[float], float]:
        name, calls = candidates.step_name(self.config.precision), iter(range(100))

        def run(seconds: float) -> float:
            when = self.failing.get(name)
            if when == "at once" or (when == "late" and next(calls) >= WARMUPS):
                raise TrialFailed("out of memory")
            return self.speeds[name]

        return run


@pytest.mark.parametrize(
    ("own", "kept", "speeds", "failing", "chosen"),
    [
        ({}, (), {"eager": 100, "compiled, default": 150, "compiled, max-autotune": 151}, {}, ("yes", "default")),
        ({}, (), {"eager": 100, "compiled, default": 150, "compiled, max-autotune": 170}, {}, ("yes", "max-autotune")),
        ({}, (), {"eager": 100, "compiled, default": 90, "compiled, max-autotune": 170}, {}, ("yes", "max-autotune")),
        ({}, (), {"eager": 100, "compiled, default": 90, "compiled, max-autotune": 95}, {}, ("no", "default")),
        ({"compile": "no"}, ("precision.compile",), {"eager": 100, "compiled, default": 900}, {}, ("no", "default")),
        (
            {"compile": "yes"},
            ("precision.compile",),
            {"compiled, default": 100, "compiled, max-autotune": 120},
            {},
            ("yes", "max-autotune"),
        ),
        (
            {"compile": "yes", "compile_mode": "max-autotune"},
            (),
            {"eager": 100, "compiled, default": 102, "compiled, max-autotune": 120},
            {},
            ("yes", "max-autotune"),
        ),
        (
            {},
            (),
            {"eager": 100, "compiled, default": 150, "compiled, max-autotune": 170},
            {"compiled, default": "at once"},
            ("yes", "max-autotune"),
        ),
        ({}, (), {"eager": 100, "compiled, default": 150, "compiled, max-autotune": 95}, {"compiled, default": "late"}, ("no", "default")),
        ({}, (), {"eager": 100, "compiled, default": 150, "compiled, max-autotune": 95}, {"eager": "late"}, ("no", "default")),
    ],
)
def test_the_way_to_compile_is_chosen_by_measurement_and_the_config_holds_it(
    own: dict, kept: tuple[str, ...], speeds: dict, failing: dict, chosen: tuple[str, str], bench: Bench
) -> None:
    """The last one: what leaves eager no memory in the rounds has not been compared with it."""
    precision = PrecisionConfig(autocast="off", **own)
    request = replace(bench.request, seconds=candidates.AUTOTUNE_NEEDS_S, kept=frozenset(kept))
    found = replace(bench.found, config=replace(bench.found.config, precision=precision))
    make: Any = partial(FakeStepper, speeds=speeds, failing=failing)
    tried = replace(bench, request=request, found=found, make_stepper=make)
    expected = num_ways_to_compile(tried)
    if "precision.compile" not in kept:
        tried.found.choose(precision=candidates.eager(precision))
    rate = float(speeds.get("eager", 0))
    stepper, rate = tune_compile(tried, tried.stepper(8), rate=rate, own=precision, why_not=lambda device, seconds: None)
    found = tried.found.config.precision
    assert (found.compile, found.compile_mode) == chosen
    assert stepper.config.precision == found
    assert len(tried.found.comparisons) == expected
    if expected and not failing:
        assert rate == speeds[candidates.step_name(found)]
        assert all(name in tried.found.notes["precision.compile_mode"] for name in speeds)


@pytest.mark.compile
def test_compiled_networks_are_really_measured_and_the_written_config_trains(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(candidates, "COMPILE_NEEDS_S", 0.0)
    monkeypatch.chdir(tmp_path)
    kept = ("--precision.autocast", "off", "--precision.channels_last", "true", "--data.workers", "1", "--epochs", "1")
    main(["tune", "--data", str(beton), *SMALL, *QUICK, *kept])
    assert re.search(r"compiled, default +[\d,]+ ", capsys.readouterr().out)
    text = Path("tuned.yaml").read_text()
    assert re.search(r"^  compile_mode: \S+  # .*step compiled, batch 8: eager [\d,]+, compiled, default [\d,]+$", text, re.MULTILINE)
    train(["--config", "tuned.yaml", "--out", "run", "--precision.compile", "false"])
    assert checkpoint_steps(tmp_path / "run") == [25 // 8]


# A GPU's switches.


def test_switches_are_tried_on_a_gpu_where_the_user_has_not_set_them_and_a_cpu_is_left_alone(bench: Bench) -> None:
    on_gpu = replace(bench, process=Process(0, 1, torch.device("cuda", 0)))
    assert switches(on_gpu) == ["cudnn_benchmark", "pad_stem"]
    kept = replace(bench.request, kept=frozenset({"precision.cudnn_benchmark"}))
    assert switches(replace(on_gpu, request=kept)) == ["pad_stem"]
    assert switches(bench) == []
    stepper = Stepper(bench.trial_config(8), bench.process)
    assert tune_switches(bench, stepper, switches(bench), rate=7.0) == (stepper, 7.0)
    assert not bench.found.notes
    assert not bench.found.comparisons


class Switched(Stepper):
    """A stepper whose speed follows from its switches; where both are on, it runs out of memory."""

    SPEEDS: dict[tuple[bool, bool], float]

    def alone(self, sample: ViewBatch) -> Callable[[float], float]:
        precision = self.config.precision
        speed = self.SPEEDS.get((precision.cudnn_benchmark, precision.pad_stem))

        def run(seconds: float) -> float:
            if speed is None:
                raise TrialFailed("out of memory")
            return speed

        return run

    def with_search(self, *, search: bool) -> Stepper:
        return type(self)(super().with_search(search=search).config, self.process, networks=self.networks)


@pytest.mark.parametrize(
    ("speeds", "chosen", "rate"),
    [
        ({(False, False): 100.0, (True, False): 90.0, (False, True): 120.0}, (False, True), 120.0),
        ({(False, False): 100.0, (True, False): 130.0, (True, True): 131.0}, (True, False), 130.0),
        ({(False, False): 100.0, (True, False): 130.0}, (True, False), 130.0),
        ({(False, False): 100.0, (True, False): 110.0, (True, True): 140.0}, (True, True), 140.0),
    ],
)
def test_a_switch_stays_where_whole_steps_are_faster_with_it(
    speeds: dict, chosen: tuple[bool, bool], rate: float, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Switched, "SPEEDS", speeds, raising=False)
    tried = replace(bench, make_stepper=Switched)
    stepper, measured = tune_switches(tried, tried.stepper(8), ["cudnn_benchmark", "pad_stem"], rate=1.0)
    found = tried.found.config.precision
    assert (found.cudnn_benchmark, found.pad_stem) == chosen
    assert stepper.config.precision == replace(found, bn_ranks=0)
    assert measured == rate
    assert "step by precision.pad_stem, batch 8: " in tried.found.notes["precision.pad_stem"]


# The target's update.


def test_ways_to_move_the_target_are_tried_on_a_gpu_where_they_work_and_the_others_are_noted(bench: Bench) -> None:
    assert [candidates.updates(own) for own in UPDATES] == [
        ["auto", "triton", "apex"],
        ["foreach", "triton", "apex"],
        ["triton", "auto", "apex"],
        ["apex", "auto", "triton"],
    ]

    def check(update: str, device: torch.device) -> None:
        assert device.type == "cuda"
        if update == "apex":
            raise UserError("apex is not installed")

    on_gpu = replace(bench, process=Process(0, 1, torch.device("cuda", 0)))
    assert update_ways(replace(on_gpu, request=replace(bench.request, kept=frozenset({"optim.update"})))) == ["auto"]
    assert "optim.update" not in bench.found.notes
    assert update_ways(on_gpu, check=check) == ["auto", "triton"]
    assert bench.found.notes["optim.update"] == "images/s per CPU process; not tried: apex is not installed"
    assert update_ways(bench) == ["auto"], "on a CPU there is nothing to choose"


def test_the_way_to_move_the_target_is_chosen_by_whole_steps_of_the_same_networks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    target_update = BYOL.target_update
    monkeypatch.setattr(
        BYOL, "target_update", lambda self, tau, *, backend: moved.append(backend) or target_update(self, tau, backend=backend)
    )
    first = Stepper(bench.trial_config(8), bench.process)
    stepper, rate = tune_update(bench, first, ["auto", "foreach"], rate=1.0)
    assert set(moved) == {"auto", "foreach"}
    assert stepper.networks is first.networks
    (comparison,) = bench.found.comparisons
    assert bench.found.config.optim.update == stepper.config.optim.update == comparison.best
    assert rate == comparison.rate(comparison.best)
    assert "step by optim.update, batch 8: auto" in bench.found.notes["optim.update"]


# Memory.


def test_larger_batches_are_not_tried_after_the_first_that_does_not_fit() -> None:
    tried: list[int] = []
    assert those_that_fit([16, 32, 64, 128], lambda batch: tried.append(batch) or batch < 64) == [16, 32]
    assert tried == [16, 32, 64]


def test_running_out_of_memory_means_that_it_does_not_fit_and_other_errors_stay_errors() -> None:
    taken: list[weakref.ref] = []

    def run_out() -> None:
        tensor = torch.zeros(3)
        taken.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken() -> None:
        raise RuntimeError("cuDNN")

    assert fits_memory(lambda: None, CPU)
    assert not fits_memory(run_out, CPU)
    assert taken[0]() is None
    with pytest.raises(RuntimeError, match="cuDNN"):
        fits_memory(broken, CPU)


def test_a_sample_is_repeated_to_any_batch_in_its_memory_layout() -> None:
    view = torch.arange(3 * 3 * 4 * 4, dtype=torch.uint8).reshape(3, 4, 4, 3).permute(0, 3, 1, 2)
    sample = ViewBatch(view, view + 1, torch.tensor([5, 6, 7]), torch.tensor([0, 1, 2]), torch.rand(3, 2, 4))
    batch = repeated(sample, 5)
    assert torch.equal(batch.view1, torch.cat([view, view[:2]]))
    assert torch.equal(batch.view2, torch.cat([view, view[:2]]) + 1)
    assert batch.view1.is_contiguous(memory_format=torch.channels_last)
    assert batch.label.tolist() == [5, 6, 7, 5, 6]
    assert torch.equal(batch.parameters[3:], sample.parameters[:2])


@pytest.fixture
def bench(beton: Path) -> Bench:
    """One process, with real images, whose share of the batch is 64."""
    config = parse_train_config([*SMALL, "--data.train", str(beton)], usage="")
    request = Request(config, [str(beton)], seconds=0.05)
    found = Findings(config, per="CPU process", ranks=1)
    made = Bench(request, Process(0, 1, CPU), share=8, cores=1, found=found, announce=lambda _: None)
    check_images(made, readings(request.paths, config.data, device="cpu", kept=frozenset()))
    return replace(made, share=24)


def test_the_search_for_a_rank_batch_runs_real_steps_and_chooses_one_that_divides_the_share(bench: Bench) -> None:
    assert fitting_batches(replace(bench, request=replace(bench.request, kept=frozenset({"rank_batch"})))) == [24]
    stepper, rate = tune_rank_batch(bench)
    assert bench.found.config.rank_batch in (8, 24)
    assert stepper.config.global_batch == bench.found.config.rank_batch
    assert rate > 0
    assert "rank_batch" in bench.found.notes


# What is said.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "data-bound: the step waits 50% of the time. Next: data.workers 5"),
        ({"workers": 5}, "data-bound.*images stored smaller.*dali_ops crop"),
        ({"workers": 8, "workers_needed": 20, "on_gpu": False}, "data-bound.*images stored smaller.*; more cores$"),
        ({"loader": 2000}, "data-bound.*though the loader alone is faster"),
        ({"wait_share": 0.01}, "compute-bound: the step waits 1% .*precision.compile"),
        ({"whole": 990}, "compute-bound"),
        ({"wait_share": 0.0, "on_gpu": False}, "compute-bound.*a GPU"),
        ({"wait_share": 0.0, "on_gpu": False, "torch_threads": 1}, "compute-bound.*OMP_NUM_THREADS=8, .* 1 of 8 cores"),
    ],
)
def test_the_verdict_names_the_bound_and_the_next_thing_to_change(changes: dict, said: str) -> None:
    assert re.match(said, verdict(replace(SPEEDS, **changes)))


def test_the_config_comes_back_from_its_yaml_as_it_was_with_the_figures_as_comments(tmp_path: Path) -> None:
    config = TrainConfig(data=DataConfig(train="a path: with # marks/" + "x" * 90, workers=3), precision=PrecisionConfig(autocast="off"))
    text = config_yaml(config, {"data.workers": "1 100,\n3 300", "rank_batch": "note"}, head=["typed", "said"])
    assert "\n  workers: 3  # 1 100, 3 300\n" in text
    assert "\nrank_batch: 0  # note\n" in text
    assert text.startswith("# typed\n# said\n")
    file = tmp_path / "tuned.yaml"
    file.write_text(text)
    assert parse_train_config(["--config", str(file)], usage="") == config
    assert parse_train_config(["--preset", "cpu_demo", "--config", str(file), "--out", "runs/x"], usage="") == replace(config, out="runs/x")


def test_the_command_that_follows_starts_as_many_processes_as_were_planned_for() -> None:
    found = Findings(TrainConfig(), per="GPU", ranks=8)
    assert found.command(Path("t.yaml")) == "torchrun --nproc-per-node 8 -m fastbyol train --config t.yaml --out runs/tuned"
    assert replace(found, ranks=1).command(Path("t.yaml")).startswith("python -m fastbyol train --config t.yaml")
    assert "NODES=2 GPUS=8 HOST=HOST bash scripts/several_nodes.sh" in replace(found, ranks=16).command(Path("t.yaml"))


# As a user runs it.


def test_tune_compares_the_backends_and_writes_a_config_that_training_starts_from(
    data_paths: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["tune", *(part for path in data_paths.values() for part in ("--data", str(path))), *SMALL, *QUICK, "--epochs", "1"])
    written = yaml.safe_load(Path("tuned.yaml").read_text())
    backend = written["data"]["backend"]
    assert written["data"]["train"] == str(data_paths[backend])
    assert written["data"]["workers"] >= 1
    assert "out" not in written
    output = capsys.readouterr()
    assert "images/s per CPU process" in output.out
    assert all(name in output.out for name in ("(ffcv)", "(folder)", "(dali)", "bf16 channels_last", "end to end", "-bound"))
    assert "at most 5 comparisons of 0.05 s" in output.err
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.yaml"]
    train(["--config", "tuned.yaml", "--out", "run"])
    assert checkpoint_steps(tmp_path / "run") == [25 // 8]


def test_what_is_typed_is_kept(beton: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.yaml"
    out.write_text("old")
    typed = ("--data.workers", "1", "--data.prefetch=5", "--precision.autocast", "off", "--precision.channels_last", "false")
    main(["tune", "--data", str(beton), "--out", str(out), "--overwrite", *SMALL, *QUICK, *typed, "--rank_batch", "4"])
    written = yaml.safe_load(out.read_text())
    assert (written["data"]["workers"], written["data"]["prefetch"], written["rank_batch"]) == (1, 5, 4)
    assert (written["precision"]["autocast"], written["precision"]["channels_last"]) == ("off", False)


def _unless_given(given: list[str], *defaults: str) -> list[str]:
    """The defaults, name and value, without those that would come twice."""
    return [word for name, value in zip(defaults[::2], defaults[1::2], strict=True) if name not in given for word in (name, value)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere"], "--data = nowhere: no such file"),
        (["--data", "{beton}", "--out", "{dir}"], "must be a file that ends in .yaml"),
        (["--data", "{beton}", "--out", "{dir}/no/x.yaml"], "is not a folder that may be written"),
        (["--data", "{beton}", "--out", "{dir}/taken.yaml"], "taken.yaml: exists; .*--overwrite"),
        (["--data", "{beton}", "--seconds", "nan"], "--seconds = nan: must be"),
        (["--data", "{beton}", "--ranks", "3"], "global_batch = 8: not divisible by 3 ranks"),
        (["--data", "{beton}", "--data.train", "x"], "--data.train: use --data"),
        (["--data", "{beton}", "--sekonds", "3"], r"unrecognized arguments: --sekonds \(did you mean --seconds\?\) \(fastbyol tune --help"),
        (["--data", "{beton}", "--global_batch", "64"], "global_batch = 64: the data has 25 images"),
        (["--data", "{beton}", "--precision.autocast", "fp16"], "precision.autocast = 'fp16': needs a GPU"),
        (["--data", "{beton}", "--data", "{other}"], r"--data: not the same images \(.*: 25, .*: 8\)"),
    ],
)
def test_mistakes_end_in_one_line_before_any_measurement(
    arguments: list[str], said: str, beton: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken.yaml").write_text("mine")
    other = tmp_path / "other"
    other.mkdir()
    (other / "ant").symlink_to(image_folder / "ant")
    given = [argument.format(beton=beton, dir=tmp_path, other=other) for argument in arguments]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "new.yaml")]
    with pytest.raises(SystemExit) as ended:
        main(["tune", *_unless_given(arguments, *SMALL, *QUICK), *given, *out])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.search(said, error)
    assert error.count("\n") == 1
    assert (tmp_path / "taken.yaml").read_text() == "mine"
    assert not (tmp_path / "new.yaml").exists()


def test_options_that_are_typed_as_a_group_are_kept_as_those_typed_one_by_one(beton: Path, tmp_path: Path, monkeypatch) -> None:
    class Asked(Exception):
        pass

    def tune(request: Request, **_: object) -> None:
        asked.append(request.kept)
        raise Asked

    asked: list[frozenset[str]] = []
    monkeypatch.setattr("fastbyol.tuning.procedure.tune", tune)
    for typed in (["--precision", '{"channels_last": true}'], ["--precision.channels_last=true"]):
        with pytest.raises(Asked):
            main(["tune", "--data", str(beton), *typed, "--out", str(tmp_path / "new.yaml")])
    assert asked == [{"precision.channels_last"}] * 2


def test_under_torchrun_it_says_to_start_without(beton: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["tune", "--data", str(beton), *SMALL, "--out", "unwritten.yaml"])
    assert "with one process" in capsys.readouterr().err


@pytest.mark.parametrize(("during", "seconds"), [("step alone", "600"), ("end to end", "0.05")])
def test_ctrl_c_ends_it_in_one_line_and_nothing_is_left(
    during: str, seconds: str, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def announce(text: str) -> None:
        if text.startswith(during):  # in the middle of a measurement that would go on for ten minutes; or at once, with loaders open
            if during == "step alone":
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            else:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("fastbyol.__main__.announce", announce)
    kept = ("--precision.autocast", "off", "--precision.channels_last", "false", "--data.workers", "1")
    with pytest.raises(SystemExit) as ended:
        main(["tune", "--data", str(beton), *SMALL, *kept, "--seconds", seconds, "--out", str(tmp_path / "x.yaml")])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "fastbyol: interrupted; nothing was written\n"
    assert not list(tmp_path.iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastbyol-data")]
