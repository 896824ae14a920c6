"""The files that hold results: JSON in the run's folder, one for each protocol, data set and settings."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbyol.config.console import say
from fastbyol.config.errors import UserError
from fastbyol.evaluation.comparison import Comparison
from fastbyol.host.durable_files import write_durably

log = logging.getLogger("fastbyol")


@dataclass(frozen=True)
class SubjectScore:
    """Result of one subject on val.

    top1, top5: share in [0, 1]. seconds: features and protocol together. chosen: hyperparameters that the protocol selected.
    """

    top1: float
    top5: float
    feature_dim: int
    seconds: float
    chosen: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ProtocolResult:
    """Accuracy of all subjects in one protocol.

    chance_top1: accuracy of always predicting the most frequent class of val. comparisons: the trained encoder against each baseline.
    """

    protocol: str
    scores: dict[str, SubjectScore]
    num_train: int
    num_val: int
    num_classes: int
    chance_top1: float
    settings: dict[str, Any]
    comparisons: dict[str, Comparison] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelFreeResult:
    """Measures that need no labels, for the trained and the untrained encoder, by subject and name.

    num_images: images of the ranks. num_pairs: images of which two views were drawn. comparisons: whose features find an image's other
    view more often.
    """

    protocol: str
    measures: dict[str, dict[str, float]]
    num_images: int
    num_pairs: int
    settings: dict[str, Any]
    comparisons: dict[str, Comparison] = field(default_factory=dict)


@dataclass(frozen=True)
class SubjectResult:
    """One encoder in a task: scores by column (`TaskResult.columns`), what was chosen on held-out images, seconds, and further figures."""

    title: str
    scores: dict[str, float]
    seconds: float
    chosen: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskResult:
    """Scores of all encoders in a task of the paper.

    protocol: name of the task. version: 'paper' or 'quick'. columns: title of each score, a share in [0, 1] where it ends with ' %', lower is
    better where it begins with '-'. sizes: number of images by split. paper: its rows, by title, in the unit of the titles (per cent).
    comparisons: the trained encoder against the others on the same test images. notes: what a reader must know to compare with the paper.
    missing: names of parts without a score, as data sets that are not there; the same command tries them again.
    """

    protocol: str
    version: str
    settings: dict[str, Any]
    columns: dict[str, str]
    subjects: dict[str, SubjectResult]
    sizes: dict[str, int]
    paper: dict[str, dict[str, float]] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


Result = ProtocolResult | LabelFreeResult


def write_result(result: Result | TaskResult, folder: Path, *, data: str, **facts: object) -> Path:
    """Writes the result with data and `facts` (step, command, inputs, ...) to a file in `folder`, atomically, and returns its path.

    The first data set and settings get <protocol>.json, the next ones <protocol>-2.json, and so on; only a later result on the same data
    with the same settings, and of the same run, replaces an earlier one. Raises OSError if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = next(
        path
        for path in _paths(folder, result.protocol)
        if not path.exists() or _is_for(path, data=data, settings=result.settings, run=facts.get("run"))
    )
    if path.exists() and (before := _record(path)) and before.get("step") != facts.get("step"):
        log.warning("%s: replaces the figures of step %s on the same data", path, before.get("step"))
    write_durably(path, json.dumps({"data": data, **facts, **dataclasses.asdict(result)}, indent=2) + "\n")
    return path


def _paths(folder: Path, protocol: str) -> Iterator[Path]:
    return (folder / f"{protocol}{'' if number == 1 else f'-{number}'}.json" for number in itertools.count(1))


def _is_for(path: Path, *, data: str, settings: dict[str, Any], run: object) -> bool:
    """Returns True if the file holds the result of the same data, settings and run, or no readable result."""
    record = _record(path)
    return not record or (record.get("data", data) == data and record.get("settings") == settings and record.get("run", run) == run)


def _record(path: Path) -> dict[str, Any]:
    """Returns the content of a result file, or {} if the file is not a result."""
    try:
        read_result(path)
        return json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        return {}


def write_or_say(result: Result | TaskResult, folder: Path, *, data: str, **facts: object) -> bool:
    """Writes the result and prints its path, or a message if it cannot be written: the figures cost too much time to end with an error.

    Returns whether it is written.
    """
    try:
        say(f"wrote {write_result(result, folder, data=data, **facts)}", file=sys.stderr)
        return True
    except OSError as error:
        say(
            f"{folder}: cannot be written ({error.strerror}), so the {result.protocol} figures are only shown; use --out to save them elsewhere",
            file=sys.stderr,
        )
        return False


def read_result(path: Path) -> tuple[Result | TaskResult, dict[str, Any]]:
    """Reads a file of `write_result`: the result and its facts. Raises UserError if it is not such a file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["comparisons"] = {name: Comparison(**values) for name, values in record.get("comparisons", {}).items()}
        kind = LabelFreeResult if "measures" in record else TaskResult if "subjects" in record else ProtocolResult
        if kind is TaskResult:
            record["subjects"] = {name: SubjectResult(**subject) for name, subject in record["subjects"].items()}
        if kind is ProtocolResult:
            record["scores"] = {name: SubjectScore(**score) for name, score in record["scores"].items()}
        result = kind(**{f.name: record.pop(f.name) for f in dataclasses.fields(kind)})
        if not isinstance(result.settings, dict):
            raise ValueError("its settings are no group of values")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an evaluation result ({error}); delete it and evaluate again") from error
    return result, record


def seed_text(facts: dict[str, Any]) -> str:
    """Returns ', seed N' of a task's result, by which results of several seeds are told apart; '' for a result of an earlier version, which has no seed."""
    return f", seed {facts['seed']}" if "seed" in facts else ""


def results_in(folder: Path, *, complain: Callable[[str], None] = lambda _: None) -> list[tuple[Path, Result | TaskResult, dict[str, Any]]]:
    """Returns path, result and facts of each result in the folder that counts, the oldest first.

    Of a task's results on one data path, with the same settings and step, only those on the same images as the newest one count: the others are of
    images that were there before. Of these, only the newest for the same encoders and seed counts. complain: called with the error of each file
    that cannot be read.
    """
    found = []
    for path in (path for path in folder.glob("*.json") if path.is_file()):
        try:
            found.append((path.stat().st_mtime_ns, path.name, path, *read_result(path)))
        except (UserError, OSError) as error:
            complain(str(error))
    counted, images, seen = [], dict[str, str](), set[str]()
    for _, _, path, result, facts in sorted(found, key=lambda one: one[:2], reverse=True):
        if isinstance(result, TaskResult):
            settings = {name: value for name, value in result.settings.items() if name != "identity"}
            task = json.dumps([result.protocol, facts.get("data"), facts.get("step"), settings], sort_keys=True)
            # `inputs` is the digest of the first encoder's weights, a blank, and the state of the data.
            state = str(facts.get("inputs", "")).partition(" ")[2]
            one = json.dumps([task, list(result.subjects), facts.get("seed")])
            if images.setdefault(task, state) != state or one in seen:
                continue
            seen.add(one)
        counted.append((path, result, facts))
    return counted[::-1]


def read_current(
    folder: Path, protocol: str, *, step: int, data: str, inputs: str, settings: dict[str, Any]
) -> tuple[Result, dict[str, Any]] | None:
    """Returns the existing result and facts for this step and data, or None if it still has to be computed.

    inputs: text for weights and data as they are now (`evaluate.inputs_of`); a result with another text is not returned.

    Of several results, returns the one with these settings, else the one of the lowest number. Leaves out results without comparisons, which
    are of an earlier version.
    """
    found = []
    for path in itertools.takewhile(Path.is_file, _paths(folder, protocol)):
        try:
            result, facts = read_result(path)
        except UserError:  # damaged: it is computed anew, and replaced
            continue
        if isinstance(result, TaskResult):
            continue
        if (
            (facts.get("step"), facts.get("data"), facts.get("inputs")) == (step, data, inputs)
            and result.comparisons
            and not result.settings.get("subset")
        ):
            found.append((result, facts))
    return next((one for one in found if one[0].settings == settings), found[0] if found else None)
