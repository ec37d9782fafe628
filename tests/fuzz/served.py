"""A service in a process of its own, for the targets that fuzz it over its socket: it must live, and stay small."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Final

import psutil
from targets import MIB, Broken

from fedloom.server.processes import TETHER

GROWTH: Final = 64 * MIB  # that the service may grow by, once it is warm
HANDLES: Final = 200  # open files and sockets, at most
_WARM: Final = 2000  # inputs after which its size is what it is


class Watched:
    """A process that must not die or grow, whatever comes."""

    def __init__(self, pid: int, log: Path) -> None:
        self._about, self._log = psutil.Process(pid), log
        self._inputs, self._base = 0, 0

    def look(self) -> None:
        """After an input: raise Broken when it has died, or has grown past its limits."""
        self._inputs += 1
        if not self._about.is_running() or self._about.status() == psutil.STATUS_ZOMBIE:
            raise Broken(f"the service must live, it has ended; see {self._log}")
        if self._inputs % 64:
            return
        size = int(self._about.memory_info().rss)
        if self._inputs <= _WARM or not self._base:
            self._base = max(self._base, size)
        if size > self._base + GROWTH:
            raise Broken(f"the service must not grow by more than {GROWTH} bytes, got {self._base} and then {size}")
        if (handles := self._about.num_fds()) > HANDLES:
            raise Broken(f"the service must have at most {HANDLES} open files, got {handles}")


class Served(Watched):
    """A process of this one's own: it ends with the object, and with this process, however that ends."""

    def __init__(self, command: list[str], log: Path) -> None:
        tethered = [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), *command]
        here = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                tethered,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                env=os.environ | here,
                start_new_session=True,
            )
        super().__init__(self._process.pid, log)
        weakref.finalize(self, _end, self._process)

    def await_line(self) -> None:
        """Wait until it says that it is ready.

        Raises:
            RuntimeError: when it ends instead.
        """
        if self._process.stdout is None or not self._process.stdout.readline():
            raise RuntimeError(f"a service must start, it did not; see {self._log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
