"""The verdict: intervals against resampling and McNemar's test, the words for each outcome, and advice whose options train.py takes."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from fastbyol.config.presets import preset_config
from fastbyol.config.schema import TrainConfig
from fastbyol.config.views import PAPER, both
from fastbyol.evaluation.advice import MOST_IDEAS, RunFacts, are_grey, first_ideas
from fastbyol.evaluation.comparison import Comparison, compare_hits
from fastbyol.evaluation.result_file import LabelFreeResult, ProtocolResult, SubjectScore
from fastbyol.evaluation.splits import Split
from fastbyol.evaluation.verdict import difference_text, verdict_on
from fastbyol.run.command_line import parse_train_config
from tests.test_evaluation_protocols import SIZE_PX, StoredImages

FACTS = RunFacts(preset_config("cpu_demo"), step=90, epoch=20.0, alarms=[], grey=False)


def hits(*, both_right: int, gained: int, lost: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.tensor([[1, 1]] * both_right + [[1, 0]] * gained + [[0, 1]] * lost + [[0, 0]] * neither, dtype=torch.bool)
    return table[:, 0], table[:, 1]


def test_the_interval_is_that_of_resampling_the_images():
    subject, baseline = hits(both_right=420, gained=90, lost=50, neither=240)
    found = compare_hits(subject, baseline)
    assert (found.difference, found.gained, found.lost) == (40 / 800, 90, 50)
    each = subject.double().numpy() - baseline.double().numpy()
    rng = np.random.default_rng(0)
    low, high = np.percentile([rng.choice(each, size=800).mean() for _ in range(4000)], [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.003)


def test_the_interval_is_that_of_the_published_formula():
    """Bonett and Price: (c + 1 - b - 1) / (n + 2) -+ z sqrt of the variance, at b = 12, c = 1, n = 13 by hand."""
    found = compare_hits(*hits(both_right=0, gained=12, lost=1, neither=0))
    p, q = 13 / 15, 2 / 15
    half = 1.959964 * ((p + q - (p - q) ** 2) / 15) ** 0.5
    assert (found.low, found.high) == pytest.approx((p - q - half, min(1, p - q + half)), abs=1e-6)


@pytest.mark.parametrize("discordant", [20, 80, 300])
def test_the_outcome_agrees_with_mcnemars_exact_test_away_from_its_threshold(discordant):
    compared = 0
    for gained in range(discordant + 1):
        p_value = binomtest(gained, discordant, 0.5).pvalue
        if 0.02 < p_value < 0.1:
            continue
        outcome = compare_hits(*hits(both_right=100, gained=gained, lost=discordant - gained, neither=400)).outcome
        expected = "same" if p_value >= 0.1 else "better" if 2 * gained > discordant else "worse"
        assert outcome == expected, (gained, discordant, p_value)
        compared += 1
    assert compared > 0.8 * discordant


def test_equal_hits_are_no_difference_and_an_interval_around_it():
    same = torch.tensor([True, False] * 50)
    found = compare_hits(same, same)
    assert found.difference == 0
    assert found.low == -found.high < 0
    assert found.outcome == "same"


def test_each_outcome_has_its_words_and_its_interval():
    better, worse, same = Comparison(0.031, 0.012, 0.05, 9, 2), Comparison(-0.03, -0.05, -0.01, 2, 9), Comparison(0.01, -0.02, 0.04, 5, 4)
    assert difference_text(better, "raw pixels") == "better than raw pixels by 3.1 points (1.2 to 5.0)"
    assert difference_text(worse, "raw pixels") == "worse than raw pixels by 3.0 points (1.0 to 5.0)"
    assert difference_text(same, "raw pixels") == "no better or worse than raw pixels beyond the noise (+1.0 points, -2.0 to +4.0)"


def result(protocol: str, *, untrained: float, pca: float) -> ProtocolResult:
    score = SubjectScore(top1=0.5, top5=1.0, feature_dim=8, seconds=1.0)
    comparisons = {name: Comparison(d, d - 0.02, d + 0.02, 1, 1) for name, d in (("untrained", untrained), ("pca", pca))}
    return ProtocolResult(protocol, dict.fromkeys(("byol", "untrained", "pca"), score), 100, 200, 4, 0.25, {}, comparisons)


def test_a_run_that_beats_both_baselines_in_every_protocol_gets_no_advice():
    verdict = verdict_on([result("linear", untrained=0.1, pca=0.2), result("knn", untrained=0.05, pca=0.03)], FACTS)
    assert verdict.headline == "better than the untrained encoder in linear and kNN, better than raw pixels (PCA) in linear and kNN"
    assert verdict.ideas == []
    assert not any("try first" in line for line in verdict.lines())
    assert "95 % intervals of 200 val images" in verdict.lines()[1]


def test_what_is_not_better_comes_first_and_is_followed_by_advice():
    verdict = verdict_on([result("linear", untrained=0.1, pca=0.01), result("knn", untrained=0.1, pca=-0.2)], FACTS)
    assert verdict.headline == (
        "worse than raw pixels (PCA) in kNN, no better than raw pixels (PCA) in linear, better than the untrained encoder in linear and kNN"
    )
    assert verdict.lines()[3] == "try first:"
    assert verdict.lines()[4].startswith("  1. 90 steps are few")


def test_without_labels_the_verdict_says_what_it_cannot_say_and_names_a_low_rank():
    measures = {"byol": {"rankme": 1.2}, "untrained": {"rankme": 30.0}}
    free = LabelFreeResult("labelfree", measures, 100, 50, {}, {"untrained": Comparison(0.5, 0.4, 0.6, 9, 1)})
    verdict = verdict_on([free], FACTS)
    assert verdict.headline.startswith("better than the untrained encoder in finding other views; without labels there is no accuracy")
    assert "RankMe is 1.20" in verdict.details[-1]
    few = verdict_on([replace(free, num_images=31)], FACTS)
    assert not any("RankMe" in line for line in few.lines()), "that of a few images is small in any case"
    with_labels = verdict_on([result("knn", untrained=-0.1, pca=-0.1), free], FACTS)
    assert with_labels.headline.startswith("worse than"), "with labels, the accuracies decide"


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"alarms": ["step 4: collapse"]}, "the log has 1 alarm of collapse; try this"),
        ({"epoch": 7.0}, "the run stopped after 7 of 20 epochs"),
        ({}, "90 steps are few: train longer, in a new folder, --steps 3000 --out FOLDER"),
        ({"step": 5000, "grey": True}, "the images are grey, so colour jitter only changes"),
        ({"step": 5000}, "if colour tells your images apart"),
        ({"step": 0, "epoch": 0.0}, "train on from these weights with your own images"),  # another program's have no log
        ({"step": 50_000, "config": TrainConfig(views=both(PAPER, jitter_p=0.0))}, "if left and right differ"),
        ({"step": 50_000, "config": TrainConfig(views=both(PAPER, jitter_p=0.0, flip_p=0.0))}, "larger crops"),
    ],
)
def test_the_first_idea_fits_the_run(changes, first):
    facts = replace(FACTS, **changes)
    facts = facts if facts.epoch in (0.0, 7.0) else replace(facts, epoch=facts.config.epochs)
    ideas = first_ideas(facts)
    assert ideas[0].startswith(first)
    assert 1 <= len(ideas) <= MOST_IDEAS


def test_a_run_in_steps_is_unfinished_before_its_last_step():
    facts = replace(FACTS, config=replace(FACTS.config, epochs=0.0, steps=100))
    assert "stopped after 90 of 100 steps" in first_ideas(facts)[0]
    assert not any("let it finish" in idea for idea in first_ideas(replace(facts, step=100)))


@pytest.mark.parametrize(("epoch", "step", "unfinished"), [(3.84, 18, False), (3.4, 16, True), (4.0, 20, False)])
def test_a_run_whose_last_epoch_lacks_less_than_a_step_is_complete(epoch, step, unfinished):
    """300 images in batches of 64 are 18 steps of 4 epochs: 3.84 epochs are all of them."""
    facts = replace(FACTS, config=replace(FACTS.config, epochs=4.0), epoch=epoch, step=step)
    assert any("let it finish" in idea for idea in first_ideas(facts)) == unfinished


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(
    "config", [preset_config("cpu_demo"), preset_config("r50_100ep"), replace(TrainConfig(), views=replace(PAPER, size_px=32))]
)
def test_every_option_that_the_advice_names_is_one_of_train_py(config, grey, monkeypatch):
    monkeypatch.setattr("fastbyol.evaluation.advice.MOST_IDEAS", 99)
    for step in (10, 5000, 10**6):
        for idea in first_ideas(RunFacts(config, step=step, epoch=config.epochs, alarms=[], grey=grey)):
            options = re.findall(r"--[a-z_0-9.]+ (?:'[^']*'|[^ ,;)]+)", idea)
            words = [word for option in options for word in shlex.split(option)]
            parsed = parse_train_config([*words, "--data.train", "x", "--out", "y"], usage="")
            if "--views.view1.crop_area" in words:
                assert parsed.views.view1.crop_area == (0.4, 1.0)


def test_grey_images_are_recognised_and_coloured_ones_are_not():
    loader = StoredImages(9)
    assert not are_grey(Split(loader, size_px=SIZE_PX), views=PAPER)
    level = torch.rand(9, 1, SIZE_PX, SIZE_PX)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PAPER.mean, PAPER.std))
    loader.image = (level - mean) / std
    assert are_grey(Split(loader, size_px=SIZE_PX), views=PAPER)
