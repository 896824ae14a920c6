"""Tests of label files in the wild: columns are detected by headers and image names, shown to the user, or refused if ambiguous."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastbyol.config.errors import UserError
from fastbyol.data.inputs.images import list_images
from fastbyol.data.inputs.listing import ImageListing
from fastbyol.data.inputs.subset import restrict
from tests.commands import run_here
from tests.images import write_files


def images(root: Path, *names: str) -> Path:
    return write_files(root, dict.fromkeys(names, b"x"))


def labelled(tmp_path: Path, content: str | bytes, *names: str, file: str = "labels.csv", **columns: str) -> ImageListing:
    (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    return list_images(images(tmp_path / "data", *names), labels=tmp_path / file, **columns)


def classes_of(listing: ImageListing) -> dict[str, str]:
    return {name: listing.class_names[label] for name, label in zip(listing.files, listing.labels, strict=True)}


XYZ = ("x.jpg", "y.jpg", "z.jpg")
CAT_DOG = {"x.jpg": "cat", "y.jpg": "dog", "z.jpg": "cat"}


@pytest.mark.parametrize(
    ("content", "file"),
    [
        ("image,width,label\nx.jpg,40,cat\ny.jpg,41,dog\nz.jpg,40,cat\n", "labels.csv"),
        (",filename,split,category\n0,x.jpg,val,cat\n1,y.jpg,val,dog\n2,z.jpg,val,cat\n", "labels.csv"),
        ("Unnamed: 0,Image Path,Class\n0,x.jpg,cat\n1,y.jpg,dog\n2,z.jpg,cat\n", "labels.csv"),
        ("sep=;\r\nImage Index;Label\r\nx.jpg;cat\r\ny.jpg;dog\r\nz.jpg;cat\r\n", "labels.csv"),
        ("id,breed\nx,cat\ny,dog\nz,cat\n", "labels.csv"),
        ("imgs,what\nx,cat\ny,dog\nz,cat\n", "labels.csv"),  # words of no known header
        ("x,cat\ny,dog\nz,cat\n", "labels.csv"),  # no header, no extensions
        ("cat,x.jpg\ndog,y.jpg\ncat,z.jpg\n", "labels.csv"),
        ("# filename label\nx.jpg cat\ny.jpg dog\nz.jpg cat\n", "labels.txt"),
        ("cat x.jpg\ndog y.jpg\ncat z.jpg\n", "labels.txt"),
        ("x.jpg,cat\ny.jpg,dog\nz.jpg,cat\n", "labels.txt"),
        ("filename size label\nx.jpg 4 cat\ny.jpg 5 dog\nz.jpg 4 cat\n", "labels.txt"),
        ("label\ncat\ndog\ncat\n", "labels.txt"),
        ("x.jpg|cat\ry.jpg|dog\rz.jpg|cat\r", "labels.txt"),
        ("\ufefffilename;label\r\nx.jpg;cat\r\n\r\ny.jpg;dog\r\nz.jpg;cat".encode("utf-16"), "labels.csv"),
        ("filename\tlabel\nx.jpg\tcat\ny.jpg\tdog\nz.jpg\tcat\n", "labels.tsv"),
        ("path,label\n/data/old/x.jpg,cat\nC:\\pics\\y.jpg,dog\n../z.jpg,cat\n", "labels.csv"),
    ],
)
def test_the_names_of_columns_and_images_decide_how_a_file_is_read(content: str | bytes, file: str, tmp_path: Path) -> None:
    listing = labelled(tmp_path, content, *XYZ, file=file)
    assert classes_of(listing) == CAT_DOG
    assert listing.class_names == ("cat", "dog")
    assert "3 images labelled, 0 images without an entry, 0 entries without an image, 2 classes; 'x.jpg' is 'cat'" in listing.notes[-1]


@pytest.mark.parametrize(
    ("content", "file"),
    [
        ('image,label\n"a, b.jpg","tench, Tinca tinca"\n#1.jpg,golden retriever\nmy dog.jpg,golden retriever\n', "labels.csv"),
        ("a, b.jpg;tench, Tinca tinca\n#1.jpg;golden retriever\nmy dog.jpg;golden retriever\n", "labels.csv"),
        ("a, b.jpg\ttench, Tinca tinca\n#1.jpg\tgolden retriever\nmy dog.jpg\tgolden retriever\n", "labels.txt"),
        ("a, b.jpg tench, Tinca tinca\n#1.jpg golden retriever\nmy dog.jpg golden retriever\n", "labels.txt"),
        ("golden retriever #1.jpg\ngolden retriever my dog.jpg\ntench, Tinca tinca a, b.jpg\n", "labels.txt"),
        ("golden retriever\ntench, Tinca tinca\ngolden retriever\n", "labels.txt"),
    ],
)
def test_names_and_classes_may_contain_blanks_commas_and_number_signs(content: str, file: str, tmp_path: Path) -> None:
    assert classes_of(labelled(tmp_path, content, "a, b.jpg", "#1.jpg", "my dog.jpg", file=file)) == {
        "a, b.jpg": "tench, Tinca tinca",
        "#1.jpg": "golden retriever",
        "my dog.jpg": "golden retriever",
    }


def test_numeric_classes_are_sorted_by_value(tmp_path: Path) -> None:
    names = tuple(f"{i:02d}.jpg" for i in range(12))
    rows = {name: i for i, name in enumerate(names)}
    for content, file in (
        ("filename\tlabel\n" + "".join(f"{name}\t{i}\n" for name, i in rows.items()), "labels.txt"),
        ("filename,label\n" + "".join(f"{name},{i}.0\n" for name, i in rows.items()), "labels.csv"),  # pandas, where a value was missing
        ("label\n" + "".join(f"{i}\n" for i in rows.values()), "list.txt"),
    ):
        listing = labelled(tmp_path, content, *names, file=file)
        assert listing.class_names == tuple(map(str, range(12)))
        assert dict(zip(listing.files, listing.labels, strict=True)) == rows
    endless = labelled(tmp_path, "00.jpg,8\n01.jpg,7\n02.jpg," + "9" * 5000, *names)  # more digits than int() takes: a name
    assert endless.class_names == ("7", "8", "9" * 5000)
    words = labelled(tmp_path, "00.jpg,none\n01.jpg,cat\n02.jpg,none", *names)
    assert words.class_names == ("cat", "none")
    below = labelled(tmp_path, "filename,label\n" + "".join(f"{name},{i - 1}\n" for name, i in rows.items()), *names)
    assert below.class_names == tuple(map(str, range(-1, 11)))


@pytest.mark.parametrize(
    ("content", "file", "message"),
    [
        (
            "image,width,height\nx.jpg,40,30\n",
            "labels.csv",
            "which column is the class. its first row has 'image', 'width', 'height', its second",
        ),
        ("image,label,target\nx.jpg,1,2\n", "labels.csv", "which column is the class.*--label-column"),
        ("image,width\nx.jpg,40\ny.jpg,41\n", "labels.csv", "which column is the class"),
        (",filename\n0,x.jpg\n1,y.jpg\n2,z.jpg\n", "labels.csv", "which column is the class"),
        ("0,x.jpg\n1,y.jpg\n2,z.jpg\n", "labels.csv", "column 1 numbers the rows: which column is the class"),
        ("1 x.jpg\n2 y.jpg\n3 z.jpg\n", "labels.txt", "column 1 numbers the rows"),
        ("0,x.jpg,cat\n1,y.jpg,dog\n", "labels.csv", "which column is the class.*'0', 'x.jpg', 'cat'"),
        ("x.jpg 4 cat\ny.jpg 5 dog\n", "labels.txt", "which column is the class"),
        ("x.jpg,a cat, white\ny.jpg,a dog, black\n", "labels.csv", "which column is the class"),
        ("filename,label\nx.jpg,tench, Tinca tinca\n", "labels.csv", "row 2 has 3 columns, the first has 2: .*quotation marks"),
        ('filename,label\nx.jpg,"cat\ny.jpg,dog\n', "labels.csv", "is a quotation mark left open"),
        ('filename,label\nx.jpg,"c\nat"\ny.jpg,dog\n', "labels.csv", "a line break in 'x.jpg', 'c.nat'"),
        ("x.jpg\ny.jpg\nz.jpg\n", "labels.txt", "there is one column"),
        ("x\ny\nz\n", "labels.txt", "names images but no classes"),
        ("filename,label\n".encode("utf-16-le") + b"x\0", "labels.csv", "holds zero bytes.*UTF-16"),
        (b"\xff\xfex", "labels.csv", "is not valid UTF-16"),
        ("filename,label\nu.jpg,cat\nv.jpg,dog\n", "labels.csv", "labels none of the 3 images"),
        ("filename,label\nx.jpg,0\ny.jpg,NaN\nz.jpg,10\n", "labels.csv", "gives 'NaN' for a class, where the others are numbers"),
        ("x.jpg cat " * 110_000, "labels.txt", "line 1 has more than 1,048,576 characters"),
    ],
)
def test_an_ambiguous_label_file_is_refused_and_its_first_rows_are_shown(
    content: str | bytes, file: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"(?s)^[^\n]*{file}: .*{message}"):
        labelled(tmp_path, content, *XYZ, file=file)


def test_the_user_chooses_a_column_by_name_or_number(tmp_path: Path) -> None:
    content = "image,label,target\nx.jpg,1,cat\ny.jpg,0,dog\nz.jpg,1,cat\n"
    for column in ("target", "Target", "3"):
        assert classes_of(labelled(tmp_path, content, *XYZ, label_column=column)) == CAT_DOG
    bare = "0,x.jpg,cat\n1,y.jpg,dog\n2,z.jpg,cat\n"
    assert classes_of(labelled(tmp_path, bare, *XYZ, label_column="3")) == CAT_DOG
    assert labelled(tmp_path, bare, *XYZ, path_column="2", label_column="1").class_names == ("0", "1", "2")
    with pytest.raises(UserError, match="--label-column breed: .*labels.csv has no column of this name; its first row has 'image'"):
        labelled(tmp_path, content, *XYZ, label_column="breed")
    with pytest.raises(UserError, match="cannot be the same column"):
        labelled(tmp_path, content, *XYZ, path_column="1", label_column="image")
    with pytest.raises(UserError, match="--label-column: has no effect without a table of images"):
        list_images(tmp_path / "data", label_column="1")


def test_names_are_matched_by_their_last_parts_and_an_ambiguous_one_is_an_error(tmp_path: Path) -> None:
    names = ("a/1.jpg", "b/1.jpg", "b/only.jpg")
    content = "file,label\n/old/a/1.jpg,cat\n./b/1,dog\nval/only.jpg,cat\na/gone.jpg,cat\na/only.jpg,cat\n"
    listing = labelled(tmp_path, content, *names)
    assert classes_of(listing) == {"a/1.jpg": "cat", "b/1.jpg": "dog", "b/only.jpg": "cat"}
    assert {name for name, _ in listing.skipped} == {"a/gone.jpg", "a/only.jpg"}  # a/ is a folder, which has no such image
    assert "2 entries without an image (the first: 'a/gone.jpg')" in listing.notes[-1]
    with pytest.raises(UserError, match="line 2 names x/1.jpg, which could be several images"):
        labelled(tmp_path, "file,label\nx/1.jpg,cat\n", *names)
    with pytest.raises(UserError, match="line 3 names z/only.jpg, which could be several"):
        labelled(tmp_path, "file,label\ny/only.jpg,cat\nz/only.jpg,dog\n", *names)


def test_names_of_too_many_folders_match_no_image_and_are_counted(tmp_path: Path) -> None:
    deep = "c/" * 20_000 + "x.jpg"  # all its ends took 290 MiB
    listing = labelled(tmp_path, f"file,label\n{deep},dog\nx.jpg,cat\ny.jpg,dog\nz.jpg,cat\n", *XYZ)
    assert classes_of(listing) == CAT_DOG
    assert "1 entries without an image (the first: 'c/c/" in listing.notes[-1]
    assert len(listing.notes[-1]) < 2000
    with pytest.raises(UserError, match="1 of its 1 names are not images of") as raised:
        restrict(listing, [deep], source=tmp_path / "list.txt")
    assert len(str(raised.value)) < 2000


def test_an_absolute_name_inside_the_data_folder_matches_that_file(tmp_path: Path) -> None:
    root = tmp_path / "data"
    content = f"file,label\n{root}/1.jpg,cat\n{root}/a/1.jpg,dog\n"
    assert classes_of(labelled(tmp_path, content, "1.jpg", "a/1.jpg")) == {"1.jpg": "cat", "a/1.jpg": "dog"}


def test_the_commands_print_how_labels_were_read_and_what_does_not_match(tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("image,width,label\nx.jpg,40,cat\nnone.jpg,40,dog\n")
    data = images(tmp_path / "data", *XYZ)
    done = run_here("subset.py", "--data", data, "--labels", labels, "--images", "1", "--out", tmp_path / "list")
    assert done.returncode == 0
    understood = "column 'image' names the image, column 'label' the class"
    counts = (
        "1 images labelled, 2 images without an entry, 1 entries without an image (the first: 'none.jpg'), 1 of 2 classes; 'x.jpg' is 'cat'"
    )
    assert understood in done.stderr
    assert counts in done.stderr
    found = json.loads(run_here("info.py", data, "--labels", labels, "--label_column", "width", "--json").stdout)
    assert found["class_names"][-1] == "40"
    assert "column 'width' the class" in found["notes"][0]
