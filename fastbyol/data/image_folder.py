"""An ImageFolder on disk: one sub-folder per class, listed exactly as torchvision.datasets.ImageFolder does.

Our own listing, because torch takes seconds to import and a conversion has no other use for it. A test holds it to torchvision's.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from fastbyol.config.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_SPLITS = ({"train", "val"}, {"train", "test"})


@dataclass(frozen=True)
class ImageFolder:
    """The listing: sample i is file i. Labels are positions in the sorted class names."""

    root: Path
    class_names: tuple[str, ...]
    files: tuple[str, ...]
    """Relative to the root."""
    labels: tuple[int, ...]

    def path(self, index: int) -> Path:
        return self.root / self.files[index]

    def digest(self) -> str:
        """sha256 over every file's relative name and size, in order: tells whether two listings hold the same files."""
        lines = hashlib.sha256()
        for index, name in enumerate(self.files):
            lines.update(f"{name}\0{self.path(index).stat().st_size}\n".encode(errors="surrogateescape"))
        return lines.hexdigest()


def list_image_folder(root: Path) -> ImageFolder:
    """The images below `root`, classes and files in sorted order. UserError: a missing or empty folder, a class without images, splits."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give a folder with one sub-folder of images per class")
    class_names = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))
    if not class_names:
        raise UserError(f"{root}: has no sub-folders; an ImageFolder has one folder of images per class")
    if any(split <= set(class_names) for split in _SPLITS):
        raise UserError(f"{root}: holds splits ({', '.join(class_names)}), not classes; give one of them, such as {root / 'train'}")
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = _images_below(root, name)
        if not found:
            raise UserError(f"{root / name}: no image in this class folder (looked for {' '.join(EXTENSIONS)}); fill or remove it")
        files += found
        labels += [label] * len(found)
    return ImageFolder(root, class_names, tuple(files), tuple(labels))


def _images_below(root: Path, class_name: str) -> list[str]:
    """In torchvision's order: folders sorted by path, then the files of each by name."""
    folders = sorted(os.walk(root / class_name, followlinks=True))
    return [
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in folders
        for name in sorted(names)
        if name.lower().endswith(EXTENSIONS)
    ]
