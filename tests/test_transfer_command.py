"""evaluate transfer as typed: between label sets of the demo's images, on what is on disk, after a stop, with bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from fastbyol.evaluation.tasks.transfer import finetune
from fastbyol.train import main as train_main
from tests.commands import SMALL_RUN, run_here
from tests.forked import run_ranks
from tests.test_report import call
from tests.test_task_transfer import lines, make_dtd, make_own, make_pets, make_voc2007, put

CPU = ("--batch", "64", "--device", "cpu", "--workers", "1")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The demo's drawn scenes, 8 + 4 images of each of 16 classes."""
    out = tmp_path_factory.mktemp("demo") / "scenes"
    made = run_here("demo_data.py", "--kind", "scenes", "--out", out, "--train-per-class", "8", "--val-per-class", "4")
    assert made.returncode == 0, made.stderr
    return out


@pytest.fixture(scope="module")
def sets(demo, tmp_path_factory) -> Path:
    """Two label sets of these images: four shapes and four patterns."""
    root = tmp_path_factory.mktemp("sets")
    for file in demo.glob("*/*_*/*.jpg"):
        split, name = file.parts[-3:-1]
        if split in ("train", "val"):
            for label_set, label in zip(("shapes", "patterns"), name.split("_"), strict=True):
                folder = root / label_set / split / label
                folder.mkdir(parents=True, exist_ok=True)
                os.link(file, folder / f"{name}_{file.name}")
    return root


@pytest.fixture(scope="module")
def run(demo, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train_main([*SMALL_RUN, "--epochs", "1", "--checkpoint_every", "100", "--data.train", str(demo / "train"), "--out", str(out)])
    return out


def command(task: str, run: Path, data: Path, *more: str) -> list[str]:
    return ["evaluate", "transfer", task, "--checkpoint", str(run), "--data", str(data), *CPU, *more]


def record(folder: Path, task: str) -> dict:
    return json.loads((folder / f"transfer-{task}.json").read_text())


def test_a_linear_transfer_to_two_label_sets_is_a_table_of_both_and_is_not_computed_twice(run, sets, tmp_path, capsys):
    arguments = command("linear", run, sets, "--sets", "shapes,patterns", "--out", str(tmp_path))
    code, out, err = call(arguments, capsys)
    assert code == 0, err
    result = record(tmp_path, "linear")
    assert list(result["columns"]) == ["shapes", "patterns"]
    for name in ("shapes", "patterns"):
        found = result["subjects"]["byol"]["details"][name]
        # Without test/, val is the test and a fifth of each class of train is the validation set.
        assert found["set"].pop("state")
        assert found["set"] | {"notes": []} == {"train": 104, "valid": 24, "test": 64, "classes": 4, "metric": "top1", "notes": []}
        assert found["converged"]
        assert found["unfinished_fits"] == 0
        hits = 64 * result["subjects"]["byol"]["scores"][name]
        assert hits == pytest.approx(round(hits))
        assert found["chosen"]["valid"] == max(found["valid_scores"].values())
    assert result["paper"] == {}
    assert "BYOL" in out
    assert "untrained encoder" in out
    assert not list(tmp_path.glob("*.work-*"))
    code, again, err = call(arguments, capsys)
    assert code == 0
    assert "already evaluated" in err
    assert again == out


def test_all_takes_what_is_on_disk_survives_a_broken_set_and_later_adds_what_has_come(run, tmp_path, capsys):
    root, out = tmp_path / "data", tmp_path / "out"
    make_dtd(root)
    make_voc2007(root)
    make_pets(root)
    (root / "oxford-iiit-pet" / "annotations" / "test.txt").rename(root / "test.txt")
    arguments = command("linear", run, root, "--out", str(out))
    code, table, err = call(arguments, capsys)
    assert code == 0, err
    first = record(out, "linear")
    assert list(first["subjects"]["byol"]["scores"]) == ["voc2007", "dtd"]
    assert first["missing"] == [name for name in first["columns"] if name not in ("voc2007", "dtd")]
    assert len(first["columns"]) == 13
    assert first["subjects"]["byol"]["scores"]["dtd"] == 1.0  # its classes are two colours
    assert "failed: pets: cannot be opened" in err
    assert f"left out: food101: not in {root}; expected food-101/images and food-101/meta, or add --download yes" in err
    assert "paper: BYOL" in table
    assert "67.8" in table  # its Cars, where we have none
    assert first["paper"]["paper: SimCLR"]["voc2007"] == 80.5
    (root / "test.txt").rename(root / "oxford-iiit-pet" / "annotations" / "test.txt")
    code, _, err = call(arguments, capsys)
    assert code == 0, err
    second = record(out, "linear")
    assert not (out / "transfer-linear-2.json").exists()
    assert list(second["subjects"]["byol"]["scores"]) == ["voc2007", "dtd", "pets"]
    for name in ("voc2007", "dtd"):  # kept, down to the seconds that they took
        assert second["subjects"]["byol"]["details"][name] == first["subjects"]["byol"]["details"][name]
    assert set(second["missing"]) == set(first["missing"]) - {"pets"}


@pytest.mark.distributed
def test_two_ranks_find_the_figures_of_one(run, sets, tmp_path, capsys):
    arguments = command("linear", run, sets, "--sets", "patterns", "--penalties", "4")
    code, _, err = call([*arguments, "--out", str(tmp_path / "one")], capsys)
    assert code == 0, err
    for done in run_ranks("-m", "fastbyol", *arguments, "--out", tmp_path / "two"):
        assert done.returncode == 0, done.stderr
    one, two = (record(tmp_path / ranks, "linear")["subjects"] for ranks in ("one", "two"))
    for name in ("byol", "untrained"):
        assert two[name]["scores"] == one[name]["scores"]
        assert two[name]["chosen"] == one[name]["chosen"]


TRAINED = ("--steps", "4", "--global_batch", "16", "--rates", "0.01,0.05", "--decays", "0.0001,0")
FINETUNE = (*TRAINED, "--scratch_steps", "4", "--scratch_rates", "0.05", "--scratch_decays", "0")


def test_a_fine_tuning_that_is_stopped_goes_on_to_the_figures_of_one_that_was_not(run, sets, tmp_path, capsys):
    arguments = command("finetune", run, sets, "--sets", "shapes", *FINETUNE)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"

    def stop_after_the_first_part() -> None:
        deadline = time.monotonic() + 120
        while not list(stopped.glob("*.work-*/*.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watch = threading.Thread(target=stop_after_the_first_part)
    watch.start()
    code, _, err = call([*arguments, "--out", str(stopped)], capsys)
    watch.join()
    assert code == 75, err
    parts = {path.name: path.stat().st_mtime_ns for path in stopped.glob("*.work-*/*.json")}
    assert 1 <= len(parts) < 8
    assert not list(stopped.glob("*.json"))
    for out in (stopped, whole):
        code, _, err = call([*arguments, "--out", str(out)], capsys)
        assert code == 0, err
    figures = [record(out, "finetune")["subjects"] for out in (stopped, whole)]
    for subject, pairs in (("byol", 4), ("untrained", 0)):
        one, other = (found[subject]["details"]["shapes"] for found in figures)
        assert len(one["trials"]) == pairs
        assert [trial["valid"] for trial in one["trials"]] == [trial["valid"] for trial in other["trials"]]
        assert (one["score"], one["chosen"]) == (other["score"], other["chosen"])


def spoilt(folder: Path) -> Path:
    """Cuts an image of the folder, so that it cannot be decoded any more, and returns its path."""
    image = sorted(folder.rglob("*.jpg"))[0]
    image.write_bytes(image.read_bytes()[:300])
    return image


def two_sets(root: Path) -> Path:
    """Writes the sets `one` and `two`, of whose test images one cannot be decoded."""
    for name in ("one", "two"):
        make_own(root / name, train=8, val=2, test=2)
    spoilt(root / "two" / "test")
    return root


@pytest.mark.distributed
@pytest.mark.parametrize("task", ["linear", "finetune"])
def test_on_two_ranks_too_a_set_with_a_damaged_test_image_is_left_out_and_the_others_are_scored(task, run, tmp_path):
    arguments = command(task, run, two_sets(tmp_path / "sets"), "--sets", "two,one", "--out", str(tmp_path / "out"), "--init", "byol")
    arguments += ["--penalties", "2"] if task == "linear" else ["--steps", "2", "--rates", "0.05", "--decays", "0"]
    for done in run_ranks("-m", "fastbyol", *arguments):
        assert done.returncode == 0, done.stderr
    result = record(tmp_path / "out", task)
    assert (list(result["subjects"]["byol"]["scores"]), result["missing"]) == (["one"], ["two"])


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")], ids=["host", "cublas"]
)
def test_the_finished_trainings_of_a_set_that_failed_are_kept_and_those_of_the_others_are_not(error, run, tmp_path, monkeypatch, capsys):
    arguments = command("finetune", run, tmp_path / "sets", "--sets", "one,two", *TRAINED, "--init", "byol", "--out", str(tmp_path / "out"))
    for name in ("one", "two"):
        make_own(tmp_path / "sets" / name, train=8, val=2, test=2)
    fitted, memory = finetune._Tuning._fitted, ["one", "two"]

    def runs_out_of_memory_once(self, key, *rest, **named):
        if "refit" in key and self.images.name == "two" and memory:
            memory.clear()
            raise error
        return fitted(self, key, *rest, **named)

    monkeypatch.setattr(finetune._Tuning, "_fitted", runs_out_of_memory_once)
    code, _, err = call(arguments, capsys)
    assert code == 0, err
    assert record(tmp_path / "out", "finetune")["missing"] == ["two"]
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.work-*/*.json")}
    assert sum(" rate " in path.name.replace("_", " ") for path in parts) == 4, "the trials of `two`"
    assert all(path.name.startswith("two_") for path in parts)
    code, _, err = call(arguments, capsys)
    assert code == 0, err
    assert record(tmp_path / "out", "finetune")["missing"] == []
    assert not list((tmp_path / "out").glob("*.work-*"))


def test_a_folder_of_ones_own_called_as_a_set_of_the_paper_gets_neither_its_title_nor_its_figures(run, tmp_path, capsys):
    make_own(tmp_path / "my" / "pets", train=8, val=2, test=2)
    code, _, err = call(command("linear", run, tmp_path, "--sets", "my/pets", "--penalties", "2", "--out", str(tmp_path / "out")), capsys)
    assert code == 0, err
    result = record(tmp_path / "out", "linear")
    assert (result["columns"], result["paper"]) == ({"pets": "pets %"}, {})


def test_a_dry_run_says_how_much_there_is_to_do_and_writes_nothing(run, sets, tmp_path, capsys):
    for task, what in (("linear", "46 fits each"), ("finetune", "114 trainings of 2 encoders, 3,420,000 steps of 104, 355,680,000 images")):
        code, out, err = call(
            command(task, run, sets, "--sets", "shapes", "--settings", "paper", "--dry_run", "--out", str(tmp_path / "no")), capsys
        )
        assert code == 0, err
        assert "4 classes, 104 train, 24 valid, 64 test; top-1" in out
        assert what in out
        assert out.startswith(f"transfer-{task}: 1 set on disk, 2 encoders, about ")
        assert "memory" in out
        assert "disk" in out
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sets", "cifar1"), "--sets cifar1: is neither a known set (did you mean cifar10?) nor a folder"),
        (
            ("--sets", "pets"),
            "--sets pets: not in {root}; expected oxford-iiit-pet/images and oxford-iiit-pet/annotations, or add --download yes",
        ),
        (("--sets", "cars"), "{root}; expected stanford_cars/"),
        ((), "none of the 13 sets is there; the first: food101: not in {root}"),
        (("--sets", "bare"), "bare: has neither train and val nor images and test.txt"),
        (("--sets", "half"), "half: has train, and neither val nor test"),
        (("--sets", "other"), "other: val and train differ in their classes ['b', 'c']"),
        (("--sets", "empty"), "empty/train/b: no image in this class folder"),
        (("--sets", "listed"), "listed/test.txt: 1 of its 2 names are not those of one image of {root}/listed/images: a/9.jpg"),
        (("--sets", "untaught"), "untaught: class 'b' has no training image"),
        (("--download", "maybe"), "--download maybe: must be yes or no"),
        (("--penalties", "0"), "penalties = 0: must be a number >= 1"),
    ],
)
def test_bad_input_is_one_line_that_names_it(run, tmp_path, capsys, options, said):
    root = tmp_path / "data"
    (root / "bare").mkdir(parents=True)
    for name, files in {
        "half": ("train/a/1.jpg", "train/b/1.jpg"),
        "other": ("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg"),
        "empty": ("train/a/1.jpg", "val/a/1.jpg", "val/b/1.jpg"),
        "listed": tuple(f"images/{label}/{number}.jpg" for label in "ab" for number in range(4)),
        "untaught": tuple(f"images/{label}/{number}.jpg" for label in "ab" for number in range(4)),
    }.items():
        for file in files:
            put(root / name / file, 0, 0)
    (root / "empty" / "train" / "b").mkdir()
    lines(root / "listed" / "test.txt", "a/1.jpg", "a/9.jpg")
    lines(root / "untaught" / "test.txt", *(f"b/{number}.jpg" for number in range(4)))
    code, out, err = call(command("linear", run, root, "--out", str(tmp_path / "out"), *options), capsys)
    assert code == 2
    assert out == ""
    last = err.rstrip().splitlines()[-1]
    assert last.startswith("fastbyol: error: ")
    assert said.format(root=root) in last
    assert "Traceback" not in err
    shutil.rmtree(root)


def test_a_set_whose_images_have_changed_is_evaluated_anew_and_the_others_are_not(run, sets, tmp_path, capsys):
    root = tmp_path / "sets"
    shutil.copytree(sets, root)
    arguments = command("linear", run, root, "--sets", "shapes,patterns", "--penalties", "2", "--out", str(tmp_path / "out"))
    found: list[tuple[dict, dict]] = []
    for changed in (False, True):
        if changed:
            image = next((root / "shapes" / "val").rglob("*.jpg"))
            shutil.copy(image, image.with_stem("one-more"))
        code, _, err = call(arguments, capsys)
        assert code == 0, err
        assert "already evaluated" not in err
        newest = max((tmp_path / "out").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        details = json.loads(newest.read_text())["subjects"]["byol"]["details"]
        found.append((details["shapes"], details["patterns"]))
    (shapes, patterns), (more_shapes, same_patterns) = found
    assert more_shapes["set"]["test"] == shapes["set"]["test"] + 1
    assert same_patterns["seconds"] == patterns["seconds"]
