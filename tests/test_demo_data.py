"""Tests of the demo images: byte-identical for one seed, readable as an ImageFolder, with correct annotations; mistakes are one line."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from fastbyol.config.errors import UserError
from fastbyol.data.demo import fashion, scene_layouts, scenes
from fastbyol.data.demo.folder import MANIFEST, DemoSettings, image_rng, write_image_folder
from tests.commands import run_here

SMALL = DemoSettings(train_per_class=2, val_per_class=1, seed=5)
FASHION_ALPHABETICAL = ["ankle_boot", "bag", "coat", "dress", "pullover", "sandal", "shirt", "sneaker", "t_shirt_top", "trouser"]


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces Debian's package: three photographs per class, each a bright square whose width in px tells its label."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    labels = np.tile(np.arange(10, dtype=np.uint8), 3)
    images = np.zeros((30, 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[8 : 10 + label, 8 : 10 + label] = 200
    for prefix in ("train", "t10k"):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", folder)
    return folder


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_fashion_is_the_same_bytes_for_the_same_seed_and_an_image_folder_of_ten_named_classes(photographs: Path, tmp_path: Path) -> None:
    for name in ("first", "again"):
        fashion.write_fashion(tmp_path / name, settings=SMALL, overwrite=False)
    assert digest(tmp_path / "first") == digest(tmp_path / "again")
    for split, count in (("train", 2), ("val", 1)):
        folder = datasets.ImageFolder(str(tmp_path / "first" / split))
        assert folder.classes == FASHION_ALPHABETICAL
        assert np.bincount(folder.targets).tolist() == [count] * 10
        assert {folder[i][0].size for i in range(len(folder))} == {(40, 40)}


def test_every_fashion_folder_holds_the_photographs_of_its_own_label(photographs: Path, tmp_path: Path) -> None:
    fashion.write_fashion(tmp_path / "out", settings=SMALL, overwrite=False)
    for label, name in enumerate(fashion.CLASS_NAMES):
        image = np.asarray(Image.open(tmp_path / "out" / "train" / name / "00000.jpg"))[:, :, 0].astype(float)
        side_px = np.sqrt(image.sum() / 200)
        assert 0.85 * (2 + label) - 0.5 < side_px < 1.25 * (2 + label) + 0.5


def test_another_seed_and_the_other_split_place_the_same_photograph_elsewhere(photographs: Path, tmp_path: Path) -> None:
    fashion.write_fashion(tmp_path / "a", settings=SMALL, overwrite=False)
    fashion.write_fashion(tmp_path / "b", settings=DemoSettings(2, 1, seed=6), overwrite=False)
    a, b = digest(tmp_path / "a"), digest(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(a[name] != b[name] for name in a)
    assert a["train/bag/00000.jpg"] != a["val/bag/00000.jpg"]


def test_asking_for_more_images_keeps_the_first_ones(photographs: Path, tmp_path: Path) -> None:
    fashion.write_fashion(tmp_path / "few", settings=SMALL, overwrite=False)
    fashion.write_fashion(tmp_path / "more", settings=DemoSettings(3, 2, seed=5), overwrite=False)
    assert digest(tmp_path / "few").items() <= digest(tmp_path / "more").items()


def test_a_photograph_keeps_its_total_brightness_wherever_it_is_placed() -> None:
    photograph = np.zeros((28, 28), dtype=np.uint8)
    photograph[6:22, 6:22] = 160
    centres = []
    for seed in range(60):
        image = fashion.make_photograph_on_canvas(photograph, rng=np.random.default_rng(seed)).astype(float)
        assert image.shape == (40, 40, 3)
        assert (image[..., 0] == image[..., 1]).all()
        assert (image[..., 0] == image[..., 2]).all()
        scale = np.random.default_rng(seed).uniform(*fashion.SCALE)
        assert image[..., 0].sum() == pytest.approx(160 * 256 * scale**2, rel=0.04)
        centres.append((image[..., 0] * np.arange(40)).sum() / image[..., 0].sum())
    # Uniform within +-(40 - 28 s) / 2 px for s in 0.85..1.25: a spread of 5 px in the mean.
    assert 3.0 < np.std(centres) < 5.0


def test_placing_without_change_reproduces_the_photograph_in_the_middle() -> None:
    photograph = np.kron(np.random.default_rng(0).integers(0, 256, (7, 7)), np.ones((4, 4))).astype(np.uint8)
    placed = fashion._place(photograph, scale=1.0, angle=0.0, centre=np.array([20.0, 20.0]))
    assert placed.shape == (40, 40)
    # Away from the edges of the 4x4 blocks, where resampling may overshoot.
    inner = np.ix_(np.arange(40)[np.arange(40) % 4 >= 2], np.arange(40)[np.arange(40) % 4 >= 2])
    difference = placed.astype(int) - np.pad(photograph, 6).astype(int)
    assert np.abs(difference[inner]).mean() < 12
    turned = fashion._place(photograph, scale=1.0, angle=np.pi / 2, centre=np.array([20.0, 20.0]))
    assert np.abs(turned.astype(int) - np.rot90(placed, -1).astype(int)).max() <= 1


def test_idx_files_are_read_with_their_shape(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "a.gz", array)
    np.testing.assert_array_equal(fashion.read_idx(tmp_path / "a.gz"), array)
    (tmp_path / "plain").write_bytes(gzip.decompress((tmp_path / "a.gz").read_bytes()))
    np.testing.assert_array_equal(fashion.read_idx(tmp_path / "plain"), array)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG\r\n\x1a\n", "not an IDX file"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 1, 0]), "not an IDX file"),
        (bytes([0, 0, 8, 3, 0, 0, 0, 1]), "not an IDX file"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2]), "holds 2 values where its header announces 3"),
        (bytes([0, 0, 8, 2]) + b"\xff" * 8 + b"\x00", "holds 1 values"),
    ],
)
def test_a_foreign_or_truncated_idx_file_is_a_user_error(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=says):
        fashion.read_idx(tmp_path / "file")


def test_damaged_gzip_data_and_a_missing_file_are_user_errors(tmp_path: Path) -> None:
    whole = gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 200]) + bytes(range(200)))
    for name, content in (("cut", whole[:60]), ("foreign", b"no gzip"), ("damaged", whole[:12] + bytes(60) + whole[72:])):
        (tmp_path / f"{name}.gz").write_bytes(content)
        with pytest.raises(UserError, match="can't be read"):
            fashion.read_idx(tmp_path / f"{name}.gz")
    with pytest.raises(UserError, match="can't be read"):
        fashion.read_idx(tmp_path / "missing.gz")


def test_without_package_and_network_the_error_names_all_three_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "FashionMNIST", no_network)
    with pytest.raises(UserError, match=r"apt-get install dataset-fashion-mnist.*download.*--kind scenes"):
        fashion.find_photographs()


def test_without_the_package_photographs_come_from_torchvisions_download(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(root: str, *, download: bool) -> None:
        assert download
        (Path(root) / "FashionMNIST").mkdir(parents=True)
        photographs.rename(Path(root) / "FashionMNIST" / "raw")

    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "FashionMNIST", download)
    fashion.write_fashion(tmp_path / "out", settings=SMALL, overwrite=False)
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 30


def test_asking_for_more_photographs_than_exist_is_a_user_error(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="val-per-class = 4: there are 3 photographs"):
        fashion.write_fashion(tmp_path / "out", settings=DemoSettings(1, 4), overwrite=False)
    assert not (tmp_path / "out").exists()


def test_scenes_are_the_same_bytes_for_the_same_seed_with_annotations_beside_each_image(tmp_path: Path) -> None:
    for name in ("first", "again"):
        scenes.write_scenes(tmp_path / name, settings=SMALL, overwrite=False)
    assert digest(tmp_path / "first") == digest(tmp_path / "again")
    for split, count in (("train", 2), ("val", 1)):
        folder = datasets.ImageFolder(str(tmp_path / "first" / split))
        assert tuple(folder.classes) == scenes.CLASS_NAMES
        assert np.bincount(folder.targets).tolist() == [count] * 16
        for path, label in folder.samples:
            annotations = tmp_path / "first" / "annotations" / split / scenes.CLASS_NAMES[label]
            check_annotations(annotations, Path(path).stem, label)


def check_annotations(annotations: Path, name: str, label: int) -> None:
    mask = np.asarray(Image.open(annotations / f"{name}_mask.png"))
    depth = np.asarray(Image.open(annotations / f"{name}_depth.png"))
    assert mask.shape == depth.shape == (48, 48)
    assert depth.dtype == np.uint16
    assert set(np.unique(mask)) == {0, label + 1}
    (x_min, y_min, x_max, y_max), *others = json.loads((annotations / "boxes.json").read_text())[name]
    assert not others
    outside = mask.copy()
    outside[y_min:y_max, x_min:x_max] = 0
    assert not outside.any()
    inside = mask[y_min:y_max, x_min:x_max]
    assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
    assert depth[mask > 0].max() <= 2700 < 4500 <= depth[mask == 0].min()
    assert depth[mask > 0].min() >= 1600
    assert depth.max() <= 8000


def test_scenes_lie_in_vocs_and_nyus_layout_too_with_the_same_masks_boxes_and_depths(tmp_path: Path) -> None:
    scenes.write_scenes(tmp_path / "out", settings=SMALL, overwrite=False)
    voc, nyu = tmp_path / "out" / "voc", tmp_path / "out" / "nyu"
    assert (voc / "classes.txt").read_text().split() == list(scenes.CLASS_NAMES)
    for split, per_class in (("train", 2), ("val", 1)):
        listed = (voc / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
        assert listed == (voc / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
        assert len(listed) == 16 * per_class
        for identity in listed:
            _, name = identity.split("_", 1)
            class_name, number = name.rsplit("_", 1)
            own = tmp_path / "out" / "annotations" / split / class_name
            image = tmp_path / "out" / split / class_name / f"{number}.jpg"
            assert (voc / "JPEGImages" / f"{identity}.jpg").read_bytes() == image.read_bytes()
            assert (nyu / split / "images" / f"{identity}.jpg").read_bytes() == image.read_bytes()
            assert (nyu / split / "depth" / f"{identity}.png").read_bytes() == (own / f"{number}_depth.png").read_bytes()
            mask = Image.open(voc / "SegmentationClass" / f"{identity}.png")
            assert mask.mode == "P"
            assert mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
            np.testing.assert_array_equal(np.asarray(mask), np.asarray(Image.open(own / f"{number}_mask.png")))
            found = ElementTree.parse(voc / "Annotations" / f"{identity}.xml").getroot().findall("object")
            assert [each.findtext("name") for each in found] == [class_name]
            corners = [int(found[0].findtext(f"bndbox/{corner}") or 0) for corner in ("xmin", "ymin", "xmax", "ymax")]
            # VOC counts pixels from 1, and its last corner is inside the box.
            x_min, y_min, x_max, y_max = json.loads((own / "boxes.json").read_text())[number][0]
            assert corners == [x_min + 1, y_min + 1, x_max, y_max]
            nearest = np.asarray(Image.open(own / f"{number}_depth.png"))[np.asarray(mask) > 0].min()
            assert found[0].findtext("difficult") == str(int(nearest > 2400))


def test_vocs_palette_has_the_devkits_first_colours() -> None:
    assert scene_layouts.voc_palette()[[0, 1, 15, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [192, 128, 128],
        [0, 64, 128],
        [224, 224, 192],
    ]


def test_another_seed_draws_other_scenes() -> None:
    def first(seed: int, split: str) -> np.ndarray:
        return scenes.draw_scene(3, rng=image_rng(seed, split, 3, 0)).image

    assert not np.array_equal(first(0, "train"), first(1, "train"))
    assert not np.array_equal(first(0, "train"), first(0, "val"))


@pytest.mark.parametrize("label", range(16))
def test_all_shapes_have_the_same_area_which_falls_with_the_square_of_distance(label: int) -> None:
    for seed in range(8):
        scene = scenes.draw_scene(label, rng=np.random.default_rng(seed))
        # The rim has no relief: its depth is the object's distance.
        radius_px = 32.0 / scene.depth[scene.mask].max()
        assert scene.mask.sum() / radius_px**2 == pytest.approx(2.04, rel=0.12)


def test_backgrounds_are_grey_and_low_in_contrast_and_objects_are_not() -> None:
    drawn = [scenes.draw_scene(label, rng=np.random.default_rng(label)) for label in range(16)]
    pixels = [(scene.image[scene.mask].astype(float), scene.image[~scene.mask].astype(float)) for scene in drawn]
    chroma = np.array([[np.ptp(part, axis=1).mean() for part in pair] for pair in pixels]).mean(axis=0)
    contrast = np.array([part.mean(axis=1).std() for _, part in pixels])
    assert chroma[0] > 3 * chroma[1]
    assert contrast.max() < 40


def test_each_shape_has_the_number_of_corners_of_its_name() -> None:
    v, u = np.mgrid[-1.5:1.5:301j, -1.5:1.5:301j].astype(np.float32)
    angle = np.linspace(0, 2 * np.pi, 721)[:-1]

    def turning_points(shape: str) -> int:
        """Returns the number of outer corners: local maxima of the outline's distance from the centre."""
        inside = scenes._SHAPES[shape](u, v) > 0
        steps = np.linspace(0, 1.45, 300)
        rows = np.round((steps * np.sin(angle)[:, None] + 1.5) * 100).astype(int)
        columns = np.round((steps * np.cos(angle)[:, None] + 1.5) * 100).astype(int)
        reach = (inside[rows, columns] * steps).max(axis=1)
        above = reach > (reach.max() + reach.min()) / 2
        return int((above & ~np.roll(above, 1)).sum()) if np.ptp(reach) > 0.1 else 0

    assert {shape: turning_points(shape) for shape in scenes.SHAPES} == {"cross": 4, "disc": 0, "star": 5, "triangle": 3}


def test_existing_output_is_refused_replaced_on_request_and_never_deleted_when_it_is_not_ours(tmp_path: Path) -> None:
    out, one = tmp_path / "out", DemoSettings(1, 1)
    out.mkdir()
    scenes.write_scenes(out, settings=one, overwrite=False)
    with pytest.raises(UserError, match="--overwrite"):
        scenes.write_scenes(out, settings=SMALL, overwrite=False)
    assert len(list((out / "train").rglob("*.jpg"))) == 16
    scenes.write_scenes(out, settings=SMALL, overwrite=True)
    assert len(list((out / "train").rglob("*.jpg"))) == 32
    assert json.loads((out / "demo_data.json").read_text()) == {"kind": "scenes", "train_per_class": 2, "val_per_class": 1, "seed": 5}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not made by demo_data"):
            scenes.write_scenes(tmp_path / "mine", settings=one, overwrite=overwrite)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "mine"}
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_failed_write_is_a_user_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    twice = [scenes.SceneClass("train", 0, seed=0, num_images=1)] * 2
    with pytest.raises(UserError, match="can't be written"):
        write_image_folder(tmp_path / "out", kind="scenes", class_writers=twice, settings=SMALL, overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kind", "cats"], "kind = 'cats': must be one of fashion, scenes"),
        (["--train-per-class", "0"], "train-per-class = 0"),
        (["--train-per-class", "many"], "invalid int value: 'many'"),
        (["--seed", "-1"], "seed = -1"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--out", "/"], "exists and was not made by demo_data.py"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments: list[str], says: str, tmp_path: Path) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    result = run_here("demo_data.py", *out, *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("fastbyol: error: ")
    assert says in line
    assert not (tmp_path / "out").exists()


def test_the_script_makes_scenes_from_the_command_line_and_refuses_to_do_it_twice(tmp_path: Path) -> None:
    command = ["--out", str(tmp_path / "out"), "--kind", "scenes", "--train-per-class", "1", "--val-per-class", "1"]
    result = run_here("demo_data.py", *command)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(datasets.ImageFolder(str(tmp_path / "out" / "train"))) == 16
    again = run_here("demo_data.py", *command)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_an_output_that_may_not_be_replaced_is_refused_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion, "find_photographs", lambda: pytest.fail("looked for the photographs first"))
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="exists and was not made by demo_data.py"):
        fashion.write_fashion(tmp_path, settings=SMALL, overwrite=True)
