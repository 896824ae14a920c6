"""Images with depth: NYU v2's labelled .mat file with its split, or folders of images and 16-bit depth images.

    DIR/nyu_depth_v2_labeled.mat, DIR/splits.mat: as downloaded, 795 training and 654 test frames of 640 x 480 px
    DIR/train/images/NAME.jpg, DIR/train/depth/NAME.png, and test/ or val/ beside train/: depth in millimetres, 0 where it is unknown

DIR may have the folders in nyu/ (the scenes of python -m fastbyol demo-data).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastbyol.config.console import printable
from fastbyol.config.errors import UserError, shortened
from fastbyol.data.traversal import Indices
from fastbyol.evaluation.tasks.dense.files import IMAGE_SUFFIXES, decoded_size, read_depth, read_image

LABELLED, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
UNITS_PER_M = 1000.0
_MAX_SPLITS_BYTES = 2**20


class DepthFrames(Protocol):
    """Frames by number; a picklable object, which workers read from."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns uint8 (3, H, W) and the distance in metres, float32 (H, W), 0 where it is not known."""
        ...

    def check(self, index: int) -> None:
        """Raises UserError if image and depth differ in size, or no pixel's depth is known."""
        ...


def paths_of_frames(data: str) -> list[Path]:
    """Returns the files and folders in which `open_frames` looks, those that there are."""
    root = Path(data).parent if Path(data).name == LABELLED else Path(data)
    if (root / LABELLED).is_file():
        return [root / LABELLED, root / SPLITS]
    return [place for folder in (root, root / "nyu") for name in ("train", "test", "val") if (place := folder / name).is_dir()]


def open_frames(data: str) -> tuple[DepthFrames, DepthFrames]:
    """Returns the training and the test frames. Raises UserError that says what must lie where."""
    root = Path(data)
    if root.name == LABELLED and root.is_file():
        root = root.parent
    if (root / LABELLED).is_file():
        return _open_labelled(root)
    for folder in (root, root / "nyu"):
        test = next((folder / name for name in ("test", "val") if (folder / name / "depth").is_dir()), None)
        if (folder / "train" / "depth").is_dir() and test is not None:
            return _open_folder(folder / "train"), _open_folder(test)
    raise UserError(
        f"--data {printable(data)}: no images with depth; expected {LABELLED} and {SPLITS} of NYU v2, or train/images, train/depth, test/images and "
        "test/depth with PNG files of 16 bits in millimetres"
    )


def valid(depth: Tensor) -> Tensor:
    """Returns where the depth is known: finite and larger than 0."""
    return torch.isfinite(depth) & (depth > 0)


# ---- folders


@dataclass(frozen=True)
class FolderFrames:
    """Pairs of image and depth files."""

    pairs: tuple[tuple[Path, Path], ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        image, depth = self.pairs[index]
        return read_image(image), read_depth(depth) / UNITS_PER_M

    def check(self, index: int) -> None:
        image, path = self.pairs[index]
        depth, size = read_depth(path), decoded_size(image)
        if tuple(depth.shape) != size:
            height, width = depth.shape
            raise UserError(f"{printable(str(path))}: has {width} x {height} px, but its image {size[1]} x {size[0]}")
        if not valid(depth).any():
            raise UserError(f"{printable(str(path))}: no pixel has a depth; 0 stands for unknown")


def _open_folder(folder: Path) -> FolderFrames:
    depths = {path.stem: path for path in sorted((folder / "depth").iterdir()) if path.suffix == ".png" and not path.name.startswith(".")}
    images = (
        {path.stem: path for path in sorted((folder / "images").iterdir()) if path.suffix in IMAGE_SUFFIXES}
        if (folder / "images").is_dir()
        else {}
    )
    alone = sorted(images.keys() ^ depths.keys())
    if alone:
        name, has, lacks = alone[0], *(("images", "depth") if alone[0] in images else ("depth", "images"))
        raise UserError(
            f"{printable(str(folder))}: {printable(name)} is in {has} but not in {lacks} ({len(alone):,} such names); both must hold the same names"
        )
    if not depths:
        raise UserError(f"{printable(str(folder / 'depth'))}: has no PNG files")
    return FolderFrames(tuple((images[name], depths[name]) for name in depths))


# ---- NYU v2's labelled file


@dataclass
class LabelledFrames:
    """Frames of NYU v2's .mat file (HDF5), which every process opens for itself."""

    path: Path
    rows: Indices
    _file: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "rows": self.rows, "_file": None}

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        row = int(self.rows[index])
        try:
            if self._file is None:
                self._file = _open_hdf5(self.path)
            # MATLAB stores columns first, so HDF5 has (frame, channel, x, y).
            image, depth = np.asarray(self._file["images"][row]), np.asarray(self._file["depths"][row])
        except OSError as error:
            raise UserError(f"{printable(str(self.path))}: frame {row + 1} cannot be read ({shortened(error)})") from error
        return torch.from_numpy(image.transpose(0, 2, 1).copy()), torch.from_numpy(depth.T.astype(np.float32))

    def check(self, index: int) -> None:
        if not valid(self.read(index)[1]).any():
            raise UserError(f"{printable(str(self.path))}: no pixel of frame {int(self.rows[index]) + 1} has a depth")


def _open_labelled(root: Path) -> tuple[LabelledFrames, LabelledFrames]:
    path = root / LABELLED
    count = len(_open_hdf5(path)["images"])
    rows = _read_splits(root / SPLITS, count)
    return LabelledFrames(path, rows["train"]), LabelledFrames(path, rows["test"])


def _open_hdf5(path: Path) -> Any:
    """Opens the file for reading and checks what it holds, before anything is read of it."""
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{printable(str(path))}: h5py is not installed; pip install 'fastbyol[eval]'") from error
    try:
        file = h5py.File(path, "r")
        images, depths = file.get("images"), file.get("depths")
    except OSError as error:
        raise UserError(f"{printable(str(path))}: is not a MATLAB 7.3 file ({shortened(error)})") from error
    if not isinstance(images, h5py.Dataset) or not isinstance(depths, h5py.Dataset):
        raise UserError(f"{printable(str(path))}: has no arrays 'images' and 'depths'")
    shape = images.shape
    sound = len(shape) == 4 and shape[1] == 3 and depths.shape == (shape[0], *shape[2:]) and min(shape) > 0 and max(shape[2:]) <= 8192
    if not sound or images.dtype != np.uint8 or depths.dtype.kind != "f":
        raise UserError(
            f"{printable(str(path))}: images are {images.dtype} {shape} and depths {depths.dtype} {depths.shape}; expected uint8 (frames, 3, W, H) and "
            "floats (frames, W, H)"
        )
    return file


def _read_splits(path: Path, count: int) -> dict[str, Indices]:
    """Returns the rows of train and test, from NYU's splits.mat. Raises UserError if it is missing or names frames that are not there."""
    if not path.is_file():
        raise UserError(
            f"{printable(str(path))}: is missing beside {LABELLED}; it says which frames are for training (795) and testing (654)"
        )
    from scipy.io import loadmat

    rows = {}
    try:
        if path.stat().st_size > _MAX_SPLITS_BYTES:
            raise ValueError("larger than 1 MiB")
        found = loadmat(str(path), variable_names=["trainNdxs", "testNdxs"])
        for name, key in (("train", "trainNdxs"), ("test", "testNdxs")):
            rows[name] = np.asarray(found[key]).astype(np.int64).flatten() - 1
    except Exception as error:  # scipy's reader raises whatever a damaged file leads it to
        raise UserError(f"{printable(str(path))}: is not NYU's split with trainNdxs and testNdxs ({shortened(error)})") from error
    for name, numbers in rows.items():
        if not len(numbers) or numbers.min() < 0 or numbers.max() >= count:
            raise UserError(f"{printable(str(path))}: its {name} frames are not among the {count:,} frames of {LABELLED}")
    if set(rows["train"]) & set(rows["test"]):
        raise UserError(f"{printable(str(path))}: frames are both for training and for testing")
    return rows
