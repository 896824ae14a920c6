"""Weights & Biases as one more place where a run's records go (optional: pip install 'fastbyol[wandb]')."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from fastbyol.config.errors import UserError

ID_FILE = "wandb.json"


class WandbLog:
    """A run at Weights & Biases; its id is kept in the run folder, so that a continued run is the same one there.

    Args:
        folder: the run folder; its name is the run's.
        project: created if it is missing.
        config: shown as the run's.

    Raises:
        UserError: wandb is not installed, or does not start (no key, no network).
    """

    def __init__(self, folder: Path, *, project: str, config: dict[str, Any]) -> None:
        try:
            import wandb  # type: ignore[import-not-found]  # an extra
        except ImportError as error:
            raise UserError(f"monitors.wandb_project = {project!r}: wandb is not installed; pip install 'fastbyol[wandb]'") from error
        try:
            self._run = wandb.init(
                project=project, name=folder.name, id=_run_id(folder), resume="allow", dir=str(folder), config=config, job_type="pretrain"
            )
        except wandb.Error as error:
            raise UserError(
                f"monitors.wandb_project = {project!r}: wandb does not start ({str(error).strip()}); run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def write(self, record: dict[str, Any]) -> None:
        """One logged step; texts and what is unknown are left out."""
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
        self._run.log(numbers, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _run_id(folder: Path) -> str:
    path = folder / ID_FILE
    if not path.exists():
        path.write_text(json.dumps({"id": uuid.uuid4().hex[:12]}))
    return json.loads(path.read_text())["id"]
