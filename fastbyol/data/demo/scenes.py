"""Demo images of kind scenes: coloured, textured silhouettes on grey clutter, drawn by code, with exact annotations.

A class is a shape with a pattern (16 classes; all shapes have the same area). Position, size, rotation, colours, light and background are
nuisance factors. Backgrounds are grey and low in contrast: a strong background would be a shortcut to tell images apart, and BYOL would then
learn nothing within minutes. Beside the ImageFolder of train/ and val/, each image has these annotations:

    annotations/<split>/<class>/<name>_mask.png     uint8: 0 background, else the class's index in CLASS_NAMES plus 1 (as in VOC)
    annotations/<split>/<class>/<name>_depth.png    uint16: distance in millimetres
    annotations/<split>/<class>/boxes.json          {name: [[x_min, y_min, x_max, y_max], …]} in px; x_max and y_max are exclusive

The same images lie in voc/ and nyu/ too, in the layouts of the paper's dense tasks (`scene_layouts.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastbyol.data.demo.folder import SPLITS, DemoSettings, image_rng, save_jpeg, write_image_folder
from fastbyol.data.demo.scene_layouts import make_folders, scene_id, write_in_layouts, write_lists

CANVAS_PX = 48
SHAPES = ("cross", "disc", "star", "triangle")
PATTERNS = ("checks", "dots", "plain", "stripes")
CLASS_NAMES = tuple(f"{shape}_{pattern}" for shape in SHAPES for pattern in PATTERNS)
"""Class names in alphabetical order, so that labels are the same as ImageFolder's."""

OBJECT_DEPTH_M = (1.8, 2.7)
BACKGROUND_DEPTH_M = (4.5, 8.0)
ROTATION_DEG = (-35.0, 35.0)
_BACKGROUND_GREY = (0.42, 0.52)
_CLUTTER_CONTRAST = 0.08
"""Contrast of the clutter. With 0.2, and twice the variation of the light, BYOL learnt the backgrounds and stayed at 44 % linear."""
_RADIUS_PX_AT_1M = 32.0
_REACH = 1.25
"""Largest distance of any shape's outline from its centre, in radii."""
_RELIEF_M = 0.2
_HAZE_LENGTH_M = 12.0
_SUPERSAMPLING = 3
"""Samples per pixel and axis. Odd, so that one is at the pixel's centre: mask and depth are taken there, without averaging."""

Grid = np.ndarray
"""float32 (S, S): one value per sample; S = 144."""


@dataclass(frozen=True)
class Scene:
    """One drawn image with its annotations."""

    image: np.ndarray
    """Pixels, uint8 (48, 48, 3)."""
    mask: np.ndarray
    """True where the object is, sampled at pixel centres, bool (48, 48)."""
    boxes: tuple[tuple[int, int, int, int], ...]
    """Tight box of each object: x_min, y_min, x_max, y_max in px, the last two exclusive."""
    depth: np.ndarray
    """Distance in metres, sampled at pixel centres, float32 (48, 48)."""


@dataclass(frozen=True)
class SceneClass:
    """Draws and writes the scenes of one class in one split; a `folder.ClassWriter`."""

    split: str
    label: int
    seed: int
    num_images: int

    def write(self, root: Path) -> None:
        images, annotations = (root / top / self.split / CLASS_NAMES[self.label] for top in (".", "annotations"))
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        make_folders(root, split=self.split)
        boxes = {}
        for index in range(self.num_images):
            name = f"{index:05d}"
            scene = draw_scene(self.label, rng=image_rng(self.seed, self.split, self.label, index))
            image_file, depth_file = images / f"{name}.jpg", annotations / f"{name}_depth.png"
            mask = scene.mask.astype(np.uint8) * (self.label + 1)
            save_jpeg(scene.image, image_file)
            Image.fromarray(mask).save(annotations / f"{name}_mask.png")
            Image.fromarray(np.round(scene.depth * 1000).astype(np.uint16)).save(depth_file)
            boxes[name] = scene.boxes
            write_in_layouts(
                root,
                split=self.split,
                identity=scene_id(self.split, CLASS_NAMES[self.label], index),
                class_name=CLASS_NAMES[self.label],
                mask=mask,
                boxes=scene.boxes,
                depth=scene.depth,
                image_file=image_file,
                depth_file=depth_file,
            )
        (annotations / "boxes.json").write_text(json.dumps(boxes) + "\n")


@dataclass(frozen=True)
class SceneLists:
    """Writes the lists of a split's ids into the layouts; a `folder.ClassWriter` of no image."""

    split: str
    per_class: int
    num_images: int = 0

    def write(self, root: Path) -> None:
        identities = [scene_id(self.split, name, index) for name in CLASS_NAMES for index in range(self.per_class)]
        write_lists(root, split=self.split, identities=identities, class_names=CLASS_NAMES)


def write_scenes(out: Path, *, settings: DemoSettings, overwrite: bool) -> None:
    """Writes the ImageFolder of sixteen classes, its annotations, and the layouts voc/ and nyu/ to `out`.

    Raises:
        UserError: `out` can't be used.
    """
    writers = [SceneClass(split, label, settings.seed, settings.per_class(split)) for split in SPLITS for label in range(len(CLASS_NAMES))]
    lists = [SceneLists(split, settings.per_class(split)) for split in SPLITS]
    write_image_folder(out, kind="scenes", class_writers=[*writers, *lists], settings=settings, overwrite=overwrite)


def draw_scene(label: int, *, rng: np.random.Generator) -> Scene:
    """Draws a scene with one object of class `CLASS_NAMES[label]`, entirely inside the image and in front of everything else."""
    # The samples' positions in px, x as (1, S) and y as (S, 1).
    positions = (np.arange(CANVAS_PX * _SUPERSAMPLING, dtype=np.float32) + 0.5) / _SUPERSAMPLING
    x, y = positions[None, :], positions[:, None]
    grey, depth = _draw_background(x, y, rng)
    colour, inside, object_depth = _draw_object(x, y, label, rng)
    # Each sample is either object or background; averaging the samples of a pixel smooths the edges.
    albedo, depth = np.where(inside, colour, grey), np.where(inside, object_depth, depth)
    # Grey haze: contrast decreases with distance.
    haze = np.float32(rng.uniform(0.45, 0.5))
    image = _downsample(haze + (albedo - haze) * np.exp(depth / np.float32(-_HAZE_LENGTH_M))) * _light(rng)
    image += rng.normal(0.0, rng.uniform(0.005, 0.02), image.shape)
    middle = slice(_SUPERSAMPLING // 2, None, _SUPERSAMPLING)
    mask = inside[middle, middle]
    columns, rows = (np.flatnonzero(mask.any(axis=axis)).tolist() for axis in (0, 1))
    box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    bytes_last = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    return Scene(np.ascontiguousarray(bytes_last), mask, (box,), depth[middle, middle])


def _downsample(samples: np.ndarray) -> np.ndarray:
    """Averages the samples of each pixel: (3, S, S) -> (3, 48, 48). Sums of slices are several times as fast as a mean over short axes."""
    every = [slice(start, None, _SUPERSAMPLING) for start in range(_SUPERSAMPLING)]
    rows = np.add.reduce([samples[:, rows] for rows in every])
    return np.add.reduce([rows[:, :, columns] for columns in every]) / np.float32(_SUPERSAMPLING**2)


def _rotated(x: Grid, y: Grid, *, centre: np.ndarray, angle: float, size: np.ndarray | float) -> tuple[Grid, Grid]:
    """Returns the samples' positions in the coordinates of a figure: origin at its centre, rotated by `angle` (rad), in units of its size (px)."""
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    width, height = np.broadcast_to(np.asarray(size, dtype=np.float32), 2)
    return (cos * dx + sin * dy) / width, (cos * dy - sin * dx) / height


def _draw_background(x: Grid, y: Grid, rng: np.random.Generator) -> tuple[Grid, Grid]:
    """Returns grey values and depth (m) of a slanted plane with a few ellipses and rectangles in front of it, drawn from far to near."""
    far, near = BACKGROUND_DEPTH_M[1], rng.uniform(6.0, 7.0)
    slant = rng.uniform(-0.3, 0.3) * (x / CANVAS_PX - 0.5)
    depth = (far - 0.3 - (far - near - 0.3) * y / CANVAS_PX + slant).astype(np.float32)
    base = rng.uniform(*_BACKGROUND_GREY)
    grey = np.full(depth.shape, base, dtype=np.float32)
    for distance in np.sort(rng.uniform(BACKGROUND_DEPTH_M[0], 5.7, size=rng.integers(4, 9)))[::-1]:
        size = rng.uniform(2.5, 9.0, size=2)
        u, v = _rotated(x, y, centre=rng.uniform(0, CANVAS_PX, size=2), angle=rng.uniform(0, np.pi), size=size)
        inside = (u * u + v * v < 1) if rng.random() < 0.5 else (np.maximum(abs(u), abs(v)) < 1)
        depth[inside] = distance
        grey[inside] = base + rng.uniform(-_CLUTTER_CONTRAST, _CLUTTER_CONTRAST)
    return grey, depth


def _draw_object(x: Grid, y: Grid, label: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Grid]:
    """Returns the object's colours (3, S, S), its mask (bool) and its depth (m). A nearer object is larger, as in a photograph."""
    shape, pattern = divmod(label, len(PATTERNS))
    distance = rng.uniform(*OBJECT_DEPTH_M)
    radius = _RADIUS_PX_AT_1M / distance
    centre = rng.uniform(_REACH * radius, CANVAS_PX - _REACH * radius, size=2)
    u, v = _rotated(x, y, centre=centre, angle=np.deg2rad(rng.uniform(*ROTATION_DEG)), size=radius)
    inwards = _SHAPES[SHAPES[shape]](u, v)
    phase = rng.uniform(0, 1, size=2).astype(np.float32)
    marked = _PATTERNS[PATTERNS[pattern]](u + phase[0], v + phase[1])
    # A bright and a dark colour of unrelated hues, in this order: a random order would identify images better than any shape.
    first = _rgb(rng.uniform(), saturation=rng.uniform(0.2, 0.8), value=rng.uniform(0.85, 1.0))
    second = _rgb(rng.uniform(), saturation=rng.uniform(0.5, 1.0), value=rng.uniform(0.2, 0.4))
    # Cushion-shaped relief: the middle is nearer than the edge, and brighter.
    relief = np.sqrt(np.clip(inwards / 0.4, 0, 1))
    colour = np.where(marked, first, second) * (0.7 + 0.3 * relief)
    return colour, inwards > 0, (distance - _RELIEF_M * relief).astype(np.float32)


def _rgb(hue: float, *, saturation: float, value: float) -> np.ndarray:
    """Returns the RGB colour of a hue (0 to 1), float32 (3, 1, 1)."""
    ramp = np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1
    return (value * (1 - saturation + saturation * np.clip(ramp, 0, 1))).astype(np.float32)[:, None, None]


def _light(rng: np.random.Generator) -> np.ndarray:
    """Returns the factors of a light of random strength and tint that decreases in a random direction, float32 (3, 48, 48)."""
    position = (np.arange(CANVAS_PX, dtype=np.float32) + 0.5) / CANVAS_PX - 0.5
    direction = rng.uniform(0, 2 * np.pi)
    across = float(np.cos(direction)) * position[None, :] + float(np.sin(direction)) * position[:, None]
    tint = rng.uniform(0.98, 1.02, size=(3, 1, 1)).astype(np.float32)
    return tint * (rng.uniform(0.9, 1.1) * (1 + rng.uniform(0, 0.15) * across))


def _star(u: Grid, v: Grid) -> Grid:
    # By symmetry, fold the plane into half of one of the five points; there the star is the half-plane left of the edge from tip to notch.
    tip, notch, half = 1.18, 0.59, np.float32(np.pi / 5)
    radius, angle = np.sqrt(u * u + v * v), np.arctan2(u, -v)
    folded = abs((angle + half) % (2 * half) - half)
    edge = np.array([notch * np.cos(half) - tip, notch * np.sin(half)])
    normal = (np.array([edge[1], -edge[0]]) / np.hypot(*edge)).astype(np.float32)
    return normal[0] * (tip - radius * np.cos(folded)) - normal[1] * radius * np.sin(folded)


def _fraction(value: Grid) -> Grid:
    return value - np.floor(value)


def _dots(u: Grid, v: Grid) -> np.ndarray:
    across, along = _fraction(u / 0.6) - 0.5, _fraction(v / 0.6) - 0.5
    return across * across + along * along < 0.32**2


_SHAPES: dict[str, Callable[[Grid, Grid], Grid]] = {
    "cross": lambda u, v: np.maximum(np.minimum(0.31 - abs(u), 1 - abs(v)), np.minimum(1 - abs(u), 0.31 - abs(v))),
    "disc": lambda u, v: 0.81 - np.sqrt(u * u + v * v),
    "star": _star,
    "triangle": lambda u, v: 0.62 - np.maximum(v, np.float32(np.sqrt(0.75)) * abs(u) - 0.5 * v),
}
"""Function of each shape: returns the distance inwards from its outline, in radii, negative outside. All areas are 2.04 +- 0.05 square radii."""
_PATTERNS: dict[str, Callable[[Grid, Grid], np.ndarray]] = {
    "checks": lambda u, v: (_fraction(u / 0.8) < 0.5) == (_fraction(v / 0.8) < 0.5),
    "dots": _dots,
    "plain": lambda u, v: np.ones(np.broadcast_shapes(u.shape, v.shape), dtype=bool),
    "stripes": lambda u, v: np.broadcast_to(_fraction(u / 0.56) < 0.5, np.broadcast_shapes(u.shape, v.shape)),
}
"""Function of each pattern: returns True where the first colour is used, False for the second."""
