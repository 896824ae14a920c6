"""The paper's tables by one command: what each row runs at either scale, records, and the command itself on a tiny set."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastbyol.__main__ import main
from fastbyol.commands.reproduce import _base
from fastbyol.config.errors import UserError
from fastbyol.config.presets import PRESETS, preset_config
from fastbyol.host.durable_files import locked_file
from fastbyol.host.signals import StopRequest
from fastbyol.reproduction.records import (
    Record,
    Setup,
    check_same_images,
    read_record,
    read_records,
    read_setup,
    record_path,
    write_record,
    write_setup,
)
from fastbyol.reproduction.results import table_results
from fastbyol.reproduction.rows import row_config
from fastbyol.reproduction.runner import PlannedRun, Runner, Stopped, StorageFull, part_of, planned_runs
from fastbyol.reproduction.tables import TABLES, Row, preset_of
from fastbyol.run.folder import CONFIG_FILE, LOCK_FILE, note_divergence, read_config, write_config
from tests.commands import SMALL_RUN, files_no_larger_than

BASE, DEMO, SCENES = (preset_config(name) for name in ("r50_300ep", "cpu_demo", "cpu_demo_scenes"))


def _rows(table: str, method: str = "BYOL") -> dict[str, float | None]:
    return {row.run: row.paper_top1 for row in TABLES[table].rows if row.method == method}


def test_the_tables_hold_the_papers_figures():
    """Copied from the paper: tables 5a, 5b and 19, 14, 16 and 17; the first row of each is its base."""
    batches = (4096, 2048, 1024, 512, 256, 128, 64)
    assert list(_rows("batch").values()) == [72.5, 72.4, 72.2, 72.2, 71.8, 69.6, 59.7]
    assert list(_rows("batch", "SimCLR").values()) == [67.9, 67.8, 67.4, 66.5, 64.3, 63.6, 59.2]
    assert [int(row.cells[1]) for row in TABLES["batch"].rows] == [*batches, *batches]
    views = list(_rows("augmentations").values())
    assert views == [72.5, 71.9, 71.2, 63.4, 71.8, 70.3, 72.4, 72.3, 72.2, 72.5, 59.4, 60.1, 70.7, 61.1]
    views = list(_rows("augmentations", "SimCLR").values())
    assert views == [67.9, 67.3, 65.2, 45.7, 63.7, 61.9, 67.5, 67.7, 67.4, 68.1, 40.3, 40.2, 64.2, 41.7]
    assert list(_rows("tau").values()) == [18.8, 69.8, 72.5, 68.4, 0.3]
    assert sorted(_rows("infonce").values(), reverse=True) == [72.5, 70.9, 70.7, 70.2, 69.4, 69.2, 69.1, 5.5, 0.3, 0.2, 0.1, 0.1]
    assert list(_rows("depth").values()) == [61.9, 65.0, 65.7, 71.5, 72.5, 71.4, 71.4, 72.1, 72.1]
    assert list(_rows("width").values()) == [69.9, 71.3, 72.2, 72.5, 72.5, 72.6]
    assert _rows("weight_decay")["wd_0"] is None, "the paper's run diverged"


def _all_rows() -> list[Row]:
    return list({row.run: row for table in TABLES.values() for row in table.rows}.values())


def test_at_the_papers_scale_every_row_is_its_preset():
    for row in _all_rows():
        assert row_config(row.run, scale="paper", base=BASE, ranks=8).config == preset_config(preset_of(row.run)), row.run


def test_no_two_runs_of_the_paper_are_the_same_run():
    """Tables 5a, 19 and 21 have one of them each, with figures of their own: the online network, its gradient stopped, is the target."""
    configs = [replace(preset_config(preset_of(row.run)), out="") for row in _all_rows()]
    assert [config for place, config in enumerate(configs) if config in configs[:place]] == []
    shared = {
        name: next(row.paper_top1 for row in TABLES[name].rows if row.run == "tau_0") for name in ("tau", "infonce", "predictor_rate")
    }
    assert shared == {"tau": 0.3, "infonce": 5.5, "predictor_rate": 5.5}


def test_batch_norm_sees_as_many_images_on_any_number_of_ranks():
    for ranks in (1, 2, 16):
        config = row_config("batch_512", scale="paper", base=BASE, ranks=ranks).config
        assert config is not None
        assert config.rank_batch * ranks == 512


@pytest.mark.parametrize(
    ("run", "base", "changes"),
    [
        ("byol", DEMO, {}),
        ("batch_512", DEMO, {"rank_batch": 8}),
        ("tau_0.999", DEMO, {"optim.tau_base": 0.999}),
        ("tau_0", DEMO, {"objective.target": "stop_gradient", "monitors.stop_on_collapse": False}),
        ("projection_dim_64", DEMO, {"model.projection_dim": 32}),
        ("lr_0.1", DEMO, {"optim.base_lr": pytest.approx(8.0 / 3)}),
        ("depth_1_3", DEMO, {"model.projector_layers": 1, "model.predictor_layers": 3}),
        ("simclr", DEMO, {"model.predictor_layers": 0, "objective.beta": 1.0, "objective.target": "online"}),
        ("r50x3_1000ep", DEMO, {"model.width": 3}),
        (
            "views_no_colour",
            SCENES,
            {**{f"views.view{i}.jitter_p": 0.0 for i in (1, 2)}, **{f"views.view{i}.gray_p": 0.0 for i in (1, 2)}},
        ),
        (
            "views_crop_colour",
            SCENES,
            {**{f"views.view{i}.flip_p": 0.0 for i in (1, 2)}, **{f"views.view{i}.rotation_deg": 0.0 for i in (1, 2)}},
        ),
    ],
)
def test_at_demo_scale_a_row_makes_the_same_change_to_the_recipe(run, base, changes):
    assert dict(row_config(run, scale="demo", base=base).changes) == changes


@pytest.mark.parametrize(
    ("run", "why"),
    [
        ("batch_64", "batch norm would see 1 of the 64 images"),
        ("views_no_blur", "the recipe is like this already"),
        ("simclr_views_no_blur", "the recipe is like this already"),
        ("views_symmetric", "both views of the recipe are alike already"),
        ("views_crop_blur", "the recipe does not have blur"),
        ("r101x2_1000ep", "depth of the paper's encoders does not carry over"),
    ],
)
def test_a_row_without_meaning_at_demo_scale_says_why(run, why):
    choice = row_config(run, scale="demo", base=SCENES)
    assert choice.config is None
    assert row_config("views_no_colour", scale="demo", base=SCENES).config is not None
    assert "no grayscale" in row_config("views_no_colour", scale="demo", base=DEMO).left_out
    assert why in choice.left_out


def test_simclr_is_found_by_its_name_at_both_scales(capsys):
    main(["presets", "simclr"])
    listed = capsys.readouterr().out
    for name, base in (("simclr_r50_300ep", BASE), ("cpu_demo_simclr", DEMO), ("cpu_demo_scenes_simclr", SCENES)):
        assert f"\n{name}\n" in f"\n{listed}"
        config = preset_config(name)
        assert (config.model.predictor_layers, config.objective.target, config.objective.beta) == (0, "online", 1.0)
        assert replace(config, model=base.model, objective=base.objective) == base
    assert PRESETS["simclr_r50_300ep"].expected.startswith("69.4 ")


def _record(run: str = "tau_0", **values: object) -> Record:
    return replace(Record(run, 0, "complete", DEMO, scores={"linear": 0.75}), **values)  # type: ignore[arg-type]


def test_a_record_is_read_back_and_a_damaged_one_is_named_and_left_out(tmp_path, caplog):
    write_record(tmp_path, _record())
    assert read_record(record_path(tmp_path, "tau_0", 0)) == _record()
    for name, text in (("a", "{"), ("b", '{"run": "x"}'), ("c", json.dumps([]))):
        (tmp_path / "records" / f"{name}.json").write_text(text)
    assert read_records(tmp_path) == [_record()]
    assert [record.message.split(": is not the record of a run")[0][-6:] for record in caplog.records] == ["a.json", "b.json", "c.json"]


@pytest.mark.parametrize("part", ["status", "scores"])
def test_a_record_with_impossible_values_is_refused(tmp_path, part):
    write_record(tmp_path, _record())
    path = record_path(tmp_path, "tau_0", 0)
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, part: {"linear": "much"} if part == "scores" else "fine"}))
    with pytest.raises(UserError, match=r"tau_0-seed0\.json: is not the record of a run \(.*delete it"):
        read_record(path)


def test_machines_share_the_runs_without_gap_or_overlap():
    runs = [PlannedRun(f"r{i}", 0, DEMO, record=None) for i in range(11)]
    parts = [part_of(runs, [f"{i}/4"]) for i in range(4)]
    assert sorted((run.run for part in parts for run in part), key=lambda name: int(name[1:])) == [run.run for run in runs]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert part_of(runs, ["r3", "r5"]) == [runs[3], runs[5]]
    for wrong, why in (
        (["4/4"], "--rows 4/4: must be i/n with i from 0 to n - 1"),
        (["r33"], r"--rows r33: no such row.*did you mean r3\?"),
    ):
        with pytest.raises(UserError, match=why):
            part_of(runs, wrong)


def _setup(data: Path, **changes: object) -> Setup:
    base = replace(DEMO, epochs=0.0, steps=2, global_batch=8, optim=replace(DEMO.optim, warmup_epochs=0.0, **changes))  # type: ignore[arg-type]
    base = replace(base, model=replace(DEMO.model, hidden_dim=16, projection_dim=8), data=replace(DEMO.data, workers=1))
    return Setup(scale="demo", linear="quick", ranks=1, data=str(data), base=base)


def test_the_first_seed_of_every_row_comes_before_the_second_of_any_and_shared_runs_are_planned_once(colours, tmp_path):
    runs = planned_runs([TABLES["tau"], TABLES["infonce"]], _setup(colours), tmp_path, seeds=2)
    assert [run.seed for run in runs] == [0] * 15 + [1] * 15
    assert len({run.name for run in runs}) == 30
    assert runs[0].run == "byol", "the base comes first: without it the others say nothing"
    assert {run.config.out for run in runs} == {str(tmp_path / "runs" / run.name) for run in runs}
    assert {run.config.seed for run in runs} == {0, 1}


def test_the_unchanged_run_of_table_1_is_that_of_the_other_tables_at_demo_scale(colours, tmp_path):
    setup = _setup(colours)
    runs = planned_runs([TABLES["encoders"], TABLES["tau"]], setup, tmp_path, seeds=1)
    assert "r50_1000ep" not in [run.run for run in runs]
    scores = {"linear": 0.5, "knn": 0.5}
    records = [Record(run.run, 0, "complete", run.config, scores=scores, num_val=24) for run in runs[:3]]
    (encoders, *_) = table_results(setup, records)
    base = next(row for row in encoders.rows if row.row.run == "r50_1000ep")
    assert base.linear is not None
    assert base.linear.mean == 0.5


def test_a_record_of_another_config_is_not_taken_for_the_row(colours, tmp_path):
    (run,) = (run for run in planned_runs([TABLES["tau"]], _setup(colours), tmp_path, seeds=1) if run.run == "tau_0")
    write_record(tmp_path, _record(config=run.config))
    assert next(r for r in planned_runs([TABLES["tau"]], _setup(colours), tmp_path, seeds=1) if r.run == "tau_0").done
    with pytest.raises(
        UserError, match=r"tau_0-seed0\.json: is of a run with other settings \(optim\.base_lr was 8\.0, is 4\.0\); delete it"
    ):
        planned_runs([TABLES["tau"]], _setup(colours, base_lr=4.0), tmp_path, seeds=1)


def test_a_failed_run_is_tried_again(colours, tmp_path):
    config = planned_runs([TABLES["tau"]], _setup(colours), tmp_path, seeds=1)[0].config
    write_record(tmp_path, Record("byol", 0, "failed", config, why="no room"))
    assert not planned_runs([TABLES["tau"]], _setup(colours), tmp_path, seeds=1)[0].done


TINY = ("--preset", "cpu_demo", "--steps", "2", "--optim.warmup_epochs", "0", *SMALL_RUN[2:])


def _reproduce(data: Path, out: Path, *options: str, table: str = "tau") -> None:
    main(["reproduce", table, "--data", str(data), "--out", str(out), *TINY, *options])


def test_rows_are_trained_and_evaluated_once_a_failing_one_is_named_and_the_next_is_run(colours, tmp_path, capfd):
    out = tmp_path / "tables"
    _reproduce(colours, out, "--rows", "byol")
    trained = (out / "runs" / "byol-seed0" / "train.log").read_text()
    edited = out / "runs" / "tau_0.9-seed0"
    edited.mkdir()
    (edited / CONFIG_FILE).write_text((out / "runs" / "byol-seed0" / CONFIG_FILE).read_text())
    with pytest.raises(SystemExit) as ended:
        _reproduce(colours, out, "--rows", "byol", "tau_0.9", "tau_0")
    assert ended.value.code == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "fastbyol: error: " in line]
    assert len(errors) == 1
    assert re.search(
        r"1 of 3 runs failed \(tau_0\.9 seed 0: out = .*holds a run with another config \(optim\.tau_base was 0\.8, is 0\.9", errors[0]
    )
    records = {record.run: record for record in read_records(out)}
    assert {run: record.status for run, record in records.items()} == {"byol": "complete", "tau_0": "complete", "tau_0.9": "failed"}
    assert (out / "runs" / "byol-seed0" / "train.log").read_text() == trained, "a finished row is not repeated"
    for run in ("byol", "tau_0"):
        assert set(records[run].scores) == {"linear", "knn"}
        assert all(0 <= score <= 1 for score in records[run].scores.values())
        assert records[run].signs["rankme"] >= 1
        assert (records[run].steps, records[run].num_train, records[run].num_val) == (2, 72, 24)
        assert read_config(out / "runs" / f"{run}-seed0") == records[run].config
    assert set(records["byol"].baselines) == {"untrained", "pca", "chance"}, "once for the table, as they are the same for all rows"
    assert not records["tau_0"].baselines
    assert "| 0, the online network itself |" in (out / "tables.md").read_text()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--seeds", "0"], r"--seeds = 0: must be"),
        (["--rows", "tau_0.8"], r"--rows tau_0\.8: no such row at this scale"),
        (["--data.train", "x"], r"--data\.train: is set for each row; use --data"),
        (["--scale", "paper", "--config", "x.yaml"], r"--preset, --config: have no effect at the paper's scale"),
        (["--optim.tau_bse", "1"], r"optim\.tau_bse"),
        (["--model.projector_layers", "3"], r"model\.projector_layers = 3: must be 2, because the rows of the tables are named after"),
        (["--objective.beta", "1"], r"objective\.beta = 1\.0: must be 0\.0, because"),
        (["--scale", "paper", "--global_batch", "1024"], r"--global_batch: rows at the paper's scale have the paper's values"),
        (["--scale", "paper", "--optim", '{"base_lr": 0.1}'], r"--optim\.base_lr: rows at the paper's scale have the paper's values"),
        (["--scale", "paper", "--optim.base_lr=0.1"], r"--optim\.base_lr: rows at the paper's scale have the paper's values"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line_before_anything_is_made(options, why, colours, tmp_path, capsys):
    given = [] if "--scale" in options else list(TINY)
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "tau", "--data", str(colours), "--out", str(tmp_path / "out"), *given, *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.search(why, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_wrong_table_data_without_val_and_anothers_folder_are_refused(colours, tmp_path, capsys):
    write_setup(tmp_path, _setup(colours, base_lr=4.0))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    for table, data, out, why in (
        ("taus", colours, tmp_path / "out", "table 'taus': no such table (did you mean tau?)"),
        ("tau", colours / "train", tmp_path / "out", "so there is no accuracy for a table"),
        ("tau", colours, tmp_path / "mine", "exists and does not hold tables; choose a new folder"),
        ("tau", colours, tmp_path, "holds tables of another set-up (optim.base_lr was 4.0, is 8.0); choose a new folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            _reproduce(data, out, table=table)
        assert ended.value.code == 2
        assert why in capsys.readouterr().err
    (tmp_path / "setup.json").write_text("{}")
    with pytest.raises(UserError, match=r"setup\.json: is not the set-up of a reproduction"):
        read_setup(tmp_path)


def test_other_images_are_not_compared_with_the_records_that_are_there(colours, tmp_path):
    config = planned_runs([TABLES["tau"]], _setup(colours), tmp_path, seeds=1)[0].config
    write_record(tmp_path, Record("byol", 0, "complete", config, num_train=999, num_val=9))
    write_setup(tmp_path, replace(_setup(colours), data="elsewhere"))
    kept = (tmp_path / "setup.json").read_text()
    with pytest.raises(UserError, match=r"has 72 train and 24 val images, and .*byol-seed0.json is of 999 and 9; give the same data"):
        check_same_images(tmp_path, None, _setup(colours), num_train=72, num_val=24)
    with pytest.raises(SystemExit):
        _reproduce(colours, tmp_path, "--rows", "byol")
    assert (tmp_path / "setup.json").read_text() == kept, "the kept figures are not said to be of the new data"


def test_as_many_other_images_are_not_taken_for_those_of_the_runs(colours, tmp_path, capsys):
    _reproduce(colours, tmp_path / "out", "--rows", "byol")
    kept = (tmp_path / "out" / "setup.json").read_text()
    others = shutil.copytree(colours, tmp_path / "others")
    for path in (others / "val" / "red").iterdir():
        Image.open(path).rotate(180).save(path)
    record_path(tmp_path / "out", "byol", 0).unlink()  # its run is there, and would be evaluated on the other images
    with pytest.raises(SystemExit) as ended:
        _reproduce(others, tmp_path / "out", "--rows", "byol")
    assert ended.value.code == 2
    assert "its val images are not those of the runs in --out" in capsys.readouterr().err
    assert (tmp_path / "out" / "setup.json").read_text() == kept


def test_a_processes_share_of_the_rows_is_trained_alone_whatever_started_the_processes(colours, tmp_path, monkeypatch):
    srun = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"}
    srun |= {"SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"}
    for name, value in srun.items():
        monkeypatch.setenv(name, value)
    _reproduce(colours, tmp_path, "--rows", "9/10", "--timeout_s", "5")
    assert [record.status for record in read_records(tmp_path)] == ["complete"]


def test_a_start_that_was_killed_and_a_run_that_was_deleted_are_told_from_what_a_row_costs(colours, tmp_path):
    runner = Runner(_setup(colours), tmp_path, StopRequest(grace_s=1.0), announce=print, after_each=lambda: None, command="")
    runs = part_of(planned_runs([TABLES["tau"]], _setup(colours), tmp_path, seeds=1), ["tau_0"])
    cost = tmp_path / "runs" / "tau_0-seed0.cost.json"
    cost.parent.mkdir(parents=True)
    cost.write_text('{"wall_s": 3000.0, "cpu_s": 3000.0, "cost_is_whole": true}')  # of a run that is no longer there
    (first,) = runner.run_all(runs)
    assert first.cost_is_whole
    assert 0 < first.cpu_s < 3000
    (tmp_path / "runs" / "tau_0-seed0" / "checkpoints" / "step-000000002.pt").unlink()
    cost.write_text('{"wall_s": 5.0, "cpu_s": 4.0, "cost_is_whole": false}')  # as a start leaves it that is killed with this process
    record_path(tmp_path, "tau_0", 0).unlink()
    (again,) = runner.run_all(part_of(planned_runs([TABLES["tau"]], _setup(colours), tmp_path, seeds=1), ["tau_0"]))
    assert not again.cost_is_whole
    assert again.cpu_s > 4.0


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused_before_anything_is_written(colours, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        _reproduce(colours, tmp_path / "out", "--ranks", "3")
    assert ended.value.code == 2
    assert "--ranks 3: does not divide the batch of 8 images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_the_rows_of_the_papers_scale_are_listed_without_timing_a_step(colours, tmp_path, capsys):
    main(["reproduce", "tau", "--scale", "paper", "--data", str(colours), "--out", str(tmp_path / "out"), "--dry_run"])
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["byol-seed0", "tau_1-seed0"]
    assert "how long they take can only be measured on a machine with a GPU" in out


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"scores": {"linear": 7.5}}, "must be shares from 0 to 1"),
        ({"seed": 1}, "it is of byol with seed 1"),
    ],
)
def test_a_record_that_cannot_be_true_is_refused(change, why, colours, tmp_path):
    config = planned_runs([TABLES["tau"]], _setup(colours), tmp_path, seeds=1)[0].config
    write_record(tmp_path, Record("byol", 0, "complete", config, scores={"linear": 0.75}))
    path = record_path(tmp_path, "byol", 0)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=why):
        read_record(path)


def test_a_row_whose_run_folder_was_edited_is_named_with_what_to_delete(colours, tmp_path, capsys):
    _reproduce(colours, tmp_path, "--rows", "tau_0")
    record_path(tmp_path, "tau_0", 0).unlink()
    file = tmp_path / "runs" / "tau_0-seed0" / CONFIG_FILE
    file.write_text(file.read_text().replace("base_lr: 8.0", "base_lr: 4.0"))
    with pytest.raises(SystemExit):
        _reproduce(colours, tmp_path, "--rows", "tau_0")
    assert f"if the fault is in {file.parent}, delete it, and the row is trained anew" in capsys.readouterr().err
    shutil.rmtree(file.parent)
    _reproduce(colours, tmp_path, "--rows", "tau_0")
    assert [record.status for record in read_records(tmp_path)] == ["complete"]


def test_a_config_file_does_not_set_what_each_row_sets_for_itself(tmp_path):
    file = tmp_path / CONFIG_FILE
    write_config(tmp_path, replace(preset_config("cpu_demo"), seed=3, resume="never", rank_batch=32))
    config = _base(["--config", str(file)], scale="demo")
    assert (config.seed, config.resume, config.rank_batch) == (0, "auto", 0)
    write_config(tmp_path, replace(preset_config("cpu_demo"), init_from="x.pt"))
    with pytest.raises(UserError, match=r"--config: init_from = 'x\.pt': rows begin with random weights"):
        _base(["--config", str(file)], scale="demo")


def test_every_run_has_a_mirror_of_its_own(colours, tmp_path):
    setup = _setup(colours)
    mirrored = replace(setup, base=replace(setup.base, mirror="file:///store/"))
    runs = planned_runs([TABLES["batch"]], mirrored, tmp_path, seeds=2)
    assert runs[0].config.mirror == "file:///store/byol-seed0"
    assert len({run.config.mirror for run in runs}) == len(runs)
    assert not any(run.config.mirror for run in planned_runs([TABLES["batch"]], setup, tmp_path, seeds=1))


def test_a_row_keeps_its_cost_and_is_not_trained_on_where_its_evaluation_is_done_again(colours, tmp_path):
    _reproduce(colours, tmp_path, "--rows", "tau_0")
    (before,) = read_records(tmp_path)
    run = tmp_path / "runs" / "tau_0-seed0"
    trained = (run / "train.log").read_text()
    record_path(tmp_path, "tau_0", 0).unlink()
    _reproduce(colours, tmp_path, "--rows", "tau_0")
    (again,) = read_records(tmp_path)
    assert again.wall_s > 0
    assert (again.wall_s, again.cpu_s, again.scores) == (before.wall_s, before.cpu_s, before.scores)
    record_path(tmp_path, "tau_0", 0).unlink()
    note_divergence(run, "collapse: since step 1 every image gets the same projection")
    trained = (run / "train.log").read_text()
    _reproduce(colours, tmp_path, "--rows", "tau_0")
    (collapsed,) = read_records(tmp_path)
    assert (collapsed.status, collapsed.scores, collapsed.wall_s) == ("collapsed", before.scores, before.wall_s)
    assert collapsed.why.startswith("collapse: since step 1")
    assert (run / "train.log").read_text() == trained, "a run that was stopped for its collapse is only evaluated"


def test_a_row_that_does_not_fit_into_memory_or_is_killed_is_named_and_the_next_is_run(colours, tmp_path, monkeypatch):
    setup = _setup(colours)
    runner = Runner(setup, tmp_path, StopRequest(grace_s=1.0), announce=print, after_each=lambda: None, command="")
    codes = iter([0, -9])
    monkeypatch.setattr(runner, "_execute", lambda command, output: next(codes))

    def too_large(*_: object) -> Record:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner, "_scored", too_large)
    earlier = tmp_path / "runs" / "tau_1-seed0"
    earlier.mkdir(parents=True)
    note_divergence(earlier, "the loss is not finite")  # of an earlier start, so not the reason of this one
    records = runner.run_all(part_of(planned_runs([TABLES["tau"]], setup, tmp_path, seeds=1), ["byol", "tau_1"]))
    assert [(record.status, record.why) for record in records] == [("failed", "CUDA out of memory"), ("failed", "ended by SIGKILL")]
    assert read_records(tmp_path) == records
    assert records[1].wall_s >= 0


def test_a_run_that_another_process_does_meanwhile_is_left_to_it_also_if_it_fails_there(colours, tmp_path, monkeypatch):
    setup, said = _setup(colours), []
    runner = Runner(setup, tmp_path, StopRequest(grace_s=1.0), announce=said.append, after_each=lambda: None, command="")
    for run in part_of(planned_runs([TABLES["tau"]], setup, tmp_path, seeds=1), ["tau_0"]):
        write_record(tmp_path, Record(run.run, 0, "failed", run.config, why="of yesterday"))
    runs = {run.run: run for run in planned_runs([TABLES["tau"]], setup, tmp_path, seeds=1)}
    chosen = [runs[name] for name in ("tau_1", "byol", "tau_0")]
    for run, status in ((runs["byol"], "complete"), (runs["tau_1"], "failed")):
        write_record(tmp_path, Record(run.run, 0, status, run.config, why="the other process's"))
    monkeypatch.setattr(runner, "_execute", lambda command, output: -9)
    records = runner.run_all(chosen)
    assert [(record.run, record.why) for record in records] == [("tau_0", "ended by SIGKILL")], (
        "what failed before this start is tried again"
    )
    assert {record.why for record in read_records(tmp_path)} == {"the other process's", "ended by SIGKILL"}


def test_a_training_that_outlived_its_reproduce_is_waited_for(colours, tmp_path, monkeypatch):
    setup = _setup(colours)
    runner = Runner(setup, tmp_path, StopRequest(grace_s=1.0), announce=print, after_each=lambda: None, command="")
    (run,) = part_of(planned_runs([TABLES["tau"]], setup, tmp_path, seeds=1), ["tau_0"])
    folder = Path(run.config.out)
    folder.mkdir(parents=True)
    held = locked_file(folder / LOCK_FILE)
    threading.Timer(0.5, os.close, (held,)).start()

    def is_free(command: list[str], output: Path) -> int:
        os.close(locked_file(folder / LOCK_FILE))
        return -9

    monkeypatch.setattr(runner, "_execute", is_free)
    assert [record.why for record in runner.run_all([run])] == ["ended by SIGKILL"]


def test_a_dry_run_lists_every_row_and_starts_none(colours, tmp_path, capsys):
    _reproduce(colours, tmp_path / "out", "--dry_run", "--seeds", "2")
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("byol-seed", "tau_")) and " 2 steps" in line for line in lines) == 10
    assert lines[-1].startswith("10 runs to do, ")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_ends_in_one_line_with_the_exit_code_for_it(colours, tmp_path):
    runner = Runner(_setup(colours), tmp_path, StopRequest(grace_s=1.0), announce=print, after_each=lambda: None, command="")
    with (
        files_no_larger_than(100),
        pytest.raises(StorageFull, match=r"cannot be written \(File too large\); make room") as ended,
    ):
        runner.run_all(planned_runs([TABLES["tau"]], _setup(colours), tmp_path, seeds=1))
    assert ended.value.exit_code == 4
    assert not read_records(tmp_path)


def test_a_request_to_stop_is_heard_between_two_runs(colours, tmp_path):
    class Asked(StopRequest):
        requested = True  # type: ignore[assignment]

    runner = Runner(_setup(colours), tmp_path, Asked(grace_s=1.0), announce=print, after_each=lambda: None, command="")
    with pytest.raises(Stopped, match="stopped before byol-seed0; the same command goes on from there"):
        runner.run_all(planned_runs([TABLES["tau"]], _setup(colours), tmp_path, seeds=1))
    assert not read_records(tmp_path)
