"""Starts a server in a network namespace of its own and makes the way there as long as that to a distant one.

The link is a veth pair whose delay is set by `tc netem`. Where the kernel has no netem it is a pair of TUN devices, and a process
(`packet_delay.py`) hands each packet on a set time after it came: TCP sees the same delays, and the process limits the rate.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Self

from fastbyol.config.errors import UserError

PROGRAMS = {"iproute2": ("ip", "tc"), "util-linux": ("unshare", "nsenter", "setpriv")}
"""The Debian packages that are needed, and the programs that are looked for in each."""
NETEM, FORWARDED = "delay by tc netem", "delay by a process that hands packets on: this kernel has no sch_netem"
MTU = 9000
"""Bytes of a packet, as in the networks of data centres."""
QUEUE = 100_000
"""Packets that may be under way: none is lost."""
PORT = 80
_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
_CHECKOUT = Path(__file__).parent.parent


class SlowLink:
    """Context manager that runs a server behind a link. Whatever it made ends with this process, also if that is killed.

    Args:
        server: command of a server that stays in the foreground, in one process, and listens on port 80.

    Attributes:
        kind: NETEM or FORWARDED.
        address: IP address of the server.

    Raises:
        UserError: a program is missing, this is not root, or the machine allows no namespaces.
    """

    def __init__(self, server: Sequence[str]) -> None:
        require_programs(PROGRAMS)
        if os.geteuid():
            raise UserError("a slow link needs root, because it makes a network namespace; run it as root")
        # Of the range that RFC 2544 keeps for benchmarks; four addresses for each process, so that two runs do not meet.
        first = ipaddress.ip_address("198.18.0.0") + 4 * (os.getpid() % (1 << 14))
        self._here, self.address = str(first + 1), str(first + 2)
        self._command = server
        self._near, self._far = f"near{os.getpid()}", f"far{os.getpid()}"

    def __enter__(self) -> Self:
        with ExitStack() as leaving:
            self._server = leaving.enter_context(_running(_in_new_namespace(self._command)))
            assert self._server.stdin is not None
            assert self._server.stdout is not None
            if self._server.stdout.readline() != b"inside\n":
                raise UserError("unshare --net: this machine allows no network namespace; run it where it does")
            # Tried where it can disturb nothing: in a namespace that ends with the command.
            probe = ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
            self.kind = NETEM if not subprocess.run(probe, capture_output=True, check=False).returncode else FORWARDED
            inside = ("nsenter", "--target", str(self._server.pid), "--net")
            if self.kind == NETEM:
                _do("ip", "link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", str(self._server.pid))
                # Where the server has ended, the namespace and with it the pair are already gone.
                leaving.callback(subprocess.run, ("ip", "link", "delete", self._near), capture_output=True, check=False)
            else:
                self._forwarder = leaving.enter_context(_running(_forwarder(self._near, self._far)))
                _do("ip", "link", "set", self._far, "netns", str(self._server.pid))
            for device, address, within in ((self._near, self._here, ()), (self._far, self.address, inside)):
                _do(*within, "ip", "address", "add", f"{address}/30", "dev", device)
                _do(*within, "ip", "link", "set", device, "mtu", str(MTU), "txqueuelen", str(QUEUE), "up")
            self._inside = inside
            self._server.stdin.write(b"\n")
            self._server.stdin.close()
            self._await_server()
            self._leaving = leaving.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._leaving.__exit__(*error)

    def set_delay(self, ms: float) -> None:
        """Makes every round trip longer by so many milliseconds."""
        if self.kind == NETEM:
            netem = ("netem", "delay", f"{ms:g}ms", "limit", str(QUEUE))
            _do(*self._inside, "tc", "qdisc", "replace", "dev", self._far, "root", *netem)
        else:
            assert self._forwarder.stdin is not None
            self._forwarder.stdin.write(f"{ms / 2000:.9f}\n".encode())  # seconds, and both ways have it
            self._forwarder.stdin.flush()
        _do(*self._inside, "ip", "tcp_metrics", "flush", "all")  # what the server's kernel remembers of earlier connections

    def round_trip_ms(self, *, tries: int = 9) -> float:
        """Returns the median time of a connection to the server, which is one round trip."""
        return median(1000 * self._connect_s() for _ in range(tries))

    def _connect_s(self, *, limit_s: float = 10.0) -> float:
        with socket.socket() as connection:
            # Only through the link: where it is gone, the default route may lead to a proxy that answers for any address.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._near.encode())
            connection.settimeout(limit_s)
            began = time.perf_counter()
            connection.connect((self.address, PORT))
            return time.perf_counter() - began

    def _await_server(self) -> None:
        for _ in range(100):
            if self._server.poll() is not None:
                break
            with contextlib.suppress(OSError):
                self._connect_s(limit_s=1.0)
                return
            time.sleep(0.1)
        raise UserError(f"{self._command[0]}: does not answer on {self.address} (exit code {self._server.poll()}); start it by hand")


def require_programs(packages: dict[str, tuple[str, ...]]) -> None:
    """Raises UserError that names the Debian packages of which a program is missing."""
    missing = [name for name, programs in packages.items() if not all(map(shutil.which, programs))]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed; on Debian or Ubuntu: apt-get install {' '.join(missing)}")


def _in_new_namespace(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts a process that says 'inside' in a new namespace and becomes the command when it is given a line."""
    # The kernel ends it with this process, and the namespace with it. A session of its own: Ctrl-C is for this process only.
    shell = ("sh", "-c", 'ip link set lo up && echo inside && read line && exec "$@"', "sh")
    kept = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net", *shell, *command)
    return subprocess.Popen(kept, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)


def _forwarder(*names: str) -> subprocess.Popen[bytes]:
    """Makes a TUN device of each name and starts the process that forwards between them; they go when it ends."""
    devices: list[int] = []
    try:
        for name in names:
            devices.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
            fcntl.ioctl(devices[-1], _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TUN_WITHOUT_HEADER))
        command = [sys.executable, "-m", "benchmarks.packet_delay", *map(str, devices)]
        return subprocess.Popen(command, cwd=_CHECKOUT, stdin=subprocess.PIPE, pass_fds=devices, start_new_session=True)
    except OSError as error:
        raise UserError(f"/dev/net/tun: {error.strerror}, and this kernel has no sch_netem; a slow link needs one of them") from None
    finally:
        for device in devices:
            os.close(device)


@contextlib.contextmanager
def _running(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Ends the process on leaving."""
    with process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {' '.join(done.stderr.split()) or done.returncode}; this machine does not allow it")
