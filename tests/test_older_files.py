"""Files written by an earlier version still work: a run folder, its checkpoint, a .beton and tar shards (`golden/run_of_9107550.tar.xz`).

The commit in the name wrote them on the CPU from 25 images of three classes; the run stopped after step 4 of 6. To keep the archive small,
the weights of its checkpoint were rounded to a few values before they were saved.
"""

from __future__ import annotations

import math
import tarfile
from pathlib import Path

import pytest
import torch

from fastbyol import load_encoder
from fastbyol.config.views import ViewPair
from fastbyol.data import build_image_loader
from fastbyol.run.checkpoint import checkpoint_steps
from fastbyol.run.log import read_metrics
from fastbyol.train import main

ARCHIVE = Path(__file__).parent / "golden" / "run_of_9107550.tar.xz"
OPTIONS = (
    *("--preset", "cpu_demo", "--model.encoder", "timm/test_efficientnet", "--model.stem", "imagenet", "--epochs", "2"),
    *("--global_batch", "8", "--log_every", "1", "--checkpoint_every", "2", "--keep_checkpoints", "10", "--model.hidden_dim", "16"),
    *("--model.projection_dim", "8", "--data.workers", "1", "--data.train", "images.beton", "--out", "run"),
)
"""The command line that started the run."""


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        # Python 3.11.2, which Debian 12 has, knows no filter yet; the archive is our own.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_older_run_continues_to_its_end(kept):
    before = [record["loss"] for record in read_metrics(kept / "run")][:4]
    main(list(OPTIONS))
    losses = [record["loss"] for record in read_metrics(kept / "run")]
    assert losses[:4] == before
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))
    assert checkpoint_steps(kept / "run") == [4, 6]


def test_the_encoder_of_an_older_run_gives_the_features_that_it_gave_then(kept):
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    feature = load_encoder(kept / "run")(image)
    assert feature.shape == (1, 256)
    torch.testing.assert_close(
        feature[0, :4], torch.tensor([0.3848913908, 0.0785770118, 0.0644200891, -0.0496335886]), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", ["images.beton", "shards"])
def test_older_converted_images_give_the_pixels_that_they_gave_then(kept, name):
    with build_image_loader(kept / name, views=ViewPair(), batch=25, workers=1) as loader:
        (batch,) = loader
    assert batch.label.tolist() == [0] * 8 + [1] * 9 + [2] * 8
    assert batch.image.double().mean().item() == pytest.approx(0.2412078696, abs=1e-6)
