"""Distribution of the views of a whole loader, on each backend: 20,000 views of images of 375 x 500 px compared with the paper's."""

from __future__ import annotations

import gc
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbyol.augment import parameters as p
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import PAPER, ViewPair
from fastbyol.data import build_loader
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.conversion.tar_writer import write_tar_shards

IMAGES, EPOCHS = 50, 200
DRAWS = 2 * IMAGES * EPOCHS
HEIGHT, WIDTH = 375, 500
KS_BOUND = 1.95 * math.sqrt(2 / DRAWS)  # two samples of this size, p = 0.001


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """50 grey images, the cheapest to decode, by the backend that reads them."""
    root = tmp_path_factory.mktemp("grey")
    (root / "images" / "grey").mkdir(parents=True)
    for i in range(IMAGES):
        Image.new("L", (WIDTH, HEIGHT), 5 * i).save(root / "images" / "grey" / f"{i:02}.jpg", quality=30)
    write_beton(root / "images", out=root / "x.beton", workers=1)
    write_tar_shards(root / "images", out=root / "shards", workers=1)
    return {"folder": root / "images", "ffcv": root / "x.beton", "dali": root / "shards"}


@pytest.fixture(scope="module", params=["folder", "ffcv", "dali"])
def rows(request: pytest.FixtureRequest, sets: dict[str, Path]) -> np.ndarray:
    """Returns the parameters that the loader reports, (images x epochs, 2, P)."""
    views = ViewPair(size_px=1)
    config = DataConfig(train=str(sets[request.param]), workers=1)  # fewer hand-overs between threads
    with build_loader(config, views=views, seed=11, global_batch=IMAGES) as loader:
        return np.concatenate([batch.parameters.numpy() for _ in range(EPOCHS) for batch in loader])


def official_crops(num: int) -> np.ndarray:
    """(num, 4) y, x, h, w of protocol.md 1.2, one draw after another, from Python's own generator."""
    generator, crops = random.Random(0), []
    for _ in range(num):
        area = HEIGHT * WIDTH * generator.uniform(0.08, 1.0)
        aspect = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = min(round(math.sqrt(area * aspect)), WIDTH), min(round(math.sqrt(area / aspect)), HEIGHT)
        crops.append((generator.randint(0, HEIGHT - h), generator.randint(0, WIDTH - w), h, w))
    return np.array(crops, dtype=float)


def ks_distance(first: np.ndarray, second: np.ndarray) -> float:
    both = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(sample), both, side="right") / len(sample) for sample in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def test_crops_have_the_official_distribution(rows: np.ndarray) -> None:
    ours, official = rows[..., : p.CROP_W + 1].reshape(-1, 4).astype(float), official_crops(DRAWS)
    assert len(ours) == DRAWS == 20_000
    for name, measure in {
        "y": lambda box: box[:, 0],
        "x": lambda box: box[:, 1],
        "area": lambda box: box[:, 2] * box[:, 3],
        "aspect": lambda box: box[:, 3] / box[:, 2],
    }.items():
        assert ks_distance(measure(ours), measure(official)) < KS_BOUND, name
    area = ours[:, 2] * ours[:, 3] / (HEIGHT * WIDTH)
    assert area.mean() == pytest.approx(0.519, abs=4 * 0.25 * math.sqrt(1 / DRAWS + 1 / 40_000) + 0.0005)  # published, of 40,000 draws


def test_operations_fire_as_often_as_the_paper_says(rows: np.ndarray) -> None:
    fires = {
        "flip_p": rows[..., p.FLIP] == 1,
        "jitter_p": rows[..., p.ORDER] >= 0,
        "gray_p": rows[..., p.GRAY] == 1,
        "blur_p": rows[..., p.SIGMA] > 0,
        "solarize_p": rows[..., p.SOLARIZE] == 0.5,
    }
    for name, fired in fires.items():
        for view, spec in enumerate((PAPER.view1, PAPER.view2)):
            probability = getattr(spec, name)
            bound = 4 * math.sqrt(probability * (1 - probability) / len(rows))
            assert abs(fired[:, view].mean() - probability) <= bound, (name, view)


def test_operations_fire_independently_of_one_another_and_of_the_other_view(rows: np.ndarray) -> None:
    names = (p.FLIP, p.ORDER, p.GRAY)
    fired = np.concatenate([(rows[:, :, column] > 0).astype(float) for column in names], axis=1)
    correlation = np.corrcoef(fired.T) - np.eye(2 * len(names))
    assert np.abs(correlation).max() < 4.5 / math.sqrt(len(rows))


def test_every_order_of_the_jitter_is_equally_likely(rows: np.ndarray) -> None:
    orders, counts = np.unique(rows[..., p.ORDER][rows[..., p.ORDER] >= 0], return_counts=True)
    expected = counts.sum() / 24
    assert len(orders) == 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7  # chi-square, 23 degrees of freedom, p = 0.001


@pytest.mark.parametrize("backend", ["folder", "ffcv", "dali"])
def test_a_loaders_memory_is_flat_over_epochs(backend: str, sets: dict[str, Path]) -> None:
    """The first epochs fill pools and arenas; whoever kept the batches, or the images, of the next six would grow by four times the bound."""
    views, made = ViewPair(size_px=96), 2 * 3 * 96**2 * 4 * IMAGES * 6
    with build_loader(DataConfig(train=str(sets[backend]), workers=1), views=views, seed=0, global_batch=10) as loader:
        used = []
        for _ in range(9):
            for batch in loader:
                del batch
            gc.collect()
            used.append(resident_bytes())
    assert used[8] - used[2] < made / 4, used


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
