"""A bad link in user space: forwards IP packets between pairs of TUN devices late, not always, or not at all.

The kernel's own TCP runs over it, with its retransmissions and its backoff; only the packets' fate is decided here.

    python wire.py LINK:FD:FD ...    each line on stdin changes a link, and is answered with a line of its counts
"""

from __future__ import annotations

import heapq
import json
import os
import random
import selectors
import sys
import time
from dataclasses import dataclass, field
from typing import Any

LARGEST = 65_536  # bytes of a packet
BURST = 64  # packets read from one side before the other side has its turn


@dataclass
class Link:
    """One link and its fate: `delay` in seconds and `loss` as a probability hold for each packet of each direction."""

    name: str
    up: bool = True
    delay: float = 0.0
    loss: float = 0.0
    counts: dict[str, int] = field(default_factory=lambda: {"passed": 0, "lost": 0, "cut": 0})

    def __post_init__(self) -> None:
        self._random = random.Random(self.name)

    def change(self, how: dict[str, Any]) -> None:
        self.up, self.delay = bool(how.get("up", self.up)), float(how.get("delay", self.delay))
        self.loss = float(how.get("loss", self.loss))

    def takes(self, packet: bytes) -> bool:
        """Whether a packet gets through. IPv6's own announcements are nobody's business here."""
        if not packet or packet[0] >> 4 != 4:
            return False
        fate = "cut" if not self.up else "lost" if self._random.random() < self.loss else "passed"
        self.counts[fate] += 1
        return fate == "passed"


class Wire:
    """Every link of a network, in one loop."""

    def __init__(self, ends: dict[str, tuple[int, int]]) -> None:
        self._links = {name: Link(name) for name in ends}
        self._late: list[tuple[float, int, int, bytes]] = []  # when it is due, its number, where to, the packet
        self._count, self._orders = 0, b""
        self._ready = selectors.DefaultSelector()
        self._ready.register(0, selectors.EVENT_READ, None)
        for name, (one, other) in ends.items():
            for source, target in ((one, other), (other, one)):
                os.set_blocking(source, False)
                self._ready.register(source, selectors.EVENT_READ, (self._links[name], target))

    def run(self) -> None:
        """Until stdin closes, which it does when the one who started this dies."""
        while True:
            wait = max(0.0, self._late[0][0] - time.monotonic()) if self._late else None
            for key, _ in self._ready.select(wait):
                if key.data is None:
                    if not self._obey():
                        return
                else:
                    self._read(key.fd, *key.data)
            while self._late and self._late[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(self._late)
                self._write(target, packet)

    def _read(self, source: int, link: Link, target: int) -> None:
        for _ in range(BURST):
            try:
                packet = os.read(source, LARGEST)
            except OSError:  # nothing more to read, or the device is down
                return
            if link.takes(packet):
                self._count += 1
                heapq.heappush(self._late, (time.monotonic() + link.delay, self._count, target, packet))

    def _write(self, target: int, packet: bytes) -> None:
        try:
            os.write(target, packet)
        except OSError:
            return  # a full queue, a device that is down: lost, as on any link

    def _obey(self) -> bool:
        """Carry out the lines that came; False at the end of them."""
        more = os.read(0, LARGEST)
        *lines, self._orders = (self._orders + more).split(b"\n")
        for line in lines:
            how = json.loads(line)
            link = self._links[how["link"]]
            link.change(how)
            print(json.dumps(link.counts), flush=True)
        return bool(more)


def main() -> None:
    ends = {}
    for word in sys.argv[1:]:
        name, one, other = word.split(":")
        ends[name] = (int(one), int(other))
    Wire(ends).run()


if __name__ == "__main__":
    main()
