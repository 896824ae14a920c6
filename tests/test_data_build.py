"""Tests that a path is opened with the right backend, and that every mistake of a user is a one-line error that names the way out."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ffcv.fields import IntField, RGBImageField
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type
from PIL import Image
from torchvision.datasets import ImageFolder as TorchvisionFolder

from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import build_image_loader, build_loader
from fastbyol.data.formats import beton as beton_format
from fastbyol.data.inputs.folder import list_image_folder
from fastbyol.host.cores import default_workers

VIEWS = ViewPair(size_px=8)


def build(path: Path | str, backend: str = "auto", global_batch: int = 4) -> None:
    build_loader(DataConfig(train=str(path), backend=backend, workers=1), views=VIEWS, seed=0, global_batch=global_batch).close()


@pytest.mark.parametrize("backend", ["folder", "ffcv", "dali"])
def test_each_backend_reads_its_own_format_whether_named_or_detected(backend: str, data_paths: dict[str, Path]) -> None:
    for name in (backend, "auto"):
        build(data_paths[backend], name)


@pytest.mark.parametrize("asked", ["folder", "ffcv", "dali"])
@pytest.mark.parametrize("given", ["folder", "ffcv", "dali"])
def test_a_backend_that_cannot_read_the_path_names_the_one_that_can(asked: str, given: str, data_paths: dict[str, Path]) -> None:
    if asked == given:
        assert build_image_loader(data_paths[given], views=VIEWS, batch=2, backend=asked, workers=1).num_samples == 25
        return
    with pytest.raises(UserError, match=f"data.backend = '{asked}'.* use auto or {given}"):
        build(data_paths[given], asked)


def test_the_global_batch_must_fit_the_data(image_folder: Path) -> None:
    with pytest.raises(UserError, match="global_batch = 26: the data has 25 images"):
        build(image_folder, global_batch=26)


@pytest.mark.parametrize(("path", "message"), [("", "data.train is not given"), ("/no/such/place", "no such file or folder")])
def test_a_missing_path_is_a_one_line_error(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(path)


def test_a_backend_that_is_not_installed_names_the_command(data_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"ffcv is not installed; .*pip install"):
        build(data_paths["ffcv"])
    with pytest.raises(UserError, match="DALI is not installed; pip install"):
        build(data_paths["dali"])
    build(data_paths["folder"])


def test_default_workers_are_shared_between_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers() == 8
    for processes, workers in ((2, 4), (3, 2), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert default_workers() == workers


# ---- folders


def test_the_listing_equals_torchvisions(image_folder: Path, make_folder: Callable[..., Path]) -> None:
    nested = make_folder(b_PNG=Image.new("RGB", (2, 2)), a_jpg=Image.new("RGB", (2, 2)), notes_txt=b"no image")
    for name in ("a", "B", "a-b"):
        (nested / "class" / name).mkdir()
        Image.new("RGB", (2, 2)).save(nested / "class" / name / "0.png")
    for root in (image_folder, nested):
        ours, theirs = list_image_folder(root), TorchvisionFolder(str(root))
        assert [(str(ours.path(i)), label) for i, label in enumerate(ours.labels)] == theirs.samples
        assert list(ours.class_names) == theirs.classes


def test_a_folder_that_is_not_an_image_folder_is_a_one_line_error(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(UserError, match="no image found"):
        build(tmp_path)
    for split in ("train", "val"):
        (tmp_path / "whole" / split).mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds splits .*whole/train"):
        build(tmp_path / "whole")


# ---- .beton


def test_the_beton_types_equal_ffcvs() -> None:
    assert beton_format.VERSION == CURRENT_VERSION
    assert (HeaderType, FieldDescType, ALLOC_TABLE_TYPE) == (beton_format.HEADER, beton_format.FIELD, beton_format.ALLOCATION)
    assert get_metadata_type([RGBImageField(), IntField()]) == beton_format.SAMPLE


def test_a_file_that_is_not_a_beton_is_a_one_line_error(tmp_path: Path, beton: Path) -> None:
    whole = beton.read_bytes()
    header_only = bytearray(whole[:24]) + bytes(5000)
    header_only[16:24] = bytes(8)
    cases = {
        "empty": b"",
        "text": b"not a data set\n" * 500,
        "short": whole[:200],
        "killed writer": bytes(header_only),
        "cut": whole[:-200],
    }
    messages = {
        "empty": "too short",
        "text": "not a .beton",
        "short": "too short",
        "killed writer": "no finished data set",
        "cut": "tail is missing",
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.beton"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path}: .*{messages[name]}"):
            build(path)


def test_a_beton_with_the_manifest_of_another_file_is_refused(tmp_path: Path, beton: Path) -> None:
    copy = Path(shutil.copy(beton, tmp_path / "a.beton"))
    fields = json.loads(Path(f"{beton}.json").read_text())
    fields["shards"][0]["bytes"] += 1
    Path(f"{copy}.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"not the file that a.beton.json describes"):
        build(copy)


def test_a_beton_without_manifest_has_numbers_for_class_names(tmp_path: Path, beton: Path) -> None:
    copy = Path(shutil.copy(beton, tmp_path / "a.beton"))
    with build_image_loader(copy, views=VIEWS, batch=5, workers=1) as loader:
        assert loader.class_names == ("0", "1", "2")


def test_a_raw_beton_of_stock_ffcv_is_read(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    fields = np.zeros(2, dtype=FieldDescType)
    fields["type_id"] = (1, 2)  # the label first, as a user may have it
    samples = np.zeros(3, dtype=get_metadata_type([IntField(), RGBImageField()]))
    data_at = HeaderType.itemsize + fields.nbytes + samples.nbytes
    allocations = np.zeros(3, dtype=ALLOC_TABLE_TYPE)
    for i in range(3):
        samples[i] = (i % 2, (1, 4, 5, data_at + 60 * i))
        allocations[i] = (i, data_at + 60 * i, 60)
    header = np.zeros(1, dtype=HeaderType)
    header[0] = (CURRENT_VERSION, 2, 1 << 23, 3, data_at + pixels.nbytes)
    path = tmp_path / "raw.beton"
    path.write_bytes(b"".join(part.tobytes() for part in (header, fields, samples, pixels, allocations)))
    from fastbyol.data.backends.ffcv_source import FfcvSource

    source = FfcvSource(path)
    assert all((image == wanted).all() for image, wanted in zip(source.decode(np.arange(3)), pixels, strict=True))
    assert source.labels.tolist() == [0, 1, 0]


# ---- tar shards


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: missing"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "not a manifest"),
        (lambda folder: (folder / "shard-00000.tar").unlink(), "shard-00000.tar: missing"),
        (lambda folder: (folder / "shard-00000.tar").write_bytes(b"x" * 9), "9 bytes, the manifest says"),
        (lambda folder: (folder / "shard-00000.idx").unlink(), "shard-00000.idx: missing index"),
        (lambda folder: (folder / "shard-00000.idx").write_text("v1.1 3\n"), "not the v1.2 index of 25 samples"),
        (lambda folder: (folder / "samples.npy").unlink(), "no readable sample table"),
        (lambda folder: (folder / "samples.npy").write_bytes(b"junk"), "no readable sample table"),
        (lambda folder: np.save(folder / "samples.npy", np.zeros(3)), "not the sample table"),
    ],
)
def test_a_tar_folder_with_a_missing_or_foreign_file_is_a_one_line_error(
    damage: Callable[[Path], object], message: str, tar_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tar_folder, tmp_path / "shards"))
    damage(folder)
    with pytest.raises(UserError, match=message):
        build(folder)


def test_evaluation_takes_the_whole_image_where_it_is_told_to(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    views = ViewPair(size_px=16)
    with build_image_loader(tmp_path, views=views, batch=1, workers=1, crop_share=1.0) as loader:
        (batch,) = loader
    mean, std = (torch.tensor(values)[:, None, None] for values in (views.mean, views.std))
    wanted = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(batch.image[0].contiguous(), wanted, atol=1e-5, rtol=0)
