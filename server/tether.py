"""Run a command that does not outlive the process that started it, even when that one is killed with -9.

    python tether.py PARENT_PID COMMAND [ARGUMENT ...]

A file that runs by itself, without the package and without site-packages, since it stands in every start. Linux alone
can do this; elsewhere the command simply runs, and what is left of it is found and ended at the next start.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>: the signal to get when the parent dies; it stays over exec


def main() -> None:
    """Tie this process to its parent, then become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
