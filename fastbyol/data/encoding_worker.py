"""A worker process of a conversion: jobs come in through a pipe, every image goes out as soon as it is made, until the pipe ends.

Started as a program of its own, by `encoding_pool`: a fork of a process with threads (torch, DALI) may deadlock, and what multiprocessing
starts instead first imports the main program again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from multiprocessing.connection import Connection, Pipe
from typing import NamedTuple

from PIL import Image

from fastbyol.data.encode import DroppedImage, EncodedImage, Encoder, EncodeSettings, Location

Encoded = EncodedImage | DroppedImage
READY = "ready"
"""A worker's first message."""


class Job(NamedTuple):
    """One image to encode."""

    index: int
    """Its number in the listing."""
    location: Location


def start_worker(settings: EncodeSettings) -> tuple[subprocess.Popen[bytes], Connection]:
    """A new process, and our end of its pipe, which ends when the process does.

    In a process group of its own: the Ctrl-C of a terminal reaches only us, who then end it in an orderly way. If we are killed, it sees
    the end of the pipe.
    """
    ours, theirs = Pipe()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", f"from {__name__} import serve; serve({theirs.fileno()})"]
    with theirs:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment, pass_fds=[theirs.fileno()], process_group=0
        )
    ours.send(settings)
    return process, ours


def serve(descriptor: int) -> None:
    """The worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # EncodeSettings has its own limit
    connection = Connection(descriptor)
    try:
        encoder = Encoder(connection.recv())
        connection.send(READY)
        while True:
            for index, location in connection.recv():
                connection.send(encoder.encode_from(location, index=index))
    except (EOFError, OSError):  # the conversion is over, or was killed
        return
