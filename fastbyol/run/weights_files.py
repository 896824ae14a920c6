"""Reads files of weights: checkpoints of ours, torch.save's files, .safetensors and .npz. No code of a file is run.

What `python -m fastbyol export` writes as .safetensors says itself what it holds (`description_of`).
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbyol.config.console import printable
from fastbyol.config.errors import UserError, first_line
from fastbyol.config.plain import from_plain
from fastbyol.config.schema import WEIGHTS_OPTIONS, ModelConfig
from fastbyol.config.views import ViewPair
from fastbyol.run.checkpoint import CheckpointError, is_cut_archive, load_checkpoint, load_run, unpacked_size

EXPORTED = "model.safetensors"
"""Name of the weights in a folder for Hugging Face."""
METADATA = "fastbyol"
"""Key of the JSON that our exports have in their metadata; its 'options' are `WEIGHTS_OPTIONS` by name."""


def read_weights(path: Path, *, option: str) -> dict[Any, Any]:
    """Returns what a file of weights holds: a checkpoint of ours, or the (possibly nested) dict of another program. Runs no code of the file.

    Args:
        path: a run folder (its newest checkpoint), or a file: .safetensors, .npz with Haiku's names, else one of torch.save.
        option: name of the option behind the path, for messages.

    Raises:
        UserError: no such path, or nothing to load there.
    """
    path = weights_file(path)
    if not path.is_file():
        return load_run(path, option=option).state
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if suffix == ".npz":
        return _read_npz(path)
    if suffix == ".pkl":
        npz = "docs/guide.md shows how to make an .npz of DeepMind's weights"
        raise CheckpointError(f"{option} = {str(path)!r}: a pickle can run code, so it is not read: {npz}")
    try:
        state = load_checkpoint(path, or_weights=True)
    except CheckpointError as error:
        raise CheckpointError(("" if option == "checkpoint" else f"{option}: ") + f"{error}{_way_out(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{option} = {str(path)!r}: is not a state dict (names to tensors)")
    return state


def weights_file(path: Path) -> Path:
    """Returns the weights in a folder that was exported for Hugging Face; any other path unchanged."""
    inside = path / EXPORTED
    return inside if path.is_dir() and inside.is_file() else path


def _way_out(error: Exception) -> str:
    """Returns advice on how to turn a file that holds more than tensors into a readable one, or '' for other errors."""
    if "it asks for" not in str(error):
        return ""
    return (
        "; where you trust it, save its weights alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt'), "
        "or whatever key they are under"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{path}: safetensors is not installed; pip install 'fastbyol[safetensors]'") from error
    try:
        return load_file(path)
    except Exception as error:  # its Rust part has an exception class of its own
        raise CheckpointError(f"{path}: is not a file of weights ({first_line(error)})") from error


def description_of(path: Path) -> dict[str, Any]:
    """Returns the options of `WEIGHTS_OPTIONS` that one of our exports states in its metadata, checked; {} for any other file.

    Raises UserError if it states options that do not exist or values out of range.
    """
    if path.suffix.lower() != ".safetensors":
        return {}
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA, "")
        said = json.loads(text) if text else {}
    except Exception as error:  # its Rust part has an exception class of its own
        raise CheckpointError(f"{path}: its metadata cannot be read ({first_line(error)})") from error
    said = said.get("options", {}) if isinstance(said, dict) else {}
    groups: dict[str, dict[str, Any]] = {"model": {}, "views": {}}
    for name, value in said.items() if isinstance(said, dict) else ():
        if name in WEIGHTS_OPTIONS:
            group, _, field = name.partition(".")
            groups[group][field] = value
    if not groups["model"]:
        return {}
    model = from_plain(ModelConfig, groups["model"], where=f"{printable(str(path))}: model.")
    views = from_plain(ViewPair, groups["views"], where=f"{printable(str(path))}: views.")
    configs = {"model": model, "views": views}
    return {f"{group}.{field}": getattr(configs[group], field) for group, values in groups.items() for field in values}


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            if is_cut_archive(file):
                raise ValueError("it is cut short or damaged; copy it again")
            if not zipfile.is_zipfile(file):
                raise ValueError("np.savez did not write it")
            unpacked_size(file)
            with np.load(file, allow_pickle=False) as arrays:
                # A member that is no .npy comes as bytes.
                read = ((name, arrays[name]) for name in arrays.files)
                return {
                    name: torch.from_numpy(value) for name, value in read if isinstance(value, np.ndarray) and value.dtype.kind in "fiu"
                }
    except Exception as error:  # numpy, zipfile and the decompressors have many
        raise CheckpointError(f"{path}: is not an .npz of arrays ({first_line(error)})") from error
