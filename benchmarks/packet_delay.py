"""Hands packets on between two TUN devices, each a set time after it came, in the order in which they came; `slow_link.py` starts it.

python -m benchmarks.packet_delay DEVICE DEVICE     (open file descriptors; each line on stdin is the delay from then on, in seconds)

It ends when stdin does, so with the process that started it, or when one of the devices is gone.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections import deque

MAX_PACKET_BYTES = 65_535
AT_ONCE = 64
"""Packets that are read from one device before those that are due are written."""


def forward(devices: tuple[int, int], told: int) -> None:
    """Forwards until `told`, a file descriptor, is at its end."""
    delay_s = 0.0
    waiting: dict[int, deque[tuple[float, bytes]]] = {device: deque() for device in devices}
    while True:
        due = min((queue[0][0] for queue in waiting.values() if queue), default=None)
        ready, _, _ = select.select([*devices, told], [], [], None if due is None else max(0.0, due - time.monotonic()))
        if told in ready:
            lines = os.read(told, 4096).split()
            if not lines:
                return
            delay_s = float(lines[-1])
        for source, target in (devices, devices[::-1]):
            if source in ready:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(AT_ONCE):
                        packet = os.read(source, MAX_PACKET_BYTES)
                        waiting[target].append((time.monotonic() + delay_s, packet))
        now = time.monotonic()
        for target, queue in waiting.items():
            while queue and queue[0][0] <= now:
                with contextlib.suppress(OSError):  # a device that is down loses packets, as networks do
                    os.write(target, queue.popleft()[1])


if __name__ == "__main__":
    near, far = map(int, sys.argv[1:])
    with contextlib.suppress(OSError):  # the namespace ended, and its device with it
        forward((near, far), sys.stdin.fileno())
