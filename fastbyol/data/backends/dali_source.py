"""The DALI backend: reads tar shards and decodes with DALI, without DALI's reader.

Our sample table has the location of each image, so order, resume and ranks are the same pure functions as for the other backends; DALI's own
reader shuffles only within a buffer and needs its state saved. DALI's colour operations are not used, because its hue and saturation are not
the paper's.
"""

from __future__ import annotations

import importlib.util
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.backends.block_cache import CachedFile
from fastbyol.data.backends.source import Indices, Pixels, RangeReader, Source
from fastbyol.data.backends.store_tables import StoreTables
from fastbyol.data.formats.jpeg_header import jpeg_complaint
from fastbyol.data.formats.tar_shards import SAMPLE, listed_position, read_tar_shards, read_tar_tables
from fastbyol.host.shared_columns import row_pieces

BATCH = 16
"""Largest number of images per run of a DALI pipeline."""


class DaliSource(Source):
    """A folder of tar shards as a source; sample i is the i-th kept image of the converted listing. Each thread has its own CPU pipeline."""

    def __init__(self, folder: Path, *, store: StoreTables | None = None) -> None:
        """store: the store that has the shards, if `folder` holds their manifest and sample table only."""
        if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
            raise UserError("data.backend = 'dali': DALI is not installed; pip install 'fastbyol[dali]' (or nvidia-dali-cuda130)")
        manifest, self._table = read_tar_shards(folder) if store is None else read_tar_tables(folder)
        super().__init__(labels=self._table["label"], class_names=manifest.class_names)
        # The members of the tars are named by their number in the listing.
        self._dropped = np.array(manifest.dropped, dtype=np.int64)
        names = [shard.name for shard in manifest.shards]
        self._files: Sequence[RangeReader | CachedFile]
        if store is None:
            self._files = _opened(folder, names)
        else:
            file, offset, size, crc32 = (self._table[name] for name in ("shard", "offset", "size", "crc32"))
            self.cache = store.cache(names, file=file, offset=offset, size=size, crc32=crc32)
            self._files = self.cache.open_files()
        self._local = threading.local()

    def sizes(self, indices: Indices) -> tuple[Indices, Indices]:
        height, width = (self._table[name][indices].astype(np.int64) for name in ("height", "width"))
        return height, width

    def decode(self, indices: Indices) -> Iterator[Pixels]:
        for first in range(0, len(indices), BATCH):
            batch = indices[first : first + BATCH]
            jpegs = [self.jpeg(index) for index in batch]
            try:
                images = self._run(jpegs)
            except RuntimeError as error:
                images = self._decode_one_by_one(batch, jpegs, error)
            for index, image, height, width in zip(batch.tolist(), images, *self.sizes(batch), strict=True):
                if image.shape != (height, width, 3):
                    found = f"{image.shape[1]}x{image.shape[0]}"
                    raise self.damaged(index, f"it decodes to {found} pixels, its table says {width}x{height}")
                yield image

    def storage(self) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        return self._table["shard"], self._table["offset"]

    def read_ahead(self, indices: Indices) -> None:
        shard, offset, size = (self._table[name][indices] for name in ("shard", "offset", "size"))
        self._files[shard[0]].read_ahead(int(offset.min()), int((offset + size).max()))

    def identity(self) -> Iterator[bytes]:
        """Yields the bytes of the sample table, as its file has them."""
        for piece in row_pieces(self.num_samples):
            rows = np.empty(piece.stop - piece.start, dtype=SAMPLE)
            for name, column in self._table.items():
                rows[name] = column[piece]
            yield rows.tobytes()

    def sample_name(self, index: int) -> str:
        return f"image {index} ({self.image_name(index)}.jpg of {self._files[self._table['shard'][index]].path})"

    def image_name(self, index: int) -> str:
        return f"{listed_position(index, self._dropped):08d}"

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._local = threading.local()

    def jpeg(self, index: int) -> Pixels:
        """Returns an image's bytes. Raises UserError, before any decoder runs, if checksum or size differ from the table or it has too many scans."""
        row = {name: int(column[index]) for name, column in self._table.items()}
        data = self.read_checked(index, self._files[row["shard"]], row["offset"], row["size"], crc32=row["crc32"])
        if complaint := jpeg_complaint(data, height=row["height"], width=row["width"]):
            raise self.damaged(index, complaint)
        return np.frombuffer(data, dtype=np.uint8)

    def _run(self, jpegs: list[Pixels]) -> list[Pixels]:
        pipeline = getattr(self._local, "pipeline", None)
        if pipeline is None:
            # Run synchronously by the thread that owns it.
            options = {"device_id": None, "exec_async": False, "exec_pipelined": False}
            pipeline = built_pipeline(lambda: [decoded_jpeg(on_gpu=False)], batch_size=BATCH, num_threads=1, **options)
            self._local.pipeline = pipeline
        try:
            pipeline.feed_input("jpeg", jpegs)
            (images,) = pipeline.run()
        except RuntimeError:
            self._local.pipeline = None  # DALI: 'current pipeline object is no longer valid'
            raise
        return [np.asarray(image) for image in images]

    def _decode_one_by_one(self, indices: Indices, jpegs: list[Pixels], first_error: RuntimeError) -> list[Pixels]:
        """Decodes a failed batch image by image. Raises UserError for the damaged one, which DALI's error does not name."""
        images = []
        for index, jpeg in zip(indices.tolist(), jpegs, strict=True):
            try:
                # A copy: the next run of the pipeline reuses the memory.
                images += [np.array(image) for image in self._run([jpeg])]
            except RuntimeError as error:
                raise self.damaged(index, dali_reason(error)) from first_error
        return images


def _opened(folder: Path, names: list[str]) -> list[RangeReader]:
    """Returns readers of the files, which all stay open."""
    # Raise the soft limit on open files if there are more than it allows.
    wanted, (soft, hard) = len(names) + 512, resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    return [RangeReader(folder / name) for name in names]


def built_pipeline(graph: Callable[[], list[Any]], **options: Any) -> Any:
    """Builds the DALI pipeline whose graph `graph` defines and whose outputs it returns. options: those of Pipeline; device_id None: no GPU."""
    from nvidia.dali import Pipeline

    pipeline = Pipeline(prefetch_queue_depth=1, **options)
    with pipeline:
        pipeline.set_outputs(*graph())
    pipeline.build()
    return pipeline


def decoded_jpeg(*, on_gpu: bool) -> Any:
    """Returns the graph's decoded images of its input 'jpeg', with the settings that come closest to Pillow's."""
    from nvidia.dali import fn, types

    names: Any = types  # DALI's stubs lack the names that its C++ part adds
    jpeg = fn.external_source(name="jpeg", dtype=names.UINT8, ndim=1)
    where = "mixed" if on_gpu else "cpu"
    return fn.decoders.image(jpeg, device=where, output_type=names.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True)


def dali_reason(error: RuntimeError) -> str:
    """Returns the line of DALI's message that says what is wrong, the first with 'error': the whole message is pages long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "DALI gave no reason")[:200]
