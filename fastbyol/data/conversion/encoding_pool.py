"""Worker processes that encode images, and one queue of results in order: nothing is lost when a worker dies, and nothing waits for ever.

Each worker has pipes of its own and answers image by image, so the one on which it died is known: that is tried once more in a fresh
process, then once while nothing else runs, and is dropped if it kills this one too. (The pool of concurrent.futures breaks as a whole, does
not say on which job, and its processes outlive a parent that was killed.)
"""

from __future__ import annotations

import os
import selectors
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import islice

from fastbyol.config.errors import UserError
from fastbyol.data.conversion.encode import DroppedImage, EncodedImage, EncodeSettings
from fastbyol.data.conversion.encoding_worker import READY, Encoded, Job, start_worker
from fastbyol.data.conversion.stop_signals import StopRequest

KILLS_THE_DECODER = "kills the decoder"
SECONDS_PER_IMAGE = SECONDS_TO_START = 600.0
"""A worker that is silent for so long is taken for dead."""
_CHUNK = 8  # images sent to a worker in one go; it gets more when it has less than that left
_AHEAD = 48  # images per worker between the oldest result that is awaited and the newest job
_MAX_HELD_BYTES = 256 << 20
_POLL_S = 0.2
_LAST_WORDS_BYTES = 2000

_Place = tuple[int, Job]  # (position in the order, job)


class EncodingPool:
    """Encodes in `workers` processes. A context manager, which ends them."""

    def __init__(self, settings: EncodeSettings, *, workers: int, stop: StopRequest) -> None:
        self._settings, self._stop = settings, stop
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._workers.append(self._start())

    def encode(self, jobs: Iterable[Job]) -> Iterator[Encoded]:
        """The results in the order of the jobs. UserError if workers die again and again; Stopped when that is asked for."""
        run = _Run(iter(jobs))
        while True:
            self._hand_out(run)
            if run.awaited == run.submitted:
                return
            while run.awaited not in run.results:
                self._stop.check()
                self._collect(run)
                self._hand_out(run)
            self._stop.check()
            yield run.take()

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
        """Tops up every worker that has less than a chunk."""
        for worker in self._workers:
            if len(worker.jobs) < _CHUNK:
                worker.give(run.next_jobs(limit=run.awaited + _AHEAD * len(self._workers)))

    def _collect(self, run: _Run) -> None:
        for worker in self._ready(run):
            try:
                result = worker.receive()
            except (EOFError, OSError):
                self._replace(worker, run)
            else:
                if result is not None:
                    run.add(worker.jobs.popleft()[0], result)

    def _ready(self, run: _Run) -> list[_Worker]:
        """Those with something to say. While much is held already only the awaited result is taken: the others stand still meanwhile."""
        if run.held_bytes > _MAX_HELD_BYTES:
            owners = [worker for worker in self._workers if any(place == run.awaited for place, _ in worker.jobs)]
            if owners:
                return owners if owners[0].results.poll(_POLL_S) else _end_silent(owners)
        ready = [key.data for key, _ in self._selector.select(_POLL_S)]
        return ready or _end_silent(self._workers)

    def _replace(self, worker: _Worker, run: _Run) -> None:
        """Puts a fresh process in a dead one's place, and sees to its jobs."""
        self._selector.unregister(worker.results)
        exit_code = worker.end()
        run.deaths_in_a_row += 1
        if run.deaths_in_a_row > 2 * len(self._workers) + 4:
            raise UserError(
                f"worker processes die one after another (the last with {_exit_text(exit_code)}{worker.last_words()}); if memory is short take "
                "fewer --workers; the same command continues"
            )
        jobs = worker.jobs
        if jobs and exit_code == -signal.SIGPROF:
            place, _ = jobs.popleft()
            run.add(
                place, DroppedImage("takes too long", f"over {self._settings.max_cpu_s:g} s of processor time; --max-seconds allows more")
            )
        elif jobs and worker.is_ready:
            place, job = jobs[0]
            run.deaths[place] += 1
            if run.deaths[place] > 1:
                jobs.popleft()
                run.add(place, self._encode_alone(job))
        run.redo.extend(jobs)
        self._workers[self._workers.index(worker)] = self._start()

    def _encode_alone(self, job: Job) -> Encoded:
        """In one more process, while the others come to a stand because nobody empties their pipes."""
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
            exit_text = _exit_text(worker.end())
            return DroppedImage(KILLS_THE_DECODER, f"three processes died of it, the last with {exit_text}{worker.last_words()}")
        finally:
            worker.end()


class _Run:
    """Where one call of `encode` stands."""

    def __init__(self, jobs: Iterator[Job]) -> None:
        self._jobs = enumerate(jobs)
        self.awaited = 0
        """Position of the next result to hand out."""
        self.submitted = 0
        """Positions that were given to a worker at least once."""
        self.results: dict[int, Encoded] = {}
        self.held_bytes = 0
        self.redo: deque[_Place] = deque()
        self.deaths: Counter[int] = Counter()
        self.deaths_in_a_row = 0

    def next_jobs(self, *, limit: int) -> list[_Place]:
        """A chunk: first what a dead worker left, then new jobs, whose positions end at about `limit`."""
        if self.redo:
            return [self.redo.popleft() for _ in range(min(_CHUNK, len(self.redo)))]
        chunk = list(islice(self._jobs, _CHUNK)) if self.submitted < limit else []
        self.submitted += len(chunk)
        return chunk

    def add(self, place: int, result: Encoded) -> None:
        self.results[place] = result
        self.held_bytes += _size(result)
        self.deaths_in_a_row = 0

    def take(self) -> Encoded:
        result = self.results.pop(self.awaited)
        self.held_bytes -= _size(result)
        self.awaited += 1
        return result


class _Worker:
    """One process, seen from here."""

    def __init__(self, settings: EncodeSettings) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        try:
            self._process, self._pipes = start_worker(settings, stderr=self._said)
        except OSError as error:
            raise UserError(f"a worker process cannot be started ({error.strerror}); take fewer --workers") from error
        self.results = self._pipes.results
        self.jobs: deque[_Place] = deque()
        """What it has not answered yet, in its order."""
        self.is_ready = False
        self.heard_at = time.monotonic()

    def give(self, jobs: list[_Place]) -> None:
        if not jobs:
            return
        if not self.jobs:
            self.heard_at = time.monotonic()
        self.jobs.extend(jobs)
        try:
            self._pipes.jobs.send([job for _, job in jobs])
        except OSError:  # it has died; that is found out when its pipe is read
            return

    def receive(self) -> Encoded | None:
        """The result of its oldest job, None for its greeting. EOFError or OSError: it is dead."""
        message = self.results.recv()
        self.heard_at, self.is_ready = time.monotonic(), True
        return None if message == READY else message

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        """Ends the process, if it has not ended, and returns its exit code."""
        self._process.kill()
        for pipe in self._pipes:
            pipe.close()
        return self._process.wait()

    def last_words(self) -> str:
        """Returns the last line that a dead process wrote to stderr, such as an exception's, after a colon; '' if it said nothing."""
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES))
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()}" if lines else ""


def default_workers() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _end_silent(workers: list[_Worker]) -> list[_Worker]:
    """Ends those that have been silent for too long, so that the end of their pipe is read next; gives none."""
    for worker in workers:
        if worker.jobs and time.monotonic() - worker.heard_at > (SECONDS_PER_IMAGE if worker.is_ready else SECONDS_TO_START):
            worker.kill()
    return []


def _size(result: Encoded) -> int:
    return len(result.data) if isinstance(result, EncodedImage) else 0


def _exit_text(exit_code: int) -> str:
    return f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
