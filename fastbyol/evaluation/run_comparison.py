"""Several runs side by side: how far each came, in which options they differ, and the scores that their folders hold."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbyol.config.errors import UserError
from fastbyol.config.plain import flatten, to_plain
from fastbyol.config.schema import TrainConfig
from fastbyol.evaluation.result_file import LabelFreeResult, ProtocolResult, Result, TaskResult, results_in
from fastbyol.evaluation.subjects import BASELINE_TITLES
from fastbyol.evaluation.summary import MEASURES
from fastbyol.evaluation.training_log import Record, Throughput, read_provenance, throughput
from fastbyol.evaluation.verdict import PROTOCOL_TITLES
from fastbyol.host.durable_files import holder_of_lock
from fastbyol.run.checkpoint import RESULTS, checkpoint_steps
from fastbyol.run.folder import CONFIG_FILE, FREE_TO_CHANGE, LOCK_FILE, divergence_of, is_collapse, read_config
from fastbyol.run.log import METRICS_FILE, read_metrics

COMPLETE, RUNNING, STOPPED, COLLAPSED, DIVERGED = "complete", "running", "stopped", "collapsed", "diverged"
TITLES = PROTOCOL_TITLES | {"labelfree": "without labels"}
NAMES_THE_RUN = frozenset({"out"})
WITHOUT_EFFECT = FREE_TO_CHANGE - {"data.train", "rank_batch"}
"""Options that change speed, logging and storage, not what is learnt; rank_batch has an effect on batch norm."""


@dataclass(frozen=True)
class Outcome:
    """How far a run came. word: one of the constants above. text: the same with steps and the reason, for people."""

    word: str
    text: str
    steps: int


@dataclass(frozen=True)
class Figure:
    """One score of one run. form: for str.format, of the value times 100 where it ends with '%'. better: 1 where a higher value is better,
    -1 where a lower one is, 0 where neither, as for baselines.
    """

    value: float
    form: str
    better: int

    @property
    def text(self) -> str:
        return self.form.format(self.value * (100 if self.form.endswith("%") else 1))


@dataclass(frozen=True)
class Score:
    """One result file of a run. key: equal for results that may be compared. figures: by title, the deciding one first. step: of the encoder."""

    key: str
    title: str
    note: str
    protocol: str
    num_val: int
    figures: dict[str, Figure]
    step: int | None


@dataclass(frozen=True)
class ComparedRun:
    """A run folder, read. name: short, and different for each run of the comparison."""

    name: str
    folder: Path
    config: TrainConfig
    records: list[Record]
    provenance: Record
    outcome: Outcome
    scores: list[Score] = field(default_factory=list)

    @property
    def speed(self) -> Throughput:
        return throughput(self.records, self.provenance)

    @property
    def seconds(self) -> float:
        """Seconds of training, over all its starts, up to the last logged step."""
        return next((float(r["time_s"]) for r in reversed(self.records) if r.get("time_s") is not None), math.nan)

    def last(self, key: str) -> float:
        """Returns the newest value of the key in the log; NaN if it was never measured."""
        return next((float(r[key]) for r in reversed(self.records) if r.get(key) is not None), math.nan)


@dataclass(frozen=True)
class ScoreGroup:
    """Results of one task on the same images with the same settings, in all runs. scores: by position of the run; those without are left out."""

    title: str
    note: str
    protocol: str
    scores: dict[int, Score]

    def measures(self) -> list[str]:
        return list(dict.fromkeys(title for score in self.scores.values() for title in score.figures))

    def best(self, measure: str) -> set[int]:
        """Returns the positions of the runs with the best value; none where only one run has a value, or no value is better than another."""
        figures = {i: score.figures[measure] for i, score in self.scores.items() if measure in score.figures}
        if len(figures) < 2 or not next(iter(figures.values())).better:
            return set()
        best = max(figure.value * figure.better for figure in figures.values())
        winners = {i for i, figure in figures.items() if figure.value * figure.better == best}
        return winners if len(winners) < len(figures) else set()

    @property
    def noise(self) -> float | None:
        """Standard deviation of one accuracy from that many test images, a share; None where the deciding figure is not an accuracy."""
        known = [(score.num_val, next(iter(score.figures.values())).value) for score in self.scores.values() if score.num_val]
        deviations = [math.sqrt(share * (1 - share) / num) for num, share in known if 0 <= share <= 1]
        return statistics.median(deviations) if deviations else None


@dataclass(frozen=True)
class RunComparison:
    """The runs in the order given, and what could not be read, a line each."""

    runs: list[ComparedRun]
    remarks: list[str]

    def differences(self, *, with_effect: bool) -> dict[str, list[Any]]:
        """Returns the value in each run of every option in which they differ. with_effect: only options that change what is learnt; False: only the others."""
        flat = [flatten(to_plain(run.config)) for run in self.runs]
        names = [name for name in flat[0] if name not in NAMES_THE_RUN and (name not in WITHOUT_EFFECT) == with_effect]
        values = {name: [one[name] for one in flat] for name in names}
        return {name: each for name, each in values.items() if any(value != each[0] for value in each)}

    def score_groups(self) -> list[ScoreGroup]:
        """Returns the results that may be compared, those of the most runs first within a task."""
        found: dict[str, ScoreGroup] = {}
        for position, run in enumerate(self.runs):
            for score in run.scores:
                group = found.setdefault(score.key, ScoreGroup(score.title, score.note, score.protocol, {}))
                # Keep one result of each run: that of its latest step, and of several the newest (scores are ordered by age), for example of another seed.
                if position not in group.scores or (score.step or 0) >= (group.scores[position].step or 0):
                    group.scores[position] = score
        order = list(dict.fromkeys(["linear", "knn", "labelfree", *(group.protocol for group in found.values())]))
        return sorted(found.values(), key=lambda group: (order.index(group.protocol), -len(group.scores)))

    def x_axis(self) -> tuple[str, str]:
        """Returns 'step' or 'epoch', which the curves are best drawn over, and why."""
        if len({run.config.global_batch for run in self.runs}) > 1:
            return "epoch", "passes over a run's own images, because the runs have batches of different sizes"
        return "step", "optimizer steps; all runs have the same batch size"

    @property
    def num_data(self) -> int:
        """Number of different training sets, as far as their paths tell."""
        return len({run.config.data.train for run in self.runs})


def read_runs(folders: Sequence[str]) -> RunComparison:
    """Reads the run folders without their weights. Damaged results are left out; they and runs without a log are named in `remarks`.

    Raises UserError for fewer than two folders, one that is no run, and one that is given twice.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise UserError("compare: give two run folders or more; of one run alone, python -m fastbyol report writes a page")
    known: dict[Path, Path] = {}
    for path in paths:
        if not (path / CONFIG_FILE).is_file():
            there = (
                f"it has no {CONFIG_FILE}"
                if path.is_dir()
                else "it is a file; */ names folders only"
                if path.exists()
                else "no such folder"
            )
            raise UserError(f"{path}: is not a run folder ({there}); give folders that fastbyol/train.py has written, or leave it out")
        if (resolved := path.resolve()) in known:
            also = f", as {known[resolved]}" if known[resolved] != path else ""
            raise UserError(f"{path}: is given twice{also}; leave one out")
        known[resolved] = path
    remarks: list[str] = []
    runs = [_read_run(path, name, remarks) for path, name in zip(paths, _names(list(known)), strict=True)]
    return RunComparison(runs, remarks)


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of the paths that tell all of them apart."""
    longest = max(len(path.parts) for path in paths)
    for length in range(1, longest + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read_run(folder: Path, name: str, remarks: list[str]) -> ComparedRun:
    config = read_config(folder, way_out="mend it, or leave this run out")
    records: list[Record] = []
    provenance: Record = {}
    try:
        records = read_metrics(folder)
        if not records:
            remarks.append(f"{folder / METRICS_FILE}: no logged step yet, so {name} has no curves and no speed")
        provenance = read_provenance(folder)
    except UserError as error:
        remarks.append(str(error))
    scores = []
    for path, result, facts in results_in(folder / RESULTS, complain=remarks.append):
        try:
            scores.append(_score(result, facts))
        except (ValueError, TypeError, AttributeError) as error:  # figures that are no numbers, groups that are none
            remarks.append(f"{path}: not an evaluation result ({error}); delete it and evaluate again")
    return ComparedRun(name, folder, config, records, provenance, outcome_of(folder, config, records), scores)


def outcome_of(folder: Path, config: TrainConfig, records: Sequence[Record]) -> Outcome:
    """Returns how far the run came, from its log, its checkpoints, its lock and the note that a diverged run leaves."""
    logged = records[-1]["step"] + 1 if records else 0
    steps = max([logged, *checkpoint_steps(folder)[-1:]])
    epoch = float(records[-1].get("epoch") or 0.0) if records else 0.0
    length = (
        f" of {config.steps:,}"
        if config.steps
        else f", epoch {epoch:.3g} of {config.epochs:g}"
        if records
        else f" of {config.epochs:g} epochs"
    )
    at = f"step {steps:,}{length}"
    # The folder does not state the run's length in steps, but a complete run's last step ends less than a step before its last epoch does.
    complete = steps >= config.steps if config.steps else bool(logged) and epoch * (1 + 1 / logged) > config.epochs
    since = _alarmed_since(records)
    collapse = f"; alarm of collapse since step {since:,}" if since is not None else ""
    if why := divergence_of(folder):
        return Outcome(COLLAPSED if is_collapse(why) else DIVERGED, f"{at}: {why}", steps)
    if holder := holder_of_lock(folder / LOCK_FILE):
        return Outcome(RUNNING, f"{at}, being run by {holder}{collapse}", steps)
    if since is not None:
        return Outcome(COLLAPSED, f"{'complete, ' if complete else 'stopped at '}{at}{collapse}", steps)
    return Outcome(COMPLETE if complete else STOPPED, at, steps)


def _alarmed_since(records: Sequence[Record]) -> int | None:
    """Returns the first step, from 1, of the alarm that the log ends with, or None if it ends without one."""
    since = None
    for record in reversed(records):
        if not record.get("alarm"):
            break
        since = record["step"] + 1
    return since


def _score(result: Result | TaskResult, facts: dict[str, Any]) -> Score:
    """Returns the figures of a result. Raises UserError if one of them is no number."""
    data = str(facts.get("data", ""))
    images = str(Path(data).resolve()) if data and Path(data).exists() else data
    settings = {name: value for name, value in result.settings.items() if name not in ("identity", "seed")}
    # The key leaves out what identifies encoders and run: these differ between runs that may be compared.
    key = json.dumps([result.protocol, images, settings, _size(result)], sort_keys=True, default=str)
    step = facts.get("step")
    return Score(
        key=key,
        title=f"{TITLES.get(result.protocol, result.protocol.replace('-', ' '))} on {data}",
        note=_note(result),
        protocol=result.protocol,
        num_val=result.num_val if isinstance(result, ProtocolResult) else 0,
        figures=dict(_figures(result)),
        step=step if isinstance(step, int) else None,
    )


def _size(result: Result | TaskResult) -> Any:
    if isinstance(result, TaskResult):
        return result.sizes
    return [result.num_train, result.num_val, result.num_classes] if isinstance(result, ProtocolResult) else result.num_images


def _note(result: Result | TaskResult) -> str:
    if isinstance(result, TaskResult):
        sizes = ", ".join(f"{_number(count):,.0f} {split}" for split, count in result.sizes.items())
        return ". ".join([f"{result.version} settings; images: {sizes}", *map(str, result.notes)])
    if isinstance(result, LabelFreeResult):
        return f"{_number(result.num_images):,.0f} images, with two of the run's own views of each of {_number(result.num_pairs):,.0f}"
    settings = ", ".join(f"{name} {value}" for name, value in result.settings.items() if name != "seed" and not isinstance(value, list))
    chance = _number(result.chance_top1)
    return (
        f"{_number(result.num_train):,.0f} train and {_number(result.num_val):,.0f} val images of {_number(result.num_classes):,.0f} classes; "
        f"chance {100 * chance:.1f} %" + (f"; {settings}" if settings else "")
    )


def _figures(result: Result | TaskResult) -> Iterator[tuple[str, Figure]]:
    if isinstance(result, TaskResult):
        for position, subject in enumerate(result.subjects.values()):
            for name, column in result.columns.items():
                if name in subject.scores:
                    form = "{:.1f} %" if column.endswith("%") else "{:.3f}"
                    title = column.removeprefix("-").removesuffix("%").strip() + (f", {subject.title}" if position else "")
                    yield title, Figure(_number(subject.scores[name]), form, 0 if position else -1 if column.startswith("-") else 1)
        return
    if isinstance(result, LabelFreeResult):
        for name, (title, form, _) in MEASURES.items():
            if (value := result.measures.get("byol", {}).get(name)) is not None:
                # None is best: each run's views are its own, and a collapsed run has the closest ones.
                yield title, Figure(_number(value), form, 0)
        return
    for position, (subject, score) in enumerate(result.scores.items()):
        yield (
            "top-1" + (f", {BASELINE_TITLES.get(subject, subject)}" if position else ""),
            Figure(_number(score.top1), "{:.1f} %", not position),
        )
        if not position and _number(result.num_classes) > 5:
            yield "top-5", Figure(_number(score.top5), "{:.1f} %", 1)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{value!r:.60} is not a number")
    return float(value)
