"""The machine's clocks and memory, which figures depend on and provenance does not record."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

CPU_CLOCKS = Path("/sys/devices/system/cpu/cpu0/cpufreq")
GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "persistence_mode",
)
"""Fields of nvidia-smi, read at the start of the run; an idle GPU shows low clocks."""


def describe_machine() -> dict[str, Any]:
    """Returns plain values; None for anything this system does not report (a virtual machine hides its governor)."""
    return {
        "cpu_governor": _text(CPU_CLOCKS / "scaling_governor"),
        "cpu_mhz": _cpu_mhz(),
        "cpu_max_khz": _text(CPU_CLOCKS / "cpuinfo_max_freq"),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": gpu_states(),
    }


def gpu_states() -> list[dict[str, str]]:
    """Returns nvidia-smi's fields for each GPU; empty without one."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    try:
        query = [smi, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(GPU_FIELDS, map(str.strip, line.split(",")), strict=False)) for line in lines]


def _cpu_mhz() -> float | None:
    """Returns the mean of the cores' current clock rates."""
    values = [line.split(":")[1] for line in (_text(Path("/proc/cpuinfo")) or "").splitlines() if line.startswith("cpu MHz")]
    return round(sum(map(float, values)) / len(values), 1) if values else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
