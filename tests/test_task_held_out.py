"""Held-out training images: how many, which, and that no task's own number is too large for a small set."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbyol.config.errors import UserError
from fastbyol.evaluation.tasks.held_out import held_out_beside, held_out_count, held_out_notes, held_out_rows
from fastbyol.evaluation.tasks.images import batch_notes
from fastbyol.evaluation.tasks.registry import MODULES, task_named
from fastbyol.ranks.process_group import Process
from tests.dense_jobs import TINY, make_job, tiny_encoder
from tests.test_report import call

CPU = ("--batch", "16", "--device", "cpu", "--workers", "1")


def test_held_out_images_are_a_seeded_choice_and_both_parts_are_the_whole():
    rows = np.arange(100, 200)
    fit, held_out = held_out_rows(rows, held_out=(0.2,), seed=0)
    assert len(held_out) == 20
    assert sorted([*fit, *held_out]) == rows.tolist()
    assert np.array_equal(held_out_rows(rows, held_out=(20,), seed=0)[1], held_out)
    assert not np.array_equal(held_out_rows(rows, held_out=(20,), seed=1)[1], held_out)


def test_held_out_images_are_beside_a_fraction_and_taken_from_the_whole():
    labelled, part = np.arange(100), np.arange(0, 100, 10)
    fitted, held_out = held_out_beside(part, labelled, held_out=(0.2,), seed=0)
    assert fitted.tolist() == part.tolist()
    assert len(set(held_out)) == 20
    assert not set(held_out) & set(part)
    fitted, held_out = held_out_beside(labelled, labelled, held_out=(15,), seed=0)
    assert sorted([*fitted, *held_out]) == labelled.tolist()
    assert len(held_out) == 15


def test_the_papers_number_counts_up_to_a_quarter_of_the_images_and_a_share_beyond():
    papers = (10_009, 0.08)
    assert held_out_count(1_281_167, papers) == 10_009
    assert held_out_count(40_036, papers) == 10_009
    assert held_out_count(40_035, papers) == 3_203
    assert held_out_notes(40_036, papers) == []
    assert held_out_notes(40_035, papers) == [
        "note: 3,203 of the 40,035 training images were held out to choose with; the settings' 10,009 would be more than a quarter of them "
        "(--held_out N takes another number)"
    ]
    # One that was typed is the only one.
    assert held_out_count(12_000, (10_009,)) == 10_009
    assert held_out_notes(12_000, (10_009,)) == []
    with pytest.raises(UserError, match=r"--held_out 10009: 10,009 of 10,009 labelled training images; both parts need images"):
        held_out_count(10_009, (10_009,))


def test_the_settings_of_every_task_hold_out_a_part_of_a_small_set():
    found = {
        (name, version): settings.held_out
        for name in MODULES
        for version, settings in task_named(name).versions.items()
        if hasattr(settings, "held_out")
    }
    assert {name for name, _ in found} == {"linear", "knn", "finetune", "semi", "segmentation"}
    for which, amounts in found.items():
        assert 0 < held_out_count(40, amounts) <= 10, which


@pytest.mark.parametrize("task", ["linear", "finetune", "semi"])
def test_the_papers_settings_run_on_few_images_and_a_typed_number_that_is_too_large_is_refused(
    task, colours_run, colours, tmp_path, capsys
):
    typed = [
        "evaluate",
        task,
        "--checkpoint",
        str(colours_run),
        "--data",
        str(colours),
        "--out",
        str(tmp_path),
        "--settings",
        "paper",
        *CPU,
    ]
    typed += ["--rates", "0.1,0.2", "--epochs", "1", "--init", "byol"]
    typed += ["--fractions", "0.1"] if task == "semi" else []
    code, out, err = call(typed, capsys)
    assert code == 0, err
    assert (
        "note: 6 of the 72 training images were held out to choose with; the settings' 10,009 would be more than a quarter of them" in out
    )
    code, out, err = call([*typed, "--held_out", "10009"], capsys)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == ("fastbyol: error: --held_out 10009: 10,009 of 72 labelled training images; both parts need images")


def test_the_papers_segmentation_chooses_its_rate_on_few_images_too(scene_folder: Path, tmp_path: Path, capsys):
    torch.save(tiny_encoder().state_dict(), tmp_path / "weights.pt")
    typed = ["evaluate", "segmentation", "--checkpoint", str(tmp_path / "weights.pt"), "--data", str(scene_folder), "--init", "byol"]
    typed += ["--settings", "paper", "--train_set", "train", "--lrs", "0.01,0.1", "--steps", "1", "--seeds", "1", "--crop_px", "48"]
    code, out, err = call([*typed, "--batch_images", "2", "--head_channels", "8", "--test_images", "2", *TINY], capsys)
    assert code == 0, err
    assert "note: 3 of the 32 training images were held out to choose with" in out
    (file,) = tmp_path.rglob("segmentation.json")
    assert set(json.loads(file.read_text())["subjects"]["byol"]["details"]["held_out"]) == {"0.01", "0.1"}


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ("linear", "--settings paper --rates 0.1 --held_out 0.2", "--held_out: has no effect where there is nothing to choose"),
        ("linear", "--settings paper --logit_penalty 0.1", "--logit_penalty: has no effect without --tanh_logits yes"),
        ("knn", "--settings paper --votes plain --temperatures 0.1", "--temperatures: has no effect on plain votes"),
        ("finetune", "--rates 0.1 --held_out 0.2", "--held_out: has no effect where there is nothing to choose"),
        ("semi", "--fractions 1 --lists .", "--lists: has no effect on all labels: give a share below 1 in --fractions"),
        ("segmentation", "--held_out 0.2", "--held_out: has no effect where there is nothing to choose"),
        ("depth", "--settings paper --drop 0.5", "--drop: has no effect without --drop_at"),
        ("detection", "--edge longest --longest_px 600", "--longest_px: has no effect with --edge longest"),
        ("transfer finetune", "--init byol --scratch_steps 9", "--scratch_steps: has no effect without --init untrained"),
        ("transfer finetune", "--init untrained --rates 0.1", "--rates: has no effect on an untrained network alone"),
    ],
)
def test_an_option_that_has_no_effect_beside_the_others_is_refused(task, options, said, capsys):
    code, out, err = call(["evaluate", *task.split(), "--checkpoint", "none", "--data", "none", *options.split()], capsys)
    assert (code, out, err) == (2, "", f"fastbyol: error: {said}; leave it out\n")


def test_a_batch_that_the_ranks_do_not_divide_is_noted(tmp_path: Path):
    job = make_job("finetune", task_named("finetune").versions["paper"], data=tmp_path, folder=tmp_path)
    assert batch_notes(job, 1024, (5000, 100)) == []
    six = replace(job, process=Process(0, 6, torch.device("cpu")))
    words = "because that does not divide among 6 ranks: rates and steps are those of this batch"
    assert batch_notes(six, 1024, (5000, 100, 6000)) == [
        f"note: a step had 1,020 images, not 1,024, {words}",
        f"note: a step had 96 images, not 100, {words}",
    ]
    assert batch_notes(six, 768, (5000,)) == []
