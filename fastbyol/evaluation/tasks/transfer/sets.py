"""The paper's classification sets as data: splits, metrics and where each lies, and the paper's table 3.

Sources: table 10 of the paper (classes, sizes, metrics); table 3 (ResNet-50). `opening` reads the sets, `split` makes the splits of which
the paper gives only the sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastbyol.config.errors import UserError
from fastbyol.config.plain import nearest_name


@dataclass(frozen=True)
class TransferSet:
    """A classification set of the paper.

    name: as typed. title: as in the paper's table. sizes: (train, valid, test). metric: of `metrics.METRICS`. marker: a file or folder below
    the root that is there where the set is. layout: what must lie below the root, for messages. held_out: how the validation images are
    chosen from those for training: 'official', 'random', or a number of each class. downloads: torchvision can fetch it.
    """

    name: str
    title: str
    classes: int
    sizes: tuple[int, int, int]
    metric: str
    marker: str
    layout: str
    held_out: str | int = "official"
    downloads: bool = True

    def place(self, root: Path) -> Path | None:
        """Returns what shows that the set is on disk, or None: its marker in torchvision's layout, else a folder of its name in a layout of `open_folder`."""
        own = root / self.name
        if (root / self.marker).exists():
            return root / self.marker
        if self.metric != "map11" and ((own / "train").is_dir() or (own / "images").is_dir()):
            return own
        return None


SETS = (
    TransferSet("food101", "Food", 101, (68_175, 7_575, 25_250), "top1", "food-101/meta", "food-101/images and food-101/meta", 75),
    TransferSet("cifar10", "C10", 10, (45_000, 5_000, 10_000), "top1", "cifar-10-batches-py", "cifar-10-batches-py", "random"),
    TransferSet("cifar100", "C100", 100, (44_933, 5_067, 10_000), "top1", "cifar-100-python", "cifar-100-python", "random"),
    TransferSet(
        "birdsnap", "Bird", 500, (42_405, 4_981, 2_443), "top1", "birdsnap/images",
        "birdsnap/images/CLASS/*.jpg, and birdsnap/test.txt, which names the test images", "random", downloads=False,
    ),
    TransferSet(
        "sun397", "SUN", 397, (15_880, 3_970, 19_850), "top1", "SUN397/ClassName.txt",
        "SUN397 as unpacked, and in it Training_01.txt and Testing_01.txt of the authors' Partitions.zip", 10,
    ),
    TransferSet(
        "cars", "Cars", 196, (6_494, 1_650, 8_041), "top1", "stanford_cars/devkit",
        "stanford_cars/{cars_train,cars_test,devkit} and stanford_cars/cars_test_annos_withlabels.mat", "random", downloads=False,
    ),
    TransferSet("aircraft", "Airc", 100, (3_334, 3_333, 3_333), "mean_per_class", "fgvc-aircraft-2013b", "fgvc-aircraft-2013b/data"),
    TransferSet("voc2007", "VOC07", 20, (2_501, 2_510, 4_952), "map11", "VOCdevkit/VOC2007", "VOCdevkit/VOC2007, trainval and test in one"),
    TransferSet("dtd", "DTD", 47, (1_880, 1_880, 1_880), "top1", "dtd/dtd", "dtd/dtd/images and dtd/dtd/labels"),
    TransferSet(
        "pets", "Pets", 37, (2_940, 740, 3_669), "mean_per_class", "oxford-iiit-pet",
        "oxford-iiit-pet/images and oxford-iiit-pet/annotations", 20,
    ),
    TransferSet(
        "caltech101", "Calt", 102, (2_550, 510, 6_084), "mean_per_class", "caltech101/101_ObjectCategories",
        "caltech101/101_ObjectCategories with BACKGROUND_Google", 5,
    ),
    TransferSet("flowers102", "Flow", 102, (1_020, 1_020, 6_149), "mean_per_class", "flowers-102", "flowers-102/{jpg,imagelabels.mat,setid.mat}"),
    TransferSet(
        "places365", "Plac", 365, (1_766_960, 36_500, 36_500), "top1", "places365/categories_places365.txt",
        "places365 with the file lists and data_256_standard and val_256 (or data_large_standard and val_large)", "random",
    ),
)  # fmt: skip
"""Caltech-101 has 25 + 5 images of each class for training: that makes 2,550 + 510 only with 102 classes, the background being one.

Differs from the paper: table 10 gives Places365 1,803,460 training and no validation images; a choice needs some, so as many as it has test
images are held out of the training images.
"""
BY_NAME = {one.name: one for one in SETS}
CALTECH_TRAIN = 30
"""Training and validation images of each class of Caltech-101; the others are the test."""

_ORDER = ("food101", "cifar10", "cifar100", "birdsnap", "sun397", "cars", "aircraft", "voc2007", "dtd", "pets", "caltech101", "flowers102")


def _row(*values: float) -> dict[str, float]:
    return dict(zip(_ORDER, values, strict=True))


PAPER_LINEAR = {
    "paper: BYOL": _row(75.3, 91.3, 78.4, 57.2, 62.2, 67.8, 60.6, 82.5, 75.5, 90.4, 94.2, 96.1) | {"places365": 51.0},
    "paper: SimCLR (repro)": _row(72.8, 90.5, 74.4, 42.4, 60.6, 49.3, 49.8, 81.4, 75.7, 84.6, 89.3, 92.6),
    "paper: SimCLR": _row(68.4, 90.6, 71.6, 37.4, 58.8, 50.3, 50.3, 80.5, 74.5, 83.6, 90.3, 91.2),
    "paper: Supervised": _row(72.3, 93.6, 78.3, 53.7, 61.9, 66.7, 61.0, 82.8, 74.9, 91.5, 94.5, 94.7),
}
"""Table 3, linear evaluation; Places365 is of table 13, which has ImageNet's protocol: SGD on random crops."""
PAPER_FINETUNE = {
    "paper: BYOL": _row(88.5, 97.8, 86.1, 76.3, 63.7, 91.6, 88.1, 85.4, 76.2, 91.7, 93.8, 97.0),
    "paper: SimCLR (repro)": _row(87.5, 97.4, 85.3, 75.0, 63.9, 91.4, 87.6, 84.5, 75.4, 89.4, 91.7, 96.6),
    "paper: SimCLR": _row(88.2, 97.7, 85.9, 75.9, 63.5, 91.3, 88.1, 84.1, 73.2, 89.2, 92.1, 97.0),
    "paper: Supervised": _row(88.3, 97.5, 86.4, 75.8, 64.3, 92.1, 86.0, 85.0, 74.6, 92.1, 93.3, 97.6),
    "paper: Random init": _row(86.9, 95.9, 80.2, 76.1, 53.6, 91.4, 85.9, 67.3, 64.8, 81.5, 72.6, 92.0),
}
"""Table 3, fine-tuned."""


def missing_text(one: TransferSet, root: Path) -> str:
    """Returns where the set must lie."""
    fetched = "" if not one.downloads else ", or add --download yes"
    return f"{one.name}: not in {root}; expected {one.layout}{fetched}"


def chosen_sets(names: tuple[str, ...], root: Path) -> list[TransferSet | Path]:
    """Returns the sets of --sets in order: those of the paper, and folders of the user's own, relative to the root or as they are.

    'all' stands for every set of the paper. Raises UserError for a name that is neither a set nor a folder.
    """
    found: list[TransferSet | Path] = []
    for name in names:
        folder = next((path for path in (root / name, Path(name)) if path.is_dir()), None)
        if name == "all":
            found += SETS
        elif name in BY_NAME:
            found.append(BY_NAME[name])
        elif folder is not None:
            found.append(folder)
        else:
            known = nearest_name(name, BY_NAME) or f" ({' '.join(BY_NAME)})"
            raise UserError(f"--sets {name}: is neither a known set{known} nor a folder")
    if not found:
        raise UserError("--sets: is empty; give 'all', names of sets, or a folder")
    return found
