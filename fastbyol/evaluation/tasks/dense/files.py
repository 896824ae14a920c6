"""Images, label images and depth images of a data folder, read with their sizes checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastbyol.config.console import printable
from fastbyol.config.errors import UserError, shortened
from fastbyol.data.formats.pillow_decoding import UndecodableImage, decode_with_pillow, load_image

MAX_LIST_BYTES = 64 * 2**20
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


def read_image(path: Path) -> Tensor:
    """Returns the pixels, uint8 (3, H, W). Raises UserError if the file cannot be read or decoded."""
    try:
        pixels = decode_with_pillow(path.read_bytes())
    except (UndecodableImage, OSError) as error:
        raise UserError(f"{printable(str(path))}: cannot be read as an image ({shortened(error)})") from error
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def read_labels(path: Path) -> Tensor:
    """Returns the label of each pixel, uint8 (H, W), of a palette or gray image. Raises UserError for any other kind."""
    image = _load(path)
    if image.mode not in ("P", "L", "1"):
        raise UserError(
            f"{printable(str(path))}: its pixels are of mode {image.mode}; a label image has a palette or 8-bit gray values, which are the class numbers"
        )
    return torch.from_numpy(np.array(image, dtype=np.uint8))


def read_depth(path: Path) -> Tensor:
    """Returns the stored depths, float32 (H, W), of a 16-bit gray image, unscaled. Raises UserError for any other kind."""
    image = _load(path)
    if not image.mode.startswith("I"):
        raise UserError(f"{printable(str(path))}: its pixels are of mode {image.mode}; a depth image has 16-bit gray values")
    values = np.array(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{printable(str(path))}: has values from {values.min()} to {values.max()}; a depth image has 16-bit gray values")
    return torch.from_numpy(values.astype(np.float32))


def decoded_size(path: Path) -> tuple[int, int]:
    """Returns (height, width) of the decoded image: what its header says may be all that is left of it. Raises UserError if it is damaged."""
    _, height, width = read_image(path).shape
    return height, width


def read_names(path: Path) -> list[str]:
    """Returns the first word of each line of a list. Raises UserError if it cannot be read, is empty, or a name leads out of its folder."""
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise UserError(f"{printable(str(path))}: larger than 64 MiB, so it is not a list of names")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{printable(str(path))}: cannot be read as a list of names ({shortened(error)})") from error
    names = [line.split()[0] for line in lines if line.strip()]
    for name in names:
        if "/" in name or "\\" in name or name.startswith(".") or "\0" in name:
            raise UserError(f"{printable(str(path))}: {name!r} is not a name of an image")
    if not names:
        raise UserError(f"{printable(str(path))}: names no image")
    return names


def image_named(folder: Path, name: str) -> Path:
    """Returns the image of this name, of any suffix. Raises UserError if there is none."""
    for suffix in IMAGE_SUFFIXES:
        if (path := folder / f"{name}{suffix}").is_file():
            return path
    raise UserError(f"{printable(str(folder / name))}.jpg: no such image, but it is listed")


def _load(path: Path) -> Image.Image:
    try:
        return load_image(path.read_bytes())
    except (UndecodableImage, OSError) as error:
        raise UserError(f"{printable(str(path))}: cannot be read as an image ({shortened(error)})") from error
