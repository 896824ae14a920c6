"""Builds loaders from a configuration. No other module depends on which backend (ffcv, dali, folder) reads the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fastbyol.augment.parameters import EVAL_SHARE
from fastbyol.config.errors import UserError, require_choice
from fastbyol.config.schema import BACKENDS, DataConfig, TrainConfig, accumulation_of
from fastbyol.config.urls import is_url
from fastbyol.config.views import ViewPair
from fastbyol.data.backends.source import Indices, Source
from fastbyol.data.backends.store_tables import StoreTables, cache_root
from fastbyol.data.fetch_ahead import FetchAhead
from fastbyol.data.formats.beton import MIN_PAGE_BYTES
from fastbyol.data.formats.fetched import is_converted_url
from fastbyol.data.formats.tar_shards import is_shard_folder
from fastbyol.data.inputs.sources import is_original
from fastbyol.data.loader import CropLoader, ImageLoader, Readahead, TwoViewLoader
from fastbyol.data.renderer import KernelRenderer, Renderer
from fastbyol.data.replacements import Replacements
from fastbyol.data.traversal import Traversal, group_into_blocks
from fastbyol.host.cores import default_workers, place_on_machine
from fastbyol.host.store_path import StorePath
from fastbyol.host.stores import store_of
from fastbyol.ranks.process_group import Process

_READS = {
    "ffcv": "a .beton file",
    "dali": "a folder of tar shards made by python -m fastbyol convert --to dali",
    "folder": "images that were not converted",
}


def build_loader(
    config: DataConfig,
    *,
    views: ViewPair,
    seed: int,
    global_batch: int,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    output: str = "float32",
    option: str = "data.train",
    nodes: int = 1,
    replace_damaged: bool = False,
) -> TwoViewLoader:
    """Returns the training loader for `config.train`, positioned at epoch 0, batch 0.

    Args:
        config: path, backend, threads, and the traversal: 'random' shuffles all images; 'local' shuffles blocks of 8 MiB (a .beton's pages), then the
            images within windows of many blocks, for data larger than memory on disks or network file systems that are slow at random reads.
            Both visit every image once per epoch, and neither order depends on the number of ranks. 'sharded': as local, but each node owns a
            part of the blocks for an epoch and mixes within it, so that all nodes together read each byte once.
        views: augmentation of both views.
        seed: seed of the sample order and of the augmentations.
        global_batch: images per optimizer step over all ranks; divisible by world_size * accumulate.
        accumulate: micro-batches per optimizer step; each is one `ViewBatch`.
        rank: rank of this process, in [0, world_size).
        world_size: number of processes that share the batch.
        device: device of the training step; None means the CPU. Views that DALI makes on a GPU stay there.
        output: 'float32' views or 'uint8' crops, see `KernelRenderer`; ignored if DALI does the cropping.
        option: name of the option behind `config.train`, for error messages, which name the option for labels that goes with it.
        nodes: number of nodes for 'sharded', with equally many ranks each, numbered node by node.
        replace_damaged: another image takes the place of an original that does not decode, see `Replacements`; else that is an error.

    Raises:
        UserError: the data does not exist or is not what the backend reads, the backend isn't installed, or the batch does not divide evenly.
    """
    source = _open_source(config, option=option)
    try:
        blocks = None
        if config.traversal != "random":
            blocks = group_into_blocks(*source.storage(), block_bytes=MIN_PAGE_BYTES, window_bytes=config.window_mib << 20)
        walk = Traversal(
            source.num_samples,
            seed,
            global_batch,
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
            blocks=blocks,
            nodes=nodes if config.traversal == "sharded" else 1,
        )
        if source.cache is not None:
            source.cache.require_room(window=blocks.window if blocks else 0)
        renderer = _renderer(
            source,
            config,
            views,
            batch=walk.rank_batch,
            output=output,
            device=device or torch.device("cpu"),
            replacements=_replacements(source) if replace_damaged else None,
        )
        readahead = _read_ahead(source, walk, prefetch=config.prefetch)
        return TwoViewLoader(renderer, views=views, traversal=walk, readahead=readahead)
    except BaseException:
        source.close()
        raise


def _read_ahead(source: Source, walk: Traversal, *, prefetch: int) -> Readahead | FetchAhead | None:
    """Returns what reads samples before they are needed: data in a store for any traversal, data on a disk for a local one; else None."""
    reader, num_readers = place_on_machine()
    if source.cache is not None:
        # Still in work behind the planned batch: the prefetched ones, and a step that another rank has not finished yet.
        return FetchAhead(source.cache, walk, lag=prefetch + 2 + walk.accumulate, reader=reader, num_readers=num_readers)
    return Readahead(source, walk, reader=reader, num_readers=num_readers) if walk.blocks else None


def nodes_of(process: Process) -> int:
    """Returns the number of nodes. Raises UserError unless each has as many ranks as this one, numbered node by node."""
    local_rank, on_node = place_on_machine()
    if process.world_size % on_node or process.rank % on_node != local_rank:
        raise UserError(
            f"data.traversal = 'sharded': rank {process.rank} of {process.world_size} is number {local_rank} of {on_node} on its node; it needs the "
            "same number of ranks on each node, numbered node by node, as torchrun and srun do; start them so, or take local"
        )
    return process.world_size // on_node


def build_run_loader(config: TrainConfig, process: Process, *, option: str = "data.train") -> TwoViewLoader:
    """Returns this rank's training loader with the settings of the run's config, as `build_loader` does."""
    return build_loader(
        config.data,
        views=config.views,
        seed=config.seed,
        global_batch=config.global_batch,
        accumulate=accumulation_of(config, world_size=process.world_size),
        rank=process.rank,
        world_size=process.world_size,
        device=process.device,
        # Crops are copied to a GPU as bytes, a quarter of the size of floats, and augmented there.
        output="uint8" if process.device.type == "cuda" else "float32",
        option=option,
        nodes=nodes_of(process) if config.data.traversal == "sharded" else 1,
        replace_damaged=True,
    )


def _replacements(source: Source) -> Replacements | None:
    return Replacements(source.num_samples) if source.is_original else None


def _renderer(
    source: Source,
    config: DataConfig,
    views: ViewPair,
    *,
    batch: int,
    output: str,
    device: torch.device,
    replacements: Replacements | None,
) -> Renderer:
    """Returns the renderer that turns the source's images into views: our CPU kernel, or DALI."""
    workers = config.workers or default_workers()
    if config.dali_ops != "decode":
        from fastbyol.data.backends.dali_source import DaliSource

        if isinstance(source, DaliSource):
            if config.dali_ops != "auto" or device.type == "cuda":
                from fastbyol.data.dali_renderer import DaliRenderer

                return DaliRenderer(source, views, batch=batch, workers=workers, prefetch=config.prefetch, device=device)
        elif config.dali_ops != "auto":
            raise UserError(f"data.dali_ops = {config.dali_ops!r}: {config.train} is not read by the dali backend; leave it at auto")
    return KernelRenderer(source, views, output=output, workers=workers, prefetch=config.prefetch, replacements=replacements)


def build_image_loader(
    data: str | Path | DataConfig,
    *,
    views: ViewPair,
    batch: int,
    backend: str = "auto",
    workers: int = 0,
    crop_share: float = EVAL_SHARE,
    option: str = "data",
    label_option: str = "",
    replace_damaged: bool = False,
) -> ImageLoader:
    """Returns a loader for evaluation: every image once, centre-cropped.

    data: anything that `DataConfig.train` may be; or a `DataConfig`, which also says where the labels are. crop_share: side of the centred
    crop over the image's short side; 1: as much as a square can hold. label_option: how the typed command gives labels, for messages, if that
    does not follow from `option`. replace_damaged: as for `build_loader`.

    Raises UserError in the same cases as `build_loader`; its message names `option`.
    """
    config = data if isinstance(data, DataConfig) else DataConfig(train=str(data), backend=backend)
    source = _open_source(config, option=option, label_option=label_option)
    try:
        replacements = _replacements(source) if replace_damaged else None
        return ImageLoader(
            source, views=views, batch=batch, workers=workers or default_workers(), crop_share=crop_share, replacements=replacements
        )
    except BaseException:
        source.close()
        raise


def build_crop_loader(
    data: str | Path | DataConfig,
    *,
    views: ViewPair,
    seed: int,
    global_batch: int,
    rows: Indices | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    workers: int = 0,
    option: str = "--data",
) -> CropLoader:
    """Returns a loader for training with labels on view 1 of the chosen images (rows, by index; None: all), as `build_loader` does for
    two views. A batch larger than the images is refused.
    """
    config = data if isinstance(data, DataConfig) else DataConfig(train=str(data))
    source = _open_source(config, option=option)
    try:
        rows = np.arange(source.num_samples) if rows is None else np.asarray(rows, dtype=np.int64)
        walk = Traversal(len(rows), seed, global_batch, rank=rank, world_size=world_size)
        output = "uint8" if device is not None and device.type == "cuda" else "float32"
        return CropLoader(source, views=views, rows=rows, traversal=walk, output=output, workers=workers or default_workers())
    except BaseException:
        source.close()
        raise


def _open_source(config: DataConfig, *, option: str, label_option: str = "") -> Source:
    """Opens the data with its backend. Each backend is imported only where it is used: a missing optional one must not break the others."""
    location = config.train
    if not location:
        raise UserError(f"{option} is not given; give a .beton file, a folder of tar shards, or images: a folder, tars, or a list of them")
    backend = config.backend
    require_choice("data.backend", backend, BACKENDS)
    fitting = backend_of(location, option=option)
    if backend not in ("auto", fitting):
        raise UserError(
            f"data.backend = {backend!r}: {location} is {_READS[fitting]}, this backend reads {_READS[backend]}; use auto or {fitting}"
        )
    if fitting == "folder":
        from fastbyol.data.backends.folder_source import FolderSource
        from fastbyol.data.inputs.images import NO_OPTION, PYTHON_OPTION, TRAINING_OPTION, list_images

        usual = {"data.train": TRAINING_OPTION, "data.val": TRAINING_OPTION, "data": PYTHON_OPTION}
        return FolderSource(
            list_images(
                location,
                labels=config.labels,
                path_column=config.path_column or None,
                label_column=config.label_column or None,
                option=option,
                label_option=label_option or usual.get(option, NO_OPTION),
            )
        )
    for name, unset in (("labels", "auto"), ("path_column", ""), ("label_column", "")):
        if (value := getattr(config, name)) != unset:
            raise UserError(f"data.{name} = {value!r}: {location} is converted and has its labels; leave it out")
    store = None
    if is_url(location):
        store = StoreTables(location, root=cache_root(config.cache), limit_bytes=int(config.cache_gib * 2**30), option=option)
    if fitting == "ffcv":
        from fastbyol.data.backends.ffcv_source import FfcvSource as ConvertedSource
    else:
        from fastbyol.data.backends.dali_source import DaliSource as ConvertedSource
    return store.opened(lambda path: ConvertedSource(path, store=store)) if store else ConvertedSource(Path(location))


def backend_of(path: str | Path, *, option: str) -> str:
    """Returns the name of the backend that reads this path or URL. Raises UserError, naming the option, if the path does not exist or
    the URL cannot be read here.
    """
    if is_original(str(path)):
        return "folder"
    if is_url(path):
        place = StorePath.of(str(path))
        store_of(place.url, option=option)  # an unknown scheme or a missing package is a mistake in the option
        return "folder" if not is_converted_url(place) else "ffcv" if place.suffix == ".beton" else "dali"
    path = Path(path)
    if not path.exists():
        raise UserError(f"{option} = {path}: no such file or folder")
    if path.is_file():
        return "ffcv"
    return "dali" if is_shard_folder(path) else "folder"
