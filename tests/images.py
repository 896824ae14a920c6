"""Small images, and folders of them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def smooth_image(seed: int, height: int, width: int) -> Image.Image:
    """Returns a colourful image without sharp edges, as photographs mostly are: JPEG decoders differ least on those."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """Returns the bytes of an image's file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_files(root: Path, files: Mapping[str, Image.Image | bytes | str]) -> Path:
    """Writes files by name, bytes as they are and images by their extension; a str is the target of a symbolic link. Returns the folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.symlink_to(content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path)
    return root


def write_many(root: Path, *, images: int, classes: int = 3, bad_every: int = 0) -> Path:
    """Writes a folder of `images` small JPEGs, no two alike; of every `bad_every` one is cut and one is a PNG."""
    photo = Image.effect_noise((48, 40), 60).convert("RGB")
    jpeg = encoded(photo)
    for index in range(images):
        comment = f"{index:08d}".encode()
        content = jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]
        if bad_every and index % bad_every == 3:
            content = content[:-200]
        elif bad_every and index % bad_every == 5:
            content = encoded(photo.resize((20 + index % 7, 21)), "PNG")
        write_files(root / f"class{index % classes}", {f"{index:06d}.jpg": content})
    return root
