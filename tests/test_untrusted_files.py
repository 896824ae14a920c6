"""Tests of malicious files: every value of a table, index, manifest or header is checked before native code uses it."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.data.backends.dali_source import DaliSource
from fastbyol.data.backends.ffcv_source import FfcvSource
from fastbyol.data.backends.folder_source import FolderSource
from fastbyol.data.conversion.tar_parts import merge_tar_parts
from fastbyol.data.formats import beton as beton_format
from fastbyol.data.formats.beton import read_beton
from fastbyol.data.formats.manifest import MAX_CLASSES, read_manifest
from fastbyol.data.formats.tar_shards import SAMPLE_TABLE, read_tar_shards
from fastbyol.data.inputs.images import list_images
from fastbyol.data.inspection.inventory import take_inventory
from fastbyol.data.inspection.verification import verify
from tests.images import smooth_image

Rows = NDArray[Any]


@pytest.fixture
def beton_copy(beton: Path, tmp_path: Path) -> Path:
    """Returns a copy of a .beton without its manifest, like a file from another source."""
    return Path(shutil.copy(beton, tmp_path / "x.beton"))


@pytest.fixture
def shards(tar_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tar_folder, tmp_path / "shards"))


def edit_rows(path: Path, change: Callable[[Rows], object]) -> None:
    """Changes the table of samples of a .beton in place: f0 image, f1 label."""
    content = bytearray(path.read_bytes())
    count = int(np.frombuffer(content, beton_format.HEADER, 1)[0]["num_samples"])
    at = beton_format.HEADER.itemsize + 2 * beton_format.FIELD.itemsize
    change(np.frombuffer(content, beton_format.SAMPLE, count, at))
    path.write_bytes(content)


def edit_manifest(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put_jpeg(path: Path, index: int, jpeg: bytes) -> None:
    """Overwrites an image of a .beton with another JPEG and updates its checksum, as an attacker would."""
    table = beton_format.read_beton(path)
    assert len(jpeg) <= table.size[index]
    jpeg += bytes(int(table.size[index]) - len(jpeg))
    content = bytearray(path.read_bytes())
    content[int(table.offset[index]) : int(table.offset[index]) + len(jpeg)] = jpeg
    field = np.frombuffer(content, beton_format.FIELD, 1, beton_format.HEADER.itemsize)[0]
    checksums_at = int.from_bytes(field["arguments"][8:16].tobytes(), "little")
    content[checksums_at + 4 * index : checksums_at + 4 * index + 4] = zlib.crc32(jpeg).to_bytes(4, "little")
    path.write_bytes(content)


def decode_all(source: FfcvSource | DaliSource | FolderSource) -> None:
    try:
        for _ in source.decode(np.arange(source.num_samples)):
            pass
    finally:
        source.close()


def with_frame(jpeg: bytes, *, height: int, width: int) -> bytes:
    """Returns the JPEG with another size in its frame header."""
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 5] + height.to_bytes(2) + width.to_bytes(2) + jpeg[at + 9 :]


# ---- tables


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (("width",), 0, "image 4 has 0x"),
        (("height",), 0, "x0 pixels by its table"),
        (("width", "height"), 65_535, "image 4 has 65535x65535 pixels by its table, must have 1 to 178,956,970"),
        (("mode",), 7, "image 4 is neither a JPEG nor raw pixels"),
        (("mode",), beton_format.RAW_MODE, "image 4 has more or fewer bytes than its raw pixels need"),
    ],
)
def test_an_impossible_row_of_a_beton_is_refused_and_named(field: tuple[str, ...], value: int, message: str, beton_copy: Path) -> None:
    def change(rows: Rows) -> None:
        for name in field:
            rows["f0"][name][4] = value

    edit_rows(beton_copy, change)
    with pytest.raises(UserError, match=re.escape(message)):
        FfcvSource(beton_copy)
    assert message in "\n".join(map(str, verify(beton_copy, workers=1).faults))


@pytest.mark.parametrize("factor", [0.5, 5])
def test_a_size_that_is_not_the_jpegs_own_is_named_at_decode_instead_of_leaving_old_memory_in_the_image(
    factor: float, beton_copy: Path
) -> None:
    def change(rows: Rows) -> None:
        rows["f0"]["width"][2] *= factor
        rows["f0"]["height"][2] *= factor

    edit_rows(beton_copy, change)
    with pytest.raises(UserError, match=r"image 2 of .*its table says"):
        decode_all(FfcvSource(beton_copy))
    assert any(fault.image == 2 and "its table says" in fault.what for fault in verify(beton_copy, workers=1).faults)


def test_a_jpeg_that_claims_gigabytes_or_another_size_than_its_table_is_never_decoded(beton_copy: Path) -> None:
    small = smooth_image(1, 16, 16)
    path = beton_copy.with_name("small.jpg")
    small.save(path, quality=40)
    put_jpeg(beton_copy, 6, with_frame(path.read_bytes(), height=65_500, width=65_500))
    with pytest.raises(UserError, match=r"image 6 of .*it is 65500x65500 pixels, its table says"):
        decode_all(FfcvSource(beton_copy))


def test_images_that_overlap_to_more_than_the_file_are_refused(beton_copy: Path) -> None:
    """Decoding a table of a million rows that all point to one image of a gigabyte would take forever."""
    content = bytearray(beton_copy.read_bytes())
    header = np.frombuffer(content, beton_format.HEADER, 1)[0]
    allocations = np.frombuffer(content, beton_format.ALLOCATION, -1, int(header["alloc_table_ptr"]))
    allocations["size"] = int(header["alloc_table_ptr"]) - allocations["ptr"]
    beton_copy.write_bytes(content)
    with pytest.raises(UserError, match="its tail is missing or damaged"):
        FfcvSource(beton_copy)


@pytest.mark.parametrize("label", [2**40, MAX_CLASSES])
def test_a_label_that_is_no_class_number_is_refused_before_a_name_is_made_for_each_class(label: int, beton_copy: Path) -> None:
    edit_rows(beton_copy, lambda rows: rows["f1"].__setitem__(3, label))
    for use in (FfcvSource, lambda path: take_inventory(path, shown=str(path))):
        with pytest.raises(UserError, match=rf"image 3 has the label {label}; .*up to 1,048,575, or -1 for none"):
            use(beton_copy)


@pytest.mark.parametrize("label", [2**40, 3, -2])
def test_info_refuses_a_label_that_the_manifest_does_not_name(label: int, beton: Path, beton_copy: Path) -> None:
    """2^40 would take a count for each class below it, of 8 TiB."""
    shutil.copy(f"{beton}.json", f"{beton_copy}.json")
    edit_rows(beton_copy, lambda rows: rows["f1"].__setitem__(3, label))
    with pytest.raises(UserError, match=rf"holds the label {label}, its manifest names 3 classes|has a label below -1"):
        take_inventory(beton_copy, shown=str(beton_copy))


def test_a_label_of_minus_one_means_unlabelled_and_a_lower_one_is_refused(beton_copy: Path) -> None:
    edit_rows(beton_copy, lambda rows: rows["f1"].__setitem__(slice(0, 20), -1))
    source = FfcvSource(beton_copy)
    assert source.labels[:20].tolist() == [-1] * 20
    assert source.class_names == ("0", "1", "2")
    inventory = take_inventory(beton_copy, shown=str(beton_copy))
    assert (inventory.unlabelled, sum(inventory.class_counts)) == (20, 5)
    edit_rows(beton_copy, lambda rows: rows["f1"].__setitem__(slice(None), -1))
    assert FfcvSource(beton_copy).class_names == ()
    assert take_inventory(beton_copy, shown=str(beton_copy)).unlabelled == 25
    edit_rows(beton_copy, lambda rows: rows["f1"].__setitem__(7, -2))
    with pytest.raises(UserError, match="image 7 has a label below -1"):
        FfcvSource(beton_copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 0}, "image 5 has"),
        ({"height": 60_000, "width": 60_000}, "image 5 has 60000x60000 pixels by its table"),
        ({"size": 2**31}, "points outside its shards"),
        ({"label": -2}, "holds the label -2"),
    ],
)
def test_an_impossible_row_of_a_sample_table_is_refused_and_named(change: dict[str, int], message: str, shards: Path) -> None:
    table = np.load(shards / SAMPLE_TABLE)
    for name, value in change.items():
        table[name][5] = value
    np.save(shards / SAMPLE_TABLE, table)
    with pytest.raises(UserError, match=re.escape(message)):
        DaliSource(shards)
    assert message in "\n".join(map(str, verify(shards, workers=1).faults))


def test_a_jpeg_whose_size_differs_from_its_table_never_reaches_dali(shards: Path) -> None:
    table = np.load(shards / SAMPLE_TABLE)
    table["width"][5] += 1
    np.save(shards / SAMPLE_TABLE, table)
    with pytest.raises(UserError, match=r"image 5 .*its table says"):
        decode_all(DaliSource(shards))


def test_a_sample_table_that_is_a_zip_file_or_too_large_is_a_one_line_error(shards: Path) -> None:
    table = np.load(shards / SAMPLE_TABLE)
    for write in (lambda path: np.savez(path, table), lambda path: np.save(path, np.resize(table, 10_000))):
        with open(shards / SAMPLE_TABLE, "wb") as file:
            write(file)
        with pytest.raises(UserError, match="sample table"):
            read_tar_shards(shards)


# ---- manifests


def nested(manifest: dict[str, Any]) -> str:
    return "[" * 100_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (nested, "recursion"),
        ({"shards": []}, "no data files"),
        ({"num_samples": 0}, "no images"),
        ({"num_samples": True}, "True should be a int"),
        ({"num_samples": -3}, "-3 should be a number"),
        ({"num_samples": 10**30}, "should be a number"),
        ({"dropped": [10**12]}, "ascending positions below 26"),
        ({"dropped": [4, 4]}, "ascending positions"),
        ({"class_names": ["a"]}, "3 class_counts for 1 class_names"),
        ({"class_names": [["x" * 10_000]]}, "should be a str"),
        ({"settings": []}, "should be a dict"),
        ({"format_version": [1] * 100_000}, "manifest version"),
    ],
)
@pytest.mark.parametrize("kind", ["beton", "shards"])
def test_a_manifest_that_lies_is_refused_in_one_short_line(
    kind: str, changes: Any, message: str, beton: Path, tar_folder: Path, tmp_path: Path
) -> None:
    original = Path(f"{beton}.json") if kind == "beton" else tar_folder / "manifest.json"
    fields = json.loads(original.read_text())
    path = tmp_path / "manifest.json"
    path.write_text(changes(fields) if callable(changes) else json.dumps(fields | changes))
    with pytest.raises(UserError, match=message) as refused:
        read_manifest(path)
    assert len(str(refused.value)) < 600 + len(str(path))


def test_a_manifest_may_only_name_files_beside_it_of_sizes_that_files_have(tar_folder: Path, tmp_path: Path) -> None:
    fields = json.loads((tar_folder / "manifest.json").read_text())
    for changes, message in (
        ({"name": "../secret.tar"}, "should be the name of a file beside it"),
        ({"name": "/etc/passwd"}, "should be the name of a file beside it"),
        ({"bytes": 10**30}, "should be a number"),
        ({"chunk_bytes": 1}, "chunk_bytes is 1; should be 0 or at least 1,048,576"),
        ({"chunk_bytes": 2**20 - 1}, "chunk_bytes is 1048575; should be 0 or"),
    ):
        shards = [{**fields["shards"][0], **changes}, *fields["shards"][1:]]
        (tmp_path / "manifest.json").write_text(json.dumps(fields | {"shards": shards}))
        with pytest.raises(UserError, match=message):
            read_manifest(tmp_path / "manifest.json")


@pytest.fixture
def alarm() -> Iterator[None]:
    """Ends a test that waits, for a pipe that nobody writes to."""

    def strike(*_: object) -> None:
        raise TimeoutError("waits for ever")

    before = signal.signal(signal.SIGALRM, strike)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("alarm")
def test_a_named_pipe_in_place_of_a_file_is_refused_instead_of_read(beton_copy: Path, shards: Path, tmp_path: Path) -> None:
    def piped(path: Path) -> Path:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        return path

    piped(tmp_path / "x.tar")
    piped(tmp_path / "x.parquet")
    readers: dict[Path, Callable[[], object]] = {
        Path(f"{beton_copy}.json"): lambda: read_manifest(Path(f"{beton_copy}.json")),
        shards / SAMPLE_TABLE: lambda: read_tar_shards(shards),
        shards / "manifest.json": lambda: read_tar_shards(shards),
        tmp_path / "x.tar": lambda: list_images(tmp_path / "x.tar"),
        tmp_path / "x.parquet": lambda: list_images(tmp_path / "x.parquet"),
        tmp_path / "part-00000-of-00001.json": lambda: merge_tar_parts(tmp_path),
    }
    for path, read in readers.items():
        piped(path)
        shown = re.escape(str(path))
        with pytest.raises(UserError, match=f"{shown}.*it is not a regular file|it is not a regular file at {shown}"):
            read()


def test_a_manifest_may_name_chunks_of_a_mebibyte(tar_folder: Path, tmp_path: Path) -> None:
    fields = json.loads((tar_folder / "manifest.json").read_text())
    shards = [{**shard, "chunk_bytes": 2**20} for shard in fields["shards"]]
    (tmp_path / "manifest.json").write_text(json.dumps(fields | {"shards": shards}))
    assert {shard.chunk_bytes for shard in read_manifest(tmp_path / "manifest.json").shards} == {2**20}


def test_a_manifest_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.touch()
    os.truncate(path, 1 << 34)
    with pytest.raises(UserError, match="17,179,869,184 bytes, a manifest has at most 67,108,864"):
        read_manifest(path)


def test_info_and_verify_need_little_memory_for_a_manifest_that_claims_two_billion_images(beton: Path, beton_copy: Path) -> None:
    manifest = Path(f"{beton_copy}.json")
    shutil.copy(f"{beton}.json", manifest)
    edit_manifest(manifest, num_samples=2**31)
    assert take_inventory(beton_copy, shown=str(beton_copy)).images == 25
    assert "says 2147483648 images, there are 25" in "\n".join(map(str, verify(beton_copy, workers=1).faults))
    with pytest.raises(UserError, match="not the file that"):
        FfcvSource(beton_copy)


def test_a_link_to_a_beton_finds_the_targets_manifest_and_a_copy_without_one_is_warned_about(
    beton: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link, copy = tmp_path / "other.beton", tmp_path / "copy.beton"
    link.symlink_to(beton)
    assert FfcvSource(link).class_names == ("ant", "bee", "cat")
    shutil.copy(beton, copy)
    with caplog.at_level(logging.WARNING, logger="fastbyol"):
        assert FfcvSource(copy).class_names == ("0", "1", "2")
    assert "copy.beton.json: is missing, so classes have numbers for names" in caplog.text


# ---- pictures


def many_scans(scans: int, *, side: int = 64) -> bytes:
    """Returns a progressive gray JPEG with many scans of a few bytes, each of which makes a decoder process all blocks again."""

    def segment(marker: int, content: bytes) -> bytes:
        return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2) + content

    frame = bytes([8]) + side.to_bytes(2) + side.to_bytes(2) + bytes([1, 1, 0x11, 0])
    tables = segment(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0") + segment(0xC4, b"\x10" + bytes([1, 1] + [0] * 14) + b"\xe0\0")
    blocks = (side // 8) ** 2
    bits = "0" * blocks
    first = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + int(bits, 2).to_bytes(-(-blocks // 8))
    run = "10" * blocks  # each block ends at once
    refining = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + int(run, 2).to_bytes(-(-2 * blocks // 8))
    return b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, frame) + tables + first + refining * scans + b"\xff\xd9"


def test_a_jpeg_of_thousands_of_scans_is_refused_by_every_reader(tmp_path: Path, beton_copy: Path) -> None:
    from fastbyol.data.conversion.encode import DroppedImage, EncodedImage, Encoder, EncodeSettings
    from fastbyol.data.formats.jpeg_header import jpeg_complaint
    from fastbyol.data.formats.pillow_decoding import UndecodableImage, decode_with_pillow
    from fastbyol.data.formats.turbojpeg import TurboJpeg

    encoder = Encoder(EncodeSettings())
    assert isinstance(encoder.encode(many_scans(20)), EncodedImage)
    bomb = many_scans(1500)
    result = encoder.encode(bomb)
    assert isinstance(result, DroppedImage)
    assert (result.reason, result.detail) == ("too many scans", "it has 1,501 scans, more than the 100 that are decoded")
    with pytest.raises(UndecodableImage, match="it has 1,501 scans"):
        decode_with_pillow(bomb)
    assert jpeg_complaint(bomb, height=64, width=64) == result.detail
    complaint, fatal = TurboJpeg().decode(bomb, np.zeros((64, 64, 3), dtype=np.uint8))
    assert fatal
    assert "500 scans" in complaint


def colour_after_colour(scans: int, *, side: int = 64) -> bytes:
    """A baseline JPEG whose colours come in scans of their own, and the first of them again and again without a single coded bit."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG", subsampling=0)
    jpeg = buffer.getvalue()
    header = jpeg[: jpeg.index(b"\xff\xda")]
    colours = [b"\xff\xda\0\x08\1" + bytes([colour, tables]) + b"\0\x3f\0" for colour, tables in ((1, 0), (2, 0x11), (3, 0x11))]
    return header + b"".join(colours) + colours[0] * scans + b"\xff\xd9"


def test_a_baseline_jpeg_of_thousands_of_scans_is_refused_and_scans_in_metadata_do_not_count() -> None:
    from fastbyol.data.conversion.encode import DroppedImage, EncodedImage, Encoder, EncodeSettings
    from fastbyol.data.formats.jpeg_header import jpeg_complaint
    from fastbyol.data.formats.pillow_decoding import UndecodableImage, decode_with_pillow
    from fastbyol.data.formats.turbojpeg import TurboJpeg

    bomb = colour_after_colour(1500)
    refusal = "it has 1,503 scans, more than the 100 that are decoded"
    result = Encoder(EncodeSettings()).encode(bomb)
    assert isinstance(result, DroppedImage)
    assert (result.reason, result.detail) == ("too many scans", refusal)
    with pytest.raises(UndecodableImage, match="it has 1,503 scans"):
        decode_with_pillow(bomb)
    assert jpeg_complaint(bomb, height=64, width=64) == refusal
    large = colour_after_colour(300, side=3000)  # fewer than TurboJPEG's own limit
    complaint, fatal = TurboJpeg().decode(large, np.zeros((3000, 3000, 3), dtype=np.uint8))
    assert (complaint, fatal) == ("it has 303 scans, more than the 100 that are decoded", True)

    for progressive in (False, True):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64)).save(buffer, "JPEG", progressive=progressive, icc_profile=b"\xff\xda" * 100_000)
        assert isinstance(Encoder(EncodeSettings()).encode(buffer.getvalue()), EncodedImage)
        assert jpeg_complaint(buffer.getvalue(), height=64, width=64) == ""


def test_verify_finds_a_label_that_is_no_class_number_and_an_image_that_no_loader_decodes(beton_copy: Path) -> None:
    table = read_beton(beton_copy)
    content = bytearray(beton_copy.read_bytes())
    png = io.BytesIO()
    Image.new("RGB", (int(table.width[1]), int(table.height[1]))).save(png, "PNG")
    assert len(png.getvalue()) <= table.size[1]
    at = int(table.offset[1])
    content[at : at + len(png.getvalue())] = png.getvalue()
    header = np.frombuffer(content, beton_format.HEADER, 1)
    fields = np.frombuffer(content, beton_format.FIELD, 2, beton_format.HEADER.itemsize)
    samples = np.frombuffer(content, beton_format.SAMPLE, int(header[0]["num_samples"]), beton_format.HEADER.itemsize + fields.nbytes)
    samples["f1"][2] = 2**40
    fields[0]["arguments"][:16] = 0  # without checksums, as stock FFCV writes it
    beton_copy.write_bytes(content)
    told = {(fault.image, fault.what) for fault in verify(beton_copy).faults}
    assert (1, "is not a JPEG, and training decodes nothing else") in told
    assert any(what.startswith("image 2 has the label 1099511627776") for _, what in told)
    with pytest.raises(UserError, match="has the label 1099511627776"):
        FfcvSource(beton_copy)


def test_a_tiff_that_is_turned_has_the_size_of_its_pixels(make_folder: Callable[..., Path]) -> None:
    """Pillow turns a TIFF when it decodes it, whereas its header may have the sides exchanged; the crops are drawn by the latter."""
    folder = make_folder()
    image = smooth_image(3, 30, 50)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "class" / "turned.tif", exif=exif)
    source = FolderSource(list_images(folder))
    height, width = source.sizes(np.array([0]))
    (pixels,) = source.decode(np.array([0]))
    assert pixels.shape == (int(height[0]), int(width[0]), 3)


def failing_images() -> Iterator[tuple[str, bytes]]:
    yield "jpg", b"\xff\xd8\xff\xe0 cut"
    yield "png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(13)
    yield "tif", b"II*\0\xff\xff\xff\xff"
    yield "webp", b"RIFF\x10\0\0\0WEBPVP8 \xff\xff\xff\xff"
    yield "bmp", b"BM" + bytes(60)
    yield "ppm", b"P6 -3 5 255 "


@pytest.mark.parametrize(("extension", "data"), list(failing_images()))
def test_an_image_on_which_pillow_fails_is_a_one_line_error_that_names_it(
    extension: str, data: bytes, make_folder: Callable[..., Path]
) -> None:
    folder = make_folder(**{f"bad_{extension}": data})
    with pytest.raises(UserError, match=rf"image 0 \(.*bad\.{extension}\) does not decode"):
        FolderSource(list_images(folder)).sizes(np.array([0]))
    with pytest.raises(UserError, match=rf"image 0 \(.*bad\.{extension}\) does not decode"):
        decode_all(FolderSource(list_images(folder)))
