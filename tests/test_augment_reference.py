"""The reference operations against outputs of the official code, and against closed forms where there are none."""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastbyol.augment import parameters as p
from fastbyol.augment import reference
from fastbyol.config.views import IMAGENET_MEAN, IMAGENET_STD, PAPER, ViewPair

GOLDEN = Path(__file__).parent / "golden"
COLOUR_TOLERANCE = 7e-6  # ten times what an independent implementation reached (golden README)
BLUR_TOLERANCE = 5e-6
RESIZE_TOLERANCE = 5e-4


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def nchw(array: np.ndarray, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(array).movedim(-1, 1).to(dtype)


def worst(actual: Tensor, expected: np.ndarray) -> float:
    return float((actual.double() - nchw(expected)).abs().max())


OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": reference.adjust_brightness,
    "contrast": reference.adjust_contrast,
    "saturation": reference.adjust_saturation,
    "hue": reference.adjust_hue,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(OPS))
def test_each_colour_operation_equals_the_official_output(name: str, dtype: torch.dtype) -> None:
    data = golden("aug_color_ops")
    cases = [key for key in data if re.match(rf"{name}_[-+.\d]+$", key)]
    assert len(cases) == 4
    for key in cases:
        value = float(key.removeprefix(f"{name}_"))
        image = nchw(data["image"], dtype)
        assert worst(OPS[name](image, torch.full((4,), value, dtype=dtype)), data[key]) < COLOUR_TOLERANCE, key
        assert worst(OPS[name](image, value), data[key]) < COLOUR_TOLERANCE, key


def test_parameters_are_per_image() -> None:
    image = torch.rand(3, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.tensor([0.7, 0.9, 1.2], dtype=torch.float64)
    for op in (*OPS.values(), reference.rotate, reference.solarize, lambda x, v: reference.gaussian_blur(x, v, 3)):
        together = op(image, values)
        apart = torch.cat([op(image[i : i + 1], float(values[i])) for i in range(3)])
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-14)


def test_hsv_grayscale_and_normalisation_equal_the_official_output() -> None:
    data = golden("aug_color_ops")
    image = nchw(data["image"])
    for name, actual in zip("hsv", reference.rgb_to_hsv(image), strict=True):
        assert float((actual[:, 0] - torch.from_numpy(data[name])).abs().max()) < COLOUR_TOLERANCE, name
    assert worst(reference.hsv_to_rgb(*reference.rgb_to_hsv(image)), data["hsv_roundtrip"]) < COLOUR_TOLERANCE
    assert worst(reference.to_grayscale(image), data["grayscale"]) < COLOUR_TOLERANCE
    assert worst(reference.normalize(image, IMAGENET_MEAN, IMAGENET_STD), data["normalized"]) < COLOUR_TOLERANCE


def test_hsv_equals_the_standard_library_pixel_by_pixel() -> None:
    image = torch.rand(1, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hsv = torch.cat(reference.rgb_to_hsv(image), 1)[0]
    for y in range(4):
        for x in range(5):
            assert hsv[:, y, x].tolist() == pytest.approx(colorsys.rgb_to_hsv(*image[0, :, y, x].tolist()), abs=1e-14)


def test_all_24_jitter_orders_equal_the_official_output() -> None:
    data = golden("aug_jitter_orders")
    ops = list(OPS.values())
    for i in range(24):
        image = nchw(data["image"][i : i + 1])
        code = sum(int(op) * 4**place for op, place in zip(data["order"][i], (3, 2, 1, 0), strict=True))
        assert reference.jitter_order(code) == data["order"][i].tolist()
        for op in reference.jitter_order(code):
            image = ops[op](image, float(data["params"][i, op])).clamp(0, 1)
        assert worst(image, data["output"][i : i + 1]) < COLOUR_TOLERANCE
    assert reference.jitter_order(-1) == []


@pytest.mark.parametrize("taps", [23, 5])
@pytest.mark.parametrize("sigma", ["0.1", "0.5", "1.0", "2.0"])
def test_blur_equals_the_official_output_with_dark_borders(taps: int, sigma: str) -> None:
    data = golden("aug_blur")
    blurred = reference.gaussian_blur(nchw(data["image"]), float(sigma), taps)
    assert worst(blurred, data[f"blur_k{taps}_sigma{sigma}"]) < BLUR_TOLERANCE


def test_blurred_impulse_is_the_official_kernel() -> None:
    data = golden("aug_blur")
    blurred = reference.gaussian_blur(nchw(data["impulse"][None]), 1.0, 23)
    assert worst(blurred, data["impulse_blur_k23_sigma1.0"][None]) < BLUR_TOLERANCE
    kernel = torch.from_numpy(data["kernel23_sigma1.0"]).double()
    torch.testing.assert_close(blurred[0, 0, 13, 2:25], kernel * kernel[11], rtol=0, atol=BLUR_TOLERANCE)


def test_solarize_equals_the_official_output_at_one_ulp_around_the_threshold() -> None:
    data = golden("aug_solarize")
    image = nchw(data["image"], torch.float32)
    for key, threshold in (("solarize_thr0.5", 0.5), ("solarize_thr0.3", 0.3), ("solarize_p0", 2.0)):
        assert worst(reference.solarize(image, threshold), data[key]) == 0.0, key


@pytest.mark.parametrize("case", range(6))
def test_bicubic_resize_equals_tensorflow(case: int) -> None:
    data = golden("tf_bicubic_resize224")
    image = torch.from_numpy(data[f"in_{case}"])
    out = reference.crop_resize(image, (0, 0, *image.shape[:2]), 224, "bicubic", False)
    assert worst(out[None][:, :, data["rows"]], data[f"out_{case}_rows"][None]) < RESIZE_TOLERANCE
    assert float(out.mean()) == pytest.approx(float(data[f"out_mean_{case}"]), abs=RESIZE_TOLERANCE)


def test_resize_of_a_crop_is_the_resize_of_the_cut_out_image() -> None:
    image = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    cut = image[5:22, 9:33].contiguous()
    out = reference.crop_resize(image, (5, 9, 17, 24), 12, "bilinear", True)
    torch.testing.assert_close(out, reference.crop_resize(cut, (0, 0, 17, 24), 12, "bilinear", True), rtol=0, atol=0)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(7, 20), (20, 20), (33, 8)])
def test_resize_keeps_a_ramp_straight_away_from_the_borders(n_in: int, n_out: int, interpolation: str, antialias: bool) -> None:
    matrix = reference.resize_matrix(n_in, n_out, interpolation=interpolation, antialias=antialias)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-14)
    centres = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
    reach = 2 * max(n_in / n_out, 1)
    inner = (centres > reach) & (centres < n_in - 1 - reach)
    assert inner.any()
    # Both filters reproduce a straight line when not stretched; stretched, the sampled filter does so to a few thousandths.
    np.testing.assert_allclose((matrix @ np.arange(n_in))[inner], centres[inner], atol=0.05 if antialias and n_in > n_out else 1e-12)


def test_antialiased_downsizing_equals_pillow() -> None:
    image_of = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(3).integers(0, 256, (57, 41, 3), dtype=np.uint8)
    for name, method in (("bicubic", image_of.Resampling.BICUBIC), ("bilinear", image_of.Resampling.BILINEAR)):
        expected = np.asarray(image_of.fromarray(pixels).resize((16, 16), method)) / 255
        out = reference.crop_resize(torch.from_numpy(pixels), (0, 0, 57, 41), 16, name, True)
        assert worst(out[None], expected[None]) < 1.5 / 255  # Pillow rounds to 8 bits after each pass


@pytest.mark.parametrize("size", [7, 8])
def test_quarter_turns_are_exact_and_counter_clockwise(size: int) -> None:
    image = torch.rand(1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for quarters in (1, 2, 3):
        torch.testing.assert_close(reference.rotate(image, 90.0 * quarters), torch.rot90(image, quarters, (2, 3)), rtol=0, atol=1e-12)


def test_rotation_of_a_plane_is_the_turned_plane_and_repeats_edges() -> None:
    size, angle = 21, math.radians(30)
    axis = torch.arange(size, dtype=torch.float64) - 10
    image = (axis[None, :] + 2 * axis[:, None]).expand(1, 3, size, size)
    turned = reference.rotate(image, 30.0)[0, 0]
    from_x = math.cos(angle) * axis[None, :] - math.sin(angle) * axis[:, None]
    from_y = math.sin(angle) * axis[None, :] + math.cos(angle) * axis[:, None]
    torch.testing.assert_close(turned, from_x.clamp(-10, 10) + 2 * from_y.clamp(-10, 10), rtol=0, atol=1e-12)


def test_a_view_chains_the_operations_in_the_papers_order_with_its_clips() -> None:
    pair = ViewPair(size_px=20)  # three taps
    image = torch.randint(0, 256, (25, 31, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    row = np.zeros(p.NUM_COLUMNS, dtype=np.float32)
    row[: p.CROP_W + 1] = (2, 3, 20, 20)
    row[[p.FLIP, p.GRAY, p.SIGMA, p.SOLARIZE]] = (1, 1, 0.8, 0.5)
    row[p.ORDER] = 1 * 64 + 3 * 16 + 0 * 4 + 2
    row[[p.BRIGHTNESS, p.CONTRAST, p.SATURATION, p.HUE]] = (0.375, 1.375, 0.875, -0.0625)
    x = (image[2:22, 3:23].double() / 255).permute(2, 0, 1)[None].flip(3)  # crop of the view's own size: no resampling
    x = reference.adjust_contrast(x, 1.375).clamp(0, 1)
    x = reference.adjust_hue(x, -0.0625).clamp(0, 1)
    x = reference.adjust_brightness(x, 0.375).clamp(0, 1)
    x = reference.adjust_saturation(x, 0.875).clamp(0, 1)
    x = reference.gaussian_blur(reference.to_grayscale(x), float(row[p.SIGMA]), 3)
    x = torch.where(x >= 0.5, 1 - x, x)
    expected = (x[0] - torch.tensor(PAPER.mean).double()[:, None, None]) / torch.tensor(PAPER.std).double()[:, None, None]
    torch.testing.assert_close(reference.render_view(image, row, pair), expected, rtol=0, atol=1e-6)
