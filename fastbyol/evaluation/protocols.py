"""The evaluation protocols: each computes top-1 and top-5 on val for every subject, as a value, a JSON file and a table."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastbyol.config.console import say
from fastbyol.config.errors import UserError
from fastbyol.evaluation.features import Features
from fastbyol.evaluation.knn import DEFAULT_K, DEFAULT_TEMPERATURE, knn_predict
from fastbyol.evaluation.linear import HELD_OUT_SHARE, L2_GRID, fit_linear
from fastbyol.evaluation.subjects import SUBJECT_TITLES, SUBJECTS, FeatureBank
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
    """Result of one protocol on all subjects. chance_top1: accuracy of always predicting the most frequent class of val."""

    protocol: str
    scores: dict[str, SubjectScore]
    num_train: int
    num_val: int
    num_classes: int
    chance_top1: float
    settings: dict[str, Any]

    def write(self, folder: Path, *, data: str, **facts: object) -> Path:
        """Writes the result with data and `facts` (step, command, ...) to a file in `folder`, atomically, and returns its path.

        The first data set gets <protocol>.json, the next one <protocol>-2.json, and so on; a later result on the same data replaces
        the earlier one. Raises OSError if the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = next(path for path in _result_paths(folder, self.protocol) if not path.exists() or _facts_of(path).get("data", data) == data)
        if path.exists() and (before := _facts_of(path)) and before.get("step") != facts.get("step"):
            log.warning("%s: replaces the figures of step %s on the same data", path, before.get("step"))
        write_durably(path, json.dumps({"data": data, **facts, **dataclasses.asdict(self)}, indent=2) + "\n")
        return path


def _result_paths(folder: Path, protocol: str) -> Iterator[Path]:
    return (folder / f"{protocol}{'' if number == 1 else f'-{number}'}.json" for number in itertools.count(1))


def _facts_of(path: Path) -> dict[str, Any]:
    """Returns the facts of a result file, or {} if the file is not a result."""
    try:
        return read_result(path)[1]
    except UserError:
        return {}


def write_or_say(result: ProtocolResult, folder: Path, *, data: str, **facts: object) -> None:
    """Writes the result and prints its path, or a message if it cannot be written: the figures cost too much time to end with an error."""
    try:
        say(f"wrote {result.write(folder, data=data, **facts)}", file=sys.stderr)
    except OSError as error:
        say(
            f"{folder}: cannot be written ({error.strerror}), so the {result.protocol} figures are only shown; use --out to save them elsewhere",
            file=sys.stderr,
        )


def read_result(path: Path) -> tuple[ProtocolResult, dict[str, Any]]:
    """Reads a result written by `ProtocolResult.write`: the result and its facts. Raises UserError if it is not such a file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["scores"] = {name: SubjectScore(**score) for name, score in record["scores"].items()}
        names = {f.name for f in dataclasses.fields(ProtocolResult)}
        result = ProtocolResult(**{name: record.pop(name) for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an evaluation result ({error}); delete it and evaluate again") from error
    return result, record


def read_current(folder: Path, protocol: str, *, step: int, data: str) -> tuple[ProtocolResult, dict[str, Any]] | None:
    """Returns the existing result and facts for this step and data, or None if it still has to be computed."""
    for path in itertools.takewhile(Path.is_file, _result_paths(folder, protocol)):
        result, facts = read_result(path)
        if (facts.get("step"), facts.get("data")) == (step, data) and set(result.scores) == set(SUBJECTS):
            return result, facts
    return None


def evaluate_linear(bank: FeatureBank, *, subjects: tuple[str, ...] = SUBJECTS, seed: int = 0) -> ProtocolResult:
    """Fits logistic regression on frozen features; the penalty is chosen on a held-out part of train, val is scored once (see
    `fit_linear`).
    """

    def score(train: Features, val: Features, num_classes: int) -> tuple[torch.Tensor, dict[str, Any]]:
        classifier = fit_linear(train, num_classes=num_classes, seed=seed)
        held_out = {f"{l2:g}": top1 for l2, top1 in classifier.held_out_top1.items()}
        return classifier.scores(val.feature), {"l2": classifier.l2, "held_out_top1": held_out}

    settings = {"l2_grid": list(L2_GRID), "held_out_share": HELD_OUT_SHARE, "seed": seed}
    return _evaluate("linear", bank, subjects=subjects, score=score, settings=settings)


def evaluate_knn(
    bank: FeatureBank, *, subjects: tuple[str, ...] = SUBJECTS, k: int = DEFAULT_K, temperature: float = DEFAULT_TEMPERATURE
) -> ProtocolResult:
    """Classifies by weighted k-nearest neighbours in cosine similarity; nothing is fitted (see `knn_predict`)."""

    def score(train: Features, val: Features, num_classes: int) -> tuple[torch.Tensor, dict[str, Any]]:
        return knn_predict(train, val.feature, num_classes=num_classes, k=k, temperature=temperature, device=bank.device), {}

    return _evaluate("knn", bank, subjects=subjects, score=score, settings={"k": k, "temperature": temperature})


_Score = Callable[[Features, Features, int], tuple[torch.Tensor, dict[str, Any]]]


def _evaluate(protocol: str, bank: FeatureBank, *, subjects: tuple[str, ...], score: _Score, settings: dict[str, Any]) -> ProtocolResult:
    num_classes = len(bank.splits.class_names)
    scores, num_train, label = {}, 0, torch.empty(0, dtype=torch.int64)
    for subject in subjects:
        features = bank.of(subject)
        bank.announce(f"{protocol}: {SUBJECT_TITLES[subject]}")
        train, val = features.train.labelled(), features.val.labelled()
        start, num_train, label = time.perf_counter(), len(train.label), val.label
        if not num_train or not len(label):
            raise UserError(
                f"{'val' if num_train else 'train'} has no image with a label of the classes that both splits have: nothing to evaluate"
            )
        score_of_class, chosen = score(train, val, num_classes)
        scores[subject] = SubjectScore(
            top1=top_k_accuracy(score_of_class, label, k=1),
            top5=top_k_accuracy(score_of_class, label, k=5),
            feature_dim=val.feature.shape[1],
            seconds=round(features.seconds + time.perf_counter() - start, 3),
            chosen=chosen,
        )
    return ProtocolResult(
        protocol=protocol,
        scores=scores,
        num_train=num_train,
        num_val=len(label),
        num_classes=num_classes,
        chance_top1=label.bincount().max().item() / len(label),
        settings=settings,
    )


PROTOCOLS: dict[str, Callable[..., ProtocolResult]] = {"linear": evaluate_linear, "knn": evaluate_knn}


def top_k_accuracy(score: torch.Tensor, label: torch.Tensor, *, k: int) -> float:
    """Share in [0, 1] of rows whose label is among the k classes with the highest score.

    score: (N, K), any monotone scale; a class with -inf got no support and never counts as a hit. label: (N,) int64; a label >= K is
    a miss. k is capped at K.
    """
    best, column = score.topk(min(k, score.shape[1]), dim=1)
    hit = (column == label[:, None]) & (best > -torch.inf)
    return hit.any(dim=1).double().mean().item()
