"""Samples the random parameters of every view of every image; the same counter-based sampler serves every backend and executor.

Every number is a keyed hash of (seed, epoch, sample index, view, slot), so a view does not depend on batch order, worker count, rank
or resume point, and there is no generator state to save. Each quantity has its own slot: turning one operation off leaves all other
draws unchanged.
"""

from __future__ import annotations

from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import require
from fastbyol.config.views import ViewPair

COLUMNS = (
    *("crop_y", "crop_x", "crop_h", "crop_w", "flip", "rotation_deg", "order"),
    *("brightness", "contrast", "saturation", "hue", "gray", "sigma", "solarize"),
)
"""Meaning of a parameter row, in order.

crop_*: pixels of the image, whole numbers.
flip, gray: 0 or 1.
rotation_deg: counter-clockwise; 0 = none.
order: the jitter's four operations as base-4 digits, first operation first (0 brightness, 1 contrast, 2 saturation, 3 hue); -1 = no jitter.
brightness, hue: added; 0 = none. contrast, saturation: factors; 1 = none. Under torchvision's semantics brightness is a factor too.
sigma: pixels of the view; 0 = no blur.
solarize: threshold; 2 = off.
"""
# The CPU kernel's on-disk cache contains these numbers but is only invalidated by changes of cpu_kernel.py: touch that file when they change.
CROP_Y, CROP_X, CROP_H, CROP_W, FLIP, ROTATION_DEG, ORDER = range(7)
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, SIGMA, SOLARIZE = range(7, len(COLUMNS))
NUM_COLUMNS = len(COLUMNS)
NO_JITTER = -1.0
SOLARIZE_OFF = 2.0

SLOTS = (
    *("area", "aspect", "offset_y", "offset_x", "flip", "rotation", "jitter", "order"),
    *("brightness", "contrast", "saturation", "hue", "gray", "blur", "sigma", "solarize"),
)
"""Counter of each draw. Append only: the position of a slot is part of what a seed means."""
RETRIES = 9
"""Number of retries of torchvision's rejected crop."""
_FIRST_RETRY = 1000  # counter of the first retry's area, far from SLOTS; from there area and aspect of each retry alternate
_SLOT = {name: np.uint64(place) for place, name in enumerate(SLOTS)}

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_EPOCH_SALT = np.uint64(0x632BE59BD9B4E019)
_SAMPLE_SALT = np.uint64(0xD1B54A32D192ED03)
_ORDER_CODES = np.array([64 * a + 16 * b + 4 * c + d for a, b, c, d in permutations(range(4))], dtype=np.float32)
_NEUTRAL = {ORDER: NO_JITTER, CONTRAST: 1.0, SATURATION: 1.0, SOLARIZE: SOLARIZE_OFF}
EVAL_SHARE = 0.875  # DeepMind: 224 / (224 + 32 px of padding), whatever the view's size

Words, Integers = NDArray[np.uint64], NDArray[np.int64]
Floats = NDArray[np.float64]


def _mix(x: Words) -> Words:
    """Applies the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    # Overflow is intended. numpy wraps arrays of at least one dimension silently, but warns about scalars.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniforms(*, seed: int, epoch: int, index: NDArray[np.int64], views: int, slots: range) -> Floats:
    """Returns (N, views, len(slots)) uniform draws in [0, 1) of 53 random bits."""
    # Each part of the key is mixed before the next joins it: a plain sum would give seed 1, epoch 0 the draws of seed 0, epoch 1.
    run = _mix(np.array([seed], dtype=np.uint64) + _GOLDEN)
    run = _mix(run ^ _mix(np.array([epoch], dtype=np.uint64) + _EPOCH_SALT))
    sample = index.astype(np.uint64)[:, None] * np.uint64(views) + np.arange(views, dtype=np.uint64)
    key = _mix(run ^ _mix(sample + _SAMPLE_SALT))
    counter = np.arange(slots.start + 1, slots.stop + 1, dtype=np.uint64) * _GOLDEN
    return (_mix(key[..., None] + counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _neutral(num: int, views: int) -> NDArray[np.float32]:
    rows = np.zeros((num, views, NUM_COLUMNS), dtype=np.float32)
    for column, value in _NEUTRAL.items():
        rows[..., column] = value
    return rows


def _per_view(pair: ViewPair, name: str) -> Floats:
    """Returns the field of both views, (2,) or (2, 2), to broadcast over the images."""
    return np.array([getattr(pair.view1, name), getattr(pair.view2, name)], dtype=np.float64)


def draw_parameters(pair: ViewPair, *, seed: int, epoch: int, index: Integers, height: Integers, width: Integers) -> NDArray[np.float32]:
    """Draws the parameters of both views of each image, (N, 2, NUM_COLUMNS) float32 (columns: `COLUMNS`).

    index: (N,) positions of the images in the data set. height, width: (N,) of the decoded images in pixels, at least 1.

    Source: Grill et al., appendix B and table 6; DeepMind's code for the crop, or torchvision's (`ViewPair.semantics`). An operation
    of probability p is applied if its uniform draw u < p.
    """
    require(0 <= seed < 2**63, "seed", seed, "an integer in [0, 2^63 - 1]")
    require(0 <= epoch < 2**63, "epoch", epoch, "an integer >= 0")
    uniforms = partial(_uniforms, seed=seed, epoch=epoch, index=np.asarray(index, dtype=np.int64), views=2)
    uniform = uniforms(slots=range(len(SLOTS)))
    rows, boxes = _neutral(len(uniform), 2), slice(CROP_Y, CROP_W + 1)
    height, width = np.asarray(height)[:, None], np.asarray(width)[:, None]
    if pair.semantics == "paper":
        rows[..., boxes] = _clamped_boxes(pair, uniform, height, width)
    else:
        retries = uniforms(slots=range(_FIRST_RETRY, _FIRST_RETRY + 2 * RETRIES))
        rows[..., boxes] = _fitting_boxes(pair, uniform, retries, height, width)
    _fill_colour(rows, pair, uniform)
    _fill_rest(rows, pair, uniform)
    return rows


def _clamped_boxes(pair: ViewPair, uniform: Floats, height: Integers, width: Integers) -> Floats:
    """Returns boxes (N, 2, 4) of y, x, h, w: sides clamped to the image and at least 1 px; offsets uniform over all integer positions."""
    # The paper's crop: no rejection, no tries, no central fallback, so its crops are larger than torchvision's.
    crop_h, crop_w = _drawn_sides(pair, uniform[..., _SLOT["area"]], uniform[..., _SLOT["aspect"]], height, width)
    crop_h, crop_w = np.clip(crop_h, 1, height), np.clip(crop_w, 1, width)
    return np.stack([*_drawn_offsets(uniform, height - crop_h, width - crop_w), crop_h, crop_w], axis=-1)


def _fitting_boxes(pair: ViewPair, uniform: Floats, retries: Floats, height: Integers, width: Integers) -> Floats:
    """Returns boxes (N, 2, 4) of y, x, h, w as torchvision does: the first try that fits, else a central one."""
    # (N, tries, 2): the views stay last, as in `_per_view`.
    area, aspect = (
        np.concatenate([uniform[..., None, _SLOT[name]], retries[..., first::2]], axis=-1).swapaxes(1, 2)
        for first, name in enumerate(("area", "aspect"))
    )
    tries_h, tries_w = _drawn_sides(pair, area, aspect, height[:, None], width[:, None])
    fits = (tries_h >= 1) & (tries_h <= height[:, None]) & (tries_w >= 1) & (tries_w <= width[:, None])
    first_fit, any_fits = fits.argmax(axis=1)[:, None], fits.any(axis=1)
    central_h, central_w = _central_sides(pair, height, width)
    crop_h = np.where(any_fits, np.take_along_axis(tries_h, first_fit, axis=1)[:, 0], central_h)
    crop_w = np.where(any_fits, np.take_along_axis(tries_w, first_fit, axis=1)[:, 0], central_w)
    spare_h, spare_w = height - crop_h, width - crop_w
    crop_y, crop_x = _drawn_offsets(uniform, spare_h, spare_w)
    crop_y, crop_x = np.where(any_fits, crop_y, spare_h // 2), np.where(any_fits, crop_x, spare_w // 2)
    return np.stack([crop_y, crop_x, crop_h, crop_w], axis=-1)


def _drawn_sides(pair: ViewPair, area: Floats, aspect: Floats, height: Integers, width: Integers) -> tuple[Floats, Floats]:
    """Returns height and width of the drawn area and aspect in whole pixels, which may exceed the image or be 0."""
    area_range, aspect_range = _per_view(pair, "crop_area"), np.log(_per_view(pair, "crop_aspect"))
    area = _between(area_range, area) * height * width
    aspect = np.exp(_between(aspect_range, aspect))
    return np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))


def _drawn_offsets(uniform: Floats, spare_h: NDArray[Any], spare_w: NDArray[Any]) -> tuple[Floats, Floats]:
    return np.floor(uniform[..., _SLOT["offset_y"]] * (spare_h + 1)), np.floor(uniform[..., _SLOT["offset_x"]] * (spare_w + 1))


def _central_sides(pair: ViewPair, height: Integers, width: Integers) -> tuple[Floats, Floats]:
    """Returns the sides of the whole image, or as much of its longer side as the aspect range allows."""
    narrowest, widest = _per_view(pair, "crop_aspect").T
    ratio = width / height
    crop_h = np.where(ratio < narrowest, np.rint(width / narrowest), height)
    crop_w = np.where(ratio > widest, np.rint(height * widest), width)
    return np.maximum(crop_h, 1), np.maximum(crop_w, 1)


def _between(bounds: Floats, uniform: Floats) -> Floats:
    return bounds[..., 0] + (bounds[..., 1] - bounds[..., 0]) * uniform


def _fill_colour(rows: NDArray[np.float32], pair: ViewPair, uniform: Floats) -> None:
    """Fills the jitter columns: whether all four operations are applied or none, one of 24 orders, magnitudes symmetric about neutral."""
    fires = uniform[..., _SLOT["jitter"]] < _per_view(pair, "jitter_p")
    order = _ORDER_CODES[(uniform[..., _SLOT["order"]] * len(_ORDER_CODES)).astype(np.int64)]
    rows[..., ORDER] = np.where(fires, order, NO_JITTER)
    neutral = _NEUTRAL if pair.semantics == "paper" else {**_NEUTRAL, BRIGHTNESS: 1.0}
    for name, column in (("brightness", BRIGHTNESS), ("contrast", CONTRAST), ("saturation", SATURATION), ("hue", HUE)):
        shift = _per_view(pair, name) * (2.0 * uniform[..., _SLOT[name]] - 1.0)
        rows[..., column] = np.where(fires, neutral.get(column, 0.0) + shift, neutral.get(column, 0.0))


def _fill_rest(rows: NDArray[np.float32], pair: ViewPair, uniform: Floats) -> None:
    rows[..., FLIP] = uniform[..., _SLOT["flip"]] < _per_view(pair, "flip_p")
    rows[..., ROTATION_DEG] = _per_view(pair, "rotation_deg") * (2.0 * uniform[..., _SLOT["rotation"]] - 1.0)
    rows[..., GRAY] = uniform[..., _SLOT["gray"]] < _per_view(pair, "gray_p")
    sigma = _between(_per_view(pair, "blur_sigma"), uniform[..., _SLOT["sigma"]])
    rows[..., SIGMA] = np.where(uniform[..., _SLOT["blur"]] < _per_view(pair, "blur_p"), sigma, 0.0)
    solarized = uniform[..., _SLOT["solarize"]] < _per_view(pair, "solarize_p")
    rows[..., SOLARIZE] = np.where(solarized, _per_view(pair, "solarize_threshold"), SOLARIZE_OFF)


def centre_crop_parameters(*, height: Integers, width: Integers, share: float = EVAL_SHARE) -> NDArray[np.float32]:
    """Returns (N, 1, NUM_COLUMNS) float32 for a centred square and nothing else, by default DeepMind's evaluation crop.

    height, width: (N,) of the decoded images in pixels, at least 1. share: the square's side over the image's short side, in (0, 1].
    """
    height, width = np.asarray(height, dtype=np.int64), np.asarray(width, dtype=np.int64)
    side = np.maximum((share * np.minimum(height, width)).astype(np.int64), 1)
    rows = _neutral(len(side), 1)
    # The half pixel goes to the top left, as in DeepMind's code; a crop of the whole image must still start at 0.
    rows[:, 0, CROP_Y] = np.minimum((height - side + 1) // 2, height - side)
    rows[:, 0, CROP_X] = np.minimum((width - side + 1) // 2, width - side)
    rows[:, 0, CROP_H] = rows[:, 0, CROP_W] = side
    return rows
