"""Makes labelled sets of a few thousand small images, for trying recipes: garments, drawn scenes, icons, letters and pieces of photographs.

    python -m benchmarks.small_sets --out /tmp/small_sets

Each is a folder with train/CLASS/*.jpg|png and val/CLASS/*. Everything comes from this repository and from Debian packages, which
`apt-get download` fetches into OUT/packages and `dpkg-deb -x` unpacks there; nothing is installed. The same packages give the same images.

What val holds is never a copy of train's: other garments, other scenes, icons of other names (with other first words) and no near-duplicate,
letters of other packages' fonts, another part of each photograph.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastbyol.config.arguments import OneLineParser
from fastbyol.config.console import say
from fastbyol.config.errors import UserError, one_line_errors
from fastbyol.data.demo.fashion import write_fashion
from fastbyol.data.demo.folder import DemoSettings, save_jpeg
from fastbyol.data.demo.scenes import write_scenes
from fastbyol.data.inspection.sample import near_duplicates

SEED = 0
ICON_PX = 48
ICON_PACKAGES = (
    "elementary-xfce-icon-theme",
    "faenza-icon-theme",
    "gnome-icon-theme",
    "mate-icon-theme",
    "oxygen-icon-theme",
)
ICON_CLASSES = {"mimes": "mimetypes", **{name: name for name in ("actions", "apps", "devices", "emblems", "mimetypes", "places", "status")}}
"""Folder of a theme -> class."""
_FONTS = """
adf-baskervald adf-universalis cabin cantarell comfortaa crosextra-caladea crosextra-carlito dejavu-core dejavu-extra
dustin ebgaramond ecolier-court fantasque-sans femkeklaver freefont-ttf georgewilliams goudybookletter hack humor-sans
inter isabella junicode klaudia-berenika lato league-spartan liberation lindenhill linuxlibertine mononoki oldstandard
open-sans play prociono quattrocento radisnoir roboto-unhinted rufscript sil-gentium texgyre tomsontalks vollkorn
"""
FONT_PACKAGES = tuple(f"fonts-{name}" for name in _FONTS.split())
FONTS_OF_A_PACKAGE = 10
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LETTER_CANVAS_PX = 40
PHOTOGRAPH_PACKAGES = ("gnome-backgrounds", "lomiri-wallpapers-16.04", "mate-backgrounds", "plasma-workspace-wallpapers", "ukui-wallpapers")
PHOTOGRAPHS = 40
PHOTOGRAPH_SIDE_PX = 640
PIECE_PX = 48
PIECES = {"train": 80, "val": 25}
VAL_SHARE = 0.25


def write_garments(out: Path, packages: Path) -> None:
    """Fashion-MNIST's photographs at random places, as the demo has them: 10 classes, grey."""
    write_fashion(out, settings=DemoSettings(400, 100), overwrite=False)


def write_drawn_scenes(out: Path, packages: Path) -> None:
    """The demo's drawn scenes: 16 classes, shape and pattern of the object; its colour, place, size and angle do not count."""
    write_scenes(out, settings=DemoSettings(200, 60), overwrite=False)


def write_icons(out: Path, packages: Path) -> None:
    """Icons of five themes on white: 7 classes, what they are for (actions, apps, devices, …)."""
    pictures: dict[tuple[str, str, str], Image.Image] = {}
    for package in ICON_PACKAGES:
        for path in sorted(unpacked(package, packages).rglob("*.png")):
            parts = path.relative_to(packages).parts
            group = next((ICON_CLASSES[part] for part in parts if part in ICON_CLASSES), None)
            if group is None or path.is_symlink() or not {str(ICON_PX), f"{ICON_PX}x{ICON_PX}"} & set(parts):
                continue
            with Image.open(path) as icon:
                picture = on_white(icon)
            if picture.size == (ICON_PX, ICON_PX):
                # By the first word: format-justify-left and format-justify-right are one drawing but for a line.
                pictures[split_of(path.stem.split("-")[0]), group, f"{package.partition('-')[0]}_{path.stem}"] = picture
    ordered = sorted(pictures)  # train before val, which loses what train has
    thumbnails = [np.asarray(pictures[key].resize((9, 9), Image.Resampling.BOX), dtype=np.float32) for key in ordered]
    for key, again in zip(ordered, near_duplicates(thumbnails), strict=True):
        split, group, name = key
        folder = out / split / group
        folder.mkdir(parents=True, exist_ok=True)
        if not again:
            pictures[key].save(folder / f"{name}.png")


def on_white(icon: Image.Image) -> Image.Image:
    """Returns the icon as RGB with white where it is transparent."""
    icon = icon.convert("RGBA")
    white = Image.new("RGBA", icon.size, "white")
    return Image.alpha_composite(white, icon).convert("RGB")


def write_letters(out: Path, packages: Path) -> None:
    """Small letters a to z of many fonts, black on white, at a random place and size: 26 classes; b, d, p and q differ by a mirror or half a turn."""
    for package in FONT_PACKAGES:
        split = split_of(package)
        fonts = [path for path in sorted(unpacked(package, packages).rglob("*.[ot]tf")) if not path.is_symlink() and has_letters(path)]
        rng = np.random.default_rng([SEED, *package.encode()])
        for path in sorted(rng.permutation(np.array(fonts, dtype=object))[:FONTS_OF_A_PACKAGE]):
            for letter in LETTERS:
                folder = out / split / letter
                folder.mkdir(parents=True, exist_ok=True)
                save_jpeg(draw_letter(path, letter, rng), folder / f"{package.removeprefix('fonts-')}_{path.stem}.jpg")


def has_letters(path: Path) -> bool:
    """Returns True if the font draws 26 different small letters; symbol fonts draw none, or one box for all."""
    font = ImageFont.truetype(path, 24)
    return len({np.array(font.getmask(letter), dtype=np.uint8).tobytes() for letter in LETTERS}) == len(LETTERS)


def draw_letter(path: Path, letter: str, rng: np.random.Generator) -> np.ndarray:
    """Returns uint8 (40, 40, 3): the letter at a random size, wholly inside."""
    font = ImageFont.truetype(path, float(rng.uniform(18, 30)))
    left, top, right, bottom = font.getbbox(letter)
    room = np.array([LETTER_CANVAS_PX - (right - left), LETTER_CANVAS_PX - (bottom - top)])
    x, y = rng.uniform(0, np.maximum(room, 1)) - [left, top]
    canvas = Image.new("RGB", (LETTER_CANVAS_PX, LETTER_CANVAS_PX), "white")
    ImageDraw.Draw(canvas).text((float(x), float(y)), letter, fill="black", font=font)
    return np.asarray(canvas)


def write_pieces(out: Path, packages: Path) -> None:
    """Square pieces of 40 wallpapers: the class is the picture. train's come from the left 60 % of it, val's from the right 35 %."""
    found: dict[str, Path] = {}
    for package in PHOTOGRAPH_PACKAGES:
        for path in sorted(unpacked(package, packages).rglob("*")):
            if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") and not path.is_symlink():
                name = path.stem if not path.stem[:1].isdigit() else path.parts[-4]  # plasma names files by their size
                found.setdefault(name, path)
    names = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
    for number, name in enumerate(sorted(names[:PHOTOGRAPHS])):
        with Image.open(found[name]) as picture:
            scale = PHOTOGRAPH_SIDE_PX / min(picture.size)
            pixels = np.asarray(picture.convert("RGB").resize([round(side * scale) for side in picture.size], Image.Resampling.LANCZOS))
        width = pixels.shape[1]
        for split, (start, end) in {"train": (0, int(width * 0.6)), "val": (int(width * 0.65), width)}.items():
            rng = np.random.default_rng([SEED, number, len(split)])
            folder = out / split / f"picture_{number:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(PIECES[split]):
                piece = random_piece(pixels[:, start:end], rng)
                save_jpeg(piece, folder / f"{index:03d}.jpg")


def random_piece(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns a square of 80 to 160 px at a random place, as uint8 (48, 48, 3)."""
    side = int(rng.integers(80, 160, endpoint=True))
    y, x = (int(rng.integers(0, length - side, endpoint=True)) for length in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels[y : y + side, x : x + side]).resize((PIECE_PX, PIECE_PX), Image.Resampling.LANCZOS))


def split_of(name: str) -> str:
    """Returns train, or val for a quarter of the names."""
    return "val" if hashlib.sha256(name.encode()).digest()[0] < 256 * VAL_SHARE else "train"


def unpacked(package: str, packages: Path) -> Path:
    """Returns the folder with the Debian package's files, after downloading it if it is not there."""
    folder = packages / package
    if not folder.is_dir():
        packages.mkdir(parents=True, exist_ok=True)
        _run("apt-get", "download", "-qq", package, where=packages)
        archive = next(packages.glob(f"{package}_*.deb"))
        _run("dpkg-deb", "-x", archive.name, f"{package}.partial", where=packages)
        archive.unlink()
        (packages / f"{package}.partial").rename(folder)
    return folder


def _run(*command: str, where: Path) -> None:
    try:
        subprocess.run(command, cwd=where, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]}: not found; these sets are made from Debian's packages") from error
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split())[-200:]
        raise UserError(f"{' '.join(command)}: failed ({said}); apt-get update first, on Debian or Ubuntu") from error


SETS: dict[str, Callable[[Path, Path], None]] = {
    "garments": write_garments,
    "scenes": write_drawn_scenes,
    "icons": write_icons,
    "letters": write_letters,
    "pieces": write_pieces,
}
DEMO_SETS: dict[str, Callable[[Path, Path], None]] = {
    "demo_fashion": lambda out, _: write_fashion(out, settings=DemoSettings(), overwrite=False),
    "demo_scenes": lambda out, _: write_scenes(out, settings=DemoSettings(), overwrite=False),
}
"""The images of `make demo`, for its own presets."""


def write_sets(out: Path, names: tuple[str, ...] = tuple(SETS)) -> Iterator[Path]:
    """Writes the sets that `out` lacks and yields each one's folder."""
    for name in names:
        folder = out / name
        if not folder.is_dir():
            partial = out / f"{name}.partial"
            {**SETS, **DEMO_SETS}[name](partial, out / "packages")
            partial.rename(folder)
        yield folder


@one_line_errors
def main() -> None:
    parser = OneLineParser(prog="benchmarks.small_sets", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    for folder in write_sets(parser.parse_args().out):
        counts = {split: sum(1 for path in (folder / split).rglob("*.*") if path.is_file()) for split in ("train", "val")}
        say(f"{folder}: {counts['train']:,} train, {counts['val']:,} val, {len(list((folder / 'train').iterdir()))} classes")


if __name__ == "__main__":
    main()
