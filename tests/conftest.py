"""Tiny image sets that the data tests share: one ImageFolder of JPEG files, and the same images converted for each fast backend."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from PIL import Image

from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.run.log import close_logging
from tests.commands import SMALL_RUN
from tests.forked import run_ranks
from tests.images import smooth_image, write_files

# For stock ffcv, which tests compare with: numba's TBB layer once waited for ever at the end of the process.
numba.config.THREADING_LAYER = "omp"
# Networks this small gain nothing from a second thread, and on a busy machine every barrier waits for one that does not run: fifty steps
# took 180 s instead of 11 s.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Inductor's compile workers import torch, each process's own: ten seconds of computing before the first of these small graphs is compiled.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

SIGNALS = {signal.SIGINT: signal.default_int_handler} | dict.fromkeys((signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1), signal.SIG_DFL)
"""Signal handlers of a process in the foreground of a terminal; in a background shell or under nohup some signals are ignored."""


@pytest.fixture(autouse=True)
def signals_as_in_the_foreground() -> Iterator[None]:
    """Sets these handlers for every test, because a test that runs a command in this process leaves others behind."""
    before = {number: signal.signal(number, handler) for number, handler in SIGNALS.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def log_as_in_a_new_process() -> None:
    """Lets caplog see the product's log in every test, because a command run in this process sets a level and handlers and ends propagation."""
    close_logging()
    log = logging.getLogger("fastbyol")
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture
def triton_imported_anew() -> Iterator[None]:
    """Lets a test import the Triton kernel anew, because TRITON_INTERPRET counts only at the import, and leaves no interpreted one behind."""
    sys.modules.pop("fastbyol.optim.triton_lerp", None)
    yield
    sys.modules.pop("fastbyol.optim.triton_lerp", None)


CLASS_SIZES = {"ant": 8, "bee": 9, "cat": 8}


def noisy_colours(root: Path, *, train: int, val: int) -> Path:
    """Writes train and val folders with so many images of each of three classes, a darker colour channel in noise, and returns their root."""
    rng = np.random.default_rng(0)
    for split, num in (("train", train), ("val", val)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(num):
                pixels = rng.integers(0, 200, (36, 40, 3), dtype=np.uint8)
                pixels[..., channel] //= 2
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and val with 24 + 8 images of three classes: a colour, with noise."""
    return noisy_colours(tmp_path_factory.mktemp("colours"), train=24, val=8)


@pytest.fixture(scope="session")
def colours_run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on `colours`."""
    from fastbyol.train import main as train_main

    out = tmp_path_factory.mktemp("runs") / "run"
    train_main([*SMALL_RUN, "--epochs", "2", "--checkpoint_every", "100", "--data.train", str(colours / "train"), "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's scenes in all layouts, two a class to train on and one to test."""
    from tests.dense_jobs import scenes

    return scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 JPEG files of three classes, 24 to 60 px a side; one is grayscale, one progressive."""
    root = tmp_path_factory.mktemp("images")
    for label, (name, count) in enumerate(CLASS_SIZES.items()):
        (root / name).mkdir()
        for i in range(count):
            image = smooth_image(100 * label + i, 24 + (7 * i + label) % 37, 60 - (5 * i + label) % 31)
            image = image.convert("L") if (label, i) == (0, 3) else image
            image.save(root / name / f"{i:03d}.jpg", quality=92, progressive=(label, i) == (1, 2))
    return root


@pytest.fixture(scope="session")
def beton(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ffcv") / "images.beton"
    write_beton(image_folder, out=out, workers=1)
    return out


@pytest.fixture(scope="session")
def tar_folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dali") / "shards"
    write_tar_shards(image_folder, out=out, workers=1, seed=3)
    return out


@pytest.fixture(scope="session")
def data_paths(image_folder: Path, beton: Path, tar_folder: Path) -> dict[str, Path]:
    """The same 25 images, by the backend that reads them."""
    return {"folder": image_folder, "ffcv": beton, "dali": tar_folder}


@pytest.fixture(scope="session")
def two_ranks(data_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs on two ranks, one after the other in the same two processes: float32, global batch 8.

    'ffcv' and 'dali': one micro-batch. 'folder': two micro-batches. 'own statistics': each rank's batch norms see its own 4 images only, and
    the accuracy of kNN is found on every epoch.
    """
    out = tmp_path_factory.mktemp("two_ranks")
    knn = ["--data.val", str(data_paths["folder"]), "--monitors.knn_every_epochs", "1"]
    options = {
        "ffcv": ["--data.train", str(data_paths["ffcv"])],
        "dali": ["--data.train", str(data_paths["dali"])],
        "folder": ["--data.train", str(data_paths["folder"]), "--rank_batch", "2"],
        "own statistics": ["--data.train", str(data_paths["ffcv"]), *knn, "--precision.cross_replica_bn", "false"],
    }
    common = [*SMALL_RUN, "--epochs", "2", "--checkpoint_every", "100", "--precision.autocast", "off"]
    runs = [[*common, *own, "--out", str(out / name)] for name, own in options.items()]
    (out / "runs.json").write_text(json.dumps(runs))
    for done in run_ranks("tests/long/many_runs.py", out / "runs.json"):
        assert done.returncode == 0, done.stderr
    return {name: out / name for name in options}


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes an ImageFolder of one class from images by file name (Image: saved by its extension; bytes: as they are)."""

    def make(**images: Image.Image | bytes) -> Path:
        folder = tmp_path / "made" / "class"
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, {name.replace("_", "."): image for name, image in images.items()})
        return folder.parent

    return make
