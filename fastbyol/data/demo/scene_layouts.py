"""Writes the scenes in the layouts that the paper's dense tasks expect: Pascal VOC's, and pairs of image and depth as in NYU v2.

    voc/JPEGImages/<id>.jpg             voc/Annotations/<id>.xml: box and class of each object, corners inclusive and counted from 1
    voc/SegmentationClass/<id>.png      palette image: 0 background, else the class's number in voc/classes.txt, counted from 1
    voc/ImageSets/Main/<split>.txt      the ids of a split; Segmentation/<split>.txt has the same
    nyu/<split>/images/<id>.jpg         nyu/<split>/depth/<id>.png: uint16, distance in millimetres

An id is <split>_<class>_<number>. Images and depths are hard links to the ImageFolder's files where the disk has them, else copies.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

VOC, NYU = "voc", "nyu"
DIFFICULT_BEYOND_M = 2.4
"""An object that is farther away, and so smaller, counts as difficult: about one in eight (nearest points lie at 1.6 to 2.5 m)."""
_XML = """\
<annotation>
  <folder>voc</folder>
  <filename>{id}.jpg</filename>
  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>
  <segmented>1</segmented>
{objects}</annotation>
"""
_OBJECT_XML = """\
  <object>
    <name>{name}</name>
    <pose>Unspecified</pose>
    <truncated>0</truncated>
    <difficult>{difficult}</difficult>
    <bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
  </object>
"""


def scene_id(split: str, name: str, index: int) -> str:
    return f"{split}_{name}_{index:05d}"


def make_folders(root: Path, *, split: str) -> None:
    """Makes the layouts' folders for a split under `root`; several processes may do so at once."""
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (root / VOC / folder).mkdir(parents=True, exist_ok=True)
    for folder in ("images", "depth"):
        (root / NYU / split / folder).mkdir(parents=True, exist_ok=True)


def write_in_layouts(
    root: Path,
    *,
    split: str,
    identity: str,
    class_name: str,
    mask: np.ndarray,
    boxes: tuple[tuple[int, int, int, int], ...],
    depth: np.ndarray,
    image_file: Path,
    depth_file: Path,
) -> None:
    """Writes one scene into both layouts.

    mask: uint8 (H, W), 0 or the class's number. boxes: corners from 0, the last two exclusive. depth: metres, float32 (H, W).
    """
    voc, nyu = root / VOC, root / NYU / split
    image = Image.fromarray(mask, mode="P")
    image.putpalette(voc_palette().tobytes())
    image.save(voc / "SegmentationClass" / f"{identity}.png")
    difficult = int(depth[mask > 0].min() > DIFFICULT_BEYOND_M)
    objects = "".join(
        _OBJECT_XML.format(name=escape(class_name), difficult=difficult, box=(x_min + 1, y_min + 1, x_max, y_max))
        for x_min, y_min, x_max, y_max in boxes
    )
    height, width = mask.shape
    xml = _XML.format(id=escape(identity), width=width, height=height, objects=objects)
    (voc / "Annotations" / f"{identity}.xml").write_text(xml, encoding="utf-8")
    _link(image_file, voc / "JPEGImages" / f"{identity}.jpg")
    _link(image_file, nyu / "images" / f"{identity}.jpg")
    _link(depth_file, nyu / "depth" / f"{identity}.png")


def write_lists(root: Path, *, split: str, identities: list[str], class_names: tuple[str, ...]) -> None:
    """Writes the ids of a split and the names of the classes."""
    make_folders(root, split=split)
    for task in ("Main", "Segmentation"):
        (root / VOC / "ImageSets" / task / f"{split}.txt").write_text("".join(f"{each}\n" for each in identities), encoding="utf-8")
    (root / VOC / "classes.txt").write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")


def voc_palette() -> np.ndarray:
    """Returns VOC's 256 colours, uint8 (256, 3): each colour's bits are, from the highest, every third bit of the label."""
    labels = np.arange(256, dtype=np.uint32)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((labels >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copyfile(source, target)
