"""A contact sheet of what a run's loader draws: rows of images, several views of each, with the drawn parameters below."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fastbyol.augment import parameters as p
from fastbyol.augment.reference import jitter_order
from fastbyol.config.console import printable
from fastbyol.config.errors import UserError, require_at_least
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair
from fastbyol.data.build import backend_of, build_image_loader, build_loader
from fastbyol.evaluation.gallery import display_pixels, draw_parameters_and_views
from fastbyol.host.durable_files import durable_file

SMALLEST_TILE_PX = 112
"""Smaller views are enlarged by a whole factor, so that pixels stay visible."""
COLUMN_PX, LABEL_PX, LINE_PX, MARGIN_PX = 140, 130, 12, 8
CAPTION_LINES = 4
INK, PAPER = "black", "white"


@dataclass(frozen=True)
class Strip:
    """One image as drawn by one backend. pixels: (1 + 2 epochs, S, S, 3) uint8, centre crop first. captions: lines below each picture.
    label: text on the left.
    """

    pixels: NDArray[np.uint8]
    captions: list[list[str]]
    label: list[str]


def write_contact_sheet(
    data: Sequence[str], *, out: Path, views: ViewPair, backend: str = "auto", rows: int = 6, epochs: int = 2, seed: int = 0
) -> None:
    """Writes a PNG with `rows` random images of the data as drawn in the first `epochs` epochs of a run with this seed.

    Args:
        data: paths as for `data.train`; several must hold the same images for different backends and are shown below one another.
        out: PNG file to write or replace.
        views: the augmentation.
        backend: as `data.backend`.
        rows: number of images, at least 1.
        epochs: pairs of views of each image.
        seed: seed of the views, as in a run, and of the choice of images.

    Raises:
        UserError: no such data, several that do not hold the same images, a file that cannot be written.
    """
    require_at_least("--rows", rows, 1)
    require_at_least("--epochs", epochs, 1)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: must end in .png")
    drawn = [_strips(path, views=views, backend=backend, rows=rows, epochs=epochs, seed=seed) for path in data]
    _refuse_different_sets(data, drawn)
    title = f"{views.size_px} px, {views.semantics} semantics, seed {seed}" + (f": {data[0]}" if len(data) == 1 else "")
    header = ["centre crop", *(f"epoch {epoch}, view {view}" for epoch in range(epochs) for view in (1, 2))]
    # By image, then by backend, so that strips that should look alike are next to each other.
    sheet = _sheet([strip for strips in zip(*drawn, strict=True) for strip in _compared(strips)], header=header, title=title)
    try:
        with durable_file(out) as png:
            sheet.save(png, "png")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}); choose another file") from error


def _strips(path: str, *, views: ViewPair, backend: str, rows: int, epochs: int, seed: int) -> list[Strip]:
    config = DataConfig(train=path, backend=backend, workers=1, prefetch=1)
    with build_loader(config, views=views, seed=seed, global_batch=1, option="--data") as loader:
        order = torch.randperm(loader.num_samples, generator=torch.Generator().manual_seed(seed)).numpy()
        index = loader.decodable(order, at_most=rows).tolist()
        parameters, drawn = draw_parameters_and_views(loader, index=index, epochs=epochs)
    with build_image_loader(path, views=views, batch=1, backend=backend, workers=1, option="--data") as images:
        centre, names = images.pick(index), images.class_names
    name = backend_of(path, option="--data") if backend == "auto" else backend
    strips = []
    for row, sample in enumerate(index):
        pixels = display_pixels(torch.cat([centre.image[row : row + 1], drawn[row]]), views=views)
        captions = [[], *(caption(drawn_row, semantics=views.semantics) for drawn_row in parameters[row].numpy())]
        strips.append(
            Strip(pixels, captions, [f"image {sample}", names[label] if (label := int(centre.label[row])) >= 0 else "no label", name])
        )
    return strips


def _refuse_different_sets(data: Sequence[str], drawn: list[list[Strip]]) -> None:
    labels = [[strip.label[:2] for strip in strips] for strips in drawn]
    for path, one in zip(data, labels, strict=True):
        if one != labels[0]:
            raise UserError(f"--data {data[0]} {path}: do not hold the same images in the same order; convert both from one folder")


def _compared(strips: Sequence[Strip]) -> Iterator[Strip]:
    """Yields the strips of one image; all but the first also state how much their views differ from the first's."""
    first = strips[0].pixels[1:].astype(np.int64)
    yield strips[0]
    for strip in strips[1:]:
        difference = np.abs(strip.pixels[1:] - first)
        lines = [f"differs from {strips[0].label[2]}", f"by {difference.mean():.2f} of 255,", f"at most {difference.max()}"]
        yield Strip(strip.pixels, strip.captions, strip.label + lines)


def caption(row: NDArray[np.float32], *, semantics: str = "paper") -> list[str]:
    """Formats one parameter row as lines: crop (width x height + x + y) and flip, jitter in drawn order (two lines), the rest."""
    flip = ", flipped" if row[p.FLIP] > 0 else ""
    amounts = (
        f"bright {row[p.BRIGHTNESS]:+.2f}" if semantics == "paper" else f"bright x{row[p.BRIGHTNESS]:.2f}",
        f"contrast x{row[p.CONTRAST]:.2f}",
        f"satur x{row[p.SATURATION]:.2f}",
        f"hue {row[p.HUE]:+.3f}",
    )
    jitter = [amounts[op] for op in jitter_order(float(row[p.ORDER]))]
    rest = [
        f"turned {row[p.ROTATION_DEG]:+.0f} deg" if row[p.ROTATION_DEG] else "",
        "gray" if row[p.GRAY] > 0 else "",
        f"blur {row[p.SIGMA]:.2f}" if row[p.SIGMA] > 0 else "",
        "solarized" if row[p.SOLARIZE] <= 1 else "",
    ]
    crop = f"{row[p.CROP_W]:.0f}x{row[p.CROP_H]:.0f}+{row[p.CROP_X]:.0f}+{row[p.CROP_Y]:.0f}{flip}"
    lines = [crop, ", ".join(jitter[:2]), ", ".join(jitter[2:]), ", ".join(word for word in rest if word)]
    return [line for line in lines if line]


def _sheet(strips: Sequence[Strip], *, header: Sequence[str], title: str) -> Image.Image:
    scale = math.ceil(SMALLEST_TILE_PX / strips[0].pixels.shape[1])
    tile = scale * strips[0].pixels.shape[1]
    column, row = max(tile, COLUMN_PX) + MARGIN_PX, tile + CAPTION_LINES * LINE_PX + MARGIN_PX
    top = 2 * (LINE_PX + MARGIN_PX)
    sheet = Image.new("RGB", (LABEL_PX + len(header) * column + MARGIN_PX, top + len(strips) * row), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    draw.text((MARGIN_PX, MARGIN_PX // 2), printable(title), fill=INK, font=font)
    for place, text in enumerate(header):
        draw.text((LABEL_PX + place * column, LINE_PX + MARGIN_PX), text, fill=INK, font=font)
    for number, strip in enumerate(strips):
        y = top + number * row
        _text(draw, (MARGIN_PX, y), strip.label, font)
        for place, (pixels, lines) in enumerate(zip(strip.pixels, strip.captions, strict=True)):
            x = LABEL_PX + place * column
            sheet.paste(Image.fromarray(pixels).resize((tile, tile), Image.Resampling.NEAREST), (x, y))
            _text(draw, (x, y + tile), lines, font)
    return sheet


def _text(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> None:
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * LINE_PX), printable(line), fill=INK, font=font)
