"""Run a program that ends when the process that started it does, however that one ends.

    python -m fedloom.client.agent.lifeline PARENT COMMAND...

Linux tells a process of its parent's death (prctl), if the process asks for it; a program that knows nothing of that is
started through here. It is told to terminate, which lets it say goodbye to its server. Elsewhere it is merely started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def main(arguments: list[str]) -> int:
    """Become the command, bound to the parent; returns only where the parent is gone or there is no such command."""
    parent, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before it could be bound to
            return 1
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr)
    return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
