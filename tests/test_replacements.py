"""A training goes on past damaged original images, whose place the next image takes; converted data are not replaced."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import ViewBatch, build_image_loader, build_loader
from fastbyol.data.backends.source import DamagedImage
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.inputs import images
from fastbyol.data.loader import TwoViewLoader
from fastbyol.data.replacements import Replacements, damage_allowed
from fastbyol.run.checkpoint import checkpoint_steps
from fastbyol.train import main
from tests.commands import SMALL_RUN, LaunchedRun, state_digest
from tests.conftest import noisy_colours

VIEWS = ViewPair(size_px=16)


def opened(path: Path, *, global_batch: int = 4, workers: int = 2, **options: object) -> TwoViewLoader:
    config = DataConfig(train=str(path), workers=workers)
    settings: dict = {"views": VIEWS, "seed": 5, "global_batch": global_batch, "replace_damaged": True} | options
    return build_loader(config, **settings)


def damage(path: Path, how: str) -> None:
    """Damages an image file: its header, so that its size is unknown, or its end, so that views of its own size are drawn first."""
    path.write_bytes(b"no image" if how == "header" else path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def folder(make_folder: Callable[..., Path]) -> Path:
    """Eight images of different sizes; 2, 3 and 7 are damaged."""
    random = np.random.default_rng(0)
    made = make_folder(**{f"{i}_png": Image.fromarray(random.integers(0, 256, (20 + i, 40 - i, 3), dtype=np.uint8)) for i in range(8)})
    for name, how in (("2", "end"), ("3", "header"), ("7", "end")):
        damage(made / "class" / f"{name}.png", how)
    return made


def row_of(batch: ViewBatch, row: int) -> list[torch.Tensor]:
    return [tensor[row] for tensor in batch]


@pytest.mark.parametrize("workers", [1, 3])
def test_another_image_takes_the_place_of_a_damaged_one(folder: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    with opened(folder, workers=workers) as loader, caplog.at_level(logging.ERROR, "fastbyol"):
        order = loader.traversal.order(0).tolist()
        batches = list(loader)
        drawn = [index for batch in batches for index in batch.index.tolist()]
        assert drawn == [{2: 4, 3: 0, 7: 4}.get(index, index) for index in order], "five further on, past 7, around the end"
        # Its views are the replacing image's own of this epoch, and so is its label.
        with opened(folder, replace_damaged=False) as strict:
            (own,) = strict.views_of([4], epoch=0, batch=1)
        batch, row = divmod(order.index(7), 4)
        assert all(map(torch.equal, row_of(batches[batch], row), row_of(own, 0)))
        list(loader)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == 3, "each image is named once, not once an epoch"
    for number in (2, 3, 7):
        assert re.search(rf"image {number} \(.*/{number}\.png\) does not decode \(.*\); it is left out\n", "\n".join(said) + "\n")


def test_a_loader_that_is_not_of_a_training_raises_as_before(folder: Path) -> None:
    with opened(folder, replace_damaged=False) as loader, pytest.raises(DamagedImage, match=r"image [237] "):
        list(loader)
    with (
        build_image_loader(folder, views=VIEWS, batch=3) as images,
        pytest.raises(DamagedImage, match=r"image 2 .*convert leaves out all that"),
    ):
        list(images)


def test_the_error_survives_the_way_from_another_process() -> None:
    error = DamagedImage("image 7 (a.jpg) does not decode (x)", "remove it", 7)
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.what, copied.index) == ("image 7 (a.jpg) does not decode (x): remove it", error.what, 7)


def test_the_images_of_a_monitor_are_replaced_too(folder: Path) -> None:
    with build_image_loader(folder, views=VIEWS, batch=3, replace_damaged=True) as images:
        assert torch.cat([batch.index for batch in images]).tolist() == [0, 1, 4, 0, 4, 5, 6, 4]


def test_damage_in_converted_data_ends_the_run(image_folder: Path, tmp_path: Path) -> None:
    beton = tmp_path / "train.beton"
    write_beton(image_folder, out=beton, workers=1)
    whole = bytearray(beton.read_bytes())
    whole[-2000] ^= 0xFF
    beton.write_bytes(whole)
    with opened(beton) as loader, pytest.raises(DamagedImage, match="its bytes have changed since the conversion"):
        list(loader)


def test_an_image_that_is_gone_ends_the_run(folder: Path) -> None:
    """A file system that is not there any more must not look like damaged images."""
    with opened(folder) as loader:
        (folder / "class" / "5.png").unlink()
        with pytest.raises(UserError, match=r"image 5 .* cannot be read \(No such file or directory\)"):
            list(loader)


@pytest.mark.parametrize(("images", "allowed"), [(1, 20), (2000, 20), (2100, 21), (1_281_167, 12_811)])
def test_one_percent_or_twenty_images_may_be_damaged(images: int, allowed: int) -> None:
    assert damage_allowed(images) == allowed


def test_one_image_more_than_allowed_is_an_error_and_so_is_a_set_without_a_good_one() -> None:
    def damaged(index: int) -> DamagedImage:
        return DamagedImage(f"image {index} does not decode (x)", "", index)

    replacements = Replacements(1000)
    for index in (*range(20), *range(20)):
        replacements.add(damaged(index))
    indices = np.array([0, 19, 20, 999])
    replacements.replace(indices)
    assert indices.tolist() == [619, 638, 20, 999], "619 is prime to 1,000"
    with pytest.raises(
        UserError, match=r"^image 999 does not decode \(x\), and 20 other images of 1,000 don't either, where 20 may; python -m "
    ):
        replacements.add(damaged(999))
    few = Replacements(2)
    few.add(damaged(1))
    with pytest.raises(UserError, match=r"image 0 does not decode \(x\); none of 2 images decodes$"):
        few.add(damaged(0))
    indices = np.array([0, 1])
    few.replace(indices)
    assert indices.tolist() == [0, 0]


def test_only_the_first_damaged_images_of_many_are_named(caplog: pytest.LogCaptureFixture) -> None:
    replacements = Replacements(10_000)
    for index in range(50):
        replacements.add(DamagedImage(f"image {index} does not decode (x)", "", index))
    said = [record.getMessage() for record in caplog.records]
    assert said[:2] == ["image 0 does not decode (x); it is left out", "image 1 does not decode (x); it is left out"]
    assert said[19:] == ["image 19 does not decode (x); it is left out; further damaged images are not named"]


def test_sound_images_are_looked_for_until_there_are_enough(folder: Path) -> None:
    with build_image_loader(folder, views=VIEWS, batch=3) as images:
        assert images.decodable(np.array([2, 6, 3, 5, 0, 1]), at_most=2).tolist() == [6, 5]
        assert images.decodable(np.array([2, 6, 3])).tolist() == [6]
        with pytest.raises(UserError, match=r"none of 2 images decodes: image 7 \(.*7\.png\) is the first"):
            images.decodable(np.array([7, 2]))


def test_a_run_that_ends_for_an_image_that_is_gone_has_saved_its_last_step_and_continues_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data, out = noisy_colours(tmp_path / "data", train=12, val=1) / "train", tmp_path / "run"
    options = [*SMALL_RUN, "--data.train", str(data), "--steps", "9", "--data.prefetch", "1"]
    main([*options, "--out", str(tmp_path / "whole")])
    with build_loader(DataConfig(train=str(data)), views=VIEWS, seed=0, global_batch=8) as loader:
        late = Path(loader.image_names()[int(loader.traversal.order(0)[-5])])
    (data / late).rename(tmp_path / "kept")
    capsys.readouterr()
    # The listing is made with the image, which is gone when its turn comes.
    list_images, gone = images.list_images, (data / late)

    def listed(*given: object, **options: object) -> object:
        (tmp_path / "kept").rename(gone)
        try:
            return list_images(*given, **options)
        finally:
            gone.rename(tmp_path / "kept")

    monkeypatch.setattr(images, "list_images", listed)
    with pytest.raises(SystemExit) as ended:
        main([*options, "--out", str(out)])
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    (last,) = checkpoint_steps(out)
    assert 0 < last < 9
    assert f"saved after step {last}, from which the same command continues" in said
    assert "cannot be read (No such file or directory)" in said.splitlines()[-1]
    (tmp_path / "kept").rename(gone)
    main([*options, "--out", str(out)])
    assert state_digest(out) == state_digest(tmp_path / "whole")


def test_a_run_on_a_folder_goes_on_past_damaged_images_and_a_resumed_one_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = noisy_colours(tmp_path / "data", train=12, val=4)
    for image, how in zip(sorted((data / "train").rglob("*.png"))[:5:2], ("end", "header", "end"), strict=True):
        damage(image, how)
    damage(min((data / "val").rglob("*.png")), "end")
    options = [*SMALL_RUN, "--data.train", str(data / "train"), "--data.val", str(data / "val"), "--monitors.knn_every_epochs", "1"]
    main([*options, "--steps", "9", "--out", str(tmp_path / "whole")])
    assert capsys.readouterr().err.count("it is left out") >= 3
    main([*options, "--steps", "9", "--checkpoint_every", "4", "--keep_checkpoints", "9", "--out", str(tmp_path / "stopped")])
    for step in (9, 8):
        for file in (tmp_path / "stopped" / "checkpoints").glob(f"*{step}.*"):
            file.unlink()
    main([*options, "--steps", "9", "--checkpoint_every", "4", "--keep_checkpoints", "9", "--out", str(tmp_path / "stopped")])
    weights = [torch.load(tmp_path / run / "checkpoints" / "step-000000009.pt", weights_only=True)["byol"] for run in ("whole", "stopped")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.distributed
def test_ranks_go_on_past_damaged_images_and_name_them(tmp_path: Path) -> None:
    data = noisy_colours(tmp_path / "data", train=16, val=4) / "train"
    images = sorted(data.rglob("*.png"))
    for image in images[:4]:
        damage(image, "end")
    out = tmp_path / "run"
    with LaunchedRun(tmp_path / "log", *SMALL_RUN, "--epochs", "4", "--data.train", str(data), "--out", str(out), ranks=2) as run:
        assert run.finish() == 0, run.log
    assert checkpoint_steps(out)
    for image in images[:4]:
        assert f"{image}) does not decode" in run.log
