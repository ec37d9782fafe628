"""How much memory a process may take: a hard wall for what it allocates, which it meets as a MemoryError."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS = Path("/proc/self/status")


@contextmanager
def memory_wall(limit: int) -> Iterator[None]:
    """In the block, this process's memory may grow to about `limit` bytes; 0 sets no wall.

    What is walled is the data the process allocates (RLIMIT_DATA), as much as it holds already and the rest of `limit`;
    mapped files, which the system may drop, do not count. Where the system cannot say what a process holds, there is no
    wall, and the agent's own watch on the process (warm.py) is all there is.
    """
    held, data = _held("VmRSS:"), _held("VmData:")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if not limit or not held or not data:
        yield
        return
    wall = data + max(limit - held, 0)
    resource.setrlimit(resource.RLIMIT_DATA, (wall if hard == resource.RLIM_INFINITY else min(wall, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _held(field: str) -> int:
    """Bytes that the system says this process has of something; 0 where it does not say."""
    try:
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0
