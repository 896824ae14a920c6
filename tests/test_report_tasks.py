"""The report's sections on the paper's tasks."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from PIL import Image

from fastbyol.evaluation.report_tasks import picture_file, task_sections
from fastbyol.evaluation.result_file import SubjectResult, TaskResult, results_in, write_result


def result(identity: str) -> TaskResult:
    return TaskResult(
        protocol="depth",
        version="quick",
        settings={"identity": identity},
        columns={"pct1": "< 1.25 %", "rms": "-rms (m)"},
        subjects={"byol": SubjectResult("BYOL <run>", {"pct1": 0.8, "rms": 0.5}, 1.0)},
        sizes={"train": 1000, "test": 20},
        paper={"paper": {"pct1": 84.6}},
        notes=["a note"],
    )


def test_each_task_of_this_step_is_a_table_beside_the_papers_row_with_its_picture(tmp_path: Path) -> None:
    write_result(result("abc"), tmp_path, data="nyu", step=7)
    write_result(result("older"), tmp_path, data="other", step=6)
    (tmp_path / "broken.json").write_text("{")
    Image.new("RGB", (4, 4)).save(picture_file(tmp_path, task="depth", digest="abc"))
    (section,) = task_sections(tmp_path, step=7)
    assert 'id="task-depth"' in section
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", section)
    assert cells == ["BYOL &lt;run&gt;", "80.0", "0.500", "paper", "84.6", "-"]
    assert "rms (m)</th>" in section
    assert "quick settings, 1,000 train, 20 test images of nyu. a note." in section
    assert section.count("data:image/png;base64,") == 1
    assert task_sections(tmp_path / "nowhere", step=7) == []


def test_of_results_that_look_the_same_the_newest_counts_and_none_is_of_images_that_have_changed(tmp_path: Path) -> None:
    def write(identity: str, images: str, top1: float, *, seed: int = 0, encoders: tuple[str, ...] = ("byol",)) -> Path:
        subjects = {name: SubjectResult(name, {"pct1": top1}, 1.0) for name in encoders}
        new = replace(result(identity), subjects=subjects, paper={})
        path = write_result(new, tmp_path, data="nyu", step=7, inputs=f"weights {images}", seed=seed)
        os.utime(path, ns=(0, next(time)))
        return path

    def shown() -> list[str]:
        return [re.findall(r"<td[^>]*>(\d[^<]*)</td>", section)[0] for section in task_sections(tmp_path, step=7)]

    time = iter(range(1, 99))
    write("a", "old", 0.71)
    write("b", "old", 0.72, seed=1)
    write("c", "old", 0.73, encoders=("byol", "other"))
    assert shown() == ["71.0", "72.0", "73.0"]
    assert ["quick settings, seed 1, 1,000 train" in section for section in task_sections(tmp_path, step=7)] == [False, True, False]
    write("d", "new", 0.5)
    assert shown() == ["50.0"]
    write("e", "new", 0.6, seed=1)
    write("f", "new", 0.55, encoders=("byol",))  # the same words, of other weights
    assert shown() == ["60.0", "55.0"]
    assert [one[2]["seed"] for one in results_in(tmp_path)] == [1, 0]
