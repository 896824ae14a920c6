"""The evaluation protocols: each gives top-1 and top-5 on val for every subject, as a value, a JSON file and a table."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastbyol.config.errors import UserError
from fastbyol.evaluation.features import Features
from fastbyol.evaluation.knn import DEFAULT_K, DEFAULT_TEMPERATURE, knn_predict
from fastbyol.evaluation.linear import HELD_OUT_SHARE, L2_GRID, fit_linear
from fastbyol.evaluation.metrics import top_k_accuracy
from fastbyol.evaluation.subjects import SUBJECT_TITLES, SUBJECTS, FeatureBank

EVALUATION_FOLDER = "evaluation"


@dataclass(frozen=True)
class SubjectScore:
    """One subject on val. top1, top5: share in [0, 1]. seconds: features and protocol together. chosen: what the protocol picked."""

    top1: float
    top5: float
    feature_dim: int
    seconds: float
    chosen: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ProtocolResult:
    """One protocol on all subjects. chance_top1: always saying the class that is most frequent in val."""

    protocol: str
    scores: dict[str, SubjectScore]
    num_train: int
    num_val: int
    num_classes: int
    chance_top1: float
    settings: dict[str, Any]

    def write(self, folder: Path, **facts: object) -> Path:
        """Writes `folder`/<protocol>.json, whole or not at all, `facts` (step, data, command …) beside the figures; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.protocol}.json"
        unfinished = path.with_suffix(".json.tmp")
        unfinished.write_text(json.dumps({**facts, **dataclasses.asdict(self)}, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)
        return path


def read_result(path: Path) -> tuple[ProtocolResult, dict[str, Any]]:
    """What `ProtocolResult.write` wrote: the result, and the facts. Raises UserError when the file is none of ours."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["scores"] = {name: SubjectScore(**score) for name, score in record["scores"].items()}
        names = {f.name for f in dataclasses.fields(ProtocolResult)}
        result = ProtocolResult(**{name: record.pop(name) for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an evaluation result ({error}); delete it and evaluate again") from error
    return result, record


def read_current(folder: Path, protocol: str, *, step: int, data: str) -> tuple[ProtocolResult, dict[str, Any]] | None:
    """What is already written for this step and this data, or None where that is to be evaluated."""
    path = folder / f"{protocol}.json"
    if not path.is_file():
        return None
    result, facts = read_result(path)
    same = (facts.get("step"), facts.get("data")) == (step, data) and set(result.scores) == set(SUBJECTS)
    return (result, facts) if same else None


def evaluate_linear(bank: FeatureBank, *, subjects: tuple[str, ...] = SUBJECTS, seed: int = 0) -> ProtocolResult:
    """Logistic regression on frozen features; the penalty is chosen on a held-out part of train, val is scored once (see `fit_linear`)."""

    def score(train: Features, val: Features, num_classes: int) -> tuple[torch.Tensor, dict[str, Any]]:
        classifier = fit_linear(train, num_classes=num_classes, seed=seed)
        held_out = {f"{l2:g}": top1 for l2, top1 in classifier.held_out_top1.items()}
        return classifier.scores(val.feature), {"l2": classifier.l2, "held_out_top1": held_out}

    settings = {"l2_grid": list(L2_GRID), "held_out_share": HELD_OUT_SHARE, "seed": seed}
    return _evaluate("linear", bank, subjects=subjects, score=score, settings=settings)


def evaluate_knn(
    bank: FeatureBank, *, subjects: tuple[str, ...] = SUBJECTS, k: int = DEFAULT_K, temperature: float = DEFAULT_TEMPERATURE
) -> ProtocolResult:
    """Weighted k-nearest neighbours in cosine similarity; nothing is fitted (see `knn_predict`)."""

    def score(train: Features, val: Features, num_classes: int) -> tuple[torch.Tensor, dict[str, Any]]:
        return knn_predict(train, val.feature, num_classes=num_classes, k=k, temperature=temperature, device=bank.device), {}

    return _evaluate("knn", bank, subjects=subjects, score=score, settings={"k": k, "temperature": temperature})


_Score = Callable[[Features, Features, int], tuple[torch.Tensor, dict[str, Any]]]


def _evaluate(protocol: str, bank: FeatureBank, *, subjects: tuple[str, ...], score: _Score, settings: dict[str, Any]) -> ProtocolResult:
    splits, num_classes = bank.splits, len(bank.splits.class_names)
    scores, label = {}, torch.empty(0, dtype=torch.int64)
    for subject in subjects:
        features = bank.of(subject)
        bank.announce(f"{protocol}: {SUBJECT_TITLES[subject]}")
        start, label = time.perf_counter(), features.val.label
        score_of_class, chosen = score(features.train, features.val, num_classes)
        scores[subject] = SubjectScore(
            top1=top_k_accuracy(score_of_class, label, k=1),
            top5=top_k_accuracy(score_of_class, label, k=5),
            feature_dim=features.val.feature.shape[1],
            seconds=round(features.seconds + time.perf_counter() - start, 3),
            chosen=chosen,
        )
    return ProtocolResult(
        protocol=protocol,
        scores=scores,
        num_train=splits.train.num_samples,
        num_val=splits.val.num_samples,
        num_classes=num_classes,
        chance_top1=label.bincount().max().item() / len(label),
        settings=settings,
    )


PROTOCOLS: dict[str, Callable[..., ProtocolResult]] = {"linear": evaluate_linear, "knn": evaluate_knn}
