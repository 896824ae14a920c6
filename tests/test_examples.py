"""The programs of examples/ do what they say, run as written on tiny images."""

from __future__ import annotations

import random
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from fastbyol.models import build_encoder
from tests.commands import ROOT


def _run(monkeypatch, script: str, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")


def test_images_without_labels_are_learnt_embedded_and_searched(image_folder, tmp_path, monkeypatch, capsys):
    short = ["--steps", "3", "--optim.warmup_steps", "1", "--global_batch", "8", "--model.hidden_dim", "16", "--model.projection_dim", "8"]
    query = ["--query", "ant/000.jpg", "--count", "3", "--out", tmp_path / "run"]
    _run(monkeypatch, "pretrain_embed_search.py", image_folder, *query, *short)
    found = re.findall(r"^(\d\.\d{3})  (\w+/\d+\.jpg)$", capsys.readouterr().out, flags=re.M)
    assert len(found) == 3
    cosines, names = zip(*found, strict=True)
    assert list(cosines) == sorted(cosines, reverse=True)
    assert "ant/000.jpg" not in names


def test_a_mistake_is_said_before_the_training_and_before_the_export(image_folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        _run(monkeypatch, "pretrain_embed_search.py", image_folder, "--query", "typo.jpg", "--out", tmp_path / "run")
    assert ended.value.code == 2
    assert f"--query typo.jpg: {image_folder} has no such image" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        _run(monkeypatch, "finetune_with_timm.py", "--checkpoint", "none", "--data", image_folder, "--out", tmp_path / "out")
    assert ended.value.code == 2
    assert f"--data {image_folder}: its folder train is missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_exported_encoder_is_fine_tuned_with_timm_alone(colours, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    random.seed(0)  # timm's augmentation draws from it
    torch.save(build_encoder("resnet18").state_dict(), tmp_path / "encoder.pth")
    sizes = ["--views.size_px", "32", "--epochs", "4"]
    _run(
        monkeypatch, "finetune_with_timm.py", "--checkpoint", tmp_path / "encoder.pth", "--data", colours, "--out", tmp_path / "out", *sizes
    )
    accuracies = [float(text) for text in re.findall(r"epoch \d: (\d+\.\d)% on val", capsys.readouterr().out)]
    assert len(accuracies) == 4
    assert max(accuracies) > 50, "three colours; a third by chance"
