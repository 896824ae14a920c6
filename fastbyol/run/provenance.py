"""Provenance of a result: versions, commit, machine, command."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastbyol.config.urls import without_credentials

PACKAGES = (
    *("fastbyol", "torch", "torchvision", "numpy", "numba", "pillow"),
    *("nvidia-dali-cuda130", "nvidia-dali-cuda120", "ffcv", "torch-optimizer"),
)


def collect_provenance() -> dict[str, Any]:
    """Returns package versions, git commit and state, device, cores, threads and the command as typed, as plain values for JSON."""
    return {
        "command": " ".join([*script_typed(sys.argv[0]), *map(without_credentials, sys.argv[1:])]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "versions": package_versions(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "world_size": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
    }


def script_typed(path: str) -> list[str]:
    """Returns what stands between `python` or `torchrun` and the options: a script's path, or for the command line itself `-m fastbyol`."""
    return ["-m", "fastbyol"] if path == "fastbyol" or path.endswith(("/bin/fastbyol", "/fastbyol/__main__.py")) else [path]


def package_versions() -> dict[str, str]:
    """Returns the installed versions of PACKAGES."""
    return {name: version for name in PACKAGES if (version := _version(name))}


def source_digest() -> str:
    """Returns twelve hexadecimal digits that change with any line of the package's source."""
    # Not the commit: an installed copy has none, and a checkout may have uncommitted changes.
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache  # every checkpoint asks for it, and training waits meanwhile
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    here = Path(__file__).parent
    try:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
