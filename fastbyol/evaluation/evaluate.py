"""Evaluates a run: the protocols that its data allow, their files, and the verdict."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbyol.config.console import say
from fastbyol.config.errors import UserError
from fastbyol.data.inputs.subset import list_digest
from fastbyol.evaluation.advice import RunFacts
from fastbyol.evaluation.data_state import data_state, paths_of
from fastbyol.evaluation.embedding import weights_digest
from fastbyol.evaluation.protocols import PROTOCOLS, SCORED
from fastbyol.evaluation.result_file import LabelFreeResult, ProtocolResult, Result, write_or_say
from fastbyol.evaluation.splits import Splits, split_paths
from fastbyol.evaluation.subjects import FeatureBank
from fastbyol.evaluation.summary import label_free_table, score_table
from fastbyol.evaluation.verdict import Verdict, verdict_on
from fastbyol.run import next_command as following
from fastbyol.run.checkpoint import RunState
from fastbyol.run.log import read_metrics

if TYPE_CHECKING:
    from rich.console import RenderableType


def evaluate(
    run: RunState,
    bank: FeatureBank,
    protocol: str,
    *,
    checkpoint: str,
    data: str,
    out: Path,
    command: str,
    knn_options: dict[str, Any] | None = None,
) -> tuple[list[Result], Verdict]:
    """Evaluates the run in one protocol, or in 'all' that its data allow, writes a file of each, and returns them with the verdict.

    checkpoint, data, command: as typed. out: folder of the files. Raises UserError if the protocol needs labels that the data do not have.
    """
    wanted = tuple(PROTOCOLS) if protocol == "all" else (protocol,)
    if bank.splits.unscored and protocol in SCORED:
        way_out = following.typed("evaluate", "labelfree", "--checkpoint", checkpoint, "--data", data)
        raise UserError(f"--data {data}: {bank.splits.unscored}, so there is no accuracy to measure; without labels: {way_out}")
    facts, inputs = facts_of(run, bank), inputs_of(bank, data)
    results: list[Result] = []
    for name in possible(wanted, bank.splits):
        results.append(PROTOCOLS[name](bank, **(knn_options or {} if name == "knn" else {})))
        # Keep each result at once, so that an error in the next protocol does not lose it.
        keep(results[-1], out, data=data, inputs=inputs, run=run, command=command, facts=facts)
    return results, verdict_on(results, facts)


def possible(protocols: Sequence[str], splits: Splits) -> list[str]:
    """Returns the protocols that the data allow, and says which are left out and why."""
    if splits.unscored and (left_out := [name for name in protocols if name in SCORED]):
        say(f"{' and '.join(left_out)} left out: {splits.unscored}", file=sys.stderr)
        return [name for name in protocols if name not in SCORED]
    return list(protocols)


def facts_of(run: RunState, bank: FeatureBank) -> RunFacts:
    """Returns what the advice needs to know of a run."""
    return RunFacts.of(run.config, step=run.step, records=read_metrics(run.folder), split=bank.splits.train)


def keep(result: Result, folder: Path, *, data: str, inputs: str, run: RunState, command: str, facts: RunFacts) -> None:
    """Writes a result to its file, with its own verdict."""
    # A folder other than the run's own may hold the results of several runs.
    own = run.title if folder == run.results else f"{run.results.absolute()} {run.title}"
    named = {"run": own, "inputs": inputs}
    write_or_say(result, folder, data=data, step=run.step, **named, command=command, verdict=verdict_on([result], facts).lines())


def inputs_of(bank: FeatureBank, data: str) -> str:
    """Returns a short text that changes with the trained encoder's weights and with the images at this path."""
    return f"{weights_digest(bank.encoder)} {data_state(paths_of(data))}"


def subset_settings(subset: str | None) -> dict[str, str]:
    """Returns the list that the train images were chosen by, and a digest of it, as settings of a result; {} without one."""
    if subset is None:
        return {}
    return {"subset": subset, "subset_sha256": list_digest(Path(subset))}


def result_tables(results: Sequence[Result], *, title: str = "BYOL") -> Iterator[RenderableType]:
    """Yields the results as tables for the terminal. title: what the trained encoder is called."""
    if scored := [result for result in results if isinstance(result, ProtocolResult)]:
        yield score_table(scored, title=title)
    yield from (label_free_table(result, title=title) for result in results if isinstance(result, LabelFreeResult))


def next_command(checkpoint: str, data: str) -> str:
    """Returns the command to type after an evaluation: a run has a report, a file alone has none."""
    if Path(checkpoint).is_dir():
        return following.report(checkpoint, data)
    return following.embed(checkpoint, split_paths(data)[0])
