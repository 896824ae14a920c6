"""One validation step for both formats: every image is really decoded, then its own JPEG bytes pass through or it is transcoded.

Runs in worker processes, so this module imports nothing heavy.
"""

from __future__ import annotations

import io
import os
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.data.source import PILLOW_ERRORS

TRANSCODE_QUALITY = 95
MAX_SIDE_PX = 65_500
"""libjpeg's limit (and the .beton's, at 65,535)."""
CHUNK = 16
_CHUNKS_AHEAD = 4  # per worker: keeps all busy while the writer waits for the oldest, and memory bounded


@dataclass(frozen=True)
class EncodedImage:
    """A JPEG that every backend decodes, with its size in pixels."""

    jpeg: bytes
    height: int
    width: int
    transcoded: bool
    crc32: int
    """Of the JPEG's bytes."""


def encode_image(path: Path) -> EncodedImage:
    """The file's own bytes if it is a JPEG of 1 or 3 components, else the image as RGB JPEG of quality 95. UserError if it does not decode.

    EXIF orientation is left alone: no loader of ours applies it, and neither does the paper's code.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if max(image.size) > MAX_SIDE_PX:
                raise UserError(f"{path}: {image.width}x{image.height} pixels; a JPEG side ends at {MAX_SIDE_PX}. Make it smaller")
            # MPO: a JPEG with further pictures behind the first, which decoders pass over.
            passes = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")
            jpeg = data if passes else _as_jpeg(image)
            return EncodedImage(jpeg, image.height, image.width, transcoded=not passes, crc32=zlib.crc32(jpeg))
    except UserError:
        raise
    except PILLOW_ERRORS as error:
        raise UserError(f"{path}: is no image that decodes ({error}); replace or remove it, and convert again") from error


def _as_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=TRANSCODE_QUALITY)
    return buffer.getvalue()


def encode_in_order(paths: Sequence[Path], *, workers: int) -> Iterator[EncodedImage]:
    """Encodes all paths in worker processes and yields them in order. UserError when an image fails or a worker dies: never a hang."""
    # A fork of a process with threads (torch, DALI) may deadlock; the fork server is a fresh process without any.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, mp_context=context)
    chunks = (paths[first : first + CHUNK] for first in range(0, len(paths), CHUNK))
    ahead: deque[Future[list[EncodedImage]]] = deque()
    try:
        while True:
            ahead.extend(pool.submit(_encode_chunk, chunk) for chunk in islice(chunks, workers * _CHUNKS_AHEAD - len(ahead)))
            if not ahead:
                return
            yield from ahead.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process of the conversion died (out of memory, or killed); run again, with fewer --workers if need be"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode_chunk(paths: Sequence[Path]) -> list[EncodedImage]:
    return [encode_image(path) for path in paths]


def default_processes() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
