"""The report's sections on the paper's tasks."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from fastbyol.evaluation.report_tasks import picture_file, task_sections
from fastbyol.evaluation.result_file import SubjectResult, TaskResult, write_result


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
