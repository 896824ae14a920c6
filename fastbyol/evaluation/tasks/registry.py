"""The tasks by name, and how one runs: estimate, subjects, result file, table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbyol.config.console import say
from fastbyol.config.errors import UserError
from fastbyol.config.plain import to_plain
from fastbyol.evaluation.data_state import data_state, paths_of
from fastbyol.evaluation.evaluate import next_command
from fastbyol.evaluation.result_file import TaskResult, read_result, write_or_say
from fastbyol.evaluation.tasks.job import INITS, Job, load_subjects
from fastbyol.host.signals import StopRequest
from fastbyol.ranks.process_group import Process, broadcast_from_main
from fastbyol.run.precision import fitted
from fastbyol.run.provenance import collect_provenance

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Task:
    """A task of the paper, the value TASK of its module.

    title: for tables. what: one line for --help. versions: the settings of 'paper' and 'quick', frozen dataclasses. run: computes the
    result; every rank calls it, rank 0's is used. plan: lines that say how much a job is (images, steps, hours from a measured step, disk, memory),
    without starting it.
    paths: files and folders whose content the result depends on. is_current: whether an earlier result of these settings still holds, for a task that
    keeps track of its data itself. reported: whether --data are images of which `report` makes a page.
    """

    title: str
    what: str
    versions: Mapping[str, Any]
    run: Callable[[Job, Any], TaskResult]
    plan: Callable[[Job, Any], list[str]]
    paths: Callable[[Job, Any], Sequence[str | Path]] = lambda job, _: paths_of(job.data)
    is_current: Callable[[Job, Any, TaskResult], bool] = lambda *_: True
    reported: bool = True


MODULES: dict[str, str] = {
    "linear": "linear",
    "knn": "knn_sweep",
    "finetune": "finetune",
    "semi": "semi",
    "transfer linear": "transfer.tasks",
    "transfer finetune": "transfer.tasks",
    "segmentation": "segmentation",
    "depth": "depth",
    "detection": "detection",
}
"""Module of each task, imported when it is chosen: a task must not make the others wait for its libraries."""


def task_named(name: str) -> Task:
    return import_module(f"fastbyol.evaluation.tasks.{MODULES[name]}").TASKS[name]


def task_table(result: TaskResult) -> RenderableType:
    """Returns the scores of all encoders and the paper's rows as a table for the terminal."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in result.columns.values():
        table.add_column(column.removeprefix("-"), justify="right")
    for name, subject in result.subjects.items():
        cells = [_cell(subject.scores.get(key), column, scale=100.0) for key, column in result.columns.items()]
        table.add_row(subject.title, *cells, style="bold" if name == "byol" else None)
    for row, values in result.paper.items():
        table.add_row(row, *(_cell(values.get(key), column, scale=1.0) for key, column in result.columns.items()), style="dim")
    return table


def print_table(table: RenderableType) -> None:
    """Prints the table as wide as it is: in 80 columns, as in a log, a column for each of thirteen data sets would be a letter wide."""
    from rich.console import Console

    console = Console()
    width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    Console(width=max(console.width, width)).print(table)


def _cell(value: float | None, column: str, *, scale: float) -> str:
    """Returns a share as per cent without the sign, which the column's title has, and another number with three digits."""
    if value is None:
        return "-"
    return f"{scale * value:.1f}" if column.endswith("%") else f"{value:.3f}"


def result_settings(settings: Any, version: str) -> dict[str, Any]:
    """Returns the settings as a result stores them, with a digest of the files that they name: another content is another job."""
    contents = settings.contents() if hasattr(settings, "contents") else {}
    return {"version": version, **to_plain(settings), **contents}


@dataclass(frozen=True)
class TaskOptions:
    """What the command line says beside the task's settings; see `commands/evaluate.py` for each."""

    checkpoint: str
    data: str
    compare: Sequence[str]
    init: Sequence[str]
    out: Path | None
    batch: int
    workers: int
    seed: int
    dry_run: bool
    again: bool
    version: str
    changes: Mapping[str, Any]
    command: str


def run_task(
    name: str,
    task: Task,
    settings: Any,
    options: TaskOptions,
    *,
    process: Process,
    stop: StopRequest,
    announce: Callable[[str], None],
) -> None:
    """Runs a task, writes its result and prints it; or, for a dry run, prints what it would do. A result that is there is only printed."""
    run, subjects = load_subjects(options.checkpoint, options.init or INITS, options.compare, changes=options.changes)
    announce = announce if process.is_main else lambda _: None
    job = Job(
        task=name.replace(" ", "-"),
        data=options.data,
        settings=result_settings(settings, options.version),
        subjects=subjects,
        step=run.step,
        process=process,
        stop=stop,
        precision=fitted(run.config.precision, device=process.device, announce=announce),
        folder=options.out or run.results,
        command=options.command,
        batch=options.batch,
        workers=options.workers,
        seed=options.seed,
        announce=announce,
        again=options.again,
    )
    job = replace(job, inputs=broadcast_from_main(data_state(task.paths(job, settings)) if process.is_main else ""))
    if options.dry_run:
        lines = task.plan(job, settings)
        if process.is_main:
            say(*lines)
        return
    # Rank 0 decides for all: another rank must not wait for it in a collective.
    found = known_result(job) if process.is_main and not options.again else None
    known = broadcast_from_main(found is not None and not found.missing and task.is_current(job, settings, found))
    if not known and process.is_main:
        job.prepare()
    result = found if known else task.run(replace(job, earlier=found), settings)
    if not process.is_main:
        return
    assert result is not None
    if known:
        say(f"{task.title}: already evaluated with these settings; --again computes it anew", file=sys.stderr)
    else:
        written = write_or_say(
            replace(result, settings=result.settings | {"identity": job.digest}),
            job.folder,
            data=job.data,
            step=job.step,
            seed=job.seed,
            inputs=f"{job.subjects[0].identity.partition(' ')[0]} {job.inputs}",  # begins with the weights, as `evaluate.inputs_of`
            command=job.command,
            checkpoint=options.checkpoint,
            provenance=collect_provenance(),
        )
        if written:
            job.clear(keep=result.missing)
            for work in job.unfinished():
                announce(f"{work}: unfinished work of {job.task}, with which its own command goes on; delete it where that is not wanted")
    sizes = ", ".join(f"{count:,} {split}" for split, count in result.sizes.items())
    # A line of its own: a table's title breaks where the table ends.
    say(f"{task.title}, {result.version} settings; images: {sizes}")
    print_table(task_table(result))
    following = [f"next: {next_command(options.checkpoint, options.data)}"] if task.reported else []
    say(*result.notes, *comparison_lines(result), *following)


def known_result(job: Job) -> TaskResult | None:
    """Returns the result of the same encoders, data and settings that lies in the job's folder, or None."""
    for path in sorted(job.folder.glob(f"{job.task}*.json")):
        try:
            result, _ = read_result(path)
        except UserError:
            continue
        if isinstance(result, TaskResult) and result.protocol == job.task and result.settings.get("identity") == job.digest:
            return result
    return None


def comparison_lines(result: TaskResult) -> list[str]:
    """Returns a sentence for each encoder that the first one is compared with, on the same test images."""
    lines = []
    for name, comparison in result.comparisons.items():
        title = result.subjects[name].title if name in result.subjects else name
        interval = f"{100 * comparison.difference:+.1f} points ({100 * comparison.low:+.1f} to {100 * comparison.high:+.1f})"
        words = {"better": "better than", "worse": "worse than", "same": "no better than"}[comparison.outcome]
        lines.append(f"verdict: {words} {title}: {interval}, a 95 % interval for these test images")
    return lines
