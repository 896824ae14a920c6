"""The benchmark suite: its arithmetic, its generated images, and records of cases run with tiny settings."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the suite runs from a checkout and is not installed

from benchmarks import run as command  # noqa: E402
from benchmarks.cases import (  # noqa: E402
    CASES,
    augment,
    batchnorm,
    case_docstring,
    checkpoint,
    convert,
    end_to_end,
    evaluate,
    linear_sweep,
    loader,
    monitors,
    scaling,
    step,
    store,
    updates,
)
from benchmarks.cases.updates import Ema, FusedUpdate, Lars  # noqa: E402
from benchmarks.imagenet_like import BYTES_PER_PIXEL, write_imagenet_like  # noqa: E402
from benchmarks.own_process import PEAK, in_own_process, peak_mib_of  # noqa: E402
from benchmarks.record import CaseResult, make_result  # noqa: E402
from benchmarks.report_text import (  # noqa: E402
    case_table,
    headers,
    report_markdown,
)
from benchmarks.rival_steps import LIGHTLY, SOLO_LEARN, STEPS  # noqa: E402
from benchmarks.rivals import INSTALL, those_installed  # noqa: E402
from benchmarks.rivals.dali_native_views import dali_native_loader  # noqa: E402
from benchmarks.rivals.views import KorniaViews  # noqa: E402
from benchmarks.timing import Subject, Timings, cpu_seconds, measure, same_round_ratios, torch_threads  # noqa: E402
from benchmarks.training_step import TrainingStep, noise_batch  # noqa: E402
from benchmarks.updates import (  # noqa: E402
    averaged_model_update,
    ema_pytorch_update,
    foreach_update,
    lightly_lars,
    lightly_update,
    target_and_online,
)
from fastbyol.config.errors import UserError  # noqa: E402
from fastbyol.config.schema import DataConfig, ModelConfig, OptimConfig, TrainConfig  # noqa: E402
from fastbyol.config.views import ViewPair, both  # noqa: E402
from fastbyol.data import build_loader  # noqa: E402
from fastbyol.data.batch import ViewBatch  # noqa: E402
from fastbyol.objectives import byol_loss  # noqa: E402
from fastbyol.tuning.candidates import worker_counts  # noqa: E402
from fastbyol.tuning.comparison import Estimate, dropped_extremes, estimate, interval_coverage  # noqa: E402

TINY_MODEL = ModelConfig(encoder="resnet8", stem="small2", hidden_dim=16, projection_dim=8)
TINY_CASES = {
    "convert": (convert, convert.Size(images=10, copies=2, rounds=1, workers=1, scale=0.1)),
    "loader": (loader, loader.Size(images=10, batch=5, rounds=1, size_px=16, scale=0.1, slow=False)),
    "store": (
        store,
        store.Size(
            images=10, copies=2, batch=10, rounds=1, shard_mib=1, window_mib=1, delays_ms=(0, 20), cache_share=3.0, size_px=16, scale=0.2
        ),
    ),
    "augment": (augment, augment.Size(images=2, rounds=1, size_px=16, scale=0.1)),
    "ema": (Ema, updates.Size(rounds=2, model=TINY_MODEL)),
    "lars": (Lars, updates.Size(rounds=2, model=TINY_MODEL)),
    "fused_update": (FusedUpdate, updates.FusedSize(rounds=2, more_rounds=1, model=TINY_MODEL)),
    "batchnorm": (batchnorm, batchnorm.Size(rounds=2, batch=2, shapes=((8, 6), (16, 3)))),
    "step_resnet18": (step.ResNet18, step.Size(model=TINY_MODEL, size_px=32, batch=4, rounds=1, compile=False, every_peak=False)),
    "demo_step": (end_to_end.DemoStep, end_to_end.DemoSize(steps=2, rounds=1, batch=8)),
    "end_to_end": (end_to_end, end_to_end.Size(steps=2, rounds=1, model=TINY_MODEL, size_px=32, batch=4, scale=0.1, peaks=False)),
    "evaluate": (evaluate, evaluate.Size(images=8, batch=4, rounds=1, encoder="resnet8", size_px=32, scale=0.1)),
    "linear_sweep": (linear_sweep, linear_sweep.Size(batch=4, rounds=1, encoder="resnet8", size_px=32, classes=5)),
    "monitors": (monitors, monitors.Size(model=TINY_MODEL, size_px=32, batch=4, rounds=1)),
    "scaling": (scaling, scaling.Size(steps=1, rounds=1, rank_batch=4, size_px=32, model=TINY_MODEL, ranks=2)),
    "checkpoint": (checkpoint, checkpoint.Size(rounds=2, model=TINY_MODEL, size_px=32, steps=2)),
}
EXPECTED_ROWS = {
    "convert": 4,
    "loader": 14,
    "store": 6,
    "augment": 4,
    "ema": 7,
    "lars": 5,
    "fused_update": 6,
    "batchnorm": 7,
    "step_resnet18": 10 + len({"float32", step.FORMAT}),
    "demo_step": 3,
    "end_to_end": 8,
    "evaluate": 5,
    "linear_sweep": 4,
    "monitors": 3,
    "scaling": 3,
    "checkpoint": 6,
}
OPTIONAL_RIVALS = {
    loader.LIGHTLY,
    augment.KORNIA,
    Ema.LIGHTLY,
    Ema.PACKAGE,
    Ema.PACKAGE_FOREACH,
    Lars.LIGHTLY,
    FusedUpdate.LIGHTLY,
    LIGHTLY,
}
"""Rows that need packages which `make install` does not install."""
NEVER_HERE = {"fp16, channels-last", step.COMPILED, loader.STOCK_FFCV}
"""Needs a GPU; are left out of the tiny settings, for they compile for long (the last one is tried by tests/long/stock_ffcv_row.py)."""


def test_an_estimate_is_the_median_and_the_order_statistics_that_enclose_it_with_95_percent():
    # For 9 values, 2nd to 8th: 1 - 2 (1 + 9) / 512 = 0.961; for 3rd to 7th it would be 0.820.
    assert estimate([9, 1, 8, 2, 7, 3, 6, 4, 5]) == Estimate(5, 2, 8)
    assert interval_coverage(9, drop=1) == pytest.approx(1 - 20 / 512)
    # For 6 the extremes give 1 - 2/64 = 0.969, for 5 only 0.9375: still the extremes, and the record says so.
    assert (dropped_extremes(6), dropped_extremes(5), dropped_extremes(1)) == (0, 0, 0)
    assert interval_coverage(5, drop=0) == 0.9375
    assert estimate([4.0, 1.0, 2.0, 3.0]) == Estimate(2.5, 1.0, 4.0)


@pytest.mark.parametrize(("num", "drop"), [(8, 0), (9, 1), (20, 5), (100, 39)])
def test_the_published_table_of_95_percent_median_intervals_is_met(num: int, drop: int):
    """Ranks from the binomial table (for n = 20 the 6th to 15th, for n = 100 the 40th to 61st)."""
    assert dropped_extremes(num) == drop


def test_a_ratio_is_taken_within_each_round_so_that_a_slow_round_does_not_count():
    # Medians of the times alone would give 30 / 10 = 3; in four of five rounds the ratio is 2.
    ours, theirs = [2.0, 20.0, 60.0, 30.0, 40.0], [1.0, 10.0, 30.0, 15.0, 10.0]
    assert same_round_ratios(ours, theirs).median == 2.0


def _burn(seconds: float) -> Callable[[], None]:
    def work() -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return work


def _dying() -> Callable[[], None]:
    return lambda: os._exit(3)


def test_work_in_a_process_of_its_own_counts_as_cpu_time_each_time_and_its_death_is_named():
    with in_own_process(_burn, 0.2) as work:
        spent = [-cpu_seconds() + (work(), cpu_seconds())[1] for _ in range(2)]
    assert all(0.2 <= seconds < 0.4 for seconds in spent)  # without the start of the process
    with in_own_process(_dying) as work, pytest.raises(UserError, match=r"_dying: its process died \(exit code 3\)"):
        work()


def _holding(mebibytes: int) -> Callable[[], None]:
    return lambda: held.append(torch.ones(mebibytes << 18))


held: list[torch.Tensor] = []


def test_the_peak_of_a_process_is_that_of_its_own_work_and_not_of_the_process_that_started_it():
    held.append(torch.ones(512 << 18))  # this process has 512 MiB more
    held.clear()
    small, large = (peak_mib_of(_holding, mebibytes, calls=2) for mebibytes in (1, 64))
    assert 2 * 60 < large - small < 2 * 68


def test_rounds_interleave_the_subjects_and_warm_up_is_not_counted():
    order: list[str] = []
    subjects = [Subject(name, lambda name=name: order.append(name), calls=2) for name in "ABC"]
    timings = measure(subjects, rounds=3, warmup=1)
    assert "".join(order) == "AABBCC" * 4
    assert {name: len(timings[name].ms["cpu"]) for name in "ABC"} == {"A": 3, "B": 3, "C": 3}


def test_the_cpu_clock_does_not_run_while_a_subject_sleeps_and_both_are_divided_by_units_and_calls():
    slept = measure([Subject("sleep", lambda: time.sleep(0.02), units=4, calls=2)], rounds=1, warmup=0)["sleep"].ms
    assert 5.0 <= slept["wall"][0] < 50.0
    assert slept["cpu"][0] < 2.5


def test_two_subjects_of_one_name_are_refused():
    with pytest.raises(UserError, match="different names"):
        measure([Subject("a", int), Subject("a", int)], rounds=1)


def test_rows_hold_speed_up_over_the_reference_and_time_over_the_ceiling():
    subjects = [Subject(name, int) for name in ("slow", "ours", "limit")]
    timings = {"slow": Timings(_same((8.0, 16.0))), "ours": Timings(_same((2.0, 4.0))), "limit": Timings(_same((1.0, 2.0)))}
    result = make_result(
        "x", "t", subjects, timings, reference="slow", ceiling="limit", unit="image", threads=2, settings=updates.Size(rounds=2)
    )
    ours = result.row("ours")
    assert (ours.speedup["cpu"].median, ours.over_ceiling["cpu"].median) == (4.0, 2.0)
    assert [row.role for row in result.rows] == ["reference", "", "ceiling"]
    assert result.coverage == 0.5  # two values enclose the median with probability 1/2
    assert "images/s per CPU process (2 threads)" in headers(result)
    assert not any("GPU" in title.replace("CPU", "") for title in headers(result))


def _same(values: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
    return {"cpu": values, "wall": values}


def test_torch_gets_its_threads_back():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_generated_images_are_the_same_bytes_for_a_seed_and_as_dense_as_photographs(tmp_path: Path):
    first, again, other = (write_imagenet_like(tmp_path / name, images=12, classes=3, seed=seed) for name, seed in zip("abc", (4, 4, 5)))  # noqa: B905
    files = sorted(path.relative_to(first) for path in first.rglob("*.jpg"))
    assert len(files) == 12
    assert {file.parts[0] for file in files} == {"class000", "class001", "class002"}
    assert all((first / file).read_bytes() == (again / file).read_bytes() for file in files)
    assert all((first / file).read_bytes() != (other / file).read_bytes() for file in files)
    folders = [path for folder in (first, other) for path in folder.rglob("*.jpg")]
    pixels = sum(math.prod(Image.open(path).size) for path in folders)
    assert sum(path.stat().st_size for path in folders) / pixels == pytest.approx(BYTES_PER_PIXEL, rel=0.35)
    assert pixels / len(folders) == pytest.approx(190_000, rel=0.25)


def test_torchvision_views_have_the_shape_and_scale_of_ours(tmp_path: Path):
    from benchmarks.rivals.views import TorchvisionLoader
    from fastbyol.config.views import ViewPair

    folder = write_imagenet_like(tmp_path, images=4, classes=2, scale=0.1)
    (batch,) = TorchvisionLoader(folder, ViewPair(size_px=32), batch=4)
    assert batch.view1.shape == batch.view2.shape == (4, 3, 32, 32)
    assert batch.view1.is_contiguous(memory_format=torch.channels_last)
    assert batch.label.tolist() == [0, 0, 1, 1]
    assert -2.2 < batch.view1.min() < 0 < batch.view1.max() < 2.7  # (0 - mean) / std and (1 - mean) / std


# `step` is what `step_resnet18` runs with other networks.
@pytest.fixture(scope="module", params=[name for name in CASES if name != "step"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CaseResult:
    case, size = TINY_CASES[request.param]
    try:
        return case.run(size, scratch=tmp_path_factory.mktemp(request.param))
    except UserError as error:
        if request.param != "store":
            raise
        pytest.skip(str(error))  # a machine without nginx, or where we are not root


def test_every_case_measures_each_subject_against_one_reference_and_one_ceiling(result: CaseResult):
    assert set(result.skipped) <= OPTIONAL_RIVALS | NEVER_HERE
    assert all(INSTALL in why for name, why in result.skipped.items() if name in OPTIONAL_RIVALS)
    assert len(result.rows) + len(result.skipped) == EXPECTED_ROWS[result.case]
    assert [sum(row.role == role for row in result.rows) for role in ("ceiling", "reference")] == [1, 1]
    assert all(row.role in ("", "ceiling", "reference", "memory ceiling", "rival") for row in result.rows)
    for row in result.rows:
        for estimates in (row.ms, row.speedup, row.over_ceiling):
            assert set(estimates) == {"cpu", "wall"}
            assert all(0 < e.low <= e.median <= e.high < math.inf for e in estimates.values())
    if result.case == "step_resnet18":
        apart = {step.REFERENCE, *STEPS, step.OURS, step.RETURNING} - set(result.skipped)
        assert {row.name for row in result.rows if row.extra.get(PEAK, 0) > 100} == apart
    reference = next(row for row in result.rows if row.role == "reference")
    assert reference.speedup["wall"] == Estimate(1.0, 1.0, 1.0)
    case_table(result)


def test_each_backend_is_also_measured_with_more_threads_up_to_the_number_of_cores(data_paths: dict[str, Path]):
    size = loader.Size(images=25, batch=5, rounds=1)
    rates = loader._rates_by_threads(data_paths, size, ViewPair(size_px=16))
    threads = worker_counts(len(os.sched_getaffinity(0)))[1:]
    assert rates.keys() == {"folder: views", "ffcv: views", "dali: views"}
    for found in rates.values():
        assert list(found) == [f"images/s with {number} threads" for number in threads]
        assert all(rate > 0 for rate in found.values())


@pytest.mark.parametrize(
    ("case", "packages", "skipped"),
    [
        (Ema, ("lightly", "ema_pytorch"), {Ema.LIGHTLY, Ema.PACKAGE, Ema.PACKAGE_FOREACH}),
        (augment, ("kornia",), {augment.KORNIA}),
        (Lars, ("torch_optimizer", "lightly"), {updates.RIVAL, Lars.LIGHTLY}),
        (FusedUpdate, ("torch_optimizer", "lightly"), {FusedUpdate.RIVAL, FusedUpdate.LIGHTLY}),
    ],
)
def test_a_row_whose_package_is_missing_is_skipped_by_name_with_what_installs_it(
    case: Any, packages: tuple[str, ...], skipped: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for module in (*packages, *(name for name in sys.modules if name.partition(".")[0] in packages)):
        monkeypatch.setitem(sys.modules, module, None)
    size = next(size for module, size in TINY_CASES.values() if module is case)
    found = case.run(size, scratch=tmp_path)
    assert set(found.skipped) == skipped
    assert all("pip install" in why for why in found.skipped.values())
    assert [sum(row.role == role for row in found.rows) for role in ("ceiling", "reference")] == [1, 1]
    assert (augment.KERNEL if case is augment else case.OURS) in {row.name for row in found.rows}


def installed(make: Callable[[], Any]) -> Any:
    """Returns what `make` makes, or None if its package is missing; the error must then say what installs it."""
    skipped: dict[str, str] = {}
    made = those_installed({"rival": make}, skipped)
    assert all(INSTALL in why for why in skipped.values())
    return made.get("rival")


@pytest.mark.parametrize("use_foreach", [False, True])
def test_ema_pytorch_is_held_at_tau_from_its_second_call_on(use_foreach: bool):
    target, online = target_and_online(TINY_MODEL)
    update = installed(lambda: ema_pytorch_update(target, online, 0.9, use_foreach=use_foreach))
    if update is None:
        return
    update()  # copies
    assert all(torch.equal(t, o) for t, o in zip(target.parameters(), online.parameters(), strict=True))
    before = [t.double() for t in target.parameters()]
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(1.0)
    for _ in range(2):
        update()
    for t, b in zip(target.parameters(), before, strict=True):
        torch.testing.assert_close(t.double(), b + 1 - 0.9**2, rtol=0, atol=1e-6)


def test_lightlys_update_moves_the_target_by_one_minus_tau():
    target, online = target_and_online(TINY_MODEL)
    before = [t.double() for t in target.parameters()]
    update = installed(lambda: lightly_update(target, online, 0.75))
    if update is None:
        return
    update()
    for t, o, b in zip(target.parameters(), online.parameters(), before, strict=True):
        torch.testing.assert_close(t.double(), 0.75 * b + 0.25 * o.double(), rtol=0, atol=1e-6)


def test_lightlys_lars_scales_weights_by_layer_and_leaves_biases_alone():
    """Its rule: lr c |w| / (|g| + wd |w|) times g + wd w for weights, lr g for vectors; the first step has no momentum yet."""
    layer = torch.nn.Linear(4, 3)
    layer.weight.grad, layer.bias.grad = torch.full((3, 4), 0.5), torch.full((3,), 0.25)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    step = installed(lambda: lightly_lars(layer, lr=0.1))
    if step is None:
        return
    step()
    config = OptimConfig()
    trust = config.trust_coefficient * weight.norm() / (0.5 * math.sqrt(12) + config.weight_decay * weight.norm())
    torch.testing.assert_close(layer.weight.double(), weight - 0.1 * trust * (0.5 + config.weight_decay * weight), rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.bias.double(), bias - 0.1 * 0.25, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", STEPS)
def test_a_rivals_step_has_byols_loss_and_moves_both_networks(name: str):
    """In float32: lightly's loss is BYOL's, 4 - 2 (cos1 + cos2), less 4 and a quarter of it; both add the probe's."""
    config = TrainConfig(global_batch=4, model=TINY_MODEL, views=ViewPair(size_px=32))
    rival = installed(lambda: STEPS[name](config, num_classes=2, lr=0.1, tau=0.9))
    if rival is None:
        return
    batch = noise_batch(config, num_classes=2)
    online, target = rival.online, rival.target
    features = [online["encoder"](view) for view in (batch.view1, batch.view2)]
    predictions = [online["predictor"](online["projector"](feature)) for feature in features]
    projections = [target["projector"](target["encoder"](view)) for view in (batch.view1, batch.view2)]
    probe = torch.nn.functional.cross_entropy(rival.probe(features[0]), batch.label)
    byol = byol_loss(*predictions, *projections)
    torch.testing.assert_close(rival.loss(batch), probe + (byol if name == SOLO_LEARN else (byol - 4) / 4), rtol=1e-4, atol=1e-5)
    before = {part: [p.double() for p in network.parameters()] for part, network in (("online", online), ("target", target))}
    rival.run(batch)
    moved = [p for part in ("encoder", "projector") for p in online[part].parameters()]
    assert all(not torch.equal(p.double(), b) for p, b in zip(online["encoder"].parameters(), before["online"], strict=False) if p.ndim > 1)
    for t, o, b in zip(target.parameters(), moved, before["target"], strict=True):
        torch.testing.assert_close(t.double(), 0.9 * b + 0.1 * o.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [averaged_model_update, foreach_update])
def test_torchs_own_updates_of_the_target_move_it_by_one_minus_tau_from_the_first_call_on(make: Any):
    target, online = target_and_online(TINY_MODEL)
    before = [t.double() for t in target.parameters()]
    update = make(target, online, 0.75)
    for _ in range(2):
        update()
    for t, o, b in zip(target.parameters(), online.parameters(), before, strict=True):
        torch.testing.assert_close(t.double(), 0.75**2 * b + (1 - 0.75**2) * o.double(), rtol=0, atol=1e-6)


def test_kornias_views_are_normalised_and_draw_for_each_image():
    from fastbyol.config.views import ViewPair

    views = installed(lambda: KorniaViews(ViewPair(size_px=32)))
    if views is None:
        return
    crop = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).expand(8, -1, -1, -1)
    for view in views(crop, crop):
        assert (view.shape, view.dtype) == ((8, 3, 32, 32), torch.float32)
        assert -2.2 < view.min() < 0 < view.max() < 2.7
        assert len({image.sum().item() for image in view}) > 1  # the same crop, eight different views


def test_costs_of_the_first_call_are_not_in_any_figure():
    waits = iter([0.2])
    timing = measure([Subject("compiles at first", lambda: time.sleep(next(waits, 0.0)))], rounds=3)["compiles at first"]
    assert max(timing.ms["wall"]) < 200


def test_a_subjects_own_counts_start_after_the_warm_up():
    seen: list[str] = []
    measure([Subject("a", lambda: seen.append("run"))], rounds=2, warmup=2, warmed_up=lambda: seen.append("warm"))
    assert seen == ["run", "run", "warm", "run", "run"]


def test_shares_of_a_steps_time_cover_the_steps_since_the_last_reset():
    taken = TrainingStep(TrainConfig(global_batch=4, model=TINY_MODEL, views=ViewPair(size_px=32)), num_classes=2)

    def slow() -> Iterator[ViewBatch]:
        time.sleep(1.0)
        yield taken.noise

    taken.run(slow())
    assert taken.data_wait_share > 0.1
    taken.forget_times()
    taken.run_on_noise()
    assert taken.data_wait_share < 0.1
    assert taken.time_shares()["data_wait_share"] == taken.data_wait_share


def test_a_step_that_accumulates_takes_its_batch_for_each_forward():
    config = TrainConfig(global_batch=8, rank_batch=4, model=TINY_MODEL, views=ViewPair(size_px=32))
    taken = TrainingStep(config, num_classes=2)
    forwards: list[int] = []
    taken.networks().byol.register_forward_hook(lambda _, given, __: forwards.append(len(given[0])))
    taken.run_on_noise(3)
    assert forwards == [2 * 4] * 6, "both views of 4 images in each forward"


def test_every_case_says_what_it_measures_how_with_which_command_and_why():
    for name in CASES:
        text = case_docstring(name)
        assert text.startswith("Measures "), name
        for part in ("\nHow: ", f"python -m benchmarks.run {name}", "\nWhy: ", "eference: ", "eiling: "):
            assert part in text, (name, part)


def test_a_run_writes_a_record_with_provenance_and_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(Ema, "QUICK", TINY_CASES["ema"][1])
    command.main(["ema", "--quick", "--out", str(tmp_path / "new")])
    record = json.loads((tmp_path / "new" / "records.json").read_text())
    assert record["quick"] is True
    assert record["provenance"]["command"] == f"python -m benchmarks.run ema --quick --out {tmp_path / 'new'}"
    assert record["provenance"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert set(record["load_average"]) == {"start", "end"}
    assert record["machine"]["memory_gib"] > 0
    assert (tmp_path / "new" / "report.html").read_text().count("data:image/png") == 1
    rows = {row["name"]: row for row in record["cases"]["ema"]["rows"]}
    assert rows[Ema.OURS]["ms"]["cpu"]["median"] > 0
    assert record["case_seconds"]["ema"] > 0
    assert record["cases"]["ema"]["settings"]["model"]["encoder"] == "resnet8"
    report = (tmp_path / "new" / "report.md").read_text()
    assert f"| {Ema.OURS} |" in report
    assert "python -m benchmarks.run ema" in report
    for words in ("measuring itself costs", "compilation and the first touch", "Quick settings:", "seconds by case: ema "):
        assert words in report
        assert words in (tmp_path / "new" / "report.html").read_text()
    out = capsys.readouterr().out
    assert Ema.OURS in out
    assert re.search(r"^ema: \d+\.\d s, set-up and warm-up included$", out, re.MULTILINE)
    assert re.search(r"report.html; \d+ s in all", out.replace("\n", " "))


def test_a_case_that_lacks_a_package_is_skipped_by_name_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(size: object, *, scratch: Path) -> CaseResult:
        raise UserError("torch-optimizer is not installed")

    monkeypatch.setattr(Lars, "run", missing)
    monkeypatch.setattr(Ema, "QUICK", TINY_CASES["ema"][1])
    command.main(["lars", "ema", "--quick", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "records.json").read_text())
    assert record["skipped"] == {"lars": "torch-optimizer is not installed"}
    assert list(record["cases"]) == ["ema"]
    assert "- lars: torch-optimizer is not installed" in report_markdown(record, [])


def test_ctrl_c_ends_a_run_in_one_line_and_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(size: object, *, scratch: Path) -> CaseResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(Lars, "run", interrupted)
    monkeypatch.setattr(Ema, "QUICK", TINY_CASES["ema"][1])
    with pytest.raises(SystemExit) as stopped:
        command.main(["ema", "lars", "--quick", "--out", str(tmp_path)])
    assert stopped.value.code == 130
    assert "interrupted in lars" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "records.json").read_text())["cases"]) == ["ema"]


def test_a_case_that_fails_is_reported_and_loses_neither_the_other_cases_nor_the_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(size: object, *, scratch: Path) -> CaseResult:
        raise ZeroDivisionError("no rows")

    monkeypatch.setattr(Lars, "run", broken)
    monkeypatch.setattr(Ema, "QUICK", TINY_CASES["ema"][1])
    with pytest.raises(SystemExit) as stopped:
        command.main(["lars", "ema", "--quick", "--out", str(tmp_path)])
    assert stopped.value.code == "failed: lars; see above"
    assert "ZeroDivisionError" in capsys.readouterr().err
    record = json.loads((tmp_path / "records.json").read_text())
    assert list(record["cases"]) == ["ema"]
    assert record["skipped"] == {"lars": "failed: ZeroDivisionError: no rows"}
    assert "- lars: failed: ZeroDivisionError: no rows" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loder"], "CASE = 'loder': no such case (did you mean loader?)"),
        (["ema", "--quik"], "--quik"),
        (["ema", "--out", f"{__file__}/sub"], "/sub: cannot be made"),
    ],
)
def test_a_mistake_on_the_command_line_ends_in_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.startswith("fastbyol: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_the_suite_is_run_as_a_module_from_the_checkout():
    done = subprocess.run([sys.executable, "-m", "benchmarks.run", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in (*CASES, "--quick", "--out"))


def test_the_convolution_of_the_step_case_counts_its_own_operations():
    from torch.utils.flop_counter import FlopCounterMode

    subject = step._convolution(1e9)
    with FlopCounterMode(display=False) as counter:
        subject.run()
    assert counter.get_total_flops() == pytest.approx(subject.units * 1e9)


def test_memory_is_measured_for_training_from_files_in_a_process_of_its_own(tmp_path: Path):
    folder = write_imagenet_like(tmp_path / "images", images=8, classes=2, scale=0.1)
    size = end_to_end.Size(steps=2, rounds=1, model=TINY_MODEL, size_px=32, batch=4)
    alone, fed = (peak_mib_of(end_to_end._epoch, size, *kind, calls=1) for kind in (("", ""), ("folder", str(folder))))
    assert 100 < alone < fed


def test_a_case_from_files_says_whether_it_is_limited_by_data_or_computing():
    assert end_to_end.verdict({"ffcv: end to end": 0.04}).startswith("compute-bound")
    assert "data-bound (dali: end to end 30% of the time waiting)" in end_to_end.verdict(
        {"ffcv: end to end": 0.04, "dali: end to end": 0.3}
    )


def test_efficiency_compares_a_rank_with_one_that_runs_alone():
    """8 s for one rank that does 4 images, 10 s for two that do twice the work, 8 s for two that do not speak: 2, 1.25 and 1 s an image."""
    timings = {name: Timings(_same((1000 * s,))) for name, s in {"1": 2.0, "2": 1.25, "2, alone": 1.0}.items()}
    subjects = [Subject(name, int) for name in timings]
    result = make_result("scaling", "t", subjects, timings, reference="1", ceiling="2, alone", settings=updates.Size(rounds=1))
    assert scaling.efficiency(result, {"1": 1, "2": 2, "2, alone": 2}) == {"1": 1.0, "2": 0.8, "2, alone": 1.0}


def test_executors_of_the_augment_case_render_the_same_views():
    executors = augment.Executors(
        augment.ViewPair(size_px=16), [np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)], seed=1
    )
    executors.render()
    executors.crop()
    assert executors.views.std() > 0.1
    assert executors.crops.std() > 1


DALI_CROPS = both(ViewPair(size_px=32), jitter_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0)


def _levels(view: torch.Tensor) -> torch.Tensor:
    """A normalised view (N, 3, S, S) in units of 255 levels."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (DALI_CROPS.mean, DALI_CROPS.std))
    return 255 * (view * std + mean)


def test_the_rival_of_dalis_own_operations_takes_our_draws(tar_folder: Path) -> None:
    """Crop, flip, grey and solarize are the paper's, up to DALI's 8-bit levels between its operations."""
    for views, largest in ((DALI_CROPS, 1.6), (both(DALI_CROPS, gray_p=1.0), 2.6), (both(DALI_CROPS, solarize_p=1.0), 1.6)):
        with (
            dali_native_loader(tar_folder, views, batch=6, workers=2, seed=5) as dali,
            build_loader(DataConfig(train=str(tar_folder), workers=2), views=views, seed=5, global_batch=6) as kernel,
        ):
            for ours, theirs in zip(dali, kernel, strict=True):
                assert torch.equal(ours.parameters, theirs.parameters)
                difference = (_levels(ours.view1) - _levels(theirs.view1)).abs()
                if views.view1.solarize_p:  # a pixel at the threshold may fall on either side
                    assert difference.quantile(0.98) < largest
                else:
                    assert difference.max() < largest


@pytest.mark.parametrize(
    ("changes", "mean_between", "largest"),
    [
        ({"jitter_p": 1.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}, (0.0, 1.0), 2.1),
        ({"blur_p": 1.0}, (0.0, 1.0), 2.1),
        ({"jitter_p": 1.0}, (2.0, 20.0), 256),
    ],
)
def test_the_rivals_brightness_and_blur_are_the_papers_its_whole_jitter_is_not(
    tar_folder: Path, changes: dict[str, float], mean_between: tuple[float, float], largest: float
) -> None:
    views = both(DALI_CROPS, **changes)
    with (
        dali_native_loader(tar_folder, views, batch=6, workers=2, seed=5) as dali,
        build_loader(DataConfig(train=str(tar_folder), workers=2), views=views, seed=5, global_batch=6) as kernel,
    ):
        ours, theirs = next(iter(dali)), next(iter(kernel))
    inside = (_levels(ours.view2) - _levels(theirs.view2)).abs()[..., 2:-2, 2:-2]  # DALI's blur reflects at the border
    assert mean_between[0] <= inside.mean() <= mean_between[1]
    assert inside.max() <= largest
