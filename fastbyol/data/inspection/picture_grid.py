"""Draws a picture of a data set: some classes with their names, one row of images each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastbyol.config.errors import UserError
from fastbyol.data.formats.pillow_decoding import UndecodableImage
from fastbyol.data.inputs.listing import ImageListing
from fastbyol.data.inspection.inventory import ImageSet

ROWS, COLUMNS = 12, 8
TILE_PX, MARGIN_PX, LABEL_PX = 112, 6, 150
_NAME_CHARACTERS = 22
_PAPER, _INK, _PALE = "white", "black", "#888888"


def write_picture_grid(data: Path | ImageListing, *, out: Path) -> None:
    """Writes a PNG with images of some classes. Classes, and images within a class, are chosen at equal distances; images are not cropped.

    Args:
        data: path of converted data, or the listing of other images.
        out: the .png to write or replace.

    Raises:
        UserError: as for `open_converted`, or `out` cannot be written.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"--grid {out}: must end in .png")
    images = ImageSet(data)
    used = np.unique(images.labels)
    rows = used[_spread(len(used), ROWS)]
    step = TILE_PX + MARGIN_PX
    sheet = Image.new("RGB", (LABEL_PX + COLUMNS * step + MARGIN_PX, len(rows) * step + MARGIN_PX), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(rows.tolist()):
        y = MARGIN_PX + row * step
        members = np.flatnonzero(images.labels == label)
        name = images.class_names[label] if label >= 0 else "no label"
        for number, line in enumerate((name, f"label {label}", f"{len(members):,} images")):
            text = line.encode("ascii", errors="replace").decode()
            text = text if len(text) <= _NAME_CHARACTERS else text[: _NAME_CHARACTERS - 1] + "~"
            at = MARGIN_PX, y + TILE_PX // 3 + 13 * number
            draw.text(at, text, fill=_PALE if number else _INK, font=ImageFont.load_default())
        for column, index in enumerate(members[_spread(len(members), COLUMNS)].tolist()):
            _paste(sheet, (LABEL_PX + column * step, y), images, index)
    try:
        sheet.save(out)
    except OSError as error:
        raise UserError(f"--grid {out}: cannot be written ({error.strerror or error}); choose another file") from error


def _spread(total: int, wanted: int) -> np.ndarray:
    """Returns up to `wanted` evenly spaced positions in range(total)."""
    return np.unique(np.linspace(0, total - 1, min(total, wanted)).round().astype(np.int64))


def _paste(sheet: Image.Image, at: tuple[int, int], images: ImageSet, index: int) -> None:
    try:
        tile = Image.fromarray(images.pixels(index))
    except (UndecodableImage, OSError):
        ImageDraw.Draw(sheet).text(at, "does not decode", fill=_PALE, font=ImageFont.load_default())
        return
    scale = TILE_PX / max(tile.size)
    width, height = (max(1, round(side * scale)) for side in tile.size)
    tile = tile.resize((width, height), Image.Resampling.LANCZOS)
    sheet.paste(tile, (at[0] + (TILE_PX - width) // 2, at[1] + (TILE_PX - height) // 2))
