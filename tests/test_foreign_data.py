"""Tests with real-world folders and tars: splits, system folders, thumbnails, images outside class folders."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.data.backends.folder_source import FolderSource
from fastbyol.data.inputs.images import list_images
from fastbyol.data.inputs.listing import ImageListing
from fastbyol.data.inputs.splits import is_split
from tests.commands import run_here
from tests.imagenet_archives import tar_bytes
from tests.images import encoded, write_files


def in_folder_and_tar(tmp_path: Path, *names: str) -> tuple[Path, Path]:
    """Writes the same small images as a folder and as a tar."""
    files = {name: encoded(Image.new("RGB", (8, 8), (len(name), 0, 0))) for name in names}
    (tmp_path / "data.tar").parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "data.tar").write_bytes(tar_bytes(files))
    return write_files(tmp_path / "data", files), tmp_path / "data.tar"


def of_both(paths: tuple[Path, Path]) -> ImageListing:
    """Returns the listing of the folder, after checking that the tar's is equal."""
    folder, tar = map(list_images, paths)
    assert (folder.files, folder.labels, folder.class_names) == (tar.files, tar.labels, tar.class_names)
    assert folder.digest() == tar.digest()
    return folder


@pytest.mark.parametrize(
    "splits",
    [
        ("train", "validation"), ("train", "valid"), ("Training", "Test"), ("TRAIN", "Dev"), ("train", "eval"), ("train2017", "val2017"),
        ("train_set", "test_set"), ("images-train", "images-val"), ("dev", "testing"),
        ("birds_train", "birds_val"), ("ILSVRC2012_img_train", "ILSVRC2012_img_val"), ("1-train", "2-test"), ("trainval", "test"),
    ],
)  # fmt: skip
def test_folders_of_splits_are_refused_with_the_way_out(splits: tuple[str, str], tmp_path: Path) -> None:
    paths = in_folder_and_tar(tmp_path, *(f"{split}/{name}" for split in splits for name in ("cat/1.jpg", "dog/2.jpg")), "other/cat/3.jpg")
    for path, way_out in zip(paths, (f"give one of them, such as {tmp_path}/data/", "unpack it"), strict=True):
        with pytest.raises(
            UserError, match=f"holds splits \\({', '.join(sorted(splits))}\\), not classes; {way_out}.*--splits-are-classes"
        ):
            list_images(path)
        assert len(list_images(path, splits="classes").class_names) == 3
    with pytest.raises(UserError, match="holds splits"):
        FolderSource(list_images(paths[0]))


@pytest.mark.parametrize(
    ("names", "where"),
    [
        (("train/cat/1.jpg", "train/dog/2.jpg"), "data: holds splits .train."),
        (("train/cat/1.jpg", "train/dog/2.jpg", "train/stray.jpg"), "data: holds splits .train."),
        (("Test/cat/1.jpg", "extra/2.jpg"), "data: holds splits .Test."),
        (("images/train/cat/1.jpg", "images/val/cat/2.jpg"), "data/images: holds splits .train, val."),
        (("bottle/train/1.jpg", "bottle/test/2.jpg", "cable/train/1.jpg"), "data/bottle: holds splits .test, train."),
    ],
)
def test_a_single_split_and_nested_splits_are_detected(names: tuple[str, ...], where: str, tmp_path: Path) -> None:
    folder, _ = in_folder_and_tar(tmp_path, *names)
    with pytest.raises(UserError, match=where):
        list_images(folder)


def test_classes_that_merely_have_names_like_splits_are_accepted(tmp_path: Path) -> None:
    listing = of_both(in_folder_and_tar(tmp_path, "car/1.jpg", "train/2.jpg", "train/3.jpg", "train/night/4.jpg", "testimony/5.jpg"))
    assert listing.class_names == ("car", "testimony", "train")
    assert (listing.notes, listing.skipped) == ((), ())
    assert of_both(in_folder_and_tar(tmp_path / "numbered", "test 1/1.jpg", "test 2/2.jpg")).class_names == ("test 1", "test 2")
    of_words = ("freight_train", "test_tube", "test pattern", "train pattern")
    assert of_both(in_folder_and_tar(tmp_path / "words", *(f"{name}/1.jpg" for name in of_words))).class_names == tuple(sorted(of_words))


def test_a_long_name_is_no_split_and_costs_no_time() -> None:
    start = time.monotonic()
    assert not is_split("_" * 1000 + "x")  # took 6 s
    assert time.monotonic() - start < 1
    assert is_split("train" + "_" * 59)


def test_splits_without_folders_in_them_are_splits_too(tmp_path: Path) -> None:
    for splits in (("train", "unlabeled"), ("x_test", "x_train")):
        folder, _ = in_folder_and_tar(tmp_path / splits[0], *(f"{split}/{n}.jpg" for split in splits for n in range(2)))
        with pytest.raises(UserError, match=f"holds splits \\({', '.join(splits)}\\)"):
            list_images(folder)


def test_a_tar_with_one_split_is_read_as_that_split(tmp_path: Path) -> None:
    _, tar = in_folder_and_tar(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg")
    assert list_images(tar).class_names == ("cat", "dog")


def test_a_folder_one_level_too_high_is_reported(tmp_path: Path) -> None:
    folder, _ = in_folder_and_tar(tmp_path, "images/cat/1.jpg", "images/dog/2.jpg")
    listing = list_images(folder)
    assert listing.class_names == ()
    assert listing.notes == (
        f"{folder}: no labels: all images are in one folder, 'images', with 2 folders in it; if they are the classes, give {folder}/images",
    )


def test_a_split_without_class_folders_has_no_labels(tmp_path: Path) -> None:
    folder, _ = in_folder_and_tar(tmp_path, "train/1.jpg", "train/2.jpg")
    listing = list_images(folder)
    assert (listing.labels, listing.notes) == ((-1, -1), (f"{folder}: no labels: all images are in one folder, 'train'",))


def test_system_folders_and_thumbnails_are_neither_classes_nor_images(tmp_path: Path) -> None:
    good = ("cat/1.jpg", "dog/2.jpg")
    foreign = (
        "__MACOSX/cat/1.jpg", "@eaDir/3.jpg", "cat/@eaDir/1.jpg/SYNOFILE_THUMB_M.jpg", "cat/.thumbnails/1.jpg", "$RECYCLE.BIN/4.jpg",
        "System Volume Information/5.jpg", "#recycle/6.jpg", "lost+found/7.jpg", "dog/._2.jpg", "dog/SYNOPHOTO_THUMB_XL.jpg",
        "dog/.ipynb_checkpoints/2-checkpoint.jpg", "@Recycle/8.jpg",
    )  # fmt: skip
    paths = in_folder_and_tar(tmp_path, *good, *foreign)
    for name in ("lost+found", "#snapshot"):
        (paths[0] / name).mkdir(exist_ok=True)
    listing = of_both(paths)
    assert (listing.files, listing.class_names) == (good, ("cat", "dog"))
    assert {"a system folder", "hidden", "a thumbnail"} == {reason for _, reason in listing.skipped}
    labels = tmp_path / "labels.csv"
    labels.write_text("filename,label\ncat/1.jpg,a\ndog/2.jpg,b\n")
    for path in paths:
        assert list_images(path, labels=labels).files == good


def test_a_few_folders_beside_most_of_the_images_are_not_their_classes(tmp_path: Path) -> None:
    paths = in_folder_and_tar(tmp_path, *(f"{index}.jpg" for index in range(3)), "a/1.jpg", "b/1.jpg")
    listing = of_both(paths)
    assert (len(listing.files), listing.labels, listing.class_names) == (5, (-1,) * 5, ())
    for path in paths:
        assert list_images(path).notes == (
            f"{path}: no labels: most of its images are in no folder that could be classes; --labels FILE gives labels",
        )
        assert list_images(path, labels="folders").class_names == ("a", "b")


def test_images_outside_class_folders_are_counted_in_every_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = in_folder_and_tar(tmp_path, "cat/1.jpg", "dog/2.jpg", "loose1.jpg", "loose2.jpg")
    of_both(paths)
    (paths[0] / "cat" / "gone.jpg").symlink_to("nowhere")
    with caplog.at_level(logging.WARNING, logger="fastbyol"):
        FolderSource(list_images(paths[0]))
    told = f"{paths[0]}: left out: 2 in no class folder (the first: 'loose1.jpg'), 1 a broken link (the first: 'cat/gone.jpg')"
    assert [record.message for record in caplog.records] == [told]
    done = run_here("to_ffcv.py", "--data", paths[0], "--out", tmp_path / "x.beton", "--workers", "1")
    assert f"fastbyol: note: {told}\n" in done.stderr
    assert "left out: in no class folder" in done.stdout
    report = json.loads((tmp_path / "x.beton.report.json").read_text())
    assert {"name": "loose2.jpg", "reason": "in no class folder"} in report["left_out_of_the_listing"]
    told = told.replace(str(paths[0]), str(paths[1])).partition(", 1 a broken link")[0]
    assert told in " ".join(run_here("info.py", paths[1], "--json").stdout.split())
    assert "2 in no class folder" in " ".join(run_here("info.py", paths[1]).stdout.split())
