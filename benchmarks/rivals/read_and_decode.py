"""The minimum work of a converter that checks its images: read each file and decode it completely, in separate processes.

python -m benchmarks.rivals.read_and_decode FOLDER NUMBER COUNT     share number NUMBER of COUNT
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from fastbyol.data.formats.jpeg_header import read_jpeg_header
from fastbyol.data.formats.turbojpeg import TurboJpeg
from fastbyol.data.inputs.folder import list_image_folder


def read_and_decode(folder: Path, *, workers: int) -> None:
    """Decodes all images below `folder`; each process takes its share."""
    command = [sys.executable, "-m", __name__, folder]
    processes = [subprocess.Popen([*command, str(number), str(workers)]) for number in range(workers)]
    for process in processes:
        if process.wait():
            raise RuntimeError(f"a process of {__name__} failed")


def _decode_share(folder: Path, number: int, count: int) -> None:
    listing = list_image_folder(folder)
    decoder, scratch = TurboJpeg(), np.empty(0, dtype=np.uint8)
    for index in range(number, len(listing.files), count):
        jpeg = listing.path(index).read_bytes()
        header = read_jpeg_header(jpeg)
        assert header is not None
        size = header.height * header.width * 3
        # One output, which grows: new memory for each image would have to be cleared by the system first.
        if len(scratch) < size:
            scratch = np.empty(size, dtype=np.uint8)
        decoder.decode(jpeg, scratch[:size].reshape(header.height, header.width, 3))


if __name__ == "__main__":
    _decode_share(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
