"""The GPU plan: each part run on the CPU at toy size, its processes, its budget. Code that needs CUDA is not covered here."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the suite runs from a checkout and is not installed

from benchmarks import gpu_plan  # noqa: E402
from benchmarks.cases import case_docstring  # noqa: E402
from benchmarks.gpu import PARTS, Findings, Place, correctness, crops, kernels, step, syncs  # noqa: E402
from benchmarks.gpu.subjects import calls_for, captures, fitting_batch, largest_batch, why_it_fails  # noqa: E402
from benchmarks.imagenet_like import write_imagenet_like  # noqa: E402
from benchmarks.own_process import Isolated, PartFailed  # noqa: E402
from benchmarks.record import CaseResult  # noqa: E402
from benchmarks.training_step import TrainingStep  # noqa: E402
from fastbyol.config.errors import UserError, is_out_of_memory, require  # noqa: E402
from fastbyol.config.schema import ModelConfig, PrecisionConfig, TrainConfig  # noqa: E402
from fastbyol.config.views import ViewPair  # noqa: E402
from fastbyol.data.batch import ViewBatch  # noqa: E402
from fastbyol.models import cpu_norm  # noqa: E402
from fastbyol.models.view_batchnorm import ViewBatchNorm  # noqa: E402

ROWS = {"norm": 4, "step": 6, "augment": 3, "ema": 3, "lars": 6, "decode": 3, "end_to_end": 8, "launches": 4}
FINDINGS = ("kernels", "correctness", "syncs")
COMPILES_FOR_A_MINUTE = "step_compiled"
"""Its dry run is for `gpu_plan --device cpu --tiny`; all but its second variant is the part `step`."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    scratch = tmp_path_factory.mktemp("plan")
    images = write_imagenet_like(scratch / "images", images=8, classes=2, scale=0.1)
    return Place(device=torch.device("cpu"), images=images, scratch=scratch, workers=1)


@pytest.mark.parametrize("part", [part for part in PARTS if part not in (*FINDINGS, COMPILES_FOR_A_MINUTE, "crops")])
def test_a_part_measures_each_subject_against_its_reference_and_ceiling(part: str, place: Place):
    *_, result = gpu_plan.measure_part(part, place, True)
    assert isinstance(result, CaseResult)
    assert result.case == f"gpu.{part}"
    assert len(result.rows) == ROWS[part]
    assert [sum(row.role == role for row in result.rows) for role in ("ceiling", "reference")] == [1, 1]
    assert all(row.ms["wall"].median > 0 for row in result.rows)
    assert all("CUDA" in why for why in result.skipped.values())
    assert not any("mfu" in row.extra for row in result.rows)  # a CPU's peak is not known


def test_the_shares_of_a_step_are_of_its_parts_and_sum_to_one():
    model = ModelConfig(encoder="resnet8", stem="small2", hidden_dim=16, projection_dim=8)
    taken = TrainingStep(TrainConfig(global_batch=4, model=model, views=ViewPair(size_px=32)), num_classes=2)

    def slow(batches: int) -> Iterator[ViewBatch]:
        for _ in range(batches):
            time.sleep(0.2)
            yield taken.noise

    taken.run(slow(2))
    shares = taken.time_shares()
    assert set(shares) == {"data_wait_share", "forward_backward_share", "update_share"}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(0 < share < 1 for share in shares.values())
    assert shares["data_wait_share"] == taken.data_wait_share


def test_every_piece_of_a_step_runs_and_says_that_it_was_not_checked_without_cuda(place: Place):
    (result,) = gpu_plan.measure_part("syncs", place, True)
    assert isinstance(result, Findings)
    assert set(result.found.values()) == {syncs.UNCHECKED}
    assert {"backward", "LARS", "the whole train_step", "control, must wait: .item()"} <= set(result.found)


def test_every_part_says_what_it_measures_how_with_which_command_and_why():
    for name in PARTS:
        text = case_docstring(f"gpu.{name}")
        assert text.startswith("Measures "), name
        for words in ("\nHow: ", f"python -m benchmarks.gpu_plan {name}", "\nWhy: "):
            assert words in text, (name, words)


def test_the_plan_writes_a_record_and_reports_from_parts_in_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    gpu_plan.main(["ema", "kernels", "--out", str(tmp_path), "--device", "cpu", "--tiny"])
    record = json.loads((tmp_path / "records.json").read_text())
    assert list(record["cases"]) == ["gpu.ema"]
    assert list(record["findings"]) == ["gpu.kernels"]
    assert record["cases"]["gpu.ema"]["device"] == "cpu"
    assert record["quick"] is True  # so that no page quotes it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.log", "records.json", "report.html", "report.md"]
    assert "gpu.ema: the target's update" in (tmp_path / "report.md").read_text()
    assert "gpu.ema" in (tmp_path / "report.html").read_text()
    assert "ema_update, foreach" in capsys.readouterr().out


def test_parts_that_do_not_fit_in_the_time_limit_are_reported(tmp_path: Path):
    gpu_plan.main(["ema", "lars", "--out", str(tmp_path), "--device", "cpu", "--tiny", "--seconds", "1"])
    record = json.loads((tmp_path / "records.json").read_text())
    assert record["cases"] == {}
    assert set(record["skipped"]) == {"gpu.ema", "gpu.lars"}
    assert "were left of --seconds 1" in record["skipped"]["gpu.ema"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "add --tiny for a dry run"),
        (["emma", "--device", "cpu", "--tiny"], "PART = 'emma': no such part (did you mean ema?)"),
        (["--seconds", "0", "--device", "cpu", "--tiny"], "--seconds = 0.0: must be a number > 0"),
    ],
)
def test_a_mistake_on_the_command_line_ends_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        gpu_plan.main([*arguments, "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert (stopped.value.code, err.count("\n")) == (2, 1)
    assert message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_without_cuda_the_plan_ends_in_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        gpu_plan.main(["--out", str(tmp_path / "not made")])
    err = capsys.readouterr().err
    assert (stopped.value.code, err.count("\n")) == (2, 1)
    assert "no CUDA device here" in err
    assert not (tmp_path / "not made").exists()


def counting(most: int) -> Iterator[int]:
    yield from range(1, most + 1)
    if most == 3:
        raise ValueError("three")


def test_a_process_of_its_own_returns_values_or_raises_in_one_line_what_happened_and_a_new_one_takes_over(tmp_path: Path):
    log = tmp_path / "plan.log"
    with closing(Isolated(log)) as process:
        assert process.call(divmod, 7, 2, limit_s=60) == (3, 1)
        first = process.call(os.getpid, limit_s=60)
        with pytest.raises(UserError, match="x = 1: must be 2"):
            process.call(require, False, "x", 1, "2", limit_s=60)
        kept: list[int] = []
        assert process.call(counting, 2, limit_s=60, kept=kept.append) == 2
        assert process.call(os.getpid, limit_s=60) == first != os.getpid()
        with pytest.raises(PartFailed, match=r"ValueError: three; see plan\.log"):
            process.call(counting, 3, limit_s=60, kept=kept.append)
        assert kept == [1, 2, 1, 2, 3], "what came before the failure is kept"
        assert "Traceback" in log.read_text()
        with pytest.raises(PartFailed, match=r"its process died \(exit code 3\)"):
            process.call(os._exit, 3, limit_s=60)
        assert process.call(os.getpid, limit_s=60) != first
        start = time.monotonic()
        with pytest.raises(PartFailed, match="stopped at its limit of 1 s"):
            process.call(time.sleep, 600, limit_s=1)
        assert time.monotonic() - start < 60


def test_the_step_over_ranks_takes_that_path_in_every_norm_and_averages_gradients(place: Place, monkeypatch: pytest.MonkeyPatch):
    seen = []
    normalise = cpu_norm.combined_over_ranks
    monkeypatch.setattr(cpu_norm, "combined_over_ranks", lambda *given, **named: seen.append(1) or normalise(*given, **named))
    with crops.crop_step(crops.TINY, 4, place, precision=crops.EAGER, over_ranks=True) as step:
        step()
        norms = [module for module in step.__closure__[1].cell_contents.networks().byol.modules() if isinstance(module, ViewBatchNorm)]
        assert isinstance(step.__closure__[1].cell_contents.networks().model, DistributedDataParallel)
    assert len(seen) == len(norms)
    seen.clear()
    with crops.crop_step(crops.TINY, 4, place, precision=crops.EAGER) as step:
        step()
    assert not seen


def test_each_variant_is_given_out_as_it_ends_and_what_cannot_run_is_named(place: Place):
    *results, last = gpu_plan.measure_part("crops", place, True)
    assert set(last.skipped) == set(crops.variants(crops.TINY, place)) - {row.name for row in last.rows}
    assert all("CUDA" in why for result in results for why in result.skipped.values())
    assert [[row.name for row in result.rows][1:] for result in results] == [
        ["over ranks, eager, 4"],
        ["over ranks, eager, 4", f"{crops.RIVAL}, 4"],
        ["over ranks, eager, 4", f"{crops.RIVAL}, 4", "one process, eager, 6"],
    ]


def test_kinds_of_operations_are_told_by_their_names_with_their_bandwidth():
    names = ("aten::cudnn_convolution", "aten::batch_norm_elemt", "aten::addmm", "aten::_foreach_lerp_", "aten::copy_", "aten::relu_")
    kinds = ["convolution", "batch norm", "matrix product", "optimizer and target", "copies and casts", "ReLU, sums and the rest"]
    assert [kernels.kind_of(name) for name in names] == kinds
    # A kernel's time is at its operation, and again at its own event, whose C++ name has a '::'.
    events = [
        SimpleNamespace(key=key, device_type=device, self_device_time_total=3000.0, is_user_annotation=False)
        for key, device in (("aten::relu_", DeviceType.CPU), ("void at::native::vectorized_elementwise_kernel<4>", DeviceType.CUDA))
    ]
    assert sum(kernels.times_by_kind(events, on_gpu=True).values()) == 3.0
    found = kernels.table(Counter({"convolution": 6.0, "batch norm": 2.0}), Counter({"convolution": 12 * 10**9, "batch norm": 10**9}))
    assert found == {
        "convolution": "6.00 ms, 75% of the step; 12.00 GB, 2000 GB/s",
        "batch norm": "2.00 ms, 25% of the step; 1.00 GB, 500 GB/s",
    }


def test_a_step_is_divided_into_kinds_and_convolutions_are_among_them(place: Place):
    (result,) = gpu_plan.measure_part("kernels", place, True)
    assert isinstance(result, Findings)
    assert {"convolution", "batch norm", "matrix product"} <= set(result.found)


def test_what_can_be_checked_on_a_cpu_is_right_and_a_difference_is_called_wrong(place: Place):
    *_, result = gpu_plan.measure_part("correctness", place, True)
    assert isinstance(result, Findings)
    assert [text.split(":")[0] for text in result.found.values()] == ["not checked", "right", "not checked", "right"]
    assert correctness.verdict(0.5, most=0.1, unit="x") == "WRONG: differs by 0.5 x, at most 0.1 is rounding"
    assert correctness.verdict(math.nan, most=0.1, unit="x").startswith("WRONG")


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
    ],
)
def test_out_of_memory_errors_of_every_library_are_recognised(error: RuntimeError, is_memory: bool):
    assert is_out_of_memory(error) == is_memory


def test_the_largest_batch_shrinks_while_memory_runs_out_and_other_errors_stay_errors(monkeypatch: pytest.MonkeyPatch):
    tried: list[int] = []

    def peak(step: object, batch: int, device: torch.device) -> int:
        tried.append(batch)
        if batch > 448:
            raise RuntimeError("CUDA error: out of memory")
        return 2**30 * (2 + batch / 16)  # type: ignore[return-value]

    monkeypatch.setattr("benchmarks.gpu.subjects._peak_bytes", peak)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (2**30 * 40, 0))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 0)
    assert largest_batch(lambda _: None, torch.device("cuda")) == 448
    assert tried == [16, 48, 512, 448]  # 85 % of 40 GiB hold 512 by the line; then nine tenths of that, as a multiple of 32

    def broken(step: object, batch: int, device: torch.device) -> int:
        if batch > 48:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")
        return 2**30 * (2 + batch / 16)  # type: ignore[return-value]

    monkeypatch.setattr("benchmarks.gpu.subjects._peak_bytes", broken)
    with pytest.raises(RuntimeError, match="EXECUTION_FAILED"):
        largest_batch(lambda _: None, torch.device("cuda"))


@pytest.mark.parametrize("most", [4, 2])
def test_a_variant_that_does_not_fit_is_skipped_and_the_reference_takes_a_smaller_batch(most: int, monkeypatch: pytest.MonkeyPatch):
    class Limited(step.NoiseStep):
        def __init__(self, size: step.Size, precision: PrecisionConfig, batch: int, device: torch.device, *, search: bool = False) -> None:
            if (precision.autocast == "off" and batch > most) or (precision.autocast == "bf16" and not precision.channels_last):
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(size, precision, batch, device, search=search)

    monkeypatch.setattr(step, "NoiseStep", Limited)
    steps, subjects, skipped = step._variants(step.TINY, 8, torch.device("cpu"))
    assert list(steps) == [step.REFERENCE, step.OURS, step.SEARCHED]
    assert [subject.note for subject in subjects] == [f"batch {most}", "batch 8", "batch 8"]
    assert skipped == {"bf16, NCHW": "out of memory at batch 8"}


def test_a_back_end_that_fails_is_named_with_its_error():
    def broken() -> None:
        raise TypeError("tl.load()\ngot an unexpected argument")

    assert why_it_fails(lambda: None) == ""
    assert why_it_fails(broken) == "failed: TypeError: tl.load() got an unexpected argument"
    assert why_it_fails(lambda: require(False, "x", 1, "2")) == "x = 1: must be 2"
    skipped: dict[str, str] = {}
    assert list(captures({"good": lambda: 1, "bad": lambda: 1}, torch.device("cpu"), skipped)) == ["good", "bad"]
    assert skipped == {}


def test_the_largest_batch_is_where_the_line_through_two_peaks_meets_the_limit():
    gib = 2**30
    # 2 GiB fixed and 1/16 GiB an image: 40 GiB hold 608.
    assert fitting_batch({16: 3 * gib, 48: 5 * gib}, limit=40 * gib) == 608
    assert fitting_batch({16: 3 * gib, 48: 5 * gib}, limit=3 * gib) == 0
    assert fitting_batch({16: 3 * gib, 48: 5 * gib}, limit=1e15) == 2048


def test_short_work_is_repeated_until_a_sample_lasts_and_long_work_is_not():
    assert calls_for(0.001, enough_s=0.05) == 50
    assert calls_for(0.5, enough_s=0.05) == 1
    assert calls_for(1e-9, enough_s=0.05) == 200
    assert calls_for(0.001, enough_s=0) == 1


def test_images_made_by_several_processes_are_the_same_bytes(tmp_path: Path):
    one, two = (write_imagenet_like(tmp_path / str(n), images=4, classes=2, scale=0.1, workers=n) for n in (1, 2))
    files = sorted(path.relative_to(one) for path in one.rglob("*.jpg"))
    assert len(files) == 4
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
