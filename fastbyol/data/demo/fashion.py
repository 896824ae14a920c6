"""Demo images of kind fashion: Fashion-MNIST's product photographs, each at a random position, size and angle on a larger canvas.

In the published images the objects are centred, and raw pixels nearly separate the classes (logistic regression: 84 %), so a demo could not show
that anything is learnt. With random placement, a linear classifier on the 128 principal components reaches 47 %, and 20 nearest neighbours 64 %.
"""

from __future__ import annotations

import gzip
import math
import os
import socket
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.data.demo.folder import SPLITS, DemoSettings, check_output, image_rng, save_jpeg, write_image_folder

CLASS_NAMES = ("t_shirt_top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot")
"""Class names in the order of Fashion-MNIST's labels (Xiao et al., 2017, table 1)."""
CANVAS_PX = 40
SCALE = (0.85, 1.25)
ANGLE_DEG = (-30.0, 30.0)

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILE_PREFIX = {"train": "train", "val": "t10k"}
PHOTOGRAPH_PX = 28
DOWNLOAD_TIMEOUT_S = 30.0
_UINT8_TYPE = 0x08
_SUPERSAMPLING = 2


@dataclass(frozen=True)
class FashionClass:
    """Writes the images of one class in one split; a `folder.ClassWriter`."""

    split: str
    label: int
    seed: int
    photographs: np.ndarray
    """The original photographs, uint8 (N, 28, 28)."""

    @property
    def num_images(self) -> int:
        return len(self.photographs)

    def write(self, root: Path) -> None:
        folder = root / self.split / CLASS_NAMES[self.label]
        folder.mkdir(parents=True)
        for index, photograph in enumerate(self.photographs):
            rng = image_rng(self.seed, self.split, self.label, index)
            save_jpeg(make_photograph_on_canvas(photograph, rng=rng), folder / f"{index:05d}.jpg")


def write_fashion(out: Path, *, settings: DemoSettings, overwrite: bool) -> None:
    """Writes the ImageFolder of ten classes to `out`.

    Raises:
        UserError: the photographs cannot be found or downloaded, there are fewer than requested, or `out` can't be used.
    """
    check_output(out.resolve(), overwrite=overwrite)  # before a download
    source = find_photographs()
    writers = []
    for split in SPLITS:
        prefix, count = FILE_PREFIX[split], settings.per_class(split)
        images, labels = read_idx(source / f"{prefix}-images-idx3-ubyte.gz"), read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        if images.shape != (len(labels), PHOTOGRAPH_PX, PHOTOGRAPH_PX) or labels.ndim != 1:
            raise UserError(f"{source}: images {images.shape} and labels {labels.shape} of {split} don't fit together; install them again")
        for label, name in enumerate(CLASS_NAMES):
            photographs = images[labels == label][:count]
            if (found := len(photographs)) < count:
                raise UserError(f"{split}-per-class = {count}: there are {found} photographs of {name}; ask for at most that many")
            writers.append(FashionClass(split, label, settings.seed, photographs))
    write_image_folder(out, kind="fashion", class_writers=writers, settings=settings, overwrite=overwrite)


def make_photograph_on_canvas(photograph: np.ndarray, *, rng: np.random.Generator) -> np.ndarray:
    """Returns a uint8 (40, 40, 3) image, grey on black, with the photograph at a random position, size and angle.

    Args:
        photograph: uint8 (28, 28), an object on black.
        rng: draws size, angle and position, in this order.
    """
    scale, angle = rng.uniform(*SCALE), np.deg2rad(rng.uniform(*ANGLE_DEG))
    # The unrotated square stays inside the canvas, so at most a rotated corner is cut off, which is nearly always background.
    margin = (CANVAS_PX - scale * PHOTOGRAPH_PX) / 2
    centre = CANVAS_PX / 2 + rng.uniform(-margin, margin, size=2)
    return np.repeat(_place(photograph, scale=scale, angle=angle, centre=centre)[:, :, None], 3, axis=2)


def _place(photograph: np.ndarray, *, scale: float, angle: float, centre: np.ndarray) -> np.ndarray:
    """Returns the canvas with the photograph scaled and rotated (rad) about `centre` (x, y in px of the canvas).

    Pillow's affine transform takes the map from canvas to photograph.
    """
    padded = Image.fromarray(np.pad(photograph, 1))
    step = 1 / (scale * _SUPERSAMPLING)
    cos, sin = np.cos(angle) * step, np.sin(angle) * step
    x, y = centre * _SUPERSAMPLING
    middle = padded.width / 2
    affine = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
    size = (CANVAS_PX * _SUPERSAMPLING, CANVAS_PX * _SUPERSAMPLING)
    large = padded.transform(size, Image.Transform.AFFINE, affine, resample=Image.Resampling.BICUBIC)
    return np.asarray(large.reduce(_SUPERSAMPLING))


def read_idx(path: Path) -> np.ndarray:
    """Returns the uint8 array in an IDX file, gzipped or plain. Raises UserError if it is truncated, damaged or of another format.

    Format: two zero bytes, the type (8: uint8), the number of dimensions, each dimension as big-endian uint32, then the values.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: can't be read ({error}); install it again") from error
    num_dimensions = raw[3] if raw[:3] == bytes([0, 0, _UINT8_TYPE]) and len(raw) > 3 else 0
    header = 4 + 4 * num_dimensions
    if num_dimensions == 0 or len(raw) < header:
        raise UserError(f"{path}: not an IDX file of bytes (it starts with {raw[:4].hex() or 'nothing'}); install it again")
    shape = struct.unpack(f">{num_dimensions}I", raw[4:header])
    expected = math.prod(shape)
    if len(raw) - header != expected:
        raise UserError(f"{path}: holds {len(raw) - header} values where its header announces {expected}; install it again")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def find_photographs() -> Path:
    """Returns the folder of Fashion-MNIST's four IDX files: Debian's package, else torchvision's download into the user's cache."""
    names = [f"{prefix}-{content}" for prefix in FILE_PREFIX.values() for content in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")]
    if all((DEBIAN_FOLDER / name).is_file() for name in names):
        return DEBIAN_FOLDER
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastbyol"
    before = socket.getdefaulttimeout()
    # torchvision downloads without a timeout: behind a firewall that drops packets it would wait for ever.
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(cache), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Fashion-MNIST: not in {DEBIAN_FOLDER} and not to be downloaded ({error}); run 'apt-get install dataset-fashion-mnist', "
            f"or allow torchvision to download it into {cache}, or take --kind scenes, which needs neither"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return cache / "FashionMNIST" / "raw"
