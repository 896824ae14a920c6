"""Says what the measurements mean: what limits the run, as a verdict; tables for the terminal; a YAML file that `fastbyol train --config` reads."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fastbyol.config.arguments import through_links
from fastbyol.config.console import printable
from fastbyol.config.errors import UserError
from fastbyol.config.plain import to_plain
from fastbyol.config.schema import TrainConfig
from fastbyol.host.durable_files import write_durably
from fastbyol.tuning.comparison import Comparison, estimate

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

WAIT_SHARE = 0.05
"""A step that spends a larger share of its time waiting is held up by the data."""
GPUS_OF_A_MACHINE = 8
SMALL_SPREAD = 0.9
"""Whole steps that reach this share of the speed of the step alone lose nothing to the data."""


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raises UserError, before any work, if `write_config` could not write the file or would replace one without `overwrite`."""
    path = through_links(path)
    if path.is_dir() or path.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(f"--out {path}: must be a file that ends in .yaml")
    if path.exists() and not overwrite:
        raise UserError(f"--out {path}: exists; give another name, or --overwrite to replace it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out {path}: {path.parent} is not a folder that may be written to; choose another one")


def write_config(path: Path, text: str) -> None:
    """Writes or replaces the whole file. Raises UserError if it cannot be written."""
    path = through_links(path)
    try:
        write_durably(path, text)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); choose another one") from error


def start_command(path: Path, *, ranks: int, out: str) -> str:
    """Returns the command that starts a run of so many ranks from a config file; for more ranks than a machine has GPUs, what to type on each machine."""
    options = ["--config", str(path), "--out", out]
    here = max(part for part in range(1, GPUS_OF_A_MACHINE + 1) if ranks % part == 0)
    if here < ranks:
        start = shlex.join(["bash", "scripts/several_nodes.sh", *options])
        machines = ranks // here
        return f"on each of {machines} machines with {here} GPUs, HOST being one of them: NODES={machines} GPUS={here} HOST=HOST {start}"
    start = ["torchrun", "--nproc-per-node", str(ranks)] if ranks > 1 else ["python"]
    return shlex.join([*start, "-m", "fastbyol", "train", *options])


def config_yaml(config: TrainConfig, notes: Mapping[str, str], *, head: list[str]) -> str:
    """Returns the whole config as YAML, without `out`, which each run names itself; a setting's note follows it as a comment.

    Args:
        config: the run to start.
        notes: the notes, by the setting's dotted name.
        head: lines of comment at the top.
    """
    return options_yaml({name: value for name, value in to_plain(config).items() if name != "out"}, notes, head=head)


def options_yaml(values: Mapping[str, Any], notes: Mapping[str, str], *, head: list[str]) -> str:
    """Returns options as YAML that `--config` reads, with notes and head as in `config_yaml`.

    Args:
        values: options in groups, as `to_plain` gives them; any part of them.
    """
    lines = [f"# {printable(' '.join(line.split()))}" for line in head]
    return "\n".join([*lines, *_lines(values, notes, prefix="")]) + "\n"


def _lines(values: Mapping[str, Any], notes: Mapping[str, str], *, prefix: str) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from _lines(value, notes, prefix=f"{name}.")
            continue
        # Dumped in a list, because YAML ends a lone value with a document-end mark.
        text = f"{key}: {yaml.safe_dump([value], width=10**6, allow_unicode=True, default_flow_style=True).strip()[1:-1]}"
        yield f"{indent}{text}  # {printable(' '.join(notes[name].split()))}" if name in notes else f"{indent}{text}"


def comparison_table(comparisons: list[Comparison], *, per: str) -> Table:
    """Returns a table with each candidate's median and extremes over the rounds; the best are marked."""
    from rich.table import Column, Table

    table = Table(Column("", no_wrap=True), Column(f"images/s per {per}", no_wrap=True), "slowest to fastest", "", box=None, pad_edge=False)
    for comparison in comparisons:
        table.add_row(_plain(comparison.title))
        for name, rates in comparison.rates.items():
            found = estimate(rates)  # from so few rounds, its interval is the slowest to the fastest
            mark = "reference" if name == comparison.reference else "best" if name == comparison.best else ""
            table.add_row(_plain(f"  {name}"), f"{found.median:,.0f}", f"{found.low:,.0f} to {found.high:,.0f}", mark)
        for name, reason in comparison.failed.items():
            table.add_row(_plain(f"  {name}"), "-", _plain(reason), "")
    return table


def _plain(text: str) -> Text:
    from rich.text import Text

    # Not a str: rich would read [brackets] in a file's name or an error's text as markup.
    return Text(printable(text))


@dataclass(frozen=True)
class Speeds:
    """Images per second of one process: the loader alone, the step alone, both together, and the share of the time that the step waits."""

    loader: float
    step: float
    whole: float
    wait_share: float
    workers: int
    """Threads with which the loader was measured."""
    workers_needed: int
    """Threads that would feed the step."""
    cores: int
    torch_threads: int
    on_gpu: bool

    @property
    def data_bound(self) -> bool:
        return self.wait_share > WAIT_SHARE and self.whole < SMALL_SPREAD * self.step


def verdict(speeds: Speeds) -> str:
    """Returns 'data-bound' or 'compute-bound' with the reason, and the next thing to change."""
    if not speeds.data_bound:
        return f"compute-bound: the step waits {speeds.wait_share:.0%} of the time for data. {_faster_step(speeds)}"
    waits = f"data-bound: the step waits {speeds.wait_share:.0%} of the time"
    if speeds.loader >= speeds.step:
        reason = "though the loader alone is faster than the step: other work takes cores from its threads"
        return f"{waits}, {reason}. Next: more cores, or fewer processes"
    return f"{waits}. {_cheaper_data(speeds)}"


def _faster_step(speeds: Speeds) -> str:
    if not speeds.on_gpu and speeds.torch_threads < speeds.cores:
        return f"Next: OMP_NUM_THREADS={speeds.cores}, because torch computes with {speeds.torch_threads} of {speeds.cores} cores"
    if not speeds.on_gpu:
        return "Next: a GPU, or a smaller encoder or views.size_px; more loader threads do not help"
    return "Next: precision.compile if it is off, then more GPUs; more loader threads do not help"


def _cheaper_data(speeds: Speeds) -> str:
    if speeds.workers < min(speeds.workers_needed, speeds.cores):
        return f"Next: data.workers {min(speeds.workers_needed, speeds.cores)}"
    smaller = "images stored smaller (python -m fastbyol convert --max-side)"
    if speeds.on_gpu:
        return f"Next: {smaller}; tar shards, whose JPEGs DALI decodes on the GPU (data.dali_ops crop); a machine with more cores per GPU"
    return f"Next: {smaller}; more cores"
