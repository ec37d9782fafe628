"""The SuperLink of a run: started, watched, stopped; or one that was there before, joined.

Its files are in OUT/superlink: state.db (Flower's state, which keeps the devices' registration over restarts),
superlink.log, door.json and door.jsonl, nodes.json, app/ (what is sent through Flower), bin/ (what it starts) and home/
(Flower's own folder).
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import psutil

from fedloom.protocols.password import VARIABLE, fresh
from fedloom.server.bundle_app import SETTING, write_app
from fedloom.server.keys import ServerFiles
from fedloom.server.launcher import EXECUTOR, SERVER_APP, write_commands
from fedloom.server.processes import end_all, start_tethered
from fedloom.server.settings import Link

if TYPE_CHECKING:
    from fedloom.server.control import Control

FOLDER = "superlink"
LOG_FILE = "superlink.log"
DATABASE = "state.db"
LARGEST_LOG = 10 * 2**20  # bytes; a larger log is set aside
START_SECONDS = 120.0
CHECK_SECONDS, MOST_SILENCES = 10.0, 6  # how often it is asked whether it lives, and failures that mean it does not
TASK_POLL_SECONDS = "0.2"  # how often Flower looks whether there is a ServerApp to start


class Uplink(Protocol):
    """What a server needs of a SuperLink, whoever started it."""

    own: bool
    control: Control

    def start(self) -> None: ...

    def submit(self) -> int:
        """Submit the run; return Flower's number for it."""
        ...

    def stale_runs(self) -> list[int]:
        """Flower's numbers of the runs of this folder that are not over; of nobody else's."""
        ...

    def problem(self) -> str:
        """Why it no longer works; empty while it does."""
        ...

    def server_apps(self) -> list[psutil.Process]: ...

    def stop(self, *, patience: float = 0.0) -> None: ...


class SuperLink:
    """A SuperLink that is this server's own: it ends with it, and so does everything that it starts.

    Args:
        out: the run's folder.
        files: certificates; None speaks no TLS and asks for no keys.
    """

    own = True
    control: Control

    def __init__(self, link: Link, out: Path, files: ServerFiles | None) -> None:
        self._link, self._out, self._files = link, out, files
        self._folder = out / FOLDER
        self._process: subprocess.Popen[bytes] | None = None
        self._app = self._folder / "app"
        self._password = ""
        self._next_check, self._silences = 0.0, 0

    @property
    def address(self) -> str:
        """host:port, for this machine itself."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._link.host, self._link.host)
        return f"[{host}]:{self._link.port}" if ":" in host else f"{host}:{self._link.port}"

    @property
    def log(self) -> Path:
        return self._folder / LOG_FILE

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            ValueError: when its address cannot be listened on, or it ends at once.
        """
        check_free(self._link.host, self._link.port)
        write_app(self._app)
        write_commands(self._folder / "bin")
        self._password = fresh()
        trim(self.log)
        at = self.log.stat().st_size if self.log.exists() else 0
        self._process = start_tethered(self._command(), self._out, log=self.log, environment=self._environment())
        from fedloom.server.control import connect  # here: it loads much of Flower, which SuperLink does at this time

        until = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise ValueError(f"SuperLink did not start: {_last_line(self.log, at)} (all of it is in {self.log})")
            time.sleep(0.05)
        self._next_check, self._silences = time.monotonic() + CHECK_SECONDS, 0
        self.control = connect(self.address, self._files.ca if self._files else None, self._password)

    def submit(self) -> int:
        return self.control.start_run(self._app, {})

    def stale_runs(self) -> list[int]:
        return self.control.unfinished_runs()

    def problem(self) -> str:
        if self._process is None or self._process.poll() is not None:
            code = self._process.returncode if self._process else 0
            return f"it was killed (signal {-code})" if code < 0 else f"it ended (exit code {code})"
        if not any(EXECUTOR in _command_of(process) for process in self._children()):
            return "the part of it that starts ServerApps ended"
        if time.monotonic() >= self._next_check:
            self._silences = 0 if self._answers(5.0) else self._silences + 1
            trim(self.log)
            self._next_check = time.monotonic() + CHECK_SECONDS
        return "it does not answer" if self._silences >= MOST_SILENCES else ""

    def server_apps(self) -> list[psutil.Process]:
        return [process for process in self._children() if SERVER_APP in _command_of(process)]

    def stop(self, *, patience: float = 0.0) -> None:
        """End it and all that it started; kill what has not ended after `patience` seconds."""
        if self._process is not None:
            if patience > 0:
                self._process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(patience)
            self._process.kill()
            self._process.wait()
        end_all(self._out)

    def _children(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        try:
            return list(psutil.Process(self._process.pid).children(recursive=True))
        except psutil.Error:
            return []

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "fedloom.server.door", "--host", self._link.host]
        command += ["--port", str(self._link.port), "--database", str(self._folder / DATABASE)]
        if self._files is None:
            return [*command, "--insecure"]
        command += ["--ssl-ca-certfile", str(self._files.ca), "--ssl-certfile", str(self._files.certificate)]
        return [*command, "--ssl-keyfile", str(self._files.key), "--enable-supernode-auth"]

    def _environment(self) -> Mapping[str, str]:
        own, beside = self._folder.resolve() / "bin", Path(sys.executable).parent  # Flower's commands are in the second
        return {
            "PATH": os.pathsep.join([str(own), str(beside), os.environ.get("PATH", os.defpath)]),
            VARIABLE: self._password,
            "FEDLOOM_DOOR": str(self._folder.resolve()),
            "FLWR_HOME": str((self._folder / "home").resolve()),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": TASK_POLL_SECONDS,
        }

    def _answers(self, seconds: float = 2.0) -> bool:
        scheme = "https" if self._files else "http"
        context = ssl.create_default_context(cafile=str(self._files.ca)) if self._files else None
        try:
            with urllib.request.urlopen(f"{scheme}://{self.address}/health", timeout=seconds, context=context) as said:
                return bool(said.status == 200)
        except (OSError, urllib.error.URLError):
            return False


class JoinedLink:
    """A SuperLink that somebody else runs; its ServerApps must run on this machine."""

    own = False

    def __init__(self, name: str, out: Path) -> None:
        """
        Raises:
            ValueError: when Flower has no such connection.
        """
        self._app = out / FOLDER / "app"
        self._settings = {SETTING: str(out.resolve())}
        from fedloom.server.control import join

        self.control = join(name)

    def start(self) -> None:
        """Wait until it answers; it may be starting, too.

        Raises:
            ConnectionError: when it does not.
        """
        write_app(self._app)
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                self.control.nodes()
                return
            except ConnectionError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.5)

    def submit(self) -> int:
        return self.control.start_run(self._app, self._settings)

    def stale_runs(self) -> list[int]:
        return self.control.unfinished_runs(self._settings)

    def problem(self) -> str:
        return ""

    def server_apps(self) -> list[psutil.Process]:
        return []

    def stop(self, *, patience: float = 0.0) -> None:
        self.control.close()


def check_free(host: str, port: int) -> None:
    """Raise ValueError unless this machine can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except socket.gaierror as error:
            raise ValueError(f"cannot listen on {host}: {error.strerror}") from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}") from None
            raise ValueError(
                f"port {port} must be free, it is used by {_holder(port)}; end that, or set [link] port"
            ) from None


def trim(log: Path, largest: int = LARGEST_LOG) -> None:
    """Set a log aside that has grown too large; whoever appends to it goes on at its new beginning."""
    with suppress(FileNotFoundError):
        if log.stat().st_size > largest:
            shutil.copyfile(log, log.with_suffix(".log.old"))
            os.truncate(log, 0)


def _holder(port: int) -> str:
    """Who listens on a port, as far as this user may know."""
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another process"


def _command_of(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _last_line(path: Path, start: int) -> str:
    """The last line that a log got since byte `start`, without colours."""
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - 4000))
        lines = file.read().decode("utf-8", "replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:300] if said else "it said nothing"
