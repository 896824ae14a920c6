"""A pool of worker processes that encode images and return the results in order. If a worker dies or hangs, no other image is lost.

Each worker has its own pipes and answers image by image, so the image that killed it is known. That image is tried again in a new process, then
once more while nothing else runs, and is dropped if it kills that process too. (The pool of concurrent.futures breaks as a whole, does
not say on which job, and its processes outlive a parent that is killed.)
"""

from __future__ import annotations

import os
import selectors
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice

from fastbyol.config.errors import UserError
from fastbyol.data.conversion.encode import DroppedImage, EncodedImage, EncodeSettings
from fastbyol.data.conversion.encoding_worker import READY, Encoded, Job, start_worker
from fastbyol.host.signals import DeferredStop
from fastbyol.host.stores import print_wait

KILLS_THE_DECODER = "kills the decoder"
SECONDS_PER_IMAGE = SECONDS_TO_START = 600.0
"""A worker that sends nothing for this long is considered dead."""
_CHUNK = 8  # images sent to a worker at once; it gets more when it has fewer left
_AHEAD = 48  # images per worker between the next result to return and the newest job
_MAX_HELD_BYTES = 256 << 20
_POLL_S = 0.2
_LAST_WORDS_BYTES = 2000
_SECONDS_BETWEEN_WAITS = 5.0

_Place = tuple[int, Job]  # (position in the order, job)


class EncodingPool:
    """Encodes images in `workers` processes. A context manager that ends them."""

    def __init__(self, settings: EncodeSettings, *, workers: int, stop: DeferredStop) -> None:
        self._settings, self._stop = settings, stop
        self._selector = selectors.DefaultSelector()
        self._workers = [self._start() for _ in range(workers)]

    def encode(self, jobs: Iterable[Job]) -> Iterator[Encoded]:
        """Yields the results in the order of the jobs. Raises UserError if workers die repeatedly, Stopped if a stop was requested."""
        run = _Run(iter(jobs))
        while True:
            self._hand_out(run)
            if run.awaited == run.submitted:
                return
            self._stop.check()
            if run.awaited in run.results:
                yield run.take()
                continue
            for worker in self._ready(run):
                try:
                    result = worker.receive()
                except (EOFError, OSError):
                    self._replace(worker, run)
                else:
                    if result is not None:
                        run.add(worker.jobs.popleft()[0], result)

    def __enter__(self) -> EncodingPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._selector.close()

    def _start(self) -> _Worker:
        worker = _Worker(self._settings)
        self._selector.register(worker.results, selectors.EVENT_READ, worker)
        return worker

    def _hand_out(self, run: _Run) -> None:
        """Sends jobs to every worker that has less than a chunk left."""
        for worker in self._workers:
            if len(worker.jobs) < _CHUNK:
                worker.give(run.next_jobs(limit=run.awaited + _AHEAD * len(self._workers)))

    def _ready(self, run: _Run) -> list[_Worker]:
        """Waits a moment and returns the workers that have sent something.

        While too many results are held in memory, only the worker with the next result is read. The others block on their full pipes.
        """
        if run.held_bytes > _MAX_HELD_BYTES:
            owners = [worker for worker in self._workers if any(place == run.awaited for place, _ in worker.jobs)]
            if owners:
                return owners if owners[0].results.poll(_POLL_S) else _end_silent(owners)
        ready = [key.data for key, _ in self._selector.select(_POLL_S)]
        return ready or _end_silent(self._workers)

    def _replace(self, worker: _Worker, run: _Run) -> None:
        """Replaces a dead worker by a new process, and decides what becomes of its jobs."""
        self._selector.unregister(worker.results)
        exit_code = worker.end()
        run.deaths_in_a_row += 1
        # Nothing but deaths since the last result: the machine is at fault, not the images.
        if run.deaths_in_a_row > 2 * len(self._workers) + 4:
            raise UserError(
                f"worker processes die one after another (the last with {worker.cause_of_death()}); if memory is short take "
                "fewer --workers; the same command continues"
            )
        jobs = worker.jobs
        # The timer of `encoding_worker.serve` has run out: a second try would only take as long again.
        if jobs and exit_code == -signal.SIGPROF:
            place, _ = jobs.popleft()
            run.add(
                place, DroppedImage("takes too long", f"over {self._settings.max_cpu_s:g} s of processor time; --max-seconds allows more")
            )
        elif jobs and worker.is_ready:
            place, job = jobs[0]
            # Only its oldest job can have killed it; the others were still waiting in its pipe.
            run.deaths[place] += 1
            if run.deaths[place] > 1:
                jobs.popleft()
                run.add(place, self._encode_alone(job))
        run.redo.extend(jobs)
        self._workers[self._workers.index(worker)] = self._start()

    def _encode_alone(self, job: Job) -> Encoded:
        """Encodes an image in an extra process, while the other workers block because their pipes are not read."""
        worker = _Worker(self._settings)
        worker.give([(0, job)])
        result = None
        try:
            while result is None:
                self._stop.check()
                if worker.results.poll(_POLL_S):
                    result = worker.receive()
                else:
                    _end_silent([worker])
            return result
        except (EOFError, OSError):
            return DroppedImage(KILLS_THE_DECODER, f"three processes died of it, the last with {worker.cause_of_death()}")
        finally:
            worker.end()


class _Run:
    """State of one call of `encode`."""

    def __init__(self, jobs: Iterator[Job]) -> None:
        self._jobs = enumerate(jobs)
        self.awaited = 0
        """Position of the next result to yield."""
        self.submitted = 0
        """Number of positions that were given to a worker at least once."""
        self.results: dict[int, Encoded] = {}
        self.held_bytes = 0
        self.redo: deque[_Place] = deque()
        self.deaths: Counter[int] = Counter()
        self.deaths_in_a_row = 0

    def next_jobs(self, *, limit: int) -> list[_Place]:
        """Returns up to a chunk of jobs: first those that a dead worker left, then new ones up to about position `limit`."""
        if self.redo:
            return [self.redo.popleft() for _ in range(min(_CHUNK, len(self.redo)))]
        chunk = list(islice(self._jobs, _CHUNK)) if self.submitted < limit else []
        self.submitted += len(chunk)
        return chunk

    def add(self, place: int, result: Encoded) -> None:
        self.results[place] = result
        self.held_bytes += len(result.data) if isinstance(result, EncodedImage) else 0
        self.deaths_in_a_row = 0

    def take(self) -> Encoded:
        result = self.results.pop(self.awaited)
        self.held_bytes -= len(result.data) if isinstance(result, EncodedImage) else 0
        self.awaited += 1
        return result


class _Worker:
    """A worker process as the main process sees it."""

    def __init__(self, settings: EncodeSettings) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (stays open as long as the process runs)
        try:
            self._process, self._to_do, self.results = start_worker(settings, stderr=self._said)
        except OSError as error:
            raise UserError(f"a worker process cannot be started ({error.strerror}); take fewer --workers") from error
        self.jobs: deque[_Place] = deque()
        """Jobs that it has not answered yet, in its order."""
        self.is_ready = False
        self.heard_at = time.monotonic()

    def give(self, jobs: list[_Place]) -> None:
        if not jobs:
            return
        if not self.jobs:
            self.heard_at = time.monotonic()
        self.jobs.extend(jobs)
        with suppress(OSError):  # it has died; reading its results will show that
            self._to_do.send([job for _, job in jobs])

    def receive(self) -> Encoded | None:
        """Returns the result of its oldest job, or None for another message. Raises EOFError or OSError if it is dead."""
        message = self.results.recv()
        self.heard_at, self.is_ready = time.monotonic(), True
        if isinstance(message, str):
            if message != READY:
                _tell_wait(message)
            return None
        return message

    def end(self) -> int:
        """Kills the process if it is still running; returns its exit code."""
        self._process.kill()
        self._to_do.close()
        self.results.close()
        return self._process.wait()

    def cause_of_death(self) -> str:
        """Ends the process; returns its signal or exit code and the last line that it wrote to stderr, such as an exception's."""
        exit_code = self.end()
        exit_text = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES))
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f"{exit_text}: {lines[-1].strip()}" if lines else exit_text


_told_wait_at = -_SECONDS_BETWEEN_WAITS


def _tell_wait(text: str) -> None:
    """Prints why a worker waits for a store, unless another one's reason was printed a moment ago."""
    global _told_wait_at
    if time.monotonic() - _told_wait_at >= _SECONDS_BETWEEN_WAITS:
        _told_wait_at = time.monotonic()
        print_wait(text)


def _end_silent(workers: list[_Worker]) -> list[_Worker]:
    """Kills workers that have sent nothing for too long, so that the end of their pipe is read next. Always returns an empty list."""
    for worker in workers:
        if worker.jobs and time.monotonic() - worker.heard_at > (SECONDS_PER_IMAGE if worker.is_ready else SECONDS_TO_START):
            worker._process.kill()
    return []
