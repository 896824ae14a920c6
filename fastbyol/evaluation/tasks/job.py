"""A job: one task on one data set for some encoders, with the ranks that share it and the folder in which it goes on after a stop."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbyol.config.errors import UserError
from fastbyol.config.schema import PrecisionConfig
from fastbyol.config.views import ViewPair
from fastbyol.evaluation.embedding import weights_digest
from fastbyol.evaluation.result_file import TaskResult
from fastbyol.evaluation.subjects import untrained_encoder
from fastbyol.export import encoder_of
from fastbyol.host.durable_files import write_durably
from fastbyol.host.signals import StopRequest
from fastbyol.ranks.process_group import Process, broadcast_from_main
from fastbyol.run.checkpoint import RunState
from fastbyol.run.foreign_weights import load_runs_or_weights

Images = Callable[[], torch.Tensor]
"""Returns a random sample of the task's training images (N, 3, S, S), normalised; called only where it is needed."""


@dataclass(frozen=True)
class Subject:
    """One encoder to evaluate.

    name: short and unique in the job. title: for tables. views: size, interpolation and normalisation of its images. identity: changes
    with its weights, its network and its views.
    """

    name: str
    title: str
    views: ViewPair
    identity: str
    build: Callable[[Images], nn.Module] = field(repr=False)

    def encoder(self, images: Images) -> nn.Module:
        """Returns a new copy of the encoder in eval mode on the CPU: (N, 3, S, S) -> (N, feature_dim). images: for an untrained encoder,
        whose batch norms need statistics.
        """
        return self.build(images)


@dataclass(frozen=True)
class Job:
    """One task on one data set: encoders, ranks, precision and folder. Every rank has one, and only `process` differs between them.

    data: as typed. folder: of result files. precision: number formats and compilation, as in training. batch: images per forward pass
    without gradients. workers: decoding threads or processes of this rank; 0: its share of the cores. seed: of all random choices.
    earlier: on rank 0, an incomplete result of this job, whose scores a task may keep. inputs: digest of the data's files (`data_state`).
    again: the result is computed anew, from nothing that an earlier attempt left.
    """

    task: str
    data: str
    settings: Mapping[str, Any]
    subjects: tuple[Subject, ...]
    step: int
    process: Process
    stop: StopRequest
    precision: PrecisionConfig
    folder: Path
    command: str
    batch: int = 256
    workers: int = 0
    seed: int = 0
    announce: Callable[[str], None] = lambda _: None
    earlier: TaskResult | None = None
    inputs: str = ""
    again: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that a result depends on: jobs with the same task, data, settings and encoders continue each other's work."""
        return {
            "task": self.task,
            "data": self.data,
            "inputs": self.inputs,
            "settings": dict(self.settings),
            "subjects": {subject.name: subject.identity for subject in self.subjects},
            "seed": self.seed,
        }

    @property
    def digest(self) -> str:
        """Short text that stands for the identity."""
        # Not sorted: the first encoder is the one that is compared with the others.
        return hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:12]

    @property
    def work(self) -> Path:
        """The folder of finished parts and training states; once the result is written, only those of parts that failed stay in it."""
        return self.folder / f"{self.task}.work-{self.digest}{'-again' * self.again}"

    def prepare(self) -> None:
        """Raises UserError where unfinished work cannot be written, before hours are spent on what cannot be kept. Leaves no empty folder of it."""
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.work):
                pass
            with suppress(OSError):  # parts of an earlier attempt are in it
                self.work.rmdir()  # it is made again when a part is kept
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); name another folder with --out") from error

    def once(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the finished part of this name, or computes it and keeps it, so that a job that was stopped does not repeat it.

        Every rank calls it; all get rank 0's value, which must be plain (JSON).
        """
        path = self.part(key, ".json")
        known = broadcast_from_main(_read_part(path) if self.process.is_main else None)
        if known is not None:
            return known
        found = compute()
        if self.process.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(found) + "\n")
            self.part(key, ".pt").unlink(missing_ok=True)
        return broadcast_from_main(found)

    def part(self, key: str, suffix: str) -> Path:
        """Returns the path of a file of unfinished work. Two keys never share one, whatever characters they are of."""
        plain = _plain(key)
        return (
            self.work
            / f"{plain}{'' if plain == key else '-' + hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:8]}{suffix}"
        )

    def result(self, **parts: Any) -> TaskResult:
        """Returns the result of this job with its scores; parts: the fields of `TaskResult` that a job does not know."""
        return TaskResult(protocol=self.task, version=str(self.settings["version"]), settings=dict(self.settings), **parts)

    def unfinished(self) -> list[Path]:
        """Returns the folders in which unfinished work of this task lies, those of other settings and images too, by name."""
        return sorted(self.folder.glob(f"{self.task}.work-*"))

    def clear(self, *, keep: Sequence[str] = ()) -> None:
        """Deletes the unfinished work, on the main rank. keep: first words of keys whose parts stay, for example sets that failed."""
        if not self.process.is_main:
            return
        begins, parts = tuple(_plain(f"{name} ") for name in keep), list(self.work.glob("*"))
        if not any(path.name.startswith(begins) for path in parts):
            shutil.rmtree(self.work, ignore_errors=True)
            return
        for path in parts:
            if not path.name.startswith(begins):
                path.unlink(missing_ok=True)


def _plain(key: str) -> str:
    """Returns the part of a file's name that says whose it is; two keys may have the same."""
    return re.sub(r"[^A-Za-z0-9.,=+_-]+", "_", key)[:100]


def _read_part(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not there, or damaged: it is computed again


INITS = ("byol", "untrained")
"""The checkpoint's encoder, and the same encoder untrained."""


def load_subjects(
    checkpoint: str | Path, inits: Sequence[str], compare: Sequence[str], *, changes: Mapping[str, Any] | None = None
) -> tuple[RunState, tuple[Subject, ...]]:
    """Returns the checkpoint's run, and the encoders of a job: those of `inits`, each one of INITS or [NAME=]PATH of a run or weights, then those
    of `compare`.

    changes: options of all that are weights, see `load_runs_or_weights`. Raises UserError if there is nothing to load at a path, or two have
    one name.
    """
    texts = (*inits, *compare)
    for text in texts:
        if named_path(text)[0] in INITS:
            raise UserError(f"{text}: {named_path(text)[0]!r} is the name of the checkpoint's own encoder; give another NAME=")
    run, *loaded = load_runs_or_weights([checkpoint, *(named_path(text)[1] for text in texts if text not in INITS)], changes=changes)
    others, subjects = iter(loaded), []
    for text in texts:
        given, path = named_path(text)
        name = given or (Path(path).name if Path(path).is_dir() else Path(path).stem)
        if text == "byol":
            subjects.append(_trained("byol", run))
        elif text == "untrained":
            identity = f"seed {run.config.seed} {run.config.model} {run.config.views}"
            subjects.append(Subject(text, "untrained encoder", run.config.views, identity, partial(_untrained, run)))
        else:
            subjects.append(_trained(name, next(others), title=name))
    names = [subject.name for subject in subjects]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two encoders are named {name!r}; give one another name: --compare NAME=PATH")
    return run, tuple(subjects)


def named_path(text: str) -> tuple[str, str]:
    """Returns name ('' without one) and path of [NAME=]PATH. A path may hold a '=' too. Raises UserError for no path."""
    name, equals, path = text.partition("=")
    name, path = (name, path) if equals and not Path(text).exists() else ("", text)
    if not path:
        raise UserError(f"[NAME=]PATH = {text!r}: its path is empty; give the path of a run, a checkpoint or weights")
    return name, path


def _trained(name: str, run: RunState, *, title: str = "") -> Subject:
    def build(_: Images) -> nn.Module:
        return encoder_of(run, announce=lambda _: None)

    identity = f"{weights_digest(encoder_of(run, announce=lambda _: None))} {run.config.model} {run.config.views}"
    return Subject(name, title or run.title, run.config.views, identity, build)


def _untrained(run: RunState, images: Images) -> nn.Module:
    return untrained_encoder(run.config, images())
