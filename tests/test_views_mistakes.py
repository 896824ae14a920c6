"""Bad images, bad files and bad specifications: one line that names the thing; never a hang, a black image or a traceback."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbyol.__main__ import main
from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair, ViewSpec
from fastbyol.data import build_loader
from fastbyol.data.backends.source import Indices, Pixels, Source
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.conversion.image_pass import BadImage
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.conversion.task import ConversionOptions
from fastbyol.data.formats import beton as beton_format
from fastbyol.data.loader import TwoViewLoader
from fastbyol.data.renderer import KernelRenderer
from fastbyol.data.traversal import Traversal

SMALL = ViewPair(size_px=8)


def first_batch(path: Path, *, views: ViewPair = SMALL, global_batch: int = 2) -> None:
    with build_loader(DataConfig(train=str(path), workers=1, prefetch=1), views=views, seed=0, global_batch=global_batch) as loader:
        next(iter(loader))


@pytest.mark.parametrize("content", [b"not an image at all", b"", b"\xff\xd8\xff"], ids=["text", "empty", "start of a JPEG"])
def test_a_foreign_file_in_a_folder_is_named_by_the_loader_and_by_both_converters(
    content: bytes, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder(good_png=Image.new("RGB", (9, 9)), bad_jpg=content)
    with pytest.raises(UserError, match=r"bad\.jpg.* does not decode"):
        first_batch(folder)
    strict = ConversionOptions(strict=True)
    for convert in (
        lambda: write_beton(folder, out=tmp_path / "x.beton", workers=1, options=strict),
        lambda: write_tar_shards(folder, out=tmp_path / "tar", workers=1, options=strict),
    ):
        with pytest.raises(BadImage, match=r"bad\.jpg"):
            convert()
    assert not (tmp_path / "x.beton").exists()
    assert not (tmp_path / "tar").exists()


def test_a_beton_cut_anywhere_is_refused_at_once(beton: Path, tmp_path: Path) -> None:
    whole, cut = beton.read_bytes(), tmp_path / "cut.beton"
    for share in np.linspace(0, 1, 23)[:-1]:
        cut.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match=r"cut\.beton: .*(too short|tail is missing)"):
            first_batch(cut)
    cut.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="tail is missing"):
        first_batch(cut)


def test_a_beton_of_no_images_is_refused(tmp_path: Path) -> None:
    header = np.zeros(1, dtype=beton_format.HEADER)
    header[0] = (beton_format.VERSION, 2, beton_format.MIN_PAGE_BYTES, 0, 3000)
    (tmp_path / "none.beton").write_bytes(header.tobytes() + bytes(5000))
    with pytest.raises(UserError, match=r"none\.beton: holds no finished data set"):
        first_batch(tmp_path / "none.beton")


class _ManyImages(Source):
    """A data set of a million images that are never read."""

    def __init__(self) -> None:
        super().__init__(labels=np.zeros(10**6, dtype=np.int64), class_names=("only",))

    def sizes(self, indices: Indices) -> tuple[Indices, Indices]:
        raise AssertionError

    def decode(self, indices: Indices) -> Iterator[Pixels]:
        raise AssertionError

    def sample_name(self, index: int) -> str:
        return f"image {index}"


def test_a_batch_larger_than_memory_is_one_line() -> None:
    pair = ViewPair(size_px=4096)
    loader = TwoViewLoader(KernelRenderer(_ManyImages(), pair), views=pair, traversal=Traversal(10**6, 0, 10**6))
    with loader, pytest.raises(UserError, match=r"a batch of 1000000 images at views.size_px = 4096 needs 375000.0 GiB"):
        next(iter(loader))


@pytest.mark.parametrize("name", ["flip_p", "jitter_p", "gray_p", "blur_p", "solarize_p"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_a_probability_outside_0_to_1_is_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{name} = {value}: must be a probability in \[0, 1\]"):
        ViewSpec(**{name: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("blur_sigma", (0.0, 1.0)),
        ("blur_sigma", (-1.0, 1.0)),
        ("blur_sigma", (2.0, 1.0)),
        ("blur_sigma", (0.1, math.nan)),
        ("crop_area", (0.0, 1.0)),
        ("crop_area", (0.5, 1.5)),
        ("crop_aspect", (0.0, 1.0)),
        ("crop_aspect", (2.0, 1.0)),
        ("hue", 0.6),
        ("brightness", -0.1),
        ("rotation_deg", 181.0),
    ],
)
def test_a_magnitude_out_of_range_is_refused(field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{field} = "):
        ViewSpec(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [("size_px", 0), ("size_px", 5000), ("interpolation", "nearest"), ("std", (1.0, 0.0, 1.0)), ("semantics", "")],
)
def test_a_pair_that_cannot_be_drawn_is_refused(field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{field} = "):
        ViewPair(**{field: value})  # type: ignore[arg-type]


def test_a_set_without_a_sound_image_ends_the_command_in_one_line(
    make_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(empty_png=b"", bad_jpg=b"text")
    with pytest.raises(SystemExit) as stopped:
        main(["views", "--data", str(folder), "--out", str(tmp_path / "x.png")])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastbyol: error: image ")
    assert line.endswith("; none of 2 images decodes")
