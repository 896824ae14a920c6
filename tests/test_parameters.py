"""The sampler: published vectors, an independent reading of its hash, and the statistics of the paper's distribution."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from fastbyol.augment import parameters as p
from fastbyol.config.errors import UserError
from fastbyol.config.views import ABLATIONS, PAPER, ViewPair, both

NUM = 20_000
MASK = 2**64 - 1


def draw(pair: ViewPair = PAPER, *, num: int = NUM, seed: int = 7, epoch: int = 0, height: int = 375, width: int = 500, first: int = 0):
    index = np.arange(first, first + num)
    return p.draw_parameters(pair, seed=seed, epoch=epoch, index=index, height=np.full(num, height), width=np.full(num, width))


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def uniform(seed: int, epoch: int, sample: int, view: int, slot: str | int) -> float:
    """The documented hash in Python's whole numbers. slot: a name, or a counter."""
    key = mix((seed + 0x9E3779B97F4A7C15) & MASK)
    key = mix(key ^ mix((epoch + 0x632BE59BD9B4E019) & MASK))
    key = mix(key ^ mix((2 * sample + view + 0xD1B54A32D192ED03) & MASK))
    counter = ((p.SLOTS.index(slot) if isinstance(slot, str) else slot) + 1) * 0x9E3779B97F4A7C15
    return (mix((key + counter) & MASK) >> 11) / 2**53


def row_by_hand(pair: ViewPair, seed: int, epoch: int, sample: int, view: int, height: int, width: int) -> list[float]:
    """One parameter row, a scalar at a time."""
    spec = (pair.view1, pair.view2)[view]

    def u(slot: str) -> float:
        return uniform(seed, epoch, sample, view, slot)

    area = (spec.crop_area[0] + (spec.crop_area[1] - spec.crop_area[0]) * u("area")) * height * width
    low, high = math.log(spec.crop_aspect[0]), math.log(spec.crop_aspect[1])
    aspect = math.exp(low + (high - low) * u("aspect"))
    h = max(min(round(math.sqrt(area / aspect)), height), 1)
    w = max(min(round(math.sqrt(area * aspect)), width), 1)
    jitter = u("jitter") < spec.jitter_p
    order = list(permutations(range(4)))[int(24 * u("order"))]
    return [
        math.floor(u("offset_y") * (height - h + 1)),
        math.floor(u("offset_x") * (width - w + 1)),
        h,
        w,
        u("flip") < spec.flip_p,
        spec.rotation_deg * (2 * u("rotation") - 1),
        64 * order[0] + 16 * order[1] + 4 * order[2] + order[3] if jitter else -1,
        spec.brightness * (2 * u("brightness") - 1) if jitter else 0,
        1 + spec.contrast * (2 * u("contrast") - 1) if jitter else 1,
        1 + spec.saturation * (2 * u("saturation") - 1) if jitter else 1,
        spec.hue * (2 * u("hue") - 1) if jitter else 0,
        u("gray") < spec.gray_p,
        spec.blur_sigma[0] + (spec.blur_sigma[1] - spec.blur_sigma[0]) * u("sigma") if u("blur") < spec.blur_p else 0,
        spec.solarize_threshold if u("solarize") < spec.solarize_p else 2,
    ]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (12345, 7), (2**63 - 1, 299)])
def test_rows_equal_the_documented_hash_and_formulas_one_number_at_a_time(seed: int, epoch: int) -> None:
    pair = both(PAPER, rotation_deg=20.0, solarize_p=0.5, blur_p=0.5)
    index, height, width = np.array([0, 1, 1_281_166, 2**40]), np.array([375, 1, 64, 20]), np.array([500, 1, 17, 2000])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = p.draw_parameters(pair, seed=seed, epoch=epoch, index=index, height=height, width=width)
    by_hand = [
        [row_by_hand(pair, seed, epoch, int(i), view, int(h), int(w)) for view in range(2)]
        for i, h, w in zip(index, height, width, strict=True)
    ]
    np.testing.assert_array_equal(rows, np.array(by_hand, dtype=np.float32))


VECTORS = [
    (
        (0, 0, 0),
        [
            [3, 36, 359, 278, 1, -0, 225, -0.2376306, 0.7315805, 1.011176, 0.02988347, 0, 1.306106, 2],
            [5, 0, 358, 465, 0, -0, 27, -0.1850883, 1.0991, 0.8327284, 0.07288614, 0, 0, 0.5],
        ],
    ),
    (
        (1, 0, 1),
        [
            [27, 24, 227, 190, 1, 0, 180, 0.1714118, 1.052142, 0.9041564, -0.09152372, 1, 0.160047, 2],
            [0, 20, 375, 475, 1, -0, 57, 0.09541123, 1.136412, 1.153955, -0.09217023, 0, 1.399037, 0.5],
        ],
    ),
    ((42, 99, 1281166), [[0, 41, 375, 401, 1, -0, -1, 0, 1, 1, 0, 0, 1.109475, 2], [0, 94, 375, 370, 1, 0, -1, 0, 1, 1, 0, 0, 0, 2]]),
    (
        (9223372036854775807, 999, 8589934592),
        [
            [20, 103, 312, 393, 1, -0, 54, 0.3896014, 1.047395, 0.8071309, 0.06320652, 0, 1.463733, 2],
            [20, 24, 348, 446, 0, -0, 198, 0.06280979, 1.164334, 0.8561458, -0.02317164, 0, 0, 2],
        ],
    ),
]
"""(seed, epoch, index) -> both views of a 375 x 500 image under the paper's pair. Change them and no run can be reproduced."""


@pytest.mark.parametrize(("case", "expected"), VECTORS)
def test_published_vectors_stay_what_a_seed_means(case: tuple[int, int, int], expected: list[list[float]]) -> None:
    seed, epoch, index = case
    rows = p.draw_parameters(PAPER, seed=seed, epoch=epoch, index=np.array([index]), height=np.array([375]), width=np.array([500]))
    np.testing.assert_allclose(rows[0], expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("height", "width", "share"), [(375, 500, 0.519), (400, 400, 0.534), (100, 500, 0.314)])
def test_mean_crop_area_is_that_of_the_official_sampler(height: int, width: int, share: float) -> None:
    rows = draw(num=40_000, height=height, width=width)
    area = rows[..., p.CROP_H].astype(float) * rows[..., p.CROP_W] / (height * width)
    # Published to three digits from 40,000 draws with a standard deviation of about 0.25: 4 standard errors of both, and rounding.
    assert area.mean() == pytest.approx(share, abs=4 * 0.25 * math.sqrt(1 / 40_000 + 1 / 80_000) + 0.0005)


def test_share_of_crops_clamped_to_full_height_is_that_of_the_official_sampler() -> None:
    assert (draw(num=40_000)[..., p.CROP_H] == 375).mean() == pytest.approx(0.26, abs=0.01)


def test_crops_lie_inside_the_image_and_reach_every_edge() -> None:
    rows = draw(height=13, width=9)
    bottom, right = rows[..., p.CROP_Y] + rows[..., p.CROP_H], rows[..., p.CROP_X] + rows[..., p.CROP_W]
    for low, high, size in ((rows[..., p.CROP_Y], bottom, 13), (rows[..., p.CROP_X], right, 9)):
        assert low.min() == 0
        assert high.max() == size
        assert (high > low).all()
        assert (low == np.rint(low)).all()


def test_offsets_are_uniform_over_every_whole_position() -> None:
    pair = both(PAPER, crop_area=(0.25, 0.25), crop_aspect=(1.0, 1.0))
    rows = draw(pair, height=20, width=20)
    for column in (p.CROP_Y, p.CROP_X):
        counts = np.bincount(rows[..., column].ravel().astype(int), minlength=11)
        expected = 2 * NUM / 11
        assert len(counts) == 11
        assert ((counts - expected) ** 2 / expected).sum() < 29.6  # chi-square, 10 degrees of freedom, p = 0.001


def test_a_one_pixel_image_gives_one_pixel_crops() -> None:
    assert (draw(num=50, height=1, width=1)[..., : p.CROP_W + 1] == [0, 0, 1, 1]).all()


@pytest.mark.parametrize("view", [0, 1])
def test_operations_fire_as_often_as_table_6_says(view: int) -> None:
    rows = draw()[:, view]
    spec = (PAPER.view1, PAPER.view2)[view]
    frequencies = {
        "flip_p": rows[:, p.FLIP] == 1,
        "jitter_p": rows[:, p.ORDER] >= 0,
        "gray_p": rows[:, p.GRAY] == 1,
        "blur_p": rows[:, p.SIGMA] > 0,
        "solarize_p": rows[:, p.SOLARIZE] == 0.5,
    }
    for name, fires in frequencies.items():
        probability = getattr(spec, name)
        assert abs(fires.mean() - probability) <= 4 * math.sqrt(probability * (1 - probability) / NUM), name


@pytest.mark.parametrize(
    ("column", "low", "high"),
    [(p.BRIGHTNESS, -0.4, 0.4), (p.CONTRAST, 0.6, 1.4), (p.SATURATION, 0.8, 1.2), (p.HUE, -0.1, 0.1), (p.SIGMA, 0.1, 2.0)],
)
def test_magnitudes_are_uniform_over_their_range(column: int, low: float, high: float) -> None:
    rows = draw()[:, 0]
    drawn = rows[rows[:, p.ORDER] >= 0, column]
    counts, _ = np.histogram(drawn, bins=20, range=(low - 1e-6, high + 1e-6))
    expected = len(drawn) / 20
    assert counts.sum() == len(drawn)
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


def test_all_24_orders_are_equally_likely() -> None:
    codes, counts = np.unique(draw(PAPER)[..., p.ORDER], return_counts=True)
    assert codes[0] == -1
    expected = counts[1:].sum() / 24
    assert len(counts[1:]) == 24
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 49.7  # chi-square, 23 degrees of freedom, p = 0.001
    digits = {tuple(int(code) // 4**place % 4 for place in (3, 2, 1, 0)) for code in codes[1:]}
    assert digits == set(permutations(range(4)))


def test_operations_that_do_not_fire_leave_neutral_values() -> None:
    rows = draw()
    idle = rows[rows[..., p.ORDER] < 0]
    assert len(idle) > 0
    neutral = {p.BRIGHTNESS: 0, p.CONTRAST: 1, p.SATURATION: 1, p.HUE: 0}
    for column, value in neutral.items():
        assert (idle[:, column] == value).all()
    assert (rows[:, 0, p.SOLARIZE] == 2).all()
    assert (rows[..., p.ROTATION_DEG] == 0).all()


def test_views_epochs_seeds_and_neighbours_are_uncorrelated() -> None:
    base = draw()
    others = {"view": base[:, 1], "epoch": draw(epoch=1)[:, 0], "seed": draw(seed=8)[:, 0], "neighbour": draw(first=1)[:, 0]}
    for name, other in others.items():
        for column in (p.CROP_Y, p.CROP_H, p.FLIP, p.BRIGHTNESS, p.HUE):
            correlation = np.corrcoef(base[:, 0, column], other[:, column])[0, 1]
            assert abs(correlation) < 4.5 / math.sqrt(NUM), (name, column)


def test_draws_within_a_row_are_uncorrelated() -> None:
    rows = draw(both(PAPER, jitter_p=1.0), height=400, width=400)[:, 0]
    columns = [p.CROP_H, p.FLIP, p.BRIGHTNESS, p.CONTRAST, p.SATURATION, p.HUE, p.GRAY, p.SIGMA]
    off_diagonal = np.corrcoef(rows[:, columns].T) - np.eye(len(columns))
    assert np.abs(off_diagonal).max() < 4.5 / math.sqrt(NUM)


def test_a_row_depends_on_its_sample_alone_not_on_the_batch() -> None:
    whole = draw(num=64)
    order = np.random.default_rng(0).permutation(64)[:10]
    some = p.draw_parameters(PAPER, seed=7, epoch=0, index=order, height=np.full(10, 375), width=np.full(10, 500))
    np.testing.assert_array_equal(some, whole[order])


@pytest.mark.parametrize("name", ["no_flip", "no_blur", "no_colour", "no_solarize_in_view2"])
def test_turning_one_operation_off_leaves_the_other_draws_unchanged(name: str) -> None:
    full, ablated = draw(num=2000), draw(ABLATIONS[name], num=2000)
    switched = {
        "no_flip": {p.FLIP},
        "no_blur": {p.SIGMA},
        "no_colour": {p.ORDER, p.BRIGHTNESS, p.CONTRAST, p.SATURATION, p.HUE, p.GRAY},
        "no_solarize_in_view2": {p.SOLARIZE},
    }[name]
    changed = {column for column in range(p.NUM_COLUMNS) if (full[..., column] != ablated[..., column]).any()}
    assert changed == switched


def test_rotation_is_uniform_both_ways_and_a_fraction_of_its_limit() -> None:
    angles = draw(both(PAPER, rotation_deg=20.0))[..., p.ROTATION_DEG]
    assert -20 <= angles.min() < -19.9
    assert 19.9 < angles.max() <= 20
    assert angles.mean() == pytest.approx(0, abs=4 * 20 / math.sqrt(3 * 2 * NUM))


def test_a_pair_can_give_each_view_its_own_crop_range() -> None:
    pair = replace(PAPER, view2=replace(PAPER.view2, crop_area=(0.05, 0.05)))
    share = draw(pair, num=500)[..., p.CROP_H] * draw(pair, num=500)[..., p.CROP_W] / (375 * 500)
    assert share[:, 1] == pytest.approx(0.05, abs=0.002)
    assert share[:, 0].max() > 0.5


@pytest.mark.parametrize(("seed", "epoch", "name"), [(-1, 0, "seed = -1"), (2**63, 0, "seed = "), (0, -1, "epoch = -1")])
def test_seeds_and_epochs_out_of_range_are_refused(seed: int, epoch: int, name: str) -> None:
    with pytest.raises(UserError, match=name):
        draw(num=1, seed=seed, epoch=epoch)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (375, 500, (24, 86, 328, 328)),  # int(.875 * 375) = 328; (375 - 328 + 1) // 2, (500 - 328 + 1) // 2
        (256, 256, (16, 16, 224, 224)),
        (40, 40, (3, 3, 35, 35)),
        (9, 8, (1, 1, 7, 7)),
        (1, 1, (0, 0, 1, 1)),
        (1, 4, (0, 2, 1, 1)),
        (2, 2, (1, 1, 1, 1)),
    ],
)
def test_centre_crop_is_deepminds_evaluation_window(height: int, width: int, box: tuple[int, int, int, int]) -> None:
    rows = p.centre_crop_parameters(height=np.array([height]), width=np.array([width]))
    assert rows.shape == (1, 1, p.NUM_COLUMNS)
    assert tuple(rows[0, 0, : p.CROP_W + 1]) == box
    assert list(rows[0, 0, p.FLIP :]) == [0, 0, -1, 0, 1, 1, 0, 0, 0, 2]
