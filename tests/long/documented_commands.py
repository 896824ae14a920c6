"""Runs the commands of README and docs as they are written, page by page, in a folder that holds what the page speaks of, only smaller.

What would take days or eight GPUs gets an option more, which is printed: `--dry_run` for the paper's settings, a few steps for a training,
two processes instead of eight. Object stores are folders, by file:// URLs, which go through the same code. Blocks of Python are run after the
commands of their page. What is not run at all stands in NOT_RUN with its reason.

python -m tests.long.documented_commands                     (every page: half an hour on two cores)
python -m tests.long.documented_commands --pages README      (pages whose name contains this)
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.commands import ROOT
from tests.imagenet_archives import DEVKIT, TRAIN, VAL, write_archives
from tests.test_documented_commands import PAGES, documented, python_blocks
from tests.test_task_transfer import make_dtd, make_own, make_pets

SMALL_STEP = "--global_batch 8 --views.size_px 64 --data.workers 1"
"""64 px: at 32 a ResNet-50's last maps are of one pixel, and the pages' few images give a rank one of them, which batch norm refuses."""
NOT_RUN = {
    r"benchmarks\.(run|compare|figures|report|recipes|small_sets)": "measures or rewrites kept records: tests/test_benchmarks.py runs the cases",
    r"gpu_plan": "needs a GPU: tests/test_gpu_plan.py runs it on the CPU",
    r"reproduce .*--out docs/reproduction": "the kept tables: hours",
    r"RAY_ADDRESS=": "needs a cluster: tests/long/ray_engine.py runs both commands on one",
    r"import dill": "needs DeepMind's file: tests/test_foreign_weights.py runs it on one of that form",
    r"^docs/python\.md": "tests/test_documented_python.py runs it",
}
"""What is not run, by a pattern of 'PAGE: COMMAND', with the reason."""
STAND_INS = {
    r"s3://": "file://{folder}/stores/",
    r"https://host": "file://{folder}/stores/host",
    r"/scratch/": "{folder}/scratch/",
    r"\bimages=512\b": "images=128",
}
"""Places that only the pages' readers have and sizes of minutes, and what stands for them here."""
MORE = (
    (r"evaluate .*--settings (paper|moco)(?!.*--dry_run)", "--dry_run"),
    (r"(train\.py|fastbyol train) .*--preset r50", f"--steps 2 {SMALL_STEP}"),
    (r"(train\.py|fastbyol train) .*--preset cpu_demo", "--steps 4 --global_batch 16"),
    (r"fastbyol train --config", "--steps 4"),
    (r"tune .*--preset r50", f"--seconds 1 --ranks 1 {SMALL_STEP}"),
    (r"reproduce (?!.*--dry_run).*--scale paper", "--dry_run"),
    (r"reproduce .*--scale paper", "--epochs 400"),  # so many passes over a dozen images make a step of 4096
    (r"reproduce (?!.*(--dry_run|--scale paper))", "--epochs 0 --steps 2 --global_batch 8"),
    (r"demo_data\.py", "--train-per-class 12 --val-per-class 4"),
)
"""What is added to a command that matches, so that it ends within minutes."""


class Page:
    """A folder in which the commands of one page are run, one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        folder.mkdir(parents=True)
        for name in ("data_prep", "fastbyol", "benchmarks"):  # the scripts are typed by their path in a checkout
            (folder / name).symlink_to(ROOT / name)

    def run(self, text: str) -> None:
        """Runs the command with what MORE adds. SystemExit if it ends with another code than 0 or with a traceback.

        A command that makes the first of several parts is run for all of them: the page says so, and goes on with the whole.
        """
        if part := re.search(r"--shard 0/(\d+)", text):
            for number in range(int(part[1])):
                self._run(text.replace(part[0], f"--shard {number}/{part[1]}"))
        else:
            self._run(text)

    def run_python(self, block: str) -> None:
        """Runs a block of Python in a process of its own."""
        (self.folder / "block.py").write_text(self._here(block), encoding="utf-8")
        self._run("python block.py")

    def _here(self, text: str) -> str:
        """Returns the text with what stands here for its places and sizes."""
        for pattern, stand_in in STAND_INS.items():
            text = re.sub(pattern, stand_in.format(folder=self.folder), text)
        return text

    def _run(self, text: str) -> None:
        command = self._here(text.replace("--nproc-per-node 8", "--nproc-per-node 2"))
        added = [more for pattern, more in MORE if re.search(pattern, command)]
        begin = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", " ".join([command, *added])],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        note = f"   (+ {' '.join(added)})" if added else ""
        print(f"{time.monotonic() - begin:6.1f} s  {command}{note}", flush=True)
        if done.returncode != 0 or "Traceback" in done.stdout:
            sys.exit(f"exit code {done.returncode}, in {self.folder}:\n{done.stdout[-4000:]}")


def scenes(page: Page) -> None:
    """Small scenes with labels, masks, boxes and depths in `demo`."""
    page.run("python data_prep/demo_data.py --kind scenes --out demo")


def short_run(page: Page, *names: str) -> None:
    """Runs of a few steps on the scenes, under the names that the page gives its own."""
    for name in names:
        page.run(f"python -m fastbyol train --preset cpu_demo_scenes --data.train demo/train --out {name}")


def own_images(page: Page) -> None:
    scenes(page)
    photos = page.folder / "photos"
    photos.mkdir()
    for number, image in enumerate(sorted((page.folder / "demo" / "train").rglob("*.jpg")), start=1):
        shutil.copyfile(image, photos / f"{number}.jpg")


def labelled(page: Page) -> None:
    scenes(page)
    for name in ("photos", "imagenet"):
        (page.folder / name).symlink_to("demo")
    for name, layout in {"VOCdevkit": "voc", "nyu": "nyu"}.items():
        (page.folder / name).symlink_to(Path("demo", layout))
    # The paper trains on VOC's images with SBD's masks added; here the added ones are the same.
    voc = page.folder / "demo" / "voc"
    shutil.copyfile(voc / "ImageSets" / "Segmentation" / "train.txt", voc / "ImageSets" / "Segmentation" / "train_aug.txt")
    (voc / "SegmentationClassAug").symlink_to("SegmentationClass")
    main = voc / "ImageSets" / "Main"
    for split, name in {"train": "trainval", "val": "test"}.items():  # VOC2007's
        shutil.copyfile(main / f"{split}.txt", main / f"{name}.txt")
    make_dtd(page.folder / "sets")
    make_pets(page.folder / "sets")
    make_own(page.folder / "sets" / "my" / "birds", train=12, test=4)
    (page.folder / "simclr").mkdir()
    for share in (1, 10):  # of twelve images of a class, one is as near as can be to both
        names = [f"{folder.name}/{min(folder.iterdir()).name}" for folder in sorted((page.folder / "demo" / "train").iterdir())]
        (page.folder / "simclr" / f"{share}percent.txt").write_text("".join(f"{name}\n" for name in names))
    short_run(page, "runs/mine", "runs/r50")
    (page.folder / "RUN").symlink_to("runs/mine")


def archives(page: Page) -> None:
    write_archives(page.folder)
    for name in (TRAIN, VAL, DEVKIT):
        assert (page.folder / name).exists(), name


def nothing(page: Page) -> None:
    """The page's first command makes its data."""


def stored(page: Page) -> None:
    """Photographs, a hundred tars of them and tar shards of scenes at the URLs that the pages name, and a run."""
    own_images(page)
    short_run(page, "runs/mine")
    stores = page.folder / "stores"
    (stores / "photos").mkdir(parents=True)
    shutil.copytree(page.folder / "photos", stores / "photos" / "2024")
    (stores / "host").mkdir()
    photos = sorted((page.folder / "photos").iterdir())
    for number in range(100):
        with tarfile.open(stores / "host" / f"part-{number:05d}.tar", "w") as tar:
            photo = photos[number % len(photos)]
            tar.add(photo, f"{number:05d}/{photo.name}")
    (stores / "bucket" / "imagenet").mkdir(parents=True)
    page.run("python data_prep/to_dali.py --data demo/train --out stores/bucket/imagenet/train")


def exported(page: Page) -> None:
    scenes(page)
    short_run(page, "runs/mine")


def photos_and_archives(page: Page) -> None:
    own_images(page)
    archives(page)


def converted(page: Page) -> None:
    scenes(page)
    page.run("python data_prep/to_ffcv.py --data demo/train --out train.beton")


def fashion(page: Page) -> None:
    page.run("python data_prep/demo_data.py --kind fashion --out demo/fashion/images")
    for split in ("train", "val"):
        page.run(f"python data_prep/to_ffcv.py --data demo/fashion/images/{split} --out demo/fashion/{split}.beton")
    (page.folder / "imagenet").symlink_to("demo/fashion")


PREPARED: dict[str, Callable[[Page], None]] = {
    "README.md": photos_and_archives,
    "docs/data.md": stored,
    "docs/guide.md": exported,
    "docs/stores.md": stored,
    "docs/quickstart.md": nothing,
    "docs/imagenet.md": archives,
    "docs/data_bound.md": converted,
    "docs/evaluation.md": labelled,
    "docs/monitors.md": fashion,
    "docs/recipes.md": own_images,
    "docs/reproduction/index.md": fashion,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", default="", help="only pages whose name contains this")
    wanted = parser.parse_args().pages
    commands = list(documented())
    with tempfile.TemporaryDirectory(prefix="fastbyol-documented-") as folder:
        for path in PAGES:
            name = path.relative_to(ROOT).as_posix()
            if wanted not in name:
                continue
            steps = [(Page.run, command.text) for command in commands if command.page == name]
            steps += [(Page.run_python, block) for block in python_blocks(path)]
            if steps:
                print(f"# {name}", flush=True)
            page: Page | None = None
            for step, text in steps:
                if reason := next((why for pattern, why in NOT_RUN.items() if re.search(pattern, f"{name}: {text}")), ""):
                    print(f"  not run  {' '.join(text.splitlines()[:3])}: {reason}", flush=True)
                    continue
                if page is None:
                    page = Page(Path(folder, name.replace("/", "_")))
                    PREPARED.get(name, nothing)(page)
                step(page, text)
    print("every command did what the pages say")


if __name__ == "__main__":
    main()
