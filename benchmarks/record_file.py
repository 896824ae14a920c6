"""Reads and writes benchmark records: a records.json in a folder of its own, with the state of the machine that figures depend on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import CaseResult
from benchmarks.timing import measuring_overhead_ms
from fastbyol.config.errors import UserError
from fastbyol.run.precision import is_bf16_fast
from fastbyol.run.provenance import collect_provenance

FORMAT = 1
"""Version of the format of records.json; it changes if later records cannot be compared with earlier ones."""
FILE = "records.json"
EVERY = ("quick", "started", "seconds", "measuring_overhead_ms", "load_average", "skipped")
MACHINE = ("command", "commit", "versions", "cpu", "cores", "gpu")
"""Fields of every record, and of its provenance."""
KEPT = Path(__file__).parent / "results"
CPU_CLOCKS = Path("/sys/devices/system/cpu/cpu0/cpufreq")
GPU_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
GPU_FIELDS = ("name", "driver_version", "memory.total", *GPU_CLOCKS, "power.limit", "temperature.gpu", "persistence_mode")
"""Fields of nvidia-smi, read at the start of the run; an idle GPU shows low clocks."""


def new_record(*, quick: bool, command: str) -> dict[str, Any]:
    """Returns a record without cases, with the machine and the time of the start."""
    return {
        "format": FORMAT,
        "quick": quick,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "start_s": time.perf_counter(),
        "measuring_overhead_ms": measuring_overhead_ms(),
        "load_average": {"start": os.getloadavg()},
        "provenance": collect_provenance() | {"command": command},
        "machine": describe_machine(),
        "cases": {},
        "case_seconds": {},
        "skipped": {},
    }


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Writes records.json to the folder with everything measured so far."""
    written = {name: value for name, value in record.items() if name != "start_s"}  # a clock that only this process knows
    written["seconds"] = round(time.perf_counter() - record["start_s"], 1)
    written["load_average"] = {**record["load_average"], "end": os.getloadavg()}
    (out / FILE).write_text(json.dumps(written, indent=1) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """Returns the record in a file, or in a folder's records.json. Raises UserError for anything that is not one of this format."""
    file = path / FILE if path.is_dir() else path
    try:
        record = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give a records.json, or its folder") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); give a records.json that benchmarks.run wrote") from error
    if not isinstance(record, dict) or not {"format", "cases", "provenance"} <= set(record):
        raise UserError(f"{file}: not a record of benchmarks.run; give a records.json that it wrote")
    if record["format"] != FORMAT:
        raise UserError(
            f"{file}: format {record['format']}, and this checkout knows {FORMAT}; measure again, or use the commit that wrote it"
        )
    _require_whole(record, file)
    return record


def _require_whole(record: dict[str, Any], file: Path) -> None:
    """Raises UserError if the record lacks a field that every record of this format has, because it was truncated or edited."""
    try:
        missing = [name for name in EVERY if name not in record] + [name for name in MACHINE if name not in record["provenance"]]
        results_of(record)
    except (KeyError, TypeError, AttributeError) as error:
        missing = [str(error)]
    if missing:
        raise UserError(f"{file}: a damaged record, without {', '.join(missing)}; measure again, or take it from git")


def results_of(record: dict[str, Any]) -> list[CaseResult]:
    """Returns the cases in the order in which they ran."""
    return [CaseResult.from_dict(values) for values in record["cases"].values()]


def newest_kept(case: str, *, folder: Path = KEPT, rows: Collection[str] = ()) -> Path | None:
    """Returns the folder of the newest kept record with full settings that contains the case, and one of `rows` in it if any are given, or None."""
    found = []
    for path in folder.glob(f"*/{FILE}"):
        record = read_record(path)
        if record["quick"] or case not in record["cases"]:  # quick figures are not quoted
            continue
        if not rows or any(row["name"] in rows for row in record["cases"][case]["rows"]):
            found.append((record["started"], path.parent))
    return max(found)[1] if found else None


def describe_machine() -> dict[str, Any]:
    """Returns plain values; None for anything this system does not report (a virtual machine hides its governor)."""
    return {
        "cpu_governor": _text(CPU_CLOCKS / "scaling_governor"),
        "cpu_mhz": _cpu_mhz(),
        "cpu_max_khz": _text(CPU_CLOCKS / "cpuinfo_max_freq"),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "bf16_on_cpu": is_bf16_fast(torch.device("cpu")),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": _gpu_states(),
    }


def _gpu_states() -> list[dict[str, str]]:
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
