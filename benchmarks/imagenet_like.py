"""Generates an ImageFolder of JPEG files that cost as much to decode and crop as ImageNet's photographs.

Images show dead leaves (overlapping shapes of all sizes, like overlapping objects in photographs) under oriented 1/f noise. The
strength of the noise is searched for each image so that its file has the size drawn for it. ImageNet-1k train: about 470 x 400 px,
0.56 to 0.57 bytes per pixel. Differs from ImageNet: all files are 4:2:0 (most of ImageNet's are not subsampled, which decodes 9 to 13
% slower), and none is damaged or rotated.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastbyol.config.errors import require_at_least, require_positive
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.conversion.tar_writer import write_tar_shards

COMMON_SIZES = ((500, 375), (375, 500), (500, 333), (333, 500))
"""Sizes (width, height) used by the photo site that most of ImageNet comes from."""
SIZE_SHARES = (0.50, 0.15, 0.14, 0.06, 0.15)
"""Probabilities of the common sizes, and of a log-normal size."""
BYTES_PER_PIXEL = 0.567
BYTES_SPREAD = 0.45
"""Standard deviation of the logarithm of the bytes per pixel."""
QUALITIES = (95, 95, 90)
TILE_PX = 512
LEAVES = 220
STRONGEST_TEXTURE = 160.0
SEARCH_STEPS = 6


def write_imagenet_like(out: Path, *, images: int, classes: int = 10, scale: float = 1.0, seed: int = 0, workers: int = 1) -> Path:
    """Writes `images` files into `classes` folders below `out` and returns `out`; the same arguments give the same files.

    Classes have their own hue and texture direction. `scale` is a factor for both sides: 0.1 gives thumbnails of about 47 x 40 px. The
    number of processes does not affect the files.
    """
    require_at_least("classes", classes, 1)
    require_at_least("images", images, classes)
    require_positive("scale", scale)
    write = functools.partial(_write_image, out, classes=classes, scale=scale, seed=seed)
    if workers == 1:
        for index in range(images):
            write(index)
        return out
    # Spawned: a fork of a process whose libraries have threads may hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(write, range(images), chunksize=8))
    return out


def _write_image(out: Path, index: int, *, classes: int, scale: float, seed: int) -> None:
    label = index % classes
    folder = out / f"class{label:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    jpeg = draw_jpeg(np.random.default_rng([seed, index]), direction=np.pi * label / classes, hue=label / classes, scale=scale)
    (folder / f"{index:06d}.jpg").write_bytes(jpeg)


def copy_names(folder: Path, copies: int) -> None:
    """Adds further names for each file by hard links; the file cache holds its content once."""
    for path in list(folder.rglob("*.jpg")):
        for copy in range(1, copies):
            os.link(path, path.with_name(f"{path.stem}_{copy}.jpg"))


def stored_for(backend: str, folder: Path, *, out: Path, workers: int = 1) -> Path:
    """Returns the images of a folder as the backend reads them, converted into `out` if needed."""
    if backend == "folder":
        return folder
    write, name = (write_beton, "images.beton") if backend == "ffcv" else (write_tar_shards, "shards")
    write(folder, out=out / name, workers=workers)
    return out / name


def draw_jpeg(rng: np.random.Generator, *, direction: float, hue: float, scale: float) -> bytes:
    """Returns one JPEG file. direction: direction of the texture in radians; hue: hue of the leaves in turns."""
    width, height = (max(8, round(side * scale)) for side in _draw_size(rng))
    leaves = _dead_leaves(rng, width, height, hue)
    texture = _draw_texture(rng, width, height, direction)
    quality = int(rng.choice(QUALITIES))
    # The mean of a log-normal is exp(mu + sigma^2 / 2).
    target = width * height * BYTES_PER_PIXEL * np.exp(rng.normal(-(BYTES_SPREAD**2) / 2, BYTES_SPREAD))
    # A decoder's time goes with the bytes, so the noise is searched that gives the file its drawn size.
    low, high, jpeg = 0.0, STRONGEST_TEXTURE, b""
    for _ in range(SEARCH_STEPS):
        gain = (low + high) / 2
        jpeg = _encode(leaves + gain * texture, quality)
        low, high = (gain, high) if len(jpeg) < target else (low, gain)
    return jpeg


def _draw_size(rng: np.random.Generator) -> tuple[float, float]:
    which = int(rng.choice(len(SIZE_SHARES), p=SIZE_SHARES))
    if which < len(COMMON_SIZES):
        return COMMON_SIZES[which]
    width = float(np.clip(np.exp(rng.normal(np.log(440), 0.35)), 100, 1600))
    return width, float(np.clip(width * np.exp(rng.normal(-0.1, 0.25)), 100, 1600))


def _dead_leaves(rng: np.random.Generator, width: int, height: int, hue: float) -> np.ndarray:
    """Returns (H, W, 3) float32: ellipses and rectangles, the large ones behind."""
    image = Image.new("HSV", (width, height), (int(255 * hue), 60, 128))
    canvas = ImageDraw.Draw(image)
    side = min(width, height)
    radii = np.sort(side * 0.5 * (1 + 60 * rng.random(LEAVES)) ** -0.9)[::-1]
    for radius in radii:
        x, y, stretch = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.5, 1.5)
        box = (x - radius * stretch, y - radius / stretch, x + radius * stretch, y + radius / stretch)
        colour = (int(255 * (hue + rng.normal(0, 0.12))) % 256, int(rng.integers(20, 200)), int(rng.integers(20, 236)))
        draw = canvas.ellipse if rng.random() < 0.7 else canvas.rectangle
        draw(box, fill=colour)
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def _draw_texture(rng: np.random.Generator, width: int, height: int, direction: float) -> np.ndarray:
    """Returns (H, W, 3) float32 of variance about 1, mostly luminance: a random window of the class's noise."""
    tile = _noise_tile(round(direction, 6))
    top, left = rng.integers(0, TILE_PX, 2)
    luminance = tile.take(range(top, top + height), axis=0, mode="wrap").take(range(left, left + width), axis=1, mode="wrap")
    # A colour's noise costs JPEG little: the chroma planes have a quarter of the samples.
    return luminance[:, :, None] * rng.uniform(0.8, 1.2, 3).astype(np.float32)


@functools.cache
def _noise_tile(direction: float) -> np.ndarray:
    """Returns periodic noise of spectrum 1/f, three times stronger across the direction than along it."""
    fy, fx = np.fft.fftfreq(TILE_PX)[:, None], np.fft.rfftfreq(TILE_PX)[None, :]
    along, across = fx * np.cos(direction) + fy * np.sin(direction), fy * np.cos(direction) - fx * np.sin(direction)
    amplitude = 1 / np.maximum(np.hypot(along, across / 3), 1 / TILE_PX)
    amplitude[0, 0] = 0
    phase = np.random.default_rng(round(1e6 * direction)).uniform(0, 2 * np.pi, amplitude.shape)
    tile = np.fft.irfft2(amplitude * np.exp(1j * phase), s=(TILE_PX, TILE_PX))
    return (tile / tile.std()).astype(np.float32)


def _encode(pixels: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()
