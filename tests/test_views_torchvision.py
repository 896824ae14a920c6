"""`torchvision` semantics against torchvision itself: its functions pixel by pixel, its crop sampler by hand and by its statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_parameters import draw, uniform
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from fastbyol.augment import parameters as p
from fastbyol.augment import reference
from fastbyol.config.errors import UserError
from fastbyol.config.plain import from_plain, to_plain
from fastbyol.config.schema import TrainConfig
from fastbyol.config.views import PAPER, TORCHVISION, ViewPair, both
from fastbyol.run.command_line import parse_train_config

HUE_TOLERANCE = 2e-6  # torchvision keeps part of the hue in float32, whatever the image's type


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(2, 3, 33, 47, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("factor", [0.2, 0.6, 1.0, 1.8])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_operations_are_torchvisions(name: str, factor: float, image: torch.Tensor) -> None:
    theirs = torch.stack([getattr(tv, f"adjust_{name}")(one, factor) for one in image])
    ours = getattr(reference, f"torchvision_{name}")(image, factor).clamp(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("delta", [-0.5, -0.1, 0.07, 0.4])
def test_hue_is_torchvisions_under_both_semantics(delta: float, image: torch.Tensor) -> None:
    assert reference.JITTER["paper"][3] is reference.JITTER["torchvision"][3]
    torch.testing.assert_close(reference.adjust_hue(image, delta), tv.adjust_hue(image, delta), rtol=0, atol=HUE_TOLERANCE)


def test_grayscale_and_solarize_are_torchvisions_under_both_semantics(image: torch.Tensor) -> None:
    torch.testing.assert_close(reference.to_grayscale(image), tv.rgb_to_grayscale(image, 3), rtol=0, atol=1e-12)
    torch.testing.assert_close(reference.solarize(image, 0.5), tv.solarize(image, 0.5), rtol=0, atol=0)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.0, 8.0])
def test_blur_is_torchvisions_up_to_the_border(sigma: float, image: torch.Tensor) -> None:
    ours = reference.gaussian_blur(image, sigma, 23, padding="reflect")
    torch.testing.assert_close(ours, tv.gaussian_blur(image, [23, 23], [sigma, sigma]), rtol=0, atol=1e-12)


def test_a_view_chains_torchvisions_operations(image: torch.Tensor) -> None:
    """Brightness, saturation, hue, contrast, blur and solarize in one view, each by torchvision's function."""
    row = [0.0] * p.NUM_COLUMNS
    row[p.ORDER] = 0 * 64 + 2 * 16 + 3 * 4 + 1
    row[p.BRIGHTNESS], row[p.CONTRAST], row[p.SATURATION], row[p.HUE] = 1.3, 0.7, 1.6, 0.2
    row[p.SIGMA], row[p.SOLARIZE] = 1.5, 0.5
    one = image[0, :, :30, :30].contiguous()
    theirs = tv.adjust_contrast(tv.adjust_hue(tv.adjust_saturation(tv.adjust_brightness(one, 1.3), 1.6), 0.2), 0.7)
    theirs = tv.solarize(tv.gaussian_blur(theirs, [5, 5], [1.5, 1.5]), 0.5)
    ours = reference.augment_view(one[None], row, blur_taps=5, mean=(0, 0, 0), std=(1, 1, 1), semantics="torchvision")
    off = (ours[0] - theirs).abs() > 10 * HUE_TOLERANCE
    assert not (off & ((theirs - 0.5).abs() > 10 * HUE_TOLERANCE)).any()  # at the threshold x and 1 - x are both right
    assert off.float().mean() < 1e-3


# ---- the sampler


def box_by_hand(pair: ViewPair, seed: int, epoch: int, sample: int, view: int, height: int, width: int) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params with our hash for its random numbers."""
    spec = (pair.view1, pair.view2)[view]
    low, high = math.log(spec.crop_aspect[0]), math.log(spec.crop_aspect[1])
    for attempt in range(10):
        slots = ("area", "aspect") if attempt == 0 else (1000 + 2 * (attempt - 1), 1001 + 2 * (attempt - 1))
        area, aspect = (uniform(seed, epoch, sample, view, slot) for slot in slots)
        area = (spec.crop_area[0] + (spec.crop_area[1] - spec.crop_area[0]) * area) * height * width
        aspect = math.exp(low + (high - low) * aspect)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            y, x = (uniform(seed, epoch, sample, view, f"offset_{axis}") for axis in "yx")
            return math.floor(y * (height - h + 1)), math.floor(x * (width - w + 1)), h, w
    w, h = width, height
    if width / height < spec.crop_aspect[0]:
        h = round(w / spec.crop_aspect[0])
    elif width / height > spec.crop_aspect[1]:
        w = round(h * spec.crop_aspect[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [(375, 500), (60, 900), (900, 60), (7, 5), (2, 3)])
def test_crops_equal_torchvisions_rule_one_number_at_a_time(height: int, width: int) -> None:
    rows = draw(TORCHVISION, num=200, seed=5, epoch=3, height=height, width=width)
    by_hand = [[box_by_hand(TORCHVISION, 5, 3, i, view, height, width) for view in range(2)] for i in range(200)]
    np.testing.assert_array_equal(rows[..., : p.CROP_W + 1], by_hand)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (400, 400), (100, 500)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    """Two-sample Kolmogorov-Smirnov on each number of the box, 20,000 draws against 5,000."""
    torch.manual_seed(0)
    image, num = torch.empty(3, height, width), 5_000
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(num)], dtype=float)
    ours = draw(TORCHVISION, num=10_000, height=height, width=width)[..., : p.CROP_W + 1].reshape(-1, 4).astype(float)
    for column in range(4):
        values = np.sort(np.concatenate([ours[:, column], theirs[:, column]]))
        distance = [np.searchsorted(np.sort(drawn[:, column]), values, side="right") / len(drawn) for drawn in (ours, theirs)]
        assert np.abs(distance[0] - distance[1]).max() < 1.95 * math.sqrt(1 / num + 1 / len(ours)), column  # p = 0.001


@pytest.mark.parametrize(("height", "width", "share"), [(375, 500, 0.435), (400, 400, 0.480)])
def test_mean_crop_area_is_the_one_measured_on_torchvision(height: int, width: int, share: float) -> None:
    rows = draw(TORCHVISION, num=40_000, height=height, width=width)
    area = rows[..., p.CROP_H].astype(float) * rows[..., p.CROP_W] / (height * width)
    assert area.mean() == pytest.approx(share, abs=4 * 0.25 * math.sqrt(1 / 40_000 + 1 / 80_000) + 0.0005)


def test_an_image_of_one_pixel_gives_that_pixel() -> None:
    assert (draw(TORCHVISION, num=50, height=1, width=1)[..., : p.CROP_W + 1] == [0, 0, 1, 1]).all()


def test_semantics_change_brightness_to_a_factor_and_leave_all_but_the_crop_alone() -> None:
    pair = both(PAPER, crop_area=(0.08, 0.2))  # always fits a square image
    paper = draw(pair, num=2000, height=400, width=400)
    ours = draw(ViewPair(view1=pair.view1, view2=pair.view2, semantics="torchvision"), num=2000, height=400, width=400)
    changed = {column for column in range(p.NUM_COLUMNS) if (paper[..., column] != ours[..., column]).any()}
    assert changed == {p.BRIGHTNESS}
    np.testing.assert_allclose(ours[..., p.BRIGHTNESS], 1 + paper[..., p.BRIGHTNESS], atol=1e-6)


# ---- the option


def test_semantics_is_an_option_of_every_run_and_older_configs_mean_the_papers() -> None:
    assert parse_train_config(["--views.semantics", "torchvision"], usage="").views.semantics == "torchvision"
    older = to_plain(TrainConfig())
    del older["views"]["semantics"]
    assert from_plain(TrainConfig, older) == TrainConfig()
    assert TrainConfig().views.semantics == "paper"


def test_unknown_semantics_are_refused_with_what_there_is() -> None:
    with pytest.raises(UserError, match="semantics = 'kornia': must be one of paper, torchvision"):
        ViewPair(semantics="kornia")
