"""A worker process of a conversion: jobs come in through one pipe, every image goes out through another as soon as it is
made, until the jobs end.

Started as a program of its own, by `encoding_pool`: a fork of a process with threads (torch, DALI) may deadlock, and what multiprocessing
starts instead first imports the main program again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import warnings
from multiprocessing.connection import Connection, Pipe
from typing import IO, NamedTuple

from PIL import Image

from fastbyol.data.conversion.encode import DroppedImage, EncodedImage, Encoder, EncodeSettings, Location

Encoded = EncodedImage | DroppedImage
READY = "ready"
"""A worker's first message."""
_PIPE_BYTES = 1 << 20  # what Linux gives without asking anybody


class Job(NamedTuple):
    """One image to encode."""

    index: int
    """Its number in the listing."""
    location: Location


class WorkerPipes(NamedTuple):
    """Our ends."""

    jobs: Connection
    results: Connection
    """Ends when the process does."""


def start_worker(settings: EncodeSettings, *, stderr: IO[bytes]) -> tuple[subprocess.Popen[bytes], WorkerPipes]:
    """Starts a process and returns it with our ends of its pipes. What it says goes to `stderr`: many workers would say the same.

    It is in a process group of its own: the Ctrl-C of a terminal reaches only us, who then end it in an orderly way. If we are killed, it
    sees the end of its jobs.
    """
    their_jobs, jobs = Pipe(duplex=False)
    results, their_results = Pipe(duplex=False)
    # A pipe that holds several images lets the worker begin the next one whatever we are doing.
    with contextlib.suppress(OSError):
        fcntl.fcntl(results.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
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
    with contextlib.suppress(BrokenPipeError):  # it has died already, which is found out when its results are read
        jobs.send(settings)
    return process, WorkerPipes(jobs, results)


def serve(jobs_descriptor: int, results_descriptor: int) -> None:
    """The worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # EncodeSettings has its own limit
    jobs, results = Connection(jobs_descriptor, writable=False), Connection(results_descriptor, readable=False)
    try:
        settings: EncodeSettings = jobs.recv()
        encoder = Encoder(settings)
        results.send(READY)
        while True:
            for index, location in jobs.recv():
                signal.setitimer(signal.ITIMER_PROF, settings.max_cpu_s)  # then SIGPROF ends this process, whatever code is running
                encoded = encoder.encode_from(location, index=index)
                signal.setitimer(signal.ITIMER_PROF, 0)
                results.send(encoded)
    except (EOFError, OSError):  # the conversion is over, or was killed
        return
