"""What a folder of runs holds beside them: the set-up they share, and a record of each finished run, from which the tables are made."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastbyol.config.errors import UserError, shown
from fastbyol.config.plain import from_plain, to_plain
from fastbyol.config.schema import TrainConfig
from fastbyol.host.durable_files import write_durably
from fastbyol.reproduction.rows import SCALES
from fastbyol.run.folder import FREE_TO_CHANGE, config_changes

log = logging.getLogger("fastbyol")
SETUP_FILE = "setup.json"
RECORDS = "records"
STATUSES = ("complete", "collapsed", "diverged", "failed")
FREE = FREE_TO_CHANGE - {"rank_batch"} | {"seed"}
"""Options in which a row may differ from its record: those that do not affect the result."""


@dataclass(frozen=True)
class Setup:
    """What all runs of a folder share.

    scale: 'demo' or 'paper'. linear: protocol of the linear evaluation, 'quick' or 'paper'. ranks: processes of each run. base: config of
    the run without any change. images: what identifies the train and val images (`Source.fingerprint`), by split; empty in folders of
    earlier versions.
    """

    scale: str
    linear: str
    ranks: int
    data: str
    base: TrainConfig
    images: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One run of a row with one seed.

    status: complete; collapsed, trained to its end or not, with every image at one point; diverged, no longer finite; or failed, with the reason in
    `why`. scores: top-1 shares on val by protocol, 'linear' and 'knn'. baselines: the same by subject, 'untrained', 'pca' and 'chance', where the
    run is a base. signs: measures without labels (`label_free`), of the trained encoder. cpu_s: processor seconds of the training, of all
    processes; wall_s: its wall-clock seconds; both are sums over its starts. cost_is_whole: False if one of these was killed, whose seconds nobody
    counted. num_train, num_val: images.
    """

    run: str
    seed: int
    status: str
    config: TrainConfig
    why: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    signs: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    num_train: int = 0
    num_val: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    cost_is_whole: bool = True
    device: str = ""
    ranks: int = 1
    command: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise UserError(f"status = {shown(self.status)}: must be one of {', '.join(STATUSES)}")
        groups = (self.scores, self.signs, *self.baselines.values())
        counts = (self.seed, self.steps, self.num_train, self.num_val, self.cpu_s, self.wall_s, self.ranks)
        if not all(isinstance(value, int | float) for value in (*counts, *(value for group in groups for value in group.values()))):
            raise UserError("scores, signs, baselines, counts and seconds must be numbers")
        if not all(map(math.isfinite, (*counts, *self.scores.values()))):  # signs of a collapsed run may be NaN or infinite
            raise UserError("scores, counts and seconds must be finite")
        shares = (*self.scores.values(), *(value for group in self.baselines.values() for value in group.values()))
        if not all(0 <= share <= 1 for share in shares) or min(counts) < 0:
            raise UserError("scores and baselines must be shares from 0 to 1, counts and seconds not negative")
        if not isinstance(self.cost_is_whole, bool):
            raise UserError(f"cost_is_whole = {shown(self.cost_is_whole)}: must be true or false")
        if not all(isinstance(text, str) for text in (self.run, self.why, self.device)):
            raise UserError("run, why and device must be texts")


def write_setup(folder: Path, setup: Setup) -> None:
    write_durably(folder / SETUP_FILE, json.dumps(to_plain(setup), indent=1) + "\n")


def read_setup(folder: Path) -> Setup | None:
    """Returns the set-up of a folder, None if it has none. Raises UserError if it cannot be read."""
    path = folder / SETUP_FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        images = values.pop("images", {})
        if not all(isinstance(text, str) for facts in images.values() for text in facts.values()):
            raise UserError(f"images = {shown(images)}: must be texts by split and name")
        setup = from_plain(Setup, values)
        if setup.scale not in SCALES:
            raise UserError(f"scale = {shown(setup.scale)}: must be one of {', '.join(SCALES)}")
        return replace(setup, images=images)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not the set-up of a reproduction ({error}); choose another --out") from error


def setup_changes(old: Setup, new: Setup) -> list[str]:
    """Returns 'name was x, is y' for everything that may not change between two calls on one folder."""
    plain = [
        f"{name} was {getattr(old, name)}, is {getattr(new, name)}"
        for name in ("scale", "linear", "ranks")
        if getattr(old, name) != getattr(new, name)
    ]
    return plain + config_changes(old.base, new.base, free=FREE)


def check_same_images(folder: Path, old: Setup | None, new: Setup, *, num_train: int, num_val: int) -> None:
    """Raises UserError if the folder's set-up or a record is of other images: its rows would be compared with those of other data."""
    data, before = new.data, old.images if old else {}
    for split, facts in new.images.items():
        if changed := [name for name, text in before.get(split, facts).items() if facts.get(name) != text]:
            raise UserError(
                f"--data {data}: its {split} images are not those of the runs in --out {folder}: other {', '.join(changed)}; give the same "
                "data, or choose another --out"
            )
    for path in sorted((folder / RECORDS).glob("*.json")):
        record = read_record(path)
        if record.num_val and (record.num_train, record.num_val) != (num_train, num_val):
            raise UserError(
                f"--data {data}: has {num_train:,} train and {num_val:,} val images, and {path} is of {record.num_train:,} and "
                f"{record.num_val:,}; give the same data, or choose another --out"
            )


def record_path(folder: Path, run: str, seed: int) -> Path:
    return folder / RECORDS / f"{run}-seed{seed}.json"


def write_record(folder: Path, record: Record) -> None:
    path = record_path(folder, record.run, record.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {**dataclasses.asdict(record), "config": to_plain(record.config)}
    # A line for each part, so that the differences between two records can be read.
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
    write_durably(path, f"{{\n{lines}\n}}\n")


def read_record(path: Path) -> Record:
    """Reads a file of `write_record`. Raises UserError if it is not such a file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        record = Record(**{**values, "config": from_plain(TrainConfig, values["config"])})
        if record_path(path.parent.parent, record.run, record.seed).name != path.name:
            raise UserError(f"it is of {record.run} with seed {record.seed}")
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not the record of a run ({error}); delete it, and the run is evaluated again") from error


def read_records(folder: Path) -> list[Record]:
    """Returns all records of a folder, by run and seed; one that cannot be read is named in a warning and left out."""
    found = []
    for path in sorted((folder / RECORDS).glob("*.json")):
        try:
            found.append(read_record(path))
        except UserError as error:
            log.warning("%s", error)
    return found
