"""Reads a run folder's training log: the logged steps, and speed figures computed from them."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbyol.config.errors import UserError
from fastbyol.run.folder import PROVENANCE_FILE
from fastbyol.run.log import METRICS_FILE, read_metrics

Record = dict[str, Any]


def logged_steps(run: Path) -> list[Record]:
    """Returns the run's logged steps in order. Raises UserError if there are none."""
    records = read_metrics(run)
    if not records:
        raise UserError(f"{run / METRICS_FILE}: no logged step; --run takes the folder of a run that has logged (every log_every steps)")
    return records


def read_provenance(run: Path) -> Record:
    """Returns the run's provenance, or {} if it has none. Raises UserError if the file is not what training wrote."""
    path = run / PROVENANCE_FILE
    if not path.is_file():
        return {}
    try:
        provenance = dict(json.loads(path.read_text(encoding="utf-8")))
        int(provenance.get("world_size") or 1)
        return provenance
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not the provenance of a run ({error}); delete it to continue without it") from error


def series(records: list[Record], key: str) -> list[float]:
    """Returns the key's value in each record; NaN if it was not measured."""
    return [float("nan") if record.get(key) is None else float(record[key]) for record in records]


def alarms(records: list[Record]) -> list[str]:
    """Returns the alarms of the collapse monitor, one line each: 'step 40: …'."""
    return [f"step {record['step'] + 1}: {record['alarm']}" for record in records if record.get("alarm")]


@dataclass(frozen=True)
class Throughput:
    """Speed of a run. images_per_s_per_device: median over the logged steps; one image is two views. data_wait_share: mean, in [0, 1].

    per: description of one device: the GPU's name, or 'CPU process with 2 threads'. GPU and CPU figures are never comparable.
    """

    images_per_s_per_device: float
    data_wait_share: float
    devices: int
    per: str


def throughput(records: list[Record], provenance: Record) -> Throughput:
    """Computes the run's speed, leaving out its first logged step if there are others, because it includes warm-up (compilation, page
    cache).
    """
    known = [record for record in records[1:] or records if record.get("images_per_s_per_device") is not None]
    threads = provenance.get("torch_threads")
    cpu = f"CPU process with {threads} thread{'' if threads == 1 else 's'}" if threads else "CPU process"
    return Throughput(
        images_per_s_per_device=statistics.median(r["images_per_s_per_device"] for r in known) if known else float("nan"),
        data_wait_share=statistics.fmean(r.get("data_wait_share") or 0.0 for r in known) if known else float("nan"),
        devices=int(provenance.get("world_size") or 1),
        per=f"GPU ({provenance['gpu']})" if provenance.get("gpu") else cpu,
    )
