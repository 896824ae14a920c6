"""Conversion to tar shards on a cluster of Ray: each part is a task, and the merge is the last task. The result is byte for byte
that of the same parts from one machine. Ray decides where a task runs, and runs it again if its node is lost; a part that runs again
continues from its last saved point.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fastbyol.config.arguments import through_links
from fastbyol.config.errors import UserError, require_at_least
from fastbyol.data.conversion.tar_parts import merge_tar_parts, write_tar_part
from fastbyol.data.conversion.tar_writer import tar_settings
from fastbyol.data.conversion.task import ConversionOptions, Images, as_listing
from fastbyol.data.conversion.work_folder import disk_errors
from fastbyol.data.formats.manifest import TAR_MANIFEST, Manifest, read_manifest
from fastbyol.data.formats.tar_shards import PARTS
from fastbyol.data.inputs.listing import ImageListing
from fastbyol.host.progress import Progress
from fastbyol.host.signals import Stopped, deferred_stop
from fastbyol.ranks.parts import Part
from fastbyol.ranks.ray_cluster import on_this_node, ray_cluster, warn_if_none_fits

DEFAULT_PARTS = 64
"""Does not depend on the cores: the number is in the shards' names, by which a command that continues on another cluster finds its parts."""
PATIENCE_S = 120.0
"""Longest wait for a part's lock: a process on a node that Ray has given up may run on for a moment and holds the lock until it ends."""


def write_tar_shards_on_ray(
    data: Images,
    *,
    out: Path,
    parts: int = DEFAULT_PARTS,
    workers: int = 0,
    shard_mib: int = 256,
    seed: int = 0,
    options: ConversionOptions | None = None,
) -> Manifest:
    """Converts images to a folder `out` of tar shards by `parts` tasks and a merge on a cluster of Ray; returns the manifest.

    Args:
        data: a folder, tar or listing, on storage that all nodes share.
        out: folder to make or to continue, likewise.
        parts: number of tasks; the shards' names and boundaries depend on it, and on nothing else about the cluster.
        workers: processes of each task, and the CPUs that Ray keeps for it; 0 means 1.
        shard_mib, seed, options: as for `tar_writer.write_tar_shards`.

    Raises:
        UserError: as `tar_parts.write_tar_part` and `merge_tar_parts`, or a node does not see the images or `out`.
        Lost: a part's node was lost more often than Ray tries it (RAY_TASK_MAX_RETRIES). The same call continues.
        Stopped: Ctrl-C or SIGTERM; the same call continues.
    """
    options, out, cpus = options or ConversionOptions(), through_links(out).absolute(), workers or 1
    require_at_least("parts", parts, 1)
    require_at_least("workers", workers, 0)
    tar_settings(options, shard_mib=shard_mib, seed=seed)
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder to write {out.name} in; make it first")
    merged = (out / TAR_MANIFEST).exists()
    if merged and not any(out.glob(PARTS)):
        raise UserError(f"{out}: holds a complete data set already; give another --out, or remove it first")
    with deferred_stop(), ray_cluster() as ray, disk_errors(out), _mark(out) as mark, Progress(out.name, parts, unit="parts") as progress:
        done = []
        if not merged:  # otherwise only the last step of an earlier merge is missing
            warn_if_none_fits(ray, cpus=cpus)
            listing = ray.put(as_listing(data).with_absolute_paths())
            convert = ray.remote(_convert_part).options(num_cpus=cpus)
            options = replace(options, patience_s=PATIENCE_S)
            done = [
                convert.remote(
                    listing, out=out, mark=mark, part=Part(number, parts), workers=cpus, shard_mib=shard_mib, seed=seed, options=options
                )
                for number in range(parts)
            ]
        last = ray.remote(_merge).options(num_cpus=1).remote(out, options, *done)
        waiting = done
        while waiting:
            finished, waiting = ray.wait(waiting)
            ray.get(finished)  # raises a part's error at once, before the other parts are done
            progress.advance(len(finished))
        return ray.get(last)


@contextmanager
def _mark(out: Path) -> Iterator[Path]:
    """Makes `out` and yields a new file in it, by which a node can tell whether its folder of that name is the same folder."""
    out.mkdir(exist_ok=True)
    mark = out / f".seen-by-{uuid.uuid4().hex}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def _convert_part(
    listing: ImageListing, *, out: Path, mark: Path, part: Part, workers: int, shard_mib: int, seed: int, options: ConversionOptions
) -> None:
    """Converts a part on the node that runs this."""
    try:
        for path, seen in ((out, mark), (listing.root, listing.path(0))):
            if not seen.exists():
                raise UserError(f"{path}: is not there, or is another; with --engine ray it must lie on storage that all nodes share")
        write_tar_part(listing, out=out, part=part, workers=workers, shard_mib=shard_mib, seed=seed, options=options)
    except UserError as error:
        raise on_this_node(error) from None
    except Stopped as stopped:
        # SIGTERM: the node is being taken away. A process that ends is a lost worker to Ray, which runs the part elsewhere.
        os._exit(stopped.exit_code)


def _merge(out: Path, options: ConversionOptions, *_: None) -> Manifest:
    """Merges the parts. Ray runs this once more if its node is lost, perhaps after the last step."""
    if (out / TAR_MANIFEST).exists() and not any(out.glob(PARTS)):
        return read_manifest(out / TAR_MANIFEST)
    try:
        return merge_tar_parts(out, options=options)
    except Stopped as stopped:
        os._exit(stopped.exit_code)
