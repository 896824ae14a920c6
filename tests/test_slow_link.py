"""The link of the benchmark `store`: as slow as it was told, and gone when its process ends, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the suite runs from a checkout and is not installed

from benchmarks.cases import store  # noqa: E402
from benchmarks.slow_link import PORT, PROGRAMS, SlowLink, require_programs  # noqa: E402
from fastbyol.config.errors import UserError  # noqa: E402
from tests.commands import await_gone, children_of  # noqa: E402

HELD_OPEN = """
import sys, time
from benchmarks.slow_link import SlowLink
with SlowLink([sys.executable, "-m", "http.server", "80"]) as link:
    print(link.address, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def allowed() -> None:
    """Skips where a slow link cannot be made, for the reason that a user would be told."""
    try:
        SlowLink([])
    except UserError as error:
        pytest.skip(str(error))


def devices() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir() if path.name.startswith(("near", "far"))}


def test_a_round_trip_is_longer_by_what_was_set_and_the_bytes_are_the_servers(allowed: None, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(data)
    with SlowLink([sys.executable, "-m", "http.server", str(PORT), "--directory", str(tmp_path)]) as link:
        assert devices()
        link.set_delay(60)
        time.sleep(0.1)
        assert link.round_trip_ms(tries=3) >= 60
        with build_opener(ProxyHandler({})).open(f"http://{link.address}/file", timeout=30) as answer:
            assert answer.read() == data
        link.set_delay(0)
        time.sleep(0.1)
        assert link.round_trip_ms(tries=25) < 60
    assert not devices()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_of_a_link_is_left_when_its_process_is_ended(allowed: None, number: int) -> None:
    with subprocess.Popen([sys.executable, "-c", HELD_OPEN], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"198.18.")
        children = children_of(process.pid)
        assert children
        assert devices() == {f"near{process.pid}"}
        process.send_signal(number)
    await_gone(children)
    deadline = time.monotonic() + 20  # the kernel removes a namespace a moment after its last process
    while devices() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not devices()


def test_no_other_way_is_taken_where_the_link_is_gone(allowed: None) -> None:
    before = set(children_of(os.getpid()))
    with SlowLink([sys.executable, "-m", "http.server", str(PORT)]) as link:
        for child in set(children_of(os.getpid())) - before:
            os.kill(child, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while devices() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(OSError, match="No such device"):  # also where the default route leads to a proxy that answers for all
            link.round_trip_ms(tries=1)


def test_what_the_case_lacks_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="nginx-light not installed; on Debian or Ubuntu: apt-get install nginx-light"):
        store.run(store.QUICK, scratch=tmp_path)
    with pytest.raises(UserError, match="iproute2 and util-linux not installed"):
        require_programs(PROGRAMS)


def test_a_server_that_does_not_start_is_named(allowed: None) -> None:
    with pytest.raises(UserError, match=r"^sh: does not answer on 198\.18\.\d+\.\d+ \(exit code 3\)"), SlowLink(["sh", "-c", "exit 3"]):
        pass
    assert not devices()
