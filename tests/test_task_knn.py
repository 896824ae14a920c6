"""kNN over a grid: its votes against scikit-learn, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastbyol.evaluation.knn import nearest
from fastbyol.evaluation.tasks.knn_sweep import KnnSettings, votes
from tests.forked import run_ranks
from tests.test_report import call

FAST = ("--settings", "paper", "--batch", "16", "--device", "cpu", "--workers", "1")


@pytest.mark.parametrize("temperature", [None, 0.07, 0.2])
@pytest.mark.parametrize("k", [1, 5, 30])
def test_votes_are_scikit_learns(k, temperature):
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(0)
    keys, queries = (F.normalize(torch.randn(num, 6, generator=generator), dim=1) for num in (80, 50))
    label = torch.randint(4, (80,), generator=generator)
    weights = "uniform" if temperature is None else (lambda distance: np.exp((1 - distance) / temperature))
    oracle = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights).fit(keys, label)
    similarity, position = nearest(keys, queries, k=k)
    score = votes(similarity, label[position], temperature, num_classes=4)
    share = score.exp() / score.exp().sum(1, keepdim=True)
    assert np.allclose(share.numpy(), oracle.predict_proba(queries), atol=1e-5)
    assert np.array_equal(score.argmax(1).numpy(), oracle.predict(queries))


def test_a_class_without_a_neighbour_scores_minus_infinity():
    score = votes(torch.tensor([[0.9, 0.8]]), torch.tensor([[2, 2]]), 0.07, num_classes=3)
    assert score[0, :2].tolist() == [-float("inf")] * 2
    assert score[0, 2] > 0


def test_the_grid_has_each_classifier_once_and_few_neighbours_first():
    settings = KnnSettings(neighbours=(20, 5), temperatures=(0.07, 0.1))
    assert settings.grid() == [(5, 0.07), (5, 0.1), (5, None), (20, 0.07), (20, 0.1), (20, None)]
    assert KnnSettings(neighbours=(3,), votes=("plain",)).grid() == [(3, None)]


@pytest.mark.distributed
def test_the_command_keeps_the_grid_and_two_ranks_find_what_one_finds(colours_run, colours, tmp_path, capsys):
    arguments = ["evaluate", "knn", "--checkpoint", str(colours_run), "--data", str(colours), *FAST]
    code, out, err = call([*arguments, "--out", str(tmp_path / "one")], capsys)
    assert code == 0, err
    assert "k of 100, 200 left out: there are 65 training images to choose from" in out
    one = json.loads((tmp_path / "one" / "knn.json").read_text())["subjects"]
    assert len(one["byol"]["details"]["grid"]) == 5 * 5
    best = one["byol"]["chosen"]["classifier"]
    assert one["byol"]["scores"]["top1"] == one["byol"]["details"]["grid"][best]["top1"]
    for done in run_ranks("-m", "fastbyol", *arguments, "--out", tmp_path / "two"):
        assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "knn.json").read_text())["subjects"]
    for subject in ("byol", "untrained"):
        assert two[subject]["chosen"] == one[subject]["chosen"]
        assert two[subject]["details"]["grid"] == one[subject]["details"]["grid"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--neighbours", "0"], "--neighbours = (0,)"),
        (["--neighbours", "5000"], "--neighbours 5000: there are only 65 training images"),
        (["--temperatures", "0"], "--temperatures = (0.0,)"),
        (["--votes", "loud"], "--votes = ('loud',)"),
        (["--held_out", "100"], "--held_out 100: 100 of 72 labelled training images"),
    ],
)
def test_a_mistake_is_one_line(colours_run, colours, tmp_path, capsys, options, said):
    typed = ["evaluate", "knn", "--checkpoint", str(colours_run), "--data", str(colours), "--out", str(tmp_path), *FAST, *options]
    code, out, err = call(typed, capsys)
    assert (code, out) == (2, "")
    assert said in err
