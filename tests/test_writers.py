"""Tests of conversion: every image is checked, JPEGs keep their bytes, stock readers accept the output, and no partial output appears."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader
from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.data.backends.ffcv_source import FfcvSource
from fastbyol.data.conversion import beton_writer
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.conversion.image_pass import BadImage
from fastbyol.data.conversion.tar_writer import member_header, write_tar_shards
from fastbyol.data.conversion.task import ConversionOptions
from fastbyol.data.formats.beton import read_beton
from fastbyol.data.formats.manifest import Manifest, read_manifest
from fastbyol.data.inputs.folder import list_image_folder
from tests.commands import run_here
from tests.images import encoded


def originals(folder: Path) -> list[bytes]:
    listing = list_image_folder(folder)
    return [listing.path(i).read_bytes() for i in range(len(listing.files))]


def colour_wheel(size: int = 32) -> Image.Image:
    y, x = np.mgrid[0:size, 0:size] * 255 // (size - 1)
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


# ---- .beton


def test_a_beton_holds_the_bytes_of_every_jpeg_and_its_manifest_describes_it(image_folder: Path, beton: Path) -> None:
    content, table = beton.read_bytes(), read_beton(beton)
    stored = [content[offset : offset + size] for offset, size in zip(table.offset, table.size, strict=True)]
    assert stored == originals(image_folder)
    manifest = read_manifest(Path(f"{beton}.json"))
    assert (manifest.num_samples, manifest.class_names, manifest.class_counts) == (25, ("ant", "bee", "cat"), (8, 9, 8))
    assert manifest.shards[0].sha256 == sha256(sha256(content).digest()).hexdigest()  # one chunk
    assert manifest.images["bytes"] == sum(map(len, stored))
    assert (manifest.images["height_min"], manifest.images["height_max"], manifest.images["transcoded"]) == (
        table.height.min(),
        table.height.max(),
        0,
    )


def test_stock_ffcv_reads_our_beton_through_both_of_its_page_managers(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (9, 24, 24, 3), dtype=np.uint8)
    images: dict[str, Image.Image] = {f"{i}_png": Image.fromarray(pixels) for i, pixels in enumerate(noise)}
    folder = make_folder(**images, gray_png=colour_wheel(24).convert("L"))
    monkeypatch.setattr(beton_writer, "MIN_PAGE_BYTES", 4096)  # a few images to a page
    out = tmp_path / "pages.beton"
    write_beton(folder, out=out, workers=1)
    pages = {(int(first), int(last)) for first, last in _pages(out)}
    assert len(pages) > 2
    assert all(first == last for first, last in pages)
    assert Reader(str(out)).field_names == ["image", "label"]
    expected = [np.array(image) for image in FfcvSource(out).decode(np.arange(10))]
    for os_cache in (True, False):
        loader = Loader(str(out), batch_size=10, num_workers=1, order=OrderOption.SEQUENTIAL, os_cache=os_cache)
        ((image, label),) = list(loader)
        # Stock FFCV decodes with the fast DCT: up to a few levels from the accurate one.
        assert np.abs(image.numpy().astype(int) - np.stack(expected)).max() <= 12
        assert label.flatten().tolist() == [-1] * 10  # one folder: no labels


def _pages(path: Path) -> list[tuple[int, int]]:
    page, table = int(Reader(str(path)).page_size), read_beton(path)
    return list(zip(table.offset // page, (table.offset + table.size - 1) // page, strict=True))


def test_uncommon_formats_are_transcoded_and_everything_else_is_kept(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    wheel = colour_wheel()
    kept = {"a_jpg": wheel, "b_jpeg": wheel.convert("L")}
    changed = {"c_jpg": wheel.convert("CMYK"), "d_png": wheel.convert("RGBA"), "e_png": wheel.quantize(128), "f_bmp": wheel}
    folder = make_folder(**kept, **changed)
    (folder / "class" / "g.jpg").write_bytes(encoded(wheel, "PNG"))  # ImageNet has one
    out = tmp_path / "odd.beton"
    manifest = write_beton(folder, out=out, workers=1)
    assert manifest.images["transcoded"] == 5
    content, table = out.read_bytes(), read_beton(out)
    stored = [content[offset : offset + size] for offset, size in zip(table.offset, table.size, strict=True)]
    assert stored[:2] == originals(folder)[:2]
    for i, image in enumerate(FfcvSource(out).decode(np.arange(7))):
        wanted = np.asarray((wheel.convert("L") if i == 1 else changed["e_png"] if i == 4 else wheel).convert("RGB"))
        assert np.abs(image.astype(int) - wanted).mean() <= (8.0 if i == 4 else 4.0)  # JPEG is bad at the hard edges of a palette


def test_a_rerun_writes_the_same_bytes_with_any_number_of_workers(
    image_folder: Path, beton: Path, tar_folder: Path, tmp_path: Path
) -> None:
    write_beton(image_folder, out=tmp_path / "again.beton", workers=2)
    assert (tmp_path / "again.beton").read_bytes() == beton.read_bytes()
    write_tar_shards(image_folder, out=tmp_path / "again", workers=2, seed=3)
    files = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert files == {path.name: path.read_bytes() for path in tar_folder.iterdir()}


# ---- tar shards


def test_stock_dali_reads_our_shards_and_finds_bytes_label_and_sample_id(image_folder: Path, tmp_path: Path) -> None:
    from nvidia.dali import fn, pipeline_def, types

    out = tmp_path / "shards"
    wanted, labels = originals(image_folder), list_image_folder(image_folder).labels
    manifest = write_tar_shards(image_folder, out=out, workers=1, shard_mib=1)
    tars = sorted(str(path) for path in out.glob("*.tar"))

    @pipeline_def(batch_size=25, num_threads=1, device_id=None)
    def read() -> object:
        components = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.replace(".tar", ".idx") for tar in tars],
            ext=["jpg", "cls", "idx"],
            dtypes=[types.UINT8, types.INT64, types.INT64],
            missing_component_behavior="error",
        )
        return tuple(components)

    pipeline = read()
    pipeline.build()
    images, classes, indices = pipeline.run()
    order = [int(np.asarray(indices[i])[0]) for i in range(25)]
    assert sorted(order) == list(range(25))
    assert order != sorted(order)
    for place, index in enumerate(order):
        assert np.asarray(images[place]).tobytes() == wanted[index]
        assert int(np.asarray(classes[place])[0]) == labels[index]
    assert manifest.shards[0].sha256 == sha256(Path(tars[0]).read_bytes()).hexdigest()


def test_shards_end_at_their_size_and_together_hold_every_sample_once(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (6, 600, 600, 3), dtype=np.uint8)
    folder = make_folder(**{f"{i}_bmp": Image.fromarray(pixels) for i, pixels in enumerate(noise)})
    manifest = write_tar_shards(folder, out=tmp_path / "shards", workers=1, shard_mib=1)
    assert len(manifest.shards) == 2
    members = []
    for shard in manifest.shards:
        with tarfile.open(tmp_path / "shards" / shard.name) as tar:
            members += tar.getnames()
        assert shard.samples == 3
        assert shard.bytes > 1 << 20
    assert sorted(members) == sorted(f"{i:08d}.{extension}" for i in range(6) for extension in ("jpg", "cls", "idx"))


@pytest.mark.parametrize(("name", "size"), [("00000000.jpg", 0), ("00000007.cls", 8), ("01281166.jpg", 123_456_789), ("123456789.idx", 8)])
def test_a_member_header_equals_tarfiles(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    assert member_header(name, size) == member.tobuf(tarfile.USTAR_FORMAT)


def test_the_seed_orders_the_shards(image_folder: Path, tar_folder: Path, tmp_path: Path) -> None:
    write_tar_shards(image_folder, out=tmp_path / "other", workers=1, seed=4)
    offsets = [np.load(folder / "samples.npy")["offset"] for folder in (tar_folder, tmp_path / "other")]
    assert np.argsort(offsets[0]).tolist() != np.argsort(offsets[1]).tolist()


# ---- failures


@pytest.mark.parametrize("write", [write_beton, write_tar_shards])
def test_an_image_that_does_not_decode_is_dropped_by_name_or_ends_a_strict_conversion(
    write: Callable[..., Manifest], make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder(a_jpg=colour_wheel(), cut_jpg=encoded(colour_wheel())[:-300])
    out = tmp_path / "out.beton"
    with pytest.raises(BadImage, match="class/cut.jpg: truncated"):
        write(folder, out=out, workers=1, options=ConversionOptions(strict=True))
    assert not out.exists()
    manifest = write(folder, out=out, workers=1)
    assert (manifest.num_samples, manifest.class_counts, manifest.dropped) == (1, (), (1,))
    assert manifest.names_sha256 == sha256(b"class/a.jpg\0").hexdigest()
    report = json.loads((out / "report.json" if out.is_dir() else tmp_path / "out.beton.report.json").read_text())
    assert [(entry["name"], entry["outcome"], entry["reason"]) for entry in report["touched"]] == [
        ("class/cut.jpg", "dropped", "truncated")
    ]


def test_a_folder_of_which_no_image_can_be_kept_is_refused(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the 2 images can be kept; .*report.json says why"):
        write_beton(make_folder(a_jpg=b"", b_png=b"hello"), out=tmp_path / "x.beton", workers=1, options=ConversionOptions(max_dropped=1.0))


@pytest.mark.parametrize("write", [write_beton, write_tar_shards])
def test_an_existing_output_is_refused_and_replaced_only_on_request(
    write: Callable[..., object], image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.beton"
    write(image_folder, out=out, workers=1)
    with pytest.raises(UserError, match=r"exists already; .*--overwrite"):
        write(image_folder, out=out, workers=1)
    write(image_folder, out=out, workers=1, overwrite="replace")


def test_overwrite_never_removes_a_folder_that_we_did_not_make(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="will not be replaced"):
        write_tar_shards(image_folder, out=tmp_path, workers=1, overwrite="replace")
    assert (tmp_path / "thesis.txt").exists()


# ---- the commands


def test_the_commands_convert_as_written(image_folder: Path, beton: Path, tmp_path: Path) -> None:
    done = run_here("to_ffcv.py", "--data", image_folder, "--out", tmp_path / "a.beton", "--workers", "1")
    assert (done.returncode, (tmp_path / "a.beton").read_bytes()) == (0, beton.read_bytes()), done.stderr
    assert "25 images of 3 classes" in done.stdout
    done = run_here("to_dali.py", "--data", image_folder, "--out", tmp_path / "tar", "--shard-mb", "1", "--workers", "1")
    assert (done.returncode, json.loads((tmp_path / "tar" / "manifest.json").read_text())["num_samples"]) == (0, 25), done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("to_ffcv.py", ["--data", "missing", "--out", "x.beton"], "missing: no such file or folder"),
        ("to_ffcv.py", ["--data", ".", "--out", "x.txt"], "must end in .beton"),
        ("to_ffcv.py", ["--data", ".", "--out", "x.beton", "--workers", "many"], "invalid int value: 'many'"),
        ("to_ffcv.py", ["--data", "."], "required: --out"),
        ("to_dali.py", ["--data", ".", "--out", "x", "--shard-mb", "0"], "shard-mb = 0"),
        ("to_ffcv.py", ["--data", ".", "--out", "x.beton", "--quality", "0"], "quality = 0: must be in [1, 100]"),
        ("to_ffcv.py", ["--data", ".", "--out", "x.beton", "--raw", "--raw-fraction", "0.5"], "raw-fraction = 0.5: must be left out"),
        ("to_ffcv.py", ["--data", ".", "--out", "x.beton", "--max-dropped", "2"], "max-dropped = 2.0: must be a share"),
        ("to_dali.py", ["--data", ".", "--out", "x", "--shard", "4/4"], "--shard 4/4: must be i/n with i from 0 to n - 1"),
        ("to_dali.py", ["--data", ".", "--out", "x", "--shard", "two"], "--shard two: must be i/n"),
        ("to_dali.py", ["--data", ".", "--out", "x", "--shard", "0/2", "--merge"], "--merge does not go with --shard"),
        ("to_dali.py", ["--data", ".", "--out", "x", "--shuffle"], "unrecognized arguments: --shuffle"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(script: str, arguments: list[str], message: str) -> None:
    done = run_here(script, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fastbyol: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
