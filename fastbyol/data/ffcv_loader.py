"""The FFCV backend: reads a .beton file and decodes with libffcv's TurboJPEG, without FFCV's Loader.

FFCV's Loader sets torch's thread count, returns buffers that it later overwrites, swallows the exceptions of its thread, ignores the decoder's
return code (a damaged image turns black), and compiles for seconds in each process. So only its C library is loaded, through ctypes, whose
calls release the interpreter lock; ffcv's Python package (2.7 s of import) is never imported.

Differs from FFCV: the accurate DCT instead of the fast one. It costs 4 % of the decoding time and returns the same pixels as Pillow and DALI;
the fast one is 0.8 of 255 levels darker on average.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastbyol.config.errors import UserError
from fastbyol.data.beton import JPEG_MODE, Beton, read_beton
from fastbyol.data.class_counts import numbered_class_names, refuse_other_counts
from fastbyol.data.jpeg_header import scans_complaint
from fastbyol.data.manifest import beton_manifest_path, read_manifest
from fastbyol.data.source import Indices, Pixels, RangeReader, Source, Storage, damaged, some_of

log = logging.getLogger("fastbyol")
# From turbojpeg.h. With LIMITSCANS, a progressive JPEG of more than 500 scans is a decoding error.
_TJPF_RGB, _TJPF_GRAY, _TJFLAG_ACCURATEDCT, _TJFLAG_LIMITSCANS, _TJERR_WARNING = 0, 6, 4096, 32768, 0
_MANY_PIXELS = 1 << 23
# The library reports an error as a warning if a warning came before it, so real warnings are recognised by their text (jerror.h).
_WARNINGS = ("Corrupt JPEG data", "Premature end of JPEG file", "Warning: ", "Inconsistent progression", "Unknown Adobe color transform")
_DECOMPRESS_TYPES = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p, *[ctypes.c_int] * 5]
_HEADER_TYPES = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong, *[ctypes.POINTER(ctypes.c_int)] * 4]


class TurboJpeg:
    """libffcv's TurboJPEG decoder, safe to use from several threads. Raises UserError if ffcv isn't installed."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("ffcv")
        folders = list(spec.submodule_search_locations or []) if spec else []
        libraries = [library for folder in folders for library in sorted(Path(folder).glob("_libffcv*.so"))]
        if not libraries:
            raise UserError(
                "data.backend = 'ffcv': ffcv is not installed; 'make install' builds it, or install g++, pkg-config, TurboJPEG's and OpenCV's headers "
                "(libturbojpeg0-dev, libopencv-dev) and pip install ffcv==1.0.2"
            )
        self._library = ctypes.CDLL(str(libraries[0]))
        self._library.tjInitDecompress.restype = ctypes.c_void_p
        self._library.tjDecompress2.argtypes = _DECOMPRESS_TYPES
        self._library.tjDecompressHeader3.argtypes = _HEADER_TYPES
        self._library.tjGetErrorCode.argtypes = self._library.tjGetErrorStr2.argtypes = self._library.tjDestroy.argtypes = [ctypes.c_void_p]
        self._library.tjGetErrorStr2.restype = ctypes.c_char_p

    def decode(self, jpeg: bytes, out: Pixels) -> tuple[str, bool]:
        """Decodes into `out`, (H, W, 3) RGB. Returns the decoder's message ('' if none) and True if it is fatal, as a size other than out's is."""
        height, width, _ = out.shape
        return self._decompress(jpeg, out, (height, width), (height, width), _TJPF_RGB, _TJFLAG_ACCURATEDCT)

    def check(self, jpeg: bytes, *, height: int, width: int) -> tuple[str, bool]:
        """Returns what `decode` would, in 0.7 of its time: reads every coefficient but renders an eighth of the size, in gray."""
        rows, columns = -(-height // 8), -(-width // 8)
        return self._decompress(jpeg, np.empty(rows * columns, dtype=np.uint8), (height, width), (rows, columns), _TJPF_GRAY, 0)

    def _decompress(
        self, jpeg: bytes, out: Pixels, size: tuple[int, int], rendered: tuple[int, int], pixel_format: int, flags: int
    ) -> tuple[str, bool]:
        """Decodes into `out`, as `decode` does. size: (height, width) that the JPEG must have; rendered: (height, width) to scale it to."""
        handle = self._library.tjInitDecompress()  # 2 us. A reused handle would decode a damaged JPEG with tables of the one before.
        try:
            # Check first: tjDecompress2 replaces a height or width of 0 by the JPEG's own, and scales a JPEG of another size.
            complaint = self._size_complaint(handle, jpeg, size)
            height, width = rendered
            flags |= _TJFLAG_LIMITSCANS
            if not complaint and size[0] * size[1] > _MANY_PIXELS:  # 500 scans of them take longer than 5 s
                complaint = scans_complaint(jpeg)
            if complaint:
                return complaint, True
            if not self._library.tjDecompress2(handle, jpeg, len(jpeg), out.ctypes.data, width, 0, height, pixel_format, flags):
                return "", False
            complaint = self._library.tjGetErrorStr2(handle).decode(errors="replace")
            return complaint, self._library.tjGetErrorCode(handle) != _TJERR_WARNING or not complaint.startswith(_WARNINGS)
        finally:
            self._library.tjDestroy(handle)

    def _size_complaint(self, handle: int, jpeg: bytes, size: tuple[int, int]) -> str:
        """Returns what is wrong with the size in the JPEG's header, as the decoder itself reads it (5 us), or ''."""
        width, height, subsampling, colorspace = (ctypes.c_int(0) for _ in range(4))
        self._library.tjDecompressHeader3(handle, jpeg, len(jpeg), width, height, subsampling, colorspace)
        if (height.value, width.value) == size and min(size) > 0:
            return ""
        if not height.value or not width.value:
            return self._library.tjGetErrorStr2(handle).decode(errors="replace")
        return f"it is {width.value}x{height.value} pixels, its table says {size[1]}x{size[0]}"


class FfcvSource(Source):
    """A .beton as a source, written by us or by stock FFCV, JPEG or raw; sample i is row i. Class names come from its manifest, if any."""

    def __init__(self, path: Path) -> None:
        self._decoder = TurboJpeg()
        self._beton = read_beton(path)
        super().__init__(labels=self._beton.label, class_names=_class_names(path, self._beton))
        self._file = RangeReader(path)
        self._scratch = threading.local()

    def sizes(self, indices: Indices) -> tuple[Indices, Indices]:
        return self._beton.height[indices], self._beton.width[indices]

    def decode(self, indices: Indices) -> Iterator[Pixels]:
        table = self._beton
        rows = (column[indices].tolist() for column in (table.offset, table.size, table.height, table.width, table.mode))
        for index, offset, size, height, width, mode in zip(indices.tolist(), *rows, strict=True):
            data = self._file.read(offset, size)
            if table.crc32 is not None:
                data = self.checked(index, data, int(table.crc32[index]))
            yield self._decode_jpeg(index, data, height, width) if mode == JPEG_MODE else self._raw_pixels(index, data, height, width)

    def storage(self) -> Storage:
        return Storage(np.zeros(self.num_samples, dtype=np.int64), self._beton.offset)

    def read_ahead(self, indices: Indices) -> None:
        ends = self._beton.offset[indices] + self._beton.size[indices]
        self._file.read_ahead(int(self._beton.offset[indices].min()), int(ends.max()))

    def identity(self) -> bytes:
        """Returns a digest of what distinguishes the images, bytes included: raw images have equal sizes and offsets whatever they show."""
        table = self._beton
        crc32 = table.crc32
        if crc32 is None:
            some = some_of(self.num_samples)
            crc32 = np.array([zlib.crc32(self._file.read(int(table.offset[index]), int(table.size[index]))) for index in some])
        return super().identity() + crc32.tobytes()

    def sample_name(self, index: int) -> str:
        return f"image {index} of {self._file.path}"

    def close(self) -> None:
        self._file.close()

    def _decode_jpeg(self, index: int, data: bytes, height: int, width: int) -> Pixels:
        image = self._thread_scratch(height * width * 3).reshape(height, width, 3)
        complaint, fatal = self._decoder.decode(data, image)
        # If a checksum shows that the bytes are unchanged, a warning is harmless: Pillow ignored it too when the image was converted
        # (stray bytes before a marker: ImageNet has some). Without checksums, treat it as damage.
        if complaint and (fatal or self._beton.crc32 is None):
            raise damaged(self.sample_name(index), complaint)
        return image

    def _raw_pixels(self, index: int, data: bytes, height: int, width: int) -> Pixels:
        if len(data) != height * width * 3:
            raise damaged(self.sample_name(index), f"{len(data)} bytes for {height}x{width} pixels")
        return np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3)

    def _thread_scratch(self, size: int) -> Pixels:
        """Returns this thread's own buffer, grown on demand: stock FFCV allocates max height x max width x batch, 70 GB on raw ImageNet."""
        buffer = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._scratch.buffer = np.empty(size, dtype=np.uint8)
        return buffer[:size]


def _class_names(path: Path, beton: Beton) -> tuple[str, ...]:
    """Returns the manifest's class names, or class numbers if there is no manifest."""
    labels, manifest_path = beton.label, beton_manifest_path(path)
    if not manifest_path.exists():
        if beton.crc32 is not None:  # it is a file of ours
            log.warning("%s: is missing, so classes have numbers for names and labels cannot be checked; copy it too", manifest_path)
        return numbered_class_names(path, labels)
    manifest = read_manifest(manifest_path)
    if manifest.shards[0].bytes != path.stat().st_size or manifest.num_samples != len(labels):
        raise UserError(
            f"{path}: is not the file that {manifest_path.name} describes; convert again, or delete the manifest if it is left over"
        )
    refuse_other_counts(path, labels, manifest)
    return manifest.class_names
