"""Data as people have them: without labels, in any kind of container. The same images give the same views, whatever they come from."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image

from fastbyol import train
from fastbyol.__main__ import main as fastbyol_command
from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import build_image_loader, build_loader
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.inputs.images import join_listings, list_images
from fastbyol.data.inputs.listing import ImageListing
from fastbyol.data.inputs.sources import given_sources, is_original
from fastbyol.evaluation.feature_file import FeatureFile
from tests.commands import ROOT, SMALL_RUN, files_no_larger_than, run_here
from tests.imagenet_archives import tar_bytes
from tests.images import encoded, smooth_image, write_files

NUM, PER_SHARD = 24, 8
VIEWS = ViewPair(size_px=16)
SOURCES = ("flat", "tree", "list.txt", "list.csv", "list.tsv", "roots", "shards", "pattern", "one.tar", "parquet", "parquet_file")


def picture(index: int) -> bytes:
    return encoded(smooth_image(index, 24 + index % 11, 40 - index % 7))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same 24 pictures in every kind of source, by name: what a user would give as data."""
    root = tmp_path_factory.mktemp("sources")
    names = [f"{index:04d}.jpg" for index in range(NUM)]
    pictures = dict(zip(names, map(picture, range(NUM)), strict=True))
    write_files(root / "flat", pictures)
    write_files(root / "tree", {f"{'2019/spring' if name < '0010' else '2020'}/{name}": data for name, data in pictures.items()})
    (root / "list.txt").write_text("".join(f"flat/{name}\n" for name in reversed(names)))
    rows = "".join(f"{number},flat/{name},kind {number % 3}\n" for number, name in enumerate(names))
    (root / "list.csv").write_text("number,path,kind\n" + rows)
    (root / "list.tsv").write_text("".join(f"{root}/flat/{name}\tx\n" for name in names))
    (root / "wds").mkdir()
    for shard in range(NUM // PER_SHARD):
        with webdataset.TarWriter(str(root / f"wds/part-{shard:05d}.tar")) as writer:
            for index in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                writer.write({"__key__": f"{index:04d}", "jpg": picture(index), "json": {"number": index}, "txt": f"picture {index}"})
    with tarfile.open(root / "one.tar", "w") as tar:
        tar.add(root / "flat", arcname=".")
    (root / "hf" / "data").mkdir(parents=True)
    for part in range(2):
        images = [{"bytes": picture(index), "path": f"{index}.jpg"} for index in range(part * 12, part * 12 + 12)]
        pq.write_table(pa.table({"image": images}), root / f"hf/data/train-{part:05d}-of-00002.parquet")
    pq.write_table(pa.table({"img": [picture(index) for index in range(NUM)]}), root / "all.parquet")
    return {
        "flat": f"{root}/flat",
        "tree": f"{root}/tree",
        **{name: f"{root}/{name}" for name in ("list.txt", "list.csv", "list.tsv", "one.tar")},
        "roots": f"{root}/tree/2019::{root}/tree/2020",
        "shards": f"{root}/wds",
        "pattern": f"{root}/wds/part-{{00000..00002}}.tar",
        "parquet": f"{root}/hf",
        "parquet_file": f"{root}/all.parquet",
    }


def listed(data: str) -> ImageListing:
    return list_images(data, labels="none")


def first_views(data: str, **settings: str) -> list[np.ndarray]:
    with build_loader(DataConfig(train=data, workers=1, **settings), views=VIEWS, seed=5, global_batch=8) as loader:
        assert loader.class_names == ()
        return [view.numpy() for batch in loader for view in (batch.view1, batch.view2)]


def losses(data: str, run: Path, *options: str) -> list[float]:
    """Trains for one epoch and returns the loss of each step."""
    train.main([*SMALL_RUN, "--epochs", "1", "--data.train", data, "--out", str(run), *options])
    return [record["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in (record := json.loads(line))]


def embedded(run: Path, data: str, out: Path, *options: str) -> FeatureFile:
    fastbyol_command(["embed", "--checkpoint", str(run), "--data", data, "--out", str(out), "--workers", "1", *options])
    return FeatureFile(out)


@pytest.fixture(scope="module")
def of_flat(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], np.ndarray]:
    """A run on the flat folder, its losses, and its features of that folder."""
    root = tmp_path_factory.mktemp("of_flat")
    loss = losses(sources["flat"], root / "run")
    return root / "run", loss, embedded(root / "run", sources["flat"], root / "features.npz").read()


CONVERTED = {"to_ffcv.py": "x.beton", "to_dali.py": "x_tar"}
"""What each script of data_prep/ writes here."""


def convert(script: str, data: str, folder: Path) -> tuple[str, dict[str, bytes]]:
    """Converts the images; returns what the script printed, and every byte of images, labels and places that it wrote, by file name."""
    out = folder / CONVERTED[script]
    done = run_here(script, "--data", *data.split("::"), "--labels", "none", "--out", out, "--workers", "1")
    assert done.returncode == 0, done.stderr
    files = out.iterdir() if out.is_dir() else [out]
    return done.stdout, {path.name: path.read_bytes() for path in files if path.suffix != ".json"}  # which name the source


@pytest.fixture(scope="module")
def converted(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, bytes]]]:
    """A folder with the flat folder converted to each format, and the content of its files by script and name."""
    folder = tmp_path_factory.mktemp("converted")
    return folder, {script: convert(script, sources["flat"], folder)[1] for script in CONVERTED}


@pytest.mark.parametrize("script", CONVERTED)
def test_converted_images_give_the_run_and_the_features_of_their_files(
    script: str, converted: tuple[Path, dict[str, dict[str, bytes]]], of_flat: tuple[Path, list[float], np.ndarray], tmp_path: Path
) -> None:
    """Those of the flat folder: the other sources give the same files, byte for byte."""
    run, expected_loss, expected = of_flat
    data = str(converted[0] / CONVERTED[script])
    # Their decoder is not Pillow: a few levels apart.
    assert losses(data, tmp_path / "run") == pytest.approx(expected_loss, abs=0.02)
    assert np.abs(embedded(run, data, tmp_path / "f.npz").read() - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_images_give_the_same_run_features_and_report_from_every_source(
    name: str,
    sources: dict[str, str],
    of_flat: tuple[Path, list[float], np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, expected_loss, expected = of_flat
    data = sources[name]
    assert losses(data, tmp_path / "run", "--data.labels", "none") == expected_loss
    file = embedded(run, data, tmp_path / "f.npz", "--labels", "none")
    assert np.array_equal(file.read(), expected)
    assert not file.facts.class_names
    fastbyol_command(["views", "--data", data, "--out", str(tmp_path / "views.png"), "--rows", "3"])
    with Image.open(tmp_path / "views.png") as sheet:
        assert sheet.size[1] > 3 * VIEWS.size_px
    capsys.readouterr()
    if name != "flat":  # the curves of the training take half the time of a report and read no image
        monkeypatch.setattr("fastbyol.evaluation.report.curves", lambda *_, **__: b"")
    fastbyol_command(["report", "--run", str(tmp_path / "run"), "--data", data, "--workers", "1"])
    said, page = capsys.readouterr(), (tmp_path / "run" / "report.html").read_text()
    assert "linear and knn left out" in said.err
    assert f"of {NUM} images are found again by their other view" in said.out
    assert re.findall(r'<section id="(\w+)">', page)[5:9] == ["neighbours", "clusters", "map", "odd"]


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_images_have_the_same_bytes_and_views_from_every_source(
    name: str, sources: dict[str, str], converted: tuple[Path, dict[str, dict[str, bytes]]], tmp_path: Path
) -> None:
    listing = listed(sources[name])
    assert [listing.location(index).read() for index in range(NUM)] == [picture(index) for index in range(NUM)]
    assert set(listing.labels) == {-1}
    assert listing.class_names == ()
    expected = first_views(sources["flat"])
    assert len(expected) == 2 * NUM // 8
    seen = first_views(sources[name], labels="none")
    assert all(np.array_equal(view, other) for view, other in zip(seen, expected, strict=True))
    for script, place in CONVERTED.items():
        out = tmp_path / place
        said, files = convert(script, sources[name], tmp_path)
        assert f"{NUM} images without labels" in said
        assert files == converted[1][script]
        # Their decoder is not Pillow: a few levels apart, and the crops are the same.
        assert all(np.abs(view - other).max() < 0.5 for view, other in zip(first_views(str(out)), expected, strict=True))
        verified = run_here("verify.py", out, "--source", *sources[name].split("::"), "--labels", "none")
        assert f"all is well: {NUM} images without labels" in verified.stdout
        assert "no labels" in run_here("info.py", out).stdout


@pytest.mark.parametrize("name", ["flat", "pattern", "roots"])
def test_a_run_trains_on_unlabelled_images_without_a_probe(name: str, sources: dict[str, str], tmp_path: Path) -> None:
    train.main([*SMALL_RUN, "--epochs", "1", "--data.train", sources[name], "--data.labels", "none", "--out", str(tmp_path / "run")])
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert len(steps) == NUM // 8
    assert {(record["probe_loss"], record["probe_top1"]) for record in steps} == {(None, None)}


def test_the_evaluation_loader_reads_every_source(sources: dict[str, str]) -> None:
    for name in SOURCES:
        with build_image_loader(DataConfig(train=sources[name], labels="none"), views=VIEWS, batch=8, workers=1) as loader:
            assert [batch.index.tolist() for batch in loader] == [list(range(first, first + 8)) for first in range(0, NUM, 8)]
            assert all((batch.label == -1).all() for batch in loader)


def test_shards_are_read_ahead_in_a_local_traversal_and_files_are_not(sources: dict[str, str]) -> None:
    order: dict[str, list[int]] = {}
    for traversal in ("random", "local"):
        config = DataConfig(train=sources["shards"], workers=1, traversal=traversal)
        with build_loader(config, views=VIEWS, seed=5, global_batch=8) as loader:
            order[traversal] = [index for batch in loader for index in batch.index.tolist()]
    assert sorted(order["local"]) == sorted(order["random"]) == list(range(NUM))
    with pytest.raises(UserError, match="each image is a file of its own"):
        build_loader(DataConfig(train=sources["flat"], traversal="local"), views=VIEWS, seed=5, global_batch=8)


def test_knn_while_training_needs_labels_and_says_so(sources: dict[str, str], image_folder: Path, tmp_path: Path) -> None:
    def run(name: str, data: str, *options: str) -> None:
        train.main(
            [*SMALL_RUN, "--epochs", "1", "--monitors.knn_every_epochs", "1", "--data.train", data, "--out", str(tmp_path / name), *options]
        )

    with pytest.raises(SystemExit, match="2"):
        run("a", sources["flat"], "--data.val", str(image_folder))
    with pytest.raises(SystemExit, match="2"):
        run("b", str(image_folder), "--data.val", sources["flat"])
    table = tmp_path / "labels.csv"
    table.write_text("path,class\n" + "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(list_images(sources["flat"]).files)))
    val = tmp_path / "val"
    write_files(val, {f"{name}/{i}.jpg": picture(i) for name in "ab" for i in range(4)})
    run("c", sources["flat"], "--data.labels", str(table), "--data.val", str(val))
    records = [json.loads(line) for line in (tmp_path / "c" / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= records[-1]["knn_top1"] <= 1
    assert records[-1]["probe_top1"] is not None


# ---- labels where there are some


def test_folders_are_classes_only_where_they_look_like_classes(tmp_path: Path) -> None:
    jpeg = picture(0)
    classes = write_files(tmp_path / "classes", {"cat/1.jpg": jpeg, "dog/1.jpg": jpeg, "stray.jpg": jpeg})
    assert list_images(classes).class_names == ("cat", "dog")
    assert dict(list_images(classes).skipped) == {"stray.jpg": "in no class folder"}
    assert list_images(classes, labels="none").files == ("stray.jpg", "cat/1.jpg", "dog/1.jpg")
    mostly_flat = write_files(tmp_path / "flat", {"a/1.jpg": jpeg, "b/1.jpg": jpeg, "1.jpg": jpeg, "2.jpg": jpeg, "3.jpg": jpeg})
    listing = list_images(mostly_flat)
    assert (len(listing.files), listing.class_names) == (5, ())
    assert listing.notes == (
        f"{mostly_flat}: no labels: most of its images are in no folder that could be classes; --labels FILE gives labels",
    )
    assert list_images(mostly_flat, labels="folders").class_names == ("a", "b")


def test_what_is_said_about_labels_names_the_option_of_the_command_that_was_typed(
    sources: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastbyol.__main__ import main
    from fastbyol.data.backends import folder_source

    def said_by(command: Callable[[list[str]], object], *arguments: str) -> str:
        folder_source._warn_once.cache_clear()
        with suppress(SystemExit):
            command(list(arguments))
        return " ".join(capfd.readouterr().err.split())

    flat, out, several = sources["flat"], str(tmp_path / "run"), [f"{sources['tree']}/2019", f"{tmp_path}/labelled"]
    write_files(tmp_path / "labelled", {"a/1.jpg": picture(0), "b/1.jpg": picture(0)})
    no_labels, mixed = "that could be classes; {} FILE gives labels", "has none; give {} none, or sources that are alike"
    small = [*SMALL_RUN, "--epochs", "1", "--out"]
    assert no_labels.format("--data.labels") in said_by(train.main, *small, out, "--data.train", flat)
    assert mixed.format("--data.labels") in said_by(train.main, *small, f"{out}2", "--data.train", "::".join(several))
    assert "give --data.labels none, or a file" in said_by(train.main, *small, f"{out}2", "--data.train", flat, "--data.labels", "folders")
    assert "--data.label_column: has no effect" in said_by(train.main, *small, f"{out}2", "--data.train", flat, "--data.label_column", "x")
    embed = ["embed", "--checkpoint", out, "--data", flat, "--out", f"{tmp_path}/f.npz", "--workers", "1"]
    assert no_labels.format("--labels") in said_by(main, *embed)
    without = "python -m fastbyol convert --labels"
    assert no_labels.format(without) in said_by(main, "evaluate", "labelfree", "--checkpoint", out, "--data", flat, "--workers", "1")
    assert mixed.format(without) in said_by(main, "suggest", "--data", "::".join(several), "--out", f"{tmp_path}/s.yaml")
    assert mixed.format("--labels") in run_here("to_ffcv.py", "--data", *several, "--out", tmp_path / "x.beton").stderr
    folder_source._warn_once.cache_clear()
    build_image_loader(flat, views=VIEWS, batch=8).close()


def test_cls_members_are_the_labels_of_shards(tmp_path: Path) -> None:
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"x-{shard}.tar")) as writer:
            for index in range(5):
                label = {"cls": 10 * index} if index < 4 else {}
                writer.write({"__key__": f"{shard}{index}", "jpg": picture(index), **label})
    listing = list_images(f"{tmp_path}/x-{{0..1}}.tar")
    assert listing.class_names == ("0", "10", "20", "30")
    found = dict(zip(listing.files, listing.labels, strict=True))
    assert found == {f"x-{shard}/{shard}{index}.jpg": index if index < 4 else -1 for shard in range(2) for index in range(5)}
    assert any("4 classes; 2 images have none" in note for note in listing.notes)


def test_our_own_shards_read_as_ordinary_tars_have_their_labels(tmp_path: Path) -> None:
    # 9, 10, 13 and 32 are white space where their 8 bytes are taken for text.
    label_of = {f"{number:02d}": number for number in (0, 9, 10, 13, 32)}
    images = write_files(tmp_path / "images", {f"{name}/{index}.jpg": encoded(Image.new("L", (9, 8 + index), 9 * label_of[name]))
                                               for name in label_of for index in range(2)})  # fmt: skip
    found = list_images(images)
    labels = tuple(-1 if index == 3 else label_of[found.class_names[label]] for index, label in enumerate(found.labels))
    classes = tuple(map(str, range(33)))
    write_tar_shards(replace(found, class_names=classes, labels=labels), out=tmp_path / "tar", workers=1)
    for given in (tmp_path / "tar", tmp_path / "tar/shard-00000.tar"):
        listing = list_images(given)
        assert listing.class_names == ("0", "9", "10", "13", "32")
        numbers = {int(name.rpartition("/")[2][:8]): label for name, label in zip(listing.files, listing.labels, strict=True)}
        read = tuple(-1 if numbers[index] < 0 else int(listing.class_names[numbers[index]]) for index in range(len(labels)))
        assert read == labels


def test_a_list_has_the_labels_of_the_column_that_is_named(sources: dict[str, str]) -> None:
    listing = list_images(sources["list.csv"], label_column="kind")
    assert listing.class_names == ("kind 0", "kind 1", "kind 2")
    assert all(listing.labels[i] == int(Path(name).stem) % 3 for i, name in enumerate(listing.files))


def test_parquet_has_the_labels_and_class_names_of_hugging_face(tmp_path: Path) -> None:
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": [{"bytes": picture(i), "path": None} for i in range(6)], "label": [1, 0, 1, 0, -1, 0]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "x.parquet")
    listing = list_images(tmp_path / "x.parquet")
    assert listing.class_names == ("cat", "dog")
    assert listing.labels == (-1, 0, 0, 0, 1, 1)
    order = [4, 1, 3, 5, 0, 2]
    assert [listing.location(place).read() for place in range(6)] == [picture(index) for index in order]
    assert list_images(tmp_path / "x.parquet", labels="none").labels == (-1,) * 6


def test_parquet_keeps_class_names_of_any_length_and_says_how_many_images_have_none(tmp_path: Path) -> None:
    # The longest of ImageNet-1k on the Hub has 121 bytes.
    names = ["z" * 121, "cat\nwith a line break", "é" * 300, "ant"]
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table({"image": [picture(i) for i in range(5)], "label": [0, 1, 2, 3, -1]})
    for file, metadata in (("x.parquet", {"huggingface": json.dumps(features)}), ("texts.parquet", None)):
        if metadata is None:
            table = table.set_column(1, "label", pa.array([*names, None]))
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / file)
        for listing in (list_images(tmp_path / file), list_images(tmp_path / file)):
            assert listing.class_names == ("ant", "cat with a line break", "z" * 121, "é" * 300)
            found = {int(name[:9]): label for name, label in zip(listing.files, listing.labels, strict=True)}
            assert found == {0: 2, 1: 1, 2: 3, 3: 0, 4: -1}
            assert any("4 classes; 1 images have none" in note for note in listing.notes)


def test_the_copy_of_parquet_files_of_an_earlier_version_is_made_anew(tmp_path: Path) -> None:
    table = pa.table({"image": [picture(0), picture(1)], "label": ["cat", "dog"]})
    pq.write_table(table, tmp_path / "x.parquet")
    first = list_images(tmp_path / "x.parquet")
    copy = first.location(0).path
    stamp = (tmp_path / "x.parquet").stat()
    facts = {"stamps": [[stamp.st_size, stamp.st_mtime_ns]], "label_column": None}
    copy.write_bytes(tar_bytes({"parquet.json": json.dumps(facts).encode(), "000000000.jpg": picture(0), "000000000.cls": b"cat"}))
    again = list_images(tmp_path / "x.parquet")
    assert (again.files, again.labels, again.class_names) == (first.files, first.labels, first.class_names)


def test_classes_of_several_roots_are_joined_by_name(tmp_path: Path) -> None:
    jpeg = picture(0)
    write_files(tmp_path / "one", {"cat/1.jpg": jpeg, "dog/1.jpg": jpeg})
    write_files(tmp_path / "two", {"bird/1.jpg": jpeg, "cat/2.jpg": jpeg})
    listing = list_images([tmp_path / "one", tmp_path / "two"])
    found = {name: listing.class_names[label] for name, label in zip(listing.files, listing.labels, strict=True)}
    assert found == {"two/bird/1.jpg": "bird", "one/cat/1.jpg": "cat", "two/cat/2.jpg": "cat", "one/dog/1.jpg": "dog"}
    again = list_images(f"{tmp_path}/one::{tmp_path}/one")
    assert (len(again.files), {reason for _, reason in again.skipped}) == (2, {"the same image again"})


def test_a_file_that_vanishes_while_sources_are_joined_is_named_in_one_line(sources: dict[str, str], tmp_path: Path) -> None:
    folder = write_files(tmp_path / "x", {"1.jpg": picture(1), "2.jpg": picture(2)})
    listings = [listed(sources["one.tar"]), listed(str(folder))]
    (folder / "2.jpg").unlink()
    with pytest.raises(UserError, match=r"x/2.jpg: was listed a moment ago and is gone \(No such file or directory\)"):
        join_listings(listings)


def test_one_image_of_each_key_is_taken(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for index in range(3):
            writer.write(
                {"__key__": str(index), "mask.png": encoded(smooth_image(9, 8, 8), "PNG"), "jpg": picture(index), "txt": "a caption"}
            )
    listing = list_images(tmp_path / "x.tar")
    assert [listing.location(index).read() for index in range(3)] == [picture(index) for index in range(3)]
    assert dict(listing.skipped) == {f"{index}.mask.png": "a further image of its key" for index in range(3)}


def test_photographs_with_dots_in_their_names_are_not_taken_for_members_of_one_key(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(write_files(tmp_path / "x", {"trip.1.jpg": picture(1), "trip.2.jpg": picture(2)}), arcname=".")
    assert list_images(tmp_path / "x.tar").files == ("trip.1.jpg", "trip.2.jpg")


def test_a_film_beside_its_photograph_does_not_leave_out_other_photographs(tmp_path: Path) -> None:
    names = [*(f"Photo 12.05.2020 10.{minute}.jpg" for minute in range(3)), "IMG_1.jpg"]
    files = {name: picture(number) for number, name in enumerate(names)} | {"IMG_1.mov": b"a film", "IMG_1.depth.png": picture(9)}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(write_files(tmp_path / "x", files), arcname=".")
    listing = list_images(tmp_path / "x.tar")
    assert sorted(listing.files) == sorted(names)
    assert all(listing.location(row).read() == files[name] for row, name in enumerate(listing.files))
    assert dict(listing.skipped) == {"IMG_1.depth.png": "a further image of its key"}


def test_rows_of_parquet_files_without_bytes_are_counted(tmp_path: Path) -> None:
    images = [{"bytes": picture(row) if row % 2 else None, "path": f"{row}.jpg"} for row in range(6)]
    pq.write_table(pa.table({"image": images, "label": ["cat", "dog"] * 3}), tmp_path / "x.parquet")
    for listing in (list_images(tmp_path / "x.parquet"), list_images(tmp_path / "x.parquet")):
        assert [name[:9] for name in listing.files] == ["000000001", "000000003", "000000005"]
        assert listing.skipped == tuple((f"{row:09d}", "no bytes in its row") for row in (0, 2, 4))


@pytest.mark.parametrize("columns", [{}, {"path_column": "1", "label_column": "2"}])
def test_the_first_file_of_a_table_without_a_header_is_missing_like_any_other(columns: dict[str, str], tmp_path: Path) -> None:
    write_files(tmp_path, {f"{number}.jpg": picture(number) for number in (2, 3)})
    (tmp_path / "l.csv").write_text("1.jpg,cat\n2.jpg,dog\n3.jpg,cat\n")
    with pytest.raises(UserError, match=r"l.csv: 1 of its 3 files are missing, the first '1.jpg'"):
        list_images(tmp_path / "l.csv", **columns)
    (tmp_path / "l.csv").write_text("images.jpg,kind\n2.jpg,dog\n3.jpg,cat\n")
    for named in ({"path_column": "images.jpg"}, {"label_column": "kind"}):  # whoever names a column says that there is a header
        assert len(list_images(tmp_path / "l.csv", **named).files) == 2


def test_a_folder_and_a_tar_of_one_name_are_two_sources(tmp_path: Path) -> None:
    write_files(tmp_path / "photos", {"1.jpg": picture(1)})
    (tmp_path / "photos.tar").write_bytes(tar_bytes({"1.jpg": picture(2)}))
    listing = list_images([tmp_path / "photos", tmp_path / "photos.tar"])
    assert listing.files == ("photos/1.jpg", "photos.tar/1.jpg")
    assert [listing.location(row).read() for row in range(2)] == [picture(1), picture(2)]


def test_a_folder_may_be_called_as_a_tar_beside_other_sources(tmp_path: Path) -> None:
    write_files(tmp_path / "x.tar", {"1.jpg": picture(1)})
    write_files(tmp_path / "y", {"2.jpg": picture(2)})
    listing = list_images([tmp_path / "x.tar", tmp_path / "y"])
    assert [listing.location(row).read() for row in range(2)] == [picture(1), picture(2)]


@pytest.mark.parametrize("kind", ["list.csv", "list.txt", "parquet"])
def test_class_folders_are_not_asked_of_lists_and_parquet_files(kind: str, sources: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"--labels folders: has no effect on .*; a list or table has its labels in a column"):
        list_images(sources[kind], labels="folders")


# ---- the index of shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """100 shards of three samples."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(100):
        with webdataset.TarWriter(str(folder / f"part-{shard:05d}.tar")) as writer:
            for index in range(3):
                writer.write({"__key__": f"{shard:03d}{index}", "jpg": picture(shard + index), "cls": shard % 5})
    return folder


def indices_of(folder: Path) -> list[Path]:
    return [path for path in folder.glob(".fastbyol-index-*") if path.suffix != ".lock"]


def test_shards_are_read_once_and_then_from_their_index(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbyol.data.inputs.tar import TarScan

    read: list[Path] = []
    scan = TarScan.read
    monkeypatch.setattr(TarScan, "read", lambda self, progress: (read.append(self._path), scan(self, progress))[1])
    first = list_images(shards)
    assert (len(first.files), len(read)) == (300, 100)
    (index,) = indices_of(shards)
    again = list_images(shards)
    assert len(read) == 100
    assert (again.files, again.labels, again.class_names, again.places) == (first.files, first.labels, first.class_names, first.places)
    index.write_bytes(index.read_bytes()[:-100])
    assert list_images(shards).files == first.files
    assert len(read) == 200
    assert not list(shards.glob("*.lock"))


def test_a_shard_that_changed_after_indexing_is_noticed_at_the_next_start_and_while_it_is_read(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = list_images(shards)
    changed = shards / "part-00007.tar"
    with webdataset.TarWriter(str(changed)) as writer:
        writer.write({"__key__": "0070", "jpg": picture(55), "cls": 2})
    location = next(before.location(i) for i, name in enumerate(before.files) if name.startswith("part-00007"))
    with pytest.raises(OSError, match=r"part-00007.tar has changed since it was listed"):
        location.read()
    after = list_images(shards)
    assert len(after.files) == 298
    assert f"{changed}: has changed since it was indexed; it is indexed again" in caplog.messages
    caplog.clear()
    assert list_images(shards).files == after.files
    assert not caplog.messages


def test_indexing_that_is_killed_leaves_nothing_that_hinders_the_next(shards: Path) -> None:
    code = (
        "import sys, time; from fastbyol.data.inputs import tar, images\n"
        "scan = tar.TarScan.read\n"
        "def slow(self, progress):\n"
        "    print('reading', flush=True); time.sleep(0.05); scan(self, progress)\n"
        "tar.TarScan.read = slow\n"
        "images.list_images(sys.argv[1])"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(shards)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(10):
            assert process.stdout.readline() == b"reading\n"
        process.send_signal(signal.SIGKILL)
    assert not indices_of(shards)
    assert len(list_images(shards).files) == 300
    assert len(indices_of(shards)) == 1


def test_two_ranks_index_once_and_read_each_image_once_between_them(shards: Path) -> None:
    code = (
        "import sys; from fastbyol.data.inputs import tar, images\n"
        "count = 0\n"
        "scan = tar.TarScan.read\n"
        "def counted(self, progress):\n"
        "    global count; count += 1; scan(self, progress)\n"
        "tar.TarScan.read = counted\n"
        "print(images.list_images(sys.argv[1]).digest(), count)"
    )
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(shards)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [rank.communicate(timeout=120)[0].split() for rank in ranks]
    assert said[0][0] == said[1][0] == list_images(shards).digest()
    assert sorted(int(count) for _, count in said) == [0, 100]
    read = [
        build_loader(DataConfig(train=str(shards), workers=1), views=VIEWS, seed=5, global_batch=10, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    seen = [[index for batch in loader for index in batch.index.tolist()] for loader in read]
    for loader in read:
        loader.close()
    assert sorted(seen[0] + seen[1]) == list(range(300))


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], None]:
    """Makes a folder refuse locks, as a read-only one does (root may write anywhere), and gives the user an empty cache folder."""
    from fastbyol.host import cache_files

    locked = cache_files.locked_file
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refuse(folder: Path) -> None:
        def refused(path: Path, **options: float) -> int:
            if path.parent == folder:
                raise PermissionError(13, "Permission denied", str(path))
            return locked(path, **options)

        monkeypatch.setattr(cache_files, "locked_file", refused)

    return refuse


def test_read_only_shards_are_indexed_in_the_cache_folder(shards: Path, read_only: Callable[[Path], None], tmp_path: Path) -> None:
    read_only(shards)
    assert len(list_images(shards).files) == 300
    assert not indices_of(shards)
    assert len(list((tmp_path / "cache" / "fastbyol").glob("fastbyol-index-*"))) == 1


def test_an_index_is_used_after_its_folder_has_become_read_only(
    shards: Path, read_only: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from fastbyol.data.inputs.tar import TarScan

    first = list_images(shards)
    read_only(shards)
    read: list[Path] = []
    scan = TarScan.read
    monkeypatch.setattr(TarScan, "read", lambda self, progress: (read.append(self._path), scan(self, progress))[1])
    assert list_images(shards).places == first.places
    assert not read
    assert not (tmp_path / "cache").exists()
    changed = shards / "part-00042.tar"
    with webdataset.TarWriter(str(changed)) as writer:
        writer.write({"__key__": "x", "jpg": picture(55), "cls": 2})
    for _ in range(2):
        assert len(list_images(shards).files) == 298
        assert read == [changed], "the others come from the index beside them, this one from the new index in the cache folder"
    assert caplog.messages == [f"{changed}: has changed since it was indexed; it is indexed again"]


def test_the_copy_of_parquet_files_is_used_after_their_folder_has_become_read_only(
    sources: dict[str, str], read_only: Callable[[Path], None], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    file = Path(shutil.copy(sources["parquet_file"], tmp_path / "data"))
    first = list_images(file)
    read_only(file.parent)
    assert list_images(file).places == first.places
    assert not (tmp_path / "cache").exists()


def test_a_lock_that_another_process_does_not_release_is_one_line_that_names_it(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbyol.host import cache_files

    monkeypatch.setattr(cache_files, "_PATIENCE_S", 0.0)
    list_images(shards)
    (index,) = indices_of(shards)
    index.unlink()
    lock = index.with_name(index.name + ".lock")
    code = (
        "import sys; from pathlib import Path; from fastbyol.host.durable_files import locked_file\n"
        "locked_file(Path(sys.argv[1])); print(1, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"1\n"
        with pytest.raises(UserError, match=rf"^{re.escape(str(lock))}: process {holder.pid} on .* end that process, or delete the file"):
            list_images(shards)
        holder.kill()
    assert len(list_images(shards).files) == 300


def test_an_index_that_points_beyond_its_shard_is_not_believed(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = list_images(shards).places
    (index,) = indices_of(shards)
    with np.load(index) as arrays:
        columns = {name: arrays[name].copy() for name in arrays.files}
    columns["offsets"][5] = 1 << 40
    with index.open("wb") as file:
        np.savez(file, **columns)
    assert list_images(shards).places == wanted
    assert any("is damaged (a place beyond its tar)" in message for message in caplog.messages)


# ---- errors


def test_each_mistake_is_one_line_that_names_the_way_out(sources: dict[str, str], tmp_path: Path) -> None:
    root = Path(sources["flat"]).parent
    (tmp_path / "gone.txt").write_text(f"{root}/flat/0000.jpg\nnone.jpg\nnone/2.jpg\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    write_files(tmp_path / "texts", {"a/1.txt": b"x", "b.docx": b"x"})
    write_files(tmp_path / "labelled", {"a/1.jpg": picture(0), "b/1.jpg": picture(0)})
    (tmp_path / "splits").mkdir()
    for split in ("train", "val"):
        shutil.copy(root / "one.tar", tmp_path / "splits" / f"{split}-00000.tar")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "texts.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1" + bytes(100))
    expected = {
        f"{tmp_path}/texts": "no image found; instead: 2 not an image by its extension (the first: 'a/1.txt')",
        f"{tmp_path}/empty": "no image found; it is empty",
        f"{tmp_path}/empty.txt": "names no image",
        f"{tmp_path}/gone.txt": "2 of its 3 files are missing, the first 'none.jpg'",
        f"{tmp_path}/nothing": "no such file or folder",
        f"{root}/wds/part-{{00000..00004}}.tar": "2 of its 5 files are missing, the first",
        f"{root}/wds/none-*.tar": "no file or folder has such a name",
        f"{root}/wds/part-{{0..99999999}}.tar": "stands for more than 1,000,000 files",
        f"{tmp_path}/labelled::{root}/flat": "has labels and",
        f"{root}/flat::": "names nothing on one side of '::'",
        f"{tmp_path}/splits": "holds the files of several splits (train, val); give one of them",
        f"{tmp_path}/texts.parquet": "no column holds images as bytes (its columns: text)",
        f"{tmp_path}/damaged.parquet": "is not a readable Parquet file",
    }
    for data, message in expected.items():
        with pytest.raises(UserError, match=re.escape(message)):
            list_images(data)
    for options, message in (
        ({"label_column": "colour"}, "has no column of this name; its columns are 'number', 'path', 'kind'"),
        ({"path_column": "file"}, "--path-column file"),
        ({"labels": f"{root}/list.csv"}, "has no effect on"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            list_images(sources["list.csv"], **options)
    with pytest.raises(UserError, match="--label-column: has no effect without a table"):
        list_images(sources["flat"], label_column="kind")


def test_a_compressed_copy_of_parquet_files_is_not_unpacked_but_made_anew(sources: dict[str, str], tmp_path: Path) -> None:
    shutil.copy(sources["parquet_file"], tmp_path / "x.parquet")
    list_images(tmp_path / "x.parquet")
    (copy,) = tmp_path.glob(".fastbyol-images-*")
    content = copy.read_bytes()
    copy.write_bytes(gzip.compress(content))
    assert len(list_images(tmp_path / "x.parquet").files) == NUM
    assert copy.read_bytes() == content


def test_a_full_disk_ends_the_copy_of_parquet_files_in_one_line(sources: dict[str, str], tmp_path: Path) -> None:
    shutil.copy(sources["parquet_file"], tmp_path / "x.parquet")
    with files_no_larger_than(4096), pytest.raises(UserError, match="cannot be copied there .*free some space"):
        list_images(tmp_path / "x.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]
    assert len(list_images(tmp_path / "x.parquet").files) == NUM


def test_parquet_files_that_change_are_copied_again(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [picture(0), picture(1)]}), file)
    assert len(list_images(file).files) == 2
    pq.write_table(pa.table({"image": [picture(2)]}), file)
    (only,) = [list_images(file).location(0).read()]
    assert only == picture(2)


def test_patterns_stand_for_the_files_that_shells_and_webdataset_mean(tmp_path: Path) -> None:
    for name in ("a-8.tar", "a-9.tar", "a-10.tar", "b-08.tar", "b-09.tar"):
        (tmp_path / name).write_bytes(bytes(1024))
    names = {
        "a-{8..10}.tar": ["a-8.tar", "a-9.tar", "a-10.tar"],
        "b-{08..09}.tar": ["b-08.tar", "b-09.tar"],
        "{a-8,b-0*}.tar": ["a-8.tar", "b-08.tar", "b-09.tar"],
        "a-?.tar": ["a-8.tar", "a-9.tar"],
    }
    for pattern, wanted in names.items():
        (source,) = given_sources(f"{tmp_path}/{pattern}")
        assert (source.kind, [path.name for path in source.paths]) == ("tar", wanted)
        assert is_original(f"{tmp_path}/{pattern}")
    write_files(tmp_path / "odd{1..2}", {"1.jpg": picture(0)})
    (source,) = given_sources(f"{tmp_path}/odd{{1..2}}")
    assert source.kind == "folder"


def test_formats_without_an_extension_of_torchvision_are_read(tmp_path: Path) -> None:
    image = smooth_image(3, 20, 20)
    files = {
        f"a.{kind}": encoded(image, {"jp2": "JPEG2000", "jfif": "JPEG"}.get(kind, kind.upper())) for kind in ("gif", "avif", "jfif", "jp2")
    }
    write_files(tmp_path / "x", {**files, "b.heic": b"x"})
    listing = list_images(tmp_path / "x")
    assert len(listing.files) == 4
    assert dict(listing.skipped) == {"b.heic": "HEIC, which Pillow does not read"}
    with build_image_loader(tmp_path / "x", views=VIEWS, batch=4, workers=1) as loader:
        (batch,) = loader
    assert torch.isfinite(batch.image).all()
