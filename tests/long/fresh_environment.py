"""Builds the wheel, installs it into a bare environment, and works with it there as a user would, without the checkout and without any extra.

At the end it makes the environments that go wrong most, and reads what doctor says of them.

python -m tests.long.fresh_environment                                (this Python; torch is lent by this environment: minutes)
python -m tests.long.fresh_environment --install                      (everything from the package index: gigabytes)
python -m tests.long.fresh_environment --python python3.13 --share SITE_PACKAGES --share MORE     (torch for that Python stands there)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.commands import ROOT

SHARED = ("torch", "torchvision")
BARE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
"""pip, too, would take the checkout on PYTHONPATH for an installed fastbyol."""
NAMESPACES = ("nvidia", "cuda")
"""Folders that several packages share: DALI lies in nvidia too, and must not be lent with it."""
MISSING = (
    "ffcv",
    "nvidia-dali-cuda130",
    "timm",
    "tensorboard",
    "wandb",
    "torchmetrics",
    "pycocotools",
    "h5py",
    "pyarrow",
    "safetensors",
    "onnx",
)
SCENES = ("demo-data", "--kind", "scenes", "--out", "demo", "--train-per-class", "3", "--val-per-class", "1")
RUN = ("--preset", "cpu_demo_scenes", "--global_batch", "16", "--steps", "3", "--log_every", "1", "--data.workers", "1")


def lend(names: Sequence[str], sites: Sequence[str], folder: Path) -> int:
    """Links these distributions, and all that they require, into the folder; returns how many. Later sites fill in what earlier ones lack."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for site in reversed(sites):
        found |= {_plain(each.metadata["Name"]): each for each in importlib.metadata.distributions(path=[site])}
    left, lent = list(names), set()
    while left:
        name = _plain(left.pop())
        if name in lent or name not in found:
            continue
        lent.add(name)
        for requirement in found[name].requires or []:
            if "extra ==" not in requirement:
                left.append(re.split(r"[ \[<>=!~;(]", requirement, maxsplit=1)[0])
        if name == "torch":  # cuda-toolkit names what torch needs of CUDA as extras
            left += [
                each
                for each in found
                if each.startswith(("nvidia-", "cuda-")) and not re.search("dali|nvimgcodec|nvjpeg|nvtiff|nvcomp", each)
            ]
        for file in found[name].files or []:
            parts = file.parts[: 2 if file.parts[0] in NAMESPACES else 1]
            if parts[0] in ("..", "__pycache__"):
                continue
            link = folder.joinpath(*parts)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(Path(str(found[name].locate_file(""))).resolve().joinpath(*parts))
    return len(lent)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def make_environment(folder: Path, wheel: Path, *, python: str, share: Sequence[str]) -> Path:
    """Makes a bare environment with the wheel in it and returns its folder of programs."""
    subprocess.run([python, "-m", "venv", folder], env=BARE, check=True)
    programs = folder / "bin"
    if share:
        lent = folder / "lent"
        print(f"lent: {lend(SHARED, share, lent)} packages", flush=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "lent.pth").write_text(f"{lent}\n")
    subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", wheel], env=BARE, check=True)
    return programs


class Shell:
    """Runs commands as a user of that environment types them, in an empty folder, and prints what each took."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.folder = folder
        self.environment = BARE | {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(self, *command: str, code: int = 0) -> str:
        """Returns what the command printed; SystemExit if it ends with another code or a traceback."""
        begin = time.monotonic()
        done = subprocess.run(command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"{time.monotonic() - begin:6.1f} s  {' '.join(command)}", flush=True)
        if done.returncode != code or "Traceback" in done.stdout:
            sys.exit(f"exit code {done.returncode}, wanted {code}:\n{done.stdout}")
        return done.stdout


def require(text: str, pattern: str) -> None:
    if not re.search(pattern, text):
        sys.exit(f"no {pattern!r} in:\n{text}")
    print(f"          {re.findall(f'.*{pattern}.*', text)[-1].strip()}", flush=True)


def work(shell: Shell) -> None:
    shell.run("python", "-c", "import fastbyol, sys; assert 'torch' not in sys.modules; assert 'site-packages' in fastbyol.__file__")
    found = doctor(shell, "--path .", code=0)
    if wrong := [name for name in MISSING if found[name]["state"] != "missing"]:
        sys.exit(f"the environment is not bare, or doctor does not see it: {wrong}")
    shell.run("fastbyol", *SCENES)
    require(
        shell.run("fastbyol", "convert", "--data", "demo/train", "--out", "train.beton", "--workers", "1"),
        "train.beton: 48 images of 16 classes",
    )
    require(shell.run("fastbyol", "verify", "train.beton"), "all is well")
    require(shell.run("fastbyol", "info", "train.beton"), "48")
    require(shell.run("fastbyol", "train", *RUN, "--data.train", "train.beton", "--out", "no", code=2), "ffcv is not installed")
    require(shell.run("fastbyol", "train", *RUN, "--data.train", "demo/train", "--out", "run"), r"fastbyol\[tensorboard\]")
    require(
        shell.run(
            "python",
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "-m",
            "fastbyol",
            "train",
            *RUN,
            "--data.train",
            "demo/train",
            "--out",
            "two",
        ),
        "3/3",
    )
    require(shell.run("fastbyol", "evaluate", "all", "--checkpoint", "run", "--data", "demo", "--workers", "1"), "next: python -m fastbyol")
    require(shell.run("fastbyol", "embed", "--checkpoint", "run", "--data", "demo/val", "--out", "features.npz"), "embedded: 16 images")
    require(shell.run("fastbyol", "report", "--run", "run", "--data", "demo", "--workers", "1"), "report: run/report.html")
    for missing, command in {
        r"pip install 'fastbyol\[parquet\]'": ("embed", "--checkpoint", "run", "--data", "demo/val", "--out", "features.parquet"),
        r"pip install 'fastbyol\[timm\]'": (
            "train",
            *RUN,
            "--model.encoder",
            "timm/resnet10t",
            "--data.train",
            "demo/train",
            "--out",
            "timm",
        ),
        r"pip install 'fastbyol\[wandb\]'": (
            "train",
            *RUN,
            "--monitors.wandb_project",
            "p",
            "--data.train",
            "demo/train",
            "--out",
            "wandb",
        ),
        r"pip install 'fastbyol\[torch-optimizer\]'": (
            *("train", *RUN, "--optim.name", "torch_optimizer_lars", "--data.train", "demo/train", "--out", "optimizer"),
        ),
        r"pip install 'fastbyol\[eval\]'": ("evaluate", "detection", "--checkpoint", "run", "--data", "demo/voc"),
    }.items():
        require(shell.run("fastbyol", *command, code=2), missing)


RESNET18 = ("--model.encoder", "resnet18", "--model.stem", "imagenet", "--views.size_px", "32")
"""A network that torchvision and timm hold too, unlike the demo's."""
EXPORTED = {
    "": ("torchvision", "torch_export", "detectron2"),
    "timm": ("torchvision", "torch_export", "detectron2", "timm", "huggingface", "safetensors"),
    "export": ("torchvision", "torch_export", "detectron2", "timm", "huggingface", "safetensors", "onnx"),
}
"""The formats that `--to all` writes with the wheel alone, and with each extra. timm brings safetensors."""


def exports(shell: Shell, wheel: Path | None) -> None:
    """Exports a ResNet-18 of three steps to all formats with each extra, and loads them back in the programs that they are for.

    wheel: installed anew with each extra. None: everything is there already.
    """
    (shell.folder / "exports_loaded.py").write_bytes((ROOT / "tests" / "long" / "exports_loaded.py").read_bytes())
    require(shell.run("fastbyol", "train", *RUN, *RESNET18, "--data.train", "demo/train", "--out", "resnet18"), "3/3")
    for extra, wanted in EXPORTED.items() if wheel else [("export", EXPORTED["export"])]:
        if extra:
            if wheel:
                shell.run("python", "-m", "pip", "install", "--quiet", f"{wheel}[{extra}]")
        else:
            onnx = ("export", "--checkpoint", "resnet18", "--to", "onnx", "--out", "no.onnx")
            require(shell.run("fastbyol", *onnx, code=2), r"pip install 'fastbyol\[export\]'")
        out = f"exports_{extra or 'bare'}"
        said = shell.run("fastbyol", "export", "--checkpoint", "resnet18", "--to", "all", "--out", out)
        for name in set(EXPORTED["export"]) - set(wanted):
            require(said, f"{name} is left out: .* is not installed; pip install")
        require(shell.run("python", "exports_loaded.py", "resnet18", out, *wanted), "loaded back: ")


def doctor(shell: Shell, *options: str, code: int) -> dict[str, dict[str, str]]:
    """Returns what doctor found, by name."""
    examined = json.loads(shell.run("bash", "-c", f"fastbyol doctor --json {' '.join(options)} 2>doctor.txt", code=code))
    print(f"          {examined['summary']}", flush=True)
    return {finding["name"]: finding for finding in examined["findings"]}


def odd_parts(shell: Shell, share: Sequence[str], lent: Path) -> None:
    """The environments that go wrong most: PyPI's apex, ffcv without DALI, and ffcv beside a package built against another numpy."""
    pip = ("python", "-m", "pip")
    shell.run(*pip, "install", "--quiet", "--no-deps", "apex")
    require(doctor(shell, "--quick", code=1)["apex"]["text"], "the wrong apex")
    shell.run(*pip, "uninstall", "--quiet", "--yes", "apex")
    if lend(["ffcv"], share, lent) == 0:
        print("          ffcv is not installed in the environment that lends: left out", flush=True)
        return
    found = doctor(shell, code=0)
    states = {name: found[name]["state"] for name in ("ffcv", "ffcv backend", "nvidia-dali-cuda130")}
    if states != {"ffcv": "ok", "ffcv backend": "ok", "nvidia-dali-cuda130": "missing"}:
        sys.exit(f"{states}: {found}")
    require(shell.run("fastbyol", "train", *RUN, "--data.train", "train.beton", "--out", "beton"), "3/3")
    # A wheel of the days of numpy 1; ffcv's own package imports it.
    shell.run(*pip, "install", "--quiet", "--no-deps", "opencv-python-headless==4.7.0.72")
    found = doctor(shell, code=1)
    require(found["ffcv"]["text"], "built against another numpy")
    if found["ffcv backend"]["state"] != "ok":
        sys.exit(f"only ffcv's C library is used here, and that does not know numpy: {found['ffcv backend']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="Python of the environment (default: this one)")
    parser.add_argument(
        "--share", action="append", default=[], metavar="SITE_PACKAGES", help="lends torch from there (default: this environment)"
    )
    parser.add_argument("--install", action="store_true", help="lend nothing")
    parser.add_argument("--exports_here", action="store_true", help="only the exports, in this environment as it is")
    options = parser.parse_args()
    if options.exports_here:
        with tempfile.TemporaryDirectory(prefix="fastbyol-fresh-") as scratch:
            shell = Shell(Path(sys.executable).parent, Path(scratch))
            shell.environment["PYTHONPATH"] = str(ROOT)
            shell.run("fastbyol", *SCENES)
            exports(shell, None)
        return
    share = [] if options.install else options.share or [sysconfig.get_path("purelib")]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastbyol-fresh-") as scratch:
        folder = Path(scratch)
        source = folder / "source"  # without the build folders of this checkout
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, tracked):
            if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                (source / name).write_bytes((ROOT / name).read_bytes())
        subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source], env=BARE, check=True)
        (wheel,) = folder.glob("*.whl")
        programs = make_environment(folder / "environment", wheel, python=options.python, share=share)
        (folder / "work").mkdir()
        shell = Shell(programs, folder / "work")
        print(shell.run("python", "-VV").strip(), flush=True)
        work(shell)
        exports(shell, wheel)
        if share and options.python == sys.executable:  # ffcv is built for this Python
            odd_parts(shell, share, folder / "environment" / "lent")
    print(f"all well in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
