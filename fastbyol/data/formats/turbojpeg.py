"""libffcv's TurboJPEG decoder, loaded through ctypes, whose calls release the interpreter lock.

ffcv's Python package (2.7 s of import) is never imported. Differs from FFCV: the accurate DCT instead of the fast one. It costs 4 % of the
decoding time and returns the same pixels as Pillow and DALI; the fast one is 0.8 of 255 levels darker on average.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.formats.jpeg_header import read_jpeg_header, scans_complaint

# From turbojpeg.h. With LIMITSCANS, a progressive JPEG of more than 500 scans is a decoding error.
_TJPF_RGB, _TJPF_GRAY, _TJFLAG_ACCURATEDCT, _TJFLAG_LIMITSCANS, _TJERR_WARNING = 0, 6, 4096, 32768, 0
_MANY_PIXELS = 1 << 23
# The library reports an error as a warning if a warning came before it, so real warnings are recognised by their text (jerror.h).
_WARNINGS = ("Corrupt JPEG data", "Premature end of JPEG file", "Warning: ", "Inconsistent progression", "Unknown Adobe color transform")


class TurboJpeg:
    """libffcv's TurboJPEG decoder, safe to use from several threads. Raises UserError if ffcv isn't installed."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("ffcv")
        folders = list(spec.submodule_search_locations or []) if spec else []
        libraries = [library for folder in folders for library in sorted(Path(folder).glob("_libffcv*.so"))]
        if not libraries:
            raise UserError(
                "data.backend = 'ffcv': ffcv is not installed; install g++, pkg-config, TurboJPEG's and OpenCV's headers (libturbojpeg0-dev, "
                "libopencv-dev) and pip install 'fastbyol[ffcv]' (in a checkout: make install), or train from the images or tar shards"
            )
        self._library = ctypes.CDLL(str(libraries[0]))
        self._library.tjInitDecompress.restype = ctypes.c_void_p
        jpeg = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong]
        self._library.tjDecompress2.argtypes = [*jpeg, ctypes.c_void_p, *[ctypes.c_int] * 5]
        self._library.tjDecompressHeader3.argtypes = [*jpeg, *[ctypes.POINTER(ctypes.c_int)] * 4]
        self._library.tjGetErrorCode.argtypes = self._library.tjGetErrorStr2.argtypes = self._library.tjDestroy.argtypes = [ctypes.c_void_p]
        self._library.tjGetErrorStr2.restype = ctypes.c_char_p

    def decode(self, jpeg: bytes, out: NDArray[np.uint8]) -> tuple[str, bool]:
        """Decodes into `out`, (H, W, 3) RGB. Returns the decoder's message ('' if none) and True if it is fatal, as a size other than out's is."""
        height, width, _ = out.shape
        return self._decompress(jpeg, out, (height, width), (height, width), _TJPF_RGB, _TJFLAG_ACCURATEDCT)

    def check(self, jpeg: bytes, *, height: int, width: int) -> tuple[str, bool]:
        """Returns what `decode` would, in 0.7 of its time: reads every coefficient but renders an eighth of the size, in gray."""
        rows, columns = -(-height // 8), -(-width // 8)
        return self._decompress(jpeg, np.empty(rows * columns, dtype=np.uint8), (height, width), (rows, columns), _TJPF_GRAY, 0)

    def _decompress(
        self, jpeg: bytes, out: NDArray[np.uint8], size: tuple[int, int], rendered: tuple[int, int], pixel_format: int, flags: int
    ) -> tuple[str, bool]:
        """Decodes into `out`, as `decode` does. size: (height, width) that the JPEG must have; rendered: (height, width) to scale it to."""
        handle = self._library.tjInitDecompress()  # 2 us. A reused handle would decode a damaged JPEG with tables of the one before.
        try:
            # Check first: tjDecompress2 replaces a height or width of 0 by the JPEG's own, and scales a JPEG of another size.
            width, height, subsampling, colorspace = (ctypes.c_int(0) for _ in range(4))
            self._library.tjDecompressHeader3(handle, jpeg, len(jpeg), width, height, subsampling, colorspace)  # 5 us
            if not height.value or not width.value:
                return self._library.tjGetErrorStr2(handle).decode(errors="replace"), True
            if (height.value, width.value) != size:
                return f"it is {width.value}x{height.value} pixels, its table says {size[1]}x{size[0]}", True
            # 500 scans of that many pixels take longer than 5 s.
            if height.value * width.value > _MANY_PIXELS and (complaint := scans_complaint(read_jpeg_header(jpeg))):
                return complaint, True
            place, (rows, columns), flags = out.ctypes.data, rendered, flags | _TJFLAG_LIMITSCANS
            if not self._library.tjDecompress2(handle, jpeg, len(jpeg), place, columns, 0, rows, pixel_format, flags):
                return "", False
            complaint = self._library.tjGetErrorStr2(handle).decode(errors="replace")
            return complaint, self._library.tjGetErrorCode(handle) != _TJERR_WARNING or not complaint.startswith(_WARNINGS)
        finally:
            self._library.tjDestroy(handle)
