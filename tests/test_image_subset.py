"""Tests of subsets: balanced, seeded, nested, the same on any machine; labels mean the same as in the full set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.config.errors import UserError
from fastbyol.data.backends.ffcv_source import FfcvSource
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.inputs.images import list_images
from fastbyol.data.inputs.listing import ImageListing
from fastbyol.data.inputs.subset import balanced_counts, choose_classes, draw_fraction, draw_images, read_subset, restrict, write_subset
from tests.commands import files_no_larger_than, run_here
from tests.imagenet_archives import TRAIN, tar_bytes, write_archives


def listing_of(sizes: tuple[int, ...]) -> ImageListing:
    names = tuple(f"class{label:02d}" for label in range(len(sizes)))
    files = tuple(f"{names[label]}/{label}_{i}.JPEG" for label, size in enumerate(sizes) for i in range(size))
    return ImageListing(Path("data"), names, files, tuple(label for label, size in enumerate(sizes) for _ in range(size)))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.data())
def test_balanced_counts_differ_by_at_most_one_unless_a_class_has_fewer(available: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(1, sum(available)))
    counts = balanced_counts(available, total)
    assert sum(counts) == total
    assert all(0 <= count <= most for count, most in zip(counts, available, strict=True))
    level = max(counts)
    assert all(count >= min(most, level - 1) for count, most in zip(counts, available, strict=True))


def test_one_percent_of_imagenet_is_simclrs_12_or_13_images_of_each_class() -> None:
    sizes = [1300] * 895 + [732 + (i * 5) % 560 for i in range(105)]
    sizes[-1] += 1_281_167 - sum(sizes)
    counts = balanced_counts(sizes, round(0.01 * 1_281_167))
    assert Counter(counts) == {12: 188, 13: 812}
    assert sum(balanced_counts(sizes, round(0.1 * 1_281_167))) == 128_117


def test_a_fraction_is_balanced_seeded_nested_and_keeps_labels_and_order() -> None:
    whole = listing_of((40, 60, 3, 100))
    part = draw_fraction(whole, 0.1, seed=1)
    assert sorted(Counter(part.labels).values()) == [3, 5, 6, 6]
    assert list(part.files) == [name for name in whole.files if name in set(part.files)]
    assert part.class_names == whole.class_names
    label_of = dict(zip(whole.files, whole.labels, strict=True))
    assert list(part.labels) == [label_of[name] for name in part.files]
    assert draw_fraction(whole, 0.1, seed=1).files == part.files
    assert draw_fraction(whole, 0.1, seed=2).files != part.files
    assert set(part.files) < set(draw_fraction(whole, 0.3, seed=1).files)
    assert Counter(draw_fraction(whole, 1e-9, seed=1).labels) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert draw_fraction(whole, 1, seed=1).files == whole.files


def test_the_choice_depends_on_names_and_seed_only(tmp_path: Path) -> None:
    """The expected choice was computed by hand with sha256sum of '7', a zero byte and the name, for classes and images."""
    write_archives(tmp_path)
    part = draw_images(list_images(tmp_path / TRAIN), 5, seed=7)
    assert part.files == (
        "n01440764/n01440764_10026.JPEG",
        "n01440764/n01440764_2.JPEG",
        "n01443537/n01443537_10.JPEG",
        "n01443537/n01443537_10026.JPEG",
        "n01484850/n01484850_10.JPEG",
    )
    flat = [location.partition("/")[2] for location in list_images(tmp_path / TRAIN).files]
    (tmp_path / "flat.tar").write_bytes(tar_bytes({name: b"x" for name in flat}))
    (tmp_path / "labels.txt").write_text("".join(f"{name} {name[:9]}\n" for name in flat))
    other = draw_images(list_images(tmp_path / "flat.tar", labels=tmp_path / "labels.txt"), 5, seed=7)
    assert [name.partition("/")[2] for name in part.files] == list(other.files)


def test_the_same_classes_are_chosen_in_train_and_val() -> None:
    train, val = listing_of((9, 9, 9, 9, 9)), listing_of((2, 1, 2, 2, 1))
    assert set(choose_classes(train, 2, seed=3).labels) == set(choose_classes(val, 2, seed=3).labels)
    assert len({tuple(sorted(set(choose_classes(val, 2, seed=seed).labels))) for seed in range(20)}) > 3
    named = choose_classes(train, ["class04", "class01"], seed=0)
    assert (set(named.labels), len(named.files), named.class_names) == ({1, 4}, 18, train.class_names)
    with pytest.raises(UserError, match="has no class dog; it has class00, class01"):
        choose_classes(train, ["class00", "dog"], seed=0)


def test_a_published_list_matches_images_without_folders_or_with_other_folders(tmp_path: Path) -> None:
    whole = listing_of((4, 4))
    for names in (["0_3.JPEG", "1_0.JPEG"], ["class01/1_0.JPEG", "class00/0_3.JPEG", "class00/0_3.JPEG"], ["train/x/1_0.JPEG", "0_3"]):
        assert restrict(whole, names, source=tmp_path).files == ("class00/0_3.JPEG", "class01/1_0.JPEG")
    with pytest.raises(UserError, match=r"2 of its 3 names are not images of data: a.JPEG, class00/b.JPEG"):
        restrict(whole, ["a.JPEG", "0_1.JPEG", "class00/b.JPEG"], source=tmp_path)
    twice = ImageListing(Path("data"), ("a", "b"), ("a/1.jpg", "b/1.jpg"), (0, 1))
    assert restrict(twice, ["b/1.jpg"], source=tmp_path).labels == (1,)
    with pytest.raises(UserError, match="1 of its 1 names could each be several of its images: 1.jpg"):
        restrict(twice, ["1.jpg"], source=tmp_path)


def test_a_list_may_have_odd_names_and_any_line_ends(tmp_path: Path) -> None:
    names = ("a/x y .jpg", "a/\udcff.jpg", "a/\u2028\x0b.jpg", "a/z.jpg ")
    write_subset(tmp_path / "list", ImageListing(Path("data"), ("a",), names, (0, 0, 0, 0)))
    assert tuple(read_subset(tmp_path / "list")) == names
    (tmp_path / "list").write_bytes(b"a\r\n\r\nb\r\n")
    assert read_subset(tmp_path / "list") == ["a", "b"]
    for content, message in ((b"\n\n", "names no image"), (None, "cannot be read")):
        path = tmp_path / "other"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_subset(path)
        path.unlink(missing_ok=True)


def test_labels_stay_unless_empty_classes_are_dropped(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = make_folder(a_jpg=b"1")
    for name in ("apple", "zebra"):
        (root / name).mkdir()
        (root / name / f"{name}.jpg").write_bytes(b"2")
    subset = tmp_path / "list.txt"
    subset.write_text("zebra.jpg\na.jpg\n")
    kept = list_images(root, subset=subset)
    assert (kept.labels, kept.class_names) == ((1, 2), ("apple", "class", "zebra"))
    dropped = list_images(root, subset=subset, empty_classes="drop")
    assert (dropped.labels, dropped.class_names) == ((0, 1), ("class", "zebra"))
    assert kept.digest() != dropped.digest()
    with pytest.raises(UserError, match="--drop-empty-classes: has no effect without --subset"):
        list_images(root, empty_classes="drop")


def test_a_converted_subset_without_some_classes_keeps_the_labels_of_the_full_set(image_folder: Path, tmp_path: Path) -> None:
    subset = tmp_path / "list.txt"
    subset.write_text("cat/001.jpg\nant/002.jpg\n")
    manifest = write_beton(list_images(image_folder, subset=subset), out=tmp_path / "part.beton", workers=1)
    assert (manifest.class_names, manifest.class_counts) == (("ant", "bee", "cat"), (1, 0, 1))
    source = FfcvSource(tmp_path / "part.beton")
    assert source.labels.tolist() == [0, 2]
    source.close()


# ---- the command


def test_the_command_writes_a_list_that_selects_the_subset(image_folder: Path, tmp_path: Path) -> None:
    done = run_here("subset.py", "--data", image_folder, "--images", "8", "--classes", "bee,cat", "--out", tmp_path / "list.txt")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'list.txt'}: 8 images of 2 classes (4 of each), of 3 in all\n"
    part = list_images(image_folder, subset=tmp_path / "list.txt")
    assert Counter(part.labels) == {1: 4, 2: 4}
    assert (tmp_path / "list.txt").read_text().splitlines() == list(part.files)
    done = run_here("subset.py", "--data", image_folder, "--images", "8", "--out", tmp_path / "list.txt")
    assert "exists already" in done.stderr
    assert run_here("subset.py", "--data", image_folder, "--classes", "2", "--out", tmp_path / "list.txt", "--overwrite").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which part? give --fraction"),
        (["--fraction", "0.1", "--images", "3"], "both say how many"),
        (["--fraction", "1.5"], "fraction = 1.5"),
        (["--images", "26"], "from 1 to 25"),
        (["--classes", "4"], "classes = 4"),
        (["--classes", "ant", "--drop-empty-classes", "--subset", "SUBSET"], "give it to the converter"),
        (["--images", "3", "--out", "none/list"], "none/list: cannot be written"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "subset").write_text("ant/000.jpg\n")
    arguments = [str(tmp_path / "subset") if argument == "SUBSET" else argument for argument in arguments]
    out = [] if "--out" in arguments else ["--out", tmp_path / "list.txt"]
    done = run_here("subset.py", "--data", image_folder, *out, *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr


@pytest.mark.parametrize(
    "content",
    [
        b"./c0/1.jpg\n./c1/1.jpg\n",  # find . -name '*.jpg'
        b"/mnt/old/train/c0/1.jpg\n/mnt/old/train/c1/1.jpg\n",
        b"\xef\xbb\xbfc0/1.jpg\r\nc1/1.jpg\r\n",  # Notepad
        "\ufeffc0/1.jpg\r\nc1/1.jpg\r\n".encode("utf-16"),
        b"c0\\1.jpg\r\nE:\\data\\c1\\1.jpg\r\n",
        b"c0/1\nc1/1\n",
        b"data//c0/./1.jpg \n../c1/1.jpg\t\n",
        b"c1/1.jpg\nc0/1.jpg\n./c0/1.jpg\n",
    ],
)
def test_names_match_by_their_last_parts_if_classes_share_file_names(content: bytes, tmp_path: Path) -> None:
    for name in ("c0/1.jpg", "c0/2.jpg", "c1/1.jpg", "c1/2.jpg"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"x")
    (tmp_path / "list").write_bytes(content)
    listing = list_images(tmp_path / "data", subset=tmp_path / "list")
    assert listing.files == ("c0/1.jpg", "c1/1.jpg")
    names = content.count(b"\n") - content.count(b"\n\0\n")
    assert listing.notes == (f"{tmp_path / 'list'}: {names} names of 2 images, of the 4 in {tmp_path / 'data'}",)


def test_ambiguous_and_unknown_names_are_counted_separately(tmp_path: Path) -> None:
    whole = ImageListing(Path("data"), ("a", "b"), ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/3.png"), (0, 0, 1, 1))
    message = "2 of its 5 names are not images of data: b/2.jpg, 4; 1 of its 5 names could each be several of its images: 1.jpg"
    with pytest.raises(UserError, match=message):
        restrict(whole, ["a/1.jpg", "b/2.jpg", "4", "1.jpg", "x/3.png"], source=tmp_path)
    with pytest.raises(UserError, match="could each be several of its images: y/3"):
        restrict(whole, ["x/3.png", "y/3"], source=tmp_path)


def test_class_names_may_be_written_as_ls_and_find_print_folders(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classes").write_bytes(b"\xef\xbb\xbfant/\r\n./cat/\r\n")
    done = run_here("subset.py", "--data", image_folder, "--classes", tmp_path / "classes", "--out", tmp_path / "list.txt")
    assert "16 images of 2 classes" in done.stdout


def test_a_list_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("old\n")
    with files_no_larger_than(100), pytest.raises(OSError, match="File too large"):
        write_subset(tmp_path / "list", listing_of((40,)))
    assert (tmp_path / "list").read_text() == "old\n"
    assert [path.name for path in tmp_path.iterdir()] == ["list"]


def test_the_command_counts_images_without_a_label_apart(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(12)]
    members = {name: b"x" for name in names} | {f"{number}.cls": b"dog" if number % 2 else b"cat" for number in range(8)}
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    done = run_here("subset.py", "--data", tmp_path / "x.tar", "--images", "6", "--out", tmp_path / "list")
    assert done.stdout == f"{tmp_path / 'list'}: 6 images of 2 classes (2 of each), of 2 in all, and 2 without a label\n"
