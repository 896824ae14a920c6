"""Small copies of ImageNet's archives with their real structure: a tar of class tars, a flat tar, the development kit with its MATLAB file."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import scipy.io

from tests.images import encoded, smooth_image

WNIDS = ("n01440764", "n01443537", "n01484850")
KIT_IDS = {3: WNIDS[0], 1: WNIDS[1], 2: WNIDS[2]}
"""The kit's own ids are in no order of the WordNet ids."""
GROUND_TRUTH = (3, 1, 2, 2, 1, 3, 3, 1)
TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


def jpeg(seed: int, *, height: int = 24, width: int = 32) -> bytes:
    """Returns a small smooth JPEG that differs from all others."""
    return encoded(smooth_image(seed, height, width), quality=90)


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def tar_bytes(files: dict[str, bytes]) -> bytes:
    """Returns the bytes of a tar of these files, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            add_file(tar, name, data)
    return buffer.getvalue()


def write_archives(root: Path) -> None:
    """Writes the three archives. The images are in no particular order in the tars, as in the real ones."""
    classes = {}
    for number, wnid in enumerate(reversed(WNIDS)):
        classes[f"{wnid}.tar"] = tar_bytes({f"{wnid}_{i}.JPEG": jpeg(100 * number + i, height=20 + i) for i in (10026, 2, 913, 10)})
    (root / TRAIN).write_bytes(tar_bytes(classes))
    (root / VAL).write_bytes(tar_bytes({f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(i) for i in (5, 2, 3, 8, 1, 4, 7, 6)}))
    with tarfile.open(root / DEVKIT, "w:gz") as kit:
        add_file(kit, "ILSVRC2012_devkit_t12/readme.txt", b"")
        add_file(kit, "ILSVRC2012_devkit_t12/data/meta.mat", meta_mat())
        truth = "".join(f"{number}\n" for number in GROUND_TRUTH)
        add_file(kit, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())


def meta_mat() -> bytes:
    """Returns meta.mat, in which 'synsets' is a struct array of leaves and an inner node, whose id is not a class."""
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images")
    synsets = np.zeros((len(KIT_IDS) + 1, 1), dtype=[(name, "O") for name in names])
    for row, (number, wnid) in enumerate([*sorted(KIT_IDS.items()), (1001, "n00001740")]):
        children = np.array([[1.0, 2.0, 3.0]]) if number > 1000 else np.zeros((1, 0))
        synsets[row, 0] = (float(number), wnid, "tench, Tinca tinca", "a fish", float(children.size), children, 0.0, 1300.0)
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": synsets})
    return buffer.getvalue()
