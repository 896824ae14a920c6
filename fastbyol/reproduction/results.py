"""The figures of the tables, from the records of their runs: means over seeds, differences to the base row, ours and the paper's, and cost."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastbyol.config.plain import flatten, to_plain
from fastbyol.config.presets import PRESETS
from fastbyol.config.schema import TrainConfig
from fastbyol.reproduction.records import Record, Setup
from fastbyol.reproduction.rows import RELATIVE, UNCHANGED, Choice, row_config, run_at
from fastbyol.reproduction.tables import TABLES, Row, Table, preset_of

CPU = "CPU"
NOT_RUN = "not run"
SHORT_NAMES = {"model.encoder": "encoder", "model.width": "width"}


@dataclass(frozen=True)
class Spread:
    """A figure of one row by seed, a share or in points."""

    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed.values())

    @property
    def low(self) -> float:
        return min(self.by_seed.values())

    @property
    def high(self) -> float:
        return max(self.by_seed.values())


@dataclass(frozen=True)
class RowResult:
    """What is known of a row.

    here: values of the options that the table varies, at this scale. linear, knn: top-1 shares; None without any. relative: linear minus that of the
    base row, in points, for the seeds that both have; paper_relative: the same of the paper's figures. signs: means over seeds of the measures
    without labels. hours: of training, over all seeds, by unit; cost_is_whole: as in `Record`. state: '' where every seed is complete. remark: why
    there are no figures, or not of all seeds.
    """

    row: Row
    here: str
    linear: Spread | None
    knn: Spread | None
    relative: Spread | None
    paper_relative: float | None
    signs: Mapping[str, float]
    hours: Mapping[str, float]
    cost_is_whole: bool
    state: str
    remark: str

    @property
    def name(self) -> str:
        return ", ".join(self.row.cells)

    @property
    def paper(self) -> str:
        """The paper's top-1 in per cent, or what it says instead."""
        if (top1 := self.row.paper_top1) is None:
            return PRESETS[preset_of(self.row.run)].expected
        return f"{top1:.1f}" if top1 >= 0.1 else f"{top1:g}"

    @property
    def is_base(self) -> bool:
        return self.row.run == self.row.base


@dataclass(frozen=True)
class TableResult:
    """A table with its rows. noise: one standard deviation of the base's linear accuracy from so many val images, in points; None where unknown."""

    table: Table
    rows: tuple[RowResult, ...]
    hours: Mapping[str, float]
    num_val: int
    noise: float | None


def table_results(setup: Setup, records: Sequence[Record]) -> list[TableResult]:
    """Returns the results of the tables that the records belong to, in the paper's order.

    A table is included if a row that is in no other table has a record. If there is no such table, those are included in which any row but
    the base has a record.
    """
    by_run: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.seed):
        by_run.setdefault(record.run, []).append(record)
    uses = Counter(run for table in TABLES.values() for run in {row.run for row in table.rows})
    wanted = [table for table in TABLES.values() if any(row.run in by_run and uses[row.run] == 1 for row in table.rows)]
    if not wanted:
        wanted = [table for table in TABLES.values() if any(row.run in by_run and row.run != row.base for row in table.rows)]
    for name in UNCHANGED:
        by_run.setdefault(name, by_run.get(run_at(setup.scale, name), []))
    return [_table_result(table, setup, by_run) for table in wanted]


def _table_result(table: Table, setup: Setup, by_run: Mapping[str, list[Record]]) -> TableResult:
    rows = tuple(_row_result(table, row, setup, by_run) for row in table.rows)
    base = next((row for row in rows if row.is_base and row.linear), None)
    num_val = max((record.num_val for row in rows for record in by_run.get(row.row.run, ())), default=0)
    noise = None
    if base is not None and base.linear is not None and num_val:
        noise = 100 * math.sqrt(base.linear.mean * (1 - base.linear.mean) / num_val)
    runs = {row.run for row in table.rows}
    return TableResult(table, rows, hours_of(record for run in runs for record in by_run.get(run, ())), num_val, noise)


def _row_result(table: Table, row: Row, setup: Setup, by_run: Mapping[str, list[Record]]) -> RowResult:
    records, bases = by_run.get(row.run, []), by_run.get(row.base, [])
    choice = row_config(row.run, scale=setup.scale, base=setup.base, ranks=setup.ranks)
    linear, base_linear = _scores(records, "linear"), _scores(bases, "linear")
    relative = None
    if linear and base_linear and row.run != row.base:
        shared = {seed: 100 * (share - base_linear.by_seed[seed]) for seed, share in linear.by_seed.items() if seed in base_linear.by_seed}
        relative = Spread(shared) if shared else None
    base_top1 = next((other.paper_top1 for other in table.rows if other.run == row.base), None)
    has_both = row.paper_top1 is not None and base_top1 is not None and row.run != row.base
    return RowResult(
        row=row,
        here=_here(table, row, choice, setup),
        linear=linear,
        knn=_scores(records, "knn"),
        relative=relative,
        paper_relative=row.paper_top1 - base_top1 if has_both else None,  # type: ignore[operator]
        signs=_signs(records),
        hours=hours_of(records),
        cost_is_whole=all(record.cost_is_whole for record in records),
        state=_state(records),
        remark=_remark(records, choice),
    )


def _scores(records: Iterable[Record], protocol: str) -> Spread | None:
    known = {record.seed: record.scores[protocol] for record in records if protocol in record.scores}
    return Spread(known) if known else None


def _signs(records: Sequence[Record]) -> dict[str, float]:
    names = dict.fromkeys(name for record in records for name in record.signs)
    return {name: statistics.fmean(record.signs[name] for record in records if name in record.signs) for name in names}


def _here(table: Table, row: Row, choice: Choice, setup: Setup) -> str:
    """Returns the values of the table's options in this run; '' where the row changes something else, or the table has its own values."""
    config = choice.config
    if config is None or setup.scale == "paper":
        return ""
    names = table.options if row.run == row.base else [name for name in table.options if name in choice.changes]
    return ", ".join(_value(config, name, setup.ranks) for name in names)


def _value(config: TrainConfig, name: str, ranks: int) -> str:
    if name == "rank_batch":
        return f"{config.rank_batch * ranks or config.global_batch:,}"
    value = flatten(to_plain(config))[name]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _state(records: Sequence[Record]) -> str:
    """Returns 'collapsed', 'failed (1 of 2)', ...; '' where every seed is complete."""
    if not records:
        return NOT_RUN
    counts = Counter(record.status for record in records if record.status != "complete")
    return ", ".join(status if count == len(records) else f"{status} ({count} of {len(records)})" for status, count in counts.items())


def _remark(records: Sequence[Record], choice: Choice) -> str:
    """Returns why a row has no figures, or not of all seeds."""
    if not records:
        return f"not run at this scale, because {choice.left_out}" if choice.config is None else "not run yet"
    parts = []
    for status in ("diverged", "failed"):
        seeds = {record.seed: record.why for record in records if record.status == status}
        if seeds:
            which = "" if len(seeds) == len(records) else f" with seed {', '.join(map(str, seeds))}"
            reasons = "; ".join(dict.fromkeys(why for why in seeds.values() if why))
            parts.append(f"{status}{which}" + (f" ({reasons})" if reasons else ""))
    return "; ".join(parts)


def hours_of(records: Iterable[Record]) -> dict[str, float]:
    """Returns the hours of training by unit: processor hours on CPUs, and on GPUs the hours of each of them."""
    hours: dict[str, float] = {}
    for record in records:
        unit, seconds = ("CPU-hours", record.cpu_s) if record.device in (CPU, "") else ("GPU-hours", record.wall_s * record.ranks)
        if seconds:
            hours[unit] = hours.get(unit, 0.0) + seconds / 3600
    return hours


def carried_over(table: Table, setup: Setup) -> str:
    """Returns a text on what carries over from the paper's table to demo scale and what does not; '' at the paper's scale."""
    if setup.scale == "paper":
        return ""
    factors = [name for name in table.options if name in RELATIVE]
    values = [name for name in table.options if name not in RELATIVE and name not in ("rank_batch", *SHORT_NAMES)]
    changes = ["the change itself, made to another recipe"]
    if "rank_batch" in table.options:
        changes.append("batch norm sees the same share of the batch as the paper's")
    if factors:
        changes.append(f"{' and '.join(factors)} changes by the same factor, starting from the recipe's own value")
    if values:
        changes.append(f"{' and '.join(values)} takes the paper's values besides the recipe's own")
    return (
        f"What carries over: {'; '.join(changes)}. What does not: the accuracies themselves, the size of an effect, because the run is short and the "
        "network small, and the rows marked as not run at this scale."
    )
