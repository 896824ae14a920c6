"""Tests of the encoding pool with workers that really die: results stay in order, none is lost, and nothing hangs."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.data.conversion import encoding_pool, encoding_worker
from fastbyol.data.conversion.encode import DroppedImage, EncodedImage, EncodeSettings
from fastbyol.data.conversion.encoding_pool import EncodingPool
from fastbyol.data.conversion.encoding_worker import Encoded, Job
from fastbyol.host.signals import DeferredStop, OrderlyStop


def jpeg(number: int) -> bytes:
    """Returns a small JPEG with different bytes for each number."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (number % 256, 90, 200)).save(buffer, "JPEG", comment=str(number).encode())
    return buffer.getvalue()


@dataclass(frozen=True)
class Memory:
    """A location that returns its bytes from memory."""

    name: str
    content: bytes
    path: ClassVar[Path] = Path("in memory")

    def read(self) -> bytes:
        return self.content


@dataclass(frozen=True)
class Deadly(Memory):
    """Kills the process that reads it, like the kernel when memory runs out. With a marker file, only while that does not exist."""

    marker: Path | None = None

    def read(self) -> bytes:
        if self.marker is None or not self.marker.exists():
            if self.marker:
                self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.content


@dataclass(frozen=True)
class Endless(Memory):
    """Never returns, like a decoder in an endless loop or a dead network disk."""

    def read(self) -> bytes:
        while True:
            time.sleep(60)


@dataclass(frozen=True)
class Busy(Memory):
    """Computes for ever, like a decoder with a malicious file."""

    def read(self) -> bytes:
        while True:
            sum(range(10_000))


@dataclass(frozen=True)
class Noisy(Memory):
    """A large image of noise, which JPEG cannot compress well."""

    def read(self) -> bytes:
        noise = np.random.default_rng(len(self.name)).integers(0, 256, (500, 700, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()


class KillsWhoeverLoadsIt(Memory):
    """Kills a worker when it unpickles the job, before it works on any image."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (3,)


class RaisesWhenLoaded(Memory):
    """Raises an exception in a worker that is not an image's fault, like a broken installation."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return int, ("no number",)


def memories(num: int) -> list[Memory]:
    return [Memory(str(i), jpeg(i)) for i in range(num)]


def encode(locations: list[Memory], *, workers: int = 2) -> list[Encoded]:
    with EncodingPool(EncodeSettings(), workers=workers, stop=DeferredStop()) as pool:
        return list(pool.encode(Job(i, location) for i, location in enumerate(locations)))


def contents(results: list[Encoded]) -> list[bytes | str]:
    return [result.data if isinstance(result, EncodedImage) else result.reason for result in results]


def test_results_are_in_order_for_any_number_of_workers_and_a_pool_can_be_reused() -> None:
    wanted = [location.content for location in memories(120)]
    assert contents(encode(memories(120), workers=3)) == wanted
    with EncodingPool(EncodeSettings(), workers=1, stop=DeferredStop()) as pool:
        for num in (3, 0, 40):
            assert contents(list(pool.encode(Job(i, location) for i, location in enumerate(memories(num))))) == wanted[:num]


def test_the_work_of_a_worker_that_dies_once_is_done_by_another(tmp_path: Path) -> None:
    locations = memories(60)
    locations[20] = Deadly("20", jpeg(20), tmp_path / "once")
    assert contents(encode(locations)) == [jpeg(i) for i in range(60)]
    assert (tmp_path / "once").exists()


def test_only_the_image_that_kills_every_process_is_dropped() -> None:
    locations = memories(60)
    for i in (20, 59):
        locations[i] = Deadly(str(i), b"")
    results = encode(locations)
    assert contents(results) == ["kills the decoder" if i in (20, 59) else jpeg(i) for i in range(60)]
    assert isinstance(results[20], DroppedImage)
    assert "signal 9" in results[20].detail


def test_workers_that_die_on_every_image_end_the_work_with_a_message() -> None:
    with pytest.raises(UserError, match=r"worker processes die one after another .*exit code 3.*same command continues"):
        encode([KillsWhoeverLoadsIt(str(i), b"") for i in range(200)], workers=1)


def test_a_fault_common_to_all_workers_is_reported_once_without_tracebacks(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"worker processes die one after another .*: ValueError: invalid literal for int\(\)"):
        encode([RaisesWhenLoaded(str(i), b"") for i in range(200)], workers=2)
    assert "Traceback" not in capfd.readouterr().err


def test_workers_that_die_at_their_start_end_the_work_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_worker.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"worker processes die one after another \(the last with exit code 1\)"):
        encode(memories(10), workers=2)


def test_a_worker_that_does_not_answer_for_too_long_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_pool, "SECONDS_PER_IMAGE", 2.0)
    locations = memories(30)
    locations[10] = Endless("10", b"")
    assert contents(encode(locations)) == ["kills the decoder" if i == 10 else jpeg(i) for i in range(30)]


def test_an_image_that_takes_too_much_cpu_time_is_dropped_at_once_with_its_reason() -> None:
    locations = memories(12)
    locations[5] = Busy("5", b"")
    with EncodingPool(EncodeSettings(max_cpu_s=0.5), workers=2, stop=DeferredStop()) as pool:
        results = list(pool.encode(Job(index, location) for index, location in enumerate(locations)))
    assert [type(result) is DroppedImage for result in results] == [index == 5 for index in range(12)]
    assert results[5] == DroppedImage("takes too long", "over 0.5 s of processor time; --max-seconds allows more")


def test_results_that_are_not_consumed_are_held_up_to_a_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_pool, "_MAX_HELD_BYTES", 1)
    held: list[int] = []
    take = encoding_pool._Run.take

    def watched(run: encoding_pool._Run) -> Encoded:
        held.append(run.held_bytes)
        return take(run)

    monkeypatch.setattr(encoding_pool._Run, "take", watched)
    sizes = [len(content) for content in contents(encode([Noisy(str(i), b"") for i in range(40)]))]
    assert min(sizes) > 300_000
    # One result of each worker at most: beyond the limit only the awaited one is taken.
    assert max(held) <= 3 * max(sizes)


def test_no_process_outlives_its_pool_or_a_stop() -> None:
    stop = DeferredStop()
    with EncodingPool(EncodeSettings(), workers=2, stop=stop) as pool:
        processes = [worker._process.pid for worker in pool._workers]
        results = pool.encode(Job(i, location) for i, location in enumerate(memories(200)))
        next(results)
        with stop.deferred():
            stop.handle(signal.SIGTERM, None)
            with pytest.raises(OrderlyStop) as stopped:
                list(results)
    assert stopped.value.exit_code == 143
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


@pytest.fixture(autouse=True)
def within_a_minute() -> Iterator[None]:
    """Makes a test that hangs fail after a minute."""

    def too_long(*_: object) -> None:
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
