"""Records of the benchmarks: compared, summed up, drawn, and quoted in README and docs."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the suite runs from a checkout and is not installed

from benchmarks import breakdown, compare, figures, plots, report  # noqa: E402
from benchmarks.cases import updates  # noqa: E402
from benchmarks.record import CaseResult, make_result  # noqa: E402
from benchmarks.record_file import new_record, newest_kept, read_record, results_of, write_record  # noqa: E402
from benchmarks.report import report_page  # noqa: E402
from benchmarks.report_text import headers, report_markdown  # noqa: E402
from benchmarks.timing import Subject, Timings  # noqa: E402
from fastbyol.config.errors import UserError  # noqa: E402

CEILING = (1.00, 1.02, 0.98, 1.01, 0.99, 1.00, 1.02, 0.98, 1.00)
"""Builds timings in milliseconds, one value per round; all subjects are multiples with their own jitter."""
JITTER = (1.00, 0.99, 1.01, 1.02, 0.98, 1.00, 0.99, 1.01, 1.00)


def times(factor: float, *, load: float = 1.0) -> Timings:
    values = tuple(load * factor * c * j for c, j in zip(CEILING, JITTER, strict=True))
    return Timings({"cpu": values, "wall": tuple(1.3 * value for value in values)})


def case(
    name: str = "loader", *, load: float = 1.0, unit: str = "image", device: str = "cpu", primary: str = "cpu", **factors: float
) -> CaseResult:
    """Builds rows 'reference', 'ceiling' and the given ones, each a multiple of the ceiling."""
    factors = {"reference": 8.0, **factors}
    timings = {"ceiling": Timings({"cpu": tuple(load * c for c in CEILING), "wall": tuple(1.3 * load * c for c in CEILING)})}
    timings |= {row: times(factor, load=load) for row, factor in factors.items()}
    subjects = [Subject(row, int) for row in timings]
    return make_result(
        name,
        "a title",
        subjects,
        timings,
        reference="reference",
        ceiling="ceiling",
        unit=unit,
        threads=1,
        settings=updates.Size(rounds=9),
        device=device,
        primary=primary,
    )


def named(result: CaseResult, **names: str) -> CaseResult:
    """Returns the record with rows renamed, since keywords cannot hold spaces."""
    return replace(result, rows=tuple(replace(row, name=names.get(row.name, row.name)) for row in result.rows))


def record_of(*results: CaseResult, quick: bool = False) -> dict[str, Any]:
    record = new_record(quick=quick, command="python -m benchmarks.run")
    record["cases"] = {result.case: result.as_dict() for result in results}
    return record


@pytest.fixture
def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """(before, after) records -> (exit code, what was printed)."""

    def run(before: dict[str, Any], after: dict[str, Any], *options: str) -> tuple[int, str]:
        for name, record in (("before", before), ("after", after)):
            (tmp_path / name).mkdir(exist_ok=True)
            write_record(tmp_path / name, record)
        code = 0
        try:
            compare.main([str(tmp_path / "before"), str(tmp_path / "after" / "records.json"), *options])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        out, err = capsys.readouterr()
        return code, out + err

    return run


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path):
    result = case(ours=2.0)
    write_record(tmp_path, record_of(result))
    (again,) = results_of(read_record(tmp_path))
    assert again == replace(result, settings=again.settings)
    assert again.row("ours").over_ceiling["cpu"].median == pytest.approx(2.0, rel=0.02)


def test_the_same_code_on_a_machine_twice_as_busy_compares_as_equal(compared):
    code, text = compared(record_of(case(ours=2.0)), record_of(case(ours=2.0, load=2.0)))
    assert code == 0
    assert "2 rows: 0 slower, 0 faster by more than 10%, 0 moved within the noise, 2 the same" in text


def test_a_slow_down_of_20_percent_in_the_loader_is_flagged_with_its_row(compared):
    before, after = (
        record_of(case(ours=2.0), case("ema", unit="update", ours=1.5)),
        record_of(case(ours=2.4), case("ema", unit="update", ours=1.5)),
    )
    code, text = compared(before, after)
    assert code == 1
    assert re.search(r"loader .* ours .*\+20%.*\+20%.*slower", text)
    assert "1 slower" in text
    assert compared(before, after, "--slower_than", "0.25")[0] == 0
    code, text = compared(after, before)
    assert code == 0
    assert "1 faster" in text


def test_a_ceiling_that_moved_alone_flags_the_reference_and_no_subject(compared):
    """Everything except the ceiling takes 20 % longer, due to shared code or the machine: one finding, not one per row."""
    code, text = compared(record_of(case(ours=2.0, other=3.0)), record_of(case(reference=9.6, ours=2.4, other=3.6)))
    assert code == 1
    assert "1 slower" in text
    assert re.search(r"reference .*slower", text)


def test_a_difference_that_is_large_but_within_the_intervals_does_not_count(compared):
    wide = case(ours=2.0)
    rows = tuple(
        replace(row, over_ceiling={clock: replace(e, low=0.5 * e.low, high=2 * e.high) for clock, e in row.over_ceiling.items()})
        for row in wide.rows
    )
    code, text = compared(record_of(replace(wide, rows=rows)), record_of(case(ours=2.5)))
    assert code == 0
    assert "1 moved within the noise" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["provenance"].update(cpu="another"), "the machine's cpu is"),
        (lambda r: r["provenance"].update(gpu="NVIDIA H100"), "the machine's gpu is None before and NVIDIA H100 after"),
        (lambda r: r.update(quick=True), "one has quick settings"),
        (lambda r: r.update(format=2), "format 2, and this checkout knows 1"),
        (lambda r: r.pop("provenance"), "not a record"),
        (lambda r: r["cases"]["loader"].update(case="ema"), "no case in both (before: loader; after: ema)"),
        (lambda r: r["cases"]["loader"].update(threads=4), "threads of loader is 1 before and 4 after"),
        (lambda r: r["cases"]["loader"]["rows"][1].update(name="another"), "the reference of loader is reference before and another after"),
        (
            lambda r: r["cases"]["loader"]["settings"]["model"].update(encoder="resnet18"),
            "settings of loader, model, encoder is resnet50 before",
        ),
    ],
)
def test_records_that_cannot_be_compared_are_refused_with_the_difference(compared, change: Any, message: str):
    after = json.loads(json.dumps(record_of(case(ours=2.0)) | {"start_s": 0.0}))
    change(after)
    code, text = compared(record_of(case(ours=2.0)), after)
    assert code == 2
    assert message in text
    assert text.count("\n") == 1


def test_more_rounds_are_comparable_and_rows_or_cases_of_one_side_are_named(compared):
    before, after = record_of(case(ours=2.0, gone=3.0)), record_of(case(ours=2.0), case("ema", unit="update", ours=2.0))
    after["cases"]["loader"]["settings"]["rounds"] = 15
    code, text = compared(before, after)
    assert code == 0
    assert "not compared: loader, gone: before only" in text
    assert "not compared: ema: after only" in text


@pytest.mark.parametrize(("newer", "value"), [("after", False), ("before", "none")])
def test_a_setting_that_one_version_of_the_code_lacks_is_named_and_refuses_nothing(compared, newer: str, value: object):
    records = {when: json.loads(json.dumps(record_of(case(ours=2.0)) | {"start_s": 0.0})) for when in ("before", "after")}
    records[newer]["cases"]["loader"]["settings"]["model"]["later"] = value
    code, text = compared(records["before"], records["after"])
    assert code == 0
    text = " ".join(text.split())
    assert f"note: settings of loader, model, later: {value} {newer}, unknown to the other version of the code" in text
    assert "unknown to the other" not in compared(records["after"], records["after"])[1]


def test_a_machine_that_was_much_busier_in_one_of_the_runs_is_noted(compared, monkeypatch: pytest.MonkeyPatch):
    before, after = (record_of(case(ours=2.0)) | {"load_average": {"start": [load, 1.0, 1.0]}} for load in (12.0, 3.0))
    monkeypatch.setattr("os.getloadavg", lambda: (2.0, 1.0, 1.0))  # at the end of both
    assert "note: load average 12.0 before, 3.0 after" in compared(before, after)[1]
    assert "load average" not in compared(before, before)[1]


def test_a_file_that_is_no_record_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text.json").write_text("not json")
    write_record(tmp_path, record_of(case(ours=2.0)))
    whole = json.loads((tmp_path / "records.json").read_text())
    (tmp_path / "cut.json").write_text(json.dumps({**whole, "provenance": {"cpu": "x"}}))
    (tmp_path / "edited.json").write_text(json.dumps({**whole, "cases": {"loader": {"rows": [{"name": "ours"}]}}}))
    for path, message in (
        (tmp_path / "text.json", "not JSON"),
        (tmp_path / "none", "cannot be read"),
        (tmp_path / "cut.json", "a damaged record, without command, commit, versions, cores, gpu"),
        (tmp_path / "edited.json", "a damaged record"),
    ):
        with pytest.raises(SystemExit) as stopped:
            compare.main([str(path), str(path)])
        err = capsys.readouterr().err
        assert (stopped.value.code, err.count("\n")) == (2, 1)
        assert message in err


def loader_case() -> CaseResult:
    factors = {"decode": 1.1, "crops": 1.8, "views": 3.0, "slow": 4.0}
    names = {"decode": "ffcv: decode only", "crops": "ffcv: crops", "views": "ffcv: views", "slow": "folder: views"}
    return named(case(**factors), **names, reference="torchvision on Pillow: views")


def test_the_loaders_shares_are_the_time_that_each_stage_adds():
    shares = breakdown.loader_shares(loader_case())
    assert list(shares) == ["ffcv"]  # the folder's stages were not all measured
    assert list(shares["ffcv"].values()) == pytest.approx([1.1, 0.7, 1.2], rel=0.02)


def test_a_waterfall_goes_from_the_reference_to_ours_by_the_rows_that_there_are():
    steps = breakdown.waterfall(loader_case())
    assert [new for new, _ in steps] == ["torchvision on Pillow: views", "one decode, fused kernel", "TurboJPEG from a .beton"]
    assert [ms for _, ms in steps] == pytest.approx([8.0, 4.0, 3.0], rel=0.02)
    assert breakdown.waterfall(case("ema", unit="update", ours=2.0)) == []


def test_a_last_change_that_made_it_slower_is_not_part_of_the_waterfall():
    fast, slow = "bf16, channels-last", "bf16, channels-last, compiled"
    for ours, other, ends_with in ((2.0, 3.0, "bf16"), (3.0, 2.0, "compiled")):
        result = named(case("step", ours=ours, other=other), ours=fast, other=slow)
        assert breakdown.waterfall(result)[-1][0] == ends_with


def end_to_end(ours: float, *, alone: float = 1.0, folder_alone: float = 1.0) -> CaseResult:
    result = case("end_to_end", primary="wall", ours=ours, alone=alone, other=folder_alone)
    names = {"ours": "ffcv: end to end", "alone": "ffcv: loader alone", "other": "folder: loader alone", "ceiling": "steps alone"}
    return named(result, **names)


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (end_to_end(1.0), "compute-bound: 1.00 x the steps alone"),
        (end_to_end(2.0, alone=1.9, folder_alone=3.0), "Next: 1.9 times the data.workers."),
        (end_to_end(2.0, alone=1.9, folder_alone=0.5), "Next: backend folder, or 1.9 times the data.workers."),
        (end_to_end(1.5, alone=0.5), "Next: a core for each loader thread"),
    ],
)
def test_the_verdict_names_the_limit_and_the_next_thing_to_change(result: CaseResult, says: str):
    (sentence,) = breakdown.verdict([result])
    assert says in sentence
    assert sentence.startswith("end_to_end, ffcv: end to end: ")


def test_a_record_without_training_from_files_gives_no_verdict():
    (sentence,) = breakdown.verdict([loader_case()])
    assert "does not say whether data or the step is the limit" in sentence


def with_extra(result: CaseResult, **extra: dict[str, float]) -> CaseResult:
    return replace(result, rows=tuple(replace(row, extra=extra.get(row.name, {})) for row in result.rows))


def test_the_roofline_has_each_rows_operations_per_byte_under_both_measured_roofs():
    """A step of 2 CPU-ms an image at 50 GFLOP/s does 0.1 GFLOP; with 4 MB moved that is 25 operations a byte."""
    result = with_extra(
        case("step", ours=2.0, copy=0.5),
        ours={"GFLOP/CPU-s": 50.0, breakdown.MEGABYTES: 4.0},
        ceiling={"GFLOP/CPU-s": 100.0},
        copy={breakdown.COPIED: 8.0},
    )
    found = breakdown.roofline(result)
    assert found is not None
    (point,) = found.points
    assert (point.name, point.rate) == ("ours", 50.0)
    assert point.intensity == pytest.approx(25.0, rel=0.02)
    assert (found.peak, found.bandwidth, found.unit) == (100.0, 8.0, "GFLOP/CPU-s")
    assert plots.roofline(found).startswith(b"\x89PNG")
    assert breakdown.roofline(loader_case()) is None


def test_on_a_gpu_the_roofline_is_by_the_wall_clock_and_in_tflop():
    """2.6 wall-ms at 50 TFLOP/s are 130 GFLOP; over 1,300 MB that is 100 operations a byte. A roof of 3,000 GB/s is 3 TFLOP/s for each."""
    result = with_extra(
        case("gpu.step", device="cuda", primary="wall", ours=2.0, copy=0.5),
        ours={"TFLOP/s": 50.0, breakdown.MEGABYTES: 1300.0},
        ceiling={"TFLOP/s": 700.0},
        copy={breakdown.COPIED: 3000.0},
    )
    found = breakdown.roofline(result)
    assert found is not None
    assert found.points[0].intensity == pytest.approx(100.0, rel=0.02)
    assert found.bandwidth == 3.0


def test_the_headline_is_the_fastest_row_by_the_cases_own_clock_with_its_share_of_the_peak():
    result = named(case("step", ours=2.0), ours="bf16, channels-last")
    rows = tuple(replace(row, extra={"% of peak": 43.3} if row.name == "bf16, channels-last" else {}) for row in result.rows)
    found = breakdown.headlines([replace(result, rows=rows)], owner_of={"step": "CPU process (1 thread)"})
    assert [headline.value for headline in found] == ["385", "43.3%"]
    quick, slow = (named(case(ours=factor), ours=name) for factor, name in ((2.0, "ffcv: views"), (3.0, "dali: views")))
    wall = {"cpu": slow.row("dali: views").ms["cpu"], "wall": quick.row("ffcv: views").ms["cpu"]}  # a lull by the wall clock
    both = replace(quick, rows=(*quick.rows, replace(slow.row("dali: views"), ms=wall)))
    assert "ffcv: views" in breakdown.headlines([both], owner_of={"loader": "CPU process (1 thread)"})[0].meaning


def test_extra_figures_of_a_row_are_described_in_words():
    result = with_extra(case(ours=2.0), ours={"data_wait_share": 0.0271, "mfu": 0.165, "GB/s": 12.0})
    assert report.cells(result, result.row("ours"))[-1] == "data wait 2.7%; MFU 16.5%; GB/s 12.0"


def test_scaling_points_are_the_ranks_in_order_with_images_per_s_of_all():
    result = named(case("scaling", primary="wall", two=0.5, quiet=0.45), reference="1 rank", two="2 ranks", quiet="2, nobody speaks")
    points = breakdown.scaling_points(result)
    assert [point.ranks for point in points] == [1, 2]
    assert points[1].images_per_s == pytest.approx(1000 / (1.3 * 0.5), rel=0.03)


def test_the_page_is_one_file_with_headline_plots_and_every_row():
    results = [loader_case(), end_to_end(1.0), named(case("scaling", primary="wall", two=0.5), reference="1 rank", two="2 ranks")]
    record = json.loads(json.dumps(record_of(*results)))
    record |= {"seconds": 1.0, "load_average": {"start": [1, 1, 1], "end": [1, 1, 1]}, "skipped": {"lars": "torch-optimizer <is> missing"}}
    html = report_page(record, results)
    assert "http://" not in html
    assert "https://" not in html
    assert "<script" not in html
    assert html.count("data:image/png;base64,") == 3 + 1 + 2  # waterfall, shares and bars; bars; curve and bars
    assert "images/s per CPU process (1 thread), two views loaded: ffcv: views" in html
    assert "compute-bound" in html
    assert "torch-optimizer &lt;is&gt; missing" in html
    assert "say nothing about images/s per GPU" in html
    for result in results:
        for row in result.rows:
            assert f"<td>{row.name}" in html


def test_a_rate_names_its_gpu_or_its_cpu_process_and_never_the_other():
    for device, owner, other in (("cpu", "CPU process (1 thread)", "per GPU"), ("cuda", "GPU", "CPU process")):
        result = case("gpu.end_to_end", device=device, primary="wall", ours=2.0)
        titles = headers(result)
        assert f"images/s per {owner}" in titles
        assert not any(other in title for title in titles)


def test_mfu_stands_beside_the_rate_of_the_row_that_has_it():
    result = named(case("gpu.step", device="cuda", primary="wall", ours=2.0), ours="bf16, channels-last")
    rows = tuple(replace(row, extra={"mfu": 0.165}) if row.name == "bf16, channels-last" else row for row in result.rows)
    found = breakdown.headlines([replace(result, rows=rows)], owner_of={"gpu.step": "GPU"})
    assert [headline.value for headline in found] == ["385", "16.5%"]  # 1000 / (1.3 * 2)
    assert found[0].meaning.startswith("images/s per GPU, training step: bf16, channels-last")


def test_reports_are_made_anew_from_a_kept_record(tmp_path: Path):
    kept = newest_kept("loader")
    assert kept is not None
    (tmp_path / "records.json").write_bytes((kept / "records.json").read_bytes())
    report.main([str(tmp_path)])
    assert "| TurboJPEG: decode only, bytes in memory (ceiling) |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_the_memory_ceiling_is_never_quoted_as_images_per_s(tmp_path: Path):
    result = case("gpu.step", device="cuda", primary="wall", ours=2.0, copy=0.5)
    rows = tuple(replace(row, role="memory ceiling" if row.name == "copy" else row.role) for row in result.rows)
    (tmp_path / "a").mkdir()
    write_record(tmp_path / "a", record_of(replace(result, rows=rows)))
    table = figures.gpu_rates_table(tmp_path)
    assert "| a title | ours | 385 |" in table
    assert "copy" not in table


def test_the_newest_full_record_that_has_the_case_is_taken(tmp_path: Path):
    for name, started, quick, has in (
        ("a", "2026-01-01", False, "ema"),
        ("b", "2026-02-01", False, "lars"),
        ("c", "2026-03-01", True, "ema"),
    ):
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, record_of(case(has, unit="update", ours=2.0), quick=quick) | {"started": started})
    newest = newest_kept("ema", folder=tmp_path)
    assert newest is not None
    assert newest.name == "a"
    assert newest_kept("step", folder=tmp_path) is None


def test_a_record_of_another_format_is_refused(tmp_path: Path):
    write_record(tmp_path, record_of() | {"format": 7})
    with pytest.raises(UserError, match="format 7"):
        read_record(tmp_path)


def test_findings_and_clocks_are_in_the_markdown():
    record = json.loads(json.dumps(record_of()))
    record |= {"seconds": 1.0, "load_average": {"start": [1, 1, 1], "end": [1, 1, 1]}}
    record["findings"] = {"gpu.syncs": {"title": "does the host wait?", "found": {"backward": "no wait"}}}
    record["machine"]["gpus"] = [{"name": "NVIDIA H100", "clocks.max.sm": "1980 MHz"}]
    text = report_markdown(record, [])
    assert "| backward | no wait |" in text
    assert "name NVIDIA H100, clocks.max.sm 1980 MHz" in text
    assert "GiB memory" in text
    for fast, said in ((True, False), (False, True)):
        record["machine"]["bf16_on_cpu"] = fast
        assert ("this CPU has no instructions for bf16" in report_markdown(record, [])) == said
