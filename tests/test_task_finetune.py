"""evaluate finetune and evaluate semi: the paper's settings, the optimizer against the official code, real runs, stops, ranks and bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastbyol.__main__ import main
from fastbyol.config.errors import Diverged, UserError
from fastbyol.data import build_crop_loader, build_image_loader
from fastbyol.evaluation.result_file import TaskResult, read_result
from fastbyol.evaluation.tasks.classifier import Classifier, RestartedClassifier, build_classifier, build_sgd, fit_classifier, scores_of
from fastbyol.evaluation.tasks.finetune import TASKS as FINETUNE
from fastbyol.evaluation.tasks.finetune import FinetuneSettings, LabelledPart, fits_of, paper_rows
from fastbyol.evaluation.tasks.images import crop_and_flip
from fastbyol.evaluation.tasks.registry import result_settings
from fastbyol.evaluation.tasks.scoring import outputs
from fastbyol.evaluation.tasks.semi import TASKS as SEMI
from fastbyol.evaluation.tasks.semi import SemiSettings
from fastbyol.evaluation.tasks.training import TaskStopped
from fastbyol.host.signals import StopRequest
from fastbyol.ranks.process_group import Process
from fastbyol.run.provenance import collect_provenance
from fastbyol.schedules import lr_at
from fastbyol.train import main as train_main
from tests.commands import LIMIT_S, SMALL_RUN, run_here
from tests.conftest import noisy_colours
from tests.forked import ForkedPython, run_ranks
from tests.ranks_of_a_classifier import VIEWS, encoder_without_norm, job_of, trained_scores
from tests.test_report import call

GOLDEN = Path(__file__).parent / "golden" / "sgd_nesterov_f64.npz"
CPU = ("--batch", "32", "--device", "cpu", "--workers", "1")
ALONE = Process(0, 1, torch.device("cpu"))
SEMI_OPTIONS = ("--fractions", "0.1,0.5", "--epochs", "8")
COLOURS = ("blue", "green", "red")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Train and val with 40 + 20 images of three classes: a colour, under noise."""
    return noisy_colours(tmp_path_factory.mktemp("coloured"), train=40, val=20)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train_main([*SMALL_RUN, "--epochs", "1", "--checkpoint_every", "100", "--data.train", str(data / "train"), "--out", str(out)])
    return out


def command(task: str, run: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["evaluate", task, "--checkpoint", str(run), "--data", str(data), "--out", str(out), *CPU, *more]


def result_of(folder: Path, task: str) -> tuple[TaskResult, dict[str, Any]]:
    result, facts = read_result(folder / f"{task}.json")
    assert isinstance(result, TaskResult)
    return result, facts


# ---- the protocol


def test_the_paper_settings_are_those_of_the_paper():
    # Appendix C.1: SGD with Nesterov momentum 0.9, batch 1024, no regularisation, crops as in appendix B, choice on 10,009 train images.
    paper = {
        "rates": (0.01, 0.02, 0.05, 0.1, 0.005),
        "epochs": (30, 50),
        "global_batch": 1024,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "smallest_crop": 0.08,
        "held_out": (10_009, 0.08),
    }
    assert asdict(FINETUNE["finetune"].versions["paper"]) == paper
    assert asdict(SEMI["semi"].versions["paper"]) == {**paper, "fractions": (0.01, 0.1), "lists": ()}


def test_a_list_with_another_content_is_another_job(tmp_path):
    (tmp_path / "10percent.txt").write_text("a.png\n")
    settings = replace(SEMI["semi"].versions["quick"], fractions=(0.1,), lists=(str(tmp_path),))
    before = result_settings(settings, "quick")
    assert result_settings(settings, "quick") == before
    (tmp_path / "10percent.txt").write_text("b.png\n")
    assert result_settings(settings, "quick") != before
    assert "lists_sha256" not in result_settings(replace(settings, lists=()), "quick")


def test_the_paper_rows_are_those_of_its_tables_2_and_8():
    parts = [LabelledPart(name, share, np.arange(1)) for name, share in (("1 %", 0.01), ("10 %", 0.1), ("", 1.0), ("2 %", 0.02))]
    rows = paper_rows(parts)
    columns = ("top1 1 %", "top1 10 %", "top5 1 %", "top5 10 %", "top1", "top5")
    assert {title: tuple(row.get(column) for column in columns) for title, row in rows.items()} == {
        "paper: BYOL R50": (53.2, 68.8, 78.4, 89.0, 77.7, 93.9),
        "paper: SimCLR R50": (48.3, 65.6, 75.5, 87.8, 76.0, 93.1),
        "paper: SimCLR R50, repeated": (None, None, None, None, 76.5, 93.5),
        "paper: supervised R50": (25.4, 56.4, 48.4, 80.4, 76.5, None),
        "paper: BYOL R50 2x": (62.2, 73.5, 84.1, 91.7, None, None),
        "paper: BYOL R50 4x": (69.1, 75.7, 87.9, 92.5, None, None),
        "paper: BYOL R200 2x": (71.2, 77.7, 89.5, 93.7, None, None),
    }


def test_the_work_on_imagenet_is_eleven_trainings_of_known_length():
    choice, paper = {"num_held_out": 10_009, "num_test": 50_000}, FinetuneSettings()
    fits = list(fits_of(1_281_167, num_fitted=1_271_158, **choice, settings=paper))
    # floor(epochs * images / 1024): on 1,271,158 images while choosing, then on all.
    assert [fit.steps for fit in fits] == [37_240] * 5 + [62_068] * 5 + [62_556]
    assert [fit.trained for fit in fits] == [1024 * fit.steps for fit in fits]
    assert [fit.tested for fit in fits] == [10_009] * 10 + [50_000]
    assert [fit.steps for fit in fits_of(12_811, num_fitted=12_811, **choice, settings=paper)] == [375] * 5 + [625] * 6
    assert [fit.steps for fit in fits_of(500, num_fitted=500, **choice, settings=paper)] == [30] * 5 + [50] * 6  # a batch of all 500


def test_sgd_follows_the_official_codes_trajectory():
    golden = np.load(GOLDEN)
    layer = nn.Linear(16, 10).double()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(golden["w_init"].T))
        layer.bias.copy_(torch.from_numpy(golden["b_init"]))
    optimizer = build_sgd(layer, lr=0.8, momentum=float(golden["momentum"]))
    moved = abs(golden["w"][-1] - golden["w_init"]).max()
    for step in range(10):
        (group,) = optimizer.param_groups
        group["lr"] = lr_at(step, total_steps=10, warmup_steps=0, base_lr=0.8, global_batch=256)
        assert group["lr"] == pytest.approx(golden["lr"][step], abs=1e-15)
        layer.weight.grad, layer.bias.grad = torch.from_numpy(golden["gw"][step].T.copy()), torch.from_numpy(golden["gb"][step])
        optimizer.step()
        # Ten times the 4e-15 that an independent implementation reached (shared README of the vectors).
        assert abs(layer.weight.detach().numpy().T - golden["w"][step]).max() <= 4e-14 * moved
        assert abs(layer.bias.detach().numpy() - golden["b"][step]).max() <= 4e-14 * moved


def test_a_training_is_a_loop_of_nesterov_steps_over_the_crops(image_folder, tmp_path):
    found = trained_scores(image_folder, tmp_path, ALONE)
    network = Classifier(encoder_without_norm(), 3).train()
    assert network.head.bias.abs().max() == 0
    assert network.head.weight.abs().max() <= 2 / 144**0.5
    with build_crop_loader(image_folder, views=crop_and_flip(VIEWS), seed=0, global_batch=8, workers=1) as crops:
        batches = crops.batches_from(0)
        velocity = [torch.zeros_like(value) for value in network.parameters()]
        for step in range(6):
            batch = next(batches)
            gradients = torch.autograd.grad(F.cross_entropy(network(batch.image), batch.label), list(network.parameters()))
            lr = 0.05 * (1 + np.cos(np.pi * step / 6))
            with torch.no_grad():
                for value, m, g in zip(network.parameters(), velocity, gradients, strict=True):
                    m.mul_(0.9).add_(g)
                    value.sub_(lr * (g + 0.9 * m))
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    with build_image_loader(image_folder, views=VIEWS, batch=100, workers=1) as loader:
        images = loader.pick(range(3, 25, 2)).image
    torch.testing.assert_close(found["scores"], network(images).detach(), rtol=1e-4, atol=1e-5)


def test_every_training_of_a_grid_starts_from_the_same_weights_and_statistics(image_folder, tmp_path):
    job = job_of(tmp_path, ALONE)
    encoder = encoder_without_norm()
    encoder.insert(0, nn.BatchNorm2d(3))  # type: ignore[operator]
    first = {name: value.clone() for name, value in encoder.state_dict().items()}
    restarted, found = RestartedClassifier(job, encoder, num_classes=3), []
    for number in range(2):
        network = restarted.network()
        for name, value in network.encoder.state_dict().items():
            assert torch.equal(value, first[name]), name
        with build_crop_loader(image_folder, views=crop_and_flip(VIEWS), seed=0, global_batch=8, workers=1) as crops:
            targets = torch.arange(25) % 3
            fit_classifier(job, f"training {number}", network=network, crops=crops, targets=targets, lr=0.05, total_steps=3)
        assert not torch.equal(network.encoder.state_dict()["0.running_mean"], first["0.running_mean"])
        found.append({name: value.clone() for name, value in network.state_dict().items()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_logits_are_float32_under_autocast_so_that_the_best_class_is_one():
    encoder = nn.Flatten()
    encoder.feature_dim = 4  # type: ignore[assignment]
    network = Classifier(encoder, 1000)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.randn(64, 1, 2, 2))
    assert logits.dtype == torch.float32
    assert len(logits.topk(2).values.diff().flatten().nonzero()) == 64


def test_a_stopped_training_goes_on_to_the_same_weights(image_folder, tmp_path):
    whole = trained_scores(image_folder, tmp_path / "whole", ALONE)
    calls = []

    def stops_at_the_fourth(logits, targets):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
            while not stop.requested:
                time.sleep(0.001)
        return F.cross_entropy(logits, targets)

    with (
        StopRequest(grace_s=60.0) as stop,
        build_crop_loader(image_folder, views=crop_and_flip(VIEWS), seed=0, global_batch=8, workers=1) as crops,
    ):
        job = job_of(tmp_path / "stopped", ALONE, stop)
        network = build_classifier(job, encoder_without_norm(), num_classes=3)
        with build_image_loader(image_folder, views=VIEWS, batch=8, workers=1) as loader:
            targets = torch.from_numpy(loader.labels)
        with pytest.raises(TaskStopped, match="stopped after step 4 of 6 of one, saved"):
            fit_classifier(job, "one", network=network, crops=crops, targets=targets, lr=0.1, total_steps=6, loss=stops_at_the_fourth)
    resumed = trained_scores(image_folder, tmp_path / "stopped", ALONE)
    assert len(calls) == 4
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_rate_that_diverges_is_an_error_of_that_training(image_folder, tmp_path):
    job = job_of(tmp_path, ALONE)
    network = build_classifier(job, encoder_without_norm(), num_classes=3)
    with build_crop_loader(image_folder, views=crop_and_flip(VIEWS), seed=0, global_batch=8, workers=1) as crops:
        targets = torch.zeros(25, dtype=torch.int64)
        with pytest.raises(Diverged, match="finetune: one: the loss is not finite at or before step 6"):
            fit_classifier(job, "one", network=network, crops=crops, targets=targets, lr=1e30, total_steps=6)


# ---- the commands


@pytest.fixture(scope="module")
def tuned(data, run, tmp_path_factory) -> Path:
    """The folder of results of both tasks, from their command lines."""
    out = tmp_path_factory.mktemp("results")
    for task, more in (("finetune", ("--epochs", "3")), ("semi", SEMI_OPTIONS)):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            main(command(task, run, data, out, "--rates", "0.05,0.2,1e30", "--global_batch", "16", *more))
        (out / f"{task}.txt").write_text(said.getvalue())
    return out


def test_fine_tuning_learns_the_classes_and_says_what_it_chose(tuned):
    result, facts = result_of(tuned, "finetune")
    assert (result.protocol, result.version) == ("finetune", "quick")
    assert result.sizes == {"train": 120, "val": 60}
    assert list(result.columns.items()) == [("top1", "top-1 %"), ("top5", "top-5 %")]
    for name in ("byol", "untrained"):
        subject = result.subjects[name]
        # Colour under noise is easy: three classes, a third by chance.
        assert subject.scores["top1"] > 0.6
        assert subject.scores["top5"] == 1.0
        trials = subject.details["100 %"]["trials"]
        assert [(trial["rate"], trial["epochs"]) for trial in trials] == [(0.05, 3), (0.2, 3), (1e30, 3)]
        assert trials[2]["held_out_top1"] is None  # it diverged
        best = max(trials[:2], key=lambda trial: trial["held_out_top1"])
        assert subject.chosen["100 %"] == {name: best[name] for name in ("rate", "epochs", "held_out_top1", "held_out_images")}
        assert best["held_out_images"] == 12
    difference = result.comparisons["untrained"].difference
    assert difference == pytest.approx(result.subjects["byol"].scores["top1"] - result.subjects["untrained"].scores["top1"])
    assert facts["provenance"]["commit"] == collect_provenance()["commit"]
    assert not list(tuned.glob("*.work-*"))
    said = (tuned / "finetune.txt").read_text()
    assert "paper: BYOL R50" in said
    assert re.search(r"\nchosen: BYOL, 100 % of the labels: rate 0.\d+, 3 epochs \([0-9.]+ % of 12 held-out images\)\n", said)


def test_a_fraction_has_columns_of_its_own_and_learns_the_classes(tuned):
    result, _ = result_of(tuned, "semi")
    assert list(result.columns.values()) == ["10 %: top-1 %", "10 %: top-5 %", "50 %: top-1 %", "50 %: top-5 %"]
    assert result.sizes == {"train": 120, "at 10 %": 12, "at 50 %": 60, "val": 60}
    for subject in result.subjects.values():
        assert subject.scores["top1 50 %"] > 0.6
        assert set(subject.chosen) == {"10 %", "50 %"}
    assert set(result.comparisons) == {f"training from scratch, with {part} of the labels" for part in ("10 %", "50 %")}
    assert "paper: BYOL R50" in result.paper
    assert result.paper["paper: BYOL R50"] == {"top1 10 %": 68.8, "top5 10 %": 89.0}


def test_a_list_gives_the_figures_of_the_seeded_choice_that_subset_py_wrote_to_it(tuned, data, run, tmp_path, capsys):
    assert run_here("subset.py", "--data", data / "train", "--fraction", "0.1", "--out", tmp_path / "10percent.txt").returncode == 0
    names = (tmp_path / "10percent.txt").read_text().split()
    assert sorted(name.partition("/")[0] for name in names) == sorted(COLOURS * 4)
    # As SimCLR's lists are: file names without folders. Here they would be ambiguous, so other folders stand before them.
    (tmp_path / "10percent.txt").write_text("".join(f"somewhere/train/{name}\n" for name in reversed(names)))
    given = ("--fractions", "0.1", "--epochs", "8", "--rates", "0.05,0.2", "--global_batch", "16", "--lists", str(tmp_path))
    code, out, err = call(command("semi", run, data, tmp_path / "out", *given), capsys)
    assert code == 0, err
    listed, drawn = (result_of(folder, "semi")[0] for folder in (tmp_path / "out", tuned))
    for name in ("byol", "untrained"):
        assert listed.subjects[name].scores["top1 10 %"] == drawn.subjects[name].scores["top1 10 %"]
    # The same command again only prints.
    code, out, err = call(command("semi", run, data, tmp_path / "out", *given), capsys)
    assert code == 0
    assert "already evaluated with these settings" in err
    assert "10 %: top-1 %" in out


def test_a_run_with_options_of_a_gpu_is_fine_tuned_on_a_cpu_without_them(data, run, tmp_path, capsys):
    state = torch.load(next(run.glob("checkpoints/*.pt")), weights_only=True)
    state["config"]["precision"] |= {"autocast": "fp16", "cudnn_benchmark": True, "compile_mode": "reduce-overhead"}
    torch.save(state, tmp_path / "of_gpu.pt")
    given = ("--rates", "0.1", "--epochs", "1", "--global_batch", "16", "--init", "byol")
    code, _, err = call(command("finetune", tmp_path / "of_gpu.pt", data, tmp_path / "out", *given), capsys)
    assert code == 0, err
    left_out = "precision.autocast fp16, precision.cudnn_benchmark True, precision.compile_mode reduce-overhead"
    assert err.count(f"... the run's {left_out}: without effect on this device (cpu), so left out here\n") == 1


def test_a_dry_run_says_how_much_there_is_to_do_and_starts_nothing(data, run, tmp_path, capsys):
    given = ("--settings", "paper", "--held_out", "20", "--fractions", "0.1,1", "--dry_run")
    code, out, err = call(command("semi", run, data, tmp_path / "out", *given), capsys)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "semi: 120 labelled training images of 3 classes, 60 test images, 2 encoders"
    # A batch of all 12 images: 5 * (30 + 50) + 50 steps. Of all labels 100 images are left to choose with: the same numbers of steps.
    assert lines[1] == "10 % of the labels: 12 images, 11 trainings of each encoder (10 of them to choose), 450 steps of 12, 5,400 images"
    assert (
        lines[2] == "100 % of the labels: 120 images, 11 trainings of each encoder (10 of them to choose), 450 steps of 120, 46,000 images"
    )
    assert re.fullmatch(r"time: about .* on this device, .* images/s in training, from 4 steps of 16 measured here", lines[3])
    assert re.fullmatch(r"memory: about .* a device: .* for weights, gradients and momentum, and .* for each of its 120 images", lines[4])
    assert re.fullmatch(r"disk: .* for the state of one training at a time, deleted at the end", lines[5])
    assert not (tmp_path / "out").exists()


def test_a_stopped_command_goes_on_to_the_figures_of_one_that_was_not(tuned, data, run, tmp_path, capsys):
    given = ("--rates", "0.05,0.2,1e30", "--global_batch", "16", "--fractions", "0.1", "--epochs", "8")
    arguments = command("semi", run, data, tmp_path, *given)
    log = tmp_path / "log"
    with ForkedPython("-m", "fastbyol", *arguments, out=log, err=log) as process:
        deadline = time.monotonic() + LIMIT_S
        while len(list(tmp_path.glob("*.work-*/*.json"))) < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        code, err = process.wait(LIMIT_S), log.read_text()
    assert code == 75, err
    assert "the same command goes on" in err
    finished = {path.name: os.stat(path).st_mtime_ns for path in tmp_path.glob("*.work-*/*.json")}
    assert 3 <= len(finished) < 8
    code, _, err = call(arguments, capsys)
    assert code == 0, err
    stopped, whole = (result_of(folder, "semi")[0] for folder in (tmp_path, tuned))
    assert stopped.subjects.keys() == whole.subjects.keys()
    for name, one in stopped.subjects.items():
        assert one.scores == {column: whole.subjects[name].scores[column] for column in ("top1 10 %", "top5 10 %")}
        assert one.chosen == {"10 %": whole.subjects[name].chosen["10 %"]}


def test_two_ranks_train_as_one_where_no_batch_norm_is_and_score_the_same_images(image_folder, data, run, tmp_path):
    one = trained_scores(image_folder, tmp_path / "one", ALONE)
    given = ("--fractions", "0.5", "--epochs", "8", "--rates", "0.2", "--global_batch", "16")
    (tmp_path / "commands.json").write_text(json.dumps([command("semi", run, data, tmp_path, *given)]))
    work = (image_folder, tmp_path / "two.pt", tmp_path / "two", tmp_path / "commands.json")
    for done in run_ranks("tests/ranks_of_a_classifier.py", *work):
        assert done.returncode == 0, done.stderr
    two = [torch.load(tmp_path / f"two.{rank}.pt") for rank in range(2)]
    assert all(torch.equal(value, two[1][name]) for name, value in two[0].items())
    for name, value in one.items():
        torch.testing.assert_close(two[0][name], value, rtol=1e-4, atol=1e-5)
    # With batch norm each rank has statistics of its own 8 images: another training, which learns the classes as well.
    result, facts = result_of(tmp_path, "semi")
    assert facts["provenance"]["world_size"] == 2
    assert min(subject.scores["top1 50 %"] for subject in result.subjects.values()) > 0.6


# ---- bad input


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("semi", ("--lists", "unknown.txt"), r"--lists unknown.txt: 1 of its 12 names are not images of .*train: purple/100.png .*"),
        ("semi", ("--lists", "without_red.txt"), r"--lists without_red.txt: no image of the class 'red' \(1 such classes\); .*"),
        ("semi", ("--lists", "half.txt"), r"--lists half.txt: names 60 of 120 labelled training images, which is not 10 %; .*"),
        ("semi", ("--lists", "none.txt"), r"--lists none.txt: no such file: none.txt"),
        ("semi", ("--lists", "."), r"--lists \.: no such file: 10percent.txt"),
        ("semi", ("--lists", "half.txt,half.txt"), r"--lists half.txt,half.txt: 2 given where 1 are wanted \(10 %\); give one for each .*"),
        ("semi", ("--fractions", "0"), r"--fractions = 0.0: must be in \(0, 1\]"),
        ("semi", ("--fractions", "0.1,0.1"), r"--fractions = \(0.1, 0.1\): must be one or several different shares"),
        ("finetune", ("--held_out", "500"), r"--held_out 500: 500 of 120 labelled training images; both parts need images"),
        ("finetune", ("--held_out", "-1"), r"--held_out = -1.0: must be a number > 0"),
        ("finetune", ("--rates", "fast"), r"--rates fast: must be a number"),
        ("finetune", ("--rates", "0"), r"--rates = 0.0: must be a number > 0"),
        ("finetune", ("--epochs", "0"), r"--epochs = 0: must be a number >= 1"),
        ("finetune", ("--momentum", "1"), r"--momentum = 1.0: must be in \[0, 1\)"),
        ("finetune", ("--fractions", "0.1"), r"--fractions: is not an option of evaluate finetune .*"),
    ],
)
def test_bad_input_is_one_line(task, options, message, data, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = [f"{colour}/{i}.png" for colour in COLOURS for i in range(20)]
    few = [name for name in names if re.search(r"/[0-3]\.png", name)]
    lists = {
        "unknown": [*few[:11], "purple/100.png"],
        "without_red": [name.replace("red", "green") if "red/0" in name else name for name in few if "red" not in name] + ["blue/5.png"],
        "half": names,
    }
    for name, lines in lists.items():
        Path(f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    more = ("--fractions", "0.1") if task == "semi" and "--fractions" not in options else ()
    code, out, err = call(command(task, run, data, tmp_path / "out", *more, *options), capsys)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("...")]
    assert len(lines) == 1, err
    assert re.fullmatch(f"fastbyol: error: {message}", lines[0]), lines[0]


def test_a_missing_split_and_an_empty_class_are_named(data, run, tmp_path, capsys):
    shutil.copytree(data / "train", tmp_path / "alone" / "train")
    code, _, err = call(command("semi", run, tmp_path / "alone", tmp_path / "out"), capsys)
    assert (code, err) == (
        2,
        f"fastbyol: error: --data {tmp_path}/alone: no val images; expected {tmp_path}/alone/val or {tmp_path}/alone/val.beton beside train\n",
    )


def test_settings_are_checked_when_they_are_built():
    for changes in (
        {"rates": ()},
        {"epochs": (30, 30)},
        {"global_batch": 0},
        {"weight_decay": -1.0},
        {"held_out": (float("nan"),)},
        {"held_out": ()},
    ):
        with pytest.raises(UserError, match=next(iter(changes))):
            replace(SemiSettings(), **changes)


def test_scores_do_not_depend_on_the_batches_and_leave_the_network_in_training(image_folder, tmp_path):
    job = job_of(tmp_path, ALONE)
    encoder = encoder_without_norm()
    encoder.insert(0, nn.BatchNorm2d(3))  # type: ignore[operator]
    network = build_classifier(job, encoder, num_classes=3).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = []
    for batch in (4, 25):
        with build_image_loader(image_folder, views=VIEWS, batch=batch, workers=1) as loader:
            found.append(scores_of(job, network, loader, rows=np.arange(25)))
    torch.testing.assert_close(*found)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_outputs_are_those_of_their_own_batch_where_cuda_graphs_write_all_to_the_same_memory(tmp_path):
    images, memory = torch.arange(20.0).view(20, 1, 1, 1).expand(20, 3, 2, 2), torch.empty(8, 12)
    network = nn.Flatten()
    network._compiled_call_impl = lambda image: memory.copy_(image.flatten(1))
    loader = SimpleNamespace(batches_of=lambda rows: (SimpleNamespace(image=images[part], label=part) for part in rows.split(8)))
    for output, rows in outputs(job_of(tmp_path, ALONE), network, cast(Any, loader), cast(Any, torch.arange(20))):
        assert torch.equal(output, images[rows].flatten(1))
