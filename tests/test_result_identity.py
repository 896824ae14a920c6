"""Which evaluation an earlier result, or a part of an unfinished one, may be taken for."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.evaluation.data_state import FEW, data_state, paths_of
from fastbyol.evaluation.tasks.job import Job, Subject, load_subjects, named_path
from tests.dense_jobs import make_job, tiny_encoder
from tests.test_report import call
from tests.test_task_linear import FAST


@dataclasses.dataclass(frozen=True)
class NoSettings:
    pass


def job_in(folder: Path, **fields: object) -> Job:
    return dataclasses.replace(make_job("linear", NoSettings(), data=folder, folder=folder), **fields)


def test_parts_of_different_names_have_different_files(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    names = ["byol", "птицы byol", "цветы byol", "my birds", "my_birds", "a/b", "x" * 300, "x" * 301]
    paths = {job.part(name, ".json") for name in names}
    assert len(paths) == len(names)
    assert all(len(path.name) < 120 for path in paths)
    assert [job.once(name, lambda name=name: {"is": name})["is"] for name in names] == names


def test_an_encoder_is_known_by_its_weights_its_network_and_its_views(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save(tiny_encoder().state_dict(), file)
    size = {"model.encoder": "resnet8", "model.stem": "small2"}
    typed = [
        {},
        {"views.size_px": 64},
        {"views.mean": (0.0, 0.0, 0.0)},
        {"views.interpolation": "bilinear"},
        {"model.padding": "same"},
    ]

    def subjects(*inits: str, **more: object) -> tuple[Subject, ...]:
        return load_subjects(file, inits, [], changes=size | more)[1]

    for init in ("byol", "untrained"):
        assert len({subjects(init, **more)[0].identity for more in typed}) == len(typed)
    first, again = (job_in(tmp_path, subjects=subjects(*inits)) for inits in (["byol", "untrained"], ["untrained", "byol"]))
    assert first.digest != again.digest, "the first one is compared with the others"
    assert job_in(tmp_path, inputs="one").digest != job_in(tmp_path, inputs="other").digest
    assert job_in(tmp_path, again=True).work != job_in(tmp_path).work


def test_names_of_encoders_come_before_the_first_equals_sign_unless_the_path_has_it(tmp_path: Path) -> None:
    run = tmp_path / "lr=0.2"
    run.mkdir()
    assert named_path(str(run)) == ("", str(run))
    assert named_path(f"high={run}") == ("high", str(run))
    assert named_path("a=b") == ("a", "b")
    file = tmp_path / "w.pt"
    torch.save(tiny_encoder().state_dict(), file)
    with pytest.raises(UserError, match="'untrained' is the name of the checkpoint's own encoder"):
        load_subjects(file, ["byol"], [f"untrained={file}"])


def test_options_of_weights_are_of_all_weights_in_a_task_and_a_run_beside_them_has_its_own(colours_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save(tiny_encoder().state_dict(), file)
    changes = {"model.encoder": "resnet8", "model.stem": "small2", "views.size_px": 48}
    for checkpoint, compared in ((file, file), (colours_run, file), (file, colours_run)):
        _, subjects = load_subjects(checkpoint, ["byol"], [f"other={compared}"], changes=changes)
        assert [one.views.size_px for one in subjects] == [48 if path == file else 32 for path in (checkpoint, compared)]
    with pytest.raises(UserError, match=r"model\.encoder: has no effect on a run"):
        load_subjects(colours_run, ["byol"], [f"other={colours_run}"], changes=changes)


def picture(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (level, 0, 0)).save(path)
    return path


def test_the_state_of_data_changes_with_names_and_with_files_where_they_are_few(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"):
        picture(tmp_path / name)
    assert [Path(path).name for path in paths_of(str(tmp_path))] == ["train", "val"]

    def state() -> str:
        return data_state(paths_of(str(tmp_path)))

    seen = [state()]
    (tmp_path / "train/.fastbyol-index").write_text("ours")
    (tmp_path / "runs").mkdir()
    assert state() == seen[0], "our own indexes, and what lies beside the images"
    picture(tmp_path / "val/a/5.png")
    seen.append(state())
    (tmp_path / "val/a/5.png").rename(tmp_path / "val/b/5.png")
    seen.append(state())
    os.utime(tmp_path / "val/b/5.png", ns=(1, 1))
    seen.append(state())
    (tmp_path / "train/a/loop").symlink_to(tmp_path / "train")
    assert state() == seen[-1], "a link that leads back is followed once"
    shutil.copytree(tmp_path, tmp_path / "elsewhere", symlinks=True)
    seen.append(data_state(paths_of(str(tmp_path / "elsewhere"))))
    assert len(set(seen)) == len(seen)
    for number in range(FEW + 1):
        picture(tmp_path / f"train/a/many{number}.png")
    before = state()
    os.utime(tmp_path / "train/a/many0.png", ns=(1, 1))
    assert state() == before, "a class of many images counts by its names"
    (tmp_path / "train/a/many0.png").unlink()
    assert state() != before
    assert data_state(["https://user:secret@host/x.beton?token=1"]) == data_state(["https://host/x.beton"])


def test_a_result_is_computed_anew_once_its_images_have_changed_or_where_that_is_asked_for(colours_run, colours, tmp_path, capsys) -> None:
    data = tmp_path / "data"
    shutil.copytree(colours, data)
    out = tmp_path / "out"
    typed = ["evaluate", "linear", "--checkpoint", str(colours_run), "--data", str(data), "--out", str(out), *FAST, "--init", "byol"]

    def run(*more: str) -> tuple[str, dict]:
        code, _, err = call([*typed, *more], capsys)
        assert code == 0, err
        return err, json.loads(max(out.glob("linear*.json"), key=lambda path: path.stat().st_mtime_ns).read_text())

    _, first = run()
    assert "already evaluated" in run()[0]
    image = next((data / "val").rglob("*.*"))
    shutil.copy(image, image.with_stem("one-more"))
    said, second = run()
    assert "already evaluated" not in said
    assert second["sizes"]["val"] == first["sizes"]["val"] + 1
    assert "already evaluated" not in run("--again")[0]
    assert not list(out.glob("*.work-*"))


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_computed(colours_run, colours, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("no folder")
    typed = ["evaluate", "linear", "--checkpoint", str(colours_run), "--data", str(colours), *FAST, "--out", str(tmp_path / "file" / "out")]
    code, _, err = call(typed, capsys)
    assert code == 2
    assert "cannot be written (Not a directory); name another folder with --out" in err
    assert "train" not in err


def test_two_runs_in_one_folder_keep_their_own_results_and_a_report_takes_only_its_runs(colours_run, colours, tmp_path, capsys) -> None:
    other = tmp_path / "other"
    shutil.copytree(colours_run, other)
    out = tmp_path / "out"
    for run in (colours_run, other, colours_run):
        code, _, err = call(
            ["evaluate", "knn", "--checkpoint", str(run), "--data", str(colours), "--out", str(out), "--device", "cpu"], capsys
        )
        assert code == 0, err
    assert sorted(path.name for path in out.glob("knn*.json")) == ["knn-2.json", "knn.json"]


def test_the_quick_protocols_are_of_one_process(colours_run, colours, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call(["evaluate", "knn", "--checkpoint", str(colours_run), "--data", str(colours)], capsys)
    assert (code, "the quick knn protocol runs in one process; start it without torchrun, or add --settings paper" in err) == (2, True)


def test_a_mistake_leaves_no_empty_folder_of_unfinished_work(colours_run, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    typed = ["evaluate", "segmentation", "--checkpoint", str(colours_run), "--data", str(tmp_path / "voc"), "--settings", "quick"]
    (tmp_path / "voc" / "JPEGImages").mkdir(parents=True)
    code, _, err = call([*typed, "--out", str(out)], capsys)
    assert code == 2, err
    assert not list(out.glob("*"))
