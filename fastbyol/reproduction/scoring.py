"""Scores a finished run of a table: linear evaluation, nearest neighbours and the measures without labels, on images that are opened once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from fastbyol.config.errors import UserError
from fastbyol.evaluation.label_free import evaluate_label_free
from fastbyol.evaluation.protocols import evaluate_knn, evaluate_linear
from fastbyol.evaluation.result_file import ProtocolResult, TaskResult, read_result, write_result
from fastbyol.evaluation.splits import Splits
from fastbyol.evaluation.subjects import FeatureBank
from fastbyol.evaluation.tasks.linear import LinearSettings
from fastbyol.evaluation.tasks.registry import result_settings
from fastbyol.export import encoder_of
from fastbyol.run.checkpoint import RunState


def scores_of(
    state: RunState, splits: Splits, *, device: str, quick_linear: bool, baselines: bool, data: str, command: str
) -> dict[str, dict[str, float]]:
    """Evaluates a run and writes RUN/evaluation/*.json. Returns top-1 shares by subject and protocol, and the measures without labels as 'signs'.

    quick_linear: with the quick linear evaluation too. baselines: score the baselines too.
    """
    bank = FeatureBank(encoder_of(state), config=state.config, splits=splits, device=device)
    subjects = bank.subjects if baselines else bank.subjects[:1]
    results: list[ProtocolResult] = [evaluate_linear(bank, subjects=subjects)] if quick_linear else []
    results.append(evaluate_knn(bank, subjects=subjects))
    label_free = evaluate_label_free(bank)
    for result in (*results, label_free):
        write_result(result, state.results, data=data, step=state.step, command=command, verdict=[])
    found = {subject: {result.protocol: result.scores[subject].top1 for result in results} for subject in subjects}
    if baselines:
        found["chance"] = {result.protocol: result.chance_top1 for result in results}
    return {**found, "signs": {name: value for name, value in label_free.measures["byol"].items() if name != "feature_dim"}}


def paper_linear(run: Path, *, data: str, launcher: Sequence[str], log: Path, execute: Callable[[list[str], Path], int]) -> float:
    """Runs the paper's linear evaluation of a run as a command of its own, on all ranks, and returns its top-1 share. It goes on where it was stopped.

    execute: runs a command with its output in a file, and returns its exit code. Raises UserError with the command's last line if it fails.
    """
    options = ["--settings", "paper", "--init", "byol", "--checkpoint", str(run), "--data", data]
    code = execute([*launcher, "-m", "fastbyol", "evaluate", "linear", *options], log)
    if code:
        raise UserError(f"evaluate linear ended with code {code}: {last_error(log)}")
    # As in a result file: JSON turns tuples into lists.
    paper_settings = json.loads(json.dumps(result_settings(LinearSettings(), "paper")))
    found: list[tuple[int, float, float]] = []
    for path in (run / "evaluation").glob("linear*.json"):
        result, facts = read_result(path)
        if not isinstance(result, TaskResult) or facts.get("data") != data or result.subjects.keys() != {"byol"}:
            continue
        if result.settings == paper_settings | {"identity": result.settings.get("identity")}:
            found.append((int(facts["step"]), path.stat().st_mtime, result.subjects["byol"].scores["top1"]))
    if found:
        return max(found)[-1]  # the latest, as another seed's may be there
    raise UserError(f"{run / 'evaluation'}: holds no linear evaluation with the paper's settings")


def last_error(log: Path) -> str:
    """Returns the line of a command's output that says why it ended: its last error, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.partition("fastbyol: error: ")[2] for line in lines if "fastbyol: error: " in line]
    return (errors or lines or ["it wrote nothing"])[-1][:500]
