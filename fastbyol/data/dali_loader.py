"""The DALI backend: tar shards, decoded by DALI, without DALI's reader.

Our sample table says where each image lies, so order, resume and ranks are the same pure functions as for the other backends: DALI's own
reader shuffles only within a buffer and needs its state saved. DALI's colour operations are not used: its hue and saturation are not the
paper's.
"""

from __future__ import annotations

import importlib.util
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastbyol.config.errors import UserError
from fastbyol.data.jpeg_header import jpeg_complaint
from fastbyol.data.source import Indices, Pixels, RangeReader, Source, Storage, damaged
from fastbyol.data.tar_shards import read_tar_shards

BATCH = 16
"""Most images per run of a pipeline."""


class DaliSource(Source):
    """Sample i is the i-th image kept of the listing that was converted. Each thread has a DALI pipeline of its own, on the CPU."""

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
            raise UserError("data.backend = 'dali': DALI is not installed; pip install 'fastbyol[dali]' (or nvidia-dali-cuda130)")
        manifest, self._table = read_tar_shards(folder)
        super().__init__(labels=self._table["label"].astype(np.int64), class_names=manifest.class_names)
        # The members of the tars are named by their number in the listing.
        self._listed = np.delete(np.arange(self.num_samples + len(manifest.dropped)), manifest.dropped)
        _allow_open_files(len(manifest.shards))
        self._files = [RangeReader(folder / shard.name) for shard in manifest.shards]
        self._local = threading.local()

    def sizes(self, indices: Indices) -> tuple[Indices, Indices]:
        rows = self._table[indices]
        return rows["height"].astype(np.int64), rows["width"].astype(np.int64)

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
                    raise damaged(
                        self.sample_name(index), f"it decodes to {image.shape[1]}x{image.shape[0]} pixels, its table says {width}x{height}"
                    )
                yield image

    def storage(self) -> Storage:
        return Storage(self._table["shard"].astype(np.int64), self._table["offset"].astype(np.int64))

    def read_ahead(self, indices: Indices) -> None:
        rows = self._table[indices]
        self._files[rows["shard"][0]].read_ahead(int(rows["offset"].min()), int((rows["offset"] + rows["size"]).max()))

    def identity(self) -> bytes:
        return self._table.tobytes()

    def sample_name(self, index: int) -> str:
        return f"image {index} ({self._listed[index]:08d}.jpg of {self._files[self._table['shard'][index]].path})"

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._local = threading.local()

    def jpeg(self, index: int) -> Pixels:
        """Returns the bytes of an image, of the size that the table says. Raises UserError for others, before any decoder sees them."""
        row = self._table[index]
        data = self._files[row["shard"]].read(int(row["offset"]), int(row["size"]))
        data = self.checked(index, data, int(row["crc32"]))
        if complaint := jpeg_complaint(data, height=int(row["height"]), width=int(row["width"])):
            raise damaged(self.sample_name(index), complaint)
        return np.frombuffer(data, dtype=np.uint8)

    def _run(self, jpegs: list[Pixels]) -> list[Pixels]:
        pipeline = getattr(self._local, "pipeline", None)
        if pipeline is None:
            pipeline = self._local.pipeline = _decoding_pipeline()
        try:
            pipeline.feed_input("jpeg", jpegs)
            (images,) = pipeline.run()
        except RuntimeError:
            self._local.pipeline = None  # DALI: 'current pipeline object is no longer valid'
            raise
        return [np.asarray(image) for image in images]

    def _decode_one_by_one(self, indices: Indices, jpegs: list[Pixels], first_error: RuntimeError) -> list[Pixels]:
        """After a failed run: finds the damaged image, which DALI does not name."""
        images = []
        for index, jpeg in zip(indices.tolist(), jpegs, strict=True):
            try:
                images += [np.array(image) for image in self._run([jpeg])]
            except RuntimeError as error:
                raise damaged(self.sample_name(index), dali_reason(error)) from first_error
        return images


def _decoding_pipeline() -> Any:
    """Returns a pipeline of one JPEG decoder, run synchronously by the thread that owns it."""
    from nvidia.dali import Pipeline

    options: dict[str, Any] = {"device_id": None, "exec_async": False, "exec_pipelined": False}  # DALI's stubs do not know None (no GPU)
    pipeline = Pipeline(batch_size=BATCH, num_threads=1, prefetch_queue_depth=1, **options)
    with pipeline:
        pipeline.set_outputs(decoded_jpeg(on_gpu=False))
    pipeline.build()
    return pipeline


def decoded_jpeg(*, on_gpu: bool) -> Any:
    """Returns a graph's images, decoded from what is fed as 'jpeg', with the settings that come closest to Pillow's."""
    from nvidia.dali import fn, types

    names: Any = types  # DALI's stubs lack the names that its C++ part adds
    jpeg = fn.external_source(name="jpeg", dtype=names.UINT8, ndim=1)
    where = "mixed" if on_gpu else "cpu"
    return fn.decoders.image(jpeg, device=where, output_type=names.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True)


def dali_reason(error: RuntimeError) -> str:
    """DALI's message is pages long; its first line with an error says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "DALI gave no reason")[:200]


def _allow_open_files(shards: int) -> None:
    """Raises the soft limit of open files where the shards of a large set would pass it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = shards + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
