"""docs/python.md does what it says: its code runs as written."""

from __future__ import annotations

import re

import numpy as np
import torch

import fastbyol
from tests.commands import ROOT


def test_the_code_of_the_page_runs_as_written(image_folder, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 2
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
