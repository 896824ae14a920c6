"""The command to type next, with which training, evaluation and their likes end, so that nobody has to look it up."""

from __future__ import annotations

import shlex
from pathlib import Path

from fastbyol.config.schema import TrainConfig
from fastbyol.config.urls import is_url


def after_training(config: TrainConfig, *, labelled: bool) -> str:
    """Returns the command that says whether a complete run has learnt anything.

    labelled: the training images have labels of at least two classes, so that accuracy can be measured if there are val images too.
    """
    if labelled and (data := folder_of_splits(config.data.train)) is not None:
        return typed("evaluate", "all", "--checkpoint", config.out, "--data", data)
    return report(config.out, config.data.train)


def report(run: str | Path, data: str | Path) -> str:
    return typed("report", "--run", run, "--data", data)


def embed(checkpoint: str | Path, data: str | Path) -> str:
    """Returns the command that writes the features of all images beside the run or file."""
    path = Path(checkpoint)
    out = path / "features.npz" if path.is_dir() else path.with_name(f"{path.stem}.features.npz")
    return typed("embed", "--checkpoint", checkpoint, "--data", data, "--out", out)


def folder_of_splits(train: str) -> Path | None:
    """Returns the folder that holds this path, named train or train.beton, and val images beside it; None if it is another path."""
    path = Path(train)
    if is_url(train) or path.name not in ("train", "train.beton"):
        return None
    return path.parent if any((path.parent / name).exists() for name in ("val", "val.beton")) else None


def typed(*words: str | Path) -> str:
    """Returns a command of `python -m fastbyol`, quoted for a shell."""
    return shlex.join(["python", "-m", "fastbyol", *map(str, words)])
