"""Copies of a run's checkpoints in a store, for machines that may be taken away at any time.

Of each checkpoint the store gets a folder `step-000000500/` with the files, and last `step-000000500.json`, which has their sizes and
digests: without it, a copy that was cut off does not count.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fastbyol.config.errors import Lost, NotSaved, UserError, first_line, shown
from fastbyol.config.plain import from_plain, to_plain
from fastbyol.config.schema import TrainConfig
from fastbyol.config.urls import is_url
from fastbyol.data.formats.manifest import sha256_of
from fastbyol.host.durable_files import durable_file, write_all, write_durably
from fastbyol.host.saved_structure import is_count
from fastbyol.host.store_copies import PART_BYTES
from fastbyol.host.stores import retried, store_of
from fastbyol.run.checkpoint import checkpoint_path, checkpoint_steps, digest_path
from fastbyol.run.folder import CONFIG_FILE, PROVENANCE_FILE, config_changes
from fastbyol.run.log import METRICS_FILE

log = logging.getLogger("fastbyol")
OPTION = "mirror"
_BESIDE = (METRICS_FILE, PROVENANCE_FILE, CONFIG_FILE)
"""Files of the run folder that are copied with each checkpoint. Only the log is brought back; the others are for people."""
_MARKER = "step-{:09d}.json"
_MAX_MARKER_BYTES = 1 << 20
_WITHOUT_FOLDERS = ("s3://", "s3a://", "gs://", "gcs://", "abfs://", "az://", "hf://")
"""Stores where a folder is a part of a file's name; to make one could mean to make a bucket."""


@dataclass(frozen=True)
class Copy:
    """One complete copy: its step, and size and SHA-256 of each file."""

    step: int
    files: dict[str, tuple[int, str]]


class Mirror:
    """The copies of one run's checkpoints at a URL.

    Args:
        config: the run's config; `config.mirror` is the URL.

    Raises:
        UserError: a package is missing for the URL, the store cannot be written, or it has the copies of another run.
        Lost: the store does not answer.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.shown = config.mirror
        if not is_url(config.mirror) or config.mirror.startswith(("http://", "https://")):
            raise UserError(f"{OPTION} = {self.shown}: must be a URL that can be written to; use s3://, gs:// or file:///FOLDER")
        self._config = config
        self._store, path = store_of(config.mirror, option=OPTION)
        self._path = path.rstrip("/")
        self._copies: dict[int, Copy] = {}
        self._read_markers()

    @property
    def steps(self) -> list[int]:
        """Steps with a complete copy, ascending."""
        return sorted(self._copies)

    def check_writable(self) -> None:
        """Raises UserError if the store cannot be written. Leaves nothing there, unless the store refuses to remove files."""
        probe = f"{self._path}/fastbyol-writes-here"
        try:
            self._make_folder(self._path)
            self._call(lambda: self._store.pipe_file(probe, b"written to find out whether it can be\n"), "")
            with suppress(Exception):  # old copies stay in such a store too
                self._store.rm_file(probe)
        except (Lost, UserError):
            raise
        except Exception as error:
            raise UserError(
                f"{OPTION} = {self.shown}: cannot be written to ({first_line(error) or type(error).__name__}); use a store that can, such as "
                "s3://, gs:// or file://"
            ) from None

    def bring_newest(self, run: Path) -> int:
        """Copies the newest good checkpoint into the run folder, if it is newer than all there; returns its step, or 0 if none is.

        Raises UserError if there are newer ones but none is good, NotSaved if the disk refuses.
        """
        self._read_markers()  # another machine may have copied checkpoints since `check_run`
        here = max(checkpoint_steps(run), default=0)
        newer = [step for step in reversed(self.steps) if step > here]
        for step in newer:
            try:
                self._bring(self._copies[step], run)
                log.info("%s: the checkpoint after step %d is copied from there", self.shown, step)
                return step
            except ValueError as error:  # a UserError is a ValueError
                log.warning("%s: the copy of the checkpoint after step %d is not used: %s", self.shown, step, error)
            except OSError as error:
                raise NotSaved(
                    f"{run}: the checkpoint from {self.shown} cannot be written ({error.strerror or error}); make room"
                ) from error
        if newer and not here:
            raise UserError(f"{OPTION} = {self.shown}: all {len(newer)} copies are damaged; start again with another --{OPTION}")
        return 0

    def copy(self, run: Path, step: int, *, keep: Callable[[list[int]], list[int]]) -> None:
        """Copies a checkpoint of the run folder, then removes the copies that `keep` leaves out of all steps there.

        Raises Lost, UserError or the store's own error; a copy that is not complete has no marker.
        """
        files: dict[str, Path] = {checkpoint_path(run, step).name: checkpoint_path(run, step)}
        files |= {name: run / name for name in _BESIDE if (run / name).is_file()}
        folder = f"{self._path}/step-{step:09d}"
        self._make_folder(folder)
        copied = {}
        for name, path in files.items():
            # The log grows meanwhile: copy only what is there now.
            size = path.stat().st_size
            digest = digest_path(path).read_text().strip() if path.suffix == ".pt" else sha256_of(path, size=size)
            self._call(lambda path=path, name=name, size=size: self._put(path, f"{folder}/{name}", size), name)
            copied[name] = (size, digest)
        marker = {"step": step, "files": copied, "config": to_plain(self._config)}
        self._call(lambda: self._store.pipe_file(f"{self._path}/{_MARKER.format(step)}", json.dumps(marker).encode()), "")
        self._copies[step] = Copy(step, copied)
        kept = keep(self.steps)
        for old in [old for old in self.steps if old not in kept]:
            self._remove(old)

    def _make_folder(self, path: str) -> None:
        if not self._config.mirror.startswith(_WITHOUT_FOLDERS):
            self._call(lambda: self._store.makedirs(path, exist_ok=True), "")

    def _put(self, path: Path, target: str, size: int) -> None:
        if path.suffix == ".pt":
            self._store.put_file(str(path), target)
        else:
            with path.open("rb") as file:
                self._store.pipe_file(target, file.read(size))
        self._store.invalidate_cache()
        if (arrived := self._store.size(target)) != size:
            raise OSError(f"{arrived} of {size} bytes arrived")

    def _remove(self, step: int) -> None:
        """Removes a copy, its marker first. In a store that does not allow it, copies accumulate."""
        try:
            self._store.rm_file(f"{self._path}/{_MARKER.format(step)}")
            del self._copies[step]
            self._store.rm(f"{self._path}/step-{step:09d}", recursive=True)
        except Exception as error:
            log.warning("%s: the old copy of step %d cannot be removed (%s)", self.shown, step, first_line(error))
            self._copies.pop(step, None)

    def _bring(self, copy: Copy, run: Path) -> None:
        path = checkpoint_path(run, copy.step)
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, path.name):
            if name not in copy.files:
                continue
            size, digest = copy.files[name]
            target = path if name == path.name else run / name
            source, found = f"{self._path}/step-{copy.step:09d}/{name}", hashlib.sha256()
            damaged = UserError(f"{name} is not what was copied there (cut, or changed)")
            with durable_file(target) as file:
                for start in range(0, size, PART_BYTES):
                    end = min(start + PART_BYTES, size)
                    part = self._call(lambda source=source, start=start, end=end: self._store.cat_file(source, start=start, end=end), name)
                    if len(part) != end - start:
                        raise damaged
                    found.update(part)
                    write_all(file, part)  # outside of `_call`, which would take an error of the disk for one of the store
                if found.hexdigest() != digest:
                    raise damaged
                if target == path:  # as `save_checkpoint`: the digest, then the name
                    write_durably(digest_path(path), digest + "\n")

    def _read_markers(self) -> None:
        """Lists the copies, and reads the markers that are not known yet."""
        self._store.invalidate_cache()
        try:
            names = self._call(lambda: self._names(), "")
        except NotImplementedError:
            raise UserError(f"{OPTION} = {self.shown}: this store cannot be listed; use s3://, gs:// or file://") from None
        self._copies = {step: copy for step, copy in self._copies.items() if _MARKER.format(step) in names}
        known = {_MARKER.format(step) for step in self._copies}
        for name in [name for name in names if name not in known]:
            text = self._call(lambda name=name: self._store.cat_file(f"{self._path}/{name}", start=0, end=_MAX_MARKER_BYTES), name)
            try:
                marker = json.loads(text)
                files = {str(file): (size, digest) for file, (size, digest) in marker["files"].items()}
                step = marker["step"]
                counts = all(is_count(size) and isinstance(digest, str) for size, digest in files.values())
                if not is_count(step) or _MARKER.format(step) != name or not counts or checkpoint_path(Path(), step).name not in files:
                    raise ValueError(f"step is {shown(step)}")
                config = from_plain(TrainConfig, marker["config"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                log.warning("%s/%s: is not a marker of a copy (%s); it does not count", self.shown, name, first_line(error))
                continue
            if changed := config_changes(config, self._config):
                raise UserError(
                    f"{OPTION} = {self.shown}: holds a run with another config ({'; '.join(changed[:5])}); give each run a place of its own"
                )
            self._copies[step] = Copy(step, files)

    def _names(self) -> list[str]:
        """Returns the names of all markers."""
        try:
            listed = self._store.ls(self._path, detail=False)
        except FileNotFoundError:  # nothing was copied yet
            return []
        names = (str(path).rstrip("/").rpartition("/")[2] for path in listed)
        return sorted(name for name in names if name.startswith("step-") and name.endswith(".json"))

    def _call(self, call: Callable[[], Any], name: str) -> Any:
        return retried(call, f"{OPTION} = {self.shown}/{name}".rstrip("/"))


class MirrorWriter:
    """Copies checkpoints in a thread; leaving the context waits for the last one. A failed copy never stops the training.

    Args:
        mirror: where to.
        run: the run folder.
        keep: as `save_checkpoint` has it: number of the newest to keep.
        stays: returns True for a step whose checkpoint is kept in any case.
    """

    def __init__(self, mirror: Mirror, run: Path, *, keep: int, stays: Callable[[int], bool]) -> None:
        self._mirror, self._run, self._number, self._stays = mirror, run, keep, stays
        self._wanted: list[int] = []
        self._failure = ""
        self._closing = False
        self._changed = threading.Condition()
        # A daemon, so that a second signal does not wait for the store.
        self._thread = threading.Thread(target=self._work, name="fastbyol-mirror", daemon=True)

    def add(self, step: int) -> None:
        """Asks for a copy of this checkpoint. If copying falls behind training, only the newest and those that stay are copied."""
        with self._changed:
            self._wanted = [*(old for old in self._wanted if self._stays(old)), step]
            self._changed.notify_all()

    def __enter__(self) -> Self:
        # Also the checkpoint that a machine had saved but not copied when it was taken away.
        newest = max(checkpoint_steps(self._run), default=0)
        if newest and newest not in self._mirror.steps:
            self.add(newest)
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            waits = bool(self._wanted)
        if waits:
            log.info("waiting for the copy of the last checkpoint in %s", self._mirror.shown)
        self._thread.join()
        if self._failure and kind is None:
            raise NotSaved(
                f"{self._mirror.shown}: the last checkpoint is in {self._run}, but could not be copied ({self._failure}); the same command copies it"
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closing)
                if not self._wanted:
                    return
                step = self._wanted[-1]
            error = self._copy(step)
            with self._changed:
                newest = step == self._wanted[-1]
                if newest:
                    self._failure = error
                # A failed copy is given up for the next checkpoint's; only a checkpoint that stays is tried again then.
                self._wanted = [other for other in self._wanted if other != step or (error and self._stays(step) and not self._closing)]
                if error and newest and not self._closing:
                    self._changed.wait_for(lambda step=step: self._closing or (self._wanted and self._wanted[-1] != step))

    def _copy(self, step: int) -> str:
        """Returns '' or why the checkpoint could not be copied, which is logged."""
        try:
            self._mirror.copy(self._run, step, keep=self._kept)
            log.info("the checkpoint after step %d is copied to %s", step, self._mirror.shown)
            return ""
        except Exception as error:
            if not checkpoint_path(self._run, step).exists():
                return ""  # training went on so fast that it was removed meanwhile; newer ones are copied
            why = " ".join(str(error).split())[:300] or type(error).__name__
            log.warning("the checkpoint after step %d is not copied to %s (%s); training goes on", step, self._mirror.shown, why)
            return why

    def _kept(self, steps: list[int]) -> list[int]:
        return [step for step in steps if step in steps[-self._number :] or self._stays(step)]
