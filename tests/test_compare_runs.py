"""python -m fastbyol compare: a real run beside copies of it that were changed by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastbyol.__main__ import main
from fastbyol.evaluation.figures import TRAINING_PANELS, Curve, overlaid
from fastbyol.evaluation.result_file import LabelFreeResult, ProtocolResult, SubjectResult, SubjectScore, TaskResult, write_result
from fastbyol.evaluation.run_comparison import ComparedRun, read_runs
from fastbyol.exports.card import _scores
from fastbyol.run.folder import DIVERGED_FILE, LOCK_FILE, locked_run_folder, note_divergence, read_config, write_config

SCORES = {"first": 0.6, "second": 0.75}


@pytest.fixture
def runs(colours_run: Path, tmp_path: Path) -> dict[str, Path]:
    """A run of six steps and two epochs, and a copy with another tau, more log lines and a higher accuracy."""
    found = {name: tmp_path / name for name in SCORES}
    for name, top1 in SCORES.items():
        shutil.copytree(colours_run, found[name], ignore=shutil.ignore_patterns("evaluation", "tensorboard"))
        scores = {"byol": SubjectScore(top1, 1.0, 64, 1.0), "untrained": SubjectScore(0.5, 1.0, 64, 1.0)}
        write_result(ProtocolResult("linear", scores, 72, 24, 3, 1 / 3, {"seed": 0}), found[name] / "evaluation", data="colours", step=18)
    config = read_config(found["second"])
    write_config(found["second"], replace(config, log_every=7, optim=replace(config.optim, tau_base=0.625)))
    return found


def compare(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr."""
    try:
        main(["compare", *map(str, arguments)])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def read(*folders: Path) -> list[ComparedRun]:
    return read_runs([*map(str, folders)]).runs


def change_log(run: Path, change: Callable[[list[dict[str, object]]], list[dict[str, object]]]) -> None:
    path = run / "metrics.jsonl"
    records = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_page_has_what_differs_the_scores_and_every_curve_and_nothing_from_outside(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    code, said, errors = compare(capsys, *runs.values(), "--out", out)
    assert (code, errors) == (0, "")
    html = out.read_text()
    assert re.findall(r'<section id="(\w+)">', html) == ["overview", "differences", "curves", "scores", "speed", "commands"]
    assert not re.search(r'(?:src|href)="(?!data:(?:image/png;base64)?,)|url\(|<script|@import|https?://', html)
    differences = html[html.index('id="differences"') : html.index('id="curves"')].replace("<wbr>", "")
    options = re.findall(r"<tr><td>([\w.]+)</td><td>(.*?)</td><td>(.*?)</td></tr>", differences)
    assert options == [("optim.tau_base", "0.8", "<b>0.625</b>"), ("log_every", "1", "<b>7</b>")]
    assert differences.index("tau_base") < differences.index("Without effect on what is learnt") < differences.index("log_every")
    scores = html[html.index('id="scores"') : html.index('id="speed"')]
    assert '<td class="number">60.0 %</td><td class="number"><b>75.0 %</b></td>' in scores
    assert '<td>top-1, untrained encoder</td><td class="number">50.0 %</td><td class="number">50.0 %</td>' in scores
    # Of 24 images, sqrt(0.6 * 0.4 / 24) = 0.1 and sqrt(0.75 * 0.25 / 24) = 0.088; the middle is 9.4 points.
    assert "With so many images, one standard deviation of an accuracy is 9.4 points" in scores
    for title in ("loss (0 = views agree, 8 = opposite)", "linear probe on the fly, top-1", "effective rank of the projections"):
        assert html.count(f'alt="{title}"') == 1
    assert "Best linear on colours: second, 75.0 %" in said
    assert "  second: optim.tau_base 0.625 (0.8)" in said
    assert re.search(r"first +complete +18 +60\.0", said)


def test_all_kinds_of_results_stand_beside_each_other_and_those_of_other_images_apart(runs, tmp_path, capsys):
    for name, run in runs.items():
        folder, top1 = run / "evaluation", SCORES[name]
        write_result(
            LabelFreeResult("labelfree", {"byol": {"rankme": 30 * top1, "alignment": 1 - top1}}, 72, 24, {}),
            folder,
            data="colours",
            step=18,
        )
        subjects = {"byol": SubjectResult("BYOL", {"iou": top1, "rms": top1}, 1.0), "untrained": SubjectResult("random", {"iou": 0.1}, 1.0)}
        task = TaskResult("depth", "quick", {"identity": name}, {"iou": "mean IoU %", "rms": "-rms (m)"}, subjects, {"test": 9})
        write_result(task, folder, data="nyu", step=18)
    third = shutil.copytree(runs["first"], tmp_path / "third", ignore=shutil.ignore_patterns("evaluation"))
    other = ProtocolResult("linear", {"byol": SubjectScore(0.9, 1.0, 64, 1.0)}, 10, 10, 2, 0.5, {"seed": 0})
    write_result(other, third / "evaluation", data="elsewhere", step=12)
    found = read_runs([str(run) for run in (*runs.values(), third)])
    groups = {group.title: group for group in found.score_groups()}
    assert list(groups) == ["linear on colours", "linear on elsewhere", "without labels on colours", "depth on nyu"]
    assert groups["without labels on colours"].best("alignment") == set(), "a collapsed run has the closest views"
    assert groups["without labels on colours"].best("RankMe") == set()
    depth = groups["depth on nyu"]
    assert depth.measures() == ["mean IoU", "rms (m)", "mean IoU, random"]
    assert (depth.best("mean IoU"), depth.best("rms (m)")) == ({1}, {0})
    assert depth.scores[1].figures["mean IoU"].text == "75.0 %"
    assert groups["linear on elsewhere"].best("top-1") == set(), "one run alone is not the best"
    _, said, _ = compare(capsys, *runs.values(), third)
    assert re.search(r"third +complete +18 +90\.0\*", said)
    assert "*: on other images or with other settings than the rest of the column (linear on colours)" in said
    assert "evaluated at an earlier step than the last one of the run: third's linear at step 12" in said


def test_of_three_results_on_images_that_have_changed_the_newest_is_compared_and_stands_on_the_card(runs):
    folder = runs["first"] / "evaluation"
    for number, top1 in enumerate((0.1, 0.2, 0.3)):
        task = TaskResult(
            "semi", "quick", {"identity": str(number)}, {"top1": "top-1 %"}, {"byol": SubjectResult("BYOL", {"top1": top1}, 1.0)}, {}
        )
        path = write_result(task, folder, data="photos", step=18, inputs=f"weights {number}", seed=0)
        os.utime(path, ns=(0, 10**18 + number))
    (group,) = (group for group in read_runs([str(run) for run in runs.values()]).score_groups() if group.protocol == "semi")
    assert group.scores[0].figures["top-1"].value == 0.3
    run = SimpleNamespace(results=folder, step=18, state={})
    semi = [row for row in _scores(run, "weights") if row["task"].startswith("semi")]
    assert semi == [{"task": "semi (quick settings, seed 0)", "data": "photos", "figures": {"byol": {"top-1 %": 30.0}}}]


def test_how_each_run_ended_is_told_from_its_log_its_lock_and_its_note(runs, tmp_path):
    first, second = runs.values()
    complete, _ = read(first, second)
    assert (complete.outcome.word, complete.outcome.text) == ("complete", "step 18, epoch 2 of 2")
    with locked_run_folder(first):
        assert read(first, second)[0].outcome.word == "running"
        assert " by process " in read(first, second)[0].outcome.text
    change_log(first, lambda records: records[:7])
    shutil.rmtree(first / "checkpoints")
    stopped = read(first, second)[0].outcome
    assert (stopped.word, stopped.text, stopped.steps) == ("stopped", "step 7, epoch 0.778 of 2", 7)
    change_log(first, lambda records: [record | {"alarm": "collapse since step 3" if record["step"] >= 5 else None} for record in records])
    collapsed = read(first, second)[0].outcome
    assert (collapsed.word, collapsed.text) == ("collapsed", "stopped at step 7, epoch 0.778 of 2; alarm of collapse since step 6")
    note_divergence(first, "the loss is not finite\nin step 8")
    assert read(first, second)[0].outcome.word == "diverged"
    assert read(first, second)[0].outcome.text == "step 7, epoch 0.778 of 2: the loss is not finite in step 8"
    (first / DIVERGED_FILE).write_text("collapse: since step 3 every image gets the same projection")
    assert read(first, second)[0].outcome.word == "collapsed"
    write_config(second, replace(read_config(second), epochs=0, steps=40))
    assert read(first, second)[1].outcome.text == "step 18 of 40"
    assert (first / LOCK_FILE).exists()


def test_runs_of_other_batches_are_drawn_over_epochs_and_of_other_images_said_to_be(runs, capsys):
    second = runs["second"]
    config = read_config(second)
    assert read_runs([*map(str, runs.values())]).x_axis()[0] == "step"
    write_config(second, replace(config, global_batch=16, data=replace(config.data, train="elsewhere")))
    found = read_runs([*map(str, runs.values())])
    assert found.x_axis() == ("epoch", "passes over a run's own images, because the runs have batches of different sizes")
    assert "the runs saw different images" in compare(capsys, *runs.values())[1]


def test_what_is_damaged_or_missing_is_named_and_the_rest_is_compared(runs, capsys):
    first, second = runs.values()
    (first / "evaluation" / "knn.json").write_text('{"protocol": "kn')
    linear = json.loads((second / "evaluation" / "linear.json").read_text())
    linear["scores"]["byol"]["top1"] = "most of them"
    (second / "evaluation" / "linear.json").write_text(json.dumps(linear))
    (second / "metrics.jsonl").unlink()
    code, said, errors = compare(capsys, first, second)
    assert code == 0
    lines = errors.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{first}/evaluation/knn.json: not an evaluation result")
    assert lines[1] == f"{second}/metrics.jsonl: no logged step yet, so second has no curves and no speed"
    assert lines[2].startswith(f"{second}/evaluation/linear.json: not an evaluation result ('most of them' is not a number)")
    assert re.search(r"second +\w+ +18 +- +- +- +- +- +-", said)
    assert "not evaluated yet: second" in said


def test_runs_of_one_name_are_told_apart_by_their_folders(runs, tmp_path):
    again = shutil.copytree(runs["first"], tmp_path / "more" / "first")
    assert [run.name for run in read(runs["first"], again)] == [f"{tmp_path.name}/first", "more/first"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["FIRST"], "give two run folders or more"),
        (["FIRST", "FIRST"], "is given twice; leave one out"),
        (["FIRST", "FIRST/../first"], "is given twice, as "),
        (["FIRST", "nowhere"], "nowhere: is not a run folder (no such folder)"),
        (["FIRST", "FIRST/config.yaml"], "is not a run folder (it is a file; */ names folders only)"),
        (["FIRST", "FIRST/evaluation"], "is not a run folder (it has no config.yaml)"),
        (["FIRST", "BROKEN"], "is not readable as a run's config"),
        (["FIRST", "SECOND", "--out", "page.txt"], "--out page.txt: must end in .html"),
        (["FIRST", "SECOND", "--out", "SECOND.html/page.html"], "page.html: cannot be written (there is no folder "),
        (["FIRST", "SECOND", "--preset", "x"], "--preset"),
        ([], "RUN"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(arguments, said, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = shutil.copytree(runs["first"], tmp_path / "broken")
    (broken / "config.yaml").write_text("epochs: [")
    before = sorted(tmp_path.rglob("*"))
    names = {"FIRST": runs["first"], "SECOND": runs["second"], "BROKEN": broken}
    filled = [re.sub("|".join(names), lambda found: str(names[found[0]]), argument) for argument in arguments]
    code, out, errors = compare(capsys, *filled)
    assert (code, out, len(errors.splitlines())) == (2, "", 1)
    assert errors.startswith("fastbyol: error: ")
    assert said in errors
    assert sorted(tmp_path.rglob("*")) == before


def test_a_curve_without_finite_values_is_left_out_and_rare_points_of_a_long_log_are_kept(runs):
    panels = {panel.key: panel for panel in TRAINING_PANELS}
    nothing = Curve([{"step": 1, "loss": None}, {"step": 2, "loss": float("inf")}])
    assert overlaid([nothing], panels["loss"], x="step", x_title="step") is None
    rare = Curve([{"step": step, "knn_top1": 0.5 if step == 4999 else None} for step in range(10_000)])
    png = overlaid([nothing, rare], panels["knn_top1"], x="step", x_title="step")
    assert png is not None
    assert png.startswith(b"\x89PNG")
