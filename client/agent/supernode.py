"""The link to the server: Flower's SuperNode, started, watched, and started again for as long as the agent lives."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final

import psutil

from fedloom.client.agent.home import Home
from fedloom.client.agent.launcher import SUPERNODE, write_commands
from fedloom.client.agent.link import SLACK, Link, clock_problem, probe, seconds_ahead
from fedloom.client.agent.linklog import CONNECTED, REFUSED, UNREACHABLE, LinkLog, is_last, meaning
from fedloom.protocols.bundle import write_secret
from fedloom.protocols.password import VARIABLE, fresh

log = logging.getLogger(__name__)

DELAYS: Final = (1.0, 30.0)  # seconds before another try: at first, and at most
_STEADY: Final = 60.0  # seconds of a link after which the next break counts as the first
_GOODBYE: Final = 10.0  # seconds that a SuperNode has to end when it is told to
_LAPSE: Final = 120.0  # seconds after which a server has surely noticed that an earlier SuperNode of this device died
_HANGING: Final = 20.0  # seconds after an error that ends a SuperNode in which it must have ended
_NUMBER: Final = re.compile(r"\d+")
_ENVIRONMENT: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # seconds; on loopback
    "PYTHONUNBUFFERED": "1",
}


class SuperNode:
    """Keeps one SuperNode running.

    One that follows a killed one is refused until the server has missed a heartbeat, some 40 s later: trying again is
    normal.

    Args:
        name: the device's.
        home: its state folder.
        say: is told, in one line, whenever the owner should know something.
    """

    def __init__(self, link: Link, name: str, home: Home, say: Callable[[str], None] = log.warning) -> None:
        self._link, self._name, self._home, self._say = link, name, home, say
        self._stopping, self._connected, self._problem = Event(), False, ""
        self._since, self._starts = 0.0, 0
        self._failed, self._refused, self._tries = 0.0, 0.0, 0
        self._process: subprocess.Popen[str] | None = None
        # The system binds a process to the thread that starts it: this one lives as long as any of them.
        self._thread = Thread(target=self._keep, name="supernode", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the SuperNode, giving it time to say goodbye to the server."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_GOODBYE + 10)

    def status(self) -> dict[str, Any]:
        """For the agent's status: whether the server can be reached, since when, and what is in the way."""
        return {
            "server": self._link.server,
            "connected": self._connected,
            "since": self._since,
            "problem": self._problem,
            "starts": self._starts,
            "process": self._process.pid if self._process else 0,
        }

    def _keep(self) -> None:
        self._clear_away()
        first, most = DELAYS
        delay = first
        while not self._stopping.is_set():
            problem = probe(self._link)
            began = time.monotonic()
            try:
                if not problem:
                    write_commands(self._home.link / "bin")
                    self._live()
            except OSError as error:
                problem = f"the link to the server cannot be started: {error.strerror or error}"
            if problem:
                self._tell(problem)
            if self._since and time.monotonic() - began > _STEADY:
                delay = first
            self._connected, self._since = False, 0.0
            self._stopping.wait(delay * random.uniform(0.5, 1.0))
            delay = min(2 * delay, most)

    def _live(self) -> None:
        """One life of a SuperNode, from its start to its end."""
        record = LinkLog(self._home.link / "supernode.log")
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedloom.client.agent.lifeline", str(os.getpid()), *self._command()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env=self._surroundings(),
            cwd=self._home.link,
        )
        self._process, self._starts, self._failed = process, self._starts + 1, 0.0
        (self._home.link / "supernode.pid").write_text(str(process.pid), encoding="ascii")
        reader = Thread(target=self._read, args=(process, record), name="supernode-log", daemon=True)
        reader.start()
        while process.poll() is None:
            if self._stopping.wait(0.2):
                self._end(process)
            elif self._hangs():
                record.write("fedloom: it hangs after an error; it is started again")
                self._end(process)
        _kill_group(process.pid)  # what it may have left behind
        reader.join(timeout=2)
        self._process = None
        record.close()
        (self._home.link / "supernode.pid").unlink(missing_ok=True)

    def _end(self, process: subprocess.Popen[str]) -> None:
        """Tell a SuperNode to end: once, since a second time would cut its goodbye short."""
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(_GOODBYE)
        except subprocess.TimeoutExpired:
            _kill_group(process.pid)
            process.wait()

    def _read(self, process: subprocess.Popen[str], record: LinkLog) -> None:
        """Write the log, and gather from it how the link is."""
        for line in process.stdout or ():
            plain = record.write(line)
            if any(sign in plain for sign in CONNECTED):
                self._came()
            elif said := meaning(plain):
                self._broke(said)
            if is_last(plain):
                self._failed = time.monotonic()

    def _hangs(self) -> bool:
        """Whether it has said its last word long ago: a SuperNode whose main thread failed does not always end."""
        return bool(self._failed) and time.monotonic() - self._failed > _HANGING

    def _broke(self, said: str) -> None:
        """Note what is in the way. One try that failed is no news, and none after a refusal."""
        now = time.monotonic()
        if said == UNREACHABLE:
            self._tries += 1
            if self._tries < 2 or self._refused:
                return
            said = clock_problem(seconds_ahead(self._link), -SLACK) or said  # Flower takes its word no better then
        elif said == REFUSED:  # which a server also says while it counts a SuperNode that was killed as connected
            self._refused = self._refused or now
            said = said if now - self._refused > _LAPSE else f"{said}, or still counted as connected from before"
        self._connected = False
        self._tell(said)

    def _came(self) -> None:
        self._failed, self._refused, self._tries = 0.0, 0.0, 0
        if not self._connected:
            self._connected, self._since, self._problem = True, time.time(), ""
            self._say(f"connected to {self._link.server}")

    def _tell(self, problem: str) -> None:
        """Say what is in the way, once: the same with other numbers, such as a clock a second on, is no news."""
        news = _NUMBER.sub("", problem) != _NUMBER.sub("", self._problem)
        self._problem = problem
        if news:
            self._say(problem)

    def _command(self) -> list[str]:
        link, folder = self._link, self._home.link
        command = [SUPERNODE, "--superlink", link.server]  # the launcher finds it a port
        command += ["--node-config", f"agent='{self._home.socket}' name='{self._name}'"]
        if link.insecure:
            return [*command, "--insecure"]
        write_secret(folder / "ca.crt", link.ca.encode())
        write_secret(folder / "device.key", link.key.encode())
        command += ["--root-certificates", str(folder / "ca.crt")]
        return [*command, "--auth-supernode-private-key", str(folder / "device.key")]

    def _surroundings(self) -> dict[str, str]:
        path = os.pathsep.join(
            [str(self._home.link / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        )
        own = {VARIABLE: fresh(), "PATH": path, "FLWR_HOME": str(self._home.link / "flower")}
        return {**os.environ, **_ENVIRONMENT, **own}

    def _clear_away(self) -> None:
        """End a SuperNode that an agent before this one has left; it is told to end when its agent dies."""
        path = self._home.link / "supernode.pid"
        try:
            pid = int(path.read_text(encoding="ascii"))
            process = psutil.Process(pid)
            mine = str(self._home.socket) in " ".join(process.cmdline())
        except (OSError, ValueError, psutil.Error):
            return
        if mine:
            with suppress(psutil.Error):
                process.wait(_GOODBYE)
            _kill_group(pid)


def _kill_group(leader: int) -> None:
    """End a process and all that it started; whoever leads a group gave it its own number."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
