"""Embeds a data set: one row for each image that decodes, in index order, by any number of ranks; a command that was killed goes on where it stopped.

The images are cut into parts of a fixed number of rows, whatever the number of ranks; the missing parts are dealt out to the ranks. A part
is a file in a hidden folder beside the output, complete or absent. At the end rank 0 joins them, without the rows of images that do not
decode.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastbyol import __version__
from fastbyol.config.errors import UserError, first_line, public_argument, require_choice
from fastbyol.config.schema import DataConfig
from fastbyol.config.urls import is_url, separated
from fastbyol.data.build import build_image_loader
from fastbyol.data.inputs.images import CONVERTERS_OPTION, LABEL_MODES
from fastbyol.data.loader import ImageLoader
from fastbyol.data.replacements import LOGGED, TOO_MANY, damage_allowed
from fastbyol.evaluation.feature_file import DTYPES, Facts, FeatureFile, Rows, check_output, work_path, write_features
from fastbyol.evaluation.ray_rows import RowEncoder, rows_on_ray
from fastbyol.export import CROP, networks_of
from fastbyol.host.durable_files import durable_file, locked_file, write_durably
from fastbyol.host.progress import Progress
from fastbyol.host.quantities import names_text
from fastbyol.ranks.process_group import Process, broadcast_from_main, gather_on_main
from fastbyol.ranks.ray_cluster import ENGINES, import_ray
from fastbyol.run.checkpoint import RunState
from fastbyol.run.foreign_weights import load_run_or_weights

log = logging.getLogger("fastbyol")
PART_ROWS = 2048
"""Images of a part: what a kill can cost each rank. At 2,048 features of 4 bytes a part has 16 MiB."""
_PLAN, _LOCK, _DAMAGED = "plan.json", "lock", "damaged"
_NO_ROWS = np.empty(0, np.int64)
_BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def embed(
    checkpoint: str | Path,
    data: str | Path,
    *,
    out: str | Path,
    dtype: str = "float32",
    projection: bool = False,
    labels: str = "auto",
    changes: Mapping[str, Any] | None = None,
    batch: int = 256,
    workers: int = 0,
    process: Process | None = None,
    engine: str = "local",
    announce: Callable[[str], None] = log.info,
) -> FeatureFile:
    """Writes the features of every image of the data, centre-cropped and normalised as the encoder expects, and returns the file, opened.

    Original images that do not decode are logged and get no row, as long as they are no more than `damage_allowed`.

    Args:
        checkpoint: run folder, checkpoint file, or another program's weights, as for `load_encoder`.
        data: anything that a run can train from, labelled or not.
        out: file to write; its suffix chooses the format, see `feature_file`.
        dtype: of the features, 'float32' or 'float16'; the encoder runs in float32.
        projection: add the online projector's output, (N, projection_dim). Checkpoints of ours only.
        labels: of images that were not converted, as `DataConfig.labels`: auto, folders, none, or a file.
        changes: as for `load_encoder`.
        batch: images per forward.
        workers: decoding threads; 0: one for each core of the process's share.
        process: this rank and its device; None: one process, on the GPU if there is one. Every rank must call with the same arguments.
        engine: 'local', or 'ray': the encoder runs in processes of a cluster of Ray, see `ray_rows`, each with `workers` threads, and on GPUs
            if `process` is None and the cluster has some; this one process writes.
        announce: called by rank 0 with a line that says what was taken of another program's weights, and one when the work goes on.

    Raises:
        UserError: an input cannot be read, the output exists or cannot be written, or features are not finite.
    """
    data, labels = public_argument(str(data)), public_argument(labels)
    out = Path(out)
    check_output(out)
    require_choice("dtype", dtype, DTYPES)
    # Without a given process, Ray may use the cluster's GPUs even if this machine has none.
    device = process.device.type if process else "auto"
    process = process or Process(rank=0, world_size=1, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    require_choice("engine", engine, ENGINES)
    if engine == "ray":
        import_ray("ray.data")  # fails before a work folder is made
    announce = announce if process.is_main else log.debug
    run, networks = _networks(checkpoint, changes=changes, projection=projection, announce=announce)
    encoder = networks[0]
    with _images(data, run, labels=labels, batch=batch, workers=workers) as loader:
        projection_dim = run.config.model.projection_dim if projection else 0
        facts = _facts(
            run,
            encoder,
            loader,
            checkpoint=checkpoint,
            data=data,
            labels=labels,
            dtype=dtype,
            projection_dim=projection_dim,
            changes=changes or {},
        )
        work = _WorkFolder(out, facts, process=process)
        missing = broadcast_from_main(work.missing())
        if found := work.num_parts - len(missing):
            announce(f"{out}: goes on after {found:,} of {work.num_parts:,} parts of {PART_ROWS:,} images")
        try:
            # Deal out the missing parts anew, so that all ranks have equally much to do, whatever an earlier run left.
            mine = missing[process.rank :: process.world_size]
            # One pass over all parts, not one for each: the loader decodes ahead while the encoder works, across the parts' ends too.
            index = np.concatenate([np.arange(rows.start, rows.stop, dtype=np.int64) for rows in map(work.rows, mine)] or [_NO_ROWS])
            if engine == "ray":
                opened = partial(_open_on_node, facts, projection=projection, batch=batch)
                outputs = rows_on_ray(index, opened, block=PART_ROWS, workers=workers, device=device)
            else:
                outputs = _outputs(loader, index, networks, device=process.device)
            _write_parts(mine, outputs, work, is_main=process.is_main, dtype=dtype)
            gather_on_main(0)  # rank 0 waits here for the parts of the others
            if process.is_main:
                if missing := work.missing():
                    raise UserError(
                        f"--out {out}: {len(missing)} parts of other ranks are not in {work.path}; all ranks must write to one folder"
                    )
                kept, names = work.decoded(), loader.image_names()
                if damaged := np.flatnonzero(~kept).tolist():
                    some = names_text([names[index] for index in damaged], most=LOGGED)
                    what = f"{len(damaged):,} of {len(kept):,} images do not decode"
                    # Counted here over all ranks and starts, of which each counts its own.
                    if len(damaged) > (allowed := damage_allowed(len(kept))):
                        raise UserError(f"--data {data}: {what} ({some}), where {allowed:,} may; {TOO_MANY}")
                    announce(f"{what}, and have no row: {some}")
                write_features(
                    out,
                    map(work.read, range(work.num_parts)),
                    names=list(compress(names, kept)),
                    labels=loader.labels[kept],
                    facts=replace(facts, num_images=len(kept) - len(damaged), damaged=damaged),
                )
                work.remove()
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror or error}); make room and repeat the command") from error
        finally:
            work.close()
    broadcast_from_main(0)  # the file is there for every rank
    return FeatureFile(out)


def weights_digest(encoder: nn.Module) -> str:
    """Returns a digest of an encoder's tensors: equal for equal features."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _facts(
    run: RunState,
    encoder: nn.Module,
    loader: ImageLoader,
    *,
    checkpoint: str | Path,
    data: str | Path,
    labels: str,
    dtype: str,
    projection_dim: int,
    changes: Mapping[str, Any],
) -> Facts:
    views = run.config.views
    return Facts(
        checkpoint=os.path.abspath(checkpoint),
        step=run.step,
        weights=weights_digest(encoder),
        encoder=run.config.model.encoder,
        changes=json.loads(json.dumps(dict(changes))),
        data="::".join(each if is_url(each) else os.path.abspath(each) for each in separated(str(data))),  # several roots are one text
        labels=labels if labels in LABEL_MODES or is_url(labels) else os.path.abspath(labels),
        fingerprint=loader.fingerprint(),
        num_images=loader.num_samples,
        class_names=list(loader.class_names),
        size_px=views.size_px,
        interpolation=views.interpolation,
        antialias=views.antialias,
        mean=list(views.mean),
        std=list(views.std),
        crop=CROP,
        dtype=dtype,
        feature_dim=int(encoder.feature_dim),  # type: ignore[arg-type]
        projection_dim=projection_dim,
        version=__version__,
        damaged=[],
    )


def _networks(
    checkpoint: str | Path, *, changes: Mapping[str, Any] | None, projection: bool, announce: Callable[[str], None]
) -> tuple[RunState, list[nn.Module]]:
    """Returns the run, and its encoder, followed by its projector if that is wanted."""
    run = load_run_or_weights(checkpoint, changes=changes)
    encoder, projector = networks_of(run, announce=announce)
    if not projection:
        return run, [encoder]
    if projector is None:
        raise UserError(f"--projection: {checkpoint} holds an encoder without a projector; leave it out")
    return run, [encoder, projector]


def _images(data: str | Path, run: RunState, *, labels: str, batch: int, workers: int) -> ImageLoader:
    source = DataConfig(train=str(data), labels=labels)
    return build_image_loader(
        source,
        views=run.config.views,
        batch=batch,
        workers=workers,
        option="--data",
        label_option=CONVERTERS_OPTION,
        replace_damaged=True,
    )


def _open_on_node(facts: Facts, *, projection: bool, batch: int, workers: int, device: str) -> RowEncoder:
    """Opens checkpoint and images on a node of a cluster; returns the function that embeds rows there.

    Raises UserError if the node cannot open them, or if they differ from those of the process with the command.
    """
    try:
        run, networks = _networks(facts.checkpoint, changes=facts.changes, projection=projection, announce=log.debug)
        loader = _images(facts.data, run, labels=facts.labels, batch=batch, workers=workers)
        if weights_digest(networks[0]) != facts.weights:
            raise UserError(f"{facts.checkpoint}: has other weights here")
        if loader.fingerprint() != facts.fingerprint:
            raise UserError(f"{facts.data}: has other images here")
    except UserError as error:
        raise UserError(f"{error} (on node {platform.node()}; with --engine ray all nodes must share checkpoint and data)") from None

    def embedded(index: NDArray[np.int64]) -> list[Tensor]:
        return [torch.cat(columns) for columns in zip(*_outputs(loader, index, networks, device=torch.device(device)), strict=True)]

    return embedded


def _write_parts(mine: list[int], batches: Iterable[list[Tensor]], work: _WorkFolder, *, is_main: bool, dtype: str) -> None:
    """Writes this rank's parts, whose rows come in order in batches of any size."""
    ranges = [work.rows(part) for part in mine]
    held: list[list[Tensor]] = []
    with Progress("embedding", sum(map(len, ranges)), unit="images") if is_main else _Silent() as progress:
        pending = iter(zip(mine, ranges, strict=True))
        part, rows = next(pending, (0, range(0)))
        for outputs in batches:
            held.append(outputs)
            while sum(len(each[0]) for each in held) >= len(rows) > 0:
                joined = [torch.cat(columns) for columns in zip(*held, strict=True)]
                work.write(part, [_stored(block[: len(rows)], dtype) for block in joined])
                held = [[block[len(rows) :] for block in joined]]
                part, rows = next(pending, (0, range(0)))
            progress.advance(len(outputs[0]))


@torch.inference_mode()
def _outputs(loader: ImageLoader, index: NDArray[np.int64], networks: list[nn.Module], *, device: torch.device) -> Iterator[list[Tensor]]:
    """Yields each network's output for the images at these indices, float32 on the CPU; each network reads the output of the one before.

    Rows of images that do not decode are NaN. Raises UserError if another number is not finite.
    """
    for network in networks:
        network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    before: list[Tensor] = []
    replaced = torch.zeros(0, dtype=torch.bool)
    done = 0
    for batch in loader.batches_of(index):
        x, launched = batch.image.to(device=device, memory_format=torch.channels_last), []
        for network in networks:
            x = network(x)
            launched.append(x)
        # Copy only now: .cpu() waits for the device, which then has the next batch to work on.
        if before:
            yield [_on_cpu(output, replaced) for output in before]
        before = launched
        replaced = torch.from_numpy(batch.index.numpy() != index[done : done + len(batch.index)])
        done += len(batch.index)
    if before:
        yield [_on_cpu(output, replaced) for output in before]


def _on_cpu(output: Tensor, replaced: Tensor) -> Tensor:
    """Returns (N, D) features in float32 on the CPU, with NaN in the rows of images in whose place another one stood."""
    found = output.float().cpu()
    if not bool(torch.isfinite(found).all()):
        raise UserError("the encoder's features are not finite: its run diverged; take an earlier checkpoint")
    return found.masked_fill(replaced[:, None], torch.nan)


class _Silent:
    """A progress that shows nothing, for ranks other than 0."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def advance(self, more: int) -> None: ...


def _stored(block: Tensor, dtype: str) -> NDArray[Any]:
    """Returns the features as stored. Raises UserError if one is too large for the type."""
    with np.errstate(over="ignore"):
        stored = block.numpy().astype(dtype)
    if np.isinf(stored).any():
        raise UserError(f"features of up to {float(block.nan_to_num().abs().max()):g} do not fit float16; take --dtype float32")
    return stored


class _WorkFolder:
    """The hidden folder beside the output in which the parts lie. It is locked for one command; ranks of one command share it."""

    def __init__(self, out: Path, facts: Facts, *, process: Process) -> None:
        self.path, self._facts, self._lock = work_path(out), facts, -1
        self.num_parts = -(-facts.num_images // PART_ROWS)
        problem = self._open(out) if process.is_main else None
        # Every rank must hear of it, or the others would wait for rank 0.
        if problem := broadcast_from_main(problem):
            self.close()
            raise UserError(problem)

    def _open(self, out: Path) -> str | None:
        """Makes or continues the folder; returns what is wrong."""
        try:
            self._lock = locked_file(self.path / _LOCK)
            plan = self.path / _PLAN
            wanted = {"part_rows": PART_ROWS} | asdict(self._facts)
            if not plan.exists() or not any(self.path.glob("part-*.npz")):
                write_durably(plan, json.dumps(wanted))
                return None
            held = json.loads(plan.read_text(encoding="utf-8"))
        except BlockingIOError as error:
            return f"--out {out}: {error.strerror} is embedding to it; wait for it, or choose another file"
        except (OSError, ValueError) as error:
            if not self.path.exists():
                return f"--out {out}: nothing can be written into the folder {out.parent} ({first_line(error)}); choose another"
            return f"--out {out}: {self.path} cannot be used ({first_line(error)}); remove it or choose another file"
        # Where the checkpoint and the data lie does not matter, only what they hold.
        free = {"checkpoint", "data", "labels", "changes"}
        if not isinstance(held, dict):
            held = {}
        if differing := [name for name, value in wanted.items() if name not in free and held.get(name) != value]:
            return (
                f"--out {out}: {self.path} holds the parts of another embedding (it differs in {', '.join(differing[:5])}); remove that "
                "folder, or choose another file"
            )
        return None

    def rows(self, part: int) -> range:
        return range(part * PART_ROWS, min((part + 1) * PART_ROWS, self._facts.num_images))

    def missing(self) -> list[int]:
        """Returns the parts that are not on the disk."""
        return [part for part in range(self.num_parts) if not self._file(part).exists()]

    def write(self, part: int, blocks: list[NDArray[Any]]) -> None:
        """Writes a part so that it survives a kill or a power cut: features, projections if there are any, and which rows are NaN."""
        arrays = dict(zip(Rows._fields, blocks, strict=False)) | {_DAMAGED: np.isnan(blocks[0][:, 0])}
        with durable_file(self._file(part)) as file, zipfile.ZipFile(cast(IO[bytes], file), "w") as archive:
            for name, block in arrays.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, block, allow_pickle=False)

    def decoded(self) -> NDArray[np.bool_]:
        """Returns which images decode, (num_images,) bool. All parts must be there. Raises as `read` does."""
        return ~np.concatenate([self._arrays(part, {_DAMAGED: 0})[_DAMAGED] for part in range(self.num_parts)])

    def read(self, part: int) -> Rows:
        """Returns a part without the images that do not decode. Raises UserError, and removes the part, if it is damaged."""
        widths = {"feature": self._facts.feature_dim, "projection": self._facts.projection_dim}
        arrays = self._arrays(part, {name: width for name, width in widths.items() if width} | {_DAMAGED: 0})
        kept = ~arrays.pop(_DAMAGED)
        if not kept.all():
            arrays = {name: block[kept] for name, block in arrays.items()}
        return Rows(arrays["feature"], arrays.get("projection"))

    def _arrays(self, part: int, widths: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """Returns these arrays of a part, (rows, width) features, or (rows,) bool where the width is 0."""
        try:
            with np.load(self._file(part), allow_pickle=False) as file:
                arrays = {name: file[name] for name in widths}
            for name, width in widths.items():
                shape, dtype = ((len(self.rows(part)), width), self._facts.dtype) if width else ((len(self.rows(part)),), "bool")
                if arrays[name].shape != shape or arrays[name].dtype != dtype:
                    raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
        except _BROKEN as error:
            self._file(part).unlink(missing_ok=True)
            raise UserError(f"{self._file(part)}: was damaged and is removed ({first_line(error)}); repeat the command") from error
        return arrays

    def remove(self) -> None:
        shutil.rmtree(self.path)

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _file(self, part: int) -> Path:
        return self.path / f"part-{part:06d}.npz"
