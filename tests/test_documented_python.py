"""The Python of README and docs runs as written. That of DeepMind's checkpoints (docs/guide.md): test_foreign_weights.py."""

from __future__ import annotations

import numpy as np
import torch
import torchvision

import fastbyol
from tests.commands import ROOT
from tests.test_documented_commands import PAGES, python_blocks

RUN_BY = {
    "README.md": 1,  # here
    "docs/python.md": 2,  # here
    "docs/guide.md": 2,  # a measurement of minutes, which tests/long/documented_commands.py runs; DeepMind's checkpoints
}
"""Pages with blocks of Python, and how many each has."""


def test_every_block_of_python_is_one_that_a_test_runs():
    assert {page.relative_to(ROOT).as_posix(): len(blocks) for page in PAGES if (blocks := python_blocks(page))} == RUN_BY


def test_the_code_of_readme_runs_as_written(colours_run, image_folder, tmp_path, monkeypatch):
    (block,) = python_blocks(ROOT / "README.md")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(colours_run)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").symlink_to(image_folder / "ant" / "000.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)  # fixed text of this repository
    encoder, feature = names["encoder"], names["feature"]
    assert isinstance(encoder, torch.nn.Module)
    assert isinstance(feature, torch.Tensor)
    assert feature.shape[0] == 1
    assert torch.isfinite(feature).all()
    assert feature.std() > 0
    # As the block's comment says. The demo's network has a block less than ResNet-18 in each layer.
    assert dict(encoder.named_parameters()).keys() < dict(torchvision.models.resnet18().named_parameters()).keys()


def test_the_code_of_the_python_page_runs_as_written(image_folder, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = python_blocks(ROOT / "docs" / "python.md")
    (tmp_path / "photos").symlink_to(image_folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)  # fixed text of this repository
    assert capsys.readouterr().out == "ant/000.jpg 0 (25, 128)\n"
    assert 0 < names["output"].loss.item() < 8  # type: ignore[attr-defined]
    feature = names["feature"]
    assert isinstance(feature, torch.Tensor)
    np.testing.assert_allclose(feature.detach().numpy()[0], fastbyol.FeatureFile("features.npz").read()[0], rtol=1e-4, atol=1e-5)
    assert all(f"`{name}`" in page for name in fastbyol.__all__)
