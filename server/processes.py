"""The processes of a run: each carries the run's folder in its environment, so that none is ever lost.

Flower's processes start others in sessions of their own, and orphans of a killed one are no longer anyone's children.
A mark in the environment is inherited by all of them, and cannot be mistaken for another's as a reused number can.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

LOCK_FILE = "server.lock"
MARK = "FEDLOOM_SERVER_OUT"
TETHER = Path(__file__).with_name("tether.py")


def start_tethered(
    command: Sequence[str], out: Path, *, log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a command of the run in OUT that ends when this thread's process does; its output is added to `log`."""
    tethered = [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), *command]
    with log.open("ab") as file:
        return subprocess.Popen(
            tethered,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, MARK: str(out.resolve())},
            start_new_session=True,  # Ctrl-C in a terminal is this process's business alone
        )


def processes_of(out: Path) -> list[psutil.Process]:
    """Every living process that was started for the run in OUT."""
    mark, found = str(out.resolve()), []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def end(processes: Iterable[psutil.Process], *, patience: float = 0.0) -> None:
    """End processes: ask them first where there are seconds of `patience`, then kill what is left."""
    left = list(processes)
    if patience > 0:
        _signal(left, signal.SIGTERM)
        _, left = psutil.wait_procs(left, timeout=patience)
    _signal(left, signal.SIGKILL)
    psutil.wait_procs(left, timeout=5)


def end_all(out: Path, *, patience: float = 0.0) -> int:
    """End every process of the run in OUT, also those that they start meanwhile; return how many there were.

    A process that just becomes another program shows no environment for a moment, so it takes two looks to be sure.
    """
    count, clear, until = 0, 0, time.monotonic() + 10 + patience
    while clear < 2 and time.monotonic() < until:
        left = processes_of(out)
        clear = 0 if left else clear + 1
        if left:
            count += len(left)
            end(left, patience=patience)
            patience = 0.0
        elif clear < 2:
            time.sleep(0.05)
    return count


def birth(pid: int) -> float:
    """When a process began, in seconds since the machine did: psutil's time would move when the clock is set.

    Raises:
        OSError: when there is no such process.
    """
    return _kernel_says(pid)[1]


def is_alive(pid: int, born: float) -> bool:
    """Whether the process of that number, and of that `birth`, still runs."""
    try:
        state, began = _kernel_says(pid)
    except OSError:
        return False
    return state != "Z" and abs(began - born) < 0.1


def _kernel_says(pid: int) -> tuple[str, float]:
    """A process's state and birth, from what stands behind its name: that may hold spaces and brackets (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19]) / os.sysconf("SC_CLK_TCK")


@contextmanager
def claim(out: Path) -> Iterator[int]:
    """Be the only server of the run in OUT, and end what a killed one left behind; yields how many processes that was.

    From here on all that this process and those that it starts write is for their own user alone, and so is OUT.

    Raises:
        ValueError: when another server runs it, or OUT is somebody else's.
    """
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    with private(out), (out / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read().strip() or "unknown"
            raise ValueError(f"{out} is served by another `fedloom server` (process {other})") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield end_all(out)


@contextmanager
def private(out: Path) -> Iterator[None]:
    """Keep OUT from other users of this machine, and what is made meanwhile, whatever the umask was.

    Raises:
        ValueError: when OUT belongs to somebody else, who could read and change it.
    """
    status = out.stat()
    if os.getuid() not in (status.st_uid, 0):
        raise ValueError(f"{out} must belong to the user who runs the server, it does not")
    if status.st_mode & 0o077:
        out.chmod(0o700)
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)


def _signal(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)
