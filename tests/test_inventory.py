"""Tests of a data set's statistics: the same before and after conversion, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbyol.data.inputs.folder import list_image_folder
from fastbyol.data.inspection import inventory
from fastbyol.data.inspection.inventory import take_inventory
from fastbyol.data.inspection.picture_grid import LABEL_PX, MARGIN_PX, TILE_PX, write_picture_grid
from tests.commands import run_here
from tests.imagenet_archives import DEVKIT, VAL, write_archives


def test_the_statistics_are_the_same_for_a_folder_a_beton_and_shards(image_folder: Path, beton: Path, tar_folder: Path) -> None:
    sizes = [Image.open(path).size for path in image_folder.rglob("*.jpg")]
    num_bytes = sum(path.stat().st_size for path in image_folder.rglob("*.jpg"))
    width, height = np.array(sizes).T
    for path, listing in ((image_folder, list_image_folder(image_folder)), (beton, None), (tar_folder, None)):
        found = take_inventory(listing or path, shown=str(path))
        assert (found.images, found.classes, found.class_names, found.class_counts) == (25, 3, ("ant", "bee", "cat"), (8, 9, 8))
        assert (found.class_min, found.class_median, found.class_max, found.empty_classes) == (8, 8.0, 9, 0)
        assert (found.image_bytes, found.skipped) == (num_bytes, 0)
        assert found.sides is not None
        assert (found.sides.width_min, found.sides.width_max) == (width.min(), width.max())
        assert (found.sides.height_median, found.sides.looked_at) == (int(np.median(height)), 25)
        assert found.sides.bytes_per_pixel == pytest.approx(num_bytes / (width * height).sum(), abs=1e-4)
        assert (found.manifest is None) == (listing is not None)


def test_sides_of_a_large_set_are_measured_on_a_sample(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "SAMPLED", 7)
    found = take_inventory(list_image_folder(image_folder), shown=str(image_folder))
    assert found.sides is not None
    assert (found.images, found.sides.looked_at) == (25, 7)


def test_the_command_prints_a_table_or_json(beton: Path, tmp_path: Path) -> None:
    done = run_here("info.py", beton)
    assert (done.returncode, done.stderr) == (0, "")
    words = " ".join(done.stdout.split())
    for part in ("images 25", "classes 3: ant, bee, cat", "per class 8 to 9, median 8", "shards 1 of", "settings page_bytes 8388608"):
        assert part in words
    numbers = json.loads(run_here("info.py", beton, "--json").stdout)
    assert (numbers["class_counts"], numbers["kind"]) == ([8, 9, 8], "beton")
    write_archives(tmp_path)
    assert "images 8 classes 3" in " ".join(run_here("info.py", tmp_path / VAL, "--devkit", tmp_path / DEVKIT).stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none: no such file or folder"),
        (["BETON", "--subset", "x"], "is converted and has its labels"),
        (["BETON", "--grid", "x.jpg"], "must end in .png"),
        (["BETON", "--grid", "none/x.png"], "none/x.png: cannot be written"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, beton: Path) -> None:
    done = run_here("info.py", *(str(beton) if argument == "BETON" else argument for argument in arguments))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert message in done.stderr


def test_the_picture_shows_each_image_in_its_row_and_marks_one_that_does_not_decode(tmp_path: Path) -> None:
    colours = {("a", 0): (200, 0, 0), ("a", 1): (0, 200, 0), ("b", 0): (0, 0, 200)}
    for (name, number), colour in colours.items():
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 60), colour).save(tmp_path / "data" / name / f"{number}.png")
    (tmp_path / "data" / "b" / "1.jpg").write_bytes(b"no image")
    write_picture_grid(list_image_folder(tmp_path / "data"), out=tmp_path / "grid.png")
    sheet = Image.open(tmp_path / "grid.png").convert("RGB")
    for (name, number), colour in colours.items():
        x = LABEL_PX + number * (TILE_PX + MARGIN_PX) + TILE_PX // 2
        y = MARGIN_PX + "ab".index(name) * (TILE_PX + MARGIN_PX) + TILE_PX // 2
        assert sheet.getpixel((x, y)) == colour
    empty = sheet.crop((LABEL_PX + TILE_PX + MARGIN_PX, 2 * MARGIN_PX + TILE_PX, LABEL_PX + 2 * TILE_PX, MARGIN_PX + 2 * TILE_PX))
    assert empty.getcolors(256) is not None
    assert len(empty.getcolors(256) or []) > 1  # words, no picture
