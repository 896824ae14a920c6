"""Tests of the inputs: every kind lists the same images, order and labels as torchvision, and reports what is skipped."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.datasets import imagenet

from fastbyol.config.errors import UserError
from fastbyol.data.inputs.folder import list_image_folder
from fastbyol.data.inputs.images import list_images
from fastbyol.data.inputs.listing import ImageListing, ImageLocation
from fastbyol.evaluation.data_state import data_state
from tests.commands import run_python
from tests.imagenet_archives import DEVKIT, TRAIN, VAL, WNIDS, add_file, tar_bytes, write_archives
from tests.images import write_files


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the archives, and train/ and val/ as torchvision's own ImageNet class unpacks them."""
    root = tmp_path_factory.mktemp("imagenet")
    write_archives(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagenet, "_verify_archive", lambda *_: None)  # these are not the real ones' checksums
        imagenet.parse_devkit_archive(root)
        imagenet.parse_train_archive(root)
        imagenet.parse_val_archive(root)
    return root


def samples(listing: ImageListing) -> list[tuple[bytes, int]]:
    return [(listing.location(i).read(), label) for i, label in enumerate(listing.labels)]


def torchvision_samples(root: Path) -> list[tuple[bytes, int]]:
    return [(Path(path).read_bytes(), label) for path, label in TorchvisionFolder(str(root)).samples]


# ---- ImageNet's archives


def test_the_train_tar_read_in_place_equals_torchvisions_unpacked_folder(archives: Path) -> None:
    listing = list_images(archives / TRAIN)
    assert samples(listing) == torchvision_samples(archives / "train")
    assert listing.class_names == WNIDS
    assert listing.skipped == ()
    folder = list_images(archives / "train")
    assert (listing.files, listing.digest()) == (folder.files, folder.digest())


def test_the_val_tar_with_the_development_kit_has_torchvisions_labels_and_order(archives: Path) -> None:
    listing = list_images(archives / VAL, devkit=archives / DEVKIT)
    assert samples(listing) == torchvision_samples(archives / "val")
    assert listing.class_names == WNIDS


@pytest.mark.parametrize("kind", ["names", "order", "numbered csv", "kaggle"])
def test_other_label_files_give_the_same_labels(kind: str, archives: Path, tmp_path: Path) -> None:
    wnid_of = {Path(path).name: WNIDS[label] for path, label in TorchvisionFolder(str(archives / "val")).samples}
    names = sorted(wnid_of)
    text = {
        "names": "".join(f"{name} {wnid_of[name]}\n" for name in reversed(names)),
        "order": "".join(f"{wnid_of[name]}\n" for name in names),
        "numbered csv": "label;filename\r\n" + "".join(f"{WNIDS.index(wnid_of[name])};{name}\r\n" for name in names),
        "kaggle": "ImageId,PredictionString\n" + "".join(f"{name[:-5]},{wnid_of[name]} 1 2 3 4 \n" for name in names),
    }[kind]
    labels = tmp_path / ("labels.txt" if kind in ("names", "order") else "labels.csv")
    labels.write_text(text)
    flat = write_files(tmp_path / "flat", {name: (archives / "val" / wnid_of[name] / name).read_bytes() for name in names})
    for data in (archives / VAL, flat):
        listing = list_images(data, labels=labels)
        assert samples(listing) == torchvision_samples(archives / "val")
        assert listing.class_names == (("0", "1", "2") if kind == "numbered csv" else WNIDS)


def test_a_val_image_that_is_missing_does_not_shift_the_kits_labels(archives: Path, tmp_path: Path) -> None:
    whole = list_images(archives / VAL, devkit=archives / DEVKIT)
    expected = dict(zip(whole.files, whole.labels, strict=True))
    del expected["ILSVRC2012_val_00000002.JPEG"]
    flat = write_files(tmp_path, {name: b"" for name in expected})
    part = list_images(flat, devkit=archives / DEVKIT)
    assert dict(zip(part.files, part.labels, strict=True)) == expected


def test_a_tar_of_a_whole_folder_equals_the_folder(archives: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "packed.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(archives / "train", "./images/train")
    with tarfile.open(tmp_path / "classes.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for wnid in WNIDS:
            tar.add(archives / "train" / wnid, wnid)
    for name in ("packed.tar", "classes.tar"):
        listing = list_images(tmp_path / name)
        assert samples(listing) == torchvision_samples(archives / "train")
        assert listing.digest() == list_images(archives / "train").digest()


# ---- tars that are damaged, or mean harm


def test_a_tar_truncated_anywhere_is_a_one_line_error(archives: Path, tmp_path: Path) -> None:
    for whole in (archives / TRAIN, archives / VAL):
        content = whole.read_bytes()
        end = len(content.rstrip(b"\0"))
        for keep in [*range(0, end, end // 40), end]:
            cut = tmp_path / "cut.tar"
            cut.write_bytes(content[:keep])
            with pytest.raises(UserError, match=r"cut\.tar: is not a complete tar: .* near byte"):
                list_images(cut, devkit=archives / DEVKIT if whole.name == VAL else None)


def test_a_damaged_header_is_not_taken_for_the_end_of_the_tar(archives: Path, tmp_path: Path) -> None:
    content = bytearray((archives / TRAIN).read_bytes())
    content[content.index(f"{WNIDS[1]}_2.JPEG".encode())] ^= 1
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(UserError, match=rf"neither a header nor the end mark near byte .* \(in {WNIDS[1]}.tar\)"):
        list_images(tmp_path / "bad.tar")


def test_unsafe_names_and_members_that_are_not_files_are_skipped_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add_file(tar, "a/good.jpg", b"1")
        for name in ("/etc/a.jpg", "a/../../b.jpg", "../c.jpg", "a/d\n.jpg", "a/._e.jpg", "a/f.txt", "a/good.jpg", "g.jpg"):
            add_file(tar, name, b"2")
        for name, kind in (("h", tarfile.SYMTYPE), ("i", tarfile.LNKTYPE), ("j", tarfile.CHRTYPE), ("k", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(f"a/{name}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        sparse = tarfile.TarInfo("a/l.jpg")
        sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": "9", "GNU.sparse.map": "0,1"}
        sparse.size = 1
        tar.addfile(sparse, io.BytesIO(b"3"))
        add_file(tar, "a/\udcff.jpg", b"4")
    listing = list_images(path, labels="folders")
    assert samples(listing) == [(b"1", 0), (b"4", 0)]
    assert dict(listing.skipped) == {
        "/etc/a.jpg": "an absolute name",
        "a/../../b.jpg": "a name that leads out of the tar",
        "../c.jpg": "a name that leads out of the tar",
        "a/d\n.jpg": "a line break in its name",
        "a/._e.jpg": "hidden",
        "a/f.txt": "not an image by its extension",
        "a/good.jpg": "the same name again",
        "g.jpg": "in no class folder",
        "a/h.jpg": "a link in a tar (to /etc/passwd)",
        "a/i.jpg": "a link in a tar (to /etc/passwd)",
        "a/j.jpg": "not a regular file",
        "a/k.jpg": "not a regular file",
        "a/l.jpg": "a sparse file",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.tar"]


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    with (tmp_path / "bomb.tar").open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 34)
    with pytest.raises(UserError, match="a header of 8,589,93[0-9],[0-9]+ bytes"):
        list_images(tmp_path / "bomb.tar")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a complete tar"),
        (b"hello" * 400, "is not a complete tar"),
        (b"\x1f\x8b\x08" + bytes(600), r"compressed \(gzip\)"),
        (tar_bytes({"read.me": b"x"}), "no image in it"),
        (tar_bytes({"train/a/1.jpg": b"x", "val/a/1.jpg": b"x"}), "holds splits"),
        (tar_bytes({"a.tar": tar_bytes({"1.jpg": b"x"}), "b.tar": tar_bytes({"1.txt": b"x"})}), "b: no image in this class folder"),
    ],
)
def test_a_file_that_is_not_a_tar_of_images_is_a_one_line_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match=f"x.tar.*{message}"):
        list_images(tmp_path / "x.tar")


# ---- folders


def test_link_loops_duplicate_links_and_files_that_are_not_images_are_skipped_and_reported(tmp_path: Path) -> None:
    outside = write_files(tmp_path / "outside", {"x.jpg": b"x", "deep/y.jpg": b"y"})
    root = write_files(
        tmp_path / "data",
        {
            "a/1.jpg": b"1",
            "a/sub/2.JPEG": b"2",
            "a/loop": "..",
            "a/sub/self.jpg": "self.jpg",
            "a/to_b": "../b",
            "a/again.jpg": "../b/3.png",
            "a/gone.jpg": "nowhere",
            "a/notes.txt": b"",
            "a/.hidden.jpg": b"",
            "a/br\neak.jpg": b"",
            "b/3.png": b"3",
            "b/\udcff.jpg": b"4",
            "b/linked": str(outside),
            "c/first.jpg": str(outside / "deep" / "y.jpg"),
            "c/second.jpg": str(outside / "x.jpg"),
            ".git/z.jpg": b"",
            "top.jpg": b"",
        },
    )
    os.link(root / "b" / "3.png", root / "c" / "hard.png")
    os.mkfifo(root / "b" / "pipe.jpg")
    listing = list_images(root)
    assert dict(zip(listing.files, samples(listing), strict=True)) == {
        "a/1.jpg": (b"1", 0),
        "a/sub/2.JPEG": (b"2", 0),
        "b/3.png": (b"3", 1),
        "b/\udcff.jpg": (b"4", 1),
        "b/linked/x.jpg": (b"x", 1),
        "b/linked/deep/y.jpg": (b"y", 1),
        "c/hard.png": (b"3", 2),
    }
    assert dict(listing.skipped) == {
        "a/loop": f"the same folder as {root}",
        "a/sub/self.jpg": "a broken link (Too many levels of symbolic links)",
        "a/to_b": "the same folder as b",
        "a/again.jpg": "a link to b/3.png, which is listed",
        "a/gone.jpg": "a broken link (No such file or directory)",
        "a/notes.txt": "not an image by its extension",
        "a/.hidden.jpg": "hidden",
        "a/br\neak.jpg": "a line break in its name: a list of names could not hold it",
        "b/pipe.jpg": "not a regular file",
        "c/first.jpg": "a link to b/linked/deep/y.jpg, which is listed",
        "c/second.jpg": "a link to b/linked/x.jpg, which is listed",
        ".git": "hidden",
        "top.jpg": "in no class folder",
    }


def test_a_folder_of_links_is_read_like_a_folder(tmp_path: Path) -> None:
    write_files(tmp_path / "store", {"x.jpg": b"x", "y.jpg": b"y", "k/z.jpg": b"z"})
    links = {
        "a/1.jpg": "../../store/x.jpg",
        "a/2.jpg": "../../store/y.jpg",
        "b": "../store/k",
        "c/3.jpg": "../../store/x.jpg",
        "c/4.jpg": "4",
    }
    write_files(tmp_path / "links", {**links, "c/5.jpg": b"5"})
    listing = list_images(tmp_path / "links")
    assert listing.files == ("a/1.jpg", "a/2.jpg", "b/z.jpg", "c/5.jpg")
    assert dict(listing.skipped)["c/3.jpg"] == "a link to a/1.jpg, which is listed"


def test_a_link_that_points_to_itself_is_left_out_of_a_folder_without_classes(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    listing = list_images(tmp_path)
    assert listing.files[:] == ["a.jpg"]
    assert dict(listing.skipped) == {"self.jpg": "a broken link (Too many levels of symbolic links)"}
    assert data_state([str(tmp_path)])


def test_converted_data_given_as_images_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "x.beton").touch()
    for data in (tmp_path / "x.beton", str(tmp_path / "x.beton"), [tmp_path / "x.beton"]):
        with pytest.raises(UserError, match=r"--data .*x\.beton: is converted already; give the original images, from which it was made"):
            list_images(data)


def test_unreadable_folders_are_reported_and_an_unreadable_class_is_an_error(tmp_path: Path) -> None:
    """Runs in another process as an unprivileged user, because root may read everything."""
    root = write_files(tmp_path / "data", {"a/1.jpg": b"1", "a/closed/2.jpg": b"2", "b/3.jpg": b"3"})
    (root / "a" / "closed").chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o555)
    code = (
        "import os, sys; from pathlib import Path; from fastbyol.data.inputs.images import list_images\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "print(list_images(Path(sys.argv[1])).skipped)"
    )
    told = run_python("-c", code, root)
    assert told.stdout.strip() == "(('a/closed', 'cannot be read (Permission denied)'),)"
    (root / "b").chmod(0)
    refused = run_python("-c", code, root)
    assert "data/b: cannot be read (Permission denied); check its permissions" in refused.stderr
    for name in ("b", "a/closed"):
        (root / name).chmod(0o755)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no such file or folder"),
        ({"1.txt": b""}, "no image found; instead: 1 not an image by its extension"),
        ({"a.tar": b""}, "a.tar: is not a complete tar"),
        ({"a/1.jpg": b"", "c/1.jpg": b"", "b/x.txt": b""}, "b: no image in this class folder .*skipped b/x.txt: not an image"),
        ({"a/1.jpg": b"", "c/1.jpg": b"", "b": "a"}, "b: no image in this class folder .*skipped b: the same folder as a"),
        ({"train/1.jpg": b"", "val/1.jpg": b""}, r"holds splits \(train, val\)"),
        ({"a\nb/1.jpg": b""}, "a class name may not hold a line break"),
    ],
)
def test_a_folder_that_is_not_a_data_set_is_a_one_line_error(files: dict[str, bytes | str], message: str, tmp_path: Path) -> None:
    write_files(tmp_path / "data", files)
    with pytest.raises(UserError, match=f"data.*{message}"):
        list_images(tmp_path / "data")


# ---- files of labels


def flat_folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "flat", {f"{name}.jpg": name.encode() for name in ("x", "y", "z")})


def listed(tmp_path: Path, labels: str, *, suffix: str = "csv") -> ImageListing:
    path = tmp_path / f"labels.{suffix}"
    path.write_bytes(labels.encode("utf-8-sig", errors="surrogateescape"))
    return list_images(flat_folder(tmp_path), labels=path)


@pytest.mark.parametrize(
    "labels",
    [
        "filename,label\nx.jpg,dog\ny.jpg,cat\nz.jpg,dog\n",
        "x.jpg,dog\ny.jpg,cat\nz.jpg,dog",
        "width,label,filename\r\n3,dog,x.jpg\r\n4,cat,./y.jpg\r\n\r\n5,dog,images/z.jpg\r\n",
        'image;class\n"x.jpg";"dog"\n"y.jpg";"cat"\n"z.jpg";dog\n',
    ],
)
def test_class_names_in_a_csv_are_numbered_in_sorted_order(labels: str, tmp_path: Path) -> None:
    listing = listed(tmp_path, labels)
    assert listing.class_names == ("cat", "dog")
    assert (listing.files, listing.labels) == (("y.jpg", "x.jpg", "z.jpg"), (0, 1, 1))


def test_numbers_in_a_csv_are_used_as_labels(tmp_path: Path) -> None:
    listing = listed(tmp_path, "x.jpg,10\ny.jpg,2\nz.jpg,2\n")
    assert (listing.files, listing.labels) == (("y.jpg", "z.jpg", "x.jpg"), (2, 2, 10))
    assert listing.class_names == tuple(map(str, range(11)))


def test_images_without_a_label_and_labels_without_an_image_are_reported(tmp_path: Path) -> None:
    listing = listed(tmp_path, "filename,label\nx.jpg,dog\nnone.jpg,cat\nz.jpg,cat\nz.jpg,cat\n")
    assert (listing.files, listing.class_names) == (("z.jpg", "x.jpg"), ("cat", "dog"))
    assert dict(listing.skipped) == {"y.jpg": "no label in labels.csv", "none.jpg": "in labels.csv, but there is no such image"}


@pytest.mark.parametrize(
    ("labels", "suffix", "message"),
    [
        ("", "csv", "holds no rows"),
        ("filename,label\n", "csv", "holds no rows"),
        ("filename\nx.jpg\n", "csv", "row 1 has no label"),
        ("x.jpg,dog\ny.jpg\n", "csv", "row 2 has no label"),
        ("x.jpg,dog\ny.jpg,\n", "csv", "row 2 has no label"),
        ("x.jpg,dog\n,cat\n", "csv", "row 2 has no file name"),
        ("x.jpg,dog\nx.jpg,cat\n", "csv", "line 2 gives x.jpg the label 'cat', an earlier one 'dog'"),
        ("x.jpg,dog\na/x.jpg,cat\n", "csv", "gives x.jpg two labels, 'dog' and 'cat'"),
        ("u.jpg,dog\n", "csv", "labels none of the 3 images"),
        ("x.jpg,99999999\n", "csv", "label 99999999: numbers are class numbers from 0"),
        ('x.jpg,"dog\ny.jpg,cat\n', "csv", "is not valid CSV: line 2: .*a quotation mark left open"),
        ("", "txt", "is empty"),
        ("dog\ncat\n", "txt", r"2 labels in order for 3 images .* \(the first: x.jpg\)"),
        ("x.jpg dog\ncat\n", "txt", "line 2 does not have the columns of the first one"),
    ],
)
def test_a_mistake_in_a_label_file_is_a_one_line_error(labels: str, suffix: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"labels.{suffix}: .*{message}"):
        listed(tmp_path, labels, suffix=suffix)


def test_label_files_that_are_missing_foreign_or_given_twice_are_a_one_line_error(archives: Path, tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none.csv", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"{path}: cannot be read \\({message}"):
            list_images(archives / VAL, labels=path)
    with pytest.raises(UserError, match="--labels and --devkit: both give labels"):
        list_images(archives / VAL, labels=archives / VAL, devkit=archives / DEVKIT)
    for kit, message in (
        (archives / VAL, "holds no data/"),
        (Path(__file__), "cannot be read as the development kit"),
        (tmp_path, "cannot be"),
    ):
        with pytest.raises(UserError, match=message):
            list_images(archives / VAL, devkit=kit)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.mat").write_bytes(b"no MATLAB file")
    (tmp_path / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n")
    with pytest.raises(UserError, match="meta.mat is not the kit's"):
        list_images(archives / VAL, devkit=tmp_path)


# ---- what a listing is


def test_a_location_reads_only_its_own_bytes_and_notices_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert ImageLocation("n", path).read() == b"0123456789"
    assert ImageLocation("n", path, 3, 4).read() == b"3456"
    with pytest.raises(OSError, match="has 2 of 4 bytes at offset 8: it was cut or replaced"):
        ImageLocation("n", path, 8, 4).read()
    with pytest.raises(FileNotFoundError):
        ImageLocation("n", tmp_path / "none").read()


def test_the_digest_changes_with_names_sizes_and_labels(make_folder: Callable[..., Path]) -> None:
    root = make_folder(a_jpg=b"12", b_jpg=b"3")
    digests = {list_image_folder(root).digest()}
    (root / "class" / "a.jpg").write_bytes(b"123")
    digests.add(list_image_folder(root).digest())
    (root / "class" / "a.jpg").rename(root / "class" / "aa.jpg")
    digests.add(list_image_folder(root).digest())
    (root / "another").mkdir()
    (root / "another" / "x.jpg").write_bytes(b"")
    listing = list_image_folder(root)
    digests.add(listing.restricted([1, 2]).digest())
    assert len(digests) == 4
    (root / "class" / "b.jpg").unlink()
    with pytest.raises(UserError, match="class/b.jpg: was listed a moment ago and is gone"):
        listing.digest()
