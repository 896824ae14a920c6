"""Tests of what ten million images need: few bytes a row, no Python object per image, one table for all processes of a machine.

Each quick form is held against the slow, obvious one. `tests/long/ten_million.py` measures seconds and memory.
"""

from __future__ import annotations

import hashlib
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbyol.config.errors import UserError
from fastbyol.data.backends.ffcv_source import FfcvSource
from fastbyol.data.conversion.encode import Outcome
from fastbyol.data.conversion.image_pass import ROW
from fastbyol.data.conversion.report import report_summary, write_report
from fastbyol.data.conversion.task import ConversionOptions, Task
from fastbyol.data.conversion.touched_images import TouchedImages, touched_line
from fastbyol.data.formats.beton import read_beton
from fastbyol.data.formats.manifest import label_counts
from fastbyol.data.formats.tar_shards import listed_position, read_tar_shards
from fastbyol.data.inputs import listing as listing_module
from fastbyol.data.inputs import packed_names
from fastbyol.data.inputs.listing import ImageListing, in_sample_order
from fastbyol.data.inputs.packed_names import PackedNames, labels_as
from fastbyol.data.inputs.path_list import list_paths
from fastbyol.data.traversal import block_order, group_into_blocks, local_order, seeded_permutation, stable_argsort
from fastbyol.host import shared_columns
from tests.long.ten_million import make_beton, make_shards

ROWS = 100_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .beton of 100,000 images, of which only the tables take disk space."""
    return make_beton(tmp_path_factory.mktemp("large"), ROWS)


def held_and_peak(make: Callable[[], Any]) -> tuple[Any, float, float]:
    """Returns what `make` returns, and the bytes that are held afterwards and at most on the way, for each of the rows."""
    tracemalloc.start()
    try:
        made = make()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return made, held / ROWS, peak / ROWS


# ---- orders


@pytest.mark.parametrize("values", [2, 1000, 2**40, 2**64 - 1])
def test_the_quick_argsort_is_numpys_stable_one_also_where_words_are_equal(values: int) -> None:
    for num in (0, 1, 2, 3, 1000, 4097):
        words = np.random.default_rng(num).integers(0, values, num, dtype=np.uint64, endpoint=True)
        assert stable_argsort(words).tolist() == np.argsort(words, kind="stable").tolist()


def test_words_that_differ_in_their_low_bits_alone_are_sorted_by_them() -> None:
    words = np.array([7, 5, 6, 5, 4], dtype=np.uint64) + np.uint64(1 << 50)
    assert stable_argsort(words).tolist() == [4, 1, 3, 2, 0]


def test_a_local_order_is_that_of_one_sort_by_window_and_random_word() -> None:
    rng = np.random.default_rng(0)
    for file, offset in ((rng.integers(0, 3, 5000), rng.integers(0, 10**6, 5000)), (np.zeros(5000, dtype=np.int64), 70 * np.arange(5000))):
        blocks = group_into_blocks(file, offset, block_bytes=1000, window_bytes=7000)
        sample = np.lexsort((offset, file))
        place = np.stack([file[sample], offset[sample] // 1000])
        number = np.cumsum(np.append(True, (np.diff(place) != 0).any(0))) - 1
        assert (blocks.sample.tolist(), blocks.number.tolist()) == (sample.tolist(), number.tolist())
        window = np.argsort(block_order(blocks, seed=1, epoch=2)) // 7
        words = np.random.PCG64((0x6F726465, 1, 2)).random_raw(5000)
        assert local_order(blocks, seed=1, epoch=2).tolist() == sample[np.lexsort((words, window[number]))].tolist()


def test_an_order_takes_few_bytes_for_each_image(small_pieces: None) -> None:
    _, held, peak = held_and_peak(lambda: seeded_permutation(ROWS, 3))
    assert held < 9
    assert peak < 34  # the words, the keys, and what compares them
    offset = 93_000 * np.arange(ROWS)
    _, held, _ = held_and_peak(lambda: group_into_blocks(np.broadcast_to(np.int64(0), ROWS), offset, block_bytes=1 << 23, window_bytes=1))
    assert held < 9


# ---- tables of converted data


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the pieces in which columns are read, checked and digested small beside the tables of the tests."""
    monkeypatch.setattr(shared_columns, "ROWS_AT_ONCE", 1000)


def test_the_table_of_a_beton_takes_29_bytes_for_each_image(large: Path, small_pieces: None) -> None:
    FfcvSource(large).close()  # once before, for what is imported on first use
    source, held, peak = held_and_peak(lambda: FfcvSource(large))
    assert source.num_samples == ROWS
    assert held < 30
    assert peak < 29 + 8 + 8 + 9  # the sizes from the allocation table, their sum with the offsets, and their comparison
    _, _, peak = held_and_peak(source.fingerprint)
    assert peak < 3
    source.close()


def test_a_fingerprint_is_the_digest_of_whole_columns(large: Path) -> None:
    source = FfcvSource(large)
    table = read_beton(large)
    columns = (table.height.astype(np.int64), table.width.astype(np.int64), np.zeros(ROWS, dtype=np.int64), table.offset, table.crc32)
    told = source.fingerprint()
    assert told["images"] == hashlib.sha256(b"".join(column.tobytes() for column in columns if column is not None)).hexdigest()[:12]
    assert told["labels"] == hashlib.sha256(table.label.tobytes()).hexdigest()[:12]
    source.close()


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def kept_table(folder: Path) -> Path:
    (path,) = (file for file in folder.glob(".fastbyol-table-*") if file.suffix != ".lock")
    return path


def as_lists(table: Any) -> dict[str, list[int]]:
    columns = table if isinstance(table, dict) else vars(table)
    return {name: column.tolist() for name, column in columns.items()}


@pytest.mark.parametrize("kind", ["beton", "tar"])
def test_a_large_table_is_kept_in_a_file_that_every_process_maps(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_beton(tmp_path, 10_000) if kind == "beton" else make_shards(tmp_path, 10_000)
    folder = tmp_path if kind == "beton" else data

    def read() -> Any:
        return read_beton(data) if kind == "beton" else read_tar_shards(data)[1]

    alone = as_lists(read())
    assert not list(folder.glob(".fastbyol*"))
    monkeypatch.setattr(shared_columns, "SHARED_ROWS", 10_000)
    first = read()
    assert as_lists(first) == alone
    assert mapped(kept_table(folder))
    made = kept_table(folder).stat().st_ino
    second = read()
    assert (as_lists(second), kept_table(folder).stat().st_ino) == (alone, made)
    (second["label"] if isinstance(second, dict) else second.label)[:] = 5  # changes this process's copy alone
    assert as_lists(read()) == alone


def test_a_kept_table_that_is_cut_or_made_of_another_file_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_columns, "SHARED_ROWS", 10_000)
    path = make_beton(tmp_path, 10_000)
    right = as_lists(read_beton(path))
    table = kept_table(tmp_path)
    content = table.read_bytes()
    for damaged in (b"", content[:-1], b"{" + content[1:], content.replace(b'"stamp": [', b'"stamp": [1', 1), b"[" * 4096 + content[4096:]):
        table.write_bytes(damaged)
        assert as_lists(read_beton(path)) == right
        assert table.read_bytes() == content


def test_impossible_values_in_a_kept_table_are_refused_like_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_columns, "SHARED_ROWS", 10_000)
    path = make_beton(tmp_path, 10_000)
    read_beton(path)
    content = bytearray(kept_table(tmp_path).read_bytes())
    for column, at, value, message in (
        ("mode", 4096, 9, "image 0 is neither a JPEG nor raw pixels"),
        ("height", 4096 + 12288, 0, "image 0 has 176x0 pixels"),
        ("offset", 4096 + 12288 + 2 * 20480 + 7, 0x7F, "image 0 lies beyond the end of the images"),
    ):
        changed = content.copy()
        assert column in content[:4096].decode()
        changed[at : at + (2 if column == "height" else 1)] = value.to_bytes(2 if column == "height" else 1, "little")
        kept_table(tmp_path).write_bytes(changed)
        with pytest.raises(UserError, match=message):
            read_beton(path)


def test_where_no_file_can_be_kept_the_table_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from fastbyol.host import cache_files

    def refused(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = make_beton(tmp_path, 10_000)
    monkeypatch.setattr(shared_columns, "SHARED_ROWS", 10_000)
    monkeypatch.setattr(cache_files, "locked_file", refused)
    assert len(read_beton(path).label) == 10_000
    assert not list(tmp_path.glob(".fastbyol*"))
    assert "cannot be written (Permission denied)" in caplog.text


def test_positions_in_the_listing_are_those_of_a_list_without_the_dropped() -> None:
    dropped = np.array([0, 3, 4, 9])
    kept = np.delete(np.arange(12), dropped).tolist()
    assert [listed_position(index, dropped) for index in range(len(kept))] == kept
    assert listed_position(5, np.zeros(0, dtype=np.int64)) == 5


def test_labels_are_counted_as_one_loop_counts_them() -> None:
    labels = np.array([2, -1, 0, 2, 2, -1])
    assert label_counts(labels, num_classes=4) == [1, 0, 3, 0]
    assert label_counts(labels[labels < 0], num_classes=0) == []


# ---- listings


def random_names(rng: random.Random, *, plain: bool) -> list[str]:
    parts = ["a", "b2", "-", "img"] if plain else ["a", "é", "\udc80", "日", "\U0001f600", "-"]
    folders = ["", "x/", "x/y/", "z/"]
    names = {rng.choice(folders) + "".join(rng.choices(parts, k=rng.randint(1, 5))) + ".jpg" for _ in range(rng.randint(1, 60))}
    return rng.sample(sorted(names), len(names))


@pytest.mark.parametrize("plain", [True, False])
def test_packed_names_are_a_tuple_of_strings_in_all_that_is_asked_of_them(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_names, "_AT_ONCE", 7)
    rng = random.Random(0)
    for _ in range(40):
        names = random_names(rng, plain=plain)
        packed = PackedNames.of(names)
        assert (len(packed), list(packed), packed[-1]) == (len(names), names, names[-1])
        assert packed == tuple(names) == packed
        assert packed != tuple(names[:-1])
        assert packed[1:4] == names[1:4]
        assert packed.part(1, len(names)) == names[1:]
        chosen = rng.choices(range(len(names)), k=20)
        assert packed.take(np.array(chosen)) == [names[index] for index in chosen]
        assert [names[index] for index in packed.sorted_order()] == sorted(names)
        folders, number = packed.folders()
        assert [folders[each] for each in number] == [name.rpartition("/")[0] for name in names]
        assert PackedNames.of([*names, names[0], "new", names[0]]).repeated() == [len(names), len(names) + 2]
    assert PackedNames.of([]) == ()
    with pytest.raises(IndexError):
        PackedNames.of(["a"])[1]
    with pytest.raises(ValueError, match="zero byte"):
        PackedNames.of(["a\0b"])


@pytest.mark.parametrize("together", [1, 5, 1000])
def test_samples_are_in_the_order_of_a_sort_by_label_folder_and_name(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing_module, "_SORTED", together)
    rng = random.Random(together)
    for _ in range(30):
        names = random_names(rng, plain=rng.random() < 0.5)
        labels = [rng.choice([None, -1, 0, 1]) for _ in names]
        ordered = sorted((label, *name.rpartition("/")[::2], name) for name, label in zip(names, labels, strict=True) if label is not None)
        listing = in_sample_order(ImageListing(Path("x"), ("a", "b"), names, ()), labels)
        assert (listing.files, listing.labels) == (tuple(name for *_, name in ordered), tuple(label for label, *_ in ordered))


def test_a_listing_takes_16_bytes_beside_the_name_for_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing_module, "_SORTED", 1000)
    names = [f"n{index % 1000:08d}/n_{index}.JPEG" for index in range(ROWS)]
    characters = sum(map(len, names)) / ROWS

    def listed() -> ImageListing:
        found = ImageListing(tmp_path, tuple(f"n{label:08d}" for label in range(1000)), names, ())
        return in_sample_order(found, np.arange(ROWS, dtype=np.int32) % 1000)

    listing, held, peak = held_and_peak(listed)
    assert listing.files[1] == "n00000000/n_1000.JPEG"
    assert held < characters + 17 + 3  # a zero byte, where it ends, its label; and the classes' names
    assert peak < 2 * (characters + 17) + 40  # before and after the sort; what it is sorted by


def test_a_list_of_paths_is_read_without_an_object_for_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(listing_module, "_SORTED", 1000)
    monkeypatch.setattr(packed_names, "_AT_ONCE", 1000)
    few = ROWS // 10
    for number in range(few):
        (tmp_path / "a" / f"{number}.jpg").touch()
    (tmp_path / "x.txt").write_text("".join(f"a/{number}.jpg\r\n\n" for number in range(few)) + "  ./a/../a/1.jpg  \n")
    (tmp_path / "few.txt").write_text("a/1.jpg\n")
    list_paths(tmp_path / "few.txt")  # what is imported at the first call is not counted
    listing, held, peak = held_and_peak(lambda: list_paths(tmp_path / "x.txt"))
    assert (listing.files[1], listing.root, len(listing.files)) == ("1.jpg", tmp_path / "a", few)
    assert listing.skipped == (("1.jpg", "the same path again"),)
    held, peak = held * ROWS / few, peak * ROWS / few
    assert held < len("0000.jpg") + 17 + 8
    # Beside the names the absolute paths, which are packed too: once, and as the truth values of a search in them.
    assert peak < 2 * len(str(tmp_path)) + 120


# ---- reports


def test_a_report_that_names_every_image_is_written_one_by_one(tmp_path: Path) -> None:
    few = ROWS // 10
    order = np.random.default_rng(0).permutation(few)
    with (tmp_path / "touched.jsonl").open("wb") as file:
        for index in order.tolist():
            file.write(touched_line(index, "transcoded", f"PNG {index % 2}", ""))
            if index == 7:
                file.write(touched_line(index, "noted", "EXIF orientation", "6"))
    rows = np.zeros(few, dtype=ROW)
    rows["index"], rows["outcome"] = order, Outcome.TRANSCODED
    listing = ImageListing(tmp_path, (), [f"{index:06d}.png" for index in range(few)], labels_as(np.full(few, -1, dtype=np.int32)))
    task = Task(listing, order, rows["source_bytes"].astype(np.int64), "", tmp_path / "x.beton", ConversionOptions(), workers=1)

    touched, held, _ = held_and_peak(lambda: TouchedImages({tmp_path / "touched.jsonl": ""}, images=few))
    assert held * ROWS / few < 30
    _, _, peak = held_and_peak(lambda: write_report(tmp_path / "report.json", task, rows, touched))
    assert peak * ROWS / few < 250  # the rows of the kept images, to count their classes
    summary, _, peak = held_and_peak(lambda: report_summary(tmp_path / "report.json"))
    assert peak * ROWS / few < 5

    report = json.loads((tmp_path / "report.json").read_text(encoding="ascii"))
    named = report.pop("touched")
    assert summary == report
    assert (report["transcoded"], report["noted"]) == ({"PNG 0": few // 2, "PNG 1": few // 2}, {"EXIF orientation": 1})
    noted = {"name": "000007.png", "index": 7, "outcome": "noted", "reason": "EXIF orientation", "detail": "6"}
    assert named.pop(7) == noted
    assert [(entry["name"], entry["index"]) for entry in named] == [(f"{index:06d}.png", index) for index in range(few)]
