"""The report's sections on the tasks of the paper that were evaluated: scores beside the paper's rows, and sample predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastbyol.evaluation import page
from fastbyol.evaluation.result_file import TaskResult, results_in, seed_text


def task_sections(folder: Path, *, step: int) -> list[str]:
    """Returns a section for each result of a task in `folder` that counts and is of this step, the oldest first; see `results_in`."""
    return [
        _section(result, path, facts)
        for path, result, facts in results_in(folder)
        if isinstance(result, TaskResult) and facts.get("step") == step
    ]


def picture_file(folder: Path, *, task: str, digest: str) -> Path:
    """Returns where a task's picture of sample predictions lies."""
    return folder / f"{task}-{digest}.png"


def _section(result: TaskResult, path: Path, facts: dict[str, Any]) -> str:
    header = ["", *(column.removeprefix("-") for column in result.columns.values())]
    scored = [
        (subject.title, {name: _unit(column) * value for name, column, value in _values(result, subject.scores)})
        for subject in result.subjects.values()
    ]
    rows = [
        [title, *(_text(values.get(name), column) for name, column in result.columns.items())]
        for title, values in [*scored, *result.paper.items()]
    ]
    sizes = ", ".join(f"{count:,} {name}" for name, count in result.sizes.items())
    parts = [page.table(header, rows=rows, numbers=frozenset(range(1, len(header))))]
    of = f"{result.version} settings{seed_text(facts)}, {sizes} images of {facts.get('data', '')}"
    parts.append(page.paragraph(f"{of}. {'. '.join(result.notes)}.", kind="note"))
    picture = picture_file(path.parent, task=result.protocol, digest=str(result.settings.get("identity", "")))
    if picture.is_file():
        parts.append(page.image(picture.read_bytes(), alt=f"{result.protocol}: test images, truth and predictions", kind="figure"))
    return page.section(f"task-{path.stem}", title=f"Task: {result.protocol.replace('-', ' ')}", parts=parts)


def _values(result: TaskResult, scores: dict[str, float]) -> list[tuple[str, str, float]]:
    return [(name, column, scores[name]) for name, column in result.columns.items() if name in scores]


def _unit(column: str) -> float:
    """Returns the factor from a stored score to the unit of the column's title, which the paper's rows have already."""
    return 100.0 if column.endswith("%") else 1.0


def _text(value: float | None, column: str) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if column.endswith("%") else f"{value:.3f}"
