"""What both stands of these tests share: ports, waiting, a run's events, and its processes by what they run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from fedloom.server.processes import processes_of

BIN = Path(sys.executable).parent
FEDLOOM = BIN / "fedloom"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """One thread each, no hub and no word to Flower's makers."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0"}


def launch(
    log: Path, *command: object, before: Sequence[str] = (), extra: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start `fedloom COMMAND` in the folder of its log: behind the words of `before`, with `extra` environment."""
    words = [*before, str(FEDLOOM), *(str(word) for word in command)]
    surroundings = environment() | dict(extra or {})
    with log.open("ab") as file:
        return subprocess.Popen(
            words, env=surroundings, stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=log.parent
        )


def wait_until(what: Callable[[], Any], *, seconds: float, pause: float, label: str, said: Callable[[], str]) -> Any:
    """Poll until `what` gives something true, and give it back; the error tells what the server said."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(pause)
    raise TimeoutError(f"waited {seconds:g} s for {label or what}; the server said:\n{said()}")


def events_of(out: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's events.jsonl."""
    path = out / "events.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line]


def command_of(process: psutil.Process) -> str:
    """Empty for a process that is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def of_run(out: Path, words: str) -> list[psutil.Process]:
    """The processes of a run whose command line holds `words`."""
    return [process for process in processes_of(out) if words in command_of(process)]


def kill(processes: list[psutil.Process]) -> int:
    """SIGKILL; how many there were."""
    killed = 0
    for process in processes:
        try:
            process.kill()
            killed += 1
        except psutil.NoSuchProcess:
            pass
    return killed
