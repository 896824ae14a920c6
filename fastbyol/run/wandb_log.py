"""Optional logging to Weights & Biases (pip install 'fastbyol[wandb]')."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import uuid
from pathlib import Path
from typing import Any

from fastbyol.config.console import printable
from fastbyol.config.errors import UserError
from fastbyol.config.schema import TrainConfig
from fastbyol.host.durable_files import write_durably

ID_FILE = "wandb.json"


def check_wandb(config: TrainConfig) -> None:
    """Raises UserError, before any work, if a run wants to log to Weights & Biases but wandb is not installed."""
    project = config.monitors.wandb_project
    spec = importlib.util.find_spec("wandb") if project else None
    if project and (spec is None or spec.origin is None):  # no origin: only the folder 'wandb' that an earlier run left in the current one
        raise UserError(f"monitors.wandb_project = {project!r}: wandb is not installed; pip install 'fastbyol[wandb]'")
    if project and printable(config.out) != config.out:
        raise UserError(f"monitors.wandb_project = {project!r}: Weights & Biases cannot show the name {config.out!r}; choose another --out")


class WandbLog:
    """A run at Weights & Biases, named after its folder, which stores its id, so a resumed run continues there too.

    Raises UserError if wandb does not start (no key, no network).
    """

    def __init__(self, folder: Path, *, project: str, config: dict[str, Any]) -> None:
        import wandb  # type: ignore[import-not-found]  # an extra

        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=_run_id(folder),
                resume="allow",
                dir=str(folder),
                config=_in_text(config),
                job_type="pretrain",
            )
        except wandb.Error as error:
            raise UserError(
                f"monitors.wandb_project = {project!r}: wandb does not start ({str(error).strip()}); run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def write(self, record: dict[str, Any]) -> None:
        """Logs one step; texts and unknown values are left out."""
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
        self._run.log(numbers, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _in_text(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the config with every text in a form that Weights & Biases can store: a path may not be UTF-8."""
    return {
        name: _in_text(value) if isinstance(value, dict) else printable(value) if isinstance(value, str) else value
        for name, value in values.items()
    }


def _run_id(folder: Path) -> str:
    path = folder / ID_FILE
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # missing or damaged: the run gets a new one
        return str(json.loads(path.read_text())["id"])
    name = uuid.uuid4().hex[:12]
    write_durably(path, json.dumps({"id": name}))
    return name
