"""The `Preset` dataclass: a named run with the accuracy to expect."""

from __future__ import annotations

from dataclasses import dataclass

from fastbyol.config.schema import TrainConfig

PAPER_RANKS = 8
"""Number of ranks in the commands of the paper's presets."""


@dataclass(frozen=True)
class Preset:
    """A named run. `expected` is a published figure and `source` where it stands; `run_here` is what we measured ourselves, or 'not yet
    run'.
    """

    what: str
    config: TrainConfig
    expected: str
    source: str
    run_here: str = "not yet run"

    def command(self, name: str) -> str:
        if name.startswith("cpu_demo"):
            kind = "scenes" if name.endswith("scenes") else "fashion"
            return f"python fastbyol/train.py --preset {name} --data.train demo/{kind}/train.beton --out runs/demo"
        return f"torchrun --nproc-per-node {PAPER_RANKS} fastbyol/train.py --preset {name} --data.train train.beton --out runs/{name}"
