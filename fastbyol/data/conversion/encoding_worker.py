"""A worker process of a conversion: receives jobs through one pipe and sends each image through another as soon as it is encoded.

`encoding_pool` starts it as a separate program, because forking a process with threads (torch, DALI) may deadlock, and multiprocessing's
'spawn' would import the main program again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from typing import IO, NamedTuple

from PIL import Image

from fastbyol.data.conversion.encode import DroppedImage, EncodedImage, Encoder, EncodeSettings, read_original
from fastbyol.data.inputs.listing import ImageLocation
from fastbyol.host import stores
from fastbyol.host.store_path import StorePath, at_once

Encoded = EncodedImage | DroppedImage
READY = "ready"
"""A worker's first message. Its other texts say why it waits for a store."""
_PIPE_BYTES = 1 << 20  # the most that Linux allows unprivileged processes by default


class Job(NamedTuple):
    """One image to encode."""

    index: int
    """The image's position in the listing."""
    location: ImageLocation


def start_worker(settings: EncodeSettings, *, stderr: IO[bytes]) -> tuple[subprocess.Popen[bytes], Connection, Connection]:
    """Starts a worker process; returns it with our ends of two pipes: one for jobs, and one for results, which closes when the process ends.

    Its messages go to `stderr`, because all workers may print the same.

    It has its own process group, so that Ctrl-C in a terminal reaches only the main process, which then ends the worker in an orderly way. If
    the main process is killed, the pipe of jobs ends and the worker exits.
    """
    their_jobs, jobs = Pipe(duplex=False)
    results, their_results = Pipe(duplex=False)
    # A pipe that holds several images lets the worker begin the next one while the main process is busy.
    with contextlib.suppress(OSError):
        fcntl.fcntl(results.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    # One thread per worker: there is one worker per core already.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    theirs = (their_jobs.fileno(), their_results.fileno())
    command = [sys.executable, "-c", f"from {__name__} import serve; serve{theirs}"]
    with their_jobs, their_results:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, env=environment, pass_fds=theirs, process_group=0
        )
    with contextlib.suppress(BrokenPipeError):  # it has died already; reading its results will show that
        jobs.send(settings)
    return process, jobs, results


def _originals(chunk: list[Job]) -> Iterator[bytes | DroppedImage]:
    """Yields the bytes of each image; images at URLs are fetched many at a time."""
    locations = [location for _, location in chunk]
    at_urls = any(isinstance(location.path, StorePath) for location in locations)
    return at_once(read_original, locations) if at_urls else map(read_original, locations)


def serve(jobs_descriptor: int, results_descriptor: int) -> None:
    """Main function of a worker: encodes the images of all jobs until the pipe of jobs is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # EncodeSettings has its own limit
    jobs, results = Connection(jobs_descriptor, writable=False), Connection(results_descriptor, readable=False)
    one_at_a_time = threading.Lock()

    def send(message: object) -> None:
        with one_at_a_time:
            results.send(message)

    stores.on_wait = send
    try:
        settings: EncodeSettings = jobs.recv()
        encoder = Encoder(settings)
        send(READY)
        while True:
            chunk: list[Job] = jobs.recv()
            originals = _originals(chunk)
            for index, _ in chunk:
                signal.setitimer(signal.ITIMER_PROF, settings.max_cpu_s)  # after that, SIGPROF kills this process, even inside C code
                data = next(originals)
                encoded = data if isinstance(data, DroppedImage) else encoder.encode(data, index=index)
                signal.setitimer(signal.ITIMER_PROF, 0)
                send(encoded)
    except (EOFError, OSError):  # the main process has finished, or was killed
        return
