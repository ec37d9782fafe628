"""What the page shows at this moment: one task reads the folder and renders, everybody else looks at the result."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from pathlib import Path
from typing import Any

from fedloom.server.dashboard.exposition import exposition
from fedloom.server.dashboard.folder import RunFolder
from fedloom.server.dashboard.health import health
from fedloom.server.dashboard.page import PARTS, Page

log = logging.getLogger("fedloom.server.dashboard")

PERIOD = 1.0  # seconds between looks at the folder
CATCH_UP = 5.0  # seconds that a long log is read for before the page is served


class Board:
    """The rendered parts, each with a number that grows when it changes."""

    def __init__(self, out: Path, *, period: float = PERIOD) -> None:
        self._folder, self._page, self._period = RunFolder(out), Page(), period
        self._lock = threading.Lock()
        self._changed = asyncio.Event()
        self._version, self._stale = 0, True
        self._latest: float | None = None  # the last event's own time, and when that was by this clock:
        self._heard = self._looked = -math.inf  # the latter: when all that there was had been read
        self.closing = False
        self.parts: dict[str, tuple[int, str]] = dict.fromkeys(PARTS, (0, ""))
        self._render()

    async def catch_up(self) -> None:
        """Read what is there already."""
        more, end = True, time.monotonic() + CATCH_UP
        while more and time.monotonic() < end:
            _, more = await asyncio.to_thread(self.refresh)

    async def keep(self) -> None:
        """Look at the folder again and again; an error is logged and does not end it."""
        while not self.closing:
            more = False
            try:
                changed, more = await asyncio.to_thread(self.refresh)
                if changed:
                    self.wake()
            except Exception:
                log.exception("the dashboard could not be brought up to date")
            await asyncio.sleep(0 if more else self._period)

    def refresh(self) -> tuple[bool, bool]:
        """Read on, and render what has changed once all is read; whether it did, and whether there is more to read."""
        with self._lock:
            changed, more = self._folder.poll()
            self._listen(more)
            self._stale = changed or self._stale
            if more or not self._stale:
                return False, more
            return self._render(), False

    def _listen(self, more: bool) -> None:
        """Note when the last event was, by a clock that nobody sets: setting the other one is no silence.

        What was not there at the last look has come since, whatever time it bears.
        """
        latest, now = self._folder.run.latest, time.monotonic()
        if latest is not None and latest != self._latest:
            self._heard = now - min(max(0.0, time.time() - latest), now - self._looked)
        self._latest, self._looked = latest, self._looked if more else now

    def _render(self) -> bool:
        self._stale = False
        fresh = self._page.parts(self._folder)
        changed = {name for name, html in fresh.items() if html != self.parts[name][1]}
        self._version += bool(changed)
        self.parts = {
            name: (self._version, html) if name in changed else self.parts[name] for name, html in fresh.items()
        }
        return bool(changed)

    def wake(self) -> None:
        """Let everybody who waits look again."""
        before, self._changed = self._changed, asyncio.Event()
        before.set()

    def close(self) -> None:
        """End all streams, and the reading."""
        self.closing = True
        self.wake()

    def change(self) -> asyncio.Event:
        """Set at the next change."""
        return self._changed

    def document(self) -> str:
        parts = {name: html for name, (_, html) in self.parts.items()}
        return self._page.whole(parts, self._folder.title, time.time())

    def metrics(self) -> str:
        with self._lock:
            return exposition(self._folder)

    def health(self) -> tuple[bool, dict[str, Any]]:
        with self._lock:
            silence = None if self._latest is None else time.monotonic() - self._heard
            return health(self._folder, silence)
