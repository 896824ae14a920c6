"""`evaluate` and `report` as typed: without labels, on one class, on other classes than the run's, on a list of images; their last lines."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from fastbyol.config.schema import DataConfig
from fastbyol.data import build_loader
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.formats.manifest import beton_manifest_path
from fastbyol.evaluation.gallery import draw_views
from fastbyol.evaluation.label_free import PIXELS, view_features
from fastbyol.evaluation.splits import open_splits
from fastbyol.evaluation.subjects import FeatureBank
from fastbyol.export import encoder_of
from fastbyol.run.checkpoint import load_run
from fastbyol.train import main as train_main
from tests.commands import SMALL_RUN
from tests.conftest import noisy_colours
from tests.test_report import call
from tests.test_untrusted_files import edit_rows

CPU = ("--batch", "8", "--device", "cpu", "--workers", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Train and val with 12 + 8 images of three classes: a colour, with noise."""
    return noisy_colours(tmp_path_factory.mktemp("coloured"), train=12, val=8)


@pytest.fixture(scope="module")
def unlabelled(data, tmp_path_factory) -> Path:
    """The train images as a .beton whose labels are all -1."""
    path = tmp_path_factory.mktemp("unlabelled") / "images.beton"
    write_beton(data / "train", out=path, workers=1)
    edit_rows(path, lambda rows: rows["f1"].__setitem__(slice(None), -1))
    beton_manifest_path(path).unlink()
    return path


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train_main([*SMALL_RUN, "--epochs", "2", "--checkpoint_every", "100", "--data.train", str(data / "train"), "--out", str(out)])
    return out


def test_a_run_without_labels_has_a_report_with_all_that_needs_none_and_each_command_names_the_next(unlabelled, tmp_path, capsys):
    run = tmp_path / "run"
    train_main([*SMALL_RUN, "--epochs", "1", "--data.train", str(unlabelled), "--out", str(run)])
    said = capsys.readouterr().err
    assert "36 images without labels, so the probe is off" in said
    assert said.rstrip().endswith(f"next: python -m fastbyol report --run {run} --data {unlabelled}")
    code, out, err = call(["report", "--run", str(run), "--data", str(unlabelled), *CPU], capsys)
    assert code == 0, err
    assert "linear and knn left out: its images have no labels" in err
    assert re.search("verdict: .* in finding other views", out)
    assert out.rstrip().endswith(f"next: python -m fastbyol embed --checkpoint {run} --data {unlabelled} --out {run / 'features.npz'}")
    html = (run / "report.html").read_text()
    sections = re.findall(r'<section id="(\w+)">', html)
    assert sections[:9] == ["headline", "labelfree", "views", "training", "collapse", "neighbours", "clusters", "map", "odd"]
    assert "No linear or kNN accuracy: its images have no labels." in html
    assert 'class="hit"' not in html
    assert 'class="miss"' not in html
    assert [path.name for path in (run / "evaluation").iterdir()] == ["labelfree.json"]


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_accuracy_on_images_without_labels_is_one_line_that_names_the_way_without(protocol, run, unlabelled, capsys):
    code, out, err = call(["evaluate", protocol, "--checkpoint", str(run), "--data", str(unlabelled), *CPU], capsys)
    assert (code, out) == (2, "")
    way_out = f"python -m fastbyol evaluate labelfree --checkpoint {run} --data {unlabelled}"
    assert (
        err
        == f"fastbyol: error: --data {unlabelled}: its images have no labels, so there is no accuracy to measure; without labels: {way_out}\n"
    )
    assert call(way_out.split()[3:], capsys)[0] == 0


def test_images_in_one_folder_give_no_accuracy_but_all_the_rest(data, run, tmp_path, capsys):
    for split in ("train", "val"):
        shutil.copytree(data / split / "red", tmp_path / "one" / split / "red")
    arguments = ["all", "--checkpoint", str(run), "--data", str(tmp_path / "one"), "--out", str(tmp_path / "out"), *CPU]
    code, out, err = call(["evaluate", *arguments], capsys)
    assert code == 0, err
    assert "linear and knn left out: train has no labels" in err
    assert "top-1" not in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["labelfree.json"]


def test_a_run_is_evaluated_on_classes_that_it_never_saw(data, run, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "renamed")
    for split in ("train", "val"):
        for name in ("red", "green"):
            (tmp_path / "renamed" / split / name).rename(tmp_path / "renamed" / split / f"other {name}")
        shutil.rmtree(tmp_path / "renamed" / split / "blue")
    out = ["--out", str(tmp_path / "out")]
    assert call(["evaluate", "knn", "--checkpoint", str(run), "--data", str(tmp_path / "renamed"), *out, *CPU], capsys)[0] == 0
    result = json.loads((tmp_path / "out" / "knn.json").read_text())
    assert (result["num_classes"], result["num_train"], result["num_val"]) == (2, 24, 16)


def test_a_list_chooses_the_train_images_and_its_result_has_a_file_of_its_own(data, run, tmp_path, capsys):
    names = [f"{colour}/{i}.png" for colour in ("red", "green", "blue") for i in range(4)]
    chosen = tmp_path / "some.txt"
    chosen.write_text("".join(f"{name}\n" for name in names))
    arguments = ["evaluate", "knn", "--checkpoint", str(run), "--data", str(data), "--out", str(tmp_path / "out"), "--k", "3", *CPU]
    assert call(arguments, capsys)[0] == 0
    assert call([*arguments, "--subset", str(chosen)], capsys)[0] == 0
    assert call([*arguments[:-8], "--k", "2", *CPU], capsys)[0] == 0
    results = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert sorted(results) == ["knn-2.json", "knn-3.json", "knn.json"]
    assert [results[name]["num_train"] for name in ("knn.json", "knn-2.json", "knn-3.json")] == [36, 12, 36]
    assert results["knn-2.json"]["settings"]["subset"] == str(chosen)
    assert [results[name]["settings"]["k"] for name in ("knn.json", "knn-3.json")] == [3, 2]
    chosen.write_text("red/0.png\npurple/1.png\n")
    code, _, err = call([*arguments, "--subset", str(chosen)], capsys)
    assert code == 2
    assert "1 of its 2 names are not those of one image of" in err
    assert "purple/1.png" in err


def test_the_verdict_is_said_and_stored_and_its_difference_is_that_of_the_scores(data, run, tmp_path, capsys):
    arguments = ["evaluate", "all", "--checkpoint", str(run), "--data", str(data), "--out", str(tmp_path), *CPU]
    code, out, _ = call(arguments, capsys)
    assert code == 0
    lines = out.splitlines()
    assert lines[-1] == f"next: python -m fastbyol report --run {run} --data {data}"
    for protocol in ("linear", "knn"):
        result = json.loads((tmp_path / f"{protocol}.json").read_text())
        assert result["verdict"][0].startswith("verdict: ")
        assert result["verdict"][1] in lines
        for name, comparison in result["comparisons"].items():
            difference = result["scores"]["byol"]["top1"] - result["scores"][name]["top1"]
            assert comparison["difference"] == pytest.approx(difference, abs=1e-12)
            assert comparison["low"] < difference < comparison["high"]


def test_a_gpu_that_is_too_small_is_one_line_with_the_options_that_make_a_step_smaller(data, run, tmp_path, capsys, monkeypatch):
    def runs_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("fastbyol.evaluation.tasks.registry.run_task", runs_out)
    for task, smaller in (("finetune", "a smaller --global_batch, "), ("depth", "a smaller --batch_images, "), ("transfer linear", "")):
        code, _, err = call(["evaluate", *task.split(), "--checkpoint", str(run), "--data", str(data), *CPU], capsys)
        assert (code, err) == (
            2,
            f"fastbyol: error: evaluate {task}: out of memory; use more ranks (torchrun), {smaller}or a smaller --batch for images without "
            "gradients; --dry_run says how much a task needs\n",
        )


def test_a_rank_with_a_single_image_whose_map_is_a_single_pixel_is_one_line(data, run, tmp_path, capsys, monkeypatch):
    def one_value(*_: object, **__: object) -> None:
        torch.nn.BatchNorm2d(4)(torch.zeros(1, 4, 1, 1))

    monkeypatch.setattr("fastbyol.evaluation.tasks.registry.run_task", one_value)
    code, _, err = call(["evaluate", "semi", "--settings", "paper", "--checkpoint", str(run), "--data", str(data), *CPU], capsys)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "evaluate semi: batch norm has a single value of each channel on this rank" in err
    assert "[1, 4, 1, 1]" in err


def test_a_seed_is_below_2_to_the_63(data, run, tmp_path, capsys):
    typed = ["evaluate", "finetune", "--checkpoint", str(run), "--data", str(data), "--out", str(tmp_path), "--dry_run", *CPU]
    assert call([*typed, "--seed", str(2**63 - 1)], capsys)[0] == 0
    code, _, err = call([*typed, "--seed", str(2**63)], capsys)
    assert (code, err) == (2, "fastbyol: error: --seed = 9223372036854775808: must be in [0, 2^63)\n")


def test_views_without_labels_are_those_of_the_run_and_features_those_of_both_encoders(data, run):
    state = load_run(run)
    with open_splits(data / "train", views=state.config.views, batch=8, workers=1, scored=False) as splits:
        bank = FeatureBank(encoder_of(state), config=state.config, splits=splits)
        features = view_features(bank, [3, 30])
        with build_loader(
            DataConfig(train=str(data / "train")), views=state.config.views, seed=state.config.seed, global_batch=1
        ) as loader:
            drawn = draw_views(loader, index=[3, 30], epochs=1)
        for row in range(2):
            expected = bank.encoder(drawn[row]).detach()
            torch.testing.assert_close(features["byol"][row], expected, rtol=1e-4, atol=1e-5)
        untrained = bank.network("untrained")(drawn[1]).detach()
    torch.testing.assert_close(features["untrained"][1], untrained, rtol=1e-4, atol=1e-5)
    assert features[PIXELS].shape == (2, 2, 3 * 32 * 32)
