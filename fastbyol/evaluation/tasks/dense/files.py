"""Images, label images and depth images of a data folder, read with their sizes checked, and the complaints about them collected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastbyol.config.console import printable
from fastbyol.config.errors import UserError, shortened
from fastbyol.data.formats.pillow_decoding import UndecodableImage, decode_with_pillow, image_size, load_image
from fastbyol.evaluation.tasks.job import Job
from fastbyol.host.cores import default_workers
from fastbyol.host.progress import Progress
from fastbyol.ranks.process_group import broadcast_from_main

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


def size_of(path: Path) -> tuple[int, int]:
    """Returns (height, width) from the file's header. Raises UserError if it has none."""
    try:
        return image_size(path)
    except (UndecodableImage, OSError) as error:
        raise UserError(f"{printable(str(path))}: cannot be read as an image ({shortened(error)})") from error


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


def require_sound(job: Job, what: str, items: Sequence[Any], check: Callable[[Any], Any]) -> list[Any]:
    """Calls the check with every item on rank 0, in threads, and returns on every rank what it returned for each; raises one UserError on
    all ranks if any of the calls raised one.

    Checked before the training starts: in the middle of it, hours would be lost. The message is the first complaint, with the number of
    items that have one.
    """
    complaints, found = broadcast_from_main(_checked(what, items, check) if job.process.is_main else ([], []))
    if complaints:
        more = f" ({len(complaints):,} of {len(items):,} {what} have such a fault)" if len(complaints) > 1 else ""
        raise UserError(f"{complaints[0]}{more}; correct it, or take it off the list")
    return found


def _checked(what: str, items: Sequence[Any], check: Callable[[Any], Any]) -> tuple[list[str], list[Any]]:
    """Returns the complaints, and what the check returned for the items without one."""

    def checked(item: Any) -> tuple[str | None, Any]:
        try:
            return None, check(item)
        except UserError as error:
            return str(error), None

    complaints, found = [], []
    with ThreadPoolExecutor(default_workers()) as pool, Progress(f"checking {what}", len(items), unit="files") as progress:
        for complaint, value in pool.map(checked, items):
            progress.advance()
            if complaint is not None:
                complaints.append(complaint)
            else:
                found.append(value)
    return complaints, found


def _load(path: Path) -> Image.Image:
    try:
        return load_image(path.read_bytes())
    except (UndecodableImage, OSError) as error:
        raise UserError(f"{printable(str(path))}: cannot be read as an image ({shortened(error)})") from error
