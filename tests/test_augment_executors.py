"""The fast executors (CPU kernel, device graph) against the official outputs and against the reference, on rows as drawn."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbyol.augment import cpu_kernel, reference
from fastbyol.augment import parameters as p
from fastbyol.augment.torch_graph import augment_batch
from fastbyol.augment.view_kernel import ViewKernel
from fastbyol.config.errors import UserError
from fastbyol.config.views import PAPER, TORCHVISION, ViewPair, both

GOLDEN = Path(__file__).parent / "golden"
PIXEL_TOLERANCE = 1e-5
IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
# (height, width, size, interpolation, antialias, rotation): crops smaller and larger than the view, sizes around the kernel's blocks of 16.
SHAPES = [
    (60, 80, 32, "bicubic", False, 0.0),
    (40, 40, 32, "bicubic", True, 20.0),
    (20, 70, 48, "bilinear", True, 180.0),
    (9, 7, 15, "bicubic", True, 10.0),
    (1, 1, 5, "bicubic", False, 5.0),
    (300, 200, 17, "bilinear", False, 0.0),
    (300, 200, 41, "bicubic", True, 0.0),
    (120, 90, 224, "bicubic", False, 0.0),
]


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def noise_image(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """Patches of one colour, grey ones among them, under noise: saturated, flat and textured places."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    patches[::3] = patches[::3, :, :1]
    wide = patches.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    textured = rng.random((height, width, 1)) < 0.5
    return np.clip(wide + textured * rng.integers(-40, 41, wide.shape), 0, 255).astype(np.uint8)


def neutral_row(height: int, width: int, **values: float) -> np.ndarray:
    row = np.zeros((1, p.NUM_COLUMNS), dtype=np.float32)
    row[0, : p.CROP_W + 1] = (0, 0, height, width)
    row[0, [p.ORDER, p.CONTRAST, p.SATURATION, p.SOLARIZE]] = (-1, 1, 1, 2)
    for name, value in values.items():
        row[0, p.COLUMNS.index(name)] = value
    return row


def drawn(pair: ViewPair, height: int, width: int, *, num: int = 10) -> np.ndarray:
    return p.draw_parameters(pair, seed=3, epoch=1, index=np.arange(num), height=np.full(num, height), width=np.full(num, width))


def varied_pair(size: int, interpolation: str, antialias: bool, rotation: float) -> ViewPair:
    """The paper's first view, and a second that blurs, solarizes and turns the hue more than any preset."""
    pair = both(replace(PAPER, size_px=size, interpolation=interpolation, antialias=antialias), rotation_deg=rotation)
    return replace(pair, view2=replace(pair.view2, blur_p=0.5, solarize_p=0.5, solarize_threshold=0.41, hue=0.5))


def torchvision_pair(size: int) -> ViewPair:
    """Torchvision's formulas, everything firing often; sigma up to 3 reaches across the borders that it reflects at."""
    pair = both(replace(TORCHVISION, size_px=size), jitter_p=0.9, saturation=0.9, blur_p=0.7, blur_sigma=(0.1, 3.0), hue=0.3)
    return replace(pair, view2=replace(pair.view2, solarize_p=0.5, solarize_threshold=0.41, brightness=0.8, contrast=0.8))


def assert_close_but_at_threshold(actual: torch.Tensor, expected: torch.Tensor, threshold: float, pair: ViewPair) -> None:
    """Checks equality within tolerance in [0, 1], except for pixels that are at the threshold before solarize, where x and 1 - x are
    both right.
    """
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (pair.mean, pair.std))
    actual, expected = actual.double() * std + mean, expected * std + mean
    at_threshold = ((expected - threshold).abs() < PIXEL_TOLERANCE) | ((expected - (1 - threshold)).abs() < PIXEL_TOLERANCE)
    off = (actual - expected).abs() >= PIXEL_TOLERANCE
    assert not (off & ~at_threshold).any(), float((actual - expected).abs().max())
    assert off.float().mean() < 1e-3


@pytest.mark.parametrize(("height", "width", "size", "interpolation", "antialias", "rotation"), SHAPES)
def test_kernel_equals_the_reference(height: int, width: int, size: int, interpolation: str, antialias: bool, rotation: float) -> None:
    pair = varied_pair(size, interpolation, antialias, rotation)
    kernel, rows = ViewKernel.of(pair), drawn(pair, height, width, num=10 if size < 100 else 3)
    for i, row in enumerate(rows):
        image, out = noise_image(height, width, seed=i), np.full((2, size, size, 3), np.nan, dtype=np.float32)
        kernel.render(image, row, out)
        for view in range(2):
            expected = reference.render_view(torch.from_numpy(image), row[view], pair)
            assert_close_but_at_threshold(torch.from_numpy(out[view]).permute(2, 0, 1), expected, float(row[view, p.SOLARIZE]), pair)


@pytest.mark.parametrize(("height", "width", "size", "interpolation", "antialias", "rotation"), SHAPES)
def test_uint8_output_is_the_rounded_crop_and_nothing_else(
    height: int, width: int, size: int, interpolation: str, antialias: bool, rotation: float
) -> None:
    pair = varied_pair(size, interpolation, antialias, rotation)
    kernel, image = ViewKernel.of(pair), noise_image(height, width)
    for row in drawn(pair, height, width, num=3):
        out = np.zeros((2, size, size, 3), dtype=np.uint8)
        kernel.render(image, row, out)
        for view in range(2):
            y, x, h, w = (int(v) for v in row[view, : p.CROP_W + 1])
            crop = reference.crop_resize(torch.from_numpy(image), (y, x, h, w), size, interpolation, antialias)
            assert np.abs(out[view] - 255 * crop.permute(1, 2, 0).numpy()).max() < 0.5 + 1e-3


def test_crops_then_graph_give_the_kernels_view_where_the_crop_is_exact() -> None:
    """A crop of the view's own size needs no resampling, so both routes see the same pixels."""
    pair = replace(both(varied_pair(40, "bicubic", False, 15.0), crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0)))
    kernel, rows = ViewKernel.of(pair), drawn(pair, 40, 40, num=12)
    for i, row in enumerate(rows):
        image = noise_image(40, 40, seed=i)
        whole, crops = np.empty((2, 40, 40, 3), dtype=np.float32), np.empty((2, 40, 40, 3), dtype=np.uint8)
        kernel.render(image, row, whole)
        kernel.render(image, row, crops)
        np.testing.assert_array_equal(crops[0], image)
        graph = augment_batch(
            torch.from_numpy(crops).permute(0, 3, 1, 2),
            torch.from_numpy(row),
            blur_taps=pair.blur_taps,
            mean=pair.mean,
            std=pair.std,
            rotate=True,
        )
        for view in range(2):
            expected = torch.from_numpy(whole[view]).permute(2, 0, 1).double()
            assert_close_but_at_threshold(graph[view], expected, float(row[view, p.SOLARIZE]), pair)


@pytest.mark.parametrize(("height", "width", "size"), [(60, 80, 41), (1, 1, 5), (90, 70, 64)])
def test_kernel_equals_the_reference_under_torchvisions_semantics(height: int, width: int, size: int) -> None:
    pair = torchvision_pair(size)
    kernel, rows = ViewKernel.of(pair), drawn(pair, height, width)
    for i, row in enumerate(rows):
        image, out = noise_image(height, width, seed=i), np.full((2, size, size, 3), np.nan, dtype=np.float32)
        kernel.render(image, row, out)
        for view in range(2):
            expected = reference.render_view(torch.from_numpy(image), row[view], pair)
            assert_close_but_at_threshold(torch.from_numpy(out[view]).permute(2, 0, 1), expected, float(row[view, p.SOLARIZE]), pair)


@pytest.mark.parametrize("size", [5, 41, 64])
def test_graph_equals_the_reference_under_torchvisions_semantics(size: int) -> None:
    pair = torchvision_pair(size)
    rows = drawn(pair, size, size, num=12).reshape(24, p.NUM_COLUMNS)
    crops = torch.from_numpy(np.stack([noise_image(size, size, seed=i) for i in range(24)])).permute(0, 3, 1, 2)
    settings = {"blur_taps": pair.blur_taps, "mean": pair.mean, "std": pair.std, "semantics": "torchvision"}
    out = augment_batch(crops, torch.from_numpy(rows), **settings)
    for i in range(24):
        expected = reference.augment_view(crops[i : i + 1].double() / 255, [float(v) for v in rows[i]], **settings)[0]
        assert_close_but_at_threshold(out[i], expected, float(rows[i, p.SOLARIZE]), pair)


@pytest.mark.parametrize(("size", "rotation"), [(5, 30.0), (17, 0.0), (32, 20.0), (64, 180.0)])
def test_graph_equals_the_reference(size: int, rotation: float) -> None:
    pair = varied_pair(size, "bicubic", False, rotation)
    rows = drawn(pair, size, size, num=12).reshape(24, p.NUM_COLUMNS)
    crops = torch.from_numpy(np.stack([noise_image(size, size, seed=i) for i in range(24)])).permute(0, 3, 1, 2)
    settings = {"blur_taps": pair.blur_taps, "mean": pair.mean, "std": pair.std}
    out = augment_batch(crops, torch.from_numpy(rows), rotate=rotation > 0, **settings)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype == torch.float32
    for i in range(24):
        expected = reference.augment_view(crops[i : i + 1].double() / 255, [float(v) for v in rows[i]], **settings)[0]
        assert_close_but_at_threshold(out[i], expected, float(rows[i, p.SOLARIZE]), pair)
    half = augment_batch(crops, torch.from_numpy(rows), rotate=rotation > 0, dtype=torch.bfloat16, **settings)
    torch.testing.assert_close(half, out.to(torch.bfloat16), rtol=0, atol=0)


def test_without_rotate_the_graph_ignores_the_rotation_column() -> None:
    crops = torch.from_numpy(noise_image(12, 12)).permute(2, 0, 1)[None]
    straight, turned = neutral_row(12, 12), neutral_row(12, 12, rotation_deg=45)
    outs = [augment_batch(crops, torch.from_numpy(row), blur_taps=1, **IDENTITY) for row in (straight, turned)]
    assert torch.equal(outs[0], outs[1])


@pytest.mark.compile
def test_compiled_graph_is_one_graph_and_equals_eager() -> None:
    pair = varied_pair(32, "bicubic", False, 20.0)
    rows = torch.from_numpy(drawn(pair, 32, 32, num=2).reshape(4, p.NUM_COLUMNS))
    crops = torch.from_numpy(np.stack([noise_image(32, 32, seed=i) for i in range(4)])).permute(0, 3, 1, 2)
    settings = {"blur_taps": pair.blur_taps, "mean": pair.mean, "std": pair.std, "rotate": True}
    compiled = torch.compile(augment_batch, fullgraph=True, dynamic=False)
    out, eager = compiled(crops, rows, **settings), augment_batch(crops, rows, **settings)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for i in range(4):
        assert_close_but_at_threshold(out[i], eager[i].double(), float(rows[i, p.SOLARIZE]), pair)


@pytest.mark.parametrize("case", range(6))
def test_kernel_resize_equals_tensorflow(case: int) -> None:
    data = golden("tf_bicubic_resize224")
    image, out = data[f"in_{case}"], np.empty((1, 224, 224, 3), dtype=np.float32)
    ViewKernel(size_px=224, blur_taps=23, **IDENTITY).render(image, neutral_row(*image.shape[:2]), out)
    assert np.abs(out[0, data["rows"]] - data[f"out_{case}_rows"]).max() < 5e-4


def planes_of(image: np.ndarray) -> np.ndarray:
    """(Y, X, 3) -> the kernel's float32 planes [channel][x][y]."""
    return np.ascontiguousarray(image.transpose(2, 1, 0))


def test_all_24_jitter_orders_of_both_executors_equal_the_official_output() -> None:
    data = golden("aug_jitter_orders")
    codes = data["order"] @ np.array([64, 16, 4, 1])
    rows = np.concatenate([neutral_row(1, 1, order=code) for code in codes])
    rows[:, p.BRIGHTNESS : p.HUE + 1] = data["params"]
    rows.flags.writeable = False  # as in the compiled entry point: no second specialisation
    for image, row, expected in zip(data["image"], rows, data["output"], strict=True):
        planes = planes_of(image)
        cpu_kernel._jitter(planes, row, False)
        assert np.abs(planes.transpose(2, 1, 0) - expected).max() < 7e-6
    out = augment_batch(torch.from_numpy(255 * data["image"]).permute(0, 3, 1, 2), torch.tensor(rows), blur_taps=1, **IDENTITY)
    assert np.abs(out.permute(0, 2, 3, 1).numpy() - data["output"]).max() < 7e-6


COLOUR_COLUMN = {"brightness": (0, "brightness"), "contrast": (1, "contrast"), "saturation": (2, "saturation"), "hue": (3, "hue")}


def test_single_colour_operations_of_both_executors_equal_the_official_output() -> None:
    data = golden("aug_color_ops")
    image = torch.from_numpy(255 * data["image"]).permute(0, 3, 1, 2)
    code = 0 * 64 + 1 * 16 + 2 * 4 + 3
    cases = [key for key in data if key.rpartition("_")[0] in COLOUR_COLUMN]
    assert len(cases) == 16
    for key in [*cases, "grayscale"]:
        name, _, value = key.rpartition("_")
        row = neutral_row(1, 1, order=code, **{name: float(value)}) if name else neutral_row(1, 1, gray=1)
        expected = np.clip(data[key], 0, 1)
        out = augment_batch(image, torch.from_numpy(row).expand(4, -1), blur_taps=1, **IDENTITY)
        assert np.abs(out.permute(0, 2, 3, 1).numpy() - expected).max() < 7e-6, key
        row.flags.writeable = False
        for i in range(4):
            planes = planes_of(data["image"][i])
            if name:
                cpu_kernel._jitter(planes, row[0], False)
            else:
                cpu_kernel._grayscale(planes)
            assert np.abs(planes.transpose(2, 1, 0) - expected[i]).max() < 7e-6, key


@pytest.mark.parametrize("taps", [23, 5])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_of_both_executors_equals_the_official_output(taps: int, sigma: float) -> None:
    data = golden("aug_blur")
    expected = data[f"blur_k{taps}_sigma{sigma}"]
    # The kernel takes squares: zeros below the 40 rows are what the padding is anyway.
    square = np.pad(data["image"], ((0, 0), (0, 8), (0, 0), (0, 0)))
    padded = np.empty((48 + taps - 1 + 2 * cpu_kernel.TAP_GROUP, 48), dtype=np.float32)
    for image, blurred in zip(square, expected, strict=True):
        planes = planes_of(image)
        turned = np.empty_like(planes)
        cpu_kernel._blur(planes, np.float32(sigma), taps // 2, False, padded, turned)
        assert np.abs(turned.transpose(1, 2, 0)[:40] - blurred).max() < 5e-6
    rows = torch.from_numpy(neutral_row(1, 1, sigma=sigma)).expand(3, -1)
    out = augment_batch(torch.from_numpy(255 * data["image"]).permute(0, 3, 1, 2), rows, blur_taps=taps, **IDENTITY)
    assert np.abs(out.permute(0, 2, 3, 1).numpy() - expected).max() < 5e-6


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_solarize_of_both_executors_equals_the_official_output_at_every_8_bit_level(threshold: float) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    value = levels / 255
    expected = np.where(value >= threshold, 1 - value, value)
    row, out = neutral_row(16, 16, solarize=threshold), np.empty((1, 16, 16, 3), dtype=np.float32)
    ViewKernel(size_px=16, blur_taps=1, **IDENTITY).render(levels, row, out)
    assert np.abs(out[0] - expected).max() < 1e-6
    graph = augment_batch(torch.from_numpy(levels).permute(2, 0, 1)[None], torch.from_numpy(row), blur_taps=1, **IDENTITY)
    assert np.abs(graph[0].permute(1, 2, 0).numpy() - expected).max() < 1e-6


def test_kernel_solarize_equals_the_official_output_at_one_ulp_around_the_threshold() -> None:
    data = golden("aug_solarize")
    for threshold in (0.5, 0.3):
        for image, expected in zip(data["image"], data[f"solarize_thr{threshold}"], strict=True):
            planes = planes_of(image)
            cpu_kernel._solarize(planes, np.float32(threshold))
            np.testing.assert_array_equal(planes.transpose(2, 1, 0), expected)


def test_a_crop_of_the_views_size_passes_through_bit_by_bit() -> None:
    image, out = noise_image(30, 37), np.empty((1, 21, 21, 3), dtype=np.uint8)
    row = neutral_row(21, 21, crop_y=4, crop_x=11)
    for interpolation in ("bicubic", "bilinear"):
        ViewKernel(size_px=21, interpolation=interpolation, blur_taps=1, **IDENTITY).render(image, row, out)
        np.testing.assert_array_equal(out[0], image[4:25, 11:32])


def test_four_threads_sharing_a_kernel_give_the_bytes_of_one() -> None:
    pair = varied_pair(32, "bicubic", True, 20.0)
    kernel, num = ViewKernel.of(pair), 64
    sizes = [(20 + 3 * i, 90 - i) for i in range(num)]
    images = [noise_image(*size, seed=i) for i, size in enumerate(sizes)]
    rows = [drawn(pair, *size, num=1)[0] for size in sizes]
    alone, shared = np.empty((num, 2, 32, 32, 3), dtype=np.float32), np.zeros((num, 2, 32, 32, 3), dtype=np.float32)
    for i in range(num):
        kernel.render(images[i], rows[i], alone[i])

    def work(first: int) -> None:
        for i in range(first, num, 4):
            kernel.render(images[i], rows[i], shared[i])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(shared, alone)


def test_a_view_is_the_same_whichever_views_are_rendered_with_it() -> None:
    pair = varied_pair(24, "bicubic", False, 20.0)
    kernel, image, row = ViewKernel.of(pair), noise_image(50, 60), drawn(pair, 50, 60, num=1)[0]
    together, alone = np.empty((2, 24, 24, 3), dtype=np.float32), np.empty((1, 24, 24, 3), dtype=np.float32)
    kernel.render(image, row, together)
    for view in (1, 0):
        kernel.render(image, row[view : view + 1], alone)
        np.testing.assert_array_equal(alone[0], together[view])


def test_read_only_images_and_rows_are_taken_as_they_are() -> None:
    image, row = noise_image(20, 20), neutral_row(20, 20)
    out = np.empty((1, 20, 20, 3), dtype=np.uint8)
    image.flags.writeable = row.flags.writeable = False
    ViewKernel(size_px=20, blur_taps=1, **IDENTITY).render(image, row, out)
    np.testing.assert_array_equal(out[0], image)


@pytest.mark.parametrize(
    ("image", "row", "out", "message"),
    [
        (np.zeros((8, 8, 4), np.uint8), neutral_row(8, 8), np.empty((1, 8, 8, 3), np.uint8), "image"),
        (np.zeros((8, 8, 3), np.float32), neutral_row(8, 8), np.empty((1, 8, 8, 3), np.uint8), "image"),
        (np.zeros((8, 16, 3), np.uint8)[:, ::2], neutral_row(8, 8), np.empty((1, 8, 8, 3), np.uint8), "image"),
        (np.zeros((8, 8, 3), np.uint8), neutral_row(8, 8)[:, 1:], np.empty((1, 8, 8, 3), np.uint8), "parameters"),
        (np.zeros((8, 8, 3), np.uint8), neutral_row(8, 8), np.empty((1, 8, 9, 3), np.uint8), "out"),
        (np.zeros((8, 8, 3), np.uint8), neutral_row(8, 8), np.empty((1, 8, 8, 3), np.float64), "out"),
        (np.zeros((8, 8, 3), np.uint8), neutral_row(9, 8), np.empty((1, 8, 8, 3), np.uint8), "crop"),
        (np.zeros((8, 8, 3), np.uint8), neutral_row(8, 8, crop_x=1), np.empty((1, 8, 8, 3), np.uint8), "crop"),
        (np.zeros((8, 8, 3), np.uint8), neutral_row(8, 0), np.empty((1, 8, 8, 3), np.uint8), "crop"),
        (np.zeros((8, 8, 3), np.uint8), neutral_row(8, float("nan")), np.empty((1, 8, 8, 3), np.uint8), "crop"),
    ],
)
def test_what_would_read_or_write_out_of_bounds_is_refused(image: np.ndarray, row: np.ndarray, out: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewKernel(size_px=8, blur_taps=1, **IDENTITY).render(image, row, out)


@pytest.mark.parametrize(
    "setting",
    [{"size_px": 0}, {"interpolation": "nearest"}, {"blur_taps": 4}, {"blur_taps": 0}, {"semantics": "kornia"}],
    ids=lambda s: next(iter(s)),
)
def test_settings_the_kernel_cannot_take_are_named(setting: dict[str, object]) -> None:
    settings = {"size_px": 8, "blur_taps": 1, **IDENTITY, **setting}
    with pytest.raises(UserError, match=next(iter(setting))):
        ViewKernel(**settings)


def test_a_blur_that_reaches_over_the_whole_image_cannot_reflect_at_its_borders() -> None:
    with pytest.raises(UserError, match="blur_taps = 9"):
        ViewKernel(size_px=4, blur_taps=9, semantics="torchvision", **IDENTITY)


@pytest.mark.parametrize("size", [2, 224])
def test_rotation_of_both_executors_is_exact_on_noise_of_any_size(size: int) -> None:
    image = np.random.default_rng(6).integers(0, 256, (size, size, 3), dtype=np.uint8)
    row, out = neutral_row(size, size, rotation_deg=37.25), np.empty((1, size, size, 3), dtype=np.float32)
    ViewKernel(size_px=size, blur_taps=1, **IDENTITY).render(image, row, out)
    crops = torch.from_numpy(image).permute(2, 0, 1)[None]
    expected = reference.rotate(crops.double() / 255, 37.25)[0]
    assert float((torch.from_numpy(out[0]).permute(2, 0, 1) - expected).abs().max()) < 1e-6
    graph = augment_batch(crops, torch.from_numpy(row), blur_taps=1, rotate=True, **IDENTITY)
    assert float((graph[0] - expected).abs().max()) < 1e-6
