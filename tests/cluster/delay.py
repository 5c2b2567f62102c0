"""``delay.py TAP TAP MILLISECONDS``: carry frames between two taps, each of them later than it came.

Many kernels are built without netem; a tap is nearly always there. The kernel cuts large segments and fills in
checksums before it hands a frame to a tap, so frames can be passed on as they are.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
TAP_WITHOUT_HEADER = 0x0002 | 0x1000
LARGEST_FRAME = 65536


def open_tap(name: str) -> int:
    """A new tap, which goes when this process ends."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_WITHOUT_HEADER))
    return tap


def carry(first: int, second: int, seconds: float) -> None:
    """Until killed."""
    other = {first: second, second: first}
    waiting: deque[tuple[float, int, bytes]] = deque()
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for tap in select.select([first, second], [], [], timeout)[0]:
            waiting.append((time.monotonic() + seconds, other[tap], os.read(tap, LARGEST_FRAME)))
        while waiting and waiting[0][0] <= time.monotonic():
            _, tap, frame = waiting.popleft()
            try:
                os.write(tap, frame)
            except OSError:  # the link is down, or its queue is full: networks lose frames
                continue


if __name__ == "__main__":
    taps = [open_tap(name) for name in sys.argv[1:3]]
    print("ready", flush=True)
    carry(*taps, float(sys.argv[3]) / 1000)
