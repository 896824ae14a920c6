"""Tests of tars with links, concatenated, sparse, extended or malicious, compared with tarfile and with the folder that was packed."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from fastbyol.config.errors import UserError
from fastbyol.data.formats.tar_members import DamagedTarError, tar_members
from fastbyol.data.inputs.images import list_images
from tests.imagenet_archives import DEVKIT, VAL, add_file, tar_bytes, write_archives
from tests.images import write_files


def members(content: bytes) -> list[tarfile.TarInfo]:
    return list(tar_members(io.BytesIO(content), end=len(content)))


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Returns a header with any size, also a negative one, and a correct checksum."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    base_256 = (size % (1 << 96) if size < 0 else size + (1 << 95)).to_bytes(12, "big")
    block[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else base_256
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


END = bytes(1024)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_the_same_as_tarfiles(form: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, pax_headers={"comment": "x"} if form == tarfile.PAX_FORMAT else None) as tar:
        for name in ("a/1.jpg", "d" * 90 + "/" + "f" * 80, "b/é.jpg", "b/\udcff.jpg"):
            add_file(tar, name, name.encode(errors="surrogateescape") * 60)
        if form != tarfile.USTAR_FORMAT:
            add_file(tar, "very/" * 60 + "long.jpg", b"x")
        for name, kind in (("dir/", tarfile.DIRTYPE), ("l", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE), ("p", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a/1.jpg" if form == tarfile.USTAR_FORMAT else "t" * 200
            tar.addfile(member)
        add_file(tar, "end.jpg", b"")
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        expected = [(m.name, m.type, m.size, m.offset_data, m.linkname) for m in tar]
    assert [(m.name, m.type, m.size, m.offset_data, m.linkname) for m in members(buffer.getvalue())] == expected


def test_the_tar_of_a_folder_with_links_equals_the_folder(tmp_path: Path) -> None:
    names = ("a/1.jpg", "b/2.jpg", "b/.store/blob", "b/.store/other", "c/3.jpg")
    root = write_files(tmp_path / "data", {name: name.encode() for name in names})
    os.link(root / "a" / "1.jpg", root / "c" / "hard.jpg")
    os.link(root / "b" / ".store" / "other", root / "a" / "from_store.jpg")
    links = {
        "a/soft.jpg": "../b/2.jpg",  # of an image that is listed: left out
        "a/z.jpg": "../b/.store/blob",  # of a file that is not
        "b/y.jpg": "chain.jpg",  # the same, by a link in between
        "b/chain.jpg": ".store/blob",
        "c/gone.jpg": "nowhere.jpg",
        "c/loop.jpg": "loop.jpg",
    }
    write_files(root, links)
    for options in ([], ["--format=posix"], ["--sort=name", "--format=ustar"]):
        subprocess.run(["tar", *options, "-cf", tmp_path / "data.tar", "-C", root, "."], check=True)
        folder, tar = list_images(root), list_images(tmp_path / "data.tar")
        assert tar.files == ("a/1.jpg", "a/from_store.jpg", "a/z.jpg", "b/2.jpg", "c/3.jpg", "c/hard.jpg")
        assert (tar.files, tar.digest()) == (folder.files, folder.digest())
        assert [tar.location(i).read() for i in range(6)] == [folder.location(i).read() for i in range(6)]
        reasons = dict(tar.skipped)
        assert reasons["a/soft.jpg"] == "a link to b/2.jpg, which is listed" == dict(folder.skipped)["a/soft.jpg"]
        assert reasons["b/y.jpg"] == "a link to a/z.jpg, which is listed"
        assert reasons["c/gone.jpg"] == "a link in a tar (to nowhere.jpg)"


def test_images_in_too_many_folders_are_left_out_of_folder_tar_and_list(tmp_path: Path) -> None:
    names = ("a/1.jpg", "b/2.jpg", "a/" + "d/" * 255 + "3.jpg", "a/" + "d/" * 256 + "4.jpg")
    root = write_files(tmp_path / "data", {name: name.encode() for name in names})
    huge = "a/" + "long/" * 900 + "5.jpg"  # no file system holds it
    (tmp_path / "data.tar").write_bytes(tar_bytes({name: name.encode() for name in (*names, huge)}))
    (tmp_path / "list.txt").write_text("".join(f"data/{name}\n" for name in names))
    reason = "a name of more than 4,096 characters or 256 folders"
    for given, num in ((root, 1), (tmp_path / "data.tar", 2), (tmp_path / "list.txt", 1)):
        listing = list_images(given)
        assert sorted(listing.files) == sorted(names[:3])
        assert [why for _, why in listing.skipped] == [reason] * num
    (tmp_path / "list.txt").write_text("data/" + huge)
    with pytest.raises(UserError, match="1 of its 1 files are missing"):
        list_images(tmp_path / "list.txt")


def test_classes_are_the_folders_below_those_that_all_images_share(tmp_path: Path) -> None:
    for folders, classes in (
        (("images/train/a", "images/train/b"), ("a", "b")),
        (("images/train/a", "images/train-b"), ("train", "train-b")),
        (("x/a/deep", "x/a"), ()),  # one folder alone is no class
        (("a/b", "a/b/c", "a/b-x"), ("b", "b-x")),
    ):
        (tmp_path / "data.tar").write_bytes(tar_bytes({f"{folder}/1.jpg": folder.encode() for folder in folders}))
        assert list_images(tmp_path / "data.tar", splits="classes").class_names == classes


def test_hard_links_in_a_class_tar_refer_to_that_tar(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        add_file(tar, "1.jpg", b"one")
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "1.jpg"
        tar.addfile(link)
    (tmp_path / "x.tar").write_bytes(
        tar_bytes({"n01.tar": buffer.getvalue(), "n02.tar": tar_bytes({"1.jpg": b"other"}), "._n03.tar": b"?"})
    )
    listing = list_images(tmp_path / "x.tar")
    assert {name: listing.location(i).read() for i, name in enumerate(listing.files)} == {
        "n01/1.jpg": b"one",
        "n01/2.jpg": b"one",
        "n02/1.jpg": b"other",
    }


def test_concatenated_archives_are_all_read(tmp_path: Path) -> None:
    one, two, three = (tar_bytes({f"{name}/1.jpg": name.encode()}) for name in "abc")
    assert [m.name for m in members(one + two + bytes(5 << 20) + three)] == ["a/1.jpg", "b/1.jpg", "c/1.jpg"]
    lone = one[:1024] + bytes(512) + two  # a single block of zeros
    assert [m.name for m in members(lone)] == ["a/1.jpg", "b/1.jpg"]
    (tmp_path / "x.tar").write_bytes(tar_bytes({"n01.tar": one[:] + two}) + tar_bytes({"n02.tar": three}))
    assert list_images(tmp_path / "x.tar").files == ("n01/a/1.jpg", "n01/b/1.jpg", "n02/c/1.jpg")


@pytest.mark.parametrize("junk", [b"junk" * 200, bytes(700) + b"x", tar_bytes({"b/1.jpg": b"x"})[3:]])
def test_data_after_the_end_mark_that_is_not_an_archive_is_an_error(junk: bytes) -> None:
    with pytest.raises(DamagedTarError, match="near byte"):
        members(tar_bytes({"a/1.jpg": b"x"}) + junk)


def test_a_sparse_hole_after_the_end_is_skipped_quickly(tmp_path: Path) -> None:
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(tar_bytes({"a/1.jpg": b"x"}))
        file.truncate(1 << 40)
    start = time.monotonic()
    assert list_images(tmp_path / "x.tar").files == ("a/1.jpg",)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (header("a/2.jpg", -512), "'a/2.jpg' has a size of -512"),
        (header("a/2.jpg", -(1 << 70)), "has a size of -"),
        (header("dir", -512, tarfile.DIRTYPE), "'dir' has a size of -512"),
        (header("odd", -1024, b"Q"), "'odd' has a size of -1,024"),
        (header("long", -512, tarfile.GNUTYPE_LONGNAME), "'long' has a size of -512"),
        (header("a/2.jpg", 1 << 80), "'a/2.jpg' is cut"),
        (header("odd", 1 << 40, b"Q"), "'odd' is cut"),
        (header("x", 20, tarfile.XHDTYPE) + padded(b"20 size=512\n20 size=1") + header("a/2.jpg", 5), "an extended header that is damaged"),
        (header("x", 13, tarfile.XHDTYPE) + padded(b"13 size=-512\n") + header("a/2.jpg", 5), "'a/2.jpg' has a size of '-512'"),
        (header("x", 12, tarfile.XHDTYPE) + padded(b"99999 size=5") + header("a/2.jpg", 5), "an extended header that is damaged"),
        (header("x", 1 << 30, tarfile.XHDTYPE), "a header of 1,073,741,824 bytes"),
        (header("g", 0, tarfile.XGLTYPE) * 4000, "a header of 0 bytes"),
        (header("x", 1 << 20, tarfile.XHDTYPE) + b"9" * (1 << 20), "a header of 1,048,576 bytes"),
        (header("x", 1 << 19, tarfile.XHDTYPE) + b"9" * (1 << 19), "an extended header that is damaged"),
        (header("x", 1 << 19, tarfile.XHDTYPE) + (b"2 " * (1 << 18))[:-1] + b"=", "an extended header that is damaged"),
        (header("x", 512, tarfile.XHDTYPE) + bytes(512) + END, "neither a header nor the end mark"),
    ],
)  # fmt: skip
def test_impossible_sizes_and_headers_are_a_one_line_error_at_once(damage: bytes, message: str, tmp_path: Path) -> None:
    """Some of them make CPython's tarfile loop for ever (CVE-2025-8194) or for hours (CVE-2024-6232)."""
    good = tar_bytes({"a/1.jpg": b"x"})[:1024]
    (tmp_path / "inner.tar").write_bytes(tar_bytes({"n01.tar": good + damage + END}))
    (tmp_path / "outer.tar").write_bytes(good + damage + END)
    start = time.monotonic()
    for name in ("inner.tar", "outer.tar"):
        with pytest.raises(UserError, match=f"{name}: is not a complete tar: .*{message}"):
            list_images(tmp_path / name)
    assert time.monotonic() - start < 5


def test_sparse_files_are_reported_and_an_endless_sparse_map_is_refused(tmp_path: Path) -> None:
    block = bytearray(header("a/2.jpg", 512, tarfile.GNUTYPE_SPARSE))
    block[482], block[148:156] = 1, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    last, more = bytes(512), bytes(504) + b"\1" + bytes(7)
    good = tar_bytes({"a/1.jpg": b"x"})[:1024]
    (tmp_path / "x.tar").write_bytes(good + block + more + last + b"d" * 512 + header("a/3.jpg", 1) + padded(b"y") + END)
    listing = list_images(tmp_path / "x.tar")
    assert listing.files == ("a/1.jpg", "a/3.jpg")
    assert listing.skipped == (("a/2.jpg", "a sparse file"),)
    (tmp_path / "x.tar").write_bytes(good + block + more * 3000 + last + END)
    with pytest.raises(UserError, match="a header of more than 1,048,576 bytes"):
        list_images(tmp_path / "x.tar")


def test_a_malicious_development_kit_is_a_one_line_error(tmp_path: Path) -> None:
    write_archives(tmp_path)
    (tmp_path / DEVKIT).write_bytes(tar_bytes({"readme.txt": b""})[:512] + header("x", -512) + END)
    with pytest.raises(UserError, match="cannot be read as the development kit .*has a size of -512"):
        list_images(tmp_path / VAL, devkit=tmp_path / DEVKIT)
