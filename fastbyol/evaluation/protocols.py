"""The evaluation protocols: each compares the trained encoder with its baselines, as a value that `result_file` stores."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fastbyol.config.errors import UserError
from fastbyol.evaluation import label_free
from fastbyol.evaluation.comparison import compare_hits
from fastbyol.evaluation.features import Features
from fastbyol.evaluation.knn import DEFAULT_K, DEFAULT_TEMPERATURE, knn_predict
from fastbyol.evaluation.linear import HELD_OUT_SHARE, L2_GRID, fit_linear
from fastbyol.evaluation.result_file import ProtocolResult, Result, SubjectScore
from fastbyol.evaluation.subjects import FeatureBank

DEFAULT_SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"l2_grid": list(L2_GRID), "held_out_share": HELD_OUT_SHARE, "seed": 0},
    "knn": {"k": DEFAULT_K, "temperature": DEFAULT_TEMPERATURE},
    "labelfree": label_free.SETTINGS,
}
"""The settings under which a result is stored, by protocol, when nothing else is asked for."""


def evaluate_linear(bank: FeatureBank, *, subjects: tuple[str, ...] = (), seed: int = 0) -> ProtocolResult:
    """Fits logistic regression on frozen features; the penalty is chosen on a held-out part of train, val is scored once (see
    `fit_linear`). subjects: those to score, all of the bank's by default.
    """

    def score(train: Features, val: Features, num_classes: int) -> tuple[torch.Tensor, dict[str, Any]]:
        classifier = fit_linear(train, num_classes=num_classes, seed=seed)
        held_out = {f"{l2:g}": top1 for l2, top1 in classifier.held_out_top1.items()}
        return classifier.scores(val.feature), {"l2": classifier.l2, "held_out_top1": held_out}

    return _evaluate("linear", bank, subjects=subjects, score=score, settings={**DEFAULT_SETTINGS["linear"], "seed": seed})


def evaluate_knn(
    bank: FeatureBank, *, subjects: tuple[str, ...] = (), k: int = DEFAULT_K, temperature: float = DEFAULT_TEMPERATURE
) -> ProtocolResult:
    """Classifies by weighted k-nearest neighbours in cosine similarity; nothing is fitted (see `knn_predict`). subjects: as for linear."""

    def score(train: Features, val: Features, num_classes: int) -> tuple[torch.Tensor, dict[str, Any]]:
        return knn_predict(train, val.feature, num_classes=num_classes, k=k, temperature=temperature, device=bank.device), {}

    return _evaluate("knn", bank, subjects=subjects, score=score, settings={"k": k, "temperature": temperature})


_Score = Callable[[Features, Features, int], tuple[torch.Tensor, dict[str, Any]]]


def _evaluate(protocol: str, bank: FeatureBank, *, subjects: tuple[str, ...], score: _Score, settings: dict[str, Any]) -> ProtocolResult:
    num_classes = len(bank.splits.class_names)
    subjects = subjects or bank.subjects
    scores, hits, num_train, label = {}, {}, 0, torch.empty(0, dtype=torch.int64)
    for subject in subjects:
        features = bank.of(subject)
        bank.announce(f"{protocol}: {bank.titles[subject]}")
        train, val = features.train.labelled(), features.val.labelled()
        start, num_train, label = time.perf_counter(), len(train.label), val.label
        if not num_train or not len(label):
            raise UserError(
                f"{'val' if num_train else 'train'} has no image with a label of the classes that both splits have: nothing to evaluate"
            )
        score_of_class, chosen = score(train, val, num_classes)
        hits[subject] = top_k_hits(score_of_class, label, k=1)
        scores[subject] = SubjectScore(
            top1=hits[subject].double().mean().item(),
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
        settings={**settings, **bank.data_settings},
        comparisons={name: compare_hits(hits[subjects[0]], hits[name]) for name in subjects[1:]},
    )


PROTOCOLS: dict[str, Callable[..., Result]] = {"linear": evaluate_linear, "knn": evaluate_knn, "labelfree": label_free.evaluate_label_free}
SCORED = ("linear", "knn")
"""Protocols that need labels."""


def top_k_accuracy(score: torch.Tensor, label: torch.Tensor, *, k: int) -> float:
    """Returns the share in [0, 1] of `top_k_hits`."""
    return top_k_hits(score, label, k=k).double().mean().item()


def top_k_hits(score: torch.Tensor, label: torch.Tensor, *, k: int) -> torch.Tensor:
    """Returns (N,) bool: whether the label of each row is among the k classes with the highest score.

    score: (N, K), any monotone scale; a class with -inf got no support and never counts as a hit. label: (N,) int64; a label >= K is
    a miss. k is capped at K.
    """
    best, column = score.topk(min(k, score.shape[1]), dim=1)
    return ((column == label[:, None]) & (best > -torch.inf)).any(dim=1)
