"""`fastbyol views`: the picture shows what the loader draws, its captions name it, and mistakes end in one line."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbyol.__main__ import main
from fastbyol.augment import parameters as p
from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import PAPER, ViewPair
from fastbyol.data import build_image_loader, build_loader
from fastbyol.evaluation import contact_sheet
from fastbyol.evaluation.contact_sheet import caption, write_contact_sheet
from fastbyol.evaluation.gallery import display_pixels, draw_parameters_and_views
from tests.commands import files_no_larger_than

VIEWS = ViewPair(size_px=16)
SCALE = 7  # 112 / 16
COLUMN = contact_sheet.COLUMN_PX + contact_sheet.MARGIN_PX
ROW = 112 + contact_sheet.CAPTION_LINES * contact_sheet.LINE_PX + contact_sheet.MARGIN_PX
TOP = 2 * (contact_sheet.LINE_PX + contact_sheet.MARGIN_PX)


def tile(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    """Returns the picture at a position of the sheet, at its original size."""
    y, x = TOP + row * ROW, contact_sheet.LABEL_PX + column * COLUMN
    return sheet[y : y + 16 * SCALE : SCALE, x : x + 16 * SCALE : SCALE]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("backend", ["folder", "ffcv", "dali"])
def test_the_sheet_shows_the_centre_crop_and_the_views_of_the_loaders_own_epochs(
    backend: str, data_paths: dict[str, Path], tmp_path: Path
) -> None:
    path = data_paths[backend]
    write_contact_sheet([str(path)], out=tmp_path / "x.png", views=VIEWS, rows=2, epochs=2, seed=3)
    sheet = read(tmp_path / "x.png")
    assert sheet.shape == (TOP + 2 * ROW, contact_sheet.LABEL_PX + 5 * COLUMN + contact_sheet.MARGIN_PX, 3)
    chosen = torch.randperm(25, generator=torch.Generator().manual_seed(3))[:2].tolist()
    with build_image_loader(path, views=VIEWS, batch=25, workers=1) as images:
        centre = display_pixels(next(iter(images)).image, views=VIEWS)
    with build_loader(DataConfig(train=str(path), workers=1), views=VIEWS, seed=3, global_batch=5) as loader:
        for epoch in range(2):
            for batch in loader:
                for view in range(2):
                    pixels = display_pixels((batch.view1, batch.view2)[view], views=VIEWS)
                    for i in set(batch.index.tolist()) & set(chosen):
                        drawn = pixels[batch.index.tolist().index(i)]
                        np.testing.assert_array_equal(tile(sheet, chosen.index(i), 1 + 2 * epoch + view), drawn)
    for row, i in enumerate(chosen):
        np.testing.assert_array_equal(tile(sheet, row, 0), centre[i])


def test_several_sets_stand_beneath_one_another_image_by_image(data_paths: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "all.png"
    main(["views", "--data", *map(str, data_paths.values()), "--out", str(out), "--rows", "2", "--epochs", "1", "--views.size_px", "16"])
    sheet = read(out)
    for row in (0, 3):
        for column in range(3):
            assert tile(sheet, row, column).std() > 0
            for other in (1, 2):  # the fixture's three backends give equal bytes
                np.testing.assert_array_equal(tile(sheet, row + other, column), tile(sheet, row, column))
    assert (tile(sheet, 0, 0) != tile(sheet, 3, 0)).any()


def test_picked_images_are_those_of_a_pass_in_the_order_asked_for(image_folder: Path) -> None:
    with build_image_loader(image_folder, views=VIEWS, batch=25, workers=1) as images:
        whole, some = next(iter(images)), images.pick([7, 2, 7])
    assert some.index.tolist() == [7, 2, 7]
    assert torch.equal(some.image, whole.image[[7, 2, 7]])
    assert torch.equal(some.label, whole.label[[7, 2, 7]])


def test_parameters_come_with_the_views_they_belong_to(image_folder: Path) -> None:
    with build_loader(DataConfig(train=str(image_folder), workers=1), views=VIEWS, seed=1, global_batch=1) as loader:
        parameters, _ = draw_parameters_and_views(loader, index=[13, 2], epochs=2)
        sizes = [loader._renderer.source.sizes(np.array([i])) for i in (13, 2)]
    for row, i in enumerate((13, 2)):
        height, width = sizes[row]
        for epoch in range(2):
            expected = p.draw_parameters(VIEWS, seed=1, epoch=epoch, index=np.array([i]), height=height, width=width)[0]
            np.testing.assert_array_equal(parameters[row, 2 * epoch : 2 * epoch + 2], expected)


def row_of(**values: float) -> np.ndarray:
    neutral = {"crop_h": 20, "crop_w": 30, "order": -1, "contrast": 1, "saturation": 1, "solarize": 2} | values
    return np.array([neutral.get(name, 0) for name in p.COLUMNS], dtype=np.float32)


def test_a_caption_names_what_was_drawn_in_its_order_and_nothing_else() -> None:
    assert caption(row_of()) == ["30x20+0+0"]
    jitter = {"order": 3 * 64 + 0 * 16 + 2 * 4 + 1, "brightness": -0.25, "contrast": 1.5, "saturation": 0.75, "hue": 0.125}
    full = row_of(crop_x=4, crop_y=5, flip=1, gray=1, sigma=1.25, solarize=0.5, rotation_deg=-7, **jitter)
    assert caption(full) == [
        "30x20+4+5, flipped",
        "hue +0.125, bright -0.25",
        "satur x0.75, contrast x1.50",
        "turned -7 deg, gray, blur 1.25, solarized",
    ]
    assert caption(row_of(**{**jitter, "brightness": 1.25}), semantics="torchvision")[1] == "hue +0.125, bright x1.25"


def test_damaged_images_are_left_out_of_the_picture(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = shutil.copytree(image_folder, tmp_path / "images")
    damaged = sorted(folder.rglob("*.jpg"))[::2]
    for image in damaged:
        image.write_bytes(image.read_bytes()[:200])
    write_contact_sheet([str(folder)], out=tmp_path / "few.png", views=VIEWS, rows=25)
    whole = Image.open(tmp_path / "few.png").height
    write_contact_sheet([str(folder)], out=tmp_path / "one.png", views=VIEWS, rows=1)
    assert whole > 8 * Image.open(tmp_path / "one.png").height


def test_a_picture_that_cannot_be_finished_leaves_no_file(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "views.png"
    with files_no_larger_than(1000), pytest.raises(UserError, match="cannot be written"):
        write_contact_sheet([str(image_folder)], out=out, views=VIEWS)
    assert list(tmp_path.iterdir()) == []


def test_options_of_a_run_set_what_the_views_draw(beton: Path, tmp_path: Path) -> None:
    typed, given = tmp_path / "typed.png", tmp_path / "given.png"
    options = ["--preset", "imagenette_r18", "--views.size_px", "16", "--views.semantics", "torchvision", "--seed", "4"]
    main(["views", "--data", str(beton), "--out", str(typed), "--rows", "3", *options])
    for semantics in ("torchvision", "paper"):
        write_contact_sheet([str(beton)], out=given, views=replace(PAPER, size_px=16, semantics=semantics), rows=3, seed=4)
        assert (read(typed) == read(given)).all() == (semantics == "torchvision")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no/such", "--out", "x.png"], "--data = no/such: no such file or folder"),
        (["--data", "{beton}", "--out", "x.jpg"], "must end in .png"),
        (["--data", "{beton}", "--out", "no/such/x.png"], "cannot be written"),
        (["--data", "{beton}", "{other}", "--out", "x.png"], "do not hold the same images"),
        (["--data", "{beton}", "--out", "x.png", "--rows", "0"], "--rows = 0"),
        (["--data", "{beton}", "--out", "x.png", "--optim.base_lr", "1"], "--optim.base_lr: has no effect on views"),
        (["--data", "{beton}", "--out", "x.png", "--views.sizepx", "9"], "did you mean --views.size_px"),
        (["--data", "{beton}", "--out", "x.png", "--backend", "dali"], "use auto or ffcv"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str],
    message: str,
    beton: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "other" / name / "0.png")
    with pytest.raises(SystemExit) as stopped:
        main(["views", *(argument.format(beton=beton, other="other") for argument in arguments)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.glob("x*"))


def test_other_commands_still_refuse_unknown_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["presets", "--views.size_px=8"])
    assert "unrecognized arguments: --views.size_px=8" in capsys.readouterr().err


def test_sets_in_another_order_are_not_compared(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    for i in range(25):
        Image.new("RGB", (9, 9)).save(tmp_path / "only" / f"{i:02}.png")
    with pytest.raises(UserError, match="not hold the same"):
        write_contact_sheet([str(image_folder), str(tmp_path)], out=tmp_path / "x.png", views=VIEWS, rows=2)
